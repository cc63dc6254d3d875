"""Numbers that no training can have had, planted in what a real one left; and none where none are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import Data

from packcli import stages
from packcli.config import ARMS, ArmSpec, ModelSpec, TrainSpec
from packcli.plan import TrainOrder
from packcli.report import physics

Results = dict[str, Any]


def trained(data: Data, name: str, **changes: object) -> tuple[TrainOrder, Results, Results]:
    """Order, results and ledger of a training that was done here."""
    order = data.train_order(name, f"{name} {changes}".replace("'", ""), **changes)
    manifest, index = stages.train(order, data.store), data.store.manifest("index", order.index)
    assert index is not None
    return order, manifest.results, index.results["ledger"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "changes"),
    [
        ("padding", {"epochs": 2, "steps": None, "global_batch": 32}),
        ("padding_free", {"epochs": 2, "steps": None, "global_batch": 32, "batch_unit": "documents"}),
        ("sorted", {"epochs": 1, "steps": None, "global_batch": 32}),
        ("random", {"tokens": 3000, "steps": None}),
        ("best_fit", {"epochs": 1, "steps": None, "global_batch": 16, "batch_unit": "documents"}),
        ("longalign", {"steps": 3}),
        ("padding_released", {"epochs": 1, "steps": None, "global_batch": 32}),
        ("greedy_released", {"epochs": 2, "steps": None}),
    ],
)
def test_a_training_that_was_done_is_found_impossible(tiny: Data, arm: str, changes: dict[str, object]) -> None:
    assert physics.check(*trained(tiny, arm, **changes)) == ()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainOrder, Results, Results]:
    data = Data(tmp_path_factory.mktemp("physics"), "tiny", 200)
    return trained(data, "best_fit", epochs=2, steps=None)


Plant = Callable[[Results, Results], None]


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (lambda run, _: run.update(mfu=1.3), "the recorded MFU is 1.30, and over 1 no device can be"),
        (lambda run, _: run.update(wall_s=run["wall_s"] / 10), "useful_tokens_per_s x wall_s is"),
        (
            lambda run, _: run.update(padded_tokens_per_s=run["padded_tokens_per_s"] * 1.01),
            "padded_tokens_per_s x",
        ),
        (lambda run, _: run.update(cpu_s=run["wall_s"] * run["cores"] * 2 + 2), "s of CPU time in"),
        (lambda run, _: run.update(steps=run["steps"] - 1), "were planned"),
        (lambda run, _: run.update(tokens=run["tokens"] + 1), "2 x tokens_kept of the ledger"),
        (lambda run, _: run.update(documents=run["documents"] - 1), "but the planned steps hold"),
        (lambda run, _: run.update(slots=run["slots"] - 192), "2 x slots of the ledger"),
        (lambda run, _: run.update(supervised=run["supervised"] + 1), "2 x tokens_supervised of the ledger"),
        (
            lambda _, ledger: ledger.update(tokens_in=ledger["tokens_in"] + 1),
            "the ledger does not close: tokens_in",
        ),
        (lambda _, ledger: ledger.update(documents=0), "the ledger does not close: conversations_in"),
        (lambda _, ledger: ledger.update(efficiency=ledger["efficiency"] * 1.01), "tokens_kept / slots"),
        (lambda _, ledger: ledger.update(rows=ledger["rows_lower_bound"] - 1), "in fewer than"),
    ],
)
def test_a_planted_fault_goes_unnoticed(
    real: tuple[TrainOrder, Results, Results], plant: Plant, says: str
) -> None:
    order, results, ledger = real[0], dict(real[1]), dict(real[2])
    assert physics.check(order, results, ledger) == ()
    plant(results, ledger)
    assert says in "\n".join(physics.check(order, results, ledger))


@pytest.mark.parametrize(
    ("budget", "says"), [("steps", "but `train.steps` is 9"), ("rows", "optimizer steps, but")]
)
def test_steps_of_another_budget_go_unnoticed(
    real: tuple[TrainOrder, Results, Results], budget: str, says: str
) -> None:
    """Results and their own plan agree with each other, but not with what the sweep asks for."""
    order, results, ledger = real
    change = {"epochs": None, "steps": 9} if budget == "steps" else {"global_batch": 3}
    other = order.model_copy(update={"train": order.train.model_copy(update=change)})
    assert says in "\n".join(physics.check(other, results, ledger))


def test_what_is_not_known_is_found_wrong(real: tuple[TrainOrder, Results, Results]) -> None:
    order, results, ledger = real
    assert physics.check(order, results, None) == ()
    assert physics.check(order, {}, {}) == ()
    for name in results:
        assert physics.check(order, {key: value for key, value in results.items() if key != name}, ledger) == ()
    for word in ledger:
        assert physics.check(order, results, {key: value for key, value in ledger.items() if key != word}) == ()


@pytest.mark.parametrize(
    ("steps", "printed_s", "steps_per_s"),
    [(1964, 1188.8449, 0.165), (728, 445.28773, 0.163)],
)
def test_a_printed_time_ten_times_too_short_is_believed(steps: int, printed_s: float, steps_per_s: float) -> None:
    """The paper's Llama-3-8B on WildChat-GPT4, padding and random: rows of 4,096, 128 a step, on 32 GPUs."""
    order = TrainOrder(
        id="t",
        tokens="t",
        index="i",
        base=None,
        model=ModelSpec(name="meta-llama/Meta-Llama-3-8B"),
        arm=ArmSpec.model_validate(ARMS["random"]),
        train=TrainSpec(steps=steps, lr=1e-5, global_batch=128),
        max_length=4096,
        seed=42,
    )
    run = {"steps": steps, "tokens": steps * 128 * 4096, "device": "NVIDIA A800-SXM4-80GB", "processes": 32}
    (found,) = physics.check(order, run | {"wall_s": printed_s}, None)
    assert "an MFU of 3." in found
    assert physics.check(order, run | {"wall_s": steps / steps_per_s}, None) == ()


