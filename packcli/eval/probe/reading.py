"""Where the documents of a probe come from, and which tokens mark their borders: a tokenizer and its template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from packcli.config import SourceSpec
from packcli.data import chat, conversations, corpus
from packcli.data.encode import Encoded, Encoder
from packcli.data.render import Rendered, Renderer
from packcli.errors import ConfigError, DataError
from packcli.eval.probe.boundary import Factor, Marks
from packcli.eval.probe.layouts import Document
from packcli.seeds import rng

EMBEDDED = "tiny"
GROUP_FIELDS = ("topic", "task", "category")
"""A record's topic, by the first of these fields that holds text."""
_MOST = 20_000
"""Conversations looked at in a source, from which a few are drawn."""
_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True, slots=True)
class Found:
    """documents   as the checkpoint's template writes them, no two of equal tokens
    without_system the same, a system message of their own left out: for the boundary experiment
    rejected       conversations that cannot be used
    """

    documents: list[Document]
    without_system: list[Document]
    rejected: int


def read(sources: Sequence[SourceSpec] | None, tokenizer: Any, *, count: int, max_length: int, seed: int) -> Found:
    """`count` documents, drawn by `seed`, none over `max_length` tokens.

    `sources`: None for the held-out items of packcli's own toy corpus.

    Raises:
        DataError: a line that cannot be parsed, a file that is tokenized already, or nothing usable.
        ConfigError: no such source, or a tokenizer without a chat template.
    """
    exchanges, rejected = _corpus() if sources is None else _sources(sources)
    order = rng(seed, "order").permutation(len(exchanges)).tolist()
    writer = _Writer(tokenizer)
    documents: dict[bytes, Document] = {}
    without_system = []
    for number in order:
        if len(documents) == count:
            break
        messages, group = exchanges[number]
        try:
            document = writer.document(messages, group)
            bare = writer.document(_without_system(messages), group)
        except chat.Rejected:
            rejected += 1
            continue
        if len(document) <= max_length and document.labels and document.key not in documents:
            documents[document.key] = document
            without_system.append(bare)
    if not documents:
        where = sources[0].source if sources else "the toy corpus"
        raise DataError(
            f"no usable document of at most {max_length:,} tokens in {where}",
            "see docs/data.md",
        )
    return Found(list(documents.values()), without_system, rejected)


def marks(tokenizer: Any) -> Marks:
    """What marks a border in this tokenizer's template; which marks there are not, and why.

    Where the template writes a system header by itself, that is the header; else the header is what it makes of
    one. A template that puts the system message into the first turn has none.
    """
    missing: dict[Factor, str] = {}
    bos = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
    if not bos:
        missing["bos"] = "the tokenizer has no bos token"
    if tokenizer.eos_token_id is None:
        missing["eos"] = "the tokenizer has no eos token"
    writer = _Writer(tokenizer)
    turn, opening = _turn(writer, bos)
    closing = _from_last(turn, tokenizer.eos_token_id)
    eos = closing or (() if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),))
    header = opening[len(bos) :] if bos and opening[: len(bos)] == bos else opening
    if not header:
        header = _header(writer, turn, bos)
    if not header:
        missing["header"] = "the template has no system header of its own"
    return Marks(eos=eos, bos=bos, header=header, opening=opening, closing=closing, missing=missing)


_EXCHANGE = [{"role": "user", "content": "Which one?"}, {"role": "assistant", "content": "This one."}]


def _turn(writer: _Writer, bos: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the template writes for an exchange, and what it writes before the first one."""
    try:
        one, two = writer.ids(_EXCHANGE), writer.ids([*_EXCHANGE, *_EXCHANGE])
    except (chat.Rejected, DataError):
        return (), ()
    again = two[len(one) :]
    repeats = two[: len(one)] == one and bool(again)
    if repeats and bos and again[:1] == bos:  # Llama 2 begins every turn with one
        again = again[1:]
    if not repeats or one[-len(again) :] != again:
        return one, bos if one[:1] == bos else ()
    return again, one[: -len(again)]


def _header(writer: _Writer, turn: tuple[int, ...], bos: tuple[int, ...]) -> tuple[int, ...]:
    try:
        whole = writer.ids([{"role": "system", "content": _SYSTEM}, *_EXCHANGE])
    except (chat.Rejected, DataError):  # Gemma's template knows no such role
        return ()
    if not turn or whole[-len(turn) :] != turn:
        return ()
    before = whole[: -len(turn)]
    return before[len(bos) :] if bos and before[: len(bos)] == bos else before


def _from_last(turn: tuple[int, ...], eos: int | None) -> tuple[int, ...]:
    """The eos a turn ends with, and a line break behind it."""
    return next((turn[-size:] for size in (1, 2) if len(turn) > size and turn[-size] == eos), ())


class _Writer:
    """Conversations as documents, by the exact way only: these are few."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "this checkpoint's tokenizer has no chat template: its documents cannot be written",
                "save the template with the tokenizer",
            )
        self._renderer = Renderer(tokenizer, "assistant", fast=False)
        self._encoder = Encoder(tokenizer, "tokenizers")

    def document(self, messages: chat.Messages, group: str | None) -> Document:
        encoded = self._encode(messages)
        supervised = np.zeros(len(encoded.ids), bool)
        for start, stop in encoded.spans.tolist():
            supervised[start:stop] = True
        return Document(encoded.ids.astype(np.int64), supervised, group)

    def ids(self, messages: chat.Messages) -> tuple[int, ...]:
        return tuple(self._encode(messages).ids.tolist())

    def _encode(self, messages: chat.Messages) -> Encoded:
        rendered: Rendered = self._renderer.render([dict(message) for message in messages])
        return self._encoder.encode([rendered])


Exchanges = list[tuple[chat.Messages, str | None]]


def _corpus() -> tuple[Exchanges, int]:
    found: Exchanges = []
    for task in corpus.TASKS:
        for item in corpus.items(task, "test"):
            found.append(([*item["messages"], {"role": "assistant", "content": item["answer"]}], task))
    return found, 0


def _sources(sources: Sequence[SourceSpec]) -> tuple[Exchanges, int]:
    found: Exchanges = []
    rejected = 0
    for record, read in conversations.everything(tuple(sources), _MOST):
        if isinstance(read, DataError):
            raise read
        if isinstance(read, conversations.Tokenized):
            raise DataError(
                f"{sources[0].source}: its records are tokenized already",
                "give conversations; a checkpoint has its own tokens",
            )
        if isinstance(read, chat.Rejected):
            rejected += 1
        else:
            found.append((read, _group(record.value)))
    return found, rejected


def _group(record: Any) -> str | None:
    named: Iterator[Any] = (
        (record.get(field) for field in GROUP_FIELDS) if isinstance(record, Mapping) else iter(())
    )
    return next((value for value in named if isinstance(value, str) and value), None)


def _without_system(messages: Sequence[dict[str, str]]) -> chat.Messages:
    return [message for message in messages if message["role"] != "system"]
