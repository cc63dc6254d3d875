"""What a training will take, before it runs: rows, steps, FLOPs, hours, and the memory of a GPU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from packcli import batching, memory, rates, shapes
from packcli import estimate as estimates
from packcli.config import EstimateSpec
from packcli.estimate import Estimate, StepArithmetic, Visits
from packcli.memory import Memory
from packcli.plan import Plan, TrainOrder
from packcli.rates import SlotRate
from packcli.store import Store

if TYPE_CHECKING:
    from packcli.data.index import Index


class Costs(NamedTuple):
    """What is known of a training before it runs; None: not prepared, model not known, no cluster named."""

    estimate: Estimate
    step: StepArithmetic | None
    memory: Memory | None


class _Counted(NamedTuple):
    """Rows to count, and how often the run sees each. `number`: of the data, of which `rows` may be a sample."""

    rows: Index
    ledger: dict[str, Any]
    seen: Visits
    number: int
    lengths: Literal["prepared", "fitted"]


def of(order: TrainOrder, plan: Plan, store: Store, spec: EstimateSpec) -> Costs:
    """Exact once prepared. Before that the paper's sets are counted by fitted lengths, other data not at all."""
    source = store.manifest("tokens", order.tokens)
    shape = shapes.shape(order.model, source.results["vocab_size"] if source else None)
    needs = rate = None
    if shape is not None and spec.cluster is not None:
        needs = memory.estimate(shape, order.train, order.model.dtype, order.max_length, spec.cluster)
        rate = rates.slot_rate(spec, shape)
    found = _prepared(order, store) or _fitted(order, plan)
    if found is None:
        return Costs(Estimate(), None, needs)
    rows, total = found.rows, found.seen.total
    slots = estimates.row_slots(rows.filled, order.arm, order.max_length, found.ledger)
    timed = slots
    if rate is not None and _as_full(order, rate):
        timed = np.full(len(slots), float(order.max_length))
        rate = dataclasses.replace(rate, text=rate.text + rates.AS_FULL)
    squares = rows.squares(order.arm.attention)
    counts = estimates.Counts(
        rows=found.number,
        steps=found.seen.steps,
        tokens=total(rows.tokens),
        squares=total(squares),
        supervised=total(rows.supervised),
        slots=total(timed),
        slot_squares=total(squares + (timed - rows.filled) ** 2),  # padding sees only itself
    )
    cost = estimates.estimate(counts, shape, order.train, spec.cluster, rate, found.lengths)
    return Costs(cost, estimates.step_arithmetic(rows.sizes, slots, found.seen, order.train), needs)


def _as_full(order: TrainOrder, rate: SlotRate) -> bool:
    """Whether a row takes the time of a full one, at that rate."""
    return rate.as_full and order.arm.pad_to == "longest" and order.arm.order == "shuffled"


def _prepared(order: TrainOrder, store: Store) -> _Counted | None:
    if (manifest := store.manifest("index", order.index)) is None:
        return None
    from packcli.data import index

    rows = index.read(store.rows(order.index))
    steps = batching.run_steps(rows.sizes, order.train, order.arm.order, order.seed)
    number = rows.rows.num_rows
    return _Counted(rows, manifest.results["ledger"], estimates.visits(steps, number), number, "prepared")


def _fitted(order: TrainOrder, plan: Plan) -> _Counted | None:
    from packcli.data import fitted

    found = fitted.sample(plan.tokens[order.tokens], plan.indexes[order.index])
    if found is None:
        return None
    seen = estimates.visits_of_sample(found.index.sizes, order.train, found.times)
    return _Counted(found.index, found.ledger, seen, round(found.index.rows.num_rows * found.times), "fitted")
