"""How often a report is right about made-up sweeps whose true differences are known. Prints Markdown tables.

    python benchmarks/interval_coverage.py [--sweeps 5000]

Nothing is trained: scores are drawn. An arm's average score with a seed is 0.5, plus the arm's true effect, plus
what the seed does to all arms alike (standard deviation 2 points), plus what it does to this arm (1 point; normal
for the baseline, for the others drawn from the named distribution). `items`: the score is then that of so many
test items, each right or wrong, so it has steps and errors of its own. Every sweep goes through `groups.pool`, the
code of a report. A baseline and `--arms` others. Fixed random numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from packcli.report import groups
from packcli.report.records import Group, Row

Floats = NDArray[np.float64]
Noise = Callable[[np.random.Generator, tuple[int, ...]], Floats]

OF_SEEDS, OF_ARM = 0.02, 0.01
SIGNIFICANT = 0.05
NOISES: dict[str, Noise] = {  # each of mean 0 and standard deviation 1
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy tails (t, 5)": lambda rng, shape: rng.standard_t(5, shape) / (5 / 3) ** 0.5,
    "skewed (exponential)": lambda rng, shape: 1 - rng.exponential(size=shape),
    "a seed in ten fails": lambda rng, shape: (0.1 - (rng.random(shape) < 0.1)) / 0.3,
}


@dataclass(frozen=True, slots=True)
class Found:
    """Shares. `coverage`: of all intervals over seeds, those that hold the true difference. `single`, `family`: of
    all sweeps, those where a difference that is none is called shown, by p-values alone or after Holm's
    correction. `power`: of the true differences, those called shown after it."""

    coverage: float
    single: float
    family: float
    power: float


def simulate(
    seeds: int, effects: tuple[float, ...], *, sweeps: int, items: int | None = None, noise: str = "normal"
) -> Found:
    """`effects`: of each arm beside the baseline, as fractions of 1."""
    covered, alone, corrected, powers = [], [], [], []
    for pooled in _sweeps(seeds, effects, sweeps, items, NOISES[noise]):
        tested = [(group, effect) for group, effect in zip(pooled[1:], effects, strict=True) if group.interval]
        covered += [group.interval[0] <= effect <= group.interval[1] for group, effect in tested if group.interval]
        none = [(group.p or 0.0, group.p_holm or 0.0) for group, effect in tested if effect == 0]
        alone.append(any(p < SIGNIFICANT for p, _ in none))
        corrected.append(any(p_holm < SIGNIFICANT for _, p_holm in none))
        powers += [(group.p_holm or 0.0) < SIGNIFICANT for group, effect in tested if effect != 0]
    power = float(np.mean(powers)) if powers else float("nan")
    return Found(float(np.mean(covered)), float(np.mean(alone)), float(np.mean(corrected)), power)


def _sweeps(
    seeds: int, effects: tuple[float, ...], sweeps: int, items: int | None, noise: Noise
) -> Iterator[tuple[Group, ...]]:
    arms = ["padding", *(f"arm {number}" for number in range(len(effects)))]
    rng = np.random.default_rng(0)
    scores = 0.5 + np.array([0.0, *effects])[:, None] + OF_SEEDS * rng.normal(size=(sweeps, 1, seeds))
    scores[:, :1] += OF_ARM * rng.normal(size=(sweeps, 1, seeds))
    scores[:, 1:] += OF_ARM * noise(rng, (sweeps, len(effects), seeds))
    if items is not None:
        scores = rng.binomial(items, np.clip(scores, 0, 1)) / items
    for drawn in scores:
        rows = [_row(arm, seed, drawn[n, seed]) for n, arm in enumerate(arms) for seed in range(seeds)]
        yield groups.pool(rows, "padding", lambda row, task: None)


def _row(arm: str, seed: int, average: float) -> Row:
    """A finished cell of which only the average is known."""
    known = {"labels": {"arm": arm, "seed": str(seed)}, "average": float(average), "state": "done"}
    absent = {"train": None, "ledger": None, "probes": None, "eval": {}, "tasks": {}, "train_state": "done"}
    return Row.model_construct(**known, **absent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=5_000)
    parser.add_argument("--arms", type=int, default=4)
    options = parser.parse_args()
    started = time.perf_counter()
    nothing = (0.0,) * options.arms
    print("| scores | seeds | coverage | a false claim, one p-value an arm | the same, after Holm |")
    print("|---|---|---|---|---|")
    settings = [
        ("normal", None),
        ("normal", 1000),
        ("normal", 100),
        *((noise, None) for noise in list(NOISES)[1:]),
    ]
    for noise, items in settings:
        for seeds in (2, 3, 5, 10):
            found = simulate(seeds, nothing, sweeps=options.sweeps, items=items, noise=noise)
            name = noise + (f", {items:,} items" if items else "")
            print(
                f"| {name} | {seeds} | {found.coverage:.1%} | {found.single:.1%} | {found.family:.1%} |",
                flush=True,
            )
    print("\n| true differences, points | seeds | coverage | found | a false claim, after Holm |")
    print("|---|---|---|---|---|")
    for points in (1, 2, 4):
        effects = (points / 100, -points / 100, *nothing[2:])
        for seeds in (3, 5, 10):
            found = simulate(seeds, effects, sweeps=options.sweeps)
            row = f"{found.coverage:.1%} | {found.power:.1%} | {found.family:.1%}"
            print(f"| +{points}, -{points}, {', '.join('0' * (options.arms - 2))} | {seeds} | {row} |", flush=True)
    print(f"\n{options.sweeps:,} sweeps a line, {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
