"""What a dry run warns of, each by a rule that is printed with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FEW_STEPS = 300
_FEW_TIMES = 2.0
_IDLE = 0.2

FEW = (
    f"fewer than {FEW_STEPS} optimizer steps: their number may then matter more than what is compared (arXiv "
    "2407.09105, by notes on it: masked packing ended at a validation loss of 1.22 after 35 steps, 1.17 after 281)"
)
FEWER = (
    "at most half the steps of the baseline beside it, at the same learning rate: a step holds more conversations "
    "then, and arms differ in more than their rows; `train.batch_unit: documents` takes that apart"
)
IDLE = (
    "a fifth or more of the GPUs' time is idle, as no row is divided up; the hours shown do not count that: "
    "take fewer GPUs, or a larger `train.global_batch`"
)
MEMORY = "does not fit in the GPU's memory: see the table below"
BARELY = "leaves less than 10% of the GPU's memory free: see the table below"


def of(item: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """`item`: a cell of a dry run. `baseline`: the cell whose arm is the baseline and all else is the same."""
    found = []
    steps = item["estimate"]["steps"]
    if steps is not None and steps < FEW_STEPS:
        found.append({"rule": FEW, "found": f"{steps:,} steps"})
    other = baseline["estimate"]["steps"] if baseline else None
    if baseline and steps and other and other >= _FEW_TIMES * steps and _rate(item) == _rate(baseline):
        found.append({"rule": FEWER, "found": f"{steps:,} steps against {other:,}"})
    if (memory := item["memory"]) is not None and item["step"] is not None:
        rows, gpus = item["step"]["rows"], memory["gpus"]
        if (idle := _idle(rows, gpus)) >= _IDLE:
            found.append({"rule": IDLE, "found": f"{rows:.1f} rows a step on {gpus} GPUs: {idle:.0%}"})
    if memory is not None and memory["fits"] != "yes":
        gib = f"{memory['total_bytes'] / 2**30:,.1f} of {memory['capacity_bytes'] / 2**30:,.1f} GiB"
        found.append({"rule": MEMORY if memory["fits"] == "no" else BARELY, "found": gib})
    return found


def _rate(item: Mapping[str, Any]) -> float:
    return float(item["step"]["lr"])


def _idle(rows: float, gpus: int) -> float:
    """Share of the GPUs' time, if rows take equally long; steps have whole numbers of them, `rows` on average."""
    if not rows:
        return 0.0  # nothing is trained
    fewer, part = math.floor(rows), rows % 1
    rounds = (1 - part) * math.ceil(fewer / gpus) + part * math.ceil((fewer + 1) / gpus)
    return 1 - rows / (gpus * rounds)


def lines(named: list[tuple[str, list[dict[str, str]]]]) -> list[str]:
    """One line a rule, from (name of a cell, what was found of it)."""
    met: dict[str, list[str]] = {}
    for name, found in named:
        for one in found:
            met.setdefault(one["rule"], []).append(f"{name} ({one['found']})")
    return [
        f"warning: {cells[0]}{f' and {len(cells) - 1} more' if len(cells) > 1 else ''}: {rule}"
        for rule, cells in met.items()
    ]
