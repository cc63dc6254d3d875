"""What `packcli status` and `packcli sweep --dry-run` print: the state of every stage, read from disk."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from packcli import estimate as estimates
from packcli import stages
from packcli.plan import Cell, Plan
from packcli.store import Store

if TYPE_CHECKING:
    from rich.table import Table

_GRAVEST_FIRST = ("failed", "running", "pending", "done")


def collect(plan: Plan, store: Store) -> dict[str, Any]:
    """States of the shared stages and of every cell's, each read once."""
    states = {stage: store.state(*stage) for stage in plan.stages()}
    return {
        "sweep": plan.name,
        "shared": [{"train": id_, "state": states["train", id_]} for id_ in plan.shared],
        "cells": [
            {"cell": cell.id, "labels": cell.labels, "stages": _stages(cell, states)} for cell in plan.cells
        ],
        "total": dict(Counter(states.values())),
    }


def _stages(cell: Cell, states: dict[Any, Any]) -> dict[str, Any]:
    tasks = {task: {"id": id_, "state": states["eval", id_]} for task, id_ in cell.evals.items()}
    scoring = [task["state"] for task in tasks.values()]
    return {
        "prepare": {"id": cell.index, "state": states["index", cell.index]},
        "train": {"id": cell.train, "state": states["train", cell.train]},
        "eval": {
            "id": cell.id,
            "state": next((state for state in _GRAVEST_FIRST if state in scoring), "done"),
            "tasks": tasks,
        },
    }


def dry_run(plan: Plan, store: Store) -> dict[str, Any]:
    """Plan, states, and an estimate for every cell; shared stages are counted once in `total`."""
    document = collect(plan, store)
    costs = {id_: stages.estimate(order, store) for id_, order in plan.trains.items()}
    for shown, cell in zip(document["cells"], plan.cells, strict=True):
        shown["estimate"] = costs[cell.train].model_dump()
    for shared in document["shared"]:
        shared["estimate"] = costs[shared["train"]].model_dump()
    total = estimates.total(list(costs.values())).model_dump()
    return {**document, "total": {"stages": document["total"], **total}}


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
    for header in ("rows", "steps", "model FLOPs") if estimated else ():
        shown.add_column(header, justify="right")
    for shared in document["shared"]:
        where = () if estimated else (shared["train"],)
        shown.add_row("shared base model", "", shared["state"], "", *where, *_costs(shared))
    for cell in document["cells"]:
        states = [cell["stages"][stage]["state"] for stage in ("prepare", "train", "eval")]
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
    return shown


def _costs(item: dict[str, Any]) -> tuple[str, ...]:
    if (cost := item.get("estimate")) is None:
        return ()
    if cost["rows"] is None:
        return ("not prepared", "", "")
    return (
        f"{cost['rows']:,}",
        f"{cost['steps']:,}",
        "unknown" if cost["flops"] is None else f"{cost['flops']:.3g}",
    )
