"""Answers to many prompts by transformers' own `generate`: sorted, in batches that shrink as answers end.

The loop over tokens is transformers'. What is ours is around it: prompts that begin alike share that beginning's
keys and values; a stop string is looked for only where the newest token could end one; `generate` is left when
enough answers of a batch have ended and entered again, on the same cache, with the others.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer

Ended = Literal["stop", "length"]

SIZES = (32, 1024)
"""Batch sizes that are tried, first and last."""

_SHARED = 16
"""Prompts share a beginning of at least so many tokens, or it is not worth a pass of its own."""
_ROOM = 64
"""Tokens a cache grows by at a time."""


@dataclass(frozen=True, slots=True)
class Written:
    """What the model wrote after a prompt: tokens up to and with the one that ended it."""

    tokens: list[int]
    ended: Ended


class BatchSize:
    """How many prompts to take at a time: as given, else doubled from batch to batch until that is slower, twice.

    Measured on the batches of the run itself, so that looking costs nothing but the first batches' speed. Twice,
    because the machine may have been busy. What did not fit into memory is never tried again.
    """

    def __init__(self, fixed: int | None) -> None:
        self._size = fixed or SIZES[0]
        self._settled = fixed is not None
        self._best = (0.0, self._size)
        self._slower = 0

    def __int__(self) -> int:
        return self._size

    def saw(self, num_prompts: int, tokens: int, seconds: float) -> None:
        """A batch of `num_prompts` wrote so many tokens in so many seconds."""
        if self._settled or num_prompts < self._size:
            return
        rate = tokens / max(seconds, 1e-9)
        self._slower = self._slower + 1 if rate < self._best[0] else 0
        self._best = max(self._best, (rate, self._size))
        self._settled = self._slower == 2 or 2 * self._size > SIZES[1]
        self._size = self._best[1] if self._settled else 2 * self._size

    def out_of_memory(self, num_prompts: int) -> bool:
        """Whether a smaller batch than `num_prompts`, which did not fit, is left to try."""
        self._size = max(1, num_prompts // 2)
        self._settled = True
        return num_prompts > 1


class Stops:
    """Where answers end: at the model's stop tokens, or where a stop string is complete.

    Same answers as lm-eval's criterion at batch size 1, which decodes the last tokens of every row at every step.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._strings = [string for string in strings if string]
        self._last = {string[-1] for string in self._strings}
        self.tokens = frozenset(tokens)
        # A token holds at least one byte of a string; two more, as the first token of a text may lose a space.
        self._window = 2 + max((len(string.encode()) for string in self._strings), default=0)
        self._may_end: dict[int, bool] = {}

    def ends(self, written: torch.Tensor, newest: int) -> bool:
        """Whether an answer `[T] int64` ends with its last token, `newest`."""
        if newest in self.tokens:
            return True
        if newest not in self._may_end:
            # Twice, because some tokenizers drop the space in front of a text's first token.
            text = self._tokenizer.decode([newest, newest])
            self._may_end[newest] = "\ufffd" in text or any(end in text for end in self._last)
        if not self._may_end[newest]:
            return False
        text = self._tokenizer.decode(written[-self._window :].tolist())
        return any(string in text for string in self._strings)


class _Leave:
    """A stopping criterion that notes where rows end, and ends `generate` when `enough` of them have."""

    def __init__(self, stops: Stops, rows: int, start: int, enough: int) -> None:
        self._stops, self._start, self._enough = stops, start, enough
        self.lengths: list[int | None] = [None] * rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        newest = input_ids[:, -1].tolist()
        written = input_ids[:, self._start :]
        for row, length in enumerate(self.lengths):
            if length is None and self._stops.ends(written[row], newest[row]):
                self.lengths[row] = written.shape[1]
        ended = [length is not None for length in self.lengths]
        everything = sum(ended) >= self._enough
        return torch.tensor([everything or end for end in ended], device=input_ids.device)


@dataclass(frozen=True, slots=True)
class _Beginning:
    """Tokens, and their keys and values: `[1, H, P, D]` a layer."""

    tokens: list[int]
    cache: DynamicCache


