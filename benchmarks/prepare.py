"""Time `packcli prepare` beside other trainers' preparation of the same conversations, and compare what they made.

    python benchmarks/peers/llama3.py TOKENIZER
    python benchmarks/prepare.py --data CHATS... --tokenizer TOKENIZER \\
        --peer trl=TRL_VENV/bin/python --peer llamafactory=LLAMAFACTORY_VENV/bin/python

The peers' environments are in `peers/trl.txt` and `peers/llamafactory.txt`. Data: JSON or JSONL files of
`messages`, ShareGPT, Alpaca or question/answer; `peers/conversations.py` numbers, shuffles and, where there are
too few, repeats them. Linux only: cores are pinned, and the CPU time of orphaned workers is collected.

Programs take turns within a round, each with empty caches of its own. CPU seconds are user and system time of a
program and all it starts. *Preparation* leaves out what comes before it (imports, loading the tokenizer, the
peer's model), for peers and for us (a second run, in one process: our engine's own table of the vocabulary counts
as preparation); *whole program* leaves out nothing. Prints Markdown; `--json FILE` keeps every run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from peers import compare, conversations

HERE = Path(__file__).parent
MAX_LENGTH = 4096
OURS = "packcli"
SCRIPTS = {"trl": "trl_prepare.py", "llamafactory": "llamafactory_prepare.py"}
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one program, whole; `result` is what it said of itself."""

    cpu_s: float
    wall_s: float
    result: dict[str, Any]

    @property
    def preparation(self) -> dict[str, float]:
        """Its steps, less those inside another."""
        steps = [taken for name, taken in self.result["steps"].items() if not name.startswith("of it")]
        return {key: sum(taken[key] for taken in steps) for key in ("cpu_s", "wall_s")}


@dataclass(frozen=True, slots=True)
class Setting:
    """What every program is given. `peers`: name -> the Python of its environment."""

    data: Path
    tokenizer: Path
    peers: dict[str, str]
    scratch: Path

    @property
    def programs(self) -> list[str]:
        return [OURS, *self.peers]

    def run(self, program: str, cores: int, made: Path | None = None) -> Run:
        """One run on so many cores, with as many workers. `made`: keep the documents there; not for timing."""
        with tempfile.TemporaryDirectory(dir=self.scratch, ignore_cleanup_errors=True) as name:
            if program == OURS:
                return self._ours(Path(name), cores, made)
            return self._peer(self.peers[program], SCRIPTS[program], Path(name), cores, made)

    def reference(self, made: Path) -> compare.Documents:
        """What transformers makes of every conversation."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as name:
            self._peer(sys.executable, "transformers_reference.py", Path(name), 1, made)
        return compare.load(made)

    def steps(self) -> dict[str, float]:
        """CPU seconds of each of our steps, in order, in single processes on one core."""
        stages, parts = self._steps("stages", 1), self._steps("parts", 1)
        beyond = stages["tokens"]["cpu_s"] - sum(taken["cpu_s"] for taken in parts.values())
        first, _, last = stages.items()
        found = dict([first, *parts.items(), ("write, checksums, the rest", {"cpu_s": beyond}), last])
        return {step: taken["cpu_s"] for step, taken in found.items()}

    def _steps(self, mode: str, cores: int) -> dict[str, dict[str, float]]:
        with tempfile.TemporaryDirectory(dir=self.scratch) as name:
            script, sweep = str(HERE / "peers" / "packcli_steps.py"), str(self._sweep(Path(name), cores))
            *_, printed = _measured([sys.executable, script, mode, sweep, f"{name}/runs"], Path(name), cores)
        steps: dict[str, dict[str, float]] = json.loads(printed)
        return steps

    def _ours(self, scratch: Path, cores: int, made: Path | None) -> Run:
        command = [sys.executable, "-m", "packcli", "prepare", str(self._sweep(scratch, cores))]
        cpu_s, wall_s, printed = _measured([*command, f"--runs={scratch / 'runs'}", "--json"], scratch, cores)
        [cell] = json.loads(printed)["cells"]
        if made:
            compare.save_store(Path(cell["tokens_path"]), cell["ledger"]["rows"], made)
        return Run(cpu_s, wall_s, {"ledger": cell["ledger"], "steps": self._steps("prepared", cores)})

    def _peer(self, python: str, script: str, scratch: Path, cores: int, made: Path | None) -> Run:
        given = {"data": self.data, "tokenizer": self.tokenizer, "scratch": scratch / "work"}
        given |= {"documents": made} if made else {}
        options = [f"--{key}={value}" for key, value in given.items()]
        command = [
            python,
            str(HERE / "peers" / script),
            *options,
            f"--max-length={MAX_LENGTH}",
            f"--workers={cores}",
        ]
        cpu_s, wall_s, printed = _measured(command, scratch, cores)
        return Run(cpu_s, wall_s, json.loads(printed.splitlines()[-1]))

    def _sweep(self, scratch: Path, processes: int) -> Path:
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = {"model_type": "llama", **small, "max_position_embeddings": MAX_LENGTH}
        sweep = {
            "name": "prepare",
            "model": {"config": config, "tokenizer": str(self.tokenizer)},
            "data": {"source": str(self.data), "max_length": MAX_LENGTH, "processes": processes},
            "train": {"steps": 1, "lr": 0.001, "global_batch": 1},
            "matrix": {"arm": ["best_fit"], "seed": [0]},
        }
        file = scratch / "sweep.yaml"
        file.write_text(json.dumps(sweep))  # JSON is YAML
        return file


def _measured(command: list[str], scratch: Path, cores: int) -> tuple[float, float, str]:
    """CPU and wall seconds of a command, pinned to so many cores, and what it printed."""
    caches = {"HF_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1", "MPLCONFIGDIR": str(scratch)}
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    before, began = _children_s(), time.perf_counter()
    with (scratch / "stdout").open("w") as out, (scratch / "stderr").open("w") as errors:
        code = subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, allowed)), *command],
            stdout=out,
            stderr=errors,
            env={**os.environ, **caches},
        ).wait()
    wall_s = time.perf_counter() - began
    printed = (scratch / "stdout").read_text()
    if code:
        said = printed[-1000:] + (scratch / "stderr").read_text()[-3000:]
        sys.exit(f"{' '.join(command)}\nexited {code}:\n{said}")
    _reap_orphans()
    return _children_s() - before, wall_s, printed


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _reap_orphans() -> None:
    """Wait for processes whose parent ended first, such as a fork server: only then does their CPU time count."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def timed(setting: Setting, rounds: int, all_cores: int, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every run: each round all programs on one core, then all on all cores."""
    runs = []
    for number in range(rounds):
        for cores in sorted({1, all_cores}):
            for program in setting.programs:
                run = setting.run(program, cores)
                runs.append({"round": number, "cores": cores, "program": program, "run": run})
                note(f"round {number + 1}, {cores} cores, {program}: {run.cpu_s:.2f} CPU s, {run.wall_s:.2f} s")
    return runs


