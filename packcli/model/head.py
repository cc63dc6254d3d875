"""The output head and its cross entropy, at labels only."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from packcli.model.collate import Batch

Kind = Literal["own", "liger"]


def loss(model: Any, hidden: torch.Tensor, batch: Batch, kind: Kind = "own") -> torch.Tensor:
    """Weighted sum of cross entropies, fp32 scalar; `hidden` [N, D] of all slots."""
    logits: torch.Tensor = model.get_output_embeddings()(hidden[batch.predict]).float()
    if not len(batch.labels):
        return hidden.sum() * 0.0
    if batch.weights is None:
        return F.cross_entropy(logits, batch.labels, reduction="sum")
    return F.cross_entropy(logits, batch.labels, reduction="none") @ batch.weights
