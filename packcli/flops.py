"""Model FLOPs of a training run, and the dense peaks to hold them against. Pure.

Counted: matrix multiplications forward and backward (3 x the forward's 2 x m x n x k); attention as masked,
that is half of sum(length^2) over the segments attention may look at; the output head where it is computed, at
supervised positions. Not counted: padding, recomputation, the embedding, softmax, norms, the optimizer.
`full_square` gives the convention of torchtitan instead (attention over T^2, the head at every token), to compare
printed figures.

LoRA: a frozen weight has no gradient of its own, so its backward is one product and not two, 4 FLOPs a parameter
and token where a trained one takes 6.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

PEAK_BF16_FLOPS = {  # dense, per device; vendors' data sheets. Of two names that fit, the longer counts.
    "NVIDIA A40": 149.7e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A800": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H800": 989.4e12,
    "NVIDIA H800 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA B300": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA GB300": 2500e12,
}
_OTHER_CHIP = frozenset({"MIG", "Laptop", "D", "CNX"})
"""Words in a device's name that make it less than what the name begins with."""

_COUNTED = frozenset(
    {"llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"}
    | {"olmo", "olmo2", "olmo3", "granite", "smollm3", "cohere", "cohere2", "glm", "glm4", "stablelm", "exaone4"}
    | {"seed_oss", "helium", "hunyuan_v1_dense"}
)
"""Model types of transformers whose every layer is what `Shape` says."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense Llama-like decoder with a gated feed-forward block.

    `window`: tokens a sliding-window layer looks back; None without such layers.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    window: int | None = None
    tied: bool = False  # the head's weight is the embedding's

    @property
    def layer(self) -> int:
        """Weights of one layer's matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate


def shape(config: Mapping[str, Any], vocab: int | None = None) -> Shape | None:
    """The shape a transformers config describes, or None when it is not a dense decoder we can count.

    `config`: complete, as `to_dict` gives it. A key it lacks is taken for Llama's default.
    """
    if config.get("model_type") not in _COUNTED:
        return None
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Shape(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(vocab or config["vocab_size"]),
            window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError):
        return None


def training(model: Shape, *, tokens: int, squares: int, supervised: int, trainable: int | None = None) -> float:
    """FLOPs of forward and backward over `tokens`, whose segments' lengths squared sum to `squares`.

    `trainable`: parameters LoRA adds, all else frozen; None: every weight trains.
    """
    # Scores and values: two products of length^2 x heads x head_dim each, half of it masked away. They have no
    # weights, so nothing of them is ever frozen.
    looking = 6.0 * model.layers * squares * model.heads * model.head_dim
    products = model.layers * model.layer * tokens + supervised * model.hidden * model.vocab
    return looking + (6.0 * products if trainable is None else 4.0 * products + 6.0 * trainable * tokens)


def full_square(model: Shape, *, tokens: int, max_length: int, trainable: int | None = None) -> float:
    """torchtitan's convention: every token looks at `max_length` tokens and has logits."""
    squares = 2 * tokens * max_length
    return training(model, tokens=tokens, squares=squares, supervised=tokens, trainable=trainable)


@cache
def peak(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, or None: an unknown device gets no MFU, never a guess.

    The name is torch's, such as `NVIDIA H100 80GB HBM3`. A part of a device (MIG) has no peak here.
    """
    words = re.split(r"[ -]", device)
    if _OTHER_CHIP & set(words):
        return None
    fitting = [name for name in PEAK_BF16_FLOPS if words[: len(name.split())] == name.split()]
    return PEAK_BF16_FLOPS[max(fitting, key=len)] if fitting else None
