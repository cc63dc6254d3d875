"""The arithmetic a user sees before training, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packcli import batching, estimate, flops, memory
from packcli.batching import Sizes
from packcli.config import ARMS, ArmSpec, ClusterSpec, TrainSpec
from packcli.estimate import Counts, Estimate
from packcli.rates import SlotRate

SHAPE = flops.Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=500)
COUNTS = Counts(
    rows=10, steps=5, tokens=1000, squares=90_000, supervised=400, slots=4000.0, slot_squares=1_000_000.0
)
CLUSTER = ClusterSpec(nodes=2, gpus_per_node=4, gpu="H200")
RATE = SlotRate(0.4, as_full=False, text="given")


def train_spec(**fields: Any) -> TrainSpec:
    return TrainSpec.model_validate({"epochs": 1, "lr": 1e-5, "global_batch": 2, **fields})


def arithmetic(**fields: Any) -> estimate.StepArithmetic:
    """Five rows of six conversations each, two a step."""
    sizes = Sizes(np.full(5, 900), np.full(5, 6), np.array([0, 5]))
    train = train_spec(**fields)
    seen = estimate.visits(batching.run_steps(sizes, train, "shuffled", seed=0), 5)
    return estimate.step_arithmetic(sizes, np.full(5, 1024.0), seen, train)


# A step ------------------------------------------------------------------------------------------------


def test_a_step_is_the_mean_of_all_steps_the_partial_last_one_too() -> None:
    found = arithmetic()
    assert (found.steps, found.rows, found.documents) == (3, 5 / 3, 10)
    assert (found.tokens, found.slots) == (1500, 1024 * 5 / 3)


def test_the_line_says_each_number_with_its_arithmetic() -> None:
    found = estimate.StepArithmetic(
        steps=60, rows=128, documents=783, tokens=391_204, slots=524_288, lr=2.47e-05, lr_given=1e-05,
        lr_rule="sqrt", reference_batch=128,
    )  # fmt: skip
    assert found.text() == (
        "1 row = 6.1 conversations: 128 rows = 783 conversations, 391,204 useful tokens of 524,288 slots a step; "
        "60 steps; lr 1e-05 x sqrt(783 / 128) = 2.47e-05"
    )


@pytest.mark.parametrize(("rule", "factor"), [("sqrt", 2.5**0.5), ("linear", 2.5)])
def test_the_learning_rate_shown_is_the_one_that_is_used(rule: str, factor: float) -> None:
    found = arithmetic(lr_rule=rule, reference_batch=4)
    assert found.lr == pytest.approx(1e-5 * factor)
    assert found.lr == batching.peak_lr(train_spec(lr_rule=rule, reference_batch=4), found.documents)
    assert found.text().endswith(f" = {found.lr:.3g}")


def test_a_fixed_rate_has_no_arithmetic() -> None:
    found = arithmetic()
    assert found.lr == 1e-5
    assert found.text().endswith("; lr 1e-05")


def test_one_conversation_a_row_and_one_step_are_singular() -> None:
    sizes = Sizes(np.full(2, 100), np.ones(2, np.int64), np.array([0, 2]))
    train = train_spec()
    seen = estimate.visits(batching.run_steps(sizes, train, "shuffled", seed=0), 2)
    text = estimate.step_arithmetic(sizes, np.full(2, 100.0), seen, train).text()
    assert text.startswith("1 row = 1 conversation: 2 rows = 2 conversations")
    assert "; 1 step; " in text


@pytest.mark.parametrize(
    ("arm", "slots"), [("padding", [100, 100]), ("padding_free", [30, 50]), ("padding_released", [45, 75])]
)
def test_slots_of_a_row_are_those_its_layout_computes(arm: str, slots: list[float]) -> None:
    layout = ArmSpec.model_validate(ARMS[arm])
    found = estimate.row_slots(
        np.array([30, 50]), layout, 100, {"slots": 120, "tokens_kept": 80, "tokens_boundary": 0}
    )
    assert found.tolist() == slots


# Hours -------------------------------------------------------------------------------------------------


def test_hours_count_padding_and_flops_do_not() -> None:
    found = estimate.estimate(COUNTS, SHAPE, train_spec(), CLUSTER, RATE)
    useful = flops.training(SHAPE, tokens=1000, squares=90_000, supervised=400)
    computed = flops.training(SHAPE, tokens=4000, squares=1_000_000, supervised=400)
    assert found.flops == useful
    assert found.gpu_hours == pytest.approx(computed / (989.4e12 * 0.4) / 3600)
    assert found.hours == pytest.approx(found.gpu_hours / 8)


@pytest.mark.parametrize(("cluster", "rate"), [(None, RATE), (CLUSTER, None)])
def test_no_hours_without_a_cluster_and_a_rate(cluster: ClusterSpec | None, rate: SlotRate | None) -> None:
    found = estimate.estimate(COUNTS, SHAPE, train_spec(), cluster, rate)
    assert (found.hours, found.gpu_hours, found.rate) == (None, None, None)
    assert found.flops is not None


def test_a_model_without_a_shape_has_steps_but_no_flops() -> None:
    found = estimate.estimate(COUNTS, None, train_spec(), CLUSTER, RATE)
    assert found == Estimate(rows=10, steps=5, lengths="prepared")


def test_lora_does_not_count_gradients_of_frozen_weights() -> None:
    lora = {"rank": 2, "alpha": 4}
    train = train_spec(lora=lora)
    assert train.lora is not None
    added = SHAPE.layers * memory.adapter_parameters(SHAPE, train.lora)
    found = estimate.estimate(COUNTS, SHAPE, train, CLUSTER, RATE)
    expected = flops.training(SHAPE, tokens=1000, squares=90_000, supervised=400, trainable=added)
    assert found.flops == expected


def test_a_total_with_a_hole_is_unknown() -> None:
    known = Estimate(rows=1, steps=2, flops=3.0, hours=4.0, gpu_hours=5.0)
    assert estimate.total([known, known]) == Estimate(rows=2, steps=4, flops=6.0, hours=8.0, gpu_hours=10.0)
    assert estimate.total([known, Estimate(rows=1)]) == Estimate(rows=2)
    assert estimate.total([]) == Estimate()


# A dry run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory, run_cli: Callable[..., Any]) -> dict[str, Any]:
    """Of a prepared sweep with a cluster."""
    from conftest import MODEL, chat_records, write_lines

    folder = tmp_path_factory.mktemp("dry")
    write_lines(folder / "chats.jsonl", chat_records(40))
    sweep = folder / "sweep.yaml"
    sweep.write_text(
        f"""
