"""AdamW, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from packcli.config import TrainSpec


def optimizer(model: Any, train: TrainSpec, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW; weight decay falls on matrices only, as transformers' Trainer has it (eps 1e-8)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if train.optimizer_state == "bfloat16":
        return LeanAdamW(groups, lr=train.lr, betas=train.betas)
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=fused or None)


class LeanAdamW(torch.optim.Optimizer):
    """AdamW whose two moments are kept in bfloat16: 4 bytes a parameter instead of 8.

    The update is float32. A moment moves by 1 - beta of itself a step, for beta2 = 0.999 less than half the
    distance of two bfloat16 numbers: rounded to nearest it would stand still. So it is rounded up or down at
    random, in proportion, which is exact on average. (The loop seeds the generator each step.)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                _update(
                    _local(parameter),
                    _local(parameter.grad),
                    _local(state["exp_avg"]),
                    _local(state["exp_avg_sq"]),
                    int(state["step"]),
                    group,
                )


def _update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    step: int,
    group: dict[str, Any],
) -> None:
    beta1, beta2 = group["betas"]
    mean = first.float().lerp_(gradient.float(), 1 - beta1)
    square = second.float().mul_(beta2).addcmul_(gradient.float(), gradient.float(), value=1 - beta2)
    first.copy_(stochastic(mean))
    second.copy_(stochastic(square))
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    root = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    parameter.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))


def stochastic(value: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16, up or down at random so that the mean is the value: the low 16 bits are the odds."""
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)


def _local(tensor: Any) -> torch.Tensor:
    """The part of a sharded tensor that lies here."""
    found: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found


def lr_at(step: int, steps: int, peak: float, train: TrainSpec) -> float:
    """The learning rate of update `step` (from 0) of `steps`, `peak` after warm-up.

    The schedules of transformers (`get_cosine_schedule_with_warmup` and its kin), so that equal settings mean
    equal runs: warm-up takes ceil(warmup_ratio x steps) updates and starts at 0.
    """
    warmup = train.warmup_steps if train.warmup_steps is not None else math.ceil(train.warmup_ratio * steps)
    if step < warmup:
        return peak * step / max(1, warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    match train.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * max(0.0, 1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
