"""The step counts that "Packing Analysis" (arXiv 2410.08081) prints, and those its runs would make of given rows.

Whether rows made here could be the paper's: `check`. The facts are in papersteps.yaml, with their source.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from packcli.config import Spec
from packcli.errors import ConfigError
from packcli.yamlfile import parse

MAX_LENGTH = 4096
"""Tokens in a row, in all its runs."""


class _Run(Spec):
    epochs: int
    per_device_batch: int
    grad_accum: int
    gpus: int


class Lognormal(Spec):
    """Of lengths in tokens, before they are cut to the shortest and the longest."""

    documents: int
    median: float
    sigma: float


class _Lengths(Spec):
    shortest: int
    longest: int
    sets: dict[str, Lognormal]  # by data set


class _Paper(Spec):
    validation: float
    runs: dict[str, _Run]  # by model
    total_steps: dict[str, dict[str, dict[str, int]]]  # data set -> arm -> model -> optimizer steps
    steps_per_s: dict[str, dict[str, dict[str, float]]]  # the same
    lengths: _Lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCheck:
    """One cell: what the rows given would make, what is printed, and which numbers of rows make just that."""

    model: str
    arm: str
    steps: int
    printed: int
    passed: bool
    allowed_rows: tuple[int, int] | None  # first and last; None where no number of rows gives the printed count


def datasets() -> tuple[str, ...]:
    """The four data sets: wildchat_gpt4, tulu, wildchat, open_source_1m."""
    return tuple(_paper().total_steps)


def models() -> tuple[str, ...]:
    """llama3_8b and llama3_70b."""
    return tuple(_paper().runs)


def arms() -> tuple[str, ...]:
    """The arms that do what the released code does: padding_released, random_released, greedy_released."""
    return tuple(_paper().total_steps["tulu"])


def budget(model: str) -> tuple[int, int]:
    """Epochs, and rows a step, of the runs of a model."""
    run = _paper().runs[model]
    return run.epochs, run.per_device_batch * run.grad_accum * run.gpus


def expected_steps(dataset: str, model: str, arm: str) -> int:
    """Optimizer steps as printed. Raises `ConfigError` for what the paper did not run."""
    try:
        return _paper().total_steps[dataset][arm][model]
    except KeyError:
        raise ConfigError(
            f"the paper prints no step count for {dataset} / {model} / {arm}",
            f"data sets: {', '.join(datasets())}; models: {', '.join(models())}; arms: {', '.join(arms())}",
        ) from None


def steps_per_s(dataset: str, model: str, arm: str) -> float:
    """As printed, of a run that the paper made."""
    return _paper().steps_per_s[dataset][arm][model]


def slots_per_step(model: str) -> tuple[int, int]:
    """(slots of a step whose rows are all full, GPUs that share them)."""
    run = _paper().runs[model]
    return run.per_device_batch * run.grad_accum * run.gpus * MAX_LENGTH, run.gpus


def lengths(dataset: str) -> tuple[Lognormal, int, int]:
    """Lengths of a data set, the shortest and the longest: fitted to the paper's printed steps, not measured."""
    found = _paper().lengths
    return found.sets[dataset], found.shortest, found.longest


def total_steps(num_rows: int, model: str) -> int:
    """Optimizer steps of one run of `model` on `num_rows` rows, counted before the validation split.

    `datasets` holds out the ceiling of the fraction. Each process then has ceil(ceil(rows / batch) / processes)
    micro-batches (accelerate fills up the last round), of which the Trainer makes a step for every full
    `grad_accum` (transformers, `num_update_steps_per_epoch = len_dataloader // gradient_accumulation_steps`),
    at least one. 69,780 rows: 62,802 to train on, 982 micro-batches, 491 steps, and 1,964 in four epochs.
    """
    run = _paper().runs[model]
    training_rows = num_rows - math.ceil(_paper().validation * num_rows)
    micro_batches = math.ceil(math.ceil(training_rows / run.per_device_batch) / run.gpus)
    return run.epochs * max(micro_batches // run.grad_accum, 1)


def allowed_rows(dataset: str, model: str, arm: str) -> tuple[int, int] | None:
    """First and last number of rows, before the validation split, that give the printed count; None: no number."""
    printed, run = expected_steps(dataset, model, arm), _paper().runs[model]
    enough = range(4 * printed * run.per_device_batch * run.grad_accum * run.gpus)
    first, behind = (
        bisect_left(enough, steps, key=lambda rows: total_steps(rows, model)) for steps in (printed, printed + 1)
    )
    return (first, behind - 1) if first < behind else None


def check(dataset: str, rows_by_arm: Mapping[str, int]) -> list[StepCheck]:
    """Compare rows before the validation split, by arm, with both models' printed counts; other arms are left out.

    Raises `ConfigError` for a data set that the paper does not have.
    """
    return [
        StepCheck(
            model=model,
            arm=arm,
            steps=total_steps(rows, model),
            printed=(printed := expected_steps(dataset, model, arm)),
            passed=total_steps(rows, model) == printed,
            allowed_rows=allowed_rows(dataset, model, arm),
        )
        for arm, rows in rows_by_arm.items()
        if arm in arms()
        for model in models()
    ]


@cache
def _paper() -> _Paper:
    name = "papersteps.yaml"
    text = (resources.files("packcli") / name).read_text(encoding="utf-8")
    return _Paper.model_validate(parse(text, name)[0])
