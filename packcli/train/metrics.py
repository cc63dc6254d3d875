"""The numbers of a training step, and of a whole run: one line of `metrics.jsonl`, and a manifest's results. Pure.

Every rate is over all processes together; MFU is of one device. What is not known is null, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from packcli import flops

GIB = 2**30


class Step(TypedDict):
    """What the loop knows of optimizer step `step`, counted from 1; counts are of all processes.

    tokens       kept document tokens; boundary tokens and padding are only in `slots`
    supervised   labels that reach the loss
    squares      sum(length^2) over what may look at each other, as `Index.squares` counts it
    step_s       seconds from the batch's assembly to the end of the update; saving and validation are not in it
    peak_bytes   most memory allocated on a device so far, the highest of all; None where it is not measured
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    rows: int
    documents: int
    tokens: int
    supervised: int
    slots: int
    squares: int
    step_s: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """What turns a step's counts into rates.

    `device`: its name as torch says it, such as `NVIDIA H200`; `cpu`. `world`: processes, a device each.
    `trainable`: parameters LoRA adds; None where every weight trains.
    """

    shape: flops.Shape | None
    device: str
    world: int
    max_length: int
    trainable: int | None = None

    def record(self, **step: Unpack[Step]) -> dict[str, Any]:
        """One line of `metrics.jsonl`.

        `mfu` holds the model FLOPs of useful tokens (attention as masked, the head where it is computed) against
        the dense bf16 peak; `mfu_full_square` counts them as torchtitan does. `model_tflops_per_s` is the
        numerator of `mfu`, of one device, and known also where the peak is not.
        """
        seconds = step["step_s"]
        strict, square = self._flops(step)
        peak = flops.peak(self.device)
        memory = step["peak_bytes"]
        return {
            **{name: value for name, value in step.items() if name in _AS_THEY_ARE},
            "efficiency": _ratio(step["tokens"], step["slots"]),
            "step_s": seconds,
            "useful_tokens_per_s": _ratio(step["tokens"], seconds),
            "padded_tokens_per_s": _ratio(step["slots"], seconds),
            "supervised_tokens_per_s": _ratio(step["supervised"], seconds),
            "model_tflops_per_s": _ratio(strict, seconds * self.world * 1e12),
            "mfu": _ratio(strict, seconds * self.world * peak if peak else None),
            "mfu_full_square": _ratio(square, seconds * self.world * peak if peak else None),
            "peak_memory_gib": _ratio(memory, GIB),
        }

    def _flops(self, step: Step) -> tuple[float | None, float | None]:
        """As masked, and as torchtitan counts; None where layers do not look as far back as `squares` assumes."""
        shape, tokens = self.shape, step["tokens"]
        if shape is None or (shape.window is not None and shape.window < self.max_length):
            return None, None
        strict = flops.training(
            shape,
            tokens=tokens,
            squares=step["squares"],
            supervised=step["supervised"],
            trainable=self.trainable,
        )
        return strict, flops.full_square(
            shape, tokens=tokens, max_length=self.max_length, trainable=self.trainable
        )


_COUNTS = ("rows", "documents", "tokens", "supervised", "slots")
_AS_THEY_ARE = frozenset({"step", "loss", "lr", "grad_norm", *_COUNTS})


def results(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of a whole run from the records of its steps, in the words of a report.

    `final_loss` is the token mean over the last tenth of the steps. Rates and MFU are over all steps, the slow
    first ones included, and the same however often the run was interrupted: steps done twice are in no record.
    """
    total = {name: sum(record[name] for record in records) for name in _COUNTS}
    wall = sum(record["step_s"] for record in records)
    tail = records[-max(1, len(records) // 10) :]
    final = sum(record["loss"] * record["supervised"] for record in tail)
    memory = [record["peak_memory_gib"] for record in records if record["peak_memory_gib"] is not None]
    return {
        "steps": len(records),
        **total,
        "final_loss": _ratio(final, sum(record["supervised"] for record in tail)),
        "wall_s": wall,
        "useful_tokens_per_s": _ratio(total["tokens"], wall),
        "padded_tokens_per_s": _ratio(total["slots"], wall),
        "supervised_tokens_per_s": _ratio(total["supervised"], wall),
        **{name: _over_time(records, name) for name in ("model_tflops_per_s", "mfu", "mfu_full_square")},
        "peak_memory_gib": max(memory, default=None),
    }


def _over_time(records: Sequence[dict[str, Any]], rate: str) -> float | None:
    """The mean of a rate weighted by time, which is the work of the run over its time."""
    if any(record[rate] is None for record in records):
        return None
    return _ratio(
        sum(record[rate] * record["step_s"] for record in records), sum(record["step_s"] for record in records)
    )


def _ratio(amount: float | None, per: float | None) -> float | None:
    return amount / per if amount is not None and per else None
