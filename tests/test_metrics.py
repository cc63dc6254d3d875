"""A step's record and a run's results, against arithmetic done by hand."""

from __future__ import annotations

from typing import Any

import pytest

from packcli import flops
from packcli.train.metrics import Meter, results

SHAPE = flops.Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=1000)
# Two steps: the second is half the work in a tenth of the time.
FIRST: dict[str, Any] = {"step": 1, "loss": 4.0, "lr": 1e-3, "grad_norm": 2.0, "rows": 8, "documents": 30}
FIRST |= {
    "tokens": 800,
    "supervised": 200,
    "slots": 1000,
    "squares": 40_000,
    "step_s": 2.0,
    "peak_bytes": 3 * 2**30,
}
SECOND: dict[str, Any] = FIRST | {"step": 2, "loss": 2.0, "tokens": 400, "supervised": 100, "slots": 500}
SECOND |= {"squares": 20_000, "step_s": 0.2, "peak_bytes": 2 * 2**30}


def meter(**other: Any) -> Meter:
    return Meter(**{"shape": SHAPE, "device": "NVIDIA H100 80GB HBM3", "world": 4, "max_length": 100} | other)


def test_record_lacks_a_number_or_has_another() -> None:
    # A layer: 64 x 16 x (8 + 4) + 3 x 64 x 128 = 36,864 weights; the head 64,000.
    strict = 6 * (2 * 36_864 * 800 + 2 * 40_000 * 4 * 16 + 200 * 64_000)
    square = 6 * (2 * 36_864 * 800 + 2 * 2 * 800 * 100 * 4 * 16 + 800 * 64_000)
    assert meter().record(**FIRST) == pytest.approx(
        {
            "step": 1,
            "loss": 4.0,
            "lr": 1e-3,
            "grad_norm": 2.0,
            "rows": 8,
            "documents": 30,
            "tokens": 800,
            "supervised": 200,
            "slots": 1000,
            "efficiency": 0.8,
            "step_s": 2.0,
            "useful_tokens_per_s": 400.0,
            "padded_tokens_per_s": 500.0,
            "supervised_tokens_per_s": 100.0,
            "model_tflops_per_s": strict / 2.0 / 4 / 1e12,
            "mfu": strict / (2.0 * 4 * 989.4e12),
            "mfu_full_square": square / (2.0 * 4 * 989.4e12),
            "peak_memory_gib": 3.0,
        }
    )


def test_unknown_is_written_as_zero() -> None:
    on_cpu = meter(device="cpu").record(**FIRST | {"peak_bytes": None})
    assert (on_cpu["mfu"], on_cpu["mfu_full_square"], on_cpu["peak_memory_gib"]) == (None, None, None)
    assert on_cpu["model_tflops_per_s"] > 0
    unknown = meter(shape=None).record(**FIRST)
    assert (unknown["mfu"], unknown["mfu_full_square"], unknown["model_tflops_per_s"]) == (None, None, None)
    found = results([on_cpu, meter(device="cpu").record(**SECOND | {"peak_bytes": None})])
    assert (found["mfu"], found["mfu_full_square"], found["peak_memory_gib"]) == (None, None, None)


def test_attention_within_a_window_is_counted_as_if_there_were_none() -> None:
    near = flops.Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=9, window=99)
    assert meter(shape=near).record(**FIRST)["mfu"] is None
    assert meter(shape=near, max_length=99).record(**FIRST)["mfu"] > 0


def test_padding_or_recomputation_raises_mfu() -> None:
    assert meter().record(**FIRST)["mfu"] == meter().record(**FIRST | {"slots": 9000})["mfu"]


def test_lora_is_credited_with_gradients_it_does_not_compute() -> None:
    full, lora = meter().record(**FIRST), meter(trainable=2000).record(**FIRST)
    extra = 6 * 2000 * 800
    looking = 6 * 2 * 40_000 * 4 * 16
    of_weights = full["model_tflops_per_s"] * 8e12 - looking
    assert lora["model_tflops_per_s"] * 8e12 == pytest.approx(of_weights * 2 / 3 + looking + extra)


def test_rates_of_a_run_are_means_of_rates() -> None:
    records = [meter().record(**FIRST), meter().record(**SECOND)]
    found = results(records)
    assert (found["steps"], found["tokens"], found["slots"]) == (2, 1200, 1500)
    assert (found["rows"], found["documents"], found["supervised"]) == (16, 60, 300)
    assert found["wall_s"] == pytest.approx(2.2)
    assert found["useful_tokens_per_s"] == pytest.approx(1200 / 2.2)
    assert found["padded_tokens_per_s"] == pytest.approx(1500 / 2.2)
    assert found["supervised_tokens_per_s"] == pytest.approx(300 / 2.2)
    # Half the work again in a tenth of the time.
    assert found["mfu"] == pytest.approx(1.5 * records[0]["mfu"] * 2.0 / 2.2)
    assert found["peak_memory_gib"] == 3.0


def test_final_loss_is_that_of_one_step_or_of_all() -> None:
    losses = [5.0] * 18 + [1.0, 4.0]
    records = [
        meter().record(**FIRST | {"step": step + 1, "loss": loss, "supervised": 100 * (1 + step % 2)})
        for step, loss in enumerate(losses)
    ]
    # The last two of twenty, by their 100 and 200 labels.
    assert results(records)["final_loss"] == pytest.approx((100 * 1.0 + 200 * 4.0) / 300)


def test_step_without_a_slot_divides_by_zero() -> None:
    nothing = meter().record(**FIRST | {"tokens": 0, "slots": 0, "supervised": 0, "squares": 0})
    assert nothing["efficiency"] is None
    assert nothing["useful_tokens_per_s"] == 0.0