name: dry
model: {{config: {MODEL["config"]}, tokenizer: train, vocab_size: 300}}
data: {{source: chats.jsonl, max_length: 192}}
train: {{epochs: 2, lr: 1.0e-3, lr_rule: linear, reference_batch: 4, global_batch: 4}}
matrix: {{train.batch_unit: [rows, documents], arm: [padding, best_fit]}}
estimate: {{cluster: {{gpus_per_node: 2, gpu: A100-40GB}}, slot_mfu: 0.1}}
"""
    )
    assert run_cli("prepare", sweep, cwd=folder).code == 0
    found: dict[str, Any] = run_cli("sweep", sweep, "--dry-run", "--json", cwd=folder).json()
    found["shown"] = run_cli("sweep", sweep, "--dry-run", cwd=folder).stdout
    return found


@pytest.mark.slow
def test_a_prepared_cell_shows_its_step_its_hours_and_its_memory(document: dict[str, Any]) -> None:
    for cell in document["cells"]:
        step, cost = cell["step"], cell["estimate"]
        assert step["steps"] == cost["steps"]
        assert step["rows"] * step["steps"] == pytest.approx(2 * cost["rows"])
        assert step["documents"] * step["steps"] == pytest.approx(2 * 40)
        assert step["lr"] == pytest.approx(1e-3 * step["documents"] / 4)
        assert step["slots"] >= step["tokens"]
        assert cost["lengths"] == "prepared"
        assert cost["gpu_hours"] == pytest.approx(2 * cost["hours"])
        assert cell["memory"]["gpus"] == 2
        assert cell["memory"]["fits"] == "yes"
    by_label = {tuple(cell["labels"].values()): cell for cell in document["cells"]}
    padded, packed = by_label["rows", "padding"], by_label["rows", "best_fit"]
    assert padded["step"]["slots"] == pytest.approx(192 * padded["step"]["rows"])
    assert packed["estimate"]["gpu_hours"] < padded["estimate"]["gpu_hours"]


@pytest.mark.slow
def test_a_training_that_cells_share_is_counted_once_and_shown_once(document: dict[str, Any]) -> None:
    different = {cell["stages"]["train"]["id"]: cell["estimate"]["gpu_hours"] for cell in document["cells"]}
    assert len(different) == 3  # padding by rows and by documents is one
    assert document["total"]["gpu_hours"] == pytest.approx(sum(different.values()))
    assert document["shown"].count("useful tokens of") == 3
    memories = {str(cell["memory"]) for cell in document["cells"]}
    assert len(memories) == 2  # a step of so many conversations does not say how many rows a GPU has
    assert document["shown"].count("Memory of one GPU") == 2
    for cell in document["cells"]:
        assert cell["step"]["text"] in " ".join(document["shown"].split())


def test_the_cluster_enters_no_id(run_cli: Callable[..., Any], tiny_sweep: Any, tmp_path: Path) -> None:
    def ids(*options: str) -> list[str]:
        cells = run_cli("status", tiny_sweep(), "--json", *options, cwd=tmp_path).json()["cells"]
        return [cell["stages"]["train"]["id"] for cell in cells]

    assert ids() == ids("--set", "estimate.cluster={gpu: H200}", "--set", "estimate.slot_mfu=0.5")
