"""The row index: which pieces of which documents lie in each row, and the ledger that accounts for every token.

Stored as Arrow columns `document`, `start`, `stop` (list<int32>, one entry a piece; places count boundary tokens,
see `framed.py`) and, per row, `tokens`, `boundary` (tokens between documents, if there are any), `documents` (that
start in it) and `supervised` (labels that reach the loss). Where each epoch is packed anew, the rows of all epochs
follow one another, and the file's metadata says where each begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from packcli import batching, grouping, packing, released
from packcli.batching import Sizes
from packcli.config import Packer
from packcli.data.framed import NONE, Documents, Framed, Marks, Spanned
from packcli.errors import DataError, IntegrityError
from packcli.files import atomic_write
from packcli.grouping import Groups
from packcli.packing import Rows
from packcli.plan import IndexOrder
from packcli.seeds import rng

Ints = NDArray[np.int64]

LEDGER_IDENTITIES = (
    ("conversations_in", ("conversations_rejected", "documents")),
    ("documents", ("documents_validation", "documents_dropped", "documents_kept")),
    ("tokens_in", ("tokens_validation", "tokens_truncated", "tokens_dropped", "tokens_kept")),
    ("slots", ("tokens_kept", "tokens_padding", "tokens_boundary")),
)
_BLOCKS = b"packcli.blocks"
_COUNTS = ("tokens", "boundary", "documents", "supervised")


@dataclass(frozen=True, slots=True)
class Index:
    """Rows over the token store's documents; the four counts are [R] int64, one number a row.

    tokens       of the documents: what is useful of a row
    boundary     tokens that stand between them
    documents    that start in it
    supervised   labels that reach the loss

    `blocks` [E + 1] int64: where the rows of each packed epoch begin; [0, R] where rows stay.
    """

    rows: Rows
    tokens: Ints
    boundary: Ints
    documents: Ints
    supervised: Ints
    blocks: Ints

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.tokens, self.documents, self.blocks)

    @property
    def counts(self) -> dict[str, Ints]:
        """What is counted of each row, by name."""
        return {name: getattr(self, name) for name in _COUNTS}

    @property
    def filled(self) -> Ints:
        """[R] int64: slots of each row that are no padding."""
        return self.tokens + self.boundary

    def squares(self, attention: Literal["document", "causal"]) -> Ints:
        """[R] int64: what attention costs in each row, sum(length^2) over what may look at each other.

        Pieces of one document that lie side by side, as a turn cut short leaves them, are one.
        """
        rows = self.rows
        if attention == "causal":
            return self.filled**2
        row = np.repeat(np.arange(rows.num_rows), np.diff(rows.offsets))
        first = np.ones(len(row), bool)
        first[1:] = (row[1:] != row[:-1]) | (rows.document[1:] != rows.document[:-1])
        segment = np.cumsum(first) - 1
        lengths = np.bincount(segment, rows.stop - rows.start)
        return np.bincount(row[first], lengths**2, minlength=rows.num_rows).astype(np.int64)

    def epoch(self, number: int) -> Index:
        """The rows of one packed epoch alone."""
        first, last = int(self.blocks[number]), int(self.blocks[number + 1])
        a, b = int(self.rows.offsets[first]), int(self.rows.offsets[last])
        rows = Rows(
            document=self.rows.document[a:b],
            start=self.rows.start[a:b],
            stop=self.rows.stop[a:b],
            offsets=self.rows.offsets[first : last + 1] - a,
        )
        cut = slice(first, last)
        counts = {name: values[cut] for name, values in self.counts.items()}
        return Index(rows, blocks=np.array([0, last - first]), **counts)


class Labels:
    """Counts supervised tokens of any piece of any document."""

    def __init__(self, documents: Spanned) -> None:
        document, start, stop = documents.spans
        self._lengths = documents.lengths
        self._base = np.concatenate([[0], np.cumsum(documents.lengths)]).astype(np.int64)
        self._start = self._base[document] + start
        self._stop = self._base[document] + stop
        self._before = np.concatenate([[0], np.cumsum(stop - start)]).astype(np.int64)
        self._all = np.bincount(document, stop - start, minlength=documents.num_documents).astype(np.int64)
        self._first_is_none = not len(start) or int(start.min()) > 0

    def count(self, document: Ints, start: Ints, stop: Ints) -> Ints:
        """[S] int64: supervised tokens in [start, stop) of each document."""
        found = self._all[document]
        # Most pieces are whole documents: to search for those, in packed order, takes a minute for ten million.
        part = np.flatnonzero((start > self._first_is_none) | (stop < self._lengths[document]))
        base = self._base[document[part]]
        found[part] = self._up_to(base + stop[part]) - self._up_to(base + start[part])
        return found

    def _up_to(self, position: Ints) -> Ints:
        """Supervised tokens before a position of all documents laid end to end."""
        opened = np.searchsorted(self._start, position, side="left")
        past = np.where(opened > 0, self._stop[opened - 1] - position, 0) if len(self._start) else 0
        return np.asarray(self._before[opened] - np.maximum(past, 0), dtype=np.int64)


def build(
    order: IndexOrder,
    documents: Documents,
    conversations: int,
    rejected: int,
    marks: Marks = NONE,
    groups: Groups | None = None,
) -> tuple[Index, Index, dict[str, Any]]:
    """Training rows, validation rows, and the ledger. `marks`: of the layout's boundary; `groups`: of `group_by`.

    Validation rows hold one document each, plainly truncated and without boundary tokens; under
    `validation_after_packing` they are rows of the packing, held out.

    Raises:
        DataError: no document is left to train on; `group_by` without groups.
        IntegrityError: the ledger does not close.
    """
    framed = Framed(documents, marks)
    labels, lengths = Labels(framed), framed.lengths
    everything = np.arange(documents.num_documents)
    fraction = 0.0 if order.layout.validation_after_packing else order.validation
    validation = documents.content < np.uint64(int(fraction * 2**64))
    fitted = _fitted(order, lengths)
    # Cut by turns, every document keeps the beginning of its first answer, however long what comes before is.
    reach = lengths if order.layout.truncation == "per_turn" else fitted
    labelled = labels.count(everything, np.zeros_like(lengths), reach) > 0
    offered = everything[~validation & labelled & (fitted > 0)]
    if not len(offered):
        raise DataError("no document is left to train on", "lower `data.validation` or raise `data.max_length`")
    if groups is None and order.layout.group_by != "none":
        cause = f"rows by `group_by: {order.layout.group_by}` depend on what documents say, not on lengths alone"
        raise DataError(cause, "`packcli prepare SWEEP` makes these rows")
    packed = [_pack(order, documents, offered, fitted, groups, epoch) for epoch in range(order.epochs)]
    epochs = [summarise(rows, labels, framed) for rows in packed]
    if order.layout.remainder == "drop":
        epochs = [_choose(index, np.flatnonzero(index.supervised)) for index in epochs]
    if order.layout.validation_after_packing:
        kept, held_out = released.validation_rows(epochs[0].rows.num_rows, order.validation, order.seed)
        held = _choose(epochs[0], held_out)
        epochs = [_choose(epochs[0], kept)]
    else:
        bare = Labels(documents)
        alone = _alone(everything[validation], documents.lengths, bare, order.max_length)
        held = summarise(alone, bare)
    if not all(index.rows.num_rows for index in epochs):
        few = f"no row is left to train on of {len(offered):,} documents"
        raise DataError(few, "the released code drops the rest of each window: it needs more data")
    ledger = {"conversations_in": conversations, "conversations_rejected": rejected}
    ledger |= _ledger(order, epochs[0], held, framed, fitted, validation)
    check(ledger)
    return _joined(epochs), held, ledger


def _fitted(order: IndexOrder, lengths: Ints) -> Ints:
    """[D] int64: slots each document asks of the packer after the over-long policy; 0: it is left out."""
    match order.layout.overlong:
        case "truncate":
            return np.minimum(lengths, order.max_length)
        case "drop":
            return np.where(lengths <= order.max_length, lengths, 0)
        case _:
            return lengths


def _pack(
    order: IndexOrder, documents: Documents, offered: Ints, fitted: Ints, groups: Groups | None, epoch: int
) -> Rows:
    """Rows over the store's documents."""
    lengths, layout = fitted[offered], order.layout
    generator = rng(order.seed, "pack", epoch)
    bounds = released.windows(len(offered), layout.window or max(1, len(offered)), layout.workers)
    match layout.packer:
        case "none":
            local = packing.one_per_row(lengths)
        case "concat" if layout.window:
            keep = layout.remainder == "keep"
            local = released.concat(lengths, order.max_length, bounds, keep_remainder=keep)
        case "concat":
            local = packing.concat(lengths, order.max_length, generator)
        case "first_fit_decreasing" if layout.window:
            local = released.first_fit_decreasing(lengths, order.max_length, bounds)
        case packer:
            local = _grouped(lengths, _whole(packer), order.max_length, groups, offered, generator)
    rows = Rows(document=offered[local.document], start=local.start, stop=local.stop, offsets=local.offsets)
    return _cut_turns(rows, documents, order.max_length) if layout.truncation == "per_turn" else rows


