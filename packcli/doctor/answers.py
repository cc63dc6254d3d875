"""What torch says of GPUs, and a training's start-up probe: asked in a process of its own (`elsewhere.py`)."""

from __future__ import annotations

from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM

from packcli.config import ARMS, ArmSpec, TrainSpec
from packcli.doctor.computing import NEED_A_GPU
from packcli.errors import ConfigError, RunError
from packcli.memory import Dtype
from packcli.model import attention, configs, head, probe
from packcli.model.trainee import Trainee
from packcli.train import distributed

_VOCABULARY = 97
_LAYER = {
    "model_type": "llama", "vocab_size": _VOCABULARY, "hidden_size": 256, "intermediate_size": 256,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_STRONGER = 8
"""So many times transformers' weights of 0.02: under those attention is nearly uniform, and faults in it small."""


def facts() -> dict[str, Any]:
    """What torch says of itself and of GPUs. `refusals`: why an attention backend cannot run; None: it can."""
    error = ""
    if torch.version.cuda or torch.version.hip:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as caught:
            error = str(caught).strip().partition("\n")[0]
    count = 0 if error else torch.cuda.device_count()
    cards = [
        {"name": torch.cuda.get_device_name(card), "capability": torch.cuda.get_device_capability(card)}
        for card in range(count)
    ]
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "error": error,
        "gpus": cards,
        "kernels": torch.cuda.get_arch_list() if cards else [],
        "nccl": _nccl_version() if cards else None,
        "refusals": _refusals() if cards else dict.fromkeys(NEED_A_GPU, "no GPU"),
    }


def _nccl_version() -> str:
    found: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, found))


def _refusals() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in get_args(attention.Name):
        try:
            attention.choose(name, torch.device("cuda", 0), torch.bfloat16)
            found[name] = None
        except ConfigError as error:
            found[name] = error.cause.partition(" cannot run here: ")[2]
    return found


def attend(name: str, kind: Any) -> dict[str, Any]:
    """The start-up probe of a training, on one layer with random weights."""
    dtype: Dtype = "bfloat16" if _computes_in_half() else "float32"
    processes = distributed.start(group=distributed.needs_group(dtype))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs.build(_LAYER), attn_implementation=attention.NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(_STRONGER)
    head.check(model, kind, weighted=False, device=processes.device)
    backend = attention.choose(name, processes.device, getattr(torch, dtype), config=model.config)
    trainee = Trainee(model, backend, kind)
    distributed.lay_out(trainee, TrainSpec(steps=1, lr=1e-3, global_batch=1), dtype, 128, processes)
    said = {"version": f"{name} {backend.version}", "dtype": dtype, "device": processes.device.type}
    try:
        found = probe.check(trainee, ArmSpec.model_validate(ARMS["best_fit"]), _VOCABULARY)
    except RunError as error:
        return {**said, "failed": error.cause, "parity": None, "parity_unpacked": None}
    finally:
        distributed.finish()
    return {**said, "failed": "", "parity": found.parity, "parity_unpacked": found.parity_unpacked}


def _computes_in_half() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
