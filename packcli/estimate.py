"""What a cell will cost, from counts that are known before it runs. Pure.

Rows and steps are exact once the row index exists. Hours need a rate (`rates.py`), so without one they are null:
never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from packcli import batching, flops, memory
from packcli.batching import Ints, Sizes
from packcli.config import ClusterSpec, LayoutSpec, Spec, TrainSpec
from packcli.rates import SlotRate


class Estimate(Spec):
    """`flops`: model FLOPs of the whole run. null: not known yet (`packcli prepare` first), or no rate known.

    `hours` on the cluster named in the sweep, `gpu_hours` = hours x its GPUs, at the slot rate that `rate` names.
    `lengths`: what rows are made of: prepared data, or lengths fitted to the paper's printed steps, not measured.
    """

    rows: int | None = None
    steps: int | None = None
    flops: float | None = None
    hours: float | None = None
    gpu_hours: float | None = None
    lengths: Literal["prepared", "fitted"] | None = None
    rate: str | None = None


class StepArithmetic(Spec):
    """What an optimizer step holds, on average over the run, and the learning rate that follows.

    `documents` start in the step's rows; `tokens` are useful ones; `slots` count padding too. `lr`: the peak.
    """

    steps: int
    rows: float
    documents: float
    tokens: float
    slots: float
    lr: float
    lr_given: float
    lr_rule: str
    reference_batch: int | None

    def text(self) -> str:
        """One line: how rows become conversations and tokens, how many steps there are, which learning rate."""
        if not self.steps:
            return "no steps: the model is scored as it comes"
        per_row = self.documents / self.rows
        one = f"1 row = {_number(per_row)} conversation{'' if _number(per_row) == '1' else 's'}"
        step = (
            f"{_number(self.rows)} rows = {_number(self.documents)} conversations, "
            f"{self.tokens:,.0f} useful tokens of {self.slots:,.0f} slots a step"
        )
        return f"{one}: {step}; {self.steps:,} step{'' if self.steps == 1 else 's'}; lr {self._rate()}"

    def _rate(self) -> str:
        if self.reference_batch is None:
            return f"{self.lr_given:g}"
        ratio = f"{_number(self.documents)} / {self.reference_batch:,}"
        factor = {"sqrt": f"sqrt({ratio})", "linear": ratio}[self.lr_rule]
        return f"{self.lr_given:g} x {factor} = {self.lr:.3g}"


def row_slots(filled: Ints, arm: LayoutSpec, max_length: int, ledger: Mapping[str, Any]) -> NDArray[np.float64]:
    """[R] float64: slots of each row. `filled` [R]: those that are no padding.

    `pad_to: longest` depends on a row's company in each epoch; rows get what they had on average in the first one.
    """
    match arm.pad_to:
        case "none":
            return filled.astype(np.float64)
        case "max_length":
            return np.full(len(filled), float(max_length))
        case "longest":
            share: float = ledger["slots"] / (ledger["tokens_kept"] + ledger["tokens_boundary"])
            return filled.astype(np.float64) * share


@dataclass(frozen=True, slots=True)
class Visits:
    """`times` [R] float64: how often a run sees each row, on average. `steps`: of the whole run."""

    times: NDArray[np.float64]
    steps: int

    def total(self, values: Ints | NDArray[np.float64]) -> float:
        """Of something counted of each row, `[R]`, over the whole run."""
        return float((values * self.times).sum())


def visits(steps: list[Ints], num_rows: int) -> Visits:
    """Of a run whose steps are known (`batching.run_steps`)."""
    rows = np.concatenate([np.zeros(0, np.int64), *steps])
    return Visits(np.bincount(rows, minlength=num_rows).astype(np.float64), len(steps))


def visits_of_sample(sizes: Sizes, train: TrainSpec, times: float) -> Visits:
    """Of a run on `times` as many rows as these.

    Steps end at multiples of `global_batch`, so there are as many as multiples are reached.
    """
    units = times * float(sizes.counts(train.batch_unit).sum())
    if train.epochs is not None:
        epochs = float(train.epochs)
    elif train.steps is not None:
        epochs = train.steps * train.global_batch / units
    else:
        epochs = (train.tokens or 0) / (times * float(sizes.tokens.sum()))
    steps = train.steps if train.steps is not None else math.ceil(epochs * units / train.global_batch)
    return Visits(np.full(len(sizes.tokens), epochs * times), steps)


def step_arithmetic(sizes: Sizes, slots: NDArray[np.float64], seen: Visits, train: TrainSpec) -> StepArithmetic:
    """`slots` [R]: of each row (`row_slots`)."""
    each = max(1, seen.steps)
    documents = seen.total(sizes.documents) / each
    return StepArithmetic(
        steps=seen.steps,
        rows=float(seen.times.sum()) / each,
        documents=documents,
        tokens=seen.total(sizes.tokens) / each,
        slots=seen.total(slots) / each,
        lr=batching.peak_lr(train, documents),
        lr_given=train.lr,
        lr_rule=train.lr_rule,
        reference_batch=train.reference_batch,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Of the whole run, but for `rows`, which are those of the data.

    `squares`: sum of squared lengths that attention sees; `slots` and `slot_squares`: the same of what takes time,
    padding included.
    """

    rows: int
    steps: int
    tokens: float
    squares: float
    supervised: float
    slots: float
    slot_squares: float


def estimate(
    counts: Counts,
    shape: flops.Shape | None,
    train: TrainSpec,
    cluster: ClusterSpec | None,
    rate: SlotRate | None,
    lengths: Literal["prepared", "fitted"] = "prepared",
) -> Estimate:
    """FLOPs where the model's shape is known; hours where there are a cluster and a rate too."""
    found = Estimate(rows=counts.rows, steps=counts.steps, lengths=lengths)
    if shape is None:
        return found
    adapters = None if train.lora is None else shape.layers * memory.adapter_parameters(shape, train.lora)

    def work(tokens: float, squares: float) -> float:
        return flops.training(
            shape,
            tokens=int(tokens),
            squares=int(squares),
            supervised=int(counts.supervised),
            trainable=adapters,
        )

    found = found.model_copy(update={"flops": work(counts.tokens, counts.squares)})
    if cluster is None or rate is None or not (peak := memory.peak_flops(cluster.gpu)):
        return found
    gpu_hours = work(counts.slots, counts.slot_squares) / (peak * rate.mfu) / 3600
    hours = gpu_hours / cluster.gpus
    return found.model_copy(update={"hours": hours, "gpu_hours": gpu_hours, "rate": rate.text})


def total(estimates: list[Estimate]) -> Estimate:
    """Sums over cells, as if they ran one after another; null where any cell's is null."""

    def add(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if values and len(known) == len(values) else None

    rows, steps = (add([getattr(e, key) for e in estimates]) for key in ("rows", "steps"))
    return Estimate(
        rows=None if rows is None else int(rows),
        steps=None if steps is None else int(steps),
        flops=add([e.flops for e in estimates]),
        hours=add([e.hours for e in estimates]),
        gpu_hours=add([e.gpu_hours for e in estimates]),
    )


def _number(value: float) -> str:
    """783 or 6.1."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}".removesuffix(".0")
