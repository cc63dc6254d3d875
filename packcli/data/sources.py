"""Data sources: built-in corpora, local files and Hugging Face datasets, as pieces that workers read on their own.

A record's number is its line in a JSON-lines file and its place (from 1) in every other format, so that a
message can always say `file:number`.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from packcli.config import SourceSpec
from packcli.data import corpus, formats, hub, topics
from packcli.data.formats import COMPRESSED, SUFFIXES
from packcli.errors import ConfigError, DataError
from packcli.files import digest, read_json

PIECE_BYTES = 16 << 20
BUILTIN = (*corpus.SOURCES, *topics.SOURCES)
_HINT = (
    f"give a built-in name ({', '.join(BUILTIN)}), a paper set ({', '.join(hub.PAPER_SETS)}), a Hugging "
    f"Face id (owner/name), or a file, directory or glob of {' '.join(SUFFIXES)}"
)
# What `datasets` writes beside the data.
_INFO, _STATE, _SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"
_SIDE_FILES = frozenset({_INFO, _STATE, _SPLITS, "dataset_infos.json"})
_ARROW_NAME = re.compile(r"\w[\w.-]*\.arrow")


class Record(NamedTuple):
    """One raw record. `file`: position in `names`; `number`: line or place, from 1.

    `value` is a `DataError` where a line of JSON lines cannot be parsed; it says `file:line` and why.
    """

    file: int
    number: int
    value: Any


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one file that is read on its own. Pieces depend on the data alone, never on who reads them.

    source        position in the tuple of sources
    file, name    position in `names`, and what it says there
    path          what to open; for a built-in corpus its name
    start, stop   of JSON lines: bytes; of Parquet: row groups; of Arrow: record batches; else the whole file
    first_number  the number of its first line or row
    limit         so many records and no more; None: all of them
    """

    source: int
    file: int
    name: str
    path: str
    kind: formats.Kind | Literal["builtin"]
    start: int
    stop: int
    first_number: int
    limit: int | None


def is_builtin(spec: SourceSpec) -> bool:
    return spec.source in BUILTIN


def is_streamed(spec: SourceSpec) -> bool:
    """Whether a source has no pieces and is read through `stream`."""
    return spec.streaming and _on_hub(spec)


def names(sources: tuple[SourceSpec, ...]) -> tuple[str, ...]:
    """What messages call each file, in the order `Record.file` counts them.

    A built-in corpus counts as one file, and so does a Hugging Face dataset, which is not loaded for this.
    """
    return tuple(name for spec in sources for name in _names(spec))


def fingerprint(spec: SourceSpec, sha256_of: Callable[[Path], str]) -> str:
    """What a source's records depend on: its files' contents in reading order, the corpus version, or the id.

    Weight and mapping are left out, and so is whether a dataset is streamed: the records are the same.
    """
    if _on_hub(spec):
        return hub.identity(spec)
    if spec.source in topics.SOURCES:
        return digest(["topics", spec.source, topics.VERSION])
    if is_builtin(spec):
        return digest(["corpus", spec.source, corpus.VERSION])
    return digest([[file.suffix, sha256_of(file)] for file in files(spec)])


def pieces(
    sources: tuple[SourceSpec, ...], max_documents: int | None, piece_bytes: int = PIECE_BYTES
) -> list[Piece]:
    """All that is to be read, in order, in pieces of about `piece_bytes`; streamed sources are left out.

    With `max_documents` every piece has a limit, and the limits add up to at most that; what is missing to it is
    for the streamed sources. No more is read than it takes to find the first `max_documents` records.

    Raises:
        ConfigError: a source is not there.
        DataError: a file is not what its name says.
        MissingError: a Hugging Face dataset cannot be had.
    """
    found = []
    left = max_documents
    for piece in _unlimited(sources, piece_bytes):
        if left is None:
            found.append(piece)
            continue
        held = _count(piece, left)
        found.append(replace(piece, limit=held))
        left -= held
        if not left:
            break
    return found


class File(NamedTuple):
    """What one of `names` stands for: its source and the files read under it, none of a corpus or a stream."""

    source: int
    name: str
    paths: tuple[Path, ...]


