"""Rows -> steps -> micro-batches. Pure, and decided before step 1, so that resuming is an index.

A stream of rows runs through the epochs; a step ends at the first row where the count of what `global_batch`
counts reaches k x global_batch. So only the last step may be partial.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from packcli.config import BatchUnit, TrainSpec
from packcli.seeds import rng

Ints = NDArray[np.int64]

LONGEST_MULTIPLE = 8
"""`pad_to: longest` rounds up to this, as the released code's collator does."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is counted of each row, `[R] int64`. `blocks` `[E + 1]`: where each packed epoch's rows begin."""

    tokens: Ints
    documents: Ints
    blocks: Ints

    def counts(self, unit: BatchUnit) -> Ints:
        match unit:
            case "rows":
                return np.ones(len(self.tokens), np.int64)
            case "documents":
                return self.documents
            case "tokens":
                return self.tokens

    def block(self, epoch: int) -> slice:
        number = epoch % (len(self.blocks) - 1)
        return slice(int(self.blocks[number]), int(self.blocks[number + 1]))


@dataclass(frozen=True, slots=True)
class Budget:
    """Exactly one is given. `steps` counts optimizer steps, `tokens` kept tokens."""

    epochs: int | None = None
    steps: int | None = None
    tokens: int | None = None


def steps(
    sizes: Sizes,
    budget: Budget,
    *,
    global_batch: int,
    unit: BatchUnit,
    seed: int,
    order: Literal["shuffled", "sorted"] = "shuffled",
) -> list[Ints]:
    """Row numbers of every step.

    `sorted` keeps rows of like length together (LongAlign's sorted batching, arXiv 2401.18058): an epoch's rows
    are sorted, cut into batches, and the batches put in random order.
    """
    if budget.steps == 0:
        return []
    stream = np.concatenate(list(_epochs(sizes, budget, global_batch, unit, seed, order)))
    reached = np.cumsum(sizes.counts(unit)[stream])
    if budget.tokens is not None:
        last = int(np.searchsorted(np.cumsum(sizes.tokens[stream]), budget.tokens)) + 1
        stream, reached = stream[:last], reached[:last]
    marks = np.arange(global_batch, int(reached[-1]) + global_batch, global_batch)
    ends = np.minimum(np.searchsorted(reached, marks) + 1, len(stream))
    # A row may hold several batches' worth of documents: it ends one step, never an empty second one.
    ends = np.unique(ends)
    if ends[-1] < len(stream):
        ends = np.append(ends, len(stream))
    cut = np.split(stream, ends[:-1])
    return cut[: budget.steps] if budget.steps is not None else cut


def position(sizes: Sizes, rows: int) -> tuple[int, int]:
    """(epoch, row in it) of the row that comes after `rows` rows of a run."""
    epoch = 0
    while rows >= (length := sizes.block(epoch).stop - sizes.block(epoch).start):
        rows -= length
        epoch += 1
    return epoch, rows


def run_steps(sizes: Sizes, train: TrainSpec, order: Literal["shuffled", "sorted"], seed: int) -> list[Ints]:
    """Row numbers of every step of a training run."""
    budget = Budget(train.epochs, train.steps, train.tokens)
    return steps(sizes, budget, global_batch=train.global_batch, unit=train.batch_unit, seed=seed, order=order)


def _epochs(
    sizes: Sizes, budget: Budget, global_batch: int, unit: BatchUnit, seed: int, order: str
) -> Iterator[Ints]:
    """Row orders of as many epochs as the budget can need."""
    counts, done = sizes.counts(unit), 0
    for epoch in range(_num_epochs(sizes, budget, global_batch, unit)):
        block = sizes.block(epoch)
        generator = rng(seed, "order", epoch)
        shuffled = generator.permutation(block.stop - block.start).astype(np.int64) + block.start
        if order == "sorted":
            shuffled = _sorted(shuffled, sizes.tokens, counts, global_batch, done, generator)
        done += int(counts[block].sum())
        yield shuffled


def _num_epochs(sizes: Sizes, budget: Budget, global_batch: int, unit: BatchUnit) -> int:
    if budget.epochs is not None:
        return budget.epochs
    block = sizes.block(0)
    if budget.steps is not None:
        counts = sizes.counts(unit)[block]
        # The row that crosses a mark belongs to the step it ends, so a step may take more than its share.
        return -(-budget.steps * (global_batch + int(counts.max())) // int(counts.sum()))
    return -(-(budget.tokens or 0) // int(sizes.tokens[block].sum()))


def _sorted(
    shuffled: Ints, tokens: Ints, counts: Ints, global_batch: int, done: int, generator: np.random.Generator
) -> Ints:
    """Rows by length, cut where the stream's steps will be cut, the pieces in random order.

    `done` counts what went before: an epoch may begin inside a step, whose rest is then its first piece.
    """
    by_length = shuffled[np.argsort(tokens[shuffled], kind="stable")]
    total = int(counts[shuffled].sum())
    marks = np.arange(global_batch - done % global_batch, total, global_batch)
    sizes = np.diff(np.concatenate([[0], marks, [total]]))
    drawn = generator.permutation(len(sizes))  # the piece that takes the shortest rows, the next, ...
    ends = np.searchsorted(np.cumsum(counts[by_length]), np.cumsum(sizes[drawn])) + 1
    pieces = np.split(by_length, np.minimum(ends, len(by_length))[:-1])
    placed = np.empty(len(sizes), np.int64)
    placed[drawn] = np.arange(len(sizes))
    return np.concatenate([pieces[number] for number in placed])


def peak_lr(train: TrainSpec, documents_per_step: float) -> float:
    """The learning rate after warm-up, under `train.lr_rule`; `documents_per_step`: the run's mean."""
    if train.reference_batch is None:
        return train.lr
    power = {"fixed": 0.0, "sqrt": 0.5, "linear": 1.0}[train.lr_rule]
    return train.lr * float((documents_per_step / train.reference_batch) ** power)


def micro_batches(
    rows: Ints, costs: NDArray[np.float64], train: TrainSpec, world: int, *, fixed: bool
) -> list[list[Ints]]:
    """Each rank's micro-batches of one step, equally many.

    `costs` [R] float64: of every row there is. `fixed`: how rows share a micro-batch changes the result, so they
    are cut as for `train.ranks` processes and only dealt to those there are.
    """
    if fixed:
        return deal(cut(rows, train.ranks, train.micro_batch), costs, world)
    return spread(rows, costs, world, train.micro_batch)


def cut(rows: Ints, ranks: int, micro_batch: int) -> list[Ints]:
    """One step's micro-batches as `ranks` processes would take them in turn: whole rows, none empty.

    Rank r has every `ranks`-th row from the r-th, as a distributed sampler deals them.
    """
    own = [rows[rank::ranks] for rank in range(ranks)]
    count = math.ceil(math.ceil(len(rows) / ranks) / micro_batch)
    parts = [part[n * micro_batch : (n + 1) * micro_batch] for n in range(count) for part in own]
    return [part for part in parts if len(part)]


def deal(parts: list[Ints], costs: NDArray[np.float64], world: int) -> list[list[Ints]]:
    """Each rank's micro-batches of one step: equally many, the costs balanced, some empty.

    `costs` [R] float64, of every row there is. The k-th micro-batches of all ranks are of like cost, because a
    sharded model makes ranks wait for each other at every layer.
    """
    if world == 1:
        return [parts]
    heavy = np.array([costs[part].sum() for part in parts])
    count = math.ceil(len(parts) / world)
    ranks = [[parts[number] for number in own] for own in balance(heavy, world)]
    empty = parts[0][:0]
    return [own + [empty] * (count - len(own)) for own in ranks]


def spread(rows: Ints, costs: NDArray[np.float64], world: int, micro_batch: int) -> list[list[Ints]]:
    """Each rank's micro-batches of one step whose loss any cut leaves alone: rows balanced over ranks by cost."""
    if world == 1:
        return [cut(rows, 1, micro_batch)]
    ranks = [rows[own] for own in balance(costs[rows], world)]
    count = math.ceil(math.ceil(len(rows) / world) / micro_batch)
    return [[own[n * micro_batch : (n + 1) * micro_batch] for n in range(count)] for own in ranks]


def balance(costs: NDArray[np.float64], world: int) -> list[list[int]]:
    """Items of each rank, heaviest first: each goes to the least loaded rank that has room (Graham's LPT rule).

    No rank gets more than ceil(items / world).
    """
    room = [math.ceil(len(costs) / world)] * world
    load = [0.0] * world
    ranks: list[list[int]] = [[] for _ in range(world)]
    for item in np.argsort(-costs, kind="stable").tolist():
        rank = min((rank for rank in range(world) if room[rank]), key=lambda rank: (load[rank], rank))
        ranks[rank].append(item)
        load[rank] += float(costs[item])
        room[rank] -= 1
    return ranks


def longest(tokens: Ints, max_length: int) -> int:
    """Slots of each row of a micro-batch padded to its longest row, given the rows' tokens."""
    rounded = -(-int(tokens.max()) // LONGEST_MULTIPLE) * LONGEST_MULTIPLE
    return min(rounded, max_length)
