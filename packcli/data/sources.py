"""Data sources: a built-in name or local files, read as a stream of records with where each came from.

A record's number is its line in a JSONL file and its place (from 1) in every other format, so that a
message can always say `file:number`. Hugging Face datasets by id will be read here too.
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from packcli.data import corpus
from packcli.errors import ConfigError, DataError
from packcli.files import digest

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv")
_HINT = f"give a built-in name ({', '.join(corpus.SOURCES)}), or a file, directory or glob of {' '.join(SUFFIXES)}"
# Files that `datasets.save_to_disk` writes beside the data.
_SIDE_FILES = frozenset({"dataset_info.json", "state.json", "dataset_dict.json"})


class Record(NamedTuple):
    """One raw record. `file`: position in the list of file names; `number`: line or place, from 1."""

    file: int
    number: int
    value: Any


def is_builtin(source: str) -> bool:
    return source in corpus.SOURCES


def files(source: str) -> tuple[Path, ...]:
    """The local files a source names, sorted.

    Raises:
        ConfigError: nothing is there, or nothing there has a known suffix.
    """
    path = Path(source)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in _SIDE_FILES]
        found = [file for file in found if file.suffix in SUFFIXES]
    else:
        matches = glob.glob(source, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [file for file in sorted(map(Path, matches)) if file.is_file()]
    if not found:
        raise ConfigError(f"no data at `{source}`", _HINT)
    if unknown := [file for file in found if file.suffix not in SUFFIXES]:
        raise ConfigError(f"`{unknown[0]}`: unknown file type", _HINT)
    return tuple(found)


def fingerprint(source: str, sha256_of: Callable[[Path], str]) -> str:
    """What a source's records depend on: file contents in reading order, or the corpus version."""
    if is_builtin(source):
        return digest(["corpus", source, corpus.VERSION])
    return digest([[file.suffix, sha256_of(file)] for file in files(source)])


def names(sources: tuple[str, ...]) -> tuple[str, ...]:
    """File names in the order `records` numbers them; a built-in counts as one file."""
    return tuple(
        name for source in sources for name in ([source] if is_builtin(source) else map(str, files(source)))
    )


def records(sources: tuple[str, ...]) -> Iterator[Record]:
    """All records of all sources, in order.

    Raises:
        DataError: a line or file that cannot be parsed, named as `file:line`.
    """
    position = 0
    for source in sources:
        if is_builtin(source):
            for number, value in enumerate(corpus.conversations(source), 1):
                yield Record(position, number, value)
            position += 1
            continue
        for file in files(source):
            for number, value in read(file):
                yield Record(position, number, value)
            position += 1


def read(file: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of every record in one file, by its suffix."""
    match file.suffix:
        case ".jsonl" | ".ndjson":
            return _jsonl(file)
        case ".json":
            return _json(file)
        case ".csv":
            return _csv(file)
        case _:
            return _columnar(file)


def _jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            try:
                yield number, orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise DataError(
                    f"{file}:{number}: not valid JSON: {_reason(error)}", "mend or delete the line"
                ) from None


def _json(file: Path) -> Iterator[tuple[int, Any]]:
    """An array of records; a file that holds one JSON object a line is read as JSON lines."""
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if content.lstrip()[:1] == b"{":
        yield from _jsonl(file)
        return
    try:
        values = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not valid JSON: {_reason(error)}", "mend the file") from None
    if not isinstance(values, list):
        raise DataError(
            f"{file}: holds a {type(values).__name__}, not a list of records", "save it as a list of objects"
        )
    yield from enumerate(values, 1)


def _reason(error: orjson.JSONDecodeError) -> str:
    message = error.msg.partition(":")[0]
    if "UTF-8" in message or "utf-8" in message:
        return "it is not UTF-8 text; save the file as UTF-8"
    # At the end of the data orjson counts from the start again.
    return message if "end of data" in message else f"{message} (column {error.colno})"


def _csv(file: Path) -> Iterator[tuple[int, Any]]:
    # Not pandas or pyarrow: both read a literal "None" or "NA" in a text column as null.
    csv.field_size_limit(64 << 20)
    hint = "save it as UTF-8 CSV with a header line; quote fields that hold a comma"
    line = 1
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text, strict=True)
            for number, value in enumerate(reader, 1):
                line = reader.line_num
                if None in value:  # a text cut at its own comma would be trained on as if it were whole
                    raise DataError(f"{file}:{line}: more fields than the header has", hint)
                yield number, value
                line += 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}:{line}: not valid CSV: {error}", hint) from None


def _columnar(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        if file.suffix == ".parquet":
            batches: Any = pq.ParquetFile(file).iter_batches()
        else:
            batches = _arrow_batches(file)
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield number, value
    except (pa.ArrowException, OSError) as error:  # damaged pages come as OSError
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{file}: not a readable {file.suffix[1:]} file: {reason}", "make the file again"
        ) from None


def _arrow_batches(file: Path) -> Iterator[Any]:
    """Arrow as a stream (what `datasets` writes) or as a file with a footer."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as mapped:
        try:
            reader: Any = pa.ipc.open_stream(mapped)
            yield from reader
        except pa.ArrowInvalid:
            mapped.seek(0)
            reader = pa.ipc.open_file(mapped)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
