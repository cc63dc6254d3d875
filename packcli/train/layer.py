"""One decoder layer of the model to be trained, computed before the model is there."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from packcli.model import attention, load
from packcli.model.collate import Batch
from packcli.model.trainee import Trainee
from packcli.plan import TrainOrder
from packcli.seeds import integer
from packcli.train import distributed, transfers

_SLOTS = 4096
_REPEATS = 5
_COMPUTE_S = 5.0
"""No further repeat after this: a large layer on a CPU takes seconds."""


def layer_step(order: TrainOrder, device: torch.device) -> tuple[float, list[list[torch.Tensor]]]:
    """(median seconds, [[hidden states], gradients of the layer's weights]) of the model's first decoder layer."""
    spec, dtype = order.train, getattr(torch, order.model.dtype)
    model = load.skeleton(order.model)
    _keep_one_layer(model)
    torch.manual_seed(integer(order.seed, "init"))
    _fill(model, device, dtype)
    backend = attention.choose(
        spec.attention_backend, device, dtype, deterministic=spec.deterministic, config=model.config
    )
    trainee = Trainee(model, backend)
    slots = min(order.max_length, _SLOTS)
    ids = (torch.arange(slots, device=device) * 7 + 3) % model.get_input_embeddings().weight.shape[0]
    none = ids[:0]
    batch = Batch(ids[None], torch.arange(slots, device=device)[None], (slots,), none, none)
    hidden = torch.empty(0)
    weights = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
    # Not their sum of squares, which the last norm makes almost constant.
    direction = torch.randn_like(trainee(batch, "hidden"))

    def once() -> None:
        nonlocal hidden
        trainee.zero_grad(set_to_none=True)
        hidden = trainee(batch, "hidden")
        hidden.backward(direction)

    times: list[float] = []
    while len(times) <= _REPEATS and (len(times) < 2 or sum(times) < _COMPUTE_S):
        times.append(transfers.timed(once, device))
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return statistics.median(times[1:]), [[hidden.detach()], gradients]


def _keep_one_layer(model: Any) -> None:
    first, *_ = layers = distributed.decoder_layers(model)
    for part in model.modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == len(layers) and part[0] is first:
            del part[1:]
            return


def _fill(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Seeded random weights for all but the head; norms are 1, the embedding has no gradient."""
    embedding = model.get_input_embeddings()
    for part in model.base_model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                weight = torch.empty(parameter.shape, device=device, dtype=dtype)
                weight = weight.fill_(1.0) if weight.dim() < 2 else weight.normal_(std=0.02)
                part._parameters[name] = torch.nn.Parameter(weight, requires_grad=part is not embedding)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
