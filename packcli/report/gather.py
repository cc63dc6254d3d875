"""What pictures and page show beside the report, read from the store: curves, lengths, and origins.

Whatever cannot be read any more is left out and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcli.data import index as indexes
from packcli.data.sources import BUILTIN
from packcli.data.tokens import Tokens
from packcli.errors import IntegrityError
from packcli.files import read_jsonl
from packcli.plan import Kind, Plan
from packcli.report import words
from packcli.report.records import Report, Row
from packcli.store import Manifest, Store

Labels = frozenset[tuple[str, str]]
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""x and loss, each [steps] float64."""

BINS = 48
POINTS = 120
"""Of a curve: it is smooth already, and a page holds hundreds."""
SMOOTHING = 50
"""A curve's points are means over 1/50 of its steps."""
_GRID = 200


class Members:
    """The cells of each group, in the order of the sweep, found once."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._found: dict[Labels, list[Row]] = {}
        for row in rows:
            self._found.setdefault(_without_seed(row.labels), []).append(row)

    def of(self, labels: Mapping[str, str]) -> list[Row]:
        return self._found.get(_without_seed(labels), [])


def _without_seed(labels: Mapping[str, str]) -> Labels:
    return frozenset(item for item in labels.items() if item[0] != "seed")


def machines(rows: Sequence[Row]) -> str:
    """`cpu (1 process, 1 thread)`, each kind once."""
    kinds = dict.fromkeys(
        f"{row.train.device} ({_number(row.train.processes, 'process', 'processes')}"
        + (f", {_number(row.train.threads, 'thread', 'threads')})" if row.train.threads else ")")
        for row in rows
        if row.train
    )
    return words.listed(list(kinds))


def _number(count: int | None, one: str, many: str) -> str:
    return f"{count if count is not None else '?'} {one if count == 1 else many}"


def origin(plan: Plan, report: Report) -> list[str]:
    """What to say beside every number: that data are synthetic, that weights are random."""
    cells = plan.cells
    about = {
        "synthetic data": [
            all(one.source in BUILTIN for one in plan.tokens[cell.tokens].sources) for cell in cells
        ],
        "toy model": [plan.trains[cell.train].model.config is not None for cell in cells],
        "from random weights": [row.train.random_weights for row in report.rows if row.train],
    }
    return [name if all(said) else f"in part {name}" for name, said in about.items() if any(said)]


# Curves ------------------------------------------------------------------------------------------------


def curves(row: Row, store: Store) -> tuple[Curve, Curve] | None:
    """Smoothed loss over steps and over useful tokens, in at most `POINTS` points; None without a log."""
    try:
        records = read_jsonl(store.metrics(row.ids["train"]))
        columns = ([record[key] for record in records] for key in ("step", "loss", "tokens"))
        step, loss, tokens = (np.array(column, np.float64) for column in columns)
        width = max(1, len(loss) // SMOOTHING)
        smooth = np.convolve(loss, np.full(width, 1 / width), mode="valid")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A mean stands at the last step it holds.
    return _thinned(step[width - 1 :], smooth), _thinned(np.cumsum(tokens)[width - 1 :], smooth)


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> Curve:
    if len(x) <= POINTS:
        return x, y
    grid = np.linspace(x[0], x[-1], POINTS)
    return grid, np.interp(grid, x, y)


def median(curves: Sequence[Curve]) -> Curve:
    """The median loss over the stretch of x that all curves cover: seeds differ a little in steps and tokens."""
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(first, last, _GRID)
    return grid, np.median([np.interp(grid, x, loss) for x, loss in curves], axis=0)


# Lengths -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """`shares` [BINS + 1] float64: of each bin up to the row length, and of all that is longer.

    `arm`: whose rows they are; None of documents.
    """

    name: str
    arm: str | None
    count: int
    median: float
    longest: int
    shares: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Data:
    """The documents of one token store, and what each arm made of them for rows of `max_length`."""

    name: str
    max_length: int
    documents: Spread | None
    rows: list[Spread]
    ledgers: list[tuple[str, dict[str, int | float]]]


def data(plan: Plan, report: Report, store: Store, most: int) -> tuple[list[Data], int]:
    """One for each token store and row length, at most `most`; and how many more there are."""
    places: dict[tuple[str, int], list[Row]] = {}
    for cell, row in zip(plan.cells, report.rows, strict=True):
        places.setdefault((cell.tokens, plan.indexes[cell.index].max_length), []).append(row)
    found = []
    for (tokens, max_length), rows in list(places.items())[:most]:
        named = _distinct(rows)
        spreads = [one for name, row in named if (one := _rows(name, row, max_length, store)) is not None]
        sources = [source.source for source in plan.tokens[tokens].sources]
        found.append(
            Data(
                name=f"{words.listed(sources)}, rows of {max_length:,} tokens",
                max_length=max_length,
                documents=_documents(tokens, max_length, store),
                rows=spreads,
                ledgers=[(name, row.ledger) for name, row in named if row.ledger],
            )
        )
    return found, max(0, len(places) - most)


def _distinct(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Each distinct row index, of several seeds the first, named by the labels that tell them apart."""
    first: dict[Labels, Row] = {}
    indexes_: set[str] = set()
    for row in rows:
        labels = _without_seed(row.labels)
        if row.ids["index"] not in indexes_ and labels not in first:
            first[labels] = row
        indexes_.add(row.ids["index"])
    values: dict[str, set[str]] = {}
    for row in first.values():
        for axis, value in row.labels.items():
            values.setdefault(axis, set()).add(value)
    return [
        (
            " ".join(
                v for axis, v in row.labels.items() if axis == "arm" or (axis != "seed" and len(values[axis]) > 1)
            ),
            row,
        )
        for row in first.values()
    ]


