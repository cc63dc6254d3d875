"""Attention that never crosses a segment, registered with transformers as `packcli`.

Nothing is inferred from positions or masks: the model call passes `segments=Segments(...)`, and a model that
loses it on the way fails at the first layer. (transformers infers a document mask by itself when it sees
reset `position_ids`; passing no mask and our own attention name turns that off.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "packcli"


@dataclass(frozen=True, slots=True)
class Backend:
    """What computes attention. `why`: how it was chosen, for the user."""

    name: Literal["flash", "varlen", "flex", "sdpa"]
    version: str
    why: str
    deterministic: bool = False


def choose(wanted: str, device: torch.device, dtype: torch.dtype, *, deterministic: bool = False) -> Backend:
    """The first that this machine has of flash, varlen, flex, sdpa; or the one `wanted`."""
    return Backend("sdpa", torch.__version__, "per-document SDPA: no GPU", deterministic)


class Segments:
    """Lengths of the runs of slots within which attention is causal; they sum to the batch's slots."""

    def __init__(self, lengths: tuple[int, ...], backend: Backend, device: torch.device) -> None:
        self.lengths = lengths
        self.backend = backend
        self.equal = len(set(lengths)) == 1


def forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment.

    query [1, H, N, D], key and value [1, K, N, D] with K a divisor of H; returns [1, N, H, D].
    """
    if attention_mask is not None:
        raise RuntimeError("packcli attention got a mask: segments are the one truth about boundaries")
    if getattr(module, "sliding_window", None):
        raise RuntimeError("packcli attention does not know sliding windows")
    options: dict[str, Any] = {
        "dropout_p": dropout if module.training else 0.0,
        "scale": scaling,
        "enable_gqa": key.shape[1] != query.shape[1],
    }
    if segments.equal:
        out = _batched(query, key, value, len(segments.lengths), options)
    else:
        # Not one call with a dense mask: on a CPU that is 2 to 3 times slower at 512 slots, 7 to 13 at 2,048
        # (docs/benchmarks.md), because it computes what it masks away.
        split = (torch.split(tensor, list(segments.lengths), dim=2) for tensor in (query, key, value))
        parts = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
            for q, k, v in zip(*split, strict=True)
        ]
        out = torch.cat(parts, dim=2)
    return out.transpose(1, 2).contiguous(), None


def _batched(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: int, options: dict[str, Any]
) -> torch.Tensor:
    """Segments of one length as a batch: [1, H, B*T, D] -> [B, H, T, D] and back."""

    def split(tensor: torch.Tensor) -> torch.Tensor:
        _, heads, slots, dim = tensor.shape
        return tensor.view(heads, batch, slots // batch, dim).transpose(0, 1)

    out = F.scaled_dot_product_attention(split(query), split(key), split(value), is_causal=True, **options)
    return out.transpose(0, 1).reshape(1, out.shape[1], -1, out.shape[3])


AttentionInterface.register(NAME, forward)
