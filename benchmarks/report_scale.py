"""How long `packcli report` takes on a run directory of ten thousand finished cells, and how much memory.

The directory is **synthetic**: a real plan, and for each of its stages a manifest with made-up numbers, as long as
a real one; nothing was trained or scored. Prints, for each format, what a fresh process took.

    python benchmarks/report_scale.py --cells 10000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import orjson

from packcli import stages, sweepfile
from packcli.files import sha256_file
from packcli.plan import Cell, Kind, Plan
from packcli.store import FileRecord, Manifest, Store

ARMS = ("padding", "padding_free", "random", "greedy", "best_fit")
SEEDS = 5
TASKS = ("tiny_copy", "tiny_reverse")
ITEMS = 100
SWEEP = """\
name: scale
model: {{config: {{model_type: llama}}, tokenizer: train, vocab_size: 300}}
data: {{source: tiny, max_length: 192, validation: 0.05}}
train: {{epochs: 3, lr: 1e-3, global_batch: 32}}
eval: {{tasks: [{tasks}]}}
matrix:
  train.weight_decay: [{decays}]
  arm: [{arms}]
  seed: [{seeds}]
"""


def sweep_text(cells: int) -> str:
    settings = max(cells // (len(ARMS) * SEEDS), 1)
    return SWEEP.format(
        tasks=", ".join(TASKS),
        decays=", ".join(f"{number / 1e5:.5f}" for number in range(settings)),
        arms=", ".join(ARMS),
        seeds=", ".join(map(str, range(SEEDS))),
    )


def write(path: Path, value: object) -> None:
    """As packcli writes it, but for the wait until it lies on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))


def manifest(store: Store, kind: Kind, id_: str, results: dict[str, object], files: dict[str, object]) -> None:
    directory = store.directory(kind, id_)
    for name, value in files.items():
        write(directory / name, value)
    # What it names beyond these is not there: a report reads no weights.
    names = ["final/config.json", "final/model.safetensors", "final/tokenizer.json"] if kind == "train" else []
    outputs = {name: FileRecord(sha256="0" * 64, bytes=1) for name in names}
    outputs |= {name: record(directory / name) for name in files}
    packages = dict.fromkeys(("packcli", "torch", "transformers", "tokenizers", "numpy", "pyarrow"), "0.0.0")
    provenance = {"finished_at": "", "host": "synthetic", "cpu_count": 1, "python": "3.11", "packages": packages}
    made = Manifest(
        stage=kind, id=id_, version=1, spec={}, inputs={}, outputs=outputs, results=results, provenance=provenance
    )
    write(store.manifest_file(kind, id_), made.model_dump())


def record(path: Path) -> FileRecord:
    return FileRecord(sha256=sha256_file(path), bytes=path.stat().st_size)


def fill(made: Plan, store: Store) -> None:
    done = set[str]()
    for cell in made.cells:
        for kind, id_ in (("index", cell.index), ("train", cell.train)):
            if id_ not in done:
                manifest(store, kind, id_, index(cell) if kind == "index" else trained(cell), {})  # type: ignore[arg-type]
                done.add(id_)
        for task, id_ in cell.evals.items():
            score(store, id_, task, cell)


def index(cell: Cell) -> dict[str, object]:
    padded = cell.labels["arm"] == "padding"
    slots = 192 * 3000 if padded else 120_000
    ledger = {
        "conversations_in": 3200, "conversations_rejected": 0, "documents": 3200, "documents_validation": 127,
        "documents_dropped": 0, "documents_kept": 3073, "documents_cut": 0, "tokens_in": 125_000,
        "tokens_validation": 4_930, "tokens_truncated": 70, "tokens_dropped": 0, "tokens_kept": 120_000,
        "tokens_padding": slots - 120_000, "tokens_boundary": 0, "slots": slots, "tokens_supervised": 40_000,
        "rows": slots // 192, "rows_lower_bound": 625, "efficiency": 120_000 / slots,
    }  # fmt: skip
    return {"ledger": ledger}


def trained(cell: Cell) -> dict[str, object]:
    wall = 20.0 * random.Random(cell.train).uniform(0.9, 1.1)
    slots = 3 * int(index(cell)["ledger"]["slots"])  # type: ignore[index]
    return {
        "steps": 289, "wall_s": wall, "cpu_s": wall, "useful_tokens_per_s": 360_000 / wall,
        "padded_tokens_per_s": slots / wall, "mfu": None, "final_loss": 1.0, "validation_loss": 1.1,
        "tokens": 360_000, "slots": slots, "supervised": 120_000, "random_weights": True, "device": "cpu",
        "processes": 1, "threads": 1,
    }  # fmt: skip


def score(store: Store, id_: str, task: str, cell: Cell) -> None:
    draw = random.Random(id_)
    items = [float(draw.random() < 0.5) for _ in range(ITEMS)]
    mean = sum(items) / ITEMS
    results = {
        "task": task, "metric": "acc", "score": mean, "stderr": 0.05, "n": ITEMS, "n_total": ITEMS, "version": 1,
        "health": {"truncated": 0.0}, "left_out": None, "parts": {},
    }  # fmt: skip
    manifest(store, "eval", id_, results, {"results.json": {"results": {task: results}}, "items.json": items})


def measure(sweep: Path, runs: Path, format_: str) -> dict[str, object]:
    """Wall and CPU seconds, peak memory, and bytes of output of `packcli report` in a fresh process."""
    command = [sys.executable, "-m", "packcli", "report", str(sweep), "--runs", str(runs), "--format", format_]
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, stdout=output)
        start = os.times().elapsed
        _, status, usage = os.wait4(child.pid, 0)
        seconds = os.times().elapsed - start
        if status:
            raise SystemExit(f"{' '.join(command)}: exit status {status}")
        return {
            "format": format_,
            "wall_s": round(seconds, 2),
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
            "peak_mib": round(usage.ru_maxrss / 1024),
            "output_bytes": os.fstat(output.fileno()).st_size,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--at", type=Path, help="Make the run directory here and keep it; use it if it is there.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = arguments.at or Path(temporary)
        sweep, runs = home / "scale.yaml", home / "runs"
        if not sweep.exists():
            home.mkdir(parents=True, exist_ok=True)
            sweep.write_text(sweep_text(arguments.cells))
            store = Store(runs)
            fill(stages.make_plan(sweepfile.load(sweep), store), store)
        for format_ in ("json", "csv", "md", "table"):
            print(json.dumps(measure(sweep, runs, format_)), flush=True)


if __name__ == "__main__":
    main()
