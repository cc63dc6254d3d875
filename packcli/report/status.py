"""What `packcli status` and `packcli sweep --dry-run` print: the state of every stage, read from disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from packcli import estimate as estimates
from packcli import stages
from packcli.config import EstimateSpec
from packcli.files import json_line
from packcli.memory import GIB
from packcli.plan import Cell, Kind, Plan, TrainOrder
from packcli.report import progress
from packcli.store import State, Store

if TYPE_CHECKING:
    from rich.console import RenderableType
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


def dry_run(plan: Plan, store: Store) -> dict[str, Any]:
    """Plan, states, and for every cell an estimate, the arithmetic of a step, and memory on the cluster named.

    Trainings that cells share, and shared base models, are counted once in `total`.
    """
    document = collect(plan, store)

    @cache
    def costs(train: str, spec: EstimateSpec) -> stages.Costs:
        return stages.costs(plan.trains[train], store, spec)

    counted: dict[str, estimates.Estimate] = {}
    for shown, cell in zip(document["cells"], plan.cells, strict=True):
        cost = costs(cell.train, cell.estimate)
        counted.setdefault(cell.train, cost.estimate)
        shown.update(_shown(cost))
        if (base := plan.trains[cell.train].base) is not None:
            counted.setdefault(base, costs(base, cell.estimate).estimate)
    for shared in document["shared"]:
        user = next(cell for cell in plan.cells if plan.trains[cell.train].base == shared["train"])
        shared.update(_shown(costs(shared["train"], user.estimate)))
    total = estimates.total(list(counted.values())).model_dump()
    return {**document, "total": {"stages": document["total"], **total}}


def _shown(costs: stages.Costs) -> dict[str, Any]:
    memory = None
    if costs.memory is not None:
        memory = {**costs.memory.model_dump(), "fits": costs.memory.fits}
    step = {**costs.step.model_dump(), "text": costs.step.text()} if costs.step else None
    return {"estimate": costs.estimate.model_dump(), "step": step, "memory": memory}


def table(document: dict[str, Any]) -> Table:
    """One line a cell; with rows, steps and model FLOPs where the document has estimates."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, title=escape(document["sweep"]), title_justify="left")
    estimated = "stages" in document["total"]
    for header in ("cell", "prepare", "train", "eval"):
        shown.add_column(header)
    if not estimated:
        shown.add_column("train id: its checkpoint is RUNS/store/train/ID/final", no_wrap=True)
    timed = estimated and document["total"]["hours"] is not None
    for header in (
        ("rows", "steps", "model FLOPs", *(("hours", "GPU hours") if timed else ())) if estimated else ()
    ):
        shown.add_column(header, justify="right")
    for shared in document["shared"]:
        where = () if estimated else (shared["train"],)
        shown.add_row("shared base model", "", _words(shared), "", *where, *_costs(shared))
    for cell in document["cells"]:
        states = [_words(cell["stages"][stage]) for stage in ("prepare", "train", "eval")]
        if not cell["stages"]["eval"]["tasks"]:
            states[-1] = "no tasks"
        where = () if estimated else (cell["stages"]["train"]["id"],)
        shown.add_row(escape(" ".join(cell["labels"].values())), *states, *where, *_costs(cell))
    counts = document["total"]["stages"] if estimated else document["total"]
    shown.caption = ", ".join(
        f"{count} {'stage' if count == 1 else 'stages'} {state}" for state, count in sorted(counts.items())
    )
    if estimated:
        shown.caption += ". Rows, steps and FLOPs are exact once prepared; no time is guessed."
        if timed:
            shown.caption += f" In all {_hours(document['total']['gpu_hours'])} GPU hours at the `slot_mfu` given."
    return shown


def _words(info: dict[str, Any]) -> str:
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


def _costs(item: dict[str, Any]) -> tuple[str, ...]:
    if (cost := item.get("estimate")) is None:
        return ()
    if cost["rows"] is None:
        return ("not prepared",)
    return (
        f"{cost['rows']:,}",
        f"{cost['steps']:,}",
        "unknown" if cost["flops"] is None else f"{cost['flops']:.3g}",
        *(_hours(cost[key]) for key in ("hours", "gpu_hours") if cost[key] is not None),
    )


def before_training(document: dict[str, Any]) -> list[RenderableType]:
    """What `dry_run` knows beside the table: the arithmetic of each step, and memory, each said once."""
    from rich.markup import escape

    shown: list[RenderableType] = []
    for key, render in (("step", _step), ("memory", _memory)):
        said: dict[bytes, tuple[dict[str, Any], list[str]]] = {}
        for item in (*document["shared"], *document["cells"]):
            if (found := item[key]) is not None:
                name = " ".join(item["labels"].values()) if "labels" in item else "shared base model"
                said.setdefault(json_line(found), (found, []))[1].append(escape(name))
        shown += [render(found, names) for found, names in said.values()]
    return shown


def _step(step: dict[str, Any], names: list[str]) -> RenderableType:
    return f"{_named(names)}: {step['text']}"


def _memory(memory: dict[str, Any], names: list[str]) -> RenderableType:
    """One GPU by part, against the card."""
    from rich import box
    from rich.table import Table

    where = f"{memory['gpus']} x {memory['gpu']}, each parameter over {memory['sharded_over']}"
    shown = Table(box=box.SIMPLE_HEAD, title=f"Memory of one GPU ({where}): {_named(names)}", title_justify="left")
    shown.add_column("part")
    shown.add_column("GiB", justify="right")
    shown.add_column("how")
    for part in memory["parts"]:
        shown.add_row(part["name"], _gib(part["bytes"]), part["arithmetic"])
    shown.add_section()
    shown.add_row("in all", _gib(memory["total_bytes"]), f"at the fullest moment: {memory['moment']}")
    shown.add_row("the card has", _gib(memory["capacity_bytes"]), _verdict(memory))
    return shown


def _verdict(memory: dict[str, Any]) -> str:
    if memory["fits"] == "yes":
        spare = 1 - memory["total_bytes"] / memory["capacity_bytes"]
        return f"it fits, with {spare:.0%} to spare; {_largest(memory)}"
    words = {"no": "it does not fit", "barely": "it fits, but with less than 10% to spare"}[memory["fits"]]
    return f"[bold]{words}[/bold]; what would: {'; or '.join(memory['remedies']) or 'nothing that was tried'}"


def _largest(memory: dict[str, Any]) -> str:
    count = memory["micro_batch"]
    match memory["limit"]:
        case "memory":
            return f"the largest `train.micro_batch` that leaves 10%: {count}"
        case "step":
            return f"`train.micro_batch: {count}` would leave 10% too, and is all a GPU has in a step"
        case _:
            return f"so would `train.micro_batch: {count}`; more was not tried"


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.1g}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"
