"""The checkpoint in vLLM, in this process, through lm-eval's own class.

Written against lm-eval 0.4.13 and tested with stand-ins for vLLM's classes. It has never run with vLLM itself,
which wants another torch than packcli is developed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.models.utils import postprocess_generated_text
from lm_eval.models.vllm_causallms import VLLM, SamplingParams

from packcli.eval.checkpoint import read_tokenizer
from packcli.eval.engines.responses import Answer, Request, texts
from packcli.eval.engines.split import encode_pair

_AT_ONCE = 1024
"""Requests handed to vLLM at a time, which batches them itself: more: it idles less; fewer: less is lost."""


def load(checkpoint: Path | str, *, chat_template: bool, batch_size: int | None) -> Any:
    """See `engine.load`."""
    source, _, stops = read_tokenizer(checkpoint, chat_template=chat_template)
    return InVllm(source, chat_template=chat_template, stops=stops, batch_size=batch_size)


class InVllm(VLLM):  # type: ignore[misc]
    """lm-eval's class with our border between prompt and continuation, and answers that say how they ended."""

    _encode_pair = encode_pair

    def __init__(self, source: str, *, chat_template: bool, stops: list[int], batch_size: int | None) -> None:
        super().__init__(
            pretrained=source,
            dtype="auto",
            trust_remote_code=False,
            # A template writes every special token it wants; a second BOS would be one the model never saw.
            add_bos_token=False if chat_template else None,
            batch_size=batch_size or "auto",
        )
        self._stops = stops
        self.truncated: set[tuple[str, str]] = set()

    def answers(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Answer]]]:
        """(number of the request, answer), a batch at a time."""
        for start in range(0, len(requests), _AT_ONCE):
            prompts, sampling, stop_strings = [], [], []
            for text, settings in requests[start : start + _AT_ONCE]:
                options, until, limit = self.modify_gen_kwargs(
                    settings, eos=self.tokenizer.eos_token, default_max_gen_toks=self.max_gen_toks
                )
                # Special tokens are no text, as in the other engines; those among the stop strings end by number.
                options |= {"skip_special_tokens": True, "stop_token_ids": self._stops + self._special(until)}
                prompts.append(self.tok_encode(text)[-(self.max_length - limit) :])
                sampling.append(SamplingParams(max_tokens=limit, stop=until, **options))
                stop_strings.append(until)
            outputs = self._model_generate(requests=prompts, generate=True, sampling_params=sampling)
            yield [
                (start + number, _answer(output.outputs[0], until))
                for number, (output, until) in enumerate(zip(outputs, stop_strings, strict=True))
            ]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval asks for them: texts in the order of the requests."""
        return texts(self.answers([request.args for request in requests]), len(requests))

    def _special(self, strings: Sequence[str]) -> list[int]:
        added: dict[str, int] = self.tokenizer.get_added_vocab()
        return [added[string] for string in strings if string in added]


def _answer(output: Any, until: list[str]) -> Answer:
    kept = postprocess_generated_text(output.text, until, None)
    cut = output.finish_reason == "length" and kept == output.text
    return Answer(kept, len(output.token_ids), "length" if cut else "stop")
