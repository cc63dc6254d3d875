"""Attention that never crosses a segment, registered with transformers as `packcli`.

Nothing is inferred from positions or masks: the model call passes `segments=Segments(...)`, and a model that
loses it on the way is refused at its first layer.

The name is not registered for masks, on purpose: then transformers makes none at all. (It would infer a document
mask by itself from reset positions, and to look at them waits for the device in every forward pass.)
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from transformers import AttentionInterface

from packcli.errors import ConfigError
from packcli.model import backends
from packcli.model.backends import BLOCK, Flash, Options, block_mask

NAME = "packcli"
Name = Literal["flash", "varlen", "flex", "sdpa"]

_FA4_HEAD = 128
_TOGETHER = 64
"""Neighbouring segments that fill no more slots than this share one call with a small mask: on a CPU a call costs
more than the masked scores (docs/benchmarks.md)."""

_INERT = frozenset({"position_ids", "use_cache", "cache_position", "logits_to_keep"})
"""What models hand to attention that changes nothing in it."""

_INSTALL = {
    "flash": "pip install 'packcli[flash]' on a machine with CUDA, or set `train.attention_backend: auto`; "
    "`packcli doctor` tries every backend",
    "varlen": "use a GPU, torch >= 2.11 and `model.dtype: bfloat16`, or set `train.attention_backend: auto`",
    "flex": "use an NVIDIA GPU and a torch that comes with triton, or set `train.attention_backend: auto`",
}


# The choice ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Backend:
    """What computes attention. `why`: how it was chosen, for the user.

    dtype           what the kernel computes in; None: whatever it is given.
    deterministic   asked for, and had: by the kernel's own flag (flash), by torch's global one (varlen, sdpa),
                    or because it adds nothing up in random order (flex).
    """

    name: Name
    version: str
    why: str
    deterministic: bool = False
    dtype: torch.dtype | None = None
    flash: Flash | None = field(default=None, repr=False, compare=False)


def choose(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    deterministic: bool = False,
    config: Any = None,
) -> Backend:
    """The first of flash, varlen, flex, sdpa that can run this model here; or the one `wanted`.

    `dtype`: what the model computes in. `config`: its transformers config; without, only the machine is asked.

    Raises:
        ConfigError: the one wanted cannot run.
    """
    reasons: dict[Name, str] = {}
    for name in get_args(Name):
        if wanted not in ("auto", name):
            continue
        refusal, kernel = _refusal(name, device, dtype, deterministic, Needs.of(config))
        if refusal is None:
            half = dtype if name in ("flash", "varlen") else None
            version = f"{kernel.generation} ({kernel.version})" if kernel else torch.__version__
            return Backend(name, version, _why(wanted, reasons), deterministic, half, kernel)
        reasons[name] = refusal
    raise ConfigError(
        f"`train.attention_backend: {wanted}` cannot run here: {'; '.join(reasons.values())}",
        _INSTALL.get(wanted, ""),
    )


def _why(wanted: str, reasons: dict[Name, str]) -> str:
    if wanted != "auto":
        return "as asked for"
    same = len(set(reasons.values())) == 1
    return (
        next(iter(reasons.values())) if same else "; ".join(f"{n}: {r}" for n, r in reasons.items()) or "fastest"
    )


class Needs(NamedTuple):
    """What a model asks of its attention beside the causal mask."""

    softcap: bool = False
    dropout: bool = False
    head_dim: int = 0
    value_dim: int = 0

    @classmethod
    def of(cls, config: Any) -> Needs:
        if config is None:
            return cls()
        text = config.get_text_config()

        def number(name: str) -> float:
            return getattr(text, name, None) or 0

        dim = number("head_dim") or number("hidden_size") // (number("num_attention_heads") or 1)
        latent = number("qk_nope_head_dim") + number("qk_rope_head_dim")  # DeepSeek's, with values of another size
        return cls(
            softcap=number("attn_logit_softcapping") > 0,
            dropout=number("attention_dropout") > 0,
            head_dim=int(latent or dim),
            value_dim=int(number("v_head_dim") if latent else dim),
        )


def _refusal(
    name: Name, device: torch.device, dtype: torch.dtype, deterministic: bool, needs: Needs
) -> tuple[str | None, Flash | None]:
    """Why this one cannot run, None if it can; and flash-attn, where that is the one."""
    if name == "sdpa":
        return None, None
    if device.type != "cuda":
        return "no GPU", None
    if name == "flex":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed", None
        return ("no attention dropout" if needs.dropout else None), None
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}", None
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}", None
    if needs.head_dim > 256 or needs.head_dim != needs.value_dim:
        return f"no heads of {needs.head_dim} with values of {needs.value_dim}", None
    if name == "varlen":
        if not {"scale", "window_size"} <= backends.VARLEN_ACCEPTS:
            return f"torch {torch.__version__} has none that knows windows", None
        return ("no softcap" if needs.softcap else "no attention dropout" if needs.dropout else None), None
    kernel = backends.find_flash(capability)
    if kernel is None:
        return "flash-attn is not installed", None
    if kernel.generation == 4 and needs.head_dim > _FA4_HEAD:
        return f"flash-attn 4 computes no gradients of heads of more than {_FA4_HEAD}", None
    asked = {"softcap": needs.softcap, "dropout_p": needs.dropout, "deterministic": deterministic}
    if missing := [argument for argument, wanted in asked.items() if wanted and argument not in kernel.accepts]:
        return f"flash-attn {kernel.generation} has no `{missing[0]}`", None
    return None, kernel


# What a batch needs, made once for all layers ---------------------------------------------------------------


class Segments:
    """Runs of slots within which attention is causal, in the form the backend takes.

    lengths   of the runs; they sum to the batch's slots N
    bounds    flash, varlen: [S + 1] int32 on the device, where segments begin, then where the last ends
    longest   flash, varlen: at least the longest length

    Compiled layers must not be compiled anew for each batch: so `bounds` repeats its last value up to a power of
    two, `longest` is a power of two, and no kernel but SDPA, which runs uncompiled, looks at `lengths`.

    `windows`: sliding windows of the model's layers, as `windows` finds them.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        backend: Backend,
        device: torch.device,
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        self.lengths = lengths
        self.backend = backend
        self.device = device
        self.equal = len(set(lengths)) == 1
        self._runs: dict[int | None, tuple[list[int], list[torch.Tensor | None]]] = {}
        if backend.name in ("flash", "varlen"):
            ends = torch.tensor(lengths).cumsum(0, dtype=torch.int32)
            bounds = ends[-1].repeat(_power_of_two(len(lengths) + 1, at_least=16))
            bounds[0], bounds[1 : len(lengths) + 1] = 0, ends
            self.bounds = bounds.to(device, non_blocking=True)
            self.longest = _power_of_two(max(lengths), at_least=BLOCK)
        elif backend.name == "flex":
            self.masks = {window: block_mask(self.seen(window).to(device)) for window in windows}

    def seen(self, window: int | None) -> torch.Tensor:
        """[N] int64: the first slot that each slot attends to; the last is itself."""
        lengths = torch.tensor(self.lengths)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        if window is None:
            return starts
        return torch.maximum(starts, torch.arange(len(starts)) - (window - 1))

    def runs(self, window: int | None) -> tuple[list[int], list[torch.Tensor | None]]:
        """For SDPA: slots of each call, and its mask, [T, T] bool; None where plainly causal."""
        if window not in self._runs:
            self._runs[window] = self._cut(window)
        return self._runs[window]

    def _cut(self, window: int | None) -> tuple[list[int], list[torch.Tensor | None]]:
        seen = self.seen(window)
        groups = [[length] for length in self.lengths] if self.equal else _together(self.lengths)
        sizes = [sum(group) for group in groups]
        masks: list[torch.Tensor | None] = []
        start = 0
        for group, size in zip(groups, sizes, strict=True):
            plain = len(group) == 1 and (window is None or size <= window)
            if self.equal and masks:
                masks.append(masks[0])
            elif plain:
                masks.append(None)
            else:
                slots = torch.arange(start, start + size)
                mask = (slots >= seen[start : start + size, None]) & (slots <= slots[:, None])
                masks.append(mask.to(self.device))
            start += size
        return sizes, masks


