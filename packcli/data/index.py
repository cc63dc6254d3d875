"""The row index: which pieces of which documents lie in each row, and the ledger that accounts for every token.

Stored as Arrow columns `document`, `start`, `stop` (list<int32>, one entry a piece) and, per row, `tokens`,
`documents` (that start in it) and `supervised` (labels that reach the loss).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packcli import packing
from packcli.data.tokens import Tokens
from packcli.errors import DataError, IntegrityError
from packcli.files import atomic_write
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


@dataclass(frozen=True, slots=True)
class Index:
    """Rows over the token store's documents; the last three are [R] int64, one number a row."""

    rows: Rows
    tokens: Ints
    documents: Ints
    supervised: Ints


class Labels:
    """Counts supervised tokens of any piece of any document."""

    def __init__(self, tokens: Tokens) -> None:
        document, start, stop = tokens.spans
        self._base = np.concatenate([[0], np.cumsum(tokens.lengths)]).astype(np.int64)
        self._start = self._base[document] + start
        self._stop = self._base[document] + stop
        self._before = np.concatenate([[0], np.cumsum(stop - start)]).astype(np.int64)

    def count(self, document: Ints, start: Ints, stop: Ints) -> Ints:
        """[S] int64: supervised tokens in [start, stop) of each document."""
        base = self._base[document]
        return self._up_to(base + stop) - self._up_to(base + start)

    def _up_to(self, position: Ints) -> Ints:
        """Supervised tokens before a position of all documents laid end to end."""
        opened = np.searchsorted(self._start, position, side="left")
        past = np.where(opened > 0, self._stop[opened - 1] - position, 0) if len(self._start) else 0
        return np.asarray(self._before[opened] - np.maximum(past, 0), dtype=np.int64)


def build(
    order: IndexOrder, tokens: Tokens, conversations: int, rejected: int
) -> tuple[Index, Index, dict[str, Any]]:
    """Training rows, validation rows (each document alone, plainly truncated), and the ledger.

    Raises:
        DataError: no document is left to train on.
        IntegrityError: the ledger does not close.
    """
    lengths, labels = tokens.lengths, Labels(tokens)
    everything = np.arange(tokens.num_documents)
    validation = tokens.content < np.uint64(int(order.validation * 2**64))
    fitted = np.minimum(lengths, order.max_length)
    kept_lengths = fitted if order.layout.overlong == "truncate" else lengths
    labelled = labels.count(everything, np.zeros_like(lengths), kept_lengths) > 0
    kept = everything[~validation & labelled]
    dropped = everything[~validation & ~labelled]
    if not len(kept):
        raise DataError("no document is left to train on", "lower `data.validation` or raise `data.max_length`")
    local = _pack(order, kept_lengths[kept])
    rows = Rows(document=kept[local.document], start=local.start, stop=local.stop, offsets=local.offsets)
    index = summarise(rows, labels)
    held_out = everything[validation & (labels.count(everything, np.zeros_like(lengths), fitted) > 0)]
    alone = packing.one_per_row(fitted[held_out])
    held = Rows(document=held_out[alone.document], start=alone.start, stop=alone.stop, offsets=alone.offsets)
    ledger = _ledger(order, index, lengths, kept, dropped, everything[validation])
    ledger |= {"conversations_in": conversations, "conversations_rejected": rejected}
    check(ledger)
    return index, summarise(held, labels), ledger


def _pack(order: IndexOrder, lengths: Ints) -> Rows:
    generator = rng(order.seed, "pack")
    match order.layout.packer:
        case "none":
            return packing.one_per_row(lengths)
        case "concat":
            return packing.concat(lengths, order.max_length, generator)
        case "next_fit_decreasing":
            return packing.next_fit_decreasing(lengths, order.max_length, generator)
        case "best_fit":
            return packing.best_fit(lengths, order.max_length, generator)


def summarise(rows: Rows, labels: Labels) -> Index:
    """Per-row counts. The first token of a piece is no label: nothing of its document comes before it."""
    supervised = labels.count(rows.document, np.minimum(rows.start + 1, rows.stop), rows.stop)
    return Index(
        rows=rows,
        tokens=_per_row(rows.stop - rows.start, rows),
        documents=_per_row((rows.start == 0).astype(np.int64), rows),
        supervised=_per_row(supervised, rows),
    )


def _per_row(values: Ints, rows: Rows) -> Ints:
    totals = np.concatenate([[0], np.cumsum(values)]).astype(np.int64)
    return totals[rows.offsets[1:]] - totals[rows.offsets[:-1]]


def _ledger(
    order: IndexOrder, index: Index, lengths: Ints, kept: Ints, dropped: Ints, validation: Ints
) -> dict[str, Any]:
    """Every count but the conversations', each taken from its own source so that the identities can fail."""
    rows, tokens_kept = index.rows, int(index.tokens.sum())
    whole = order.layout.overlong == "truncate"
    reached = np.minimum(lengths[kept], order.max_length) if whole else lengths[kept]
    match order.layout.layout:
        case "padding_free":
            slots, bound = tokens_kept, len(kept)
        case "pad":
            slots, bound = rows.num_rows * order.max_length, len(kept)
        case "pack":
            slots = rows.num_rows * order.max_length
            bound = (
                packing.lower_bound(reached, order.max_length) if whole else -(-tokens_kept // order.max_length)
            )
    pieces = np.bincount(rows.document, minlength=len(lengths))
    return {
        "documents": len(lengths),
        "documents_validation": len(validation),
        "documents_dropped": len(dropped),
        "documents_kept": int((pieces > 0).sum()),
        "documents_cut": int((pieces > 1).sum()),
        "tokens_in": int(lengths.sum()),
        "tokens_validation": int(lengths[validation].sum()),
        "tokens_truncated": int((lengths[kept] - reached).sum()),
        "tokens_dropped": int(lengths[dropped].sum()),
        "tokens_kept": tokens_kept,
        "tokens_padding": int((order.max_length - index.tokens).sum())
        if order.layout.layout != "padding_free"
        else 0,
        "tokens_boundary": 0,
        "tokens_supervised": int(index.supervised.sum()),
        "rows": rows.num_rows,
        "rows_lower_bound": int(bound),
        "slots": slots,
        "efficiency": tokens_kept / slots,
    }


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
    counts = {"tokens": index.tokens, "documents": index.documents, "supervised": index.supervised}
    table = pa.table({**pieces, **counts})
    with atomic_write(path) as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def read(path: Path) -> Index:
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all().combine_chunks()

    def column(name: str) -> Any:
        return table.column(name).combine_chunks()

    def counts(name: str) -> Ints:
        return np.asarray(column(name).to_numpy(), dtype=np.int64)

    document = column("document")
    rows = Rows(
        document=document.values.to_numpy().astype(np.int64),
        start=column("start").values.to_numpy().astype(np.int64),
        stop=column("stop").values.to_numpy().astype(np.int64),
        offsets=document.offsets.to_numpy().astype(np.int64),
    )
    return Index(rows, counts("tokens"), counts("documents"), counts("supervised"))
