"""Train the same model on the same documents with packcli and with TRL's SFTTrainer, on a CPU, side by side.

    python -m venv TRL && TRL/bin/pip install -r benchmarks/peers/trl.txt
    python benchmarks/train_cpu.py --peer-python TRL/bin/python

Synthetic documents: lengths lognormal, a mean of about 206 tokens, the second half of each supervised, token ids
random by a power law. Random weights: Llama, hidden size 256, 4 layers, 8 heads, 4 of them for keys and values,
32,000 tokens, fp32. Rows of at most 1,024 tokens, 4 rows a step.

Two questions. *The same objective?* Both get packcli's rows in packcli's order and the same initial weights,
AdamW, schedule and clipping; the losses of 50 steps must agree to 1e-3, or the exit code is 1. *How fast?* Each
program packs (or not) and orders by itself, as its users have it; programs take turns within a round; a step is
the time from the end of one to the end of the next. Where the difference comes from is measured by switching TRL's
ways one by one (peers/trl_train.py). CPU seconds, of all threads, stand beside the clock: they vary less when
others use the machine. Prints Markdown; `--json FILE` keeps every run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from prepare import table

HERE = Path(__file__).parent
VOCABULARY, MAX_LENGTH, BATCH, DOCUMENTS = 32_000, 1024, 4, 3_000
LR, WARMUP, SKIPPED = 1e-3, 0.1, 2
"""`SKIPPED`: steps at the start that are not timed."""
TOLERANCE = 1e-3
MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
}
Run = dict[str, Any]
# what is trained: arm of packcli | packing and switches of TRL
OURS = {"packcli, packing (best_fit)": "best_fit", "packcli, no packing (padding_free)": "padding_free"}
TRL: dict[str, tuple[bool, tuple[str, ...]]] = {
    "TRL, packing (bfd)": (True, ()),
    "TRL, packing, no dense mask": (True, ("documents",)),
    "TRL, packing, head at labels only": (True, ("labels",)),
    "TRL, packing, both": (True, ("documents", "labels")),
    "TRL, no packing": (False, ()),
    "TRL, no packing, head at labels only": (False, ("labels",)),
    "TRL, no packing, no padding and head at labels only": (False, ("documents", "labels")),
}


def write_documents(path: Path) -> float:
    """Synthetic documents as JSONL; their mean length, cut to a row."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.0, 0.85, DOCUMENTS), 16, 4 * MAX_LENGTH).astype(int)
    with path.open("w") as file:
        for length in lengths.tolist():
            ids = (1 + generator.zipf(1.3, 4 * length) % (VOCABULARY - 1))[:length].tolist()
            labels = [-100] * (length // 2) + ids[length // 2 :]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    return float(np.minimum(lengths, MAX_LENGTH).mean())


def write_tokenizer(path: Path) -> None:
    """A tokenizer of the right size: the documents are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<|endoftext|>": 0, **{f"t{number}": number for number in range(1, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(path)


class Bench:
    """Runs programs, each in a process of its own."""

    def __init__(self, scratch: Path, python: str, threads: int) -> None:
        self.scratch, self.python, self.threads, self.count = scratch, python, threads, 0
        self.mean_length = write_documents(scratch / "documents.jsonl")
        write_tokenizer(scratch / "tokenizer")

    def ours(self, arm: str, steps: int, mode: str = "run") -> tuple[Run, Path]:
        place = self._place()
        sweep = {
            "name": "train_cpu",
            "model": {"config": MODEL, "tokenizer": str(self.scratch / "tokenizer")},
            "data": {
                "source": str(self.scratch / "documents.jsonl"),
                "max_length": MAX_LENGTH,
                "template": "plain",
                "processes": 1,
            },
            "train": {
                "steps": steps,
                "lr": LR,
                "schedule": "linear",
                "warmup_ratio": WARMUP,
                "global_batch": BATCH,
                "micro_batch": BATCH,
                "threads": self.threads,
                "save_every": None,
            },
            "matrix": {"arm": [arm], "seed": [0]},
        }
        (place / "sweep.yaml").write_text(json.dumps(sweep))  # JSON is YAML
        script = str(HERE / "peers" / "packcli_train.py")
        return self._run([sys.executable, script, mode, str(place / "sweep.yaml"), str(place)]), place

    def trl(self, packing: bool, steps: int, switched: tuple[str, ...] = (), **given: Any) -> Run:
        place = self._place()
        setting = {
            "data": str(self.scratch / "documents.jsonl"),
            "tokenizer": str(self.scratch / "tokenizer"),
            "scratch": str(place),
            "steps": steps,
            "threads": self.threads,
            "batch": BATCH,
            "max_length": MAX_LENGTH,
            "lr": LR,
            "warmup_steps": int(np.ceil(WARMUP * steps)),
            "packing": packing,
            "switched": switched,
            **given,
        }
        (place / "setting.json").write_text(json.dumps(setting))
        return self._run([self.python, str(HERE / "peers" / "trl_train.py"), str(place / "setting.json")])

    def _place(self) -> Path:
        self.count += 1
        place = self.scratch / str(self.count)
        place.mkdir()
        return place

    def _run(self, command: list[str]) -> Run:
        print(" ".join(command[1:]), file=sys.stderr)
        # As many threads from the start, so that no pool of another size is made before it is set.
        quiet = {
            "HF_HOME": str(self.scratch / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(self.threads),
        }
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **quiet})
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nexited {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        run: Run = json.loads(done.stdout.splitlines()[-1])
        return run


def curves(bench: Bench, steps: int) -> dict[str, tuple[Run, Run]]:
    """Both trainers on the same rows in the same order from the same weights: (ours, TRL's) for each layout."""
    found = {}
    for arm, packing in (("best_fit", True), ("padding_free", False)):
        order, place = bench.ours(arm, steps, "prepare")
        ours, _ = bench.ours(arm, steps)
        same = {"prepared": str(place / "rows"), "model": str(place / "model"), "rows": order["rows"]}
        found[arm] = ours, bench.trl(packing, steps, **same)
    return found


def speeds(bench: Bench, rounds: int, steps: int, switches: bool) -> dict[str, list[Run]]:
    """Every program's runs; without `switches` only what users have."""
    _, place = bench.ours("best_fit", steps, "prepare")
    runs: dict[str, list[Run]] = {}
    for number in range(rounds):
        for name in (*OURS, *(name for name, (_, switched) in TRL.items() if switches or not switched)):
            if name in OURS:
                run, _ = bench.ours(OURS[name], steps)
            else:
                packing, switched = TRL[name]
                run = bench.trl(packing, steps, switched, model=str(place / "model"))
            runs.setdefault(name, []).append(run)
            print(f"round {number + 1}, {name}: {rate(run):,.0f} useful tokens/s", file=sys.stderr)
    return runs


def rate(run: Run, clock: int = 0) -> float:
    """Useful tokens a second from the end of the last step that is not timed; `clock` 1: a CPU second."""
    return float(sum(run["tokens"][SKIPPED:]) / (run["ends"][-1][clock] - run["ends"][SKIPPED - 1][clock]))


def speed_table(runs: dict[str, list[Run]]) -> str:
    header = [
        "program",
        "useful tokens/s",
        "all rounds",
        "ours (packing) is",
        "per CPU second",
        "ours is",
        "s/step",
    ]
    header += ["useful tokens a step", "filled", "rows in all"]
    rates = {name: [median(rate(run, clock) for run in each) for clock in (0, 1)] for name, each in runs.items()}
    ours, *_ = rates.values()
    lines = []
    for name, each in runs.items():
        took = median(median(np.diff(run["ends"], axis=0)[SKIPPED - 1 :, 0]) for run in each)
        tokens, slots = (sum(sum(run[key][SKIPPED:]) for run in each) for key in ("tokens", "slots"))
        times = [
            "-" if name in OURS else f"**{own / other:.1f}x**"
            for own, other in zip(ours, rates[name], strict=True)
        ]
        steps = sum(len(run["ends"]) - SKIPPED for run in each)
        lines.append(
            [
                name,
                f"{rates[name][0]:,.0f}",
                ", ".join(f"{rate(run):,.0f}" for run in each),
                times[0],
                f"{rates[name][1]:,.0f}",
                times[1],
                f"{took:.2f}",
                f"{tokens / steps:,.0f}",
                f"{tokens / slots:.1%}",
                f"{each[0]['rows_in_all']:,}",
            ]
        )
    return table(header, lines)


def curve_table(found: dict[str, tuple[Run, Run]]) -> tuple[str, bool]:
    header = ["rows of", "steps", "first loss, ours", "TRL's", "last loss, ours", "TRL's", "largest difference"]
    lines, agree = [], True
    for arm, (ours, theirs) in found.items():
        one, other = np.array(ours["losses"]), np.array(theirs["losses"])
        if ours["tokens"] != theirs["tokens"]:
            sys.exit(f"{arm}: the steps do not hold the same tokens")
        difference = float(np.abs(one - other).max())
        agree &= difference <= TOLERANCE
        ends = [f"{losses[at]:.6f}" for at in (0, -1) for losses in (one, other)]
        lines.append([f"`{arm}`", str(len(one)), *ends, f"{difference:.1e}"])
    return table(header, lines), agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="python of the environment that has TRL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=18, help=f"of each timed run; the first {SKIPPED} are left out"
    )
    parser.add_argument("--curve-steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--no-switches", action="store_true", help="leave out the runs that say where it comes from"
    )
    parser.add_argument("--json", type=Path, help="write every run to this file")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), given.peer_python, given.threads)
        found = curves(bench, given.curve_steps)
        curve, agree = curve_table(found)
        print(curve, flush=True)
        runs = speeds(bench, given.rounds, given.steps, not given.no_switches)
    print(speed_table(runs))
    print(f"{DOCUMENTS:,} documents, mean {bench.mean_length:.0f} tokens; {given.threads} threads")
    print(f"{os.cpu_count()} cores, load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    for name in ("packcli, packing (best_fit)", "TRL, no packing"):
        print(f"{name}: {json.dumps(runs[name][0]['versions'])}")
    if given.json:
        given.json.write_text(json.dumps({"curves": found, "speeds": runs}))
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