def _grouped(
    lengths: Ints,
    pack: grouping.Pack,
    max_length: int,
    groups: Groups | None,
    offered: Ints,
    generator: np.random.Generator,
) -> Rows:
    if groups is None:
        return pack(lengths, max_length, generator)
    group = groups.of[offered]
    if groups.likeness is None:
        return grouping.together(lengths, group, max_length, pack, generator)
    return grouping.apart(lengths, group, groups.likeness, max_length, generator)


def _whole(packer: Packer) -> grouping.Pack:
    """The packers that keep documents whole."""
    match packer:
        case "next_fit_decreasing":
            return packing.next_fit_decreasing
        case "first_fit_decreasing":
            return packing.first_fit_decreasing
        case "shuffled_first_fit":
            return packing.shuffled_first_fit
        case "best_fit":
            return packing.best_fit
        case "none" | "concat":
            raise ValueError(packer)


def sharing(index: Index, group: Ints) -> dict[str, Any]:
    """How often documents of one group meet in the first epoch's rows (`grouping.sharing`). `group`: [D] int64."""
    rows = index.epoch(0).rows
    row, first = np.repeat(np.arange(rows.num_rows), np.diff(rows.offsets)), opens(rows)
    return grouping.sharing(row[first], group[rows.document[first]])


def _cut_turns(rows: Rows, documents: Documents, max_length: int) -> Rows:
    """Truncated documents as the released code truncates: what is left of each turn's source and answer."""
    document, first, last = documents.spans
    span_of = np.searchsorted(document, np.arange(documents.num_documents + 1))
    counts = np.ones(len(rows.document), np.int64)
    pieces: list[tuple[int, list[tuple[int, int]]]] = []
    for place in np.flatnonzero(documents.lengths[rows.document] > rows.stop):
        spans = slice(*span_of[rows.document[place] : rows.document[place] + 2])
        before = np.concatenate([[0], last[spans][:-1]])
        answers = first[spans]
        kept = released.truncate_per_turn(
            (answers - before).tolist(), (last[spans] - answers).tolist(), max_length
        )
        starts = [begin for pair in zip(before.tolist(), answers.tolist(), strict=True) for begin in pair]
        sizes = [size for pair in kept for size in pair]
        cut = [(start, start + size) for start, size in zip(starts, sizes, strict=False) if size]
        pieces.append((int(place), cut))
        counts[place] = len(cut)
    ends = np.cumsum(counts)
    start, stop = np.repeat(rows.start, counts), np.repeat(rows.stop, counts)
    for shortened, cut in pieces:
        own = np.arange(ends[shortened] - len(cut), ends[shortened])
        start[own], stop[own] = zip(*cut, strict=True)
    bounds = np.concatenate([[0], ends])
    return Rows(np.repeat(rows.document, counts), start, stop, bounds[rows.offsets])


