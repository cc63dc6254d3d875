"""A prepared cell as an ordinary dataset directory, for any trainer that reads Hugging Face `datasets`.

`datasets.load_from_disk(DIR)` opens it, and so does `datasets.load_dataset(DIR)`. Splits `train` and, where
documents or rows are held out, `validation`. One record is one row as the arm lays it out, and never padded:
trainers pad by themselves, and how is theirs to say. Columns, all list<int32>:

    input_ids         tokens of the row
    labels            the token itself where it is trained on, else -100; so is the first token of each document
    position_ids      from 0 in each document, or through the row, as the arm says
    seq_lengths       runs of tokens within which attention is causal; they sum to the row
    document_lengths  tokens of each document in the row, or of the piece of it that lies there

The last two differ where the arm lets documents meet: there `seq_lengths` holds the row's length alone. Beside
the data lie the tokenizer, `README.md` (how to train on it without changing what it means) and `packcli.json`
(ids, counts, ledger, checksums). Equal cells give equal bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packcli import __version__
from packcli.config import ArmSpec
from packcli.data import export_readme, framed
from packcli.data.framed import Marks, Reader
from packcli.data.index import Index, opens
from packcli.errors import ConfigError
from packcli.files import atomic_directory, digest, read_json, sha256_file, write_json
from packcli.packing import Rows
from packcli.plan import IndexOrder
from packcli.store import EXPORT

Ints = NDArray[np.int64]

COLUMNS = ("input_ids", "labels", "position_ids", "seq_lengths", "document_lengths")
IGNORED = -100
"""What every trainer here takes for "no loss on this token"."""

_MARKER, _FORMAT = EXPORT, 1
_SHARD_TOKENS = 32 << 20  # three columns of 4 bytes: files of 400 MB, as `datasets` makes them
_BATCH_TOKENS = 1 << 20
_SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS])
# `Sequence`, not the newer `List`: datasets 2, 3, 4 and 5 all read it.
_FEATURES = {name: {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "Sequence"} for name in COLUMNS}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared cell. `validation` may be None or without rows; `tokenizer`: a directory to copy, if any.

    `marks`: what `index` counts around documents; `validation` counts none.
    """

    tokens: Reader
    index: Index
    validation: Index | None
    order: IndexOrder
    arm: ArmSpec
    pad_id: int
    ledger: dict[str, Any]
    tokenizer: Path | None
    marks: Marks = framed.NONE


def export(cell: Prepared, directory: Path, note: Callable[[int, int, str], None]) -> dict[str, Any]:
    """Write `cell` to `directory`, whole or not at all; what `packcli.json` then says.

    Where every epoch is packed anew, the first one is written. `note` gets (tokens done, tokens in all, remark).

    Raises:
        ConfigError: `directory` is a file, or holds anything but an earlier export, which is replaced.
    """
    check_replaceable(directory)
    splits = {"train": cell.index.epoch(0)}
    readers = {"train": framed.reader(cell.tokens, cell.marks), "validation": cell.tokens}
    if cell.validation is not None and cell.validation.rows.num_rows:
        splits["validation"] = cell.validation
    total, done = sum(int(index.filled.sum()) for index in splits.values()), 0
    with atomic_directory(directory) as temporary:
        for name, index in splits.items():
            (temporary / name).mkdir()
            for tokens in _write_split(temporary / name, cell, index, readers[name]):
                done += tokens
                note(done, total, name)
        write_json(temporary / "dataset_dict.json", {"splits": list(splits)})
        if cell.tokenizer is not None:
            shutil.copytree(cell.tokenizer, temporary / "tokenizer")
        about = _about(cell, splits)
        readme = export_readme.text(about, cell.arm, cell.tokenizer is not None)
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        about["files"] = {
            path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        write_json(temporary / _MARKER, about)
    return about


def check_replaceable(directory: Path) -> None:
    """Raise `ConfigError` unless nothing but an earlier export would be lost."""
    hint = "choose another directory, or empty it"
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ConfigError(f"`{directory}` is a file or a link, not a directory", hint)
    there = [path for path in sorted(directory.rglob("*")) if path.is_file()] if directory.exists() else []
    if not there:
        return
    try:
        ours = {_MARKER, *read_json(directory / _MARKER)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"`{directory}` holds something that is not an export of packcli", hint) from None
    for path in there:
        # `datasets` keeps what it computed from a dataset in files of that name beside it.
        if path.relative_to(directory).as_posix() not in ours and not path.name.startswith("cache-"):
            raise ConfigError(f"`{path}` is not part of the earlier export in `{directory}`", hint)


def _about(cell: Prepared, splits: dict[str, Index]) -> dict[str, Any]:
    return {
        "what": "packcli export",
        "format": _FORMAT,
        "packcli": __version__,
        "tokens": cell.order.tokens,
        "index": cell.order.id,
        "max_length": cell.order.max_length,
        "seed": cell.order.seed,
        "pad_id": cell.pad_id,
        "arm": cell.arm.model_dump(mode="json"),
        "ledger": cell.ledger,
        "splits": {
            name: {
                "rows": index.rows.num_rows,
                "tokens": int(index.filled.sum()),
                "documents": int(opens(index.rows).sum()),
                "supervised": int(index.supervised.sum()),
            }
            for name, index in splits.items()
        },
    }


def _write_split(directory: Path, cell: Prepared, index: Index, tokens: Reader) -> Iterator[int]:
    """One split as `Dataset.save_to_disk` lays it out; yields the tokens of each batch as it is written."""
    arm = cell.arm
    bounds = runs(index.filled, _SHARD_TOKENS)
    names = [f"data-{number:05d}-of-{len(bounds) - 1:05d}.arrow" for number in range(len(bounds) - 1)]
    for name, (first, last) in zip(names, pairwise(bounds), strict=True):
        with (directory / name).open("wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
            for a, b in pairwise(first + part for part in runs(index.filled[first:last], _BATCH_TOKENS)):
                writer.write_batch(batch(tokens, index, arm, a, b))
                yield int(index.filled[a:b].sum())
    write_json(
        directory / "dataset_info.json",
        {"citation": "", "description": "", "features": _FEATURES, "homepage": "", "license": ""},
    )
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        # `datasets` keys its caches with it: what the rows depend on, or an old cache would pass for new data.
        "_fingerprint": digest([_FORMAT, cell.order.id, arm.model_dump(mode="json"), directory.name]),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": directory.name,
    }
    write_json(directory / "state.json", state)


def runs(sizes: Ints, most: int) -> list[int]:
    """Bounds of consecutive rows of about `most` tokens together: [3, 3, 3] at 5 -> [0, 1, 3]."""
    group = (np.cumsum(sizes) - 1) // most
    return [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), *([len(sizes)] if len(sizes) else [])]


