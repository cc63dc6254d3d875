"""Conversations -> token store: which shards there are, who makes them, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcli import processes
from packcli.config import SourceSpec
from packcli.data import conversations, hub, sources, tokens
from packcli.data import tokenizer as tokenizers
from packcli.data.shards import Maker, Shard
from packcli.data.sources import Piece, Record
from packcli.data.tokens import Tokens
from packcli.errors import DataError, IntegrityError, MissingError
from packcli.files import atomic_write, json_line, read_sealed, write_sealed
from packcli.plan import TokensOrder
from packcli.store import FileRecord, Store, check_listed, records

STREAM_CHUNK = 8192
"""Conversations of one shard of a streamed source."""

Ints = NDArray[np.int64]
Note = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Task:
    """A shard to make: its number, its piece, and the piece its file begins with (which tells the schema)."""

    number: int
    piece: Piece
    first: Piece


def build(order: TokensOrder, store: Store, note: Note) -> dict[str, Any]:
    """Make every shard that is missing, then `rejected.jsonl`; the counts for the manifest.

    Raises:
        DataError: a file cannot be parsed, no schema fits it, or every conversation was rejected.
    """
    tasks = make(order, store, note)
    count = len(tasks) + _make_streams(order, store, len(tasks), note)
    return _merge(order, store, count)


def make(order: TokensOrder, store: Store, note: Note, part: tuple[int, int] = (0, 1)) -> list[Task]:
    """Make the missing shards of one part of all: (k, n) takes every n-th, from the k-th. All tasks, done or not.

    Parts are independent: they may run at once on many nodes that share a file system.
    """
    tokenizers.prepare(order, store.tokenizer(order.id))
    tasks = _tasks(order, store)
    todo = [task for task in tasks if task.number % part[1] == part[0]]
    missing = [task for task in todo if not store.shard_record(order.id, task.number).exists()]
    _check_space([task.piece for task in missing], store)
    done, made = len(todo) - len(missing), 0
    for _, record in processes.imap(_Worker, (order, store.root), missing, _num_processes(order, len(missing))):
        done, made = done + 1, made + record["tokens"]
        note(done, len(todo), f"{made:,} tokens")
    return tasks


def _check_space(pieces: list[Piece], store: Store) -> None:
    """Raise `MissingError` where the shards to make will hardly fit on the disk."""
    needed = int(_BYTES_PER_BYTE * sum(sources.num_bytes(piece) for piece in pieces))
    if needed > (free := store.free_bytes()):
        raise MissingError(
            f"the token store needs about {needed:,} bytes, {free:,} are free in `{store.root}`",
            "free some space, choose another disk with --runs, or take less data with data.max_documents",
        )


# A byte of text becomes about one of tokens; a little less, lest something is refused that would fit.
_BYTES_PER_BYTE = 0.8


def _num_processes(order: TokensOrder, tasks: int) -> int:
    return min(order.processes or processes.cores(), tasks)


def _tasks(order: TokensOrder, store: Store) -> list[Task]:
    """What to read for each shard; kept in the store, because finding line ends reads every file once."""
    path = store.pieces(order.id)
    if path.exists():
        check_tokenizer(store, order.id)
        # The id says what the files hold, not where: they may have been moved, and others may lie there now.
        pieces = [Piece(**item) for item in pieces_in(path)]
        count = 1 + max((piece.file for piece in pieces), default=-1)
        files = list(islice(sources.located(_as_begun(order, store)), count))
        pieces = [_moved(piece, order, files, path) for piece in pieces]
    else:
        revisions = [hub.resolved(source) if hub.is_dataset(source.source) else None for source in order.sources]
        pieces = sources.pieces(_at(order.sources, revisions), order.max_documents)
        made = {name: record.model_dump() for name, record in records(store.tokenizer(order.id)).items()}
        begun = {"pieces": [asdict(piece) for piece in pieces], "tokenizer": made, "revisions": revisions}
        write_sealed(path, begun)
    names = sources.names(order.sources)
    pieces = [replace(piece, name=names[piece.file]) for piece in pieces]
    first = conversations.first_pieces(pieces)
    return [Task(number, piece, first[piece.file]) for number, piece in enumerate(pieces)]


def _moved(piece: Piece, order: TokensOrder, files: list[sources.File], begun: Path) -> Piece:
    """A piece at the path that its file has now."""
    if piece.kind == "builtin":
        return piece
    paths = files[piece.file].paths
    if hub.is_dataset(order.sources[piece.source].source):  # several files in a cache, which is moved as a whole
        paths = tuple(path for path in paths if path.name == Path(piece.path).name)
    if not paths:
        cause = f"`{piece.name}` lies in other files of the cache than when {begun.parent} was begun"
        raise IntegrityError(cause, _BEGIN_ANEW.format(begun.parent))
    return replace(piece, path=str(paths[0]))


def _as_begun(order: TokensOrder, store: Store) -> tuple[SourceSpec, ...]:
    """The sources at the commits that a store was begun with: a branch may have moved since."""
    path = store.pieces(order.id)
    revisions = revisions_in(path)
    for source, begun in zip(order.sources, revisions, strict=True):
        if begun is None and hub.is_dataset(source.source) and (now := hub.resolved(source)):
            cause = f"{path.parent} was begun without the hub, with whatever copy was cached"
            raise IntegrityError(
                f"`{source.source}`: {cause}; now it is commit {now}", _BEGIN_ANEW.format(path.parent)
            )
    return _at(order.sources, revisions)


_BEGIN_ANEW = "delete {} and run again"


def _at(of: tuple[SourceSpec, ...], revisions: list[str | None]) -> tuple[SourceSpec, ...]:
    return tuple(
        source.model_copy(update={"revision": commit}) if commit else source
        for source, commit in zip(of, revisions, strict=True)
    )


def pieces_in(path: Path) -> list[dict[str, Any]]:
    """The pieces that a store's `pieces.json` lists; older ones hold nothing but the list."""
    found = read_sealed(path)
    pieces: list[dict[str, Any]] = found if isinstance(found, list) else found["pieces"]
    return pieces


