"""The four ways to compute attention inside segments, each under the same description of a call.

All take query [1, H, N, D], key and value [1, K, N, D] with K a divisor of H, and return [1, H, N, D].
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Tensor = torch.Tensor

BLOCK = 128
"""Slots along each side of a block of a flex mask; torch's default."""


class Options(NamedTuple):
    """scale: of the scores (None: 1 / sqrt(D)). window: a slot sees itself and the window - 1 slots before it.
    softcap: scores become softcap * tanh(score / softcap).
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


class Flash(NamedTuple):
    """A flash-attn of one generation. `accepts`: its function's parameters with their defaults."""

    generation: int
    version: str
    function: Callable[..., Any]
    accepts: dict[str, Any]


# flash-attn ------------------------------------------------------------------------------------------------

# Generation -> module, distribution. FA3 (`hopper/` of Dao-AILab/flash-attention) is built from source.
_FLASH = {
    2: ("flash_attn", "flash-attn"),
    3: ("flash_attn_interface", "flash-attn-3"),
    4: ("flash_attn.cute", "flash-attn-4"),
}


def find_flash(capability: tuple[int, int]) -> Flash | None:
    """The best installed flash-attn that has kernels for a GPU of this compute capability."""
    # On Hopper FA3 goes before FA4, whose varlen kernels have not caught up there.
    generations = {9: (3, 4, 2), 10: (4, 2)}.get(capability[0], (2,))
    if capability < (8, 0):
        return None
    return next((found for generation in generations if (found := _import_flash(generation))), None)


def _import_flash(generation: int) -> Flash | None:
    module, distribution = _FLASH[generation]
    try:
        function = importlib.import_module(module).flash_attn_varlen_func
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None  # absent, or built for another torch
    accepts = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    if not {"window_size", "softmax_scale", "causal"} <= accepts.keys():
        return None  # before 2.3
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        version = f"{generation}"
    traceable = generation == 2 or (generation == 3 and hasattr(torch.ops.flash_attn_3, "_flash_attn_forward"))
    # A kernel that is no custom operator breaks the graph here instead of failing inside it.
    disable: Callable[..., Any] = torch.compiler.disable
    return Flash(generation, version, function if traceable else disable(function), accepts)


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    *,
    kernel: Flash,
    bounds: Tensor,
    longest: int,
    deterministic: bool,
) -> Tensor:
    """flash-attn 2, 3 or 4. `bounds` [S + 1] int32: where segments begin, on the device; `longest`: a bound."""
    extra: dict[str, Any] = {}
    if options.softcap is not None:
        extra["softcap"] = options.softcap
    if options.dropout:
        extra["dropout_p"] = options.dropout
    if deterministic:
        extra["deterministic"] = True
    if options.window is not None:
        extra["window_size"] = (options.window - 1, 0)
    out = kernel.function(
        *(_flat(tensor) for tensor in (query, key, value)),
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=options.scale,
        causal=True,
        **extra,
    )
    # FA4 and older FA3 return the log-sum-exp too.
    return _unflat(out[0] if isinstance(out, tuple) else out)


# torch's varlen --------------------------------------------------------------------------------------------


def _varlen_accepts() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


# Asked for once, as compiled code may not ask; and not without a GPU, where its import is a second lost.
VARLEN_ACCEPTS = _varlen_accepts() if torch.cuda.is_available() else frozenset[str]()
"""Parameters of torch's `varlen_attn`; empty where this torch has none, or no GPU."""


def varlen(query: Tensor, key: Tensor, value: Tensor, options: Options, *, bounds: Tensor, longest: int) -> Tensor:
    """torch's own varlen attention (flash-attn 2 inside torch).

    Its backward is deterministic under `torch.use_deterministic_algorithms(True)`.
    """
    from torch.nn.attention import varlen as module

    attend: Callable[..., Any] = module.varlen_attn  # its parameters differ between releases of torch
    window = (-1 if options.window is None else options.window - 1, 0)  # (-1, 0) is what it knows as causal
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in VARLEN_ACCEPTS else {}
    out = attend(
        *(_flat(tensor) for tensor in (query, key, value)),
        bounds,
        bounds,
        longest,
        longest,
        scale=options.scale,
        window_size=window,
        **grouped,
    )
    return _unflat(out)


def _flat(tensor: Tensor) -> Tensor:
    """[1, H, N, D] -> [N, H, D]: the layout the projections wrote, so nothing is copied."""
    return tensor[0].transpose(0, 1)


def _unflat(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)[None]


# flex ------------------------------------------------------------------------------------------------------


def block_mask(seen: Tensor) -> BlockMask:
    """The mask under which slot q sees slots seen[q] ... q; `seen` [N] int64 never falls.

    Made from one bound a row, not by trying all N^2 pairs as torch's `create_block_mask` does.
    """
    slots = len(seen)
    count = -(-slots // BLOCK)
    padding = torch.arange(slots, count * BLOCK, device=seen.device)
    rows = torch.cat([seen, padding])  # the kernel looks up to the end of the last block
    first, last = rows[::BLOCK] // BLOCK, rows[BLOCK - 1 :: BLOCK]
    block = torch.arange(count, device=seen.device)
    active = (block >= first[:, None]) & (block <= block[:, None])
    full = active & (block * BLOCK >= last[:, None]) & (block < block[:, None])

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= rows[query]) & (key <= query)

    return BlockMask.from_kv_blocks(
        *_ordered(active & ~full),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(slots, slots),
    )


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[Q, K] bool -> how many blocks of each row, and their numbers first; [1, 1, Q] and [1, 1, Q, K] int32."""
    numbers = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], numbers.int()[None, None]


def flex(query: Tensor, key: Tensor, value: Tensor, options: Options, *, mask: BlockMask) -> Tensor:
    """torch's flex attention; compiled on a GPU, where plain it would fill an N x N matrix."""
    capped: Callable[..., Tensor] | None = None
    if options.softcap is not None:
        cap = options.softcap

        def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return cap * torch.tanh(score / cap)

    compiling = torch.compiler.is_compiling() or query.device.type == "cpu"
    function = flex_attention if compiling else _compiled_flex()
    out: Tensor = function(
        query,
        key,
        value,
        score_mod=capped,
        block_mask=mask,
        scale=options.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


# SDPA, the reference ---------------------------------------------------------------------------------------


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    *,
    sizes: Sequence[int],
    masks: Sequence[Tensor | None],
    batched: bool,
) -> Tensor:
    """torch's scaled_dot_product_attention, run after run of `sizes` slots; at once where equal (`batched`).

    `masks`: [T, T] bool of each run, None: causal; one for all where `batched`.
    """
    if batched:
        query, key, value = (_folded(tensor, len(sizes)) for tensor in (query, key, value))
        out = _one(query, key, value, masks[0], options)
        return out.transpose(0, 1).reshape(1, out.shape[1], -1, out.shape[3])
    runs = (torch.split(tensor, list(sizes), dim=2) for tensor in (query, key, value))
    parts = [_one(q, k, v, mask, options) for q, k, v, mask in zip(*runs, masks, strict=True)]
    return torch.cat(parts, dim=2)


def _folded(tensor: Tensor, batch: int) -> Tensor:
    """[1, H, B*T, D] -> [B, H, T, D]"""
    _, heads, slots, dim = tensor.shape
    return tensor.view(heads, batch, slots // batch, dim).transpose(0, 1)


def _one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    if options.softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=options.dropout,
            scale=options.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    # No kernel of SDPA caps scores: written out as transformers' own Gemma-2 does.
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (options.scale or query.shape[-1] ** -0.5)
    scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return F.dropout(weights, options.dropout) @ value