def _alone(held_out: Ints, lengths: Ints, labels: Labels, max_length: int) -> Rows:
    """Each held-out document on its own, plainly truncated; those without a label left say nothing."""
    fitted = np.minimum(lengths[held_out], max_length)
    labelled = labels.count(held_out, np.zeros_like(fitted), fitted) > 0
    alone = packing.one_per_row(fitted[labelled])
    return Rows(held_out[labelled][alone.document], alone.start, alone.stop, alone.offsets)


def opens(rows: Rows) -> NDArray[np.bool_]:
    """[S] bool: whether a piece opens a document in its row. One that goes on (a turn cut short) does not."""
    found = np.ones(len(rows.document), bool)
    found[1:] = rows.document[1:] != rows.document[:-1]
    found[rows.offsets[:-1][np.diff(rows.offsets) > 0]] = True
    return found


def supervised(rows: Rows, labels: Labels) -> Ints:
    """[S] int64: labels of each piece that reach the loss.

    The first token of a document in a row is none: nothing of its document comes before it.
    """
    return labels.count(rows.document, np.minimum(rows.start + opens(rows), rows.stop), rows.stop)


def summarise(rows: Rows, labels: Labels, framed: Framed | None = None) -> Index:
    """Rows with their counts. `framed`: the documents, if there are boundary tokens between them."""
    slots = rows.stop - rows.start
    tokens = slots if framed is None else framed.tokens(rows.document, rows.start, rows.stop)
    return Index(
        rows=rows,
        tokens=per_row(tokens, rows),
        boundary=per_row(slots - tokens, rows),
        documents=per_row((rows.start == 0).astype(np.int64), rows),
        supervised=per_row(supervised(rows, labels), rows),
        blocks=np.array([0, rows.num_rows]),
    )