def revisions_in(path: Path) -> list[str | None]:
    """The commit of each source that is a dataset, as it was begun with; None: the hub could not be asked."""
    revisions: list[str | None] = read_sealed(path)["revisions"]
    return revisions


def check_tokenizer(store: Store, id_: str) -> None:
    """Raise `IntegrityError` where the tokenizer of a store that was begun is not that of its shards any more."""
    begun = read_sealed(store.pieces(id_))
    if not isinstance(begun, list):
        made = {name: FileRecord.model_validate(record) for name, record in begun["tokenizer"].items()}
        check_listed(store.tokenizer(id_), made, checksums=True)


class _Reader:
    """Reads and tokenizes pieces in a process of its own; everything but the task is known beforehand."""

    def __init__(self, order: TokensOrder, tokenizer: Path) -> None:
        self._order = order
        self._names = sources.names(order.sources)
        self.maker = Maker(order, tokenizers.stored(tokenizer))

    def shard(self, task: Task) -> Shard:
        source, name = self._order.sources[task.piece.source], self._names[task.piece.file]
        schema = conversations.schema_of(sources.read(task.first), source, name)
        return self.maker.make(source, lambda: sources.read(task.piece), schema)


class _Worker:
    def __init__(self, order: TokensOrder, root: Path) -> None:
        self._order, self._store = order, Store(root)
        self._reader = _Reader(order, self._store.tokenizer(order.id))

    def __call__(self, task: Task) -> dict[str, Any]:
        shard = self._reader.shard(task)
        return tokens.write(shard, self._store, self._order, task.number, self._reader.maker.engine)


def _make_streams(order: TokensOrder, store: Store, number: int, note: Note) -> int:
    """Shards of streamed sources, one after another: their length is not known. How many there are."""
    if not sources.streamed(order.sources):
        return 0
    maker = Maker(order, tokenizers.stored(store.tokenizer(order.id)))
    begun = number
    left = order.max_documents
    if left is not None:
        left -= sum(read_sealed(store.shard_record(order.id, other))["read"] for other in range(number))
    for source, file in sources.streamed(_as_begun(order, store)):
        skip, schema = 0, None
        rows: Iterator[Record] | None = None
        while left is None or left > 0:
            size = STREAM_CHUNK if left is None else min(left, STREAM_CHUNK)
            path = store.shard_record(order.id, number)
            if path.exists():
                rows = None
            else:
                rows = rows or sources.stream(source, skip, file)  # once: what is skipped is downloaded, too
                chunk = list(islice(rows, size))
                if not chunk:
                    break
                schema = schema or conversations.schema_of(chunk, source, source.source)
                shard = maker.make(source, _again(chunk), schema)
                tokens.write(shard, store, order, number, maker.engine)
            record = read_sealed(path)
            skip, number = skip + record["read"], number + 1
            left = None if left is None else left - record["read"]
            note(0, 0, f"{skip:,} conversations streamed")
            if record["read"] < size:
                break
    return number - begun


def _again(chunk: list[Record]) -> Callable[[], list[Record]]:
    return lambda: chunk


def _merge(order: TokensOrder, store: Store, count: int) -> dict[str, Any]:
    records = [read_sealed(store.shard_record(order.id, number)) for number in range(count)]
    keys = ("conversations", "not_drawn", "documents", "tokens", "errors")
    totals = {key: sum(record[key] for record in records) for key in keys}
    rejected = [item for record in records for item in record["rejected"]]
    if totals["errors"] > order.max_errors:
        first = next(record["first_error"] for record in records if record["errors"])
        cause = f"{totals['errors']:,} lines could not be parsed, more than `data.max_errors: {order.max_errors}`"
        raise DataError(cause, f"the first: {first}")
    _write_rejected(store.rejected(order.id), rejected)
    files = sources.names(order.sources)
    if not totals["documents"]:
        raise _nothing_usable(order, rejected)
    content = Tokens(store, order.id, files=list(files), shards=count).content
    return {
        **totals,
        "rejected": len(rejected),
        "duplicates": len(content) - len(np.unique(content)),
        "shards": count,
        "files": list(files),
        "vocab_size": len(tokenizers.stored(store.tokenizer(order.id))),
        "stop_token_ids": sorted({token for record in records for token in record["stop_token_ids"]}),
    }


