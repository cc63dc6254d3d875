"""Statistics over seeds: intervals, p-values and detectable effects that would flatter or hide a result."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from packcli.eval import stats

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "interval_coverage.py"


def test_interval_of_the_worked_example() -> None:
    difference = stats.paired_difference((0.50, 0.52, 0.48), (0.53, 0.54, 0.52))
    assert difference.low is not None
    assert difference.high is not None
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.03, 0.00516, 0.05484), abs=1e-5)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_interval_or_p_value_is_not_that_of_a_paired_t_test(n: int) -> None:
    from scipy.stats import ttest_rel

    a, b = np.random.default_rng(n).normal(size=(2, n))
    found, reference = stats.paired_difference(a.tolist(), b.tolist()), ttest_rel(b, a)
    bounds = reference.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((bounds.low, bounds.high, reference.pvalue), rel=1e-9)
    assert found.low is not None
    assert found.high is not None
    assert found.p is not None
    assert (found.low <= 0 <= found.high) == (found.p >= 0.05)


@pytest.mark.parametrize(("n", "comparisons"), [(2, 1), (3, 1), (10, 1), (2, 8), (3, 8), (10, 40)])
def test_detectable_effect_detected_too_seldom(n: int, comparisons: int) -> None:
    """The effect called detectable is found in 80% of simulated repetitions."""
    from scipy.stats import t

    effect = stats.detectable(1 / math.sqrt(n), n, comparisons)  # in standard deviations
    draws = np.random.default_rng(0).normal(effect, 1, (200_000, n))
    found = abs(draws.mean(1) / draws.std(1, ddof=1) * math.sqrt(n)) > t.ppf(1 - 0.025 / comparisons, n - 1)
    assert found.mean() == pytest.approx(0.8, abs=0.006)
    alone = stats.paired_difference([0.0] * n, [(-1.0) ** i for i in range(n)])
    assert alone.stderr is not None
    assert alone.detectable == pytest.approx(stats.detectable(alone.stderr, n))


# Several comparisons -----------------------------------------------------------------------------------


def drawn_p_values() -> list[list[float]]:
    rng = np.random.default_rng(0)
    return [(rng.random(size) ** power).tolist() for size in (1, 2, 3, 5, 8) for power in (1, 3, 6)]


def test_many_comparisons_count_as_one() -> None:
    assert stats.holm([]) == []
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize("values", drawn_p_values())
def test_correction_is_not_the_closure_of_bonferronis(values: list[float]) -> None:
    """Holm's p-value is the largest of Bonferroni's over all families that hold the comparison."""
    families = [
        family for size in range(1, len(values) + 1) for family in itertools.combinations(range(len(values)), size)
    ]
    closed = [
        max(min(1.0, len(family) * min(values[i] for i in family)) for family in families if number in family)
        for number in range(len(values))
    ]
    assert stats.holm(values) == pytest.approx(closed)


@pytest.mark.parametrize("values", drawn_p_values())
def test_correction_is_not_that_of_statsmodels(values: list[float]) -> None:
    from statsmodels.stats.multitest import multipletests

    assert stats.holm(values) == pytest.approx(multipletests(values, method="holm")[1])


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
def test_an_effect_that_could_be_seen_is_not_that_of_statsmodels(n: int) -> None:
    from statsmodels.stats.power import TTestPower

    effect = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8, alternative="two-sided")
    assert stats.detectable(1 / math.sqrt(n), n) == pytest.approx(float(effect), rel=1e-3)


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    """benchmarks/interval_coverage.py: made-up sweeps through the code of a report."""
    spec = importlib.util.spec_from_file_location("interval_coverage", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_of_a_report_miss_or_its_claims_are_false_too_often(coverage: ModuleType, seeds: int) -> None:
    """Seeds shift all arms by 2 points and each by 1. A share of 2,000 sweeps is known to half a point."""
    nothing = coverage.simulate(seeds, (0.0,) * 4, sweeps=2000)
    assert 0.93 <= nothing.coverage <= 0.97
    assert nothing.family <= 0.06 < nothing.single, "without a correction the claims would not hold"
    some = coverage.simulate(seeds, (0.04, -0.02, 0.0, 0.0), sweeps=2000)
    assert 0.93 <= some.coverage <= 0.97
    assert some.family <= 0.06


@pytest.mark.slow
def test_scores_over_few_items_make_intervals_miss(coverage: ModuleType) -> None:
    found = coverage.simulate(3, (0.02, 0.0, 0.0, 0.0), sweeps=2000, items=100)
    assert 0.93 <= found.coverage <= 0.97
    assert found.family <= 0.06


def test_interval_from_one_pair_or_none() -> None:
    assert stats.paired_difference([1.0], [3.0]) == stats.Difference(2.0, None, None, 1, None, None, None)
    assert stats.mean_stderr([4.0]) == (4.0, None)
    assert stats.mean_stderr([1.0, 3.0]) == (2.0, 1.0)
    for a, b in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match=r"values|pairs"):
            stats.paired_difference(a, b)


def test_pairs_without_scatter_get_a_p_value_that_is_no_number() -> None:
    assert stats.paired_difference([1.0, 2.0], [1.0, 2.0]).p is None
    assert stats.paired_difference([1.0, 2.0], [2.0, 3.0]).p == 0.0
