"""Statistics over seeds: intervals and detectable effects that would flatter or hide a result."""

from __future__ import annotations

import math

import numpy as np
import pytest

from packcli.eval import stats


def test_interval_of_the_worked_example() -> None:
    difference = stats.paired_difference((0.50, 0.52, 0.48), (0.53, 0.54, 0.52))
    assert difference.low is not None
    assert difference.high is not None
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.03, 0.00516, 0.05484), abs=1e-5)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_detectable_effect_detected_too_seldom(n: int) -> None:
    """The effect called detectable is found in 80% of simulated repetitions."""
    from scipy.stats import t

    unit = stats.paired_difference([0.0] * n, [(-1.0) ** i for i in range(n)])
    sigma = stats.mean_stderr([(-1.0) ** i for i in range(n)])[1]
    assert unit.detectable is not None
    assert sigma is not None
    effect = unit.detectable / sigma / math.sqrt(n)  # in standard deviations
    draws = np.random.default_rng(0).normal(effect, 1, (200_000, n))
    found = abs(draws.mean(1) / draws.std(1, ddof=1) * math.sqrt(n)) > t.ppf(0.975, n - 1)
    assert found.mean() == pytest.approx(0.8, abs=0.006)


def test_interval_from_one_pair_or_none() -> None:
    assert stats.paired_difference([1.0], [3.0]) == stats.Difference(2.0, None, None, 1, None)
    assert stats.mean_stderr([4.0]) == (4.0, None)
    assert stats.mean_stderr([1.0, 3.0]) == (2.0, 1.0)
    for a, b in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match=r"values|pairs"):
            stats.paired_difference(a, b)