def per_row(values: Ints, rows: Rows) -> Ints:
    """[R] int64: sums over each row's pieces."""
    totals = np.concatenate([[0], np.cumsum(values)]).astype(np.int64)
    return totals[rows.offsets[1:]] - totals[rows.offsets[:-1]]


def _choose(index: Index, chosen: Ints) -> Index:
    """Some rows of an index, in the order given."""
    rows, sizes = index.rows, np.diff(index.rows.offsets)[chosen]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    piece = np.arange(offsets[-1]) + np.repeat(rows.offsets[chosen] - offsets[:-1], sizes)
    kept = Rows(rows.document[piece], rows.start[piece], rows.stop[piece], offsets)
    counts = {name: values[chosen] for name, values in index.counts.items()}
    return Index(kept, blocks=np.array([0, len(chosen)]), **counts)


def _joined(epochs: list[Index]) -> Index:
    if len(epochs) == 1:
        return epochs[0]
    pieces = np.cumsum([0, *(len(index.rows.document) for index in epochs)])
    offsets = [index.rows.offsets[1:] + first for index, first in zip(epochs, pieces, strict=False)]
    return Index(
        rows=Rows(
            document=np.concatenate([index.rows.document for index in epochs]),
            start=np.concatenate([index.rows.start for index in epochs]),
            stop=np.concatenate([index.rows.stop for index in epochs]),
            offsets=np.concatenate([np.zeros(1, np.int64), *offsets]),
        ),
        blocks=np.cumsum([0, *(index.rows.num_rows for index in epochs)]),
        **{name: np.concatenate([index.counts[name] for index in epochs]) for name in _COUNTS},
    )


def _ledger(
    order: IndexOrder, index: Index, held: Index, framed: Framed, fitted: Ints, validation: NDArray[np.bool_]
) -> dict[str, Any]:
    """Every count but the conversations', as far as possible each from its own source, so that sums can fail."""
    after, lengths = order.layout.validation_after_packing, framed.bare.lengths
    kept = _tokens_of(index.rows, framed)
    in_rows = kept + _tokens_of(held.rows, framed) if after else kept
    absent = ~validation & (in_rows == 0)
    there = ~validation & ~absent
    whole = order.layout.overlong != "none"
    everything = np.arange(len(lengths))
    reached = framed.tokens(everything, 0, np.minimum(fitted, order.max_length)) if whole else lengths
    truncated = int((lengths - reached)[there].sum())
    dropped = int(lengths[absent].sum()) + int((reached - in_rows)[there].sum())
    if (
        order.layout.truncation == "per_turn"
    ):  # cuts more than the row's length: a turn that cannot begin is left out
        truncated, dropped = truncated + int((reached - in_rows)[there].sum()), int(lengths[absent].sum())
    slots = _slots(order, index)
    return {
        "documents": len(lengths),
        "documents_validation": int((validation | ((kept == 0) & (in_rows > 0))).sum()),
        "documents_dropped": int(absent.sum()),
        "documents_kept": int((kept > 0).sum()),
        "documents_cut": _documents_cut(index, held if after else None),
        "tokens_in": int(lengths.sum()),
        "tokens_validation": int(held.tokens.sum()) if after else int(lengths[validation].sum()),
        "tokens_truncated": truncated,
        "tokens_dropped": dropped,
        "tokens_kept": int(index.tokens.sum()),
        "tokens_padding": int(slots.sum() - index.filled.sum()),
        "tokens_boundary": int(index.boundary.sum()),
        "tokens_supervised": int(index.supervised.sum()),
        "rows": index.rows.num_rows,
        "rows_lower_bound": _lower_bound(order, index.rows, len(lengths), whole),
        "slots": int(slots.sum()),
        "efficiency": int(index.tokens.sum()) / int(slots.sum()),
    }


