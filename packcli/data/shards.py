"""One shard of a token store: a piece of a source read, rendered and tokenized, in memory bounded by the piece.

A shard depends on its piece alone, so shards can be made in any order, by any number of processes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcli.config import SourceSpec
from packcli.data import chat, conversations, encode, render, sources, tokenized
from packcli.data.sources import Record
from packcli.errors import ConfigError, DataError
from packcli.log import logger
from packcli.plan import TokensOrder

BATCH = 2048
"""Conversations rendered and tokenized at a time: enough to amortise a call, few enough to stay in cache."""

_CHECKED_FIRST, _CHECKED_EACH = 200, 16


@dataclass(slots=True)
class Shard:
    """Documents of one piece, in order, as flat arrays (see `encode.Encoded`), and what became of the rest.

    read            records read
    conversations   those, times their weight: `num_documents + len(rejected)`
    not_drawn       records that a weight below 1 left out
    errors          records that could not be parsed (`on_error: skip`); they are among the rejected
    first_error     what was wrong with the first of those
    fields          of each document what its record says in each of `order.fields`, None where nothing
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    spans: NDArray[np.int32]
    span_offsets: NDArray[np.int64]
    content: NDArray[np.uint64]
    file: NDArray[np.int32]
    record: NDArray[np.int64]
    fields: list[tuple[str | None, ...]]
    read: int
    conversations: int
    not_drawn: int
    errors: int
    first_error: str | None
    rejected: list[dict[str, Any]]
    stop_token_ids: list[int]

    @property
    def num_documents(self) -> int:
        return len(self.content)


@dataclass(slots=True)
class _Columns:
    """A shard while it grows."""

    encoded: list[encode.Encoded] = field(default_factory=list)
    content: list[int] = field(default_factory=list)
    file: list[int] = field(default_factory=list)
    record: list[int] = field(default_factory=list)
    fields: list[tuple[str | None, ...]] = field(default_factory=list)
    read: int = 0
    conversations: int = 0
    not_drawn: int = 0
    errors: int = 0
    first_error: str | None = None
    rejected: list[dict[str, Any]] = field(default_factory=list)


