"""Time every packer on synthetic lengths: `python benchmarks/packing.py`. Prints a Markdown table.

Lengths are drawn, not measured. `lognormal` has sigma 1 and is clipped to 8..4096 tokens; `uniform` has no
short documents to fill rows with. CPU time of this process, best of three, until the rows are in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from packcli.packing import Rows, best_fit, concat, lower_bound, next_fit_decreasing

Packer = Callable[[NDArray[np.int64], int, np.random.Generator], Rows]

REPEATS = 3
LOGNORMAL = [(69_000, 900), (326_000, 450), (1_200_000, 600), (10_000_000, 330)]  # documents, mean unclipped
UNIFORM = [(100_000, 59, 294, 512), (100_000, 300, 800, 4096)]  # documents, shortest, longest, max_length
PACKERS: list[Packer] = [concat, next_fit_decreasing, best_fit]


def lognormal(num_documents: int, mean: int) -> NDArray[np.int64]:
    lengths = np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1, num_documents)
    return np.clip(lengths, 8, 4096).astype(np.int64)


def measure(name: str, lengths: NDArray[np.int64], max_length: int, packer: Packer) -> None:
    bound = lower_bound(lengths, max_length)
    cpu_s = float("inf")
    for _ in range(REPEATS):
        began = time.process_time()
        rows = packer(lengths, max_length, np.random.default_rng(1))
        cpu_s = min(cpu_s, time.process_time() - began)
    above, filled = rows.num_rows - bound, lengths.sum() / (rows.num_rows * max_length)
    print(
        f"| {name} | {len(lengths):,} | {lengths.mean():.0f} | {max_length} | {packer.__name__} "
        f"| {cpu_s:.3f} | {rows.num_rows:,} | {above:+,} ({above / bound:+.3%}) | {filled:.3%} |"
    )


def main() -> None:
    header = "lengths", "documents", "mean", "max_length", "packer", "CPU s", "rows", "over bound", "filled"
    print("|", " | ".join(header), "|")
    print("|---" * len(header) + "|")
    for num_documents, mean in LOGNORMAL:
        for packer in PACKERS:
            measure("lognormal", lognormal(num_documents, mean), 4096, packer)
    for num_documents, low, high, max_length in UNIFORM:
        lengths = np.random.default_rng(0).integers(low, high + 1, num_documents)
        for packer in PACKERS:
            measure(f"uniform {low}..{high}", lengths, max_length, packer)


if __name__ == "__main__":
    main()