def _medians(runs: list[dict[str, Any]], program: str, cores: int) -> dict[str, float]:
    own = [item["run"] for item in runs if (item["program"], item["cores"]) == (program, cores)]
    return {
        "preparation_cpu_s": median(run.preparation["cpu_s"] for run in own),
        "preparation_wall_s": median(run.preparation["wall_s"] for run in own),
        "whole_cpu_s": median(run.cpu_s for run in own),
        "whole_wall_s": median(run.wall_s for run in own),
    }


def speeds(runs: list[dict[str, Any]], made: dict[str, compare.Documents], all_cores: int) -> list[dict[str, Any]]:
    """One row a program: seconds, useful tokens a second and core, and how many times ours is as fast."""
    rows: list[dict[str, Any]] = []
    for program, documents in made.items():
        one, several = _medians(runs, program, 1), _medians(runs, program, all_cores)
        tokens = int(documents.kept(MAX_LENGTH).sum())
        rate = tokens / one["preparation_cpu_s"]
        rows.append(
            {
                "program": program,
                **one,
                "all_cores_wall_s": several["preparation_wall_s"],
                "tokens": tokens,
                "tokens_per_cpu_s": rate,
                "ours_times": (rows[0]["tokens_per_cpu_s"] if rows else rate) / rate,
                "ours_times_whole": one["whole_cpu_s"] / (rows[0] if rows else one)["whole_cpu_s"],
                "documents": len(documents.lengths),
                "rows": documents.rows,
                "efficiency": tokens / (documents.rows * MAX_LENGTH),
            }
        )
    return rows


def agreements(made: dict[str, compare.Documents], reference: compare.Documents) -> dict[str, compare.Agreement]:
    """Ours against transformers on every conversation, whole; ours against each peer, cut to the row length."""
    ours, *_ = made.values()
    found = {"transformers": compare.in_order(ours, reference)}
    peers = {name: documents for name, documents in made.items() if name != OURS}
    return found | {name: compare.in_any_order(ours, theirs, MAX_LENGTH) for name, theirs in peers.items()}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def speed_table(rows: list[dict[str, Any]], all_cores: int) -> str:
    header = ["program", "CPU s, preparation", "useful tokens/s per core", "ours is", "CPU s, whole program"]
    header += ["ours is", f"wall s, {all_cores} cores", "documents", "rows", "filled"]
    return table(
        header,
        [
            [
                row["program"],
                f"{row['preparation_cpu_s']:.2f}",
                f"{row['tokens_per_cpu_s']:,.0f}",
                "-" if row["program"] == OURS else f"{row['ours_times']:.1f}x",
                f"{row['whole_cpu_s']:.2f}",
                "-" if row["program"] == OURS else f"{row['ours_times_whole']:.1f}x",
                f"{row['all_cores_wall_s']:.2f}",
                f"{row['documents']:,}",
                f"{row['rows']:,}",
                f"{row['efficiency']:.3%}",
            ]
            for row in rows
        ],
    )


