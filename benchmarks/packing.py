"""Time every packer on synthetic lengths: `python benchmarks/packing.py`. Prints a Markdown table.

Lengths are drawn, not measured: lognormal with sigma 1, clipped to 8..4096 tokens, at the sizes and mean lengths
of the paper's three sets and one larger one. CPU time of this process, best of three, rows in memory at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from packcli.packing import Rows, best_fit, concat, lower_bound, next_fit_decreasing, one_per_row

MAX_LENGTH = 4096
REPEATS = 3
# Documents, and the mean of the lognormal before clipping.
SETS = [(69_000, 900), (326_000, 450), (1_200_000, 600), (10_000_000, 330)]
PACKERS: dict[str, Callable[[NDArray[np.int64]], Rows]] = {
    "one_per_row": one_per_row,
    "concat": lambda lengths: concat(lengths, MAX_LENGTH, np.random.default_rng(1)),
    "next_fit_decreasing": lambda lengths: next_fit_decreasing(lengths, MAX_LENGTH, np.random.default_rng(1)),
    "best_fit": lambda lengths: best_fit(lengths, MAX_LENGTH, np.random.default_rng(1)),
}


def synthetic(num_documents: int, mean: int) -> NDArray[np.int64]:
    lengths = np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1, num_documents)
    return np.clip(lengths, 8, MAX_LENGTH).astype(np.int64)


def main() -> None:
    print("| documents | mean tokens | packer | CPU s | rows | above the bound | slots filled |")
    print("|---|---|---|---|---|---|---|")
    for num_documents, mean in SETS:
        lengths = synthetic(num_documents, mean)
        bound = lower_bound(lengths, MAX_LENGTH)
        for name, packer in PACKERS.items():
            cpu_s = float("inf")
            for _ in range(REPEATS):
                began = time.process_time()
                rows = packer(lengths)
                cpu_s = min(cpu_s, time.process_time() - began)
            above = f"{rows.num_rows - bound:+,} ({rows.num_rows / bound - 1:+.3%})"
            filled = lengths.sum() / (rows.num_rows * MAX_LENGTH)
            print(
                f"| {num_documents:,} | {lengths.mean():.0f} | {name} | {cpu_s:.3f} "
                f"| {rows.num_rows:,} | {above} | {filled:.2%} |"
            )


if __name__ == "__main__":
    main()
