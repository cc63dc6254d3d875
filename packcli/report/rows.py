"""Manifests to one row per cell. Reads the store, never writes; what is not there stays null."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

from packcli.errors import IntegrityError
from packcli.eval import protocol
from packcli.files import digest, read_json
from packcli.plan import Cell, Kind, Plan
from packcli.report import groups, physics, probed, verdict
from packcli.report.records import Failure, Report, Row, Score, Train
from packcli.store import ITEMS, RESULTS, FileRecord, Manifest, State, Store

T = TypeVar("T")
Stage = tuple[Kind, str]
Read = Callable[[Kind, str], Manifest | None]

_EARNED = {float, int, type(None)}


def collect(plan: Plan, store: Store) -> Report:
    """Every cell of the sweep as it stands on disk, pooled over seeds, with a verdict.

    A stage with a damaged file counts as failed, and the row names the file.
    """
    records: dict[str, FileRecord] = {}
    read = lru_cache(maxsize=1024)(store.manifest)  # neighbours share row indexes
    rows = tuple(_row(cell, _Stages(cell, plan, store, read, records)) for cell in plan.cells)
    items = _Items(store, records)
    pooled = groups.pool(rows, plan.baseline, items)
    if items.damaged:
        rows = tuple(_without(row, items.damaged) for row in rows)
        pooled = groups.pool(rows, plan.baseline, items)
    return Report(
        sweep=plan.name,
        baseline=plan.baseline,
        rows=rows,
        groups=pooled,
        verdict=verdict.write(plan, rows, pooled),
    )


def _row(cell: Cell, stages: _Stages) -> Row:
    ledger = stages.held("index", cell.index, lambda manifest: dict(manifest.results["ledger"]))
    train = stages.held("train", cell.train, lambda manifest: _train(manifest, ledger))
    wrong = stages.held("train", cell.train, lambda found: stages.physics(found, ledger)) if train else None
    found = {task: stages.held("eval", id_, stages.score) for task, id_ in cell.evals.items()}
    scores = {task: score for task, score in found.items() if score is not None}
    probes = cell.evals.get(protocol.PROBES)
    train_state = stages.state("train", cell.train)
    tasks = {task: stages.state("eval", id_) for task, id_ in cell.evals.items()}
    return Row(
        labels=cell.labels,
        state=_overall([train_state, *tasks.values()]),
        train=train,
        eval=scores,
        average=_average(cell.evals, scores),
        cell=cell.id,
        ids={"tokens": cell.tokens, "index": cell.index, "train": cell.train}
        | {f"eval {task}": id_ for task, id_ in cell.evals.items()},
        train_state=train_state,
        tasks=tasks,
        failures=(*stages.failures.values(), *stages.left_out()),
        ledger=ledger,
        probes=stages.held("eval", probes, lambda own: probed.summary(own.results["probes"])) if probes else None,
        physics=wrong or (),
        damaged=tuple(stages.damaged.values()),
    )


def _average(tasks: Iterable[str], scores: Mapping[str, Score]) -> float | None:
    averaged = protocol.averaged(tasks)
    found = [scores[task].score for task in averaged if task in scores and not scores[task].left_out]
    return math.fsum(found) / len(found) if found and len(found) == len(averaged) else None


class _Stages:
    """The stages of one cell, each manifest read once, by `read`.

    `failures` fills with those met that failed, each once; `damaged` with what is wrong with a file, by stage;
    `items` with the records of what each item earned, by eval id.
    """

    def __init__(self, cell: Cell, plan: Plan, store: Store, read: Read, items: dict[str, FileRecord]) -> None:
        self._cell, self._plan, self._store, self._read, self._items = cell, plan, store, read, items
        self._found: dict[Stage, Manifest | None] = {}
        self.failures: dict[Stage, Failure] = {}
        self.damaged: dict[Stage, str] = {}

    def held(self, kind: Kind, id_: str, read: Callable[[Manifest], T]) -> T | None:
        """What `read` finds in the manifest of a finished stage; None where there is none, or it is damaged."""
        manifest = self._manifest(kind, id_)
        if manifest is None:
            return None
        try:
            return read(manifest)
        except (KeyError, TypeError, ValueError, AttributeError):
            cause = f"{self._store.manifest_file(kind, id_)}: its results cannot be read"
            self._damage(kind, id_, IntegrityError(cause, self._store.again(kind, id_)))
            return None

    def _manifest(self, kind: Kind, id_: str) -> Manifest | None:
        if (kind, id_) not in self._found:
            self._found[kind, id_] = None
            try:
                found = self._found[kind, id_] = self._read(kind, id_)
                if found is not None and kind == "eval":
                    _agree(found, self._store)
                    if (record := found.outputs.get(ITEMS)) is not None:
                        self._items[id_] = record
            except IntegrityError as error:
                self._damage(kind, id_, error)
        return self._found[kind, id_]

    def _damage(self, kind: Kind, id_: str, error: IntegrityError) -> None:
        self._found[kind, id_] = None
        self.damaged[kind, id_] = error.cause
        stage = _stage(kind, id_, self._plan)
        self.failures[kind, id_] = Failure(stage=stage, cause=error.cause, fix=error.fix or "")

    def state(self, kind: Kind, id_: str) -> State:
        """As on disk, but a stage that waits for a failed one failed too, and for a running one runs."""
        if (kind, id_) in self.damaged:
            return "failed"
        state = "done" if self._found.get((kind, id_)) else self._store.state(kind, id_)
        if state == "failed":
            self.failures[kind, id_] = _failure(kind, id_, self._plan, self._store)
        if state != "pending":
            return state
        before = {self.state(*upstream) for upstream in self._plan.inputs(kind, id_)}
        return "failed" if "failed" in before else "running" if "running" in before else "pending"

    def score(self, manifest: Manifest) -> Score | None:
        """None of probes, which have none."""
        if "score" not in manifest.results:
            return None
        return _score(manifest.results, _protocol(manifest.results, self._plan.evals[manifest.id].protocol))

    def physics(self, manifest: Manifest, ledger: Mapping[str, float] | None) -> tuple[str, ...]:
        return physics.check(self._plan.trains[self._cell.train], manifest.results, ledger)

    def left_out(self) -> Iterator[Failure]:
        """Why tasks that were scored were not scored on all their rows."""
        for task, id_ in self._cell.evals.items():
            manifest = self._manifest("eval", id_)
            if manifest is not None and (found := manifest.results.get("left_out")):
                counts = f"{manifest.results['n']:,} of {manifest.results['n_total']:,} items"
                yield Failure(stage=f"eval {task}", cause=f"{counts} scored: {found['reason']}", fix=found["fix"])


def _agree(manifest: Manifest, store: Store) -> None:
    """Raise `IntegrityError` for a score that none can be, or that is not the one in results.json."""
    kind, id_, score = manifest.stage, manifest.id, manifest.results.get("score")
    written = store.checked(kind, id_, RESULTS, manifest.outputs.get(RESULTS))
    if score is None:
        return
    own = orjson.loads(written).get("packcli", {}).get("score") if written else None
    if not (isinstance(score, int | float) and abs(score) <= 1):  # a judge's may be negative
        wrong = f"{score} is no score, which is a share of 1"
    elif own is not None and own != score:
        wrong = f"its score is {score}, that of {RESULTS} {own}"
    else:
        return
    raise IntegrityError(f"{store.manifest_file(kind, id_)}: {wrong}", store.again(kind, id_))


def _overall(states: list[State]) -> State:
    if "failed" in states:
        return "failed"
    if "running" in states:
        return "running"
    return "done" if set(states) == {"done"} else "pending"


def _stage(kind: Kind, id_: str, plan: Plan) -> str:
    match kind:
        case "tokens" | "index":
            return "prepare"
        case "train":
            return "train of the base model" if id_ in plan.shared else "train"
        case "eval":
            return f"eval {plan.evals[id_].task}"


def _failure(kind: Kind, id_: str, plan: Plan, store: Store) -> Failure:
    stage = _stage(kind, id_, plan)
    try:
        found = read_json(store.failure_file(kind, id_))
        return Failure(stage=stage, cause=str(found["cause"]), fix=str(found.get("fix") or ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Failure(stage=stage, cause="its failure.json cannot be read", fix="")


_OF_ITS_OWN = ("efficiency", "random_weights", "own_validation")


def _train(manifest: Manifest, ledger: Mapping[str, float] | None) -> Train:
    results = manifest.results
    efficiency = ledger.get("efficiency") if ledger else None
    if efficiency is None and results.get("slots"):
        efficiency = results["tokens"] / results["slots"]
    found = {name: results.get(name) for name in Train.model_fields if name not in _OF_ITS_OWN}
    return Train(
        **found,
        efficiency=efficiency,
        random_weights=bool(results.get("random_weights")),
        own_validation=bool((manifest.spec.get("arm") or {}).get("validation_after_packing")),
    )


def _protocol(results: Mapping[str, Any], planned: str) -> str:
    """Who judged is known only afterwards: at which host, and what it called itself."""
    stated = results.get("protocol")
    keys = ("judge_host", "judge_says_it_is")
    judge = [stated.get(key) for key in keys] if isinstance(stated, Mapping) else [None, None]
    return planned if judge == [None, None] else digest([planned, *judge])


def _score(results: Mapping[str, Any], protocol_: str) -> Score:
    n, n_total = int(results["n"]), int(results.get("n_total") or results["n"])
    stderr = results.get("stderr")
    return Score(
        metric=results["metric"],
        score=results["score"],
        stderr=stderr if stderr is not None and math.isfinite(stderr) else None,
        n=n,
        n_total=n_total,
        partial=n < n_total,
        left_out=bool(results.get("left_out")),
        version=results.get("version"),
        health=results.get("health") or {},
        protocol=protocol_,
    )


def probes_of(evals: Mapping[str, str], store: Store) -> dict[str, Any] | None:
    """All that the probes of a cell found; `evals`: its eval id by task."""
    id_ = evals.get(protocol.PROBES)
    manifest = store.manifest("eval", id_) if id_ else None
    return manifest.results["probes"] if manifest else None


class _Items:
    """What each item of a task earned, [items] float64; None where it was scored before that was kept.

    `records`: of these files, by eval id; `damaged`: the same.
    """

    def __init__(self, store: Store, records: Mapping[str, FileRecord]) -> None:
        self._store, self._records = store, records
        self.damaged: dict[str, Failure] = {}
        # The baseline's are wanted by every other arm of its setting.
        self._read = lru_cache(maxsize=256)(self._from_disk)

    def __call__(self, row: Row, task: str) -> NDArray[np.float64] | None:
        return self._read(row.ids[f"eval {task}"], task)

    def _from_disk(self, id_: str, task: str) -> NDArray[np.float64] | None:
        cause = None
        try:
            written = self._store.checked("eval", id_, ITEMS, self._records.get(id_))
            if written is None:  # scored before these were kept
                return None
            found = orjson.loads(written)
            if isinstance(found, list) and set(map(type, found)) <= _EARNED:
                return np.array(found, float)
        except IntegrityError as error:
            cause = error.cause
        except ValueError:
            pass
        cause = cause or f"{self._store.items(id_)}: not a list of what each item earned"
        fix = self._store.again("eval", id_)
        self.damaged[id_] = Failure(stage=f"eval {task}", cause=cause, fix=fix)
        return None


def _without(row: Row, damaged: Mapping[str, Failure]) -> Row:
    """The row without scores whose items are damaged."""
    lost = {task: damaged[id_] for task in row.eval if (id_ := row.ids[f"eval {task}"]) in damaged}
    if not lost:
        return row
    scores = {task: score for task, score in row.eval.items() if task not in lost}
    change = {
        "eval": scores,
        "average": _average(row.tasks, scores),
        "state": "failed",
        "tasks": row.tasks | dict.fromkeys(lost, "failed"),
        "failures": (*row.failures, *lost.values()),
        "damaged": (*row.damaged, *(failure.cause for failure in lost.values())),
    }
    return row.model_copy(update=change)
