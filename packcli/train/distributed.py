"""Processes of one run, and the model laid out over them: from torchrun's environment, or just this one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from packcli import flops, memory
from packcli.config import TrainSpec
from packcli.errors import ConfigError
from packcli.memory import Dtype
from packcli.model.trainee import Trainee


@dataclass(frozen=True, slots=True)
class Processes:
    """`per_node`: processes on this machine."""

    rank: int
    world: int
    per_node: int
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

    def most(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.world == 1:
            return value
        found = torch.tensor([value], device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found.item())

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=group)
        return found

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def per_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def start(*, group: bool = False, timeout: timedelta | None = None, store: Any = None) -> Processes:
    """Join the processes torchrun describes (NCCL between GPUs, gloo between CPUs).

    `group`: have a process group even when there is one process. `timeout`: after which a collective that not all
    ranks reached is an error; unset, torch's default. `store`: where the ranks met, if they did.
    """
    world, gpu = world_size(), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if (world > 1 or group) and not dist.is_initialized():
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        if world == 1:
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
        elif store is not None:
            options |= {"store": store, "rank": rank(), "world_size": world}
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", **options)
    return Processes(rank=rank(), world=world, per_node=per_node(), device=device)


def wait_for_all() -> None:
    """Until every process of the run is here; at once when there is one."""
    if world_size() > 1:
        dist.barrier()


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


# The model ---------------------------------------------------------------------------------------------


def needs_group(dtype: str) -> bool:
    """Whether the model is sharded: several processes, or half precision (its casts are those of FSDP)."""
    return world_size() > 1 or dtype != "float32"


def lay_out(trainee: Trainee, spec: TrainSpec, dtype: Dtype, max_length: int, processes: Processes) -> int:
    """Put the model on its devices, in place: FSDP2, every decoder layer a unit, the rest one; plain for one fp32
    process. How many ranks share each parameter.

    Rank 0 holds the weights, the others the same module tree on the meta device: each unit is sent whole, then
    cut, so no rank ever holds more than one unit beside its shards.

    Masters and gradients stay float32; under bfloat16, FSDP computes with bf16 copies and reduces gradients in
    float32. A micro-batch's gradients are reduced and scattered at once: whole ones of a large model fit nowhere.

    Raises:
        ConfigError: `compile` with an attention that cannot be compiled.
    """
    if spec.compile and trainee.backend.name == "sdpa":
        raise ConfigError(
            "`train.compile` with attention by SDPA: document lengths are part of it, so each batch would be "
            "compiled anew",
            "leave `train.compile` out, or use a backend that a GPU has (docs/training.md)",
        )
    layers = decoder_layers(trainee.model)
    for layer in layers:
        layer.forward = _forward(layer, spec)
    if not needs_group(dtype):
        _receive(trainee, processes)
        return 1
    shape = flops.shape(trainee.model.config.to_dict())
    capacity = _capacity(processes)
    degree = memory.sharding(
        spec.sharding,
        shape,
        spec,
        world=processes.world,
        per_node=processes.per_node,
        capacity_bytes=capacity,
        dtype=dtype,
        max_length=max_length,
    )
    cast = torch.bfloat16 if dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32 if cast else None)
    mesh = _mesh(processes, degree)
    for layer in layers:
        _receive(layer, processes)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    _receive(trainee, processes)
    fully_shard(trainee, mesh=mesh, mp_policy=policy)
    return degree


def _mesh(processes: Processes, degree: int) -> DeviceMesh:
    """One dimension, or (replicas, shards) where parameters are shared by fewer ranks than there are."""
    if degree == processes.world:
        return init_device_mesh(processes.device.type, (degree,))
    shape = (processes.world // degree, degree)
    return init_device_mesh(processes.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _capacity(processes: Processes) -> float | None:
    """Of the smallest GPU: ranks that reckon with their own would lay the model out in different ways."""
    if processes.device.type != "cuda":
        return None
    least = torch.tensor([float(torch.cuda.get_device_properties(processes.device).total_memory)])
    if processes.world > 1:
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(least)


def decoder_layers(model: Any) -> list[Any]:
    """The blocks transformers itself says must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _receive(module: torch.nn.Module, processes: Processes) -> None:
    """Give every rank rank 0's tensors of `module`, on its device; what is sharded already is left alone.

    Tied weights of it stay one tensor. Nothing is remembered beyond it: FSDP frees a whole tensor that it has cut
    once nobody else holds it, and all layers of a large model fit nowhere.
    """
    made: dict[torch.Tensor, torch.Tensor] = {}
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for held in tables:
            for name, tensor in held.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if tensor not in made:
                    made[tensor] = _sent(tensor, processes)
                held[name] = made[tensor]


def _sent(tensor: torch.Tensor, processes: Processes) -> torch.Tensor:
    if processes.world == 1:
        fresh = tensor.detach().to(processes.device)
    elif processes.is_main:
        fresh = tensor.detach().to(processes.device).contiguous()
    else:
        fresh = torch.empty_like(tensor, device=processes.device, memory_format=torch.contiguous_format)
    if processes.world > 1:
        dist.broadcast(fresh, src=0)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(fresh, requires_grad=tensor.requires_grad)
    return fresh


def reduce_over_replicas(trainee: Any, last: bool) -> None:
    """Under hybrid sharding, sum gradients between replicas only after a step's last micro-batch."""
    if hasattr(trainee, "set_requires_all_reduce"):
        trainee.set_requires_all_reduce(last)


# Layers ------------------------------------------------------------------------------------------------

# Costly to compute again: products and attention. All else is element-wise.
_KEPT = (
    "aten.mm.default",
    "aten.addmm.default",
    "aten.bmm.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "torch_attn._varlen_attn.default",
    "flash_attn._flash_attn_varlen_forward.default",
    "flash_attn_3._flash_attn_forward.default",
)


def _forward(layer: Any, spec: TrainSpec) -> Any:
    """A layer's forward, its activations kept as asked, compiled if asked.

    Inside the hooks of FSDP, which must see each layer once: recomputing finds the weights already gathered.
    """
    forward = layer.forward
    match spec.checkpointing:
        case "full":
            forward = partial(checkpoint, forward, use_reentrant=False)
        case "selective":
            contexts = partial(create_selective_checkpoint_contexts, _policy)
            forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
    return torch.compile(forward) if spec.compile else forward


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = str(operator) in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