def _together(lengths: tuple[int, ...]) -> list[list[int]]:
    groups: list[list[int]] = []
    filled = _TOGETHER
    for length in lengths:
        if filled + length > _TOGETHER:
            groups.append([])
            filled = 0
        groups[-1].append(length)
        filled += length
    return groups


def _power_of_two(number: int, at_least: int) -> int:
    return max(at_least, 1 << (number - 1).bit_length())


def windows(config: Any) -> tuple[int | None, ...]:
    """Sliding windows of a model's layers; None: a layer without.

    Raises:
        ConfigError: a kind of layer that no backend here can compute.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if "chunked_attention" in kinds:
        raise ConfigError(
            f"`{text.model_type}` attends in chunks of `attention_chunk_size`, which packcli cannot compute",
            "use a model with full or sliding-window attention",
        )
    return tuple(dict.fromkeys([None, getattr(text, "sliding_window", None)]))


# The function transformers calls ----------------------------------------------------------------------------


def forward(  # noqa: PLR0913 - the signature is transformers'
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment.

    query [1, H, N, D], key and value [1, K, N, D] with K a divisor of H; returns [1, N, H, D].

    Raises:
        ConfigError: the model asks for something that would change the result and is not computed here.
    """
    segments = checked(module, segments, attention_mask, others)
    options = Options(scaling, sliding_window, softcap, dropout if module.training else 0.0)
    out = _compute(query, key, value, segments, options)
    return out.transpose(1, 2).contiguous(), None


