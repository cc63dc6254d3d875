"""Time every packer on synthetic lengths, and hold its rows against lower bounds. Prints Markdown tables.

    python benchmarks/packing.py
    python benchmarks/packing.py --peer trl=TRL_VENV/bin/python --peer llamafactory=... --peer axolotl=...

The peers' environments are in `peers/*.txt`. Lengths are drawn, not measured: `lognormal` has sigma 1 and is
clipped to 8..4096 tokens; the sets of the last table have few or no short documents to fill rows with. CPU
seconds (user and system together, and user alone) go from lengths in memory to rows in memory, each time in a
process of its own; the packers take turns, and the median counts. With peers it takes half an hour;
`--documents 326000` runs one of the sets.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcli import cutting_stock, packing, patterns

Ints = NDArray[np.int64]
Drawn = Callable[[np.random.Generator, int], Ints]

HERE = Path(__file__).parent
ROUNDS = 3
LOGNORMAL = [(69_000, 900), (326_000, 450), (1_200_000, 600), (10_000_000, 330)]  # documents, mean unclipped
MAX_LENGTH = 4096
OURS = [
    "packcli:best_fit",
    "packcli:first_fit_decreasing",
    "packcli:next_fit_decreasing",
    "packcli:shuffled_first_fit",
    "packcli:concat",
    "packcli:released.first_fit_decreasing",
    "packcli:released.concat",
]
PEERS = {
    "trl": ["trl:bfd, 1,000 at a time", "trl:bfd, whole set"],
    "llamafactory": ["llamafactory:greedy_knapsack, 1,000 at a time", "llamafactory:greedy_knapsack, whole set"],
    "axolotl": ["axolotl:pack_parallel", "axolotl:allocate_sequentially"],
}
# One round above this many documents: minutes each.
SLOW_FROM = 2_000_000
# Documents above which a packer is left out: time grows with the square of the set, memory passes 20 GB, minutes.
LARGEST = {
    "llamafactory:greedy_knapsack, whole set": 400_000,
    "trl:bfd, whole set": SLOW_FROM,
    "packcli:shuffled_first_fit": SLOW_FROM,
}


def uniform(low: int, high: int) -> Drawn:
    return lambda rng, num: rng.integers(low, high + 1, num)


def normal(mean: int, deviation: int, longest: int) -> Drawn:
    return lambda rng, num: np.clip(np.rint(rng.normal(mean, deviation, num)), 1, longest).astype(np.int64)


def mixed(*lengths: int, shares: tuple[float, ...] | None = None) -> Drawn:
    return lambda rng, num: rng.choice(np.array(lengths), num, p=shares)


# name, max_length, lengths. Without a tail of short documents, packing is hard.
HARD: list[tuple[str, int, Drawn]] = [
    ("uniform 59..294", 512, uniform(59, 294)),
    ("uniform 100..250", 512, uniform(100, 250)),
    ("uniform 1..512", 512, uniform(1, 512)),
    ("uniform 129..170, above a quarter", 512, uniform(129, 170)),
    ("uniform 171..256, above a third", 512, uniform(171, 256)),
    ("uniform 171..340, above a third", 512, uniform(171, 340)),
    ("uniform 257..400, above half", 512, uniform(257, 400)),
    ("normal 180 ± 50", 512, normal(180, 50, 512)),
    ("normal 256 ± 60", 512, normal(256, 60, 512)),
    ("normal 300 ± 80", 512, normal(300, 80, 512)),
    ("normal 130 ± 25", 512, normal(130, 25, 512)),
    ("70% 200, 30% 100", 512, mixed(200, 100, shares=(0.7, 0.3))),
    ("130 or 190", 512, mixed(130, 190)),
    ("110, 160 or 230", 512, mixed(110, 160, 230)),
    ("37, 91, 143, 205 or 311", 512, mixed(37, 91, 143, 205, 311)),
    ("uniform 200..300", 4096, uniform(200, 300)),
    ("uniform 300..800", 4096, uniform(300, 800)),
    ("uniform 700..1700", 4096, uniform(700, 1700)),
    ("uniform 1000..1700", 4096, uniform(1000, 1700)),
    ("normal 1440 ± 400", 4096, normal(1440, 400, 4096)),
    ("normal 11500 ± 3200", 32768, normal(11500, 3200, 32768)),
]
HARD_DOCUMENTS = (4_000, 100_000)
# Beyond this many distinct lengths or tokens the linear programme of the exact lengths takes minutes.
LP_LENGTHS, LP_TOKENS, LP_ROUNDS = 600, 1024, 60


def lognormal(num_documents: int, mean: int) -> Ints:
    lengths = np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1, num_documents)
    return np.clip(lengths, 8, MAX_LENGTH).astype(np.int64)


def run(python: str, packer: str, file: Path) -> dict[str, Any]:
    command = [python, str(HERE / "peers" / "packers.py"), packer, str(file), str(MAX_LENGTH)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{packer}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(packers: dict[str, str], lengths: Ints) -> dict[str, list[dict[str, Any]]]:
    """Runs of each packer (-> its Python), in turns."""
    runs: dict[str, list[dict[str, Any]]] = {packer: [] for packer in packers}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "lengths.npy"
        np.save(file, lengths)
        for round_number in range(ROUNDS):
            for packer, python in packers.items():
                slow = len(lengths) >= SLOW_FROM and not packer.startswith("packcli")
                if len(lengths) <= LARGEST.get(packer, len(lengths)) and not (slow and round_number):
                    print(f"{len(lengths):,} {packer}, round {round_number + 1}", file=sys.stderr)
                    runs[packer].append(run(python, packer, file))
    return runs


def speed(pythons: dict[str, str], only_documents: int | None) -> None:
    packers = {packer: sys.executable for packer in OURS}
    packers |= {packer: python for program, python in pythons.items() for packer in PEERS[program]}
    table(
        "documents", "mean", "packer", "CPU s", "user s", "x best_fit", "rows", "over bound", "filled", "peak MiB"
    )
    versions: dict[str, str] = {}
    for num_documents, mean in LOGNORMAL:
        if only_documents not in (None, num_documents):
            continue
        lengths = lognormal(num_documents, mean)
        bound, tokens = packing.lower_bound(lengths, MAX_LENGTH), int(lengths.sum())
        runs = measure(packers, lengths)
        ours = median(run["cpu_s"] for run in runs["packcli:best_fit"])
        for packer, taken in runs.items():
            if not taken:
                continue
            cpu_s, rows = median(run["cpu_s"] for run in taken), taken[0]["rows"]
            versions[packer.split(":")[0]] = taken[0]["version"]
            # The released packers lose tokens: their rows compare to nothing. A peer's memory is its imports.
            kept = not packer.startswith("packcli:released")
            line(
                f"{num_documents:,}",
                f"{lengths.mean():.0f}",
                packer.replace(":", " "),
                f"{cpu_s:.3f}",
                f"{median(run['user_s'] for run in taken):.3f}",
                f"{cpu_s / ours:.1f}",
                f"{rows:,}",
                f"{rows / bound - 1:+.3%}" if kept else "",
                f"{tokens / (rows * MAX_LENGTH):.3%}" if kept else "",
                f"{max(run['peak_mib'] for run in taken):.0f}" if packer.startswith("packcli") else "",
            )
    print("\nVersions:", ", ".join(f"{name} {number}" for name, number in versions.items()))


def hard_sets() -> None:
    """Rows of each way to fill them, against the larger of two lower bounds."""
    columns = "best-fit decreasing", "subset-sum fill", "linear programme", "best_fit", "over bound", "CPU s"
    table("lengths", "max_length", "documents", "Martello-Toth", "LP", *columns)
    packing.best_fit(uniform(100, 250)(np.random.default_rng(0), 5000), 512, np.random.default_rng(0))  # imports
    for name, max_length, draw in HARD:
        for num_documents in HARD_DOCUMENTS:
            lengths = draw(np.random.default_rng(0), num_documents).astype(np.int64)
            counts = np.bincount(lengths, minlength=max_length + 1)
            bounds = [packing.lower_bound(lengths, max_length)]
            if max_length <= LP_TOKENS or np.count_nonzero(counts) <= LP_LENGTHS:
                bounds.append(math.ceil(cutting_stock.relax(counts, max_length, LP_ROUNDS).bound - 1e-6))
            fills = (patterns.best_fit_decreasing, patterns.subset_sum_fill, cutting_stock.fill)
            began = time.process_time()
            rows = packing.best_fit(lengths, max_length, np.random.default_rng(1)).num_rows
            cpu_s = time.process_time() - began
            line(
                name,
                max_length,
                f"{num_documents:,}",
                f"{bounds[0]:,}",
                f"{bounds[1]:,}" if len(bounds) > 1 else "",
                *(f"{fill(counts, max_length).num_rows / max(bounds) - 1:+.2%}" for fill in fills),
                f"{rows:,}",
                f"{rows / max(bounds) - 1:+.3%}",
                f"{cpu_s:.2f}",
            )


def table(*header: str) -> None:
    print()
    line(*header)
    line(*("---" for _ in header))


def line(*cells: object) -> None:
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer",
        "--peer-python",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"of {', '.join(PEERS)}",
    )
    sizes = [num for num, _ in LOGNORMAL]
    parser.add_argument("--documents", type=int, choices=sizes, help="only the lognormal set of this size")
    parser.add_argument("--only", choices=("speed", "bounds"), help="one of the two tables")
    given = parser.parse_args()
    if given.only != "bounds":
        speed(dict(peer.split("=", 1) for peer in given.peer), given.documents)
    if given.only != "speed":
        hard_sets()


if __name__ == "__main__":
    main()
