"""Crossing attention: how much of a packed row's attention goes to other documents of the row.

The model runs as it always does, but for an attention that computes its weights in the open, a block of queries at
a time, and adds up where they fall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import AttentionInterface

from packcli.errors import ConfigError
from packcli.eval.probe.layouts import Frozen, Layout, Row, attending, batch
from packcli.model import attention, configs
from packcli.model.attention import Segments

NAME = "packcli_crossing"

BLOCK = 1 << 23
"""Attention scores held at once, over all heads: 32 MiB in fp32, and about four tensors of that size. So many
queries go together; one query against all keys is the least, which is more from 262,144 tokens and 32 heads on."""


class Layer(Frozen):
    """Attention of one layer, means over the tokens that have an earlier document in their row.

    share            of a token's attention that goes to other documents' tokens, mean over heads
    first            the part of it that goes to the row's first token, where models put what they have no use for
    share_but_first  of all attention that does not go to the row's first token, the share to other documents
    uniform, uniform_but_first   the same two, if attention were spread evenly over all a token may see
    heads, heads_but_first       [H] `share` and `share_but_first` of each head
    window           of sliding attention; None: the layer sees the whole row

    `..._but_first` is None where all attention goes to the first token.
    """

    share: float
    first: float
    share_but_first: float | None
    uniform: float
    uniform_but_first: float | None
    heads: tuple[float, ...]
    heads_but_first: tuple[float | None, ...]
    window: int | None


class Crossing(Frozen):
    """`tokens`: those that have an earlier document in their row, over which every mean is taken."""

    attention: Literal["document", "causal"]
    positions: Literal["reset", "continue"]
    rows: int
    documents: int
    tokens: int
    layers: tuple[Layer, ...]


def crossing(
    model: Any,
    rows: Sequence[Row],
    layout: Layout,
    *,
    block: int = BLOCK,
    note: Callable[[int, int, str], None] = lambda done, total, remark: None,
) -> Crossing:
    """Attention to other documents, by layer and head, of rows laid out as an arm lays them.

    `model`: a transformers causal model in any precision; weights are rounded as in transformers' `eager`.
    Time grows with the square of a row's length, memory does not (`BLOCK`).

    Raises:
        ConfigError: no row holds two documents; or a model whose attention cannot be taken over, or not in all of
            its layers.
    """
    rows = [row for row in rows if row]
    configs.check_context(model.config, max((sum(map(len, row)) for row in rows), default=0))
    tokens = sum(len(document) for row in rows for document in row[1:])
    if not tokens:
        raise ConfigError("no row holds two documents: no attention can cross", "give more or shorter documents")
    sums: list[_Sums] = []
    backend = attention.choose("sdpa", model.device, model.dtype)
    with attending(model, NAME):
        for number, row in enumerate(rows):
            note(number, len(rows), "crossing attention")
            inputs = batch([row], layout).to(model.device)
            watch = _Watch(row, sums, block, model.device)
            model.base_model(
                input_ids=inputs.input_ids,
                position_ids=inputs.position_ids,
                segments=Segments(inputs.segments, backend, model.device),
                use_cache=False,
                watch=watch,
            )
            _check_layers(model, watch.layer)
    return Crossing(
        attention=layout.attention,
        positions=layout.positions,
        rows=len(rows),
        documents=sum(map(len, rows)),
        tokens=tokens,
        layers=tuple(each.mean(tokens) for each in sums),
    )


def _check_layers(model: Any, seen: int) -> None:
    layers = model.config.get_text_config().num_hidden_layers
    if seen != layers:
        raise ConfigError(
            f"`{model.config.model_type}`: {seen} of {layers} layers attend through transformers' interface; what "
            "the others carry from one document to the next cannot be seen",
            "probe a model that attends in every layer",
        )


class _Sums:
    """Of one layer, over tokens: by head, [H] float64; if attention were uniform, floats."""

    def __init__(self, heads: int, window: int | None, device: torch.device) -> None:
        self.share = torch.zeros(heads, dtype=torch.float64, device=device)
        self.first = torch.zeros_like(self.share)
        self.uniform = self.uniform_first = 0.0
        self.window = window

    def mean(self, tokens: int) -> Layer:
        share, first = self.share / tokens, self.first / tokens
        uniform, uniform_first = self.uniform / tokens, self.uniform_first / tokens
        return Layer(
            share=float(share.mean()),
            first=float(first.mean()),
            share_but_first=_but_first(float(share.mean()), float(first.mean())),
            uniform=uniform,
            uniform_but_first=_but_first(uniform, uniform_first),
            heads=tuple(share.tolist()),
            heads_but_first=tuple(map(_but_first, share.tolist(), first.tolist())),
            window=self.window,
        )


def _but_first(share: float, first: float) -> float | None:
    rest = 1.0 - first
    return (share - first) / rest if rest > 1e-9 else None


class _Watch:
    """Computes the attention of one row, layer after layer, and adds what crosses to `sums`."""

    def __init__(self, row: Row, sums: list[_Sums], block: int, device: torch.device) -> None:
        lengths = torch.tensor([len(document) for document in row])
        self.begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths).to(device)  # [N]
        self.sums = sums
        self.block = block
        self.layer = 0

    def attend(
        self,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        segments: Segments,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention as transformers' own `eager` computes it: [1, N, H, D]."""
        query, key, value = tensors[0][0], tensors[1][0], tensors[2][0]
        heads, slots, dim = query.shape
        groups = len(key)  # query heads h and h + 1 share a key head, as long as they are in one group
        sums = self._sums(heads, window, query.device)
        seen = segments.seen(window).to(query.device)
        self._uniform(sums, seen)
        out = query.new_empty(slots, heads, value.shape[-1])
        size = max(1, self.block // (heads * slots))
        for start in range(0, slots, size):
            stop = min(start + size, slots)
            block = query[:, start:stop].reshape(groups, -1, dim)
            scores = (block @ key[:, :stop].transpose(1, 2)).mul_(dim**-0.5 if scaling is None else scaling)
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            scores = scores.float().view(heads, stop - start, stop)
            scores.masked_fill_(_hidden(seen, start, stop), float("-inf"))
            weights = scores.softmax(-1)
            mixed = weights.to(value.dtype).view(groups, -1, stop) @ value[:, :stop]
            out[start:stop] = mixed.view(heads, stop - start, -1).transpose(0, 1)
            self._count(sums, weights, start, stop)  # last: it overwrites them
        return out[None]

    def _sums(self, heads: int, window: int | None, device: torch.device) -> _Sums:
        if self.layer == len(self.sums):
            self.sums.append(_Sums(heads, window, device))
        self.layer += 1
        return self.sums[self.layer - 1]

    def _count(self, sums: _Sums, weights: torch.Tensor, start: int, stop: int) -> None:
        """`weights` [H, B, K] of queries start ... stop - 1 over the first `stop` keys."""
        begins = self.begins[start:stop, None]
        own = torch.arange(stop, device=begins.device) >= begins
        sums.first += weights[:, :, 0].masked_fill(own[:, 0], 0.0).sum(-1, dtype=torch.float64)
        sums.share += weights.masked_fill_(own, 0.0).sum((-2, -1), dtype=torch.float64)

    def _uniform(self, sums: _Sums, seen: torch.Tensor) -> None:
        visible = (torch.arange(1, len(seen) + 1, device=seen.device) - seen).double()
        later = self.begins > 0
        sums.uniform += float(((self.begins - seen).clamp(min=0) / visible)[later].sum())
        sums.uniform_first += float(((seen == 0) / visible)[later].sum())


def _hidden(seen: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """[B, K] bool: the keys that queries start ... stop - 1 may not look at, of the first `stop` keys."""
    keys = torch.arange(stop, device=seen.device)
    return (keys < seen[start:stop, None]) | (keys > keys[start:stop, None])


def _attend(  # noqa: PLR0913 - the signature is transformers'
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments | None = None,
    watch: _Watch | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    segments = attention.checked(module, segments, attention_mask, others)
    assert watch is not None  # it travels with `segments`
    return watch.attend((query, key, value), segments, scaling, sliding_window, softcap), None


AttentionInterface.register(NAME, _attend)
