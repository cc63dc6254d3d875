"""The token store: documents exactly as rendered, in Arrow shards that memory-map and that `datasets` opens.

Columns: `input_ids` list<int32>; `supervised` list<int32>, flat pairs start, stop of the tokens that are trained
on; `content` uint64, the hash that decides validation; `file` int32 and `record` int64, where it came from; and a
string `record.<name>` for each of the order's `fields`, null where the record says nothing there. One shard is one
record batch: what one piece of a source became. A shard is done when its record is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packcli import processes
from packcli.data.shards import Shard
from packcli.errors import ConfigError, DataError, IntegrityError
from packcli.files import atomic_write, read_sealed, sha256_file, write_sealed
from packcli.plan import TokensOrder
from packcli.store import Store

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


_FIELD = "record."
_BLOCK = 1 << 20


def write(shard: Shard, store: Store, order: TokensOrder, number: int, engine: str) -> dict[str, Any]:
    """Write a shard, then its record; the record.

    Raises:
        DataError: more tokens than Arrow's 32-bit offsets can count.
    """
    path = store.shard(order.id, number)
    limit = np.iinfo(np.int32).max
    if len(shard.ids) > limit:
        cause = f"one piece of the data became {len(shard.ids):,} tokens, over {limit:,}"
        raise DataError(cause, "save the file as JSONL or Parquet, which are read in pieces")
    columns = [
        pa.ListArray.from_arrays(pa.array(shard.offsets, pa.int32()), pa.array(shard.ids)),
        pa.ListArray.from_arrays(pa.array(2 * shard.span_offsets, pa.int32()), pa.array(shard.spans.reshape(-1))),
        *(pa.array(values) for values in (shard.content, shard.file, shard.record)),
        *(pa.array([said[place] for said in shard.fields], pa.string()) for place in range(len(order.fields))),
    ]
    schema = pa.schema([*_SCHEMA, *((_FIELD + name, pa.string()) for name in order.fields)])
    with atomic_write(path) as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    record = {
        "read": shard.read,
        "conversations": shard.conversations,
        "not_drawn": shard.not_drawn,
        "documents": shard.num_documents,
        "tokens": len(shard.ids),
        "rejected": shard.rejected,
        "errors": shard.errors,
        "first_error": shard.first_error,
        "stop_token_ids": shard.stop_token_ids,
        "engine": engine,
        "sha256": sha256_file(path),
    }
    write_sealed(store.shard_record(order.id, number), record)
    return record


def check_shards(store: Store, id_: str, count: int) -> None:
    """Raise `IntegrityError` for a shard whose bytes are not those that were written."""
    paths = [store.shard(id_, number) for number in range(count)]
    many = sum(path.stat().st_size for path in paths) > _LARGE_BYTES
    for number, found in processes.imap(_Sha256, (), paths, processes.cores() if many else 1):
        if found != read_sealed(store.shard_record(id_, number))["sha256"]:
            path = paths[number]
            raise IntegrityError(
                f"{path}: its bytes changed (sha256 differs)", f"delete {path.parent} and run again"
            )


class _Sha256:
    def __call__(self, path: Path) -> str:
        return sha256_file(path)


_LARGE_BYTES = 1 << 30  # a second and a half of sha256


@dataclass(frozen=True, slots=True)
class _Shard:
    ids: NDArray[np.int32]
    id_offsets: NDArray[np.int32]
    spans: NDArray[np.int32]
    span_offsets: NDArray[np.int32]
    content: NDArray[np.uint64]
    file: NDArray[np.int32]
    record: Ints
    fields: dict[str, Any]


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

    @property
    def ends(self) -> tuple[Ints, Ints]:
        """(first, last), each [D] int64: the token id each document begins with and the one it ends with."""
        first = [shard.ids[shard.id_offsets[:-1]] for shard in self._shards]
        last = [shard.ids[shard.id_offsets[1:] - 1] for shard in self._shards]
        return self._concatenated(first), self._concatenated(last)

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

    def blocks(self, most: int) -> Iterator[tuple[Ints, Ints]]:
        """(ids, offsets) of all documents in order, a million tokens at a time, each cut to `most` tokens.

        ids [T] int64; offsets [N + 1] int64: where each document of the block begins, and where the last ends.
        """
        for shard in self._shards:
            ends = shard.id_offsets[1:].astype(np.int64)
            first = 0
            while first < len(ends):
                begin = int(shard.id_offsets[first])
                last = max(first + 1, int(np.searchsorted(ends, begin + _BLOCK, side="right")))
                lengths = np.diff(shard.id_offsets[first : last + 1]).astype(np.int64)
                ids = shard.ids[begin : int(ends[last - 1])].astype(np.int64)
                if lengths.max() > most:
                    place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
                    ids, lengths = ids[place < most], np.minimum(lengths, most)
                yield ids, np.concatenate([[0], np.cumsum(lengths)])
                first = last

    def field(self, name: str) -> tuple[Ints, list[str | None]]:
        """([D] int64, what they stand for): what each document's record says in one of the kept fields, or None.

        Raises:
            ConfigError: the field was not kept.
        """
        if any(name not in shard.fields for shard in self._shards):
            line = f"add it to `data.fields: [{name}]`, and prepare again"
            raise ConfigError(f"the token store keeps no field `{name}`", line)
        columns = pa.chunked_array([shard.fields[name] for shard in self._shards], pa.string())
        encoded = columns.dictionary_encode(null_encoding="encode").combine_chunks()
        parts = encoded if isinstance(encoded, pa.DictionaryArray) else encoded.unify_dictionaries().chunk(0)
        return parts.indices.to_numpy(zero_copy_only=False).astype(np.int64), parts.dictionary.to_pylist()

    def _locate(self, document: int) -> tuple[_Shard, int]:
        number = int(np.searchsorted(self._first, document, side="right")) - 1
        return self._shards[number], document - int(self._first[number])

    @staticmethod
    def _concatenated(parts: list[Any]) -> Ints:
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def _open_shard(path: Path) -> _Shard:
    try:
        return _opened(path)
    except (OSError, pa.ArrowException, LookupError, ValueError, TypeError):
        raise IntegrityError(
            f"{path}: gone, or no shard of tokens any more", f"delete {path.parent} and run again"
        ) from None


def _opened(path: Path) -> _Shard:
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
        fields={name[len(_FIELD) :]: column(name) for name in table.column_names if name.startswith(_FIELD)},
    )
