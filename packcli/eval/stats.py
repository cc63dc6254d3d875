"""Means, standard errors and paired differences. Pure functions on floats; knows nothing of tasks or runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
POWER = 0.80


@dataclass(frozen=True, slots=True)
class Difference:
    """`b - a` over `n` pairs, in the unit of the values.

    `low` and `high` bound the mean difference with 95% confidence (Student's t, n - 1 degrees of freedom); `p`
    is the two-sided p-value of the same test, `stderr` the standard error under both.
    `detectable` is the smallest true difference that a design with this many pairs and this much scatter
    finds significant (two-sided, 5%) in 80% of repetitions: an effect below it could not have been seen.
    All five are None for fewer than two pairs, where the scatter between pairs is unknown; `p` also without
    any scatter and any difference.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    detectable: float | None
    p: float | None
    stderr: float | None


def mean_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, s / sqrt(n) with n - 1 in s; the error is None for a single value.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("the mean of no values is not defined")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """How far `b` lies above `a`, pair by pair (say, two arms that share their seeds).

    Example: a = (0.50, 0.52, 0.48), b = (0.53, 0.54, 0.52) has differences 0.03, 0.02, 0.04, so a mean of
    0.03 with a standard error of 0.0058 and, at t(0.975, 2) = 4.30, an interval of 0.005 to 0.055.

    Raises:
        ValueError: `a` and `b` differ in length or are empty.
    """
    if len(a) != len(b):
        raise ValueError(f"pairs need two values each, not {len(a)} against {len(b)}")
    n = len(a)
    mean, stderr = mean_stderr([right - left for left, right in zip(a, b, strict=True)])
    if stderr is None:
        return Difference(mean, None, None, n, None, None, None)
    margin = critical(n - 1) * stderr
    return Difference(mean, mean - margin, mean + margin, n, detectable(stderr, n), _p(mean, stderr, n), stderr)


def detectable(stderr: float, n: int, comparisons: int = 1) -> float:
    """The smallest true difference found in 80% of repetitions, from `n` pairs that gave this standard error.

    Found: two-sided, 5% over all `comparisons`, each tested at its share as in Bonferroni's correction, which is
    the first step of Holm's.
    """
    return stderr * _noncentrality(n - 1, critical(n - 1, comparisons))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that, over all of them, 5% of families hold one wrong claim below 0.05 at most.

    Holm's step-down procedure: valid however the tests depend on each other. Source: Holm, "A simple
    sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = least
    return adjusted


def _p(mean: float, stderr: float, n: int) -> float | None:
    from scipy import special

    if stderr == 0:
        return 0.0 if mean else None
    return 2 * float(special.stdtr(n - 1, -abs(mean) / stderr))


@functools.cache
def critical(degrees: float, comparisons: int = 1) -> float:
    """Standard errors on each side that hold 95% of Student's t, or what each of several tests is left of it."""
    from scipy import special

    # Not `scipy.stats`: importing it takes a second, and every report would.
    return float(special.stdtrit(degrees, 1 - (1 - CONFIDENCE) / (2 * comparisons)))


@functools.cache
def _noncentrality(degrees: int, critical: float) -> float:
    """The true effect, in standard errors, at which a two-sided t test reaches 80% power."""
    from scipy import special

    # Not `scipy.stats.nct` nor `special.nctdtr`: for two seeds the one gives NaN, the other is off by half.
    # The mean is off by `normal` standard errors; the test then rejects if the scatter came out small enough.
    normal, step = np.linspace(-9.0, 9.0, 3601, retstep=True)
    density = np.exp(-(normal**2) / 2) * step / math.sqrt(2 * math.pi)

    def power(effect: float) -> float:
        scatter = (normal + effect) / critical
        return float(density @ special.chdtr(degrees, degrees * scatter**2))

    low, high = 0.0, 2 * critical + 4
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high