def located(sources: tuple[SourceSpec, ...]) -> Iterator[File]:
    """What stands behind each of `names`, in order; a dataset that is not cached is downloaded.

    Raises as `pieces` does.
    """
    for source, spec in enumerate(sources):
        if is_builtin(spec):
            _refuse_keys_of_the_hub(spec)
            yield File(source, spec.source, ())
        elif _on_hub(spec):
            yield File(source, hub.name(spec), () if spec.streaming else hub.arrow_files(spec))
        else:
            yield from (File(source, str(file), (file,)) for file in files(spec))


def num_bytes(piece: Piece) -> int:
    """Bytes of the text to read, where they are known without reading: JSON lines whole, JSON and CSV."""
    if piece.limit is not None:
        return 0
    if piece.kind == "jsonl":
        return piece.stop - piece.start
    return Path(piece.path).stat().st_size if piece.kind in ("json", "csv") else 0


def read(piece: Piece) -> Iterator[Record]:
    """The records of one piece, in order.

    Raises:
        DataError: the file cannot be read on; a single line of JSON lines comes as a record instead.
    """
    for number, value in itertools.islice(_values(piece), piece.limit):
        yield Record(piece.file, number, value)


def stream(spec: SourceSpec, skip: int = 0, file: int = 0) -> Iterator[Record]:
    """The records of a Hugging Face dataset after the first `skip`, over the network.

    `file` is its position in `names`. Raises as `pieces` does.
    """
    for number, value in enumerate(hub.rows(spec, skip), skip + 1):
        yield Record(file, number, value)


def streamed(sources: tuple[SourceSpec, ...]) -> list[tuple[SourceSpec, int]]:
    """The sources without pieces, in order, each with the position of its name in `names`."""
    found, file = [], 0
    for spec in sources:
        if is_streamed(spec):
            found.append((spec, file))
        file += len(_names(spec))
    return found


def left_for_streams(pieces: list[Piece], max_documents: int | None) -> int | None:
    """How many records may yet be read after all pieces; None: all there are."""
    return None if max_documents is None else max_documents - sum(piece.limit or 0 for piece in pieces)


def local_bytes(spec: SourceSpec) -> int:
    """Size of a source's local files; 0 of what is packaged or on a hub."""
    if is_builtin(spec) or _on_hub(spec):
        return 0
    return sum(file.stat().st_size for file in files(spec))