def batch(tokens: Reader, index: Index, arm: ArmSpec, first: int, last: int) -> Any:
    """Rows [first, last) as an Arrow record batch: everything of one kind is gathered at once."""
    a, b = int(index.rows.offsets[first]), int(index.rows.offsets[last])
    offsets = index.rows.offsets[first : last + 1] - a
    rows = Rows(index.rows.document[a:b], index.rows.start[a:b], index.rows.stop[a:b], offsets)
    ends = np.concatenate([[0], np.cumsum(rows.stop - rows.start)])  # [S + 1] tokens before each piece
    row_ends, begin = ends[offsets], opens(rows)
    ids = np.concatenate([np.zeros(0, np.int32), *_pieces(tokens, rows)])

    document_begins = ends[:-1][begin]
    document_lengths = np.diff(np.append(document_begins, ends[-1]))
    documents = np.concatenate([[0], np.cumsum(begin)])[offsets]  # [R + 1] documents before each row
    row_lengths, each_row = np.diff(row_ends), np.arange(last - first + 1)

    isolated = arm.attention == "document"
    reset = arm.positions == "reset"
    origins = np.repeat(*((document_begins, document_lengths) if reset else (row_ends[:-1], row_lengths)))
    values = (
        (ids, row_ends),
        (np.where(_supervised(tokens, rows, ends, begin), ids, IGNORED), row_ends),
        (np.arange(ends[-1]) - origins, row_ends),
        (document_lengths, documents) if isolated else (row_lengths, each_row),
        (document_lengths, documents),
    )
    lists = [
        pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), pa.array(flat.astype(np.int32)))
        for flat, bounds in values
    ]
    return pa.record_batch(lists, schema=_SCHEMA)


def _pieces(tokens: Reader, rows: Rows) -> Iterator[NDArray[np.int32]]:
    columns = rows.document.tolist(), rows.start.tolist(), rows.stop.tolist()
    return (tokens.ids(document)[start:stop] for document, start, stop in zip(*columns, strict=True))


def _supervised(tokens: Reader, rows: Rows, ends: Ints, begin: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[T] bool: which tokens of the pieces, laid end to end, are trained on."""
    spans = [tokens.supervised(document) for document in rows.document.tolist()]
    piece = np.repeat(np.arange(len(spans)), [len(each) for each in spans])
    flat = np.concatenate([np.zeros((0, 2), np.int64), *spans])
    # From places in the document to places here, cut to the piece. Nothing predicts a document's first token.
    flat += (ends[piece] - rows.start[piece])[:, None]
    start = np.maximum(flat[:, 0], (ends[:-1] + begin)[piece])
    stop = np.minimum(flat[:, 1], ends[1:][piece])
    inside = start < stop
    size = int(ends[-1]) + 1
    change = np.bincount(start[inside], minlength=size) - np.bincount(stop[inside], minlength=size)
    return np.asarray(np.cumsum(change)[:-1] > 0)