def _documents(id_: str, max_length: int, store: Store) -> Spread | None:
    if (manifest := manifest_of("tokens", id_, store)) is None:
        return None
    try:
        tokens = Tokens(store, id_, files=manifest.results["files"], shards=manifest.results["shards"])
        return _spread("documents, uncut", None, tokens.lengths, max_length)
    except (IntegrityError, OSError, ValueError, KeyError):
        return None


def _rows(name: str, row: Row, max_length: int, store: Store) -> Spread | None:
    try:
        found = indexes.read(store.rows(row.ids["index"])).epoch(0).tokens
        return _spread(name, row.labels.get("arm", ""), found, max_length)
    except (IntegrityError, OSError, ValueError, KeyError):
        return None


def _spread(name: str, arm: str | None, lengths: NDArray[np.int64], max_length: int) -> Spread | None:
    if not len(lengths):
        return None
    edges = bin_edges(max_length)
    # The last bin of the row length holds rows that are full.
    counts = np.histogram(lengths, [*edges[:-1], max_length + 0.5, np.inf])[0]
    return Spread(name, arm, len(lengths), float(np.median(lengths)), int(lengths.max()), counts / len(lengths))


def bin_edges(max_length: int) -> NDArray[np.float64]:
    """[min(BINS, max_length) + 1] float64, from 0 to the row length."""
    return np.linspace(0, max_length, min(BINS, max_length) + 1)


# Provenance --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    kind: Kind
    id: str
    what: str
    version: int
    finished: str
    software: int
    ran: str


@dataclass(slots=True)
class Provenance:
    """`software`: each set of versions that was met, by number; `stages`: each stage once, in order."""

    stages: list[Stage] = field(default_factory=list)
    software: list[str] = field(default_factory=list)


def provenance(plan: Plan, rows: Sequence[Row], store: Store) -> Provenance:
    """Where the numbers of these cells come from, as their manifests say; stages that are not done have none."""
    found, wanted = Provenance(), dict[tuple[Kind, str], str]()
    for row in rows:
        wanted["tokens", row.ids["tokens"]] = "documents, tokenized"
        wanted["index", row.ids["index"]] = "documents in rows"
        if (base := plan.trains[row.ids["train"]].base) is not None:
            wanted["train", base] = "shared base model"
        wanted["train", row.ids["train"]] = "model"
        for task, id_ in row.ids.items():
            if task.startswith("eval "):
                wanted["eval", id_] = task.removeprefix("eval ")
    for (kind, id_), what in wanted.items():
        if (manifest := manifest_of(kind, id_, store)) is not None:
            software = _software(manifest.provenance)
            if software not in found.software:
                found.software.append(software)
            number = found.software.index(software) + 1
            finished = str(manifest.provenance.get("finished_at") or words.NONE)
            found.stages.append(Stage(kind, id_, what, manifest.version, finished, number, _ran(manifest)))
    return found


def manifest_of(kind: Kind, id_: str, store: Store) -> Manifest | None:
    """A damaged one is named with the report's own lines."""
    try:
        return store.manifest(kind, id_)
    except IntegrityError:
        return None


def _software(provenance: Mapping[str, Any]) -> str:
    packages = dict(provenance.get("packages") or {})
    ours = f"packcli {packages.pop('packcli', '?')}"
    commit = f" (commit {provenance['commit']})" if provenance.get("commit") else ""
    others = [f"{name} {version}" for name, version in packages.items()]
    return ", ".join([ours + commit, f"Python {provenance.get('python', '?')}", *others])


def _ran(manifest: Manifest) -> str:
    """Hardware, as far as it is noted, and what was tested on it at start-up."""
    results = manifest.results
    parts = [str(results["device"])] if results.get("device") else []
    for name, one in (("processes", "process"), ("threads", "thread")):
        if number := results.get(name):
            parts.append(f"{number} {one if number == 1 else name}")
    if cores := manifest.provenance.get("cpu_count"):
        parts.append(f"{cores} CPU cores")
    if backend := results.get("attention_backend"):
        parts.append(f"attention by {backend['name']} {backend['version']}")
    return ", ".join(parts)
