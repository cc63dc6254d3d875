"""The output head and its cross entropy: logits only where there is a label, and never all of them at once.

Whole logits of a 128K vocabulary would be the largest tensor of a run by far. Here labels go in chunks; each
chunk's gradients are computed in the forward pass, while its logits exist, and wait for the backward pass already
summed (as in mgmalek/efficient_cross_entropy and liger-kernel). So the three matrix products of the head happen
once each, for labels only, and memory is one chunk of logits and the weight's gradient.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch

from packcli.errors import ConfigError, MissingError
from packcli.model.collate import Batch

Kind = Literal["own", "liger"]

# fp32 logits alive at once. On a CPU less is slower (the weight's gradient is read and written once a chunk) and
# more gains nothing (docs/benchmarks.md). For a GPU an estimate, not measured: its products need some 2,000 rows
# to be worth that traffic, and 2,048 labels of a vocabulary of 128K are 1 GiB.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}


@dataclass(frozen=True, slots=True)
class Shaping:
    """What a model does to the head's logits z: `cap * tanh(scale * z / cap)`; without a cap, `scale * z`."""

    scale: float = 1.0
    cap: float | None = None


def shaping(config: Any) -> Shaping:
    """Of a transformers config: Cohere, Falcon-H1, Granite and HyperCLOVA X scale; Gemma and others cap.

    A model that does yet something else is found by the start-up probe, which compares with its own logits.
    """
    config = config.get_text_config()
    scale = 1.0
    for key in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        if (value := getattr(config, key, None)) is not None:
            # Granite divides by what HyperCLOVA X, under the same name, multiplies by.
            scale *= 1 / value if key == "logits_scaling" and config.model_type != "hyperclovax" else value
    caps = (getattr(config, key, None) for key in ("final_logit_softcapping", "logits_soft_cap"))
    return Shaping(scale, next((cap for cap in caps if cap is not None), None))


