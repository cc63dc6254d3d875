"""What a report may and may not say. Plans are real; the manifests are written by hand, nothing is trained."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from packcli import sweepfile
from packcli.files import write_json
from packcli.plan import Cell, Kind, Plan, needed, plan
from packcli.report import render, rows
from packcli.report.records import Group, Report
from packcli.store import Manifest, Store

SWEEP = """
name: demo
model:
  config: {model_type: llama}
  tokenizer: train
  vocab_size: 300
data: {source: tiny, max_length: 64, validation: 0.1}
train: {epochs: 1, lr: 1e-3, global_batch: 8}
eval: {tasks: [copy, swap]}
matrix:
  arm: [padding, best_fit]
  seed: [1, 2, 3]
"""

LEDGER = {"rows": 100, "slots": 6400, "documents_cut": 0, "tokens_truncated": 7, "tokens_kept": 3200, "efficiency": 0.5}
TRAINED = {
    "steps": 40,
    "tokens": 3200,
    "slots": 6400,
    "supervised": 900,
    "final_loss": 1.5,
    "validation_loss": 1.25,
    "wall_s": 20.0,
    "cpu_s": 30.0,
    "useful_tokens_per_s": 160.0,
    "padded_tokens_per_s": 320.0,
    "random_weights": True,
    "processes": 1,
    "threads": 1,
    "device": "cpu",
}
SCORED = {"metric": "acc", "stderr": 0.05, "n": 100, "n_total": 100, "version": 1, "health": {}}


class Sweep:
    """A sweep whose stages are finished or failed by hand."""

    def __init__(self, text: str, directory: Path) -> None:
        file = directory / "sweep.yaml"
        file.write_text(text)
        spec = sweepfile.load(file)
        self.plan: Plan = plan(spec, {key: f"fingerprint of {key}" for key in needed(spec)})
        self.store = Store(directory / "runs")

    def finish(self, kind: Kind, id_: str, results: dict[str, Any]) -> None:
        manifest = Manifest(
            stage=kind, id=id_, version=1, spec={}, inputs={}, outputs={}, results=results, provenance={}
        )
        write_json(self.store.manifest_file(kind, id_), manifest.model_dump())

    def fail(self, kind: Kind, id_: str, cause: str) -> None:
        write_json(self.store.failure_file(kind, id_), {"cause": cause, "fix": "lower `train.lr`"})

    def trained(self, cell: Cell, **results: Any) -> None:
        self.finish("index", cell.index, {"ledger": LEDGER})
        self.finish("train", cell.train, TRAINED | results)

    def scored(self, cell: Cell, task: str, score: float, **results: Any) -> None:
        self.finish("eval", cell.evals[task], {"task": task, "score": score} | SCORED | results)

    def cell(self, **labels: str) -> Cell:
        (found,) = [cell for cell in self.plan.cells if labels.items() <= cell.labels.items()]
        return found

    def report(self) -> Report:
        return rows.collect(self.plan, self.store)

    def group(self, arm: str) -> Group:
        (found,) = [group for group in self.report().groups if group.arm == arm]
        return found


Make = Callable[..., Sweep]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A sweep with every cell done; `scores(arm, seed)` is the score of both tasks."""

    def build(text: str = SWEEP, scores: Callable[[str, int], float] | None = None) -> Sweep:
        sweep = Sweep(text, tmp_path)
        for cell in sweep.plan.cells:
            fast = cell.labels["arm"] != "padding"
            seed = int(cell.labels["seed"])
            seconds = (10.0 if fast else 30.0) + seed / 10
            slots = 3300 if fast else 6400
            sweep.trained(cell, cpu_s=seconds, wall_s=seconds / 2, slots=slots, steps=20 if fast else 40)
            for task in cell.evals:
                sweep.scored(cell, task, scores(cell.labels["arm"], seed) if scores else 0.5 + seed / 100)
        return sweep

    return build


def shown(report: Report, width: int = 110) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render.table(report))
    return console.export_text()
