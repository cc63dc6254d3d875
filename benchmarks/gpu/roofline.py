"""What a step cannot beat: its own matrix products, attention calls and unavoidable traffic, each timed alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from documents import MICRO_BATCHES, Shape, Work, filled
from timing import emit, spread, timed
from transformers import AutoModelForCausalLM

from packcli.model import attention, configs, head
from packcli.model.attention import Backend, Segments

Tensors = list[torch.Tensor]
HALF = torch.bfloat16


def inputs(shape: Shape, slots: int, device: torch.device, seed: int = 0) -> Tensors:
    """Query, key, value [1, H, N, D] as projections lay them out, and the gradient of the output [1, N, H, D]."""
    sizes, generator = shape.counted, torch.Generator(device).manual_seed(seed)

    def drawn(heads: int) -> torch.Tensor:
        return torch.randn(1, slots, heads, sizes.head_dim, generator=generator, device=device).to(HALF)

    query, key, value, out = map(drawn, (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads))
    return [*(tensor.transpose(1, 2) for tensor in (query, key, value)), out]


def forward(tensors: Tensors, lengths: tuple[int, ...], backend: Backend) -> tuple[torch.Tensor, Tensors]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    segments = Segments(lengths, backend, tensors[0].device)
    out, _ = attention.forward(torch.nn.Module(), *leaves, None, segments=segments)
    return out, leaves


def random_model(config: dict[str, Any], device: torch.device) -> Any:
    """Float32, initialised by transformers, N(0, 0.02): products of zeros would run faster than real ones."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            configs.build(config), dtype=torch.float32, attn_implementation=attention.NAME
        )


def product_s(slots: int, width: int, out: int, device: torch.device) -> dict[str, float]:
    """Forward, by the input, by the weight: the three products of one linear layer, seconds each."""
    rows, weight, gradient = (
        torch.randn(*size, device=device, dtype=HALF) for size in ((slots, width), (out, width), (slots, out))
    )
    calls = {
        "forward": lambda: rows @ weight.T,
        "by_input": lambda: gradient @ weight,
        "by_weight": lambda: gradient.T @ rows,
    }
    return {name: spread(timed(call, device))["ms"] / 1e3 for name, call in calls.items()}


def copy_bytes_per_s(device: torch.device) -> float:
    """Read and written."""
    size = 1 << (30 if device.type == "cuda" else 24)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / (spread(timed(partial(target.copy_, source), device))["ms"] / 1e3)


def attention_call_s(shape: Shape, lengths: tuple[int, ...], chosen: Backend, device: torch.device) -> float:
    """Forward and backward of one layer's attention."""
    tensors = inputs(shape, sum(lengths), device)
    out, leaves = forward(tensors, lengths, chosen)
    backward = partial(torch.autograd.grad, out, leaves, tensors[3], retain_graph=True)
    ahead = partial(forward, tensors, lengths, chosen)
    return sum(spread(timed(call, device, budget_s=0.03))["ms"] / 1e3 for call in (ahead, backward))


def roofline(shape: Shape, found: Work, state: str, device: torch.device) -> None:
    """One step of `best_fit` as the sum of its own products, attention calls and unavoidable traffic."""
    sizes, slots = shape.counted, shape.slots
    hidden, wide, narrow = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    layers = {
        "q": (hidden, wide, 1), "k, v": (hidden, narrow, 2), "o": (wide, hidden, 1),
        "gate, up": (hidden, sizes.intermediate, 2), "down": (sizes.intermediate, hidden, 1),
    }  # fmt: skip
    rates, products_s = {}, 0.0
    for name, (width, out, count) in layers.items():
        took = product_s(slots, width, out, device)
        products_s += count * sum(took.values()) * sizes.layers * MICRO_BATCHES
        rates[name] = {way: 2 * slots * width * out / seconds / 1e12 for way, seconds in took.items()}

    labels = int(sum(found.rows.supervised[rows].sum() for rows in found.steps)) / len(found.steps)
    chunk = max(1, head.CHUNK_BYTES[device.type] // (4 * sizes.vocab))
    took = product_s(chunk, hidden, sizes.vocab, device)
    rates["head"] = {way: 2 * chunk * hidden * sizes.vocab / s / 1e12 for way, s in took.items()}
    head_s = labels / chunk * sum(took.values())

    chosen = attention.choose("auto", device, HALF)
    attention_s = sum(
        sizes.layers * attention_call_s(shape, filled(found.segments(rows), slots), chosen, device)
        for rows in found.micro_batches(0)
    )
    bandwidth = copy_bytes_per_s(device)
    parameters = sum(p.numel() for p in _meta(shape).parameters())
    moment = 4 if state == "float32" else 2
    # The norm reads gradients once; AdamW reads weight, gradient and moments, and writes weight and moments.
    # The head writes fp32 logits and reads them once.
    traffic = parameters * (4 + 4 + 4 + 2 * moment + 4 + 2 * moment) + labels * sizes.vocab * 8
    traffic_s = traffic / bandwidth
    emit(
        "roofline",
        shape=shape.name,
        layers=sizes.layers,
        backend=chosen.name,
        products_s=products_s,
        head_s=head_s,
        attention_s=attention_s,
        traffic_s=traffic_s,
        total_s=products_s + head_s + attention_s + traffic_s,
        copy_bytes_per_s=bandwidth,
        product_tflops=rates,
        parameters=parameters,
    )


def _meta(shape: Shape) -> Any:
    return random_model(shape.config, torch.device("meta"))
