"""Means, standard errors and paired differences. Pure functions on floats; knows nothing of tasks or runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
POWER = 0.80


@dataclass(frozen=True, slots=True)
class Difference:
    """`b - a` over `n` pairs, in the unit of the values.

    `low` and `high` bound the mean difference with 95% confidence (Student's t, n - 1 degrees of freedom).
    `detectable` is the smallest true difference that a design with this many pairs and this much scatter
    finds significant (two-sided, 5%) in 80% of repetitions: an effect below it could not have been seen.
    All three are None for fewer than two pairs, where the scatter between pairs is unknown.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    detectable: float | None


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
    mean, stderr = mean_stderr([right - left for left, right in zip(a, b, strict=True)])
    if stderr is None:
        return Difference(mean, None, None, 1, None)

    from scipy import stats

    critical = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(a) - 1))
    margin = critical * stderr
    return Difference(mean, mean - margin, mean + margin, len(a), stderr * _noncentrality(len(a) - 1, critical))


@functools.cache
def _noncentrality(degrees: int, critical: float) -> float:
    """The true effect, in standard errors, at which a two-sided t test reaches 80% power."""
    from scipy import integrate, optimize, stats

    def power(effect: float, quantile: float) -> float:
        # Given the scatter s / sigma that came out, the test is one on a normal variable.
        scatter = math.sqrt(stats.chi2.ppf(quantile, degrees) / degrees)
        return float(stats.norm.sf(critical * scatter - effect) + stats.norm.cdf(-critical * scatter - effect))

    def shortfall(effect: float) -> float:
        # Not `scipy.stats.nct`: it gives NaN for large effects at one degree of freedom, that is two seeds.
        return float(integrate.quad(lambda quantile: power(effect, quantile), 0, 1)[0]) - POWER

    return float(optimize.brentq(shortfall, 0.0, 2 * critical + 4, xtol=1e-6))
