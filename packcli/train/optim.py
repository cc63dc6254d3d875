"""AdamW groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch

from packcli.config import TrainSpec


def optimizer(model: Any, train: TrainSpec, *, fused: bool) -> torch.optim.AdamW:
    """AdamW; weight decay falls on matrices only, as transformers' Trainer has it (eps 1e-8)."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=train.lr, betas=train.betas, fused=fused or None
    )


def lr_at(step: int, steps: int, train: TrainSpec) -> float:
    """The learning rate of update `step` (from 0) of `steps`.

    The schedules of transformers (`get_cosine_schedule_with_warmup` and its kin), so that equal settings mean
    equal runs: warm-up takes ceil(warmup_ratio x steps) updates and starts at 0.
    """
    warmup = math.ceil(train.warmup_ratio * steps)
    if step < warmup:
        return train.lr * step / max(1, warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    match train.schedule:
        case "constant":
            return train.lr
        case "linear":
            return train.lr * max(0.0, 1 - progress)
        case "cosine":
            return train.lr * 0.5 * (1 + math.cos(math.pi * progress))