def files(spec: SourceSpec) -> tuple[Path, ...]:
    """The local files a source names, sorted by name.

    Raises:
        ConfigError: nothing is there or may be looked at, or nothing there is of a known type.
    """
    path = Path(spec.source)
    _refuse_unreachable(path)
    has_splits = (path / _SPLITS).is_file()
    _refuse_keys_of_the_hub(spec, has_splits)
    if has_splits:
        path = _split(path, spec.split)
    if (path / _STATE).is_file() and (path / _INFO).is_file():
        found = _saved(path)
    elif path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(file for file in _inside(path) if _is_data(file.relative_to(path)))
    else:
        matches = glob.glob(spec.source, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [file for file in sorted(map(Path, matches)) if file.is_file()]
    if not found:
        raise ConfigError(f"no data at `{spec.source}`", _HINT)
    for file in found:
        if file.suffix in COMPRESSED:
            raise ConfigError(f"`{file}` is compressed", "decompress it first, as with `gzip -dk` or `zstd -d`")
        if file.suffix not in SUFFIXES:
            raise ConfigError(f"`{file}`: unknown file type", _HINT)
        if not _is_unicode(file):
            raise ConfigError(
                f"`{file}`: its name is no UTF-8", "rename it: messages and manifests could not name it"
            )
        if not os.access(file, os.R_OK):
            raise ConfigError(f"`{file}` is missing or may not be read", "check the file and its permissions")
    return tuple(found)


def _refuse_unreachable(path: Path) -> None:
    """A path that the system will not look at; `Path.is_file` would raise. What is not there is said elsewhere."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
            (path / _SPLITS).stat()
    except OSError as error:
        raise ConfigError(f"`{path}`: {error.strerror}", "check the path and its permissions") from None


def _is_unicode(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:  # the system gives bytes that are none as halves of surrogate pairs
        return False
    return True


def _on_hub(spec: SourceSpec) -> bool:
    return not is_builtin(spec) and hub.is_dataset(spec.source)


def _names(spec: SourceSpec) -> list[str]:
    if is_builtin(spec):
        return [spec.source]
    return [hub.name(spec)] if _on_hub(spec) else [str(file) for file in files(spec)]


def _unlimited(sources: tuple[SourceSpec, ...], piece_bytes: int) -> Iterator[Piece]:
    for file, (source, name, paths) in enumerate(located(sources)):
        if is_builtin(sources[source]):
            yield Piece(source, file, name, name, "builtin", 0, 0, 1, None)
        number = 1
        for path in paths:
            kind = formats.kind(path)
            for span in formats.spans(path, kind, name, piece_bytes):
                yield Piece(source, file, name, str(path), kind, span.start, span.stop, number, None)
                number += span.numbers


def _count(piece: Piece, most: int) -> int:
    """Records in a piece without a limit, counted no further than `most`."""
    if piece.kind == "builtin":
        return sum(1 for _ in itertools.islice(_values(piece), most))
    return formats.count(Path(piece.path), piece.kind, piece.name, piece.start, piece.stop, most)


def _values(piece: Piece) -> Iterator[tuple[int, Any]]:
    if piece.kind == "builtin":
        told = topics.conversations() if piece.path in topics.SOURCES else corpus.conversations(piece.path)
        return enumerate(told, 1)
    return formats.values(Path(piece.path), piece.kind, piece.name, piece.start, piece.stop, piece.first_number)


def _inside(directory: Path) -> Iterator[Path]:
    """The files below a directory, through links too; a link that leads nowhere is among them, to be refused."""

    def unreadable(error: OSError) -> None:
        hint = "check its permissions, or name the files to read"
        raise ConfigError(f"`{error.filename}` may not be read: {error.strerror}", hint)

    for inside, directories, names in os.walk(directory, onerror=unreadable, followlinks=True):
        here = Path(inside)
        above = {
            one.resolve() for one in (here, *(directory / one for one in here.relative_to(directory).parents))
        }
        # What is hidden is no data; a link to a directory that it lies in would be followed for ever.
        directories[:] = [name for name in directories if name[0] != "." and (here / name).resolve() not in above]
        yield from (file for name in names if (file := here / name).is_file() or not file.exists())


def _is_data(file: Path) -> bool:
    """Of the files in a directory; a compressed one counts, to be refused and not passed over."""
    if file.name in _SIDE_FILES or any(part.startswith(".") for part in file.parts):
        return False
    return file.suffix in SUFFIXES or (file.suffix in COMPRESSED and Path(file.stem).suffix in SUFFIXES)


def _refuse_keys_of_the_hub(spec: SourceSpec, has_splits: bool = False) -> None:
    """A key that would change nothing is a mistake: most of all `split`, where a directory is read as a whole."""
    given = {"subset": spec.subset, "revision": spec.revision, "streaming": spec.streaming}
    given["split"] = not has_splits and spec.split != SourceSpec.model_fields["split"].default
    for key, value in given.items():
        if value:
            raise ConfigError(f"`{spec.source}`: `{key}` is for Hugging Face datasets", "leave it out")


def _split(directory: Path, split: str) -> Path:
    """The directory of one split of what `DatasetDict.save_to_disk` wrote."""
    path = directory / _SPLITS
    found = _json(path)
    listed = found.get("splits") if isinstance(found, dict) else None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise _not_saved(path)
    if split not in listed:
        raise ConfigError(
            f"`{directory}` has no split `{split}`; it has: {', '.join(listed)}", "set `split` to one of them"
        )
    return directory / split


def _saved(directory: Path) -> list[Path]:
    """The files of what `Dataset.save_to_disk` wrote; others there are caches of its `map`."""
    path = directory / _STATE
    try:
        names = [file["filename"] for file in _json(path)["_data_files"]]
    except (LookupError, TypeError):
        raise _not_saved(path) from None
    if not all(isinstance(name, str) and _ARROW_NAME.fullmatch(name) for name in names):  # a path leads out of it
        raise _not_saved(path)
    return [directory / name for name in names]


def _not_saved(path: Path) -> DataError:
    return DataError(f"{path}: not what `datasets` writes there", "save the dataset again")


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"{path}: not readable: {error}", "save the dataset again") from None
