"""FLOPs against arithmetic done by hand, and peaks against the names torch gives devices."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from packcli import flops

# Llama-3-8B.
CONFIG = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
CONFIG |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
LLAMA_8B = flops.shape(CONFIG)
assert LLAMA_8B is not None


def test_flops_of_a_weight_are_not_six_a_token() -> None:
    # 7,504,658,432 weights in matrices, the embedding's look-up left out: 8.03 B less 128,256 x 4,096, less norms.
    count = flops.training(LLAMA_8B, tokens=1000, squares=0, supervised=1000)
    assert count == 6 * 7_504_658_432 * 1000


def test_attention_is_not_counted_as_masked() -> None:
    # One document of 8192 tokens and sixteen of 512: 51.5 and 45.4 GFLOP a token with the head everywhere, and
    # 57.9 for the full square.
    one = flops.training(LLAMA_8B, tokens=8192, squares=8192**2, supervised=8192)
    many = flops.training(LLAMA_8B, tokens=8192, squares=16 * 512**2, supervised=8192)
    full = flops.full_square(LLAMA_8B, tokens=8192, max_length=8192)
    assert one / 8192 == pytest.approx(51.5e9, rel=1e-3)
    assert many / 8192 == pytest.approx(45.4e9, rel=1e-3)
    assert full / 8192 == pytest.approx(57.9e9, rel=1e-3)


def test_head_is_counted_where_no_label_is() -> None:
    without = flops.training(LLAMA_8B, tokens=100, squares=0, supervised=0)
    some = flops.training(LLAMA_8B, tokens=100, squares=0, supervised=30)
    assert some - without == 6 * 30 * 4096 * 128256


def test_frozen_weights_are_given_gradients_in_lora() -> None:
    # Rank 16 on the seven linear layers of each block: 41,943,040 trained parameters.
    full = flops.training(LLAMA_8B, tokens=1000, squares=0, supervised=1000)
    lora = flops.training(LLAMA_8B, tokens=1000, squares=0, supervised=1000, trainable=41_943_040)
    assert lora == 1000 * (4 * 7_504_658_432 + 6 * 41_943_040)
    assert lora / full == pytest.approx(2 / 3, rel=0.01)
    # Attention has no weights to freeze.
    looking = flops.training(LLAMA_8B, tokens=0, squares=512**2, supervised=0)
    assert flops.training(LLAMA_8B, tokens=0, squares=512**2, supervised=0, trainable=1) == looking > 0


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_count_is_not_what_the_model_computes(kind: str) -> None:
    """Against torch's own counter, over a whole forward and backward."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 24, "vocab_size": 500}
    config = AutoConfig.for_model(kind, **sizes, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(40)[None], use_cache=False).logits.sum().backward()
    shape = flops.shape(config.to_dict())
    assert shape is not None
    # Eager attention computes the whole square, of which the mask keeps half.
    counted = flops.training(shape, tokens=40, squares=2 * 40**2, supervised=40)
    assert counter.get_total_flops() == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("kind", ["gpt_neox", "phi", "mixtral", "falcon_h1", "qwen3_next"])
def test_model_we_cannot_count_is_guessed(kind: str) -> None:
    # A feed-forward block without gate, experts, state-space layers.
    assert flops.shape(AutoConfig.for_model(kind).to_dict()) is None


def test_sliding_window_that_is_switched_off_counts_as_one() -> None:
    off = flops.shape({**CONFIG, "model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False})
    on = flops.shape({**CONFIG, "model_type": "mistral", "sliding_window": 4096})
    assert (off and off.window, on and on.window) == (None, 4096)


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 836),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_device_gets_the_peak_of_another(device: str, tflops: float) -> None:
    assert flops.peak(device) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A4000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GH200 480GB",
        "NVIDIA GeForce RTX 4090 D",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_peak_of_an_unknown_device_is_guessed(device: str) -> None:
    assert flops.peak(device) is None
