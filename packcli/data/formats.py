"""Data files: how one is cut into spans that are read on their own, and how a span is read.

A span is [start, stop) of bytes in JSON lines, of row groups in Parquet and of record batches in Arrow; JSON
arrays and CSV have one span, the whole file. A record's number is its line in JSON lines and its place in every
other format, both from 1. Files are read and not memory-mapped, but for Arrow: a file that another program cuts
short would end the process.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from packcli.errors import DataError

Kind = Literal["jsonl", "json", "csv", "parquet", "arrow"]
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
MAX_LINE_BYTES = 64 << 20
"""A longer line is bad data: most likely a file without line ends, and nothing to hold in memory."""

_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20
_ROWS = 1000  # of Parquet held as Python objects at a time


class Span(NamedTuple):
    """A part of a file and how many record numbers (lines or rows) it takes up; 0 where it is the whole file."""

    start: int
    stop: int
    numbers: int


def kind(path: Path) -> Kind:
    """By suffix; a `.json` file whose first line is an object of its own is JSON lines."""
    match path.suffix:
        case ".jsonl" | ".ndjson":
            return "jsonl"
        case ".json":
            return "jsonl" if _starts_with_an_object(path) else "json"
        case ".csv":
            return "csv"
        case ".parquet":
            return "parquet"
        case _:
            return "arrow"


def spans(path: Path, kind: Kind, name: str, piece_bytes: int) -> Iterator[Span]:
    """All of a file as spans of about `piece_bytes`, in order. They depend on the file and `piece_bytes` alone.

    Raises:
        DataError: the file is not of its kind; `name` is what the message calls it.
    """
    match kind:
        case "jsonl":
            return _line_spans(path, piece_bytes)
        case "parquet":
            return _grouped(_row_groups(path, name), piece_bytes)
        case "arrow":
            sizes = ((batch.nbytes, batch.num_rows) for batch in _batches(path, name, 0, None))
            return _grouped(sizes, piece_bytes)
        case _:
            return iter([Span(0, path.stat().st_size, 0)])


def count(path: Path, kind: Kind, name: str, start: int, stop: int, most: int) -> int:
    """Records in a span, or `most` where there are more: reading goes no further than that."""
    match kind:
        case "jsonl":
            records: Iterable[Any] = (line for line in _lines(path, start, stop) if not line.isspace())
        case "parquet":
            return min(most, sum(rows for _, rows in itertools.islice(_row_groups(path, name), start, stop)))
        case "arrow":
            return min(most, sum(int(batch.num_rows) for batch in _batches(path, name, start, stop)))
        case _:
            records = values(path, kind, name, start, stop, 1)
    return sum(1 for _ in itertools.islice(records, most))


def values(path: Path, kind: Kind, name: str, start: int, stop: int, number: int) -> Iterator[tuple[int, Any]]:
    """(number, value) of every record in a span; `number` is that of its first line or row.

    A line that is no JSON has the `DataError` that says so as its value, so that the caller may go on.

    Raises:
        DataError: the file cannot be read as what it is called.
    """
    match kind:
        case "jsonl":
            return _jsonl(path, name, start, stop, number)
        case "json":
            return _json(path, name)
        case "csv":
            return _csv(path, name)
        case "parquet":
            return enumerate(_rows(path, name, _parquet_batches(path, name, start, stop)), number)
        case "arrow":
            return enumerate(_rows(path, name, _batches(path, name, start, stop)), number)


# JSON lines --------------------------------------------------------------------------------------------


def _line_spans(path: Path, piece_bytes: int) -> Iterator[Span]:
    """Cut after the first line end at or after each multiple of `piece_bytes`, counting line ends on the way."""
    start = at = lines = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            done = 0
            while (end := block.find(b"\n", max(done, -(-start // piece_bytes) * piece_bytes - at))) >= 0:
                end += 1
                yield Span(start, at + end, lines + block.count(b"\n", done, end))
                start, lines, done = at + end, 0, end
            lines += block.count(b"\n", done)
            at += len(block)
    if at > start:
        yield Span(start, at, lines + 1)


def _lines(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """The lines in bytes [start, stop), with their ends; b"" stands for one longer than MAX_LINE_BYTES."""
    with path.open("rb", buffering=_BLOCK_BYTES) as file:
        if start == 0 and file.read(len(_BOM)) == _BOM:
            start = len(_BOM)
        file.seek(start)
        while start < stop and (line := file.readline(MAX_LINE_BYTES + 1)):
            start += len(line)
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                while rest := file.readline(_BLOCK_BYTES):
                    start += len(rest)
                    if rest.endswith(b"\n"):
                        break
                line = b""
            yield line


def _jsonl(path: Path, name: str, start: int, stop: int, number: int) -> Iterator[tuple[int, Any]]:
    for line in _lines(path, start, stop):
        try:
            yield number, orjson.loads(line)
        except orjson.JSONDecodeError as error:
            # Blank lines come here too: asking every line would cost more than the few that are blank.
            if not line.isspace():
                yield number, _bad_line(f"{name}:{number}", line, error)
        number += 1


def _bad_line(place: str, line: bytes, error: orjson.JSONDecodeError) -> DataError:
    if not line:
        return DataError(
            f"{place}: the line is longer than {MAX_LINE_BYTES / (1 << 20):g} MiB", "write one record a line"
        )
    _, reason = _reason(error, line)
    return DataError(
        f"{place}: not valid JSON: {reason}", "mend or delete the line, or set `data.on_error` to `skip`"
    )


def _reason(error: orjson.JSONDecodeError, text: bytes) -> tuple[int, str]:
    """(line in `text`, what is wrong there)."""
    message = error.msg.partition(":")[0]
    if "UTF-8" in message or "end of data" in message:  # orjson does not say where these are
        before = text.rstrip()
        try:
            before.decode()
        except UnicodeDecodeError as bad:
            message, before = "it is not UTF-8 text; save the file as UTF-8", text[: bad.start]
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
    else:
        line, column = error.lineno, error.colno
    return line, f"{message} (column {column})"


# JSON arrays and CSV -----------------------------------------------------------------------------------


def _starts_with_an_object(path: Path) -> bool:
    first = next((line for line in _lines(path, 0, path.stat().st_size) if not line.isspace()), b"")
    try:
        return isinstance(orjson.loads(first), dict)
    except orjson.JSONDecodeError:
        return False


def _json(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    content = path.read_bytes().removeprefix(_BOM)
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        line, reason = _reason(error, content)
        raise DataError(f"{name}:{line}: not valid JSON: {reason}", "mend the file") from None
    if not isinstance(found, list):
        raise DataError(
            f"{name}: holds a {type(found).__name__}, not a list of records",
            "save it as a list of objects, or as one object a line",
        )
    yield from enumerate(found, 1)


def _csv(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    # Not pandas or pyarrow: both read a literal "None" or "NA" in a text column as null.
    csv.field_size_limit(MAX_LINE_BYTES)
    hint = "save it as UTF-8 CSV with a header line; quote fields that hold a comma"
    line = 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text, strict=True)
            for number, value in enumerate(reader, 1):
                line = reader.line_num
                if None in value:  # a text cut at its own comma would be trained on as if it were whole
                    raise DataError(f"{name}:{line}: more fields than the header has", hint)
                yield number, value
                line += 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{name}:{line}: not valid CSV: {error}", hint) from None


# Columns: Parquet and Arrow ----------------------------------------------------------------------------


def _grouped(sizes: Iterable[tuple[int, int]], piece_bytes: int) -> Iterator[Span]:
    """Consecutive units of (bytes, rows), closed as soon as they reach `piece_bytes`."""
    start = stop = held = rows = 0
    for size, added in sizes:
        stop, held, rows = stop + 1, held + size, rows + added
        if held >= piece_bytes:
            yield Span(start, stop, rows)
            start, held, rows = stop, 0, 0
    if stop > start:
        yield Span(start, stop, rows)


def _rows(path: Path, name: str, batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        with _readable(path, name):
            batch.validate(full=True)  # damaged offsets would end the process, text that is no UTF-8 the run
            rows = batch.to_pylist()
        yield from rows


def _row_groups(path: Path, name: str) -> Iterator[tuple[int, int]]:
    import pyarrow.parquet as pq

    with _readable(path, name):
        metadata = pq.read_metadata(path)
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            yield group.total_byte_size, group.num_rows


def _parquet_batches(path: Path, name: str, start: int, stop: int) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with _readable(path, name), pq.ParquetFile(path) as file:
        yield from file.iter_batches(_ROWS, row_groups=range(start, stop))


def _batches(path: Path, name: str, start: int, stop: int | None) -> Iterator[Any]:
    """Record batches [start, stop) of an Arrow stream (what `datasets` writes) or of a file with a footer."""
    import pyarrow as pa

    with _readable(path, name), pa.memory_map(str(path)) as mapped:
        try:
            stream: Any = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            file = pa.ipc.open_file(mapped)
            for index in range(start, file.num_record_batches if stop is None else stop):
                yield file.get_batch(index)
        else:
            yield from itertools.islice(stream, start, stop)


@contextlib.contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    # Damaged pages come as OSError, a date that Python has not (the year 294247) as one of the last two.
    except (pa.ArrowException, OSError, OverflowError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: not a readable {path.suffix[1:]} file: {reason}", "make the file again"
        ) from None
