"""Records of a source as conversations: the mapping, the schema of each file, one record after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import orjson

from packcli.config import SourceSpec
from packcli.data import chat, sources, tokenized
from packcli.data.sources import Piece, Record
from packcli.errors import DataError


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A record that is tokenized already: one document, or the several of a packed row."""

    documents: list[tokenized.Document]


Found = chat.Messages | Tokenized | chat.Rejected | DataError
"""A conversation, or why there is none: `Rejected` (not usable) or `DataError` (not even parsed)."""


def parsed(records: Iterable[Record], source: SourceSpec, schema: chat.Schema) -> Iterator[tuple[Record, Found]]:
    """Each record with what it holds."""
    mapping = source.mapping
    for record in records:
        value = record.value
        if isinstance(value, DataError):
            yield record, value
            continue
        try:
            if mapping:
                value = mapped(value, mapping)
            if schema == "tokenized":
                if source.turns != "any":
                    raise chat.Rejected("its answers cannot be counted: it is tokenized already (`turns`)")
                yield record, Tokenized(tokenized.documents(value))
            else:
                messages = chat.conversation(value, schema)
                if source.turns != "any":
                    _check_turns(messages, source.turns)
                yield record, messages
        except chat.Rejected as reason:
            yield record, reason


def _check_turns(messages: chat.Messages, turns: str) -> None:
    answers = sum(message["role"] == "assistant" for message in messages)
    if (answers == 1) != (turns == "single"):
        raise chat.Rejected(f"{answers} answer{'s' if answers != 1 else ''}, and its source has `turns: {turns}`")


def mapped(value: Any, mapping: dict[str, str]) -> Any:
    """`mapping`: the field packcli knows -> the name it has in the file."""
    if not isinstance(value, dict):
        return value
    renamed = {ours: value[theirs] for ours, theirs in mapping.items() if theirs in value}
    return {**{key: inner for key, inner in value.items() if key not in mapping.values()}, **renamed}


def kept_fields(record: Record, source: SourceSpec, fields: tuple[str, ...]) -> tuple[str | None, ...]:
    """What a record says in each of `fields`, as text; None where it says nothing.

    What is neither text nor a number (a list of tags) is its JSON: the same tags in another order are others.
    """
    value = mapped(record.value, source.mapping) if source.mapping else record.value
    if not isinstance(value, Mapping):
        return (None,) * len(fields)
    return tuple(_text(value.get(field)) for field in fields)


def _text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    try:
        text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    except TypeError:  # nested more deeply than JSON is written, though it was read
        raise chat.Rejected("a field to keep is nested too deeply") from None
    return text.encode(errors="replace").decode()  # half of a surrogate pair is no valid Unicode


def schema_of(records: Iterable[Record], source: SourceSpec, file: str) -> chat.Schema:
    """The schema of a file, from its first record that can be parsed; where there is none, any will do.

    Raises:
        DataError: no schema fits.
    """
    for record in records:
        if not isinstance(record.value, DataError):
            value = mapped(record.value, source.mapping) if source.mapping else record.value
            return chat.detect(value, f"{file}:{record.number}")
    return "messages"


class Schemas:
    """The schema of every file, each looked up once."""

    def __init__(self, order_sources: tuple[SourceSpec, ...], first: dict[int, Piece]) -> None:
        self._sources, self._first = order_sources, first
        self._names = sources.names(order_sources)
        self._known: dict[int, chat.Schema] = {}

    def of(self, file: int) -> chat.Schema:
        if file not in self._known:
            piece = self._first[file]
            source = self._sources[piece.source]
            self._known[file] = schema_of(sources.read(piece), source, self._names[file])
        return self._known[file]


def everything(order_sources: tuple[SourceSpec, ...], max_documents: int | None) -> Iterator[tuple[Record, Found]]:
    """All records of all sources, in order, streams last."""
    pieces = sources.pieces(order_sources, max_documents)
    schemas = Schemas(order_sources, first_pieces(pieces))
    for piece in pieces:
        yield from parsed(sources.read(piece), order_sources[piece.source], schemas.of(piece.file))
    left = sources.left_for_streams(pieces, max_documents)
    for source, file in sources.streamed(order_sources):
        if left == 0:
            return
        records = islice(sources.stream(source, 0, file), left)
        if (first := next(records, None)) is None:
            continue
        schema = schema_of([first], source, source.source)
        for found in parsed(chain([first], records), source, schema):
            left = None if left is None else left - 1
            yield found


def first_pieces(pieces: Iterable[Piece]) -> dict[int, Piece]:
    """The piece each file begins with."""
    first: dict[int, Piece] = {}
    for piece in pieces:
        first.setdefault(piece.file, piece)
    return first
