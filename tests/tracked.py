"""Run by `test_memory.py`: one sharded step of tensors without storage, and the bytes torch's tracker counts.

argv: layers, checkpointing, slots, hidden size, feed-forward width. Rank 0 of 32; a Llama with heads of 128.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from packcli import flops, memory
from packcli.config import TrainSpec
from packcli.model import attention, head
from packcli.model.collate import Batch
from packcli.model.trainee import Trainee
from packcli.train import distributed

WORLD, CPU = 32, torch.device("cpu")


def causal(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[torch.Tensor, None]:
    """Attention as a GPU's kernels keep it: ours cuts segments on a CPU, by values that are not there."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def accumulate(total: Any, left: torch.Tensor, right: torch.Tensor, precise: torch.dtype) -> torch.Tensor:
    """The head's sum as CUDA computes it: in place, without the CPU's copies."""
    return torch.empty(left.shape[0], right.shape[1], dtype=precise) if total is None else total


def main() -> None:
    layers, checkpointing, slots, hidden, intermediate = (
        int(text) if text.isdigit() else text for text in sys.argv[1:]
    )
    AttentionInterface.register("causal", causal)
    head._accumulate = accumulate
    head.CHUNK_BYTES["cpu"] = head.CHUNK_BYTES["cuda"]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    processes = distributed.Processes(rank=0, world=WORLD, per_node=WORLD, device=CPU)
    mesh = distributed._mesh(processes, WORLD)
    distributed._mesh = lambda *_: mesh  # a mesh reads its ranks, which no fake tensor has
    spec = TrainSpec(epochs=1, lr=1e-5, global_batch=WORLD, checkpointing=checkpointing, sharding="full")
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=8,
        intermediate_size=intermediate,
        vocab_size=128256,
        max_position_embeddings=1 << 14,
    )
    config._attn_implementation = "causal"
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainee = Trainee(LlamaForCausalLM(config), attention.choose("sdpa", CPU, torch.float32))
        distributed.lay_out(trainee, spec, "bfloat16", slots, processes)
        trainee.train()
        every = torch.arange(slots)
        batch = Batch(every[None], every[None], (slots,), predict=every, labels=every)
        tracker = FSDPMemTracker(trainee, None)
        tracker.track_inputs(())
        with tracker:
            trainee(batch).backward()
            tracker.reset_mod_stats()  # the second time the shards' gradients are there
            trainee(batch).backward()
        peak = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    setup = memory.Setup(
        shape=flops.shape(config.to_dict()),
        train=spec,
        dtype="bfloat16",
        max_length=slots,
        world=WORLD,
        degree=WORLD,
    )
    unseen = ("outside torch", "optimizer states")
    ours = sum(part.bytes for part in memory.fullest(setup)[1] if part.name not in unseen)
    print(json.dumps({"torch": peak, "ours": ours}))


main()
