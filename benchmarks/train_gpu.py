"""Training on one Hopper-class GPU, in one go of under nine minutes: right, how fast, and how far from its limits.

    python benchmarks/train_gpu.py [--wheels DIR] [--out DIR] [--budget-s 520]

Needs torch >= 2.11, transformers 5, triton, and no package index. What else is missing is installed from DIR into
a temporary folder (docs/benchmarks.md has the `pip download` line); without TRL's wheels TRL is left out.

In order of importance, each part in a process of its own, within what is left of the time: every attention backend
on real document lengths (isolation, error rule, time) and the roofline; an 8B-shaped model under `best_fit`,
`padding`, `random` and `padding_free`, with what `head: liger` and `deterministic: true` cost; TRL on it; a
1B-shaped model under every arm; TRL on it; without compilation; after the start-up probe.

DIR/results.json holds all that is done, after every result; DIR/report.md the tables. Random weights, random
tokens: nothing here says what a model learns.

`--device cpu --shape tiny` runs every part on a CPU within a minute: a check of this script, no result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
WORKERS = HERE / "gpu"
Record = dict[str, Any]

REPORT_S = 8
"""Left at the end for the tables."""
PRECIOUS_S = 12
"""Under this much time a part is not begun: it would not get past its imports."""


@dataclass(frozen=True, slots=True)
class Part:
    """A worker and how to call it, best way first: the next is tried when one runs out of memory or fails.

    `cap_s`: how long it may take, so that what comes after has its turn.
    """

    name: str
    script: str
    ways: list[Record]
    cap_s: float


@dataclass(slots=True)
class Session:
    """Everything found so far; on disk after each record."""

    out: Path
    ends: float
    device: str
    results: Record
    scratch: Path
    path: list[str]
    samples: list[tuple[float, float, float]] = field(default_factory=list)

    def save(self) -> None:
        self.results["took_s"] = time.time() - self.results["began"]
        unfinished = self.out / ".results.json"
        unfinished.write_text(json.dumps(self.results, indent=1))
        unfinished.replace(self.out / "results.json")

    def add(self, record: Record) -> None:
        if "from" in record:
            record["card"] = self.card(record["from"], record["to"])
        self.results["records"].append(record)
        self.save()
        what = record.get("failed") or record.get("skipped") or record.get("refused") or "done"
        name = " ".join(str(record.get(key, "")) for key in ("shape", "backend", "name", "arm"))
        print(f"{time.time() - self.results['began']:5.0f} s  {record['kind']} {name}: {what}", file=sys.stderr)

    def card(self, began: float, ended: float) -> str:
        """Median clock and power while a run was timed."""
        own = [sample for sample in self.samples if began <= sample[0] <= ended]
        return f"{median(s[1] for s in own):.0f}, {median(s[2] for s in own):.0f}" if own else "-"

    def run(self, part: Part) -> None:
        for number, way in enumerate(part.ways):
            way = self.undone(way)
            left = self.ends - time.time()
            if left < PRECIOUS_S:
                self.results["attempts"].append(f"{part.name}: not begun, {max(0.0, left):.0f} s were left")
                return self.save()
            outcome = self.attempt(part, way, time.time() + min(part.cap_s, left))
            if outcome is None:
                return None
            self.results["attempts"].append(f"{part.name}, way {number + 1} of {len(part.ways)}: {outcome}")
            self.save()
            if outcome.startswith("stopped"):
                return None
        return None

    def undone(self, way: Record) -> Record:
        """Without the runs that an earlier way finished before it failed."""
        if "runs" not in way:
            return way
        done = {(each.get("shape"), each.get("name")) for each in self.results["records"]}
        return {**way, "runs": [run for run in way["runs"] if (way["shape"], run["name"]) not in done]}

    def attempt(self, part: Part, way: Record, deadline: float) -> str | None:
        """Run a worker to its end; None, or what went wrong."""
        setting = self.scratch / "setting.json"
        # A worker begins nothing after `deadline`; here it is only stopped if it hangs.
        setting.write_text(json.dumps({**way, "device": self.device, "deadline": deadline - 5}))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(self.path),
            "HF_HUB_OFFLINE": "1",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        log = self.out / f"{part.name.replace(' ', '_')}.log"
        with log.open("a") as errors:
            process = subprocess.Popen(
                [sys.executable, str(WORKERS / part.script), str(setting)],
                stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip
            stop = threading.Timer(max(1.0, min(deadline + 20, self.ends) - time.time()), process.kill)
            stop.start()
            assert process.stdout is not None
            for line in process.stdout:
                with contextlib.suppress(json.JSONDecodeError):  # libraries print, too
                    found = json.loads(line)
                    if isinstance(found, dict) and "kind" in found:
                        self.add(found)
            code = process.wait()
            stop.cancel()
        if code == 0:
            return None
        last = (log.read_text().strip().splitlines() or ["no message"])[-1][:300]
        return "stopped: out of time" if code == -9 and time.time() >= min(deadline + 19, self.ends) - 1 else last


# What is run ---------------------------------------------------------------------------------------------


def parts(found: Record, given: argparse.Namespace, scratch: Path) -> tuple[list[Part], dict[str, str]]:
    """All parts, and how many layers of each shape fit on this card, in words."""
    from documents import fitting, settings, shape

    tiny = given.shape == "tiny"
    capacity = found.get("memory_bytes", 1 << 40)
    shapes = {name: fitting(shape(name, tiny=tiny), capacity) for name in ("8B", "1B")}
    layers = {name: each.counted.layers for name, each in shapes.items()}
    ways = {name: settings(each, capacity, compiled=not tiny) for name, each in shapes.items()}
    documents = 512 if tiny else 16_384
    common = {"tiny": tiny, "documents": documents}

    def steps(name: str, runs: list[Record], ways: list[Record]) -> list[Record]:
        return [{**common, "shape": name, "layers": layers[name], "train": train, "runs": runs} for train in ways]

    def trl(name: str) -> list[Record]:
        own = {**common, "shape": name, "layers": layers[name], "scratch": str(scratch), "warmup": 2}
        own["steps"] = 2 if tiny else 6
        return [{**own, "gradient_checkpointing": on} for on in (False, True)]

    plain = [_run("best_fit, not compiled", "best_fit", tiny, 6, against="best_fit")]
    probed = [_run("best_fit, after the start-up probe", "best_fit", tiny, 10, 2, probe=True, against="best_fit")]
    eager = [{**way, "compile": False} for way in ways["1B"][:1]]
    states = {name: each[0]["optimizer_state"] for name, each in ways.items()}
    kernels = {**common, "shapes": list(shapes), "layers": layers, "states": states}
    kernels["wheels"] = str(given.wheels) if given.wheels else None
    found_parts = [
        Part("kernels", "parity.py", [kernels], 85),
        Part("8B steps", "steps.py", steps("8B", _large(tiny), _ladder(ways["8B"])), 215),
        Part("8B TRL", "trl_steps.py", trl("8B"), 85),
        Part("1B steps", "steps.py", steps("1B", _small(tiny, states["1B"]), _ladder(ways["1B"])), 120),
        Part("1B TRL", "trl_steps.py", trl("1B"), 45),
        Part("1B not compiled", "steps.py", steps("1B", plain, eager), 45),
        Part("1B probed", "steps.py", steps("1B", probed, ways["1B"][:1]), 90),
    ]
    if tiny:  # nothing is compiled there
        found_parts = [part for part in found_parts if part.name != "1B not compiled"]
    if find_spec("trl") is None or find_spec("datasets") is None:
        found_parts = [part for part in found_parts if "TRL" not in part.name]
    whole = {name: shape(name, tiny=tiny).counted.layers for name in shapes}
    return found_parts, {name: f"{layers[name]} of {whole[name]}" for name in shapes}


def _ladder(ways: list[Record]) -> list[Record]:
    """Compiled from light to heavy on compute, then the last way without compilation."""
    return [*ways, {**ways[-1], "compile": False}]


def _run(name: str, arm: str, tiny: bool, steps: int, warmup: int = 1, **switches: Any) -> Record:
    warmup, steps = (1, 2) if tiny else (warmup, steps)
    return {"name": name, "arm": arm, "warmup": warmup, "steps": steps, "least": 2, **switches}


def _large(tiny: bool) -> list[Record]:
    return [
        _run("best_fit", "best_fit", tiny, 10, warmup=2),
        _run("padding", "padding", tiny, 3),
        _run("random", "random", tiny, 3),
        _run("best_fit, head: liger", "best_fit", tiny, 4, head="liger", against="best_fit"),
        _run("best_fit, longer documents", "best_fit", tiny, 3, lengths="wildchat"),
        _run("best_fit, deterministic", "best_fit", tiny, 4, deterministic=True, against="best_fit"),
        # Last: once lengths have changed, all that is compiled afterwards is compiled for any length.
        _run("padding_free", "padding_free", tiny, 3, warmup=2),
    ]


def _small(tiny: bool, state: str) -> list[Record]:
    from packcli.config import ARMS, LENGTHS_ALONE

    other = "bfloat16" if state == "float32" else "float32"
    fixed = [name for name in LENGTHS_ALONE if ARMS[name]["pad_to"] == "max_length" and name != "best_fit"]
    changing = [name for name in LENGTHS_ALONE if ARMS[name]["pad_to"] != "max_length"]
    return [
        _run("best_fit", "best_fit", tiny, 10, warmup=2),
        *(_run(name, name, tiny, 4) for name in fixed),
        _run("best_fit, head: liger", "best_fit", tiny, 10, head="liger", against="best_fit"),
        _run(f"best_fit, moments {other}", "best_fit", tiny, 10, optimizer_state=other, against="best_fit"),
        _run("best_fit, longer documents", "best_fit", tiny, 4, lengths="wildchat"),
        _run("best_fit, deterministic", "best_fit", tiny, 10, deterministic=True, against="best_fit"),
        *(_run(name, name, tiny, 4, warmup=2) for name in changing),
    ]  # fmt: skip


# The machine ---------------------------------------------------------------------------------------------


def install(wheels: Path | None, target: Path) -> None:
    """Put the wheels brought along where workers find them, if anything is missing here."""
    missing = [
        name for name in ("pydantic", "orjson", "trl", "datasets", "liger_kernel") if find_spec(name) is None
    ]
    if missing and wheels is not None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        files = sorted(map(str, wheels.glob("*.whl")))
        subprocess.run([*pip, "--target", str(target), *files], check=True)
        sys.path.insert(0, str(target))
    if needed := [name for name in ("pydantic", "orjson") if find_spec(name) is None]:
        sys.exit(f"error: no package {', '.join(needed)}\n\nhint: bring wheels with --wheels (docs/benchmarks.md)")


@contextlib.contextmanager
def watched(samples: list[tuple[float, float, float]], gpu: bool) -> Iterator[None]:
    """Clock and power as nvidia-smi reads them, twice a second; nothing is set."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "500"]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True) if gpu else None
    except OSError:
        process = None

    def read() -> None:
        assert process is not None
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                clock, power = map(float, line.split(","))
                samples.append((time.time(), clock, power))

    if process is not None:
        threading.Thread(target=read, daemon=True).start()
    try:
        yield
    finally:
        if process is not None:
            process.terminate()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install what is missing from")
    parser.add_argument("--out", type=Path, default=Path("train_gpu"), help="results.json, report.md, logs")
    parser.add_argument("--budget-s", type=float, default=520.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=("full", "tiny"), default="full")
    parser.add_argument("--only", help="parts whose name holds this word, such as `kernels`, `8B` or `TRL`")
    return parser.parse_args()


