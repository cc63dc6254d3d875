"""docs/paper-steps.md: its numbers still come out of the shipped packers, and the steps are the Trainer's."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from packcli import papersteps
from packcli.errors import ConfigError
from packcli.released import concat, windows

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "paper_steps.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_steps", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper_steps"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_steps_per_epoch_are_counted_as_accelerate_and_datasets_count_them() -> None:
    from accelerate.data_loader import BatchSamplerShard
    from datasets import Dataset
    from torch.utils.data import BatchSampler, SequentialSampler

    for rows in (640, 17_530, 17_565, 25_885, 69_780):
        split = Dataset.from_dict({"row": range(rows)}).train_test_split(test_size=0.1, seed=42)
        for model, batch, epochs in (("llama3_8b", 2, 4), ("llama3_70b", 1, 3)):
            batches = BatchSampler(SequentialSampler(split["train"]), batch, drop_last=False)
            steps = epochs * (len(BatchSamplerShard(batches, num_processes=32)) // 2)
            assert papersteps.total_steps(rows, model) == steps, (rows, model)


def test_both_models_printed_counts_fit_one_number_of_rows_but_for_tulu_padding() -> None:
    for dataset in papersteps.datasets():
        for arm in papersteps.arms():
            large, small = (papersteps.allowed_rows(dataset, model, arm) for model in ("llama3_70b", "llama3_8b"))
            assert large is not None
            if (dataset, arm) == ("tulu", "padding_released"):
                assert small is None
                continue
            assert small is not None
            assert max(large[0], small[0]) <= min(large[1], small[1]), (dataset, arm)


@pytest.mark.parametrize("model", papersteps.models())
def test_allowed_rows_leave_none_out_and_let_none_in(model: str) -> None:
    printed = papersteps.expected_steps("wildchat", model, "greedy_released")
    allowed = papersteps.allowed_rows("wildchat", model, "greedy_released")
    assert allowed is not None
    around = [allowed[0] - 1, allowed[0], allowed[1], allowed[1] + 1]
    same = [papersteps.total_steps(rows, model) == printed for rows in around]
    assert same == [False, True, True, False]


def test_check_passes_rows_like_the_papers_and_fails_others_and_skips_other_arms() -> None:
    checks = papersteps.check("tulu", {"random_released": 68_500, "greedy_released": 68_500, "best_fit": 1})
    assert [(c.arm, c.model, c.steps, c.printed, c.passed) for c in checks] == [
        ("random_released", "llama3_8b", 1928, 1928, True),
        ("random_released", "llama3_70b", 2889, 2889, True),
        ("greedy_released", "llama3_8b", 1928, 1956, False),
        ("greedy_released", "llama3_70b", 2889, 2931, False),
    ]


def test_a_data_set_the_paper_does_not_have_is_named_in_the_error() -> None:
    with pytest.raises(ConfigError, match="alpaca"):
        papersteps.check("alpaca", {"random_released": 1})


def test_the_published_size_of_tulu_gives_the_70b_count_and_not_the_8b_one() -> None:
    large, small = (papersteps.total_steps(326_154, model) for model in ("llama3_70b", "llama3_8b"))
    assert (large, small) == (13_761, 9_172)


def test_the_scripts_shortcut_counts_rows_as_the_packer_does(script: ModuleType) -> None:
    lengths = np.random.default_rng(0).integers(30, 9000, 3000)
    bounds = windows(3000, 100, 7)
    assert script.concat_rows(lengths, bounds) == concat(lengths, 4096, bounds).num_rows


@pytest.mark.parametrize(
    ("dataset", "family", "spread", "lost"),
    [
        ("wildchat_gpt4", "lognormal", 1.033, 33.0),
        ("wildchat_gpt4", "log_logistic", 0.539, 32.9),
        ("wildchat", "weibull", 0.927, 11.1),
        ("open_source_1m", "lognormal", 0.907, 6.2),
    ],
)
def test_the_fits_of_the_page_come_out_of_the_shipped_packers(
    script: ModuleType, dataset: str, family: str, spread: float, lost: float
) -> None:
    fitted = script.fit(dataset, family, workers=2)
    assert math.isclose(fitted.spread, spread, rel_tol=0.03)
    assert math.isclose(100 * fitted.greedy_lost, lost, abs_tol=0.8)


def test_tulus_published_lengths_still_tell_the_released_packer_from_next_fit(script: ModuleType) -> None:
    factor, lengths = script.tulu_prediction("shuffled")
    assert math.isclose(factor, 0.787, abs_tol=0.001)
    steps = {rule: papersteps.total_steps(pack(lengths, 64), "llama3_8b") for rule, pack in script.RULES.items()}
    assert steps["as released"] == pytest.approx(1940, rel=0.003)
    assert steps["next-fit decreasing"] == pytest.approx(2552, rel=0.003)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["wildchat_gpt4", "tulu"])
def test_the_shipped_lengths_are_those_the_script_fits(script: ModuleType, dataset: str) -> None:
    shipped, shortest, longest = papersteps.lengths(dataset)
    assert (shortest, longest) == (script.SHORTEST, script.LONGEST)
    found = script.parameters(dataset, near=shipped.sigma)
    assert found["documents"] == shipped.documents
    assert found["sigma"] == pytest.approx(shipped.sigma, abs=2e-4)
    assert found["median"] == pytest.approx(shipped.median, rel=1e-3)