def test_a_lora_run_is_held_to_the_cost_of_a_full_one() -> None:
    """With frozen weights a token costs two thirds: what is impossible for all of them need not be."""
    run = {"steps": 1, "tokens": 1_000_000, "device": "NVIDIA A100-SXM4-80GB", "processes": 1}
    shape_flops = 6 * 6.98e9 * 1e6  # of the 8B's layers
    run["wall_s"] = 0.9 * shape_flops / 312e12
    base = {"id": "t", "tokens": "t", "index": "i", "base": None, "max_length": 4096, "seed": 0}
    base |= {
        "model": ModelSpec(name="meta-llama/Meta-Llama-3-8B"),
        "arm": ArmSpec.model_validate(ARMS["best_fit"]),
    }
    whole = TrainSpec(steps=1, lr=1e-5, global_batch=1)
    lora = TrainSpec(steps=1, lr=1e-5, global_batch=1, lora={"rank": 8, "alpha": 16})
    assert physics.check(TrainOrder(train=whole, **base), run, None)
    assert physics.check(TrainOrder(train=lora, **base), run, None) == ()


def test_the_check_is_left_out_of_a_report(tmp_path: Path) -> None:
    from test_report import SWEEP, Sweep

    from packcli.report import render

    sweep = Sweep(SWEEP, tmp_path)
    for cell in sweep.plan.cells:
        sweep.trained(cell)
    assert [row.physics for row in sweep.report().rows] == [()] * 6
    sweep.trained(sweep.cell(arm="best_fit", seed="2"), mfu=4.1)
    report = sweep.report()
    assert [bool(row.physics) for row in report.rows] == [False] * 4 + [True, False]
    for text in (render.markdown(report), render.csv_text(report), render.json_text(report)):
        assert "the recorded MFU is 4.10" in text
    assert "cannot be true, nor what follows from them: arm=best_fit, seed=2." in report.verdict