def check(model: Any, kind: Kind, *, weighted: bool, device: torch.device) -> None:
    """Refuse before training what `loss` could not do right. `weighted`: labels count differently.

    Raises:
        ConfigError: the head is no plain linear layer, or liger-kernel's loss cannot be used for this run.
        MissingError: liger-kernel or triton is not installed.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        raise ConfigError(
            f"the model's output head is a {type(head).__name__}, not a plain linear layer",
            "leave the head out of `train.lora.targets`, or use a model with a plain head",
        )
    if kind == "own":
        return
    own = "set `train.head: own`"
    if device.type == "cpu":
        raise ConfigError("`train.head: liger` needs a GPU", own)
    if weighted:
        raise ConfigError("`train.head: liger` cannot weight labels, as this arm's loss does", own)
    if shaping(model.config).scale != 1.0:
        raise ConfigError("`train.head: liger` cannot scale logits, as this model does", own)
    if missing := [name for name in ("liger_kernel", "triton") if importlib.util.find_spec(name) is None]:
        raise MissingError(
            f"`train.head: liger`: no package {' and '.join(missing)}", "pip install 'packcli[liger]'"
        )


def loss(model: Any, hidden: torch.Tensor, batch: Batch, kind: Kind = "own") -> torch.Tensor:
    """Weighted sum of cross entropies over the batch's labels, fp32 scalar (float64 for float64 weights).

    hidden [N, D] of all slots. Matrix products are in the weight's dtype, or autocast's; the rest in fp32. Without
    labels it is a zero that still carries zero gradients to `hidden` and to the head: a sharded run has
    collectives that every rank must join. Call it where the head's weight is whole: in the sharded root's forward.
    """
    head = model.get_output_embeddings()
    device, dtype = hidden.device.type, head.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if kind == "liger" and len(batch.labels):
        return _liger(hidden, head, batch, shaping(model.config).cap, dtype)
    inputs = _Inputs(batch.predict, batch.labels, batch.weights, shaping(model.config), dtype)
    if not torch.is_grad_enabled():  # validation: no gradient work at all
        return _run(inputs, hidden, head.weight, head.bias, (False, False, False))[0]
    return _Loss.apply(hidden, head.weight, head.bias, inputs)  # type: ignore[no-untyped-call,no-any-return]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What has no gradient. `predict` are distinct slots; `dtype`: of the matrix products."""

    predict: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor | None
    shaping: Shaping
    dtype: torch.dtype


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, inputs: _Inputs
    ) -> torch.Tensor:
        total, gradients = _run(inputs, hidden, weight, bias, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Rounded once, after scaling: until here the gradients of weight and bias are fp32.
        scaled = [
            None if kept is None else torch.mul(kept, upstream, out=torch.empty_like(kept, dtype=dtype))
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)


def _run(
    inputs: _Inputs,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The loss, and its gradients by hidden, weight and bias where `needs` asks for them."""
    precise = torch.promote_types(inputs.dtype, torch.float32)
    losses = torch.empty(len(inputs.labels), dtype=precise, device=hidden.device)
    grad_hidden = torch.zeros_like(hidden, dtype=inputs.dtype) if needs[0] else None
    grad_weight = grad_bias = None
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
    size = max(1, min(budget // (weight.shape[0] * precise.itemsize), len(losses)))
    with torch.autocast(hidden.device.type, enabled=False):
        cast = weight.detach().to(inputs.dtype)
        # One piece of memory for all chunks: on a CPU, fresh pages for each make product and softmax slower.
        memory = torch.empty(size, len(cast), dtype=inputs.dtype, device=hidden.device)
        for start in range(0, max(1, len(losses)), size):  # without labels one empty chunk: zero gradients
            chunk = slice(start, start + size)
            slots, labels = inputs.predict[chunk], inputs.labels[chunk]
            rows = hidden.detach().index_select(0, slots).to(inputs.dtype)
            product = torch.mm(rows, cast.T, out=memory[: len(rows)])
            logits = product.to(precise)  # in fp32 the same memory
            if bias is not None:
                logits += bias.detach()
            factor = None if inputs.weights is None else inputs.weights[chunk]
            losses[chunk] = _cross_entropy(logits, labels, factor, inputs.shaping, any(needs))
            if needs[2]:
                grad_bias = logits.sum(0) if grad_bias is None else grad_bias + logits.sum(0)
            grad = logits if logits is product else product.copy_(logits)
            if grad_hidden is not None:
                grad_hidden.index_copy_(0, slots, grad @ cast)
            if needs[1]:
                grad_weight = _accumulate(grad_weight, grad.T, rows, precise)
    return losses.sum(), [grad_hidden, grad_weight, grad_bias]


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, shape: Shaping, needs_grad: bool
) -> torch.Tensor:
    """Weighted losses [C]. Overwrites the head's `logits` [C, V], with the losses' gradient if it is needed."""
    if shape.scale != 1.0:
        logits *= shape.scale
    slope = None
    if shape.cap is not None:
        logits.div_(shape.cap).tanh_()
        slope = 1 - logits.square() if needs_grad else None
        logits *= shape.cap
    at_label = labels[:, None]
    logits -= logits.amax(1, keepdim=True)
    target = logits.gather(1, at_label)
    total = logits.exp_().sum(1, keepdim=True)
    losses = (total.log() - target)[:, 0]
    if weights is not None:
        losses = losses * weights
    if needs_grad:
        each = torch.ones_like(total) if weights is None else weights.to(total.dtype)[:, None]
        logits *= each / total
        logits.scatter_add_(1, at_label, -each)
        if slope is not None:
            logits *= slope
        if shape.scale != 1.0:
            logits *= shape.scale
    return losses


def _accumulate(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, precise: torch.dtype
) -> torch.Tensor:
    """total + left @ right in `precise`. Half-precision products keep fp32 sums only where CUDA offers it."""
    if left.dtype == precise:
        return left @ right if total is None else total.addmm_(left, right)
    if left.device.type == "cuda":
        if total is None:
            return torch.mm(left, right, out_dtype=precise)
        return torch.addmm(total, left, right, out_dtype=precise, out=total)
    product = (left @ right).to(precise)
    return product if total is None else total.add_(product)


def _liger(hidden: torch.Tensor, head: Any, batch: Batch, cap: float | None, dtype: torch.dtype) -> torch.Tensor:
    """liger-kernel's loss (0.8): fused_linear_cross_entropy.py, `LigerFusedLinearCrossEntropyFunction.forward`."""
    from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore[import-not-found,unused-ignore]
        LigerFusedLinearCrossEntropyFunction,
    )

    rows = hidden.index_select(0, batch.predict).to(dtype)
    options = (None, -100, 0.0, 0.0, "sum", cap, False, torch.float32)  # ce_weight ... accum_dtype, by position
    total, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        rows, head.weight.to(dtype), batch.labels, head.bias, *options
    )
    return total  # type: ignore[no-any-return,unused-ignore]
