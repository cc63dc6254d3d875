"""The checkpoint in this process: lm-eval's Hugging Face model, with generation as in `generation.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from packcli.errors import OutOfMemoryError
from packcli.eval.checkpoint import read
from packcli.eval.engines.generation import Writer, Written
from packcli.eval.engines.responses import Answer, Request, texts
from packcli.eval.engines.split import encode_pair

_MOST_COMPARED_AT_ONCE = 64
_LOGITS_BYTES = 2 << 30
"""Of one batch of given answers: `[B, T, vocabulary]` in fp32, so 5 prompts of 700 tokens of Llama 3."""


def load(checkpoint: Path | str, *, chat_template: bool, batch_size: int | None, device: str) -> Any:
    """See `engine.load`."""
    model, tokenizer = read(checkpoint, chat_template=chat_template)
    try:
        model.to(device)
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(
            f"the checkpoint does not fit into the memory of {device}", "use a larger device, or a free one"
        ) from None
    return HuggingFace(model, tokenizer, chat_template=chat_template, batch_size=batch_size)


class HuggingFace(HFLM):  # type: ignore[misc]
    """lm-eval's class but for where a prompt ends, how answers are written, and what happens out of memory."""

    _encode_pair = encode_pair

    def __init__(self, model: Any, tokenizer: Any, *, chat_template: bool, batch_size: int | None) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size or _MOST_COMPARED_AT_ONCE,
            # A template writes every special token it wants; a second BOS would be one the model never saw.
            add_bos_token=False if chat_template else None,
        )
        self.truncated: set[tuple[str, str]] = set()
        self._writer = Writer(self.model, self.tokenizer, batch_size)
        self._logits_bytes = None if batch_size else _LOGITS_BYTES

    @property
    def at_once(self) -> int:
        """Prompts it now writes the answers to at a time."""
        return int(self._writer.size)

    def answers(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Answer]]]:
        """(number of the request, answer), a batch at a time, as soon as they are written.

        Raises:
            OutOfMemoryError: not even one prompt fits.
        """
        groups: dict[str, list[int]] = {}
        for number, (_, settings) in enumerate(requests):
            groups.setdefault(repr(settings), []).append(number)
        for numbers in groups.values():
            options = normalize_gen_kwargs(requests[numbers[0]][1], self.max_gen_toks)
            eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
            until = handle_stop_sequences(options.pop("until", None), eos=eos)
            limit = options.pop("max_gen_toks")
            if not options["do_sample"]:
                options.pop("temperature", None)
            prompts = [self._prompt(requests[number][0], self.max_length - limit) for number in numbers]
            try:
                for batch in self._writer.write(prompts, until, limit, options):
                    yield [(numbers[n], self._answer(written, until)) for n, written in batch]
            except torch.OutOfMemoryError:
                raise self._too_large() from None

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval asks for them: texts in the order of the requests."""
        return texts(self.answers([request.args for request in requests]), len(requests))

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **settings: Any) -> Any:
        if self._logits_bytes is not None:
            longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=1)
            fit = self._logits_bytes // (4 * longest * self.model.config.get_text_config().vocab_size)
            self.batch_size_per_gpu = min(max(1, fit), _MOST_COMPARED_AT_ONCE)
        while True:
            try:
                return super()._loglikelihood_tokens(requests, **settings)
            except torch.OutOfMemoryError:
                if self.batch_size_per_gpu == 1:
                    raise self._too_large() from None
            torch.cuda.empty_cache()
            self.batch_size_per_gpu //= 2
            self._logits_bytes = self._logits_bytes and self._logits_bytes // 2

    def _prompt(self, text: str, room: int) -> list[int]:
        ids, _ = self.tok_batch_encode([text], left_truncate_len=room)
        tokens: list[int] = ids[0].tolist()
        return tokens

    def _answer(self, written: Written, until: list[str]) -> Answer:
        text: str = self.tok_decode(written.tokens)
        kept = postprocess_generated_text(text, until, None)
        # A stop string with a special token inside is seen only here, in the text without special tokens.
        return Answer(kept, len(written.tokens), "stop" if kept != text else written.ended)

    def _too_large(self) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"a single prompt does not fit into the memory of {self.device}",
            "use a larger device, or a checkpoint saved in half precision",
        )