class Maker:
    """Makes shards for one order; keeps the tokenizer, the compiled template and what it learned of both."""

    def __init__(self, order: TokensOrder, tokenizer: Any) -> None:
        self._order, self._tokenizer = order, tokenizer
        self._files = sources.names(order.sources)
        self._vocabulary = len(tokenizer)
        special = tokenizer.convert_tokens_to_ids(list(render.special_tokens(tokenizer)))
        self._special = np.asarray(special, dtype=np.int32)
        self._renderer = render.Renderer(tokenizer, order.train_on)
        self._encoder = encode.Encoder(tokenizer)
        self._to_check = _CHECKED_FIRST

    @property
    def engine(self) -> str:
        """What tokenizes: `gigatoken`, `tiktoken` or `tokenizers`."""
        return self._encoder.engine

    def make(self, source: SourceSpec, records: Callable[[], Iterable[Record]], schema: chat.Schema) -> Shard:
        """The shard of some records, read again from the start if a fast path proves inexact on them.

        Raises:
            DataError: a line that cannot be parsed (unless `on_error: skip`); no exact supervision.
        """
        with _without_collector():
            while True:
                try:
                    return self._make(source, records(), schema)
                except render.NotTransparent:
                    logger.warning(
                        "the chat template is not what it seemed: rendering every conversation with Jinja"
                    )
                    self._renderer = render.Renderer(self._tokenizer, self._order.train_on, fast=False)
                except encode.EngineDiffers:
                    pass  # the encoder said so, and has moved on to the next engine

    def _make(self, source: SourceSpec, records: Iterable[Record], schema: chat.Schema) -> Shard:
        columns = _Columns()
        self._to_check = max(self._to_check, _CHECKED_EACH)
        stream = conversations.parsed(records, source, schema)
        while batch := list(islice(stream, BATCH)):
            self._add(columns, batch, source)
            if columns.errors > self._order.max_errors:
                most = f"more than `data.max_errors: {self._order.max_errors}`"
                cause = f"{columns.errors:,} lines could not be parsed, {most}"
                raise DataError(cause, f"the first: {columns.first_error}")
        return self._shard(columns)

    def _add(self, columns: _Columns, batch: list[Any], source: SourceSpec) -> None:
        documents: list[Any] = []
        for record, found in batch:
            try:
                if type(found) is list:
                    self._take(
                        columns, documents, record, source, chat.content_hash(found), self._renderer.render(found)
                    )
                elif isinstance(found, conversations.Tokenized):
                    for document in found.documents:  # all of them before any is taken
                        self._check_vocabulary(document)
                    for document in found.documents:
                        self._take(columns, documents, record, source, tokenized.content_hash(document), document)
                elif isinstance(found, DataError):
                    if self._order.on_error == "fail":
                        raise found
                    columns.errors += 1
                    columns.first_error = columns.first_error or found.cause
                    self._reject(columns, record, found.cause)
                else:
                    self._reject(columns, record, str(found))
            except chat.Rejected as reason:
                self._reject(columns, record, str(reason))
            except ConfigError as error:  # a template without an end, or a conversation without one
                where = f"{self._files[record.file]}:{record.number}"
                raise ConfigError(f"{where}: {error.cause}", error.fix) from None
        columns.read += len(batch)
        columns.encoded.append(self._encode(documents))

    def _take(
        self,
        columns: _Columns,
        documents: list[Any],
        record: Record,
        source: SourceSpec,
        content: int,
        document: Any,
    ) -> None:
        # First, as they may be rejected: nothing is counted then.
        fields = conversations.kept_fields(record, source, self._order.fields) if self._order.fields else ()
        copies = 1 if source.weight == 1.0 else chat.copies(content, source.weight)
        columns.not_drawn += not copies
        columns.conversations += copies
        for _ in range(copies):
            columns.fields.append(fields)
            columns.content.append(content)
            columns.file.append(record.file)
            columns.record.append(record.number)
            documents.append(document)

    def _check_vocabulary(self, document: tokenized.Document) -> None:
        if (largest := int(document.ids.max())) >= self._vocabulary:
            raise chat.Rejected(f"token id {largest} is not one of the tokenizer's {self._vocabulary:,}")

    def _reject(self, columns: _Columns, record: Record, reason: str) -> None:
        columns.conversations += 1
        columns.rejected.append({"file": self._files[record.file], "record": record.number, "reason": reason})

    def _encode(self, documents: list[Any]) -> encode.Encoded:
        if documents and isinstance(documents[0], tokenized.Document):
            return tokenized.encoded(documents)
        closed = self._order.train_on != "all"
        if self._to_check and documents:
            sample, self._to_check = documents[: self._to_check], max(0, self._to_check - len(documents))
            self._encoder.compare(sample, closed=closed)
        return self._encoder.encode(documents, closed=closed)

    def _shard(self, columns: _Columns) -> Shard:
        parts = columns.encoded
        ids = _flat([part.ids for part in parts], np.int32)
        spans = _flat([part.spans for part in parts], np.int32).reshape(-1, 2)
        offsets, span_offsets = _bounds([p.offsets for p in parts]), _bounds([p.span_offsets for p in parts])
        document = np.repeat(np.arange(len(columns.content)), np.diff(span_offsets))
        stops = ids[offsets[document] + spans[:, 1] - 1] if self._order.train_on != "all" else ids[offsets[1:] - 1]
        return Shard(
            ids=ids,
            offsets=offsets,
            spans=spans,
            span_offsets=span_offsets,
            content=np.asarray(columns.content, dtype=np.uint64),
            file=np.asarray(columns.file, dtype=np.int32),
            record=np.asarray(columns.record, dtype=np.int64),
            fields=columns.fields,
            read=columns.read,
            conversations=columns.conversations,
            not_drawn=columns.not_drawn,
            errors=columns.errors,
            first_error=columns.first_error,
            rejected=columns.rejected,
            # Of a dataset tokenized elsewhere, a span may end anywhere.
            stop_token_ids=np.intersect1d(stops, self._special).tolist(),
        )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Nothing here makes reference cycles, and looking for them again and again took a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _flat(parts: list[Any], dtype: Any) -> Any:
    return np.concatenate([part.reshape(-1) for part in parts]) if parts else np.zeros(0, dtype)


def _bounds(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Bounds of all parts end to end, from those of each."""
    sizes = [np.diff(part) for part in parts]
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([np.zeros(0, np.int64), *sizes]))])