def _tokens_of(rows: Rows, framed: Framed) -> Ints:
    """[D] int64: tokens of each document that lie in these rows."""
    tokens = framed.tokens(rows.document, rows.start, rows.stop)
    return np.bincount(rows.document, tokens, minlength=framed.num_documents).astype(np.int64)


def _documents_cut(index: Index, held: Index | None) -> int:
    """Documents that lie in more than one row, rows held out after packing included."""
    appearances = [index.rows.document[opens(index.rows)]]
    if held is not None:
        appearances.append(held.rows.document[opens(held.rows)])
    return int((np.bincount(np.concatenate(appearances)) > 1).sum())


def _lower_bound(order: IndexOrder, rows: Rows, documents: int, whole: bool) -> int:
    slots = np.bincount(rows.document, rows.stop - rows.start, minlength=documents).astype(np.int64)
    present = slots[slots > 0]
    if order.layout.layout != "pack":
        return len(present)
    return packing.lower_bound(present, order.max_length) if whole else -(-int(present.sum()) // order.max_length)


def _slots(order: IndexOrder, index: Index) -> Ints:
    """Slots computed for each row in the first epoch, `[R] int64`."""
    match order.layout.pad_to:
        case "none":
            return index.filled
        case "max_length":
            return np.full(index.rows.num_rows, order.max_length)
        case "longest":
            return _longest(order, index)


def _longest(order: IndexOrder, index: Index) -> Ints:
    """As `train.ranks` processes batch them: more of them make other micro-batches of the same step."""
    assert order.batching is not None
    plan = order.batching
    steps = batching.steps(
        index.sizes,
        batching.Budget(epochs=1),
        global_batch=plan.global_batch,
        unit=plan.batch_unit,
        seed=order.seed,
        order=order.layout.order,
    )
    slots = np.zeros(index.rows.num_rows, np.int64)
    for step in steps:
        for rows in batching.cut(step, plan.ranks, plan.micro_batch):
            slots[rows] = batching.longest(index.filled[rows], order.max_length)
    return slots


def check(ledger: dict[str, Any]) -> None:
    """Raise `IntegrityError` unless every identity of the ledger holds exactly."""
    for whole, parts in LEDGER_IDENTITIES:
        total = sum(ledger[part] for part in parts)
        if ledger[whole] != total:
            raise IntegrityError(
                f"the ledger does not close: {whole} {ledger[whole]:,} != {' + '.join(parts)} {total:,}",
                "this is a bug: please report it with the sweep file",
            )


def write(path: Path, index: Index) -> None:
    rows = index.rows
    offsets = pa.array(rows.offsets, type=pa.int32())
    pieces = {
        name: pa.ListArray.from_arrays(offsets, pa.array(values, type=pa.int32()))
        for name, values in (("document", rows.document), ("start", rows.start), ("stop", rows.stop))
    }
    counts = {name: values for name, values in index.counts.items() if name != "boundary" or values.any()}
    table = pa.table({**pieces, **counts}).replace_schema_metadata({_BLOCKS: orjson.dumps(index.blocks.tolist())})
    with atomic_write(path) as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def read(path: Path) -> Index:
    """
    Raises:
        IntegrityError: it is gone, or no row index.
    """
    try:
        return _read(path)
    except (OSError, pa.ArrowException, LookupError, ValueError, TypeError):
        raise IntegrityError(
            f"{path}: gone, or no row index any more", f"delete {path.parent} and run again"
        ) from None


def _read(path: Path) -> Index:
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all().combine_chunks()

    def column(name: str) -> Any:
        return table.column(name).combine_chunks()

    def counts(name: str) -> Ints:
        if name == "boundary" and name not in table.column_names:
            return np.zeros(len(table), np.int64)
        return np.asarray(column(name).to_numpy(), dtype=np.int64)

    document = column("document")
    rows = Rows(
        document=document.values.to_numpy().astype(np.int64),
        start=column("start").values.to_numpy().astype(np.int64),
        stop=column("stop").values.to_numpy().astype(np.int64),
        offsets=document.offsets.to_numpy().astype(np.int64),
    )
    blocks = np.asarray(orjson.loads(table.schema.metadata[_BLOCKS]), dtype=np.int64)
    return Index(rows, blocks=blocks, **{name: counts(name) for name in _COUNTS})
