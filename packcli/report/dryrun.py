"""What `packcli sweep --dry-run` prints: for every cell its state, what it will take, and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from packcli import costs
from packcli import estimate as estimates
from packcli.config import EstimateSpec
from packcli.errors import ConfigError
from packcli.files import json_line
from packcli.memory import GIB
from packcli.plan import Cell, Plan
from packcli.report import cautions, status
from packcli.store import Store

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_BASIS = {
    "prepared": "Rows, steps and FLOPs are counted from the prepared data.",
    "fitted": "Rows, steps and FLOPs rest on lengths FITTED to the paper's printed steps, not measured, with all "
    "tokens supervised (docs/paper-steps.md); exact once prepared.",
}


def collect(plan: Plan, store: Store, where: tuple[int, int] | None = None) -> dict[str, Any]:
    """Plan, states, and for every cell an estimate, the arithmetic of a step, memory, and warnings.

    Trainings that cells share, and shared base models, are counted once in `total`; `gpu_hours_left` leaves out
    those that are done. `where`: (nodes, GPUs of each) of a cluster's profile, instead of what the sweep says.
    """
    document = status.collect(plan, store)

    @cache
    def cost_of(train: str, spec: EstimateSpec) -> costs.Costs:
        return costs.of(plan.trains[train], plan, store, _placed(spec, plan.trains[train].train.nodes, where))

    counted: dict[str, estimates.Estimate] = {}
    for shown, cell in zip(document["cells"], plan.cells, strict=True):
        cost = cost_of(cell.train, cell.estimate)
        counted.setdefault(cell.train, cost.estimate)
        shown.update(_shown(cost))
        if (base := plan.trains[cell.train].base) is not None:
            counted.setdefault(base, cost_of(base, cell.estimate).estimate)
    for shared in document["shared"]:
        user = next(cell for cell in plan.cells if plan.trains[cell.train].base == shared["train"])
        shared.update(_shown(cost_of(shared["train"], user.estimate)))
    partners = _baselines(plan)
    for number, shown in enumerate(document["cells"]):
        partner = partners[number]
        shown["warnings"] = cautions.of(shown, None if partner is None else document["cells"][partner])
    states = store.states([("train", id_) for id_ in counted])
    left = [cost for id_, cost in counted.items() if states["train", id_] != "done"]
    total = estimates.total(list(counted.values())).model_dump(exclude={"lengths", "rate"})
    gpu_hours_left = estimates.total(left).gpu_hours if left else 0.0
    return {**document, "total": {"stages": document["total"], **total, "gpu_hours_left": gpu_hours_left}}


def _placed(spec: EstimateSpec, nodes: int | None, where: tuple[int, int] | None) -> EstimateSpec:
    if spec.cluster is None or where is None or not all(where):
        return spec
    here = {"nodes": nodes or where[0], "gpus_per_node": where[1]}
    return spec.model_copy(update={"cluster": spec.cluster.model_copy(update=here)})


def _shown(cost: costs.Costs) -> dict[str, Any]:
    memory = None
    if cost.memory is not None:
        memory = {**cost.memory.model_dump(), "fits": cost.memory.fits}
    step = {**cost.step.model_dump(), "text": cost.step.text()} if cost.step else None
    return {"estimate": cost.estimate.model_dump(), "step": step, "memory": memory}


def _baselines(plan: Plan) -> list[int | None]:
    """For each cell the number of the one that differs from it by the arm alone, which is the baseline."""

    def others(cell: Cell) -> tuple[tuple[str, str], ...]:
        return tuple((axis, value) for axis, value in cell.labels.items() if axis != "arm")

    first = {
        others(cell): number for number, cell in enumerate(plan.cells) if cell.labels.get("arm") == plan.baseline
    }
    found = [first.get(others(cell)) for cell in plan.cells]
    return [None if partner == number else partner for number, partner in enumerate(found)]


def check_budget(document: Mapping[str, Any], most: float) -> None:
    """Raise `ConfigError` where the trainings that are left take more GPU-hours, or nobody knows how many."""
    left = document["total"]["gpu_hours_left"]
    if left is None:
        raise ConfigError(
            "how many GPU-hours the trainings take is not known, so --max-gpu-hours cannot hold them to any",
            "`packcli prepare SWEEP` counts the rows; `estimate.cluster`, and `estimate.slot_mfu` where no rate "
            "is known, give the hours (docs/training.md)",
        )
    if left > most:
        raise ConfigError(
            f"the trainings that are left take {_hours(left)} GPU-hours, more than --max-gpu-hours {most:g}",
            "choose cells with --only, train for less, or allow more; nothing was run",
        )


# In words ----------------------------------------------------------------------------------------------


def shown(document: dict[str, Any]) -> list[RenderableType]:
    """The table, what it rests on, warnings; then the arithmetic of each step, and memory, each said once."""
    from rich.markup import escape

    named = [(_name(cell), cell["warnings"]) for cell in document["cells"]]
    lines = [*_notes(document), *cautions.lines(named)]
    return [table(document), *map(escape, lines), *_details(document)]


def table(document: dict[str, Any]) -> Table:
    """One line a cell."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    items = [*document["shared"], *document["cells"]]
    numbers = [_numbers(item) for item in items]
    known = [number for number in range(len(_COLUMNS)) if number < 3 or any(line[number] for line in numbers)]
    shown = Table(box=box.SIMPLE_HEAD, title=escape(document["sweep"]), title_justify="left")
    for header in ("cell", "prepare, train, eval"):
        shown.add_column(header)
    for number in known:
        shown.add_column(_COLUMNS[number], justify="right")
    for item, line in zip(items, numbers, strict=True):
        states = status.states(item) if "labels" in item else [status.words(item)]
        words = states[0] if len(set(states)) == 1 else ", ".join(states)
        name = escape(_name(item)) if "labels" in item else "shared base model"
        shown.add_row(name, words, *(line[number] for number in known))
    shown.caption = status.counted(document["total"]["stages"])
    return shown


