"""Attention that never crosses a segment, registered with transformers as `packcli`.

Nothing is inferred from positions or masks: the model call passes `segments=Segments(...)`, and a model that
loses it on the way fails at the first layer. (transformers infers a document mask by itself when it sees
reset `position_ids`; passing no mask and our own attention name turns that off.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "packcli"
# Below this many slots one dense mask beats a loop over short documents; above, the loop does not pay for
# the blocks it skips (docs/benchmarks.md).
DENSE_SLOTS = 1024


class Segments:
    """Lengths of the runs of slots within which attention is causal; the mask is built once per batch."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self.equal = len(set(lengths)) == 1
        self._mask: torch.Tensor | None = None

    def mask(self, device: torch.device) -> torch.Tensor:
        """[N, N] bool: query may see key."""
        if self._mask is None:
            sizes = torch.tensor(self.lengths, device=device)
            owner = torch.repeat_interleave(torch.arange(len(self.lengths), device=device), sizes)
            self._mask = (owner[:, None] == owner[None, :]).tril()
        return self._mask


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
    slots = query.shape[2]
    if segments.equal:
        out = _batched(query, key, value, len(segments.lengths), options)
    elif slots <= DENSE_SLOTS:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=segments.mask(query.device), **options)
    else:
        parts = zip(
            *(torch.split(tensor, list(segments.lengths), dim=2) for tensor in (query, key, value)), strict=True
        )
        out = torch.cat(
            [F.scaled_dot_product_attention(q, k, v, is_causal=True, **options) for q, k, v in parts], dim=2
        )
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
