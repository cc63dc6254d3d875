"""What submitting and watching a sweep of 1,000 cells costs: `python benchmarks/slurm_scale.py`.

Two sweeps of random weights and packaged toy data: 1,000 token stores under one arm (the cells share nothing), and
10 arms under 100 seeds (these share tokens and a base model). Nothing is trained. SLURM is a bit of shell that
keeps what `sbatch` is given and answers after `--answer` seconds: what a real one takes is not in the figures, and
what this one takes, its start included, is printed beside them. The commands are those a user types, each a fresh
process; CPU seconds are user and system time of it and of all it starts, so of the pretended SLURM too.

*Under way* is a state written by hand: four tenths of the cells done, some running in their second attempt (what
these read is really prepared), ten failed, the rest queued. *Lost*: SLURM knows no job any more, nothing is done.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from prepare import table

from packcli.launch import life
from packcli.plan import Kind
from packcli.store import Store

PACKCLI = (sys.executable, "-m", "packcli")
NAMES = ("padding", "padding_free", "sorted", "random", "greedy", "best_fit", "longalign", "padding_released",
         "random_released", "greedy_released")  # fmt: skip
SHAPE = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 64,
}  # fmt: skip
COMMON = {
    "data": {"source": "tiny", "max_length": 192, "validation": 0.05},
    "train": {"epochs": 3, "lr": 3e-3, "global_batch": 32, "micro_batch": 32},
    "eval": {"tasks": ["tiny"]},
}
PROFILE = {"partition": "main", "nodes": 4, "gpus_per_node": 8, "stages": {"eval": {"gpus_per_node": 1}}}
DONE, RUNNING, FAILED = 0.4, 8, 10
ANSWERS = 20


def sweeps(cells: int) -> list[tuple[str, dict[str, Any], list[str]]]:
    """(title, sweep, `--only` that chooses the cells that run)."""
    stores = [1000 + number for number in range(cells)]
    seeds = list(range(cells // len(NAMES)))
    own = {"config": SHAPE, "tokenizer": "train", "vocab_size": 512}
    return [
        (
            f"{cells:,} token stores x 1 arm",
            {"name": "stores", "model": own, **COMMON,
             "matrix": {"arm": ["best_fit"], "data.max_documents": stores}},
            [f"data.max_documents={count}" for count in stores[-RUNNING:]],
        ),
        (
            f"{len(NAMES)} arms x {len(seeds)} seeds",
            {"name": "seeds", "model": {"name": "tiny"}, **COMMON, "matrix": {"arm": list(NAMES), "seed": seeds}},
            [f"seed={seeds[-1]}"],
        ),
    ]  # fmt: skip


class Slurm:
    """Commands in `directory`/bin over files: `jobs/ID` is what sbatch took, `queue` what squeue prints."""

    def __init__(self, directory: Path, answer_s: float) -> None:
        self.directory, self.bin = directory, directory / "bin"
        self.bin.mkdir(parents=True)
        said = {
            "sbatch": 'case " $* " in *" --test-only "*) exit 0;; esac\nfor script; do :; done\njob=1000\n'
            f'while ! mkdir "{directory}/jobs/$job" 2> /dev/null; do job=$((job + 1)); done\n'
            f'cp "$script" "{directory}/jobs/$job/script"\necho "$job"\n',
            "squeue": f'cat "{directory}/queue"\n',
            **dict.fromkeys(("sacct", "scancel", "sinfo"), ""),
        }
        for name, what in said.items():
            path = self.bin / name
            path.write_text(f'#!/bin/sh\necho {name} >> "{directory}/calls"\nsleep {answer_s}\n{what}')
            path.chmod(0o755)
        self.empty()

    def empty(self) -> None:
        shutil.rmtree(self.directory / "jobs", ignore_errors=True)
        (self.directory / "jobs").mkdir()
        (self.directory / "queue").write_text("")

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}

    def calls(self) -> list[str]:
        """Since last asked."""
        path = self.directory / "calls"
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    def answer_s(self) -> float:
        """Of one call, start included."""
        taken = []
        for _ in range(ANSWERS):
            began = time.perf_counter()
            subprocess.run([self.bin / "sbatch", "--test-only", "script"], check=True)
            taken.append(time.perf_counter() - began)
        self.calls()
        return median(taken)

    def queue(self, running: Sequence[str] = (), ended: Sequence[str] = ()) -> int:
        """Let squeue list all elements that were submitted, less `ended`; how many."""
        lines, gone = [], set(ended)
        for job in sorted((self.directory / "jobs").iterdir()):
            comment, spans = (
                re.search(rf"^#SBATCH --{key}=(\S+)$", (job / "script").read_text(), re.MULTILINE)
                for key in ("comment", "array")
            )
            assert comment is not None
            assert spans is not None
            for index in _indices(spans[1]):
                if (id_ := f"{job.name}_{index}") not in gone:
                    state = "RUNNING|None|node[0-3]" if id_ in running else "PENDING|Resources|"
                    lines.append(f"{comment[1]}|{id_}|{state}\n")
        (self.directory / "queue").write_text("".join(lines))
        return len(lines)


def _indices(spans: str) -> Iterator[int]:
    for span in spans.partition("%")[0].split(","):
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1)


@dataclass(frozen=True, slots=True)
class Run:
    """One command. `calls`: of the pretended SLURM."""

    step: str
    wall_s: float
    cpu_s: float
    calls: int


class Session:
    """One sweep, submitted and watched in a run directory of its own."""

    def __init__(self, directory: Path, slurm: Slurm, sweep: dict[str, Any], only: list[str]) -> None:
        directory.mkdir(parents=True)
        self.sweep, self.profile = directory / "sweep.yaml", directory / "cluster.yaml"
        self.sweep.write_text(json.dumps(sweep))  # JSON is YAML
        self.profile.write_text(json.dumps(PROFILE))
        self.runs, self.store, self.slurm = directory / "runs", Store(directory / "runs"), slurm
        self.only = [word for choice in only for word in ("--only", choice)]
        self.name, self.found = sweep["name"], list[Run]()
        slurm.empty()

    def run(self, step: str, command: str, *options: str, timed: bool = True) -> None:
        words = [*PACKCLI, command, str(self.sweep), "--runs", str(self.runs), *options]
        self.slurm.calls()
        began = time.perf_counter()
        process = subprocess.Popen(
            words, env=self.slurm.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        said = process.stderr.read().decode()
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"{' '.join(words)}\n{said}")
        if timed:
            self.found.append(Run(step, wall_s, used.ru_utime + used.ru_stime, len(self.slurm.calls())))

    def all(self) -> str:
        """Every step; what was submitted, in words."""
        submit = ("--on", str(self.profile))
        self.run("sweep --on: submits all", "sweep", *submit)
        files = [path for path in self.runs.rglob("*") if path.is_file()]
        written = f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB"
        jobs = self.slurm.queue()
        arrays = len(list((self.slurm.directory / "jobs").iterdir()))
        self.run("sweep --on: again, all is there", "sweep", *submit)
        self.run("status, all queued", "status")
        self.run("status --json, all queued", "status", "--json")
        self.under_way()
        self.run("status, under way", "status")
        self.run("status --json, under way", "status", "--json")
        self.run("cancel, under way", "cancel")
        shutil.rmtree(self.runs / "store")
        (self.slurm.directory / "queue").write_text("")
        self.run("status, lost", "status")
        return f"{jobs:,} jobs in {arrays} arrays; {written}"

    def under_way(self) -> None:
        plan = json.loads(self.store.plan_file(self.name).read_bytes())
        self.run("", "prepare", *self.only, timed=False)
        chosen = {tuple(choice.split("=")) for choice in self.only[1::2]}
        running = [cell for cell in plan["cells"] if chosen & set(cell["labels"].items())]
        others = [cell for cell in plan["cells"] if cell not in running]
        done = others[: round(DONE * len(others))]
        jobs = self._jobs()
        self._finish("tokens", plan["tokens"])
        self._finish("index", plan["indexes"])
        self._finish("train", (*plan["shared"], *(cell["train"] for cell in done)))
        self._finish("eval", (id_ for cell in done for id_ in cell["evals"].values()))
        for cell in running:
            self._train(cell["train"], jobs["train", cell["train"]])
        for cell in others[len(done) : len(done) + FAILED]:
            record = {"kind": "diverged", "cause": "loss is not finite at step 7", "fix": "lower train.lr"}
            self._write(self.store.failure_file("train", cell["train"]), record)
        ended = [job for (kind, id_), job in jobs.items() if self.store.state(kind, id_) in ("done", "failed")]
        self.slurm.queue([jobs["train", cell["train"]] for cell in running], ended)

    def _jobs(self) -> dict[tuple[Kind, str], str]:
        """Which job does a stage."""
        found = {}
        for submission, number in self.store.arrays():
            job = json.loads(self.store.array_job(submission, number).read_bytes())["job"]
            order = json.loads(self.store.array_order(submission, number).read_bytes())
            for element in order["array"]["elements"]:
                found.update({tuple(stage): f"{job}_{element['index']}" for stage in element["stages"]})
        return found

    def _finish(self, kind: Kind, ids: Iterable[str]) -> None:
        for id_ in ids:
            if self.store.state(kind, id_) != "done":
                self._write(self.store.manifest_file(kind, id_), {})  # `status` asks only whether there is one

    def _train(self, id_: str, job: str) -> None:
        first = life.Attempt(job=job, restart=0, nodes=("node0",), started_s=0.0, began_at=0, how="preempted")
        attempts = (first, first.model_copy(update={"restart": 1, "how": None}))
        self._write(self.store.job("train", id_), life.Life(attempts=attempts).model_dump())
        lines = [{"step": step, "loss": 3.0, "tokens": 5000, "step_s": 0.5} for step in range(1, 31)]
        self.store.metrics(id_).write_text("".join(json.dumps(line) + "\n" for line in lines))

    @staticmethod
    def _write(path: Path, document: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))


def show(title: str, size: str, found: Sequence[Run], answer_s: float) -> None:
    print(f"\n**{title}**: {size}\n")
    rows = []
    for step in dict.fromkeys(run.step for run in found):
        own = [run for run in found if run.step == step]
        walls = sorted(run.wall_s for run in own)
        calls = own[0].calls
        cpu_s = median(run.cpu_s for run in own)
        rows.append([step, f"{median(walls):.1f}", f"{walls[0]:.1f} to {walls[-1]:.1f}", f"{cpu_s:.1f}",
                     str(calls), f"{calls * answer_s:.2f}"])  # fmt: skip
    print(table(["command", "wall s", "range", "CPU s", "calls of SLURM", "their own s"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer", type=float, default=0.01, help="seconds until SLURM answers")
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="packcli-scale-") as scratch:
        slurm = Slurm(Path(scratch) / "slurm", asked.answer)
        answer_s = slurm.answer_s()
        for number, (title, sweep, only) in enumerate(sweeps(asked.cells)):
            found: list[Run] = []
            for turn in range(asked.rounds):
                session = Session(Path(scratch) / f"{number}-{turn}", slurm, sweep, only)
                size = session.all()
                found += session.found
            show(title, size, found, answer_s)
    print(
        f"\nmedians of {asked.rounds} rounds; {os.cpu_count()} cores, load average {load:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after; Python {platform.python_version()}; one answer of the pretended SLURM, "
        f"its start included: {1000 * answer_s:.0f} ms (asked for: {1000 * asked.answer:.0f} ms)"
    )


if __name__ == "__main__":
    main()
