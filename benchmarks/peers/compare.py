"""Prepared documents of two programs against each other: ids, and which tokens are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from peers import measure


@dataclass(frozen=True, slots=True)
class Documents:
    """D documents end to end: lengths [D] int64, ids [T] int32, trained [T] bool; `rows` they were laid out in."""

    rows: int
    lengths: NDArray[np.int64]
    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]

    def kept(self, max_length: int) -> NDArray[np.int64]:
        """[D] int64: tokens of each document that a row of `max_length` can hold."""
        return np.minimum(self.lengths, max_length)

    def __iter__(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        ends = np.cumsum(self.lengths)
        for start, end in zip(ends - self.lengths, ends, strict=True):
            yield self.ids[start:end], self.trained[start:end]


def load(path: Path) -> Documents:
    """What `measure.save` wrote."""
    found = np.load(path)
    return Documents(int(found["rows"]), found["lengths"], found["ids"], found["trained"])


def save_store(tokens: Path, rows: int, path: Path) -> None:
    """A token store of ours in the form of `measure.save`, in the order of the records it was made from."""
    shards = [
        pa.ipc.open_stream(pa.memory_map(str(shard))).read_all() for shard in sorted(tokens.glob("shard-*.arrow"))
    ]
    table = pa.concat_tables(shards).sort_by("record")
    documents = []
    for ids, spans in zip(table.column("input_ids"), table.column("supervised"), strict=True):
        trained = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in spans.values.to_numpy().reshape(-1, 2):
            trained[start:stop] = True
        documents.append((ids.values.to_numpy(), trained))
    measure.save(path, rows, documents)


@dataclass(frozen=True, slots=True)
class Agreement:
    """documents = same_ids + other_ids; of those with the same ids, masks are equal but for the two last counts.

    straddling   masks that differ only in that ours leaves out the first token of an answer
    other_masks  masks that differ in any other way
    """

    documents: int
    same_ids: int
    straddling: int
    other_masks: int


def in_order(ours: Documents, theirs: Documents) -> Agreement:
    """Documents that both programs have in one order, untruncated."""
    assert len(ours.lengths) == len(theirs.lengths), (len(ours.lengths), len(theirs.lengths))
    pairs = [(a, m, n) for (a, m), (b, n) in zip(ours, theirs, strict=True) if np.array_equal(a, b)]
    return _agreement(len(ours.lengths), [(m, n) for _, m, n in pairs])


def in_any_order(ours: Documents, theirs: Documents, max_length: int) -> Agreement:
    """Documents found by their ids, cut to `max_length`: no two are equal, and a program may reorder them."""
    known = {ids.tobytes(): trained for ids, trained in theirs}
    masks = [(trained[:max_length], known.get(ids[:max_length].tobytes())) for ids, trained in ours]
    return _agreement(len(masks), [(mine, other) for mine, other in masks if other is not None])


def _agreement(documents: int, masks: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> Agreement:
    different = [(mine, other) for mine, other in masks if not np.array_equal(mine, other)]
    straddling = sum(_only_first_left_out(mine, other) for mine, other in different)
    return Agreement(documents, len(masks), straddling, len(different) - straddling)


def _only_first_left_out(mine: NDArray[np.bool_], other: NDArray[np.bool_]) -> bool:
    """Every token they disagree on is trained on by the other, and opens a span of it."""
    places = np.flatnonzero(mine != other)
    return bool(other[places].all() and not other[places - 1].any())
