"""Model FLOPs of a training run, and the dense peaks to hold them against. Pure.

Counted: matrix multiplications forward and backward (3 x the forward's 2 x m x n x k); attention as masked,
that is half of sum(length^2) over the segments attention may look at; the output head where it is computed, at
supervised positions. Not counted: recomputation, softmax, norms, the optimizer. `full_square` gives the
convention of torchtitan instead (attention over T^2, the head at every token), to compare printed figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PEAK_BF16_FLOPS = {  # dense, per device; vendors' data sheets
    "NVIDIA A100": 312e12,
    "NVIDIA A800": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H800": 989e12,
    "NVIDIA H200": 989e12,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense Llama-like decoder with a gated feed-forward block."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


def shape(config: Mapping[str, Any], vocab: int | None = None) -> Shape | None:
    """The shape a transformers config describes, or None when it is not a dense decoder we can count."""
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        found = Shape(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(vocab or config["vocab_size"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
    return (
        None if any(key in config for key in ("num_experts", "num_local_experts", "n_routed_experts")) else found
    )


def training(model: Shape, *, tokens: int, squares: int, supervised: int) -> float:
    """FLOPs of forward and backward over `tokens`, whose segments' lengths squared sum to `squares`."""
    attention = model.hidden * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    layer = attention + 3 * model.hidden * model.intermediate
    # Scores and values: two products of length^2 x heads x head_dim each, half of it masked away.
    looking = 2 * squares / 2 * model.heads * model.head_dim
    return 6.0 * (model.layers * (layer * tokens + looking) + supervised * model.hidden * model.vocab)


def full_square(model: Shape, *, tokens: int, max_length: int) -> float:
    """torchtitan's convention: every token looks at `max_length` tokens and has logits."""
    return training(model, tokens=tokens, squares=2 * tokens * max_length, supervised=tokens)


def peak(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, or None: an unknown device gets no MFU, never a guess."""
    return next((value for name, value in PEAK_BF16_FLOPS.items() if device.startswith(name)), None)