class Writer:
    """One model that answers prompts in batches. `size` and the shots last read are kept from call to call."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.size = BatchSize(batch_size)
        self._read: _Beginning | None = None

    def write(
        self, prompts: Sequence[list[int]], stop_strings: Sequence[str], limit: int, options: Mapping[str, Any]
    ) -> Iterator[list[tuple[int, Written]]]:
        """Answer `prompts`, as token ids, with up to `limit` tokens each; (number, answer) as soon as they end.

        `options` go to `generate`. Longest prompts first: what does not fit into memory shows at once.

        Raises:
            torch.OutOfMemoryError: not even one prompt fits.
        """
        saved = self._model.generation_config.eos_token_id
        stops = Stops(
            self._tokenizer, stop_strings, [] if saved is None else saved if isinstance(saved, list) else [saved]
        )
        shared = self._shared(prompts)
        left = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number))
        while left:
            batch = left[: int(self.size)]
            started, tokens, answered = time.perf_counter(), 0, set()
            try:
                for ended in self._batch([(n, prompts[n]) for n in batch], stops, shared, limit, options):
                    answered |= {number for number, _ in ended}
                    tokens += sum(len(written.tokens) for _, written in ended)
                    yield ended
            except torch.OutOfMemoryError:
                if not self.size.out_of_memory(len(batch)):
                    raise
                torch.cuda.empty_cache()
            else:
                self.size.saw(len(batch), tokens, time.perf_counter() - started)
            left = [number for number in left if number not in answered]

    def _batch(
        self,
        batch: list[tuple[int, list[int]]],
        stops: Stops,
        shared: _Beginning | None,
        limit: int,
        options: Mapping[str, Any],
    ) -> Iterator[list[tuple[int, Written]]]:
        numbers = torch.tensor([number for number, _ in batch])
        ids, mask = self._pad([prompt for _, prompt in batch])
        start = ids.shape[1]
        cache = _spread(shared, (mask == 0).sum(1)) if shared else self._new_cache()
        shrinks = cache is not None and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
        while len(numbers):
            enough = max(1, len(numbers) // 8) if shrinks else len(numbers)
            leave = _Leave(stops, len(numbers), start, enough)
            out = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_length=start + limit,
                stopping_criteria=StoppingCriteriaList([leave]),
                pad_token_id=self._tokenizer.pad_token_id,
                use_cache=True,
                return_dict_in_generate=True,
                **options,
            )
            ids, cache = out.sequences, out.past_key_values if shrinks else None
            at_limit = ids.shape[1] == start + limit
            ended, stay = [], []
            for row, length in enumerate(leave.lengths):
                if length is None and not at_limit:
                    stay.append(row)
                    continue
                tokens = ids[row, start:][:length].tolist()
                ended.append((int(numbers[row]), Written(tokens, "length" if length is None else "stop")))
            yield ended
            numbers = numbers[stay]
            if stay and cache is not None:
                rows = torch.tensor(stay, device=ids.device)
                ids, mask = ids[rows], mask[rows]
                mask = torch.cat([mask, mask.new_ones(len(stay), ids.shape[1] - mask.shape[1])], dim=1)
                cache.batch_select_indices(rows)

    def _pad(self, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts padded on the left, and their mask, both `[B, T] int64`."""
        length = max(map(len, prompts))
        pad = self._tokenizer.pad_token_id
        ids = [[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _new_cache(self) -> DynamicCache | None:
        """None for the few models that keep something else than keys and values by layer."""
        if not self._model._supports_default_dynamic_cache():
            return None
        cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        cache.layers = [_Roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def _shared(self, prompts: Sequence[list[int]]) -> _Beginning | None:
        """What all prompts begin with (the shots); None: too few tokens.

        Only for models whose layers all keep every token: a window or a running state cannot be moved.
        """
        first, last = min(prompts, default=[]), max(prompts, default=[])
        longest = min(map(len, prompts), default=1) - 1  # a last token is left to read
        beginning = _alike(first, last)[:longest]
        if len(prompts) < 2 or len(beginning) < _SHARED:
            return None
        known = _alike(self._read.tokens, beginning) if self._read else []
        # The first tokens behind the shots may be alike by chance, here or where they were read.
        if self._read and len(known) >= max(_SHARED, len(beginning) - _SHARED):
            return _Beginning(known, self._read.cache)
        cache = self._new_cache()
        if cache is None:
            return None
        if not all(type(layer) is _Roomy for layer in cache.layers):
            return None
        ids = torch.tensor([beginning], device=self._model.device)
        with torch.no_grad():
            self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # Layers that read another layer's keys and values stay empty.
        if not all(layer.is_initialized for layer in cache.layers):
            return None
        self._read = _Beginning(beginning, cache)
        return self._read


class _Roomy(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache that is copied once in `_ROOM` tokens; transformers' own is copied at every token."""

    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """As `DynamicLayer.update`: append `[B, H, T, D]`, give all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start, stop = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        kept = self._buffers
        # `keys` is replaced from outside when rows leave; then it is no longer the beginning of the buffer.
        if kept is None or stop > kept[0].shape[-2] or kept[0].data_ptr() != self.keys.data_ptr():
            kept = _with_room(self.keys, stop), _with_room(self.values, stop)
        for buffer, new in zip(kept, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self._buffers = kept
        self.keys, self.values = kept[0][:, :, :stop], kept[1][:, :, :stop]
        return self.keys, self.values


def _with_room(states: torch.Tensor, length: int) -> torch.Tensor:
    batch, heads, num_tokens, width = states.shape
    buffer = states.new_empty(batch, heads, length + _ROOM, width)
    buffer[:, :, :num_tokens] = states
    return buffer


def _alike(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The tokens both begin with."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [token for token, _ in pairs]


def _spread(shared: _Beginning, pads: torch.Tensor) -> DynamicCache:
    """The shared beginning once for every row, each behind its own left padding of `pads` `[B]` tokens.

    The last tokens of the beginning fall off where a row is padded: `generate` reads them again, with the rest.
    """
    length = len(shared.tokens)
    # What stands in the padding is never looked at.
    sources = (torch.arange(length, device=pads.device)[None] - pads[:, None]).clamp(min=0)
    cache = DynamicCache()
    cache.layers = []
    for layer in shared.cache.layers:
        copy = _Roomy()
        copy.lazy_initialization(layer.keys, layer.values)
        copy.keys, copy.values = (states[0][:, sources].transpose(0, 1) for states in (layer.keys, layer.values))
        cache.layers.append(copy)
    return cache