def provenance(order: TokensOrder, store: Store) -> dict[str, Any]:
    """What may differ between machines and yet gives the same bytes, and which revisions names meant."""
    engines = {read_sealed(path)["engine"] for path in store.shard_records(order.id)}
    begun = zip(order.sources, revisions_in(store.pieces(order.id)), strict=True)
    return {
        "engines": sorted(engines),
        "revisions": [commit for source, commit in begun if hub.is_dataset(source.source)],
    }


def _nothing_usable(order: TokensOrder, rejected: list[dict[str, Any]]) -> DataError:
    reasons = ", ".join(sorted({item["reason"] for item in rejected})[:3]) or "the source is empty"
    return DataError(
        f"no usable conversation in {', '.join(sources.names(order.sources))}: {reasons}", "see docs/data.md"
    )


def _write_rejected(path: Path, rejected: list[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        for item in rejected:
            file.write(json_line(item))


# Lengths alone, nothing written ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lengths:
    """What packing needs to know of D documents, in memory (`framed.Documents`), and what was read to learn it."""

    lengths: Ints
    content: NDArray[np.uint64]
    spans: tuple[Ints, Ints, Ints]
    ends: tuple[Ints, Ints]
    conversations: int
    rejected: list[dict[str, Any]]

    @property
    def num_documents(self) -> int:
        return len(self.lengths)


def measure(order: TokensOrder, directory: Path, note: Note) -> Lengths:
    """Tokenize everything and keep the lengths; `directory`: where the tokenizer is put for worker processes."""
    tokenizers.prepare(order, directory)
    pieces = sources.pieces(order.sources, order.max_documents)
    first = conversations.first_pieces(pieces)
    tasks = [Task(number, piece, first[piece.file]) for number, piece in enumerate(pieces)]
    count = _num_processes(order, len(tasks))
    finished: dict[int, Any] = {}
    for place, part in processes.imap(_Measurer, (order, directory), tasks, count):
        finished[place] = part
        note(len(finished), len(tasks), f"{sum(int(p[0].sum()) for p in finished.values()):,} tokens")
    parts = [finished[place] for place in range(len(tasks))]
    parts += _measured_streams(order, directory, sources.left_for_streams(pieces, order.max_documents), note)
    if not any(len(part[0]) for part in parts):
        raise _nothing_usable(order, [item for part in parts for item in part[8]])
    base = np.cumsum([0, *(len(part[0]) for part in parts)])
    return Lengths(
        lengths=np.concatenate([part[0] for part in parts]),
        content=np.concatenate([part[1] for part in parts]),
        spans=(
            np.concatenate([part[2] + first for part, first in zip(parts, base, strict=False)]),
            np.concatenate([part[3] for part in parts]),
            np.concatenate([part[4] for part in parts]),
        ),
        ends=(np.concatenate([part[5] for part in parts]), np.concatenate([part[6] for part in parts])),
        conversations=sum(part[7] for part in parts),
        rejected=[item for part in parts for item in part[8]],
    )


class _Measurer:
    def __init__(self, order: TokensOrder, directory: Path) -> None:
        self._reader = _Reader(order, directory)

    def __call__(self, task: Task) -> tuple[Any, ...]:
        return _measured(self._reader.shard(task))


def _measured_streams(
    order: TokensOrder, directory: Path, left: int | None, note: Note
) -> Iterator[tuple[Any, ...]]:
    for source, file in sources.streamed(order.sources):
        maker = Maker(order, tokenizers.stored(directory))
        rows, read, schema = sources.stream(source, 0, file), 0, None
        while chunk := list(islice(rows, STREAM_CHUNK if left is None else min(left, STREAM_CHUNK))):
            read, left = read + len(chunk), None if left is None else left - len(chunk)
            schema = schema or conversations.schema_of(chunk, source, source.source)
            yield _measured(maker.make(source, _again(chunk), schema))
            note(0, 0, f"{read:,} conversations streamed")


def _measured(shard: Shard) -> tuple[Any, ...]:
    document = np.repeat(np.arange(shard.num_documents), np.diff(shard.span_offsets))
    start, stop = shard.spans.astype(np.int64).T
    ends = shard.ids[shard.offsets[:-1]].astype(np.int64), shard.ids[shard.offsets[1:] - 1].astype(np.int64)
    lengths, read = np.diff(shard.offsets), (shard.conversations, shard.rejected)
    return lengths, shard.content, document, start, stop, *ends, *read
