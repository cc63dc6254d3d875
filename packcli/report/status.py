"""What `packcli status` prints: the state of every stage, read from disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from packcli.plan import Cell, Kind, Plan, TrainOrder
from packcli.report import progress
from packcli.store import State, Store

if TYPE_CHECKING:
    from rich.table import Table

Stage = tuple[Kind, str]
_GRAVEST_FIRST = ("failed", "running", "queued", "pending", "done")
_MOST_FAILURES = 10
_AGAIN = "run the same sweep again: it does what is missing"


def collect(plan: Plan, store: Store, jobs: Mapping[Stage, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """States of the shared stages and of every cell's, each read once; and each failure, once for all it met.

    `jobs`: of stages that are not done, as `launch.watch` sees them.
    """
    stages_ = plan.stages()
    states, found, failures = store.states(stages_), {}, _Failures()
    unready: set[Stage] = set()  # failed, or waiting for what failed
    for stage in stages_:
        job = (jobs or {}).get(stage)
        waits = any(upstream in unready for upstream in plan.inputs(*stage))
        found[stage] = _stage(stage, states[stage], None if waits and _is_over(job) else job, store, failures)
        if found[stage]["state"] == "running" and stage[0] == "train":
            found[stage]["progress"] = _steps(plan.trains[stage[1]], store)
        if found[stage]["state"] == "failed" or (found[stage]["state"] == "pending" and waits):
            unready.add(stage)
    return {
        "sweep": plan.name,
        "shared": [{"train": id_, **_without_id(found["train", id_])} for id_ in plan.shared],
        "cells": [{"cell": cell.id, "labels": cell.labels, "stages": _stages(cell, found)} for cell in plan.cells],
        "total": dict(Counter(info["state"] for info in found.values())),
        "failures": failures.listed(),
    }


def _stage(
    stage: Stage, state: State, job: Mapping[str, Any] | None, store: Store, failures: _Failures
) -> dict[str, Any]:
    """A live job goes before an old failure, which it is to mend; so does a cancelled one, which was to mend it; a
    lock before all: somebody works."""
    shown: dict[str, Any] = {"id": stage[1], "state": state}
    word = job["state"] if job is not None else None
    live = word in ("queued", "running")
    if state == "done" or (state == "running" and not live):
        return shown
    if job is not None:
        shown["job"] = dict(job)
    if live:
        shown["state"] = "running" if state == "running" else word
    elif state == "failed" and word != "cancelled" and (error := store.failure(*stage)) is not None:
        shown["why"] = failures.add(error.cause, error.fix)
    elif job is not None and _is_over(job):
        shown["state"] = "failed" if word == "ended" else "pending"
        shown["why"] = failures.add(job["reason"], _AGAIN)
    return shown


def _is_over(job: Mapping[str, Any] | None) -> bool:
    return job is not None and job["state"] in ("ended", "cancelled")


class _Failures:
    """Each cause once, and how many stages it met."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], int] = {}

    def add(self, cause: str, fix: str) -> str:
        self._found[cause, fix] = self._found.get((cause, fix), 0) + 1
        return cause

    def listed(self) -> list[dict[str, Any]]:
        """The most frequent first."""
        found = sorted(self._found.items(), key=lambda item: -item[1])
        return [{"cause": cause, "fix": fix, "stages": count} for (cause, fix), count in found]


def _steps(order: TrainOrder, store: Store) -> dict[str, Any]:
    there = progress.training(order, store, progress.num_steps(order, store))
    return {"step": there.done, "steps": there.total}


def _without_id(info: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if key != "id"}


def _stages(cell: Cell, found: Mapping[Stage, dict[str, Any]]) -> dict[str, Any]:
    tasks = {task: found["eval", id_] for task, id_ in cell.evals.items()}
    gravest = min(tasks.values(), key=_gravity, default={"state": "done"})
    index, tokens = found["index", cell.index], found["tokens", cell.tokens]
    return {
        # Rows take milliseconds once there are tokens: what keeps them waiting is what a user asks for.
        "prepare": (tokens if index["state"] == "pending" != tokens["state"] != "done" else index)
        | {"id": cell.index},
        "train": found["train", cell.train],
        "eval": {**gravest, "id": cell.id, "tasks": tasks},
    }


def _gravity(info: Mapping[str, Any]) -> int:
    return _GRAVEST_FIRST.index(info["state"])


def table(document: dict[str, Any]) -> Table:
    """One line a cell."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, title=escape(document["sweep"]), title_justify="left")
    for header in ("cell", "prepare", "train", "eval"):
        shown.add_column(header)
    shown.add_column("train id: its checkpoint is RUNS/store/train/ID/final", no_wrap=True)
    for shared in document["shared"]:
        shown.add_row("shared base model", "", words(shared), "", shared["train"])
    for cell in document["cells"]:
        shown.add_row(escape(" ".join(cell["labels"].values())), *states(cell), cell["stages"]["train"]["id"])
    shown.caption = counted(document["total"])
    return shown


def states(cell: Mapping[str, Any]) -> list[str]:
    """Words for prepare, train and eval."""
    found = [words(cell["stages"][stage]) for stage in ("prepare", "train", "eval")]
    return found if cell["stages"]["eval"]["tasks"] else [*found[:2], "no tasks"]


def counted(total: Mapping[str, int]) -> str:
    """`2 stages done, 1 stage pending`."""
    return ", ".join(
        f"{count} {'stage' if count == 1 else 'stages'} {state}" for state, count in sorted(total.items())
    )


def words(info: dict[str, Any]) -> str:
    """`queued (Priority), 2 attempts so far`, `running, step 3 of 80 (17_0 on node[0-3]), attempt 2`."""
    from rich.markup import escape

    state, job = info["state"], info.get("job", {})
    step, attempt = info.get("progress"), job.get("attempt", 0)
    match state:
        case "queued":
            words = f"queued ({job['reason']})" if job["reason"] else "queued"
        case "running":
            words = f"running, step {step['step']:,} of {step['steps'] or '?'}" if step else "running"
            words += f" ({job['id']} on {job['nodes']})" if job else ""
            attempt, words = 0, words + (f", attempt {attempt}" if attempt > 1 else "")
        case "pending":
            words = "cancelled" if job.get("state") == "cancelled" else "pending"
        case _:
            words = state
    tries = f"{attempt} attempt{'s' if attempt != 1 else ''} so far"
    return escape(f"{words}, {tries}" if attempt else words)


def failure_lines(document: dict[str, Any]) -> list[str]:
    """One line a failure, the most frequent first."""
    failures = document["failures"]
    lines = [
        f"{item['stages']:,} stage{'s' if item['stages'] != 1 else ''}: {item['cause']}; hint: {item['fix']}"
        for item in failures[:_MOST_FAILURES]
    ]
    more = len(failures) - len(lines)
    return [*lines, *([f"and {more:,} more failures: see --json"] if more else [])]