_COLUMNS = ("rows", "steps", "model FLOPs", "GiB a GPU", "hours", "GPU-hours")


def _numbers(item: Mapping[str, Any]) -> list[str]:
    """One for each of `_COLUMNS`; empty: not known."""
    cost, memory = item["estimate"], item["memory"]
    size = "" if memory is None else _gib(memory["total_bytes"])
    if cost["rows"] is None:
        return ["not prepared", "", "", size, "", ""]
    return [
        f"{cost['rows']:,}",
        f"{cost['steps']:,}",
        "unknown" if cost["flops"] is None else f"{cost['flops']:.3g}",
        size,
        *("" if cost[key] is None else _hours(cost[key]) for key in ("hours", "gpu_hours")),
    ]


def _notes(document: Mapping[str, Any]) -> list[str]:
    """What the numbers rest on, what all of it takes, and what to do where that is not known."""
    items = [*document["shared"], *document["cells"]]
    notes = [text for key, text in _BASIS.items() if any(item["estimate"]["lengths"] == key for item in items)]
    rates = dict.fromkeys(rate for item in items if (rate := item["estimate"]["rate"]))
    notes += [f"hours: {rate}" for rate in rates]
    if any(item["estimate"]["rows"] is None for item in items):
        notes.append(
            "What is not prepared is not guessed: `packcli prepare SWEEP --plan` reads lengths and tells rows."
        )
    elif not rates:
        notes.append("No hours: name `estimate.cluster`, and `estimate.slot_mfu` where no rate is known.")
    return [*notes, *([f"cost: {cost}"] if (cost := cost_line(document)) else [])]


def cost_line(document: Mapping[str, Any]) -> str | None:
    """What all trainings take together: the line that a shipped sweep has in its head. None: not known."""
    total = document["total"]
    if total["gpu_hours"] is None:
        return None
    where = {f"{memory['gpus']} x {memory['gpu']}" for cell in document["cells"] if (memory := cell["memory"])}
    trainings = len({cell["stages"]["train"]["id"] for cell in document["cells"]}) + len(document["shared"])
    hours = f"{_hours(total['hours'])} hours one after another on {' or '.join(sorted(where))}"
    fitted = any(cell["estimate"]["lengths"] == "fitted" for cell in document["cells"])
    basis = ", by fitted lengths" if fitted else ""
    return f"{trainings} trainings, {_hours(total['gpu_hours'])} GPU-hours: {hours}{basis}; evaluation not counted"


def _details(document: dict[str, Any]) -> list[RenderableType]:
    """The arithmetic of each step, and memory, each said once."""
    from rich.markup import escape

    shown: list[RenderableType] = []
    for key, render in (("step", _step), ("memory", _memory)):
        said: dict[bytes, tuple[dict[str, Any], list[str]]] = {}
        for item in (*document["shared"], *document["cells"]):
            if (found := item[key]) is not None:
                name = _name(item) if "labels" in item else "shared base model"
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


def _name(cell: Mapping[str, Any]) -> str:
    return " ".join(cell["labels"].values())


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 1 else f"{value:.1g}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"