def step_table(steps: dict[str, float], whole_cpu_s: float, tokens: int) -> str:
    """Our steps; the rest of the whole command is starting: interpreters, imports, worker processes."""
    rest = {"interpreters, imports, processes": whole_cpu_s - sum(steps.values()), "whole command": whole_cpu_s}
    header = ["our step", "CPU s", "share", "tokens/s"]
    rows = [
        [name, f"{cpu_s:.3f}", f"{cpu_s / whole_cpu_s:.1%}", f"{tokens / cpu_s:,.0f}" if cpu_s > 0.001 else "-"]
        for name, cpu_s in (steps | rest).items()
    ]
    return table(header, rows)


def without_start(steps: dict[str, float], rows: list[dict[str, Any]]) -> str:
    """Ours as the peers are measured: from reading on, with the tokenizer loaded."""
    names = list(steps)
    cpu_s = sum(steps[name] for name in names[names.index("read: JSON") :])
    rate = rows[0]["tokens"] / cpu_s
    ratios = [f"{rate / row['tokens_per_cpu_s']:.1f} times {row['program']}" for row in rows[1:]]
    return f"Our steps from reading on: {cpu_s:.2f} CPU s, {rate:,.0f} tokens/s per core, {', '.join(ratios)}.\n"


def agreement_table(found: dict[str, compare.Agreement]) -> str:
    header = [
        "ours against",
        "documents",
        "same ids",
        "of these: mask leaves out a straddling token",
        "other mask",
    ]
    return table(
        header, [[name, *(f"{value:,}" for value in asdict(item).values())] for name, item in found.items()]
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSON or JSONL chat files")
    parser.add_argument("--conversations", type=int, default=50_000)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory, as peers/llama3.py makes one")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=" or ".join(SCRIPTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-core", action="store_true", help="leave out the runs with a process on every core")
    parser.add_argument("--json", type=Path, help="write every run and all results to this file")
    parser.add_argument("--scratch", type=Path, help="where runs and caches go for a while")
    given = parser.parse_args()
    given.peers = dict(item.split("=", 1) for item in given.peer)
    if unknown := set(given.peers) - set(SCRIPTS):
        parser.error(f"unknown peer {', '.join(unknown)}: there are {', '.join(SCRIPTS)}")
    return given


def main() -> None:
    given = _arguments()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    all_cores, load = 1 if given.one_core else len(os.sched_getaffinity(0)), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=given.scratch) as name:
        data = Path(name) / "chats.jsonl"
        different = conversations.write(given.data, given.conversations, data)
        setting = Setting(data, given.tokenizer.resolve(), given.peers, Path(name))
        made = {}
        for program in setting.programs:  # untimed: what each makes, and its files into the page cache
            path = Path(name) / f"{program}.npz"
            setting.run(program, all_cores, path)
            made[program] = compare.load(path)
        found = agreements(made, setting.reference(Path(name) / "reference.npz"))
        runs = timed(setting, given.rounds, all_cores, lambda remark: print(remark, file=sys.stderr))
        steps = setting.steps()
    rows = speeds(runs, made, all_cores)
    text = f"{given.conversations:,} conversations, {different:,} different ones of {len(given.data)} files"
    print(f"{text}; load average {load:.1f} before, {os.getloadavg()[0]:.1f} after, on {all_cores} cores.\n")
    print(speed_table(rows, all_cores), step_table(steps, rows[0]["whole_cpu_s"], rows[0]["tokens"]), sep="\n")
    print(without_start(steps, rows), agreement_table(found), sep="\n")
    for program in given.peers:
        said = next(item["run"].result for item in runs if (item["program"], item["cores"]) == (program, 1))
        print(f"{program}: {json.dumps(said['versions'])}, {json.dumps(said['configuration'])}")
    if given.json:
        kept = [{**item, "run": asdict(item["run"])} for item in runs]
        checks = {name: asdict(item) for name, item in found.items()}
        given.json.write_text(
            json.dumps({"speeds": rows, "steps": steps, "agreement": checks, "runs": kept}, indent=1)
        )
    if any(item.other_masks for item in found.values()) or found["transformers"].same_ids < given.conversations:
        sys.exit("ids or masks differ: see the table above")


if __name__ == "__main__":
    main()