def main() -> None:
    given, began = arguments(), time.time()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        install(given.wheels, scratch / "packages")
        path = [str(HERE.parent), *([str(scratch / "packages")] if (scratch / "packages").exists() else [])]
        sys.path[:0] = [str(WORKERS), *path]
        from documents import LABEL, TABLE

        measured = json.loads(TABLE.read_text())["provenance"]
        lengths = (
            f"lengths of {measured['documents']:,} real conversations ({', '.join(measured['sources'])}; mean "
            f"{measured['mean']}, longest {measured['longest']} tokens, {measured['supervised_share']:.0%} "
            "supervised); `longer documents`: lognormal, mean 1,518 before clipping, a model and no measurement."
        )
        check = given.device == "cpu" or given.shape == "tiny"
        label = "CPU, tiny shape: a check of the script, no result" if check else LABEL
        results = {
            "label": label, "began": began, "budget_s": given.budget_s, "lengths": lengths,
            "shapes": ["8B", "1B"], "records": [], "attempts": [],
        }  # fmt: skip
        session = Session(
            given.out, began + given.budget_s - REPORT_S, given.device, results, scratch, path
        )  # fmt: skip
        with watched(session.samples, given.device == "cuda"):
            session.run(Part("environment", "environment.py", [{}], 60))
            environment = next((r for r in results["records"] if r["kind"] == "environment"), None)
            if environment is None:
                sys.exit(f"error: no environment to measure in; see {given.out}\n\nhint: without a GPU, "
                         "`--device cpu --shape tiny` checks the script")  # fmt: skip
            todo, results["layers"] = parts(environment, given, scratch)
            for part in todo:
                if given.only is None or given.only in part.name:
                    session.run(part)
        session.save()
    from tables import report

    text = report(results)
    (given.out / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