def checked(
    module: torch.nn.Module,
    segments: Segments | None,
    attention_mask: torch.Tensor | None,
    others: dict[str, Any],
) -> Segments:
    """`segments`, unless the model hands attention anything that would be left out; `others`: its further options.

    Raises:
        ConfigError: it does, or has lost `segments` on the way.
    """
    if segments is None:
        raise _unknown(module, "does not hand `segments` on to attention")
    if attention_mask is not None:
        raise _unknown(module, "makes a mask of its own")
    for name, given in others.items():
        inert = given is None or given is False or name in _INERT
        if name == "is_causal":
            inert = given is not False
        if not inert:
            raise _unknown(module, f"asks for `{name}`")
    return segments


def _compute(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, options: Options
) -> torch.Tensor:
    backend = segments.backend
    if backend.dtype is not None:  # norms of queries and keys may leave them in float32
        query, key, value = (tensor.to(backend.dtype) for tensor in (query, key, value))
    match backend.name:
        case "flash":
            assert backend.flash is not None
            return backends.flash(
                query,
                key,
                value,
                options,
                kernel=backend.flash,
                bounds=segments.bounds,
                longest=segments.longest,
                deterministic=backend.deterministic,
            )
        case "varlen":
            return backends.varlen(query, key, value, options, bounds=segments.bounds, longest=segments.longest)
        case "flex":
            return backends.flex(query, key, value, options, mask=segments.masks[options.window])
        case "sdpa":
            sizes, masks = segments.runs(options.window)
            return backends.sdpa(query, key, value, options, sizes=sizes, masks=masks, batched=segments.equal)


def _unknown(module: torch.nn.Module, problem: str) -> ConfigError:
    return ConfigError(
        f"{type(module).__name__} {problem}: packcli's attention cannot run this model", "use another model"
    )


AttentionInterface.register(NAME, forward)
