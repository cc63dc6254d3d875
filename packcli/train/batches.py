"""Which rows each step holds: decided before step 1, the same on every rank, so resuming is an index."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from packcli.config import TrainSpec
from packcli.data.index import Index
from packcli.seeds import rng

Ints = NDArray[np.int64]


def plan(index: Index, train: TrainSpec, seed: int) -> list[Ints]:
    """Row numbers of every step.

    Rows go in an order shuffled anew each epoch; a step ends at the first row where the count of what
    `global_batch` counts reaches k x global_batch. The stream runs on over the end of an epoch, so only the
    last step may be partial.
    """
    order = np.concatenate(list(_epochs(index, train, seed)))
    reached = np.cumsum(_weights(index, train)[order])
    if train.tokens is not None:
        last = int(np.searchsorted(np.cumsum(index.tokens[order]), train.tokens)) + 1
        order, reached = order[:last], reached[:last]
    marks = np.arange(train.global_batch, int(reached[-1]) + train.global_batch, train.global_batch)
    ends = np.minimum(np.searchsorted(reached, marks) + 1, len(order))
    # A row may hold several batches' worth of documents: it ends one step, never an empty second one.
    ends = np.unique(ends)
    if ends[-1] < len(order):
        ends = np.append(ends, len(order))
    steps = np.split(order, ends[:-1])
    return steps[: train.steps] if train.steps is not None else steps


def _epochs(index: Index, train: TrainSpec, seed: int) -> Iterator[Ints]:
    """Row orders of as many epochs as the budget can need."""
    if train.epochs is not None:
        epochs = train.epochs
    elif train.steps is not None:
        # The row that crosses a mark belongs to the step it ends, so a step may take more than its share.
        heaviest = int(_weights(index, train).max())
        wanted = train.steps * (train.global_batch + heaviest)
        epochs = -(-wanted // int(_weights(index, train).sum()))
    else:
        epochs = -(-(train.tokens or 0) // int(index.tokens.sum()))
    for epoch in range(epochs):
        yield rng(seed, "order", epoch).permutation(index.rows.num_rows).astype(np.int64)


def _weights(index: Index, train: TrainSpec) -> Ints:
    match train.batch_unit:
        case "rows":
            return np.ones(index.rows.num_rows, np.int64)
        case "documents":
            return index.documents
        case "tokens":
            return index.tokens


def share(rows: Ints, rank: int, world: int, micro_batch: int) -> list[Ints]:
    """This rank's micro-batches of one step: whole rows, as many micro-batches on every rank, some empty."""
    own = rows[rank::world]
    most = math.ceil(len(rows) / world)
    count = math.ceil(most / micro_batch)
    return [own[number * micro_batch : (number + 1) * micro_batch] for number in range(count)]
