"""Manifests to one row per cell. Reads the store, never writes; what is not there stays null."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from packcli.eval import protocol
from packcli.files import read_json
from packcli.plan import Cell, Kind, Plan
from packcli.report import groups, probed, verdict
from packcli.report.records import Failure, Probed, Report, Row, Score, Train
from packcli.store import State, Store


def collect(plan: Plan, store: Store) -> Report:
    """Every cell of the sweep as it stands on disk, pooled over seeds, with a verdict.

    Raises:
        IntegrityError: a manifest is damaged.
    """
    rows = tuple(_row(cell, plan, store) for cell in plan.cells)
    pooled = groups.pool(rows, plan.baseline, lambda row, task: _credits(row, task, store))
    return Report(
        sweep=plan.name,
        baseline=plan.baseline,
        rows=rows,
        groups=pooled,
        verdict=verdict.write(plan, rows, pooled),
    )


def _row(cell: Cell, plan: Plan, store: Store) -> Row:
    states = _States(plan, store)
    train_state = states.of("train", cell.train)
    tasks = {task: states.of("eval", id_) for task, id_ in cell.evals.items()}
    ledger = _ledger(cell, store)
    scores = {task: score for task, id_ in cell.evals.items() if (score := _score(id_, plan, store)) is not None}
    averaged = protocol.averaged(cell.evals)
    found = [scores[task].score for task in averaged if task in scores and not scores[task].left_out]
    return Row(
        labels=cell.labels,
        state=_overall([train_state, *tasks.values()]),
        train=_train(cell, store, ledger),
        eval=scores,
        average=math.fsum(found) / len(found) if found and len(found) == len(averaged) else None,
        cell=cell.id,
        ids={"tokens": cell.tokens, "index": cell.index, "train": cell.train}
        | {f"eval {task}": id_ for task, id_ in cell.evals.items()},
        train_state=train_state,
        tasks=tasks,
        failures=(*states.failures.values(), *_left_out(cell, store)),
        ledger=ledger,
        probes=_probes(cell, store),
    )


class _States:
    """States of the stages of one cell; `failures` fills with those met that failed, each once."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self._plan, self._store = plan, store
        self.failures: dict[tuple[Kind, str], Failure] = {}

    def of(self, kind: Kind, id_: str) -> State:
        """As on disk, but a stage that waits for a failed one failed too, and for a running one runs."""
        state = self._store.state(kind, id_)
        if state == "failed":
            self.failures[kind, id_] = _failure(kind, id_, self._plan, self._store)
        if state != "pending":
            return state
        before = {self.of(*upstream) for upstream in self._plan.inputs(kind, id_)}
        return "failed" if "failed" in before else "running" if "running" in before else "pending"


def _overall(states: list[State]) -> State:
    if "failed" in states:
        return "failed"
    if "running" in states:
        return "running"
    return "done" if set(states) == {"done"} else "pending"


def _failure(kind: Kind, id_: str, plan: Plan, store: Store) -> Failure:
    match kind:
        case "tokens" | "index":
            stage = "prepare"
        case "train":
            stage = "train of the base model" if id_ in plan.shared else "train"
        case "eval":
            stage = f"eval {plan.evals[id_].task}"
    try:
        found = read_json(store.failure_file(kind, id_))
        return Failure(stage=stage, cause=str(found["cause"]), fix=str(found.get("fix") or ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Failure(stage=stage, cause="its failure.json cannot be read", fix="")


def _left_out(cell: Cell, store: Store) -> Iterator[Failure]:
    """Why tasks that were scored were not scored on all their rows."""
    for task, id_ in cell.evals.items():
        manifest = store.manifest("eval", id_)
        if manifest is not None and (found := manifest.results.get("left_out")):
            counts = f"{manifest.results['n']:,} of {manifest.results['n_total']:,} items"
            yield Failure(stage=f"eval {task}", cause=f"{counts} scored: {found['reason']}", fix=found["fix"])


def _ledger(cell: Cell, store: Store) -> dict[str, int | float] | None:
    manifest = store.manifest("index", cell.index)
    return dict(manifest.results["ledger"]) if manifest else None


def _train(cell: Cell, store: Store, ledger: dict[str, int | float] | None) -> Train | None:
    manifest = store.manifest("train", cell.train)
    if manifest is None:
        return None
    results = manifest.results
    efficiency = ledger.get("efficiency") if ledger else None
    if efficiency is None and results.get("slots"):
        efficiency = results["tokens"] / results["slots"]
    found = {
        name: results.get(name) for name in Train.model_fields if name not in ("efficiency", "random_weights")
    }
    return Train(**found, efficiency=efficiency, random_weights=bool(results.get("random_weights")))


def _score(id_: str, plan: Plan, store: Store) -> Score | None:
    manifest = store.manifest("eval", id_)
    if manifest is None or "score" not in manifest.results:  # probes have none
        return None
    results: dict[str, Any] = manifest.results
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
        protocol=plan.evals[id_].protocol,
    )


def _probes(cell: Cell, store: Store) -> Probed | None:
    found = probes_of(cell.evals, store)
    return probed.summary(found) if found else None


def probes_of(evals: Mapping[str, str], store: Store) -> dict[str, Any] | None:
    """All that the probes of a cell found; `evals`: its eval id by task."""
    id_ = evals.get(protocol.PROBES)
    manifest = store.manifest("eval", id_) if id_ else None
    return manifest.results["probes"] if manifest else None


def _credits(row: Row, task: str, store: Store) -> list[float | None] | None:
    """What each item of a task earned; None where it was scored before that was kept."""
    try:
        found: list[float | None] = read_json(store.items(row.ids[f"eval {task}"]))
    except FileNotFoundError:
        return None
    return found
