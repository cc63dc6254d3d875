"""The token store: documents exactly as rendered, in Arrow shards that memory-map and that `datasets` opens.

Columns: `input_ids` list<int32>; `supervised` list<int32>, flat pairs start, stop of the tokens an assistant
wrote; `content` uint64, the hash that decides validation; `file` int32 and `record` int64, where it came from.
One shard is one record batch of at most SHARD_CONVERSATIONS conversations; an interrupted run resumes at the
first shard whose record is missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packcli.data import chat, sources
from packcli.data import tokenizer as tokenizers
from packcli.errors import DataError
from packcli.files import atomic_write, json_line, read_json, sha256_file, write_json
from packcli.plan import TokensOrder
from packcli.store import Store

SHARD_CONVERSATIONS = 8192
Ints = NDArray[np.int64]

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.int32())),
        ("content", pa.uint64()),
        ("file", pa.int32()),
        ("record", pa.int64()),
    ]
)


def build(order: TokensOrder, store: Store, note: Callable[[str], None]) -> dict[str, Any]:
    """Write every shard that is missing, then `rejected.jsonl`; the counts for the manifest.

    Raises:
        DataError: a file cannot be parsed, no schema fits it, or every conversation was rejected.
    """
    tokenizer = tokenizers.build(order)
    tokenizer.save_pretrained(store.tokenizer(order.id))
    files = sources.names(order.sources)
    special, renderer = _special_ids(tokenizer), chat.Renderer(tokenizer)
    records = []
    stream = tokenizers.located(order.sources, order.mapping, order.max_documents)
    for number, chunk in enumerate(_chunks(stream)):
        path = store.shard_record(order.id, number)
        if not path.exists():
            write_json(path, _write_shard(store.shard(order.id, number), chunk, renderer, special, files))
        records.append(read_json(path))
        note(f"{sum(record['conversations'] for record in records):,} conversations")
    totals = {key: sum(record[key] for record in records) for key in ("conversations", "documents", "tokens")}
    rejected = [item for record in records for item in record["rejected"]]
    _write_rejected(store.rejected(order.id), rejected)
    if not totals["documents"]:
        reasons = ", ".join(sorted({item["reason"] for item in rejected})[:3]) or "the source is empty"
        raise DataError(f"no usable conversation in {', '.join(files)}: {reasons}", "see docs/data.md")
    return {
        **totals,
        "rejected": len(rejected),
        "shards": len(records),
        "files": list(files),
        "vocab_size": len(tokenizer),
        "stop_token_ids": sorted({token for record in records for token in record["stop_token_ids"]}),
    }


def _chunks(stream: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(stream, SHARD_CONVERSATIONS)):
        yield chunk


def _write_rejected(path: Path, rejected: list[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        for item in rejected:
            file.write(json_line(item))


def _write_shard(
    path: Path, chunk: list[Any], renderer: chat.Renderer, special: NDArray[np.int32], files: tuple[str, ...]
) -> dict[str, Any]:
    rejected: list[dict[str, Any]] = []
    kept: list[tuple[sources.Record, chat.Messages, chat.Rendered]] = []

    def reject(record: sources.Record, reason: object) -> None:
        rejected.append({"file": files[record.file], "record": record.number, "reason": str(reason)})

    for record, messages in chunk:
        try:
            if isinstance(messages, chat.Rejected):
                raise messages
            kept.append((record, messages, renderer.render(messages)))
        except chat.Rejected as reason:
            reject(record, reason)
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    stops: set[int] = set()
    texts = [rendered.text for _, _, rendered in kept]
    # The template writes every special token itself, BOS included; the tokenizer must not add another.
    encodings = renderer.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    for (record, messages, rendered), encoding in zip(kept, encodings, strict=True):
        ids = np.asarray(encoding.ids, dtype=np.int32)
        spans = supervised_spans(rendered, encoding.offsets, ids, special)
        stops.update(int(ids[stop - 1]) for _, stop in spans)
        columns["input_ids"].append(ids)
        columns["supervised"].append(np.asarray(spans, dtype=np.int32).reshape(-1))
        columns["content"].append(chat.content_hash(messages))
        columns["file"].append(record.file)
        columns["record"].append(record.number)
    batch = pa.record_batch([pa.array(columns[f.name], type=f.type) for f in _SCHEMA], schema=_SCHEMA)
    with atomic_write(path) as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        writer.write_batch(batch)
    return {
        "conversations": len(chunk),
        "documents": len(kept),
        "tokens": sum(map(len, columns["input_ids"])),
        "rejected": rejected,
        "stop_token_ids": sorted(stops),
        "sha256": sha256_file(path),
    }


def supervised_spans(
    rendered: chat.Rendered,
    offsets: list[tuple[int, int]],
    ids: NDArray[np.int32],
    special: NDArray[np.int32],
) -> list[tuple[int, int]]:
    """Token spans [start, stop) of the assistant's turns; each ends in the turn's stop token.

    The first token of a document is never in a span: nothing comes before it that could predict it.

    Raises:
        DataError: a turn does not end in a special token, so a model would never learn to stop.
    """
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    spans = []
    for first, last in rendered.spans:
        start, stop = np.searchsorted(starts, (first, last), side="left").tolist()
        # Tokenizers that trim spaces off offsets make the prompt's last space look as if it began the answer.
        start = max(start, int(np.searchsorted(ends, first, side="right")))
        while stop > start and ids[stop - 1] not in special:
            stop -= 1
        # Only white space may follow: else what was found opens the turn, or stands inside it, and ends nothing.
        if stop == start or rendered.text[ends[stop - 1] : last].strip():
            raise DataError(
                "the chat template closes an assistant turn without a special token: no stop would be learned",
                "set `data.template`, for example to chatml",
            )
        if (start := max(start, 1)) < stop:
            spans.append((start, stop))
    return spans


def _special_ids(tokenizer: Any) -> NDArray[np.int32]:
    added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return np.asarray(sorted(added | set(tokenizer.all_special_ids)), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class _Shard:
    ids: NDArray[np.int32]
    id_offsets: NDArray[np.int32]
    spans: NDArray[np.int32]
    span_offsets: NDArray[np.int32]
    content: NDArray[np.uint64]
    file: NDArray[np.int32]
    record: Ints


class Tokens:
    """A token store opened for reading; every array is a view of the memory-mapped shards."""

    def __init__(self, store: Store, id_: str, *, files: list[str], shards: int) -> None:
        self.files = files
        self._shards = [_open_shard(store.shard(id_, number)) for number in range(shards)]
        sizes = [len(shard.content) for shard in self._shards]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @property
    def num_documents(self) -> int:
        return int(self._first[-1])

    @cached_property
    def lengths(self) -> Ints:
        """[D] int64: tokens of each document, untruncated."""
        return self._concatenated([np.diff(shard.id_offsets) for shard in self._shards])

    @cached_property
    def content(self) -> NDArray[np.uint64]:
        """[D] uint64: the hash that decides validation."""
        parts = [shard.content for shard in self._shards]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint64)

    @cached_property
    def spans(self) -> tuple[Ints, Ints, Ints]:
        """(document, start, stop), each [P] int64: every supervised span, in document order."""
        counts = self._concatenated([np.diff(shard.span_offsets) // 2 for shard in self._shards])
        flat = self._concatenated([shard.spans for shard in self._shards]).reshape(-1, 2)
        return np.repeat(np.arange(self.num_documents), counts), flat[:, 0], flat[:, 1]

    def ids(self, document: int) -> NDArray[np.int32]:
        """[T] int32: the tokens of one document, a view of the file."""
        shard, row = self._locate(document)
        return shard.ids[shard.id_offsets[row] : shard.id_offsets[row + 1]]

    def supervised(self, document: int) -> NDArray[np.int32]:
        """[P, 2] int32: start and stop of each supervised span of one document."""
        shard, row = self._locate(document)
        return shard.spans[shard.span_offsets[row] : shard.span_offsets[row + 1]].reshape(-1, 2)

    def origin(self, document: int) -> str:
        """`file:record`, where a document came from."""
        shard, row = self._locate(document)
        return f"{self.files[shard.file[row]]}:{shard.record[row]}"

    def _locate(self, document: int) -> tuple[_Shard, int]:
        number = int(np.searchsorted(self._first, document, side="right")) - 1
        return self._shards[number], document - int(self._first[number])

    @staticmethod
    def _concatenated(parts: list[Any]) -> Ints:
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def _open_shard(path: Path) -> _Shard:
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()

    def column(name: str) -> Any:
        return table.column(name).chunk(0) if table.num_rows else table.column(name).combine_chunks()

    def numbers(array: Any) -> Any:
        return array.to_numpy(zero_copy_only=True)

    ids, spans = column("input_ids"), column("supervised")
    return _Shard(
        ids=numbers(ids.values),
        id_offsets=numbers(ids.offsets),
        spans=numbers(spans.values),
        span_offsets=numbers(spans.offsets),
        content=numbers(column("content")),
        file=numbers(column("file")),
        record=numbers(column("record")),
    )
