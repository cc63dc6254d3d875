"""What tests of `status` and `--wait` share: a sweep on a pretended cluster, and stages that live and end."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from test_graph import profile
from test_plan import SWEEP, made

from packcli.errors import PackcliError
from packcli.files import json_line, write_json
from packcli.launch import cluster, life, watch
from packcli.launch.cluster import View
from packcli.launch.graph import Stage
from packcli.launch.life import Attempt, Life
from packcli.plan import Plan
from packcli.store import Store


def planned(seeds: int = 1) -> Plan:
    """Trainings of 80 steps, each scored on two tasks."""
    document = copy.deepcopy(SWEEP)
    document["matrix"] = {"arm": ["padding"], "seed": list(range(seeds))}
    document["train"] = {"steps": 80, "lr": 0.001, "global_batch": 8}
    document["eval"] = {"tasks": ["tiny_copy", "gsm8k"]}
    return made(document)


class Sent:
    """A plan that was submitted whole, to a cluster that does nothing by itself."""

    def __init__(self, plan: Plan, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.plan, self.store, self.slurm = plan, Store(root / "runs"), FakeSlurm(root / "slurm")
        for name, value in self.slurm.env.items():
            patch.setenv(name, value)
        outcome = cluster.submit(plan, self.store, profile(nodes=1), {})
        assert not outcome.failures
        self.jobs = {
            stage: (sent.job, element.index)
            for sent in outcome.sent
            for element in sent.array.elements
            for stage in element.stages
        }
        self.ids = {sent.array.job: sent.job for sent in outcome.sent}

    def id(self, stage: Stage) -> str:
        job, index = self.jobs[stage]
        return f"{job}_{index}"

    def set(self, stage: Stage, state: str, *, reason: str = "None", nodes: str = "") -> None:
        """What SLURM says of the job that does a stage."""
        job, index = self.jobs[stage]
        self.slurm.set(job, state, element=index, reason=reason, nodes=nodes)

    def finish(self, *stages: Stage) -> None:
        """Done on disk, and by SLURM's word."""
        for stage in stages:
            write_json(self.store.manifest_file(*stage), {})
        for stage in stages:
            job = self.jobs[stage]
            if all(self.store.state(*other) == "done" for other, its in self.jobs.items() if its == job):
                self.set(stage, "COMPLETED")

    def fail(self, stage: Stage, error: PackcliError) -> None:
        """The job leaves word of why, and ends."""
        self.store.fail(*stage, error)
        self.set(stage, "FAILED")

    def attempt(self, stage: Stage, *ends: str | None, started_s: float | None = None) -> None:
        """What the disk says of attempts: how each ended, None for one that goes on."""
        started_s = time.time() if started_s is None else started_s
        attempts = [
            Attempt(
                job=self.id(stage),
                restart=number,
                nodes=("node0",),
                started_s=started_s,
                began_at=0,
                stood_at=0,
                how=how,
            )
            for number, how in enumerate(ends)
        ]
        life.write(self.store, stage, Life(attempts=tuple(attempts)))

    def train_to(self, train: str, step: int, *, step_s: float = 2.0, torn: bool = False) -> None:
        """`metrics.jsonl` as far as `step`, and half a line more."""
        records = [
            {"step": number, "loss": 3.0 - number / 100, "tokens": 1000, "step_s": step_s}
            for number in range(1, step + 1)
        ]
        path = self.store.metrics(train)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(map(json_line, records)) + (b'{"step":999,"lo' if torn else b""))

    def seen(self) -> dict[Stage, dict[str, object]]:
        """Jobs as `status` is told of them."""
        return watch.jobs(self.plan, self.store, View(self.store))


def age(path: Path, seconds: float) -> None:
    """As if it had been written so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))
