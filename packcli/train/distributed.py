"""Processes of one run: from torchrun's environment, or just this one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Processes:
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: a decision all ranks share."""
        if self.world == 1:
            return flag
        vote = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return bool(vote.item())

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def start() -> Processes:
    """Join the process group torchrun describes (NCCL with a GPU, else gloo)."""
    world, gpu = world_size(), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
    return Processes(rank=rank(), world=world, device=device)


def wait_for_all() -> None:
    """Until every process of the run is here; at once when there is one."""
    if world_size() > 1:
        dist.barrier()


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: Any, processes: Processes) -> Any:
    """FSDP2: every decoder layer a unit of its own, the rest one; plain when there is one process."""
    model.to(processes.device)
    if processes.world > 1:
        from torch.distributed.fsdp import fully_shard

        for layer in _decoder_layers(model):
            fully_shard(layer)
        fully_shard(model)
    return model


def _decoder_layers(model: Any) -> list[Any]:
    """The blocks transformers itself says must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def sync_gradients(model: Any, processes: Processes, last: bool) -> None:
    """Reduce gradients only after a step's last micro-batch."""
    if processes.world > 1:
        model.set_requires_gradient_sync(last)
