"""A few documents, and the rows that each arm makes of them: what `draw.picture` shows. Pure: no files.

choose     which documents of a set: from short to long, enough of them to fill a few rows
documents  these, out of a token store
panels     the rows that each arm makes of them
counts     what is said of a panel: rows, efficiency, documents cut, tokens lost
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from packcli import batching
from packcli.config import ArmSpec
from packcli.data import index
from packcli.errors import DataError
from packcli.packing import Rows
from packcli.plan import Batching, IndexOrder

if TYPE_CHECKING:
    from packcli.data.tokens import Tokens

Ints = NDArray[np.int64]
Span = tuple[int, int]
"""[start, stop) in tokens of a document."""


@dataclass(frozen=True, slots=True)
class Document:
    """`length` in tokens before anything is cut; `supervised`: the tokens trained on, ascending, disjoint."""

    length: int
    supervised: tuple[Span, ...]
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One arm. `rows.document` counts the documents given to `picture`; `slots`: the size of each row.

    batch    rows of a micro-batch, where the padding of a row depends on its company; they are marked
    """

    name: str
    arm: ArmSpec
    rows: Rows
    slots: tuple[int, ...]
    batch: int | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """`cut`: documents in more than one row. `lost`: what lies in no row, as (document, start, stop)."""

    rows: int
    kept: int
    slots: int
    cut: int
    lost: tuple[tuple[int, int, int], ...]

    @property
    def tokens_lost(self) -> int:
        return sum(stop - start for _, start, stop in self.lost)


def choose(lengths: Ints, max_length: int, count: int = 12, rows: float = 5.0, among: int = 1000) -> list[int]:
    """`count` of the first `among` documents, from short to long, that fill about `rows` rows; ascending.

    Documents at even steps of the sorted lengths look like the set; where those would fill too few rows, or too
    many, the steps lean towards its long or its short end.
    """
    by_length = np.argsort(lengths[:among], kind="stable")
    count = min(count, len(by_length))
    steps, spare = (np.arange(count) + 0.5) / max(count, 1), len(by_length) - count
    # Step i takes place i plus a share of the spare ones: no document twice, whatever the leaning.
    found = [
        by_length[np.arange(count) + np.round(steps**power * spare).astype(np.int64)]
        for power in (1.0, 0.5, 2.0, 0.25, 4.0, 0.125, 8.0)
    ]
    best = min(found, key=lambda chosen: abs(float(lengths[chosen].sum()) / max_length - rows))
    return sorted(best.tolist())


def documents(tokens: Tokens, chosen: Sequence[int]) -> list[Document]:
    """These documents of a token store."""
    return [
        Document(
            length=len(tokens.ids(number)),
            supervised=tuple((int(start), int(stop)) for start, stop in tokens.supervised(number)),
            origin=tokens.origin(number),
        )
        for number in chosen
    ]


def panels(
    documents: Sequence[Document], arms: Mapping[str, ArmSpec], max_length: int, micro_batch: int, seed: int = 0
) -> list[Panel]:
    """What `packcli prepare` would make of a set that holds these documents only, none of it held out.

    An arm's `workers` share nothing, so one of them is drawn: the few documents would be one or none for each.
    Boundary tokens are left out: one or two beside hundreds would not be seen. An arm with `group_by` cannot be
    drawn: that says who shares a row by what documents say, and these are lengths.
    """
    few, drawn = _Few(documents), []
    batches = Batching(global_batch=micro_batch, batch_unit="rows", micro_batch=micro_batch, ranks=1)
    for name, arm in arms.items():
        order = IndexOrder(
            id="",
            tokens="",
            max_length=max_length,
            validation=0.0,
            seed=seed,
            layout=arm.rows.model_copy(update={"workers": 1, "boundary": "none"}),
            batching=batches,
            epochs=1,
        )
        try:
            rows = index.build(order, few, len(documents), 0)[0].rows
        except DataError:  # nothing left to train on, which is worth seeing
            nothing = np.zeros(0, np.int64)
            rows = Rows(nothing, nothing, nothing, np.zeros(1, np.int64))
        drawn.append(panel(name, arm, rows, max_length, micro_batch))
    return drawn


def panel(name: str, arm: ArmSpec, rows: Rows, max_length: int, micro_batch: int) -> Panel:
    """An arm's rows, batched in the order given, or shortest first for `order: sorted`, and their slots."""
    if arm.order == "sorted":
        rows = _reordered(rows, np.argsort(rows.tokens(), kind="stable"))
    rows, tokens = _whole(rows), rows.tokens()
    marked = micro_batch if micro_batch > 1 else None
    match arm.pad_to:
        case "none":
            return Panel(name, arm, rows, tuple(tokens.tolist()), marked)
        case "max_length":
            return Panel(name, arm, rows, (max_length,) * rows.num_rows)
        case "longest":
            batches = [tokens[first : first + micro_batch] for first in range(0, len(tokens), micro_batch)]
            slots = [batching.longest(inside, max_length) for inside in batches for _ in inside]
            return Panel(name, arm, rows, tuple(slots), marked)


class _Few:
    """`framed.Documents`, of a list."""

    def __init__(self, documents: Sequence[Document]) -> None:
        spans = [(number, *span) for number, document in enumerate(documents) for span in document.supervised]
        flat = np.array(spans, np.int64).reshape(-1, 3)
        self.num_documents = len(documents)
        self.lengths = np.array([document.length for document in documents], np.int64)
        self.content = np.zeros(len(documents), np.uint64)
        self.spans = (flat[:, 0], flat[:, 1], flat[:, 2])
        self.ends = (self.content.astype(np.int64), self.content.astype(np.int64))


def _reordered(rows: Rows, order: Ints) -> Rows:
    pieces = [np.arange(rows.offsets[row], rows.offsets[row + 1]) for row in order]
    flat = np.concatenate([np.zeros(0, np.int64), *pieces])
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    return Rows(rows.document[flat], rows.start[flat], rows.stop[flat], offsets)


def _whole(rows: Rows) -> Rows:
    """The same rows, pieces that follow on one another in a row made one: turns of a document that was cut."""
    first = index.opens(rows)
    first[1:] |= rows.start[1:] != rows.stop[:-1]
    last = np.append(first[1:], True)[: len(first)]
    offsets = np.concatenate([[0], np.cumsum(first)]).astype(np.int64)
    return Rows(rows.document[first], rows.start[first], rows.stop[last], offsets[rows.offsets])


def counts(documents: Sequence[Document], panel: Panel) -> Counts:
    """Rows, tokens kept, slots, documents in more than one row, and what lies in no row."""
    rows = panel.rows
    row = np.repeat(np.arange(rows.num_rows), np.diff(rows.offsets))
    cut, lost = 0, []
    for number, document in enumerate(documents):
        mine = np.flatnonzero(rows.document == number)
        cut += len(np.unique(row[mine])) > 1
        reached = 0
        for piece in mine[np.argsort(rows.start[mine])].tolist():
            lost.append((number, reached, int(rows.start[piece])))
            reached = max(reached, int(rows.stop[piece]))
        lost.append((number, reached, document.length))
    return Counts(
        rows=rows.num_rows,
        kept=int(rows.tokens().sum()),
        slots=sum(panel.slots),
        cut=cut,
        lost=tuple(gap for gap in lost if gap[1] < gap[2]),
    )
