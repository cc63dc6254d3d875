"""A server that holds the checkpoint: OpenAI's `/completions`, which vLLM, llama.cpp and others have as well.

Prompts are rendered and tokenized here, with the checkpoint's own tokenizer, and sent as token ids: what a server
would add to a text (a second BOS) cannot be seen from here. The client (the package `openai`) retries what the
server or the connection did wrong. Not built on lm-eval's `local-completions`: that retries a refused key as well,
and gives no answer before all are there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import openai
from lm_eval.api.model import TemplateLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)

from packcli.errors import ConfigError, MissingError, PackcliError
from packcli.eval.checkpoint import first_line, read_tokenizer
from packcli.eval.engines import bounded
from packcli.eval.engines.responses import Answer, Request, texts
from packcli.eval.engines.split import encode_pair
from packcli.eval.judge.replies import without
from packcli.eval.judge.spec import Server, key_or_none, server

_SHOWN = 300

WORKERS = 16
"""Requests under way at a time, unless a batch size says otherwise."""
TIMEOUT_S = 300.0
RETRIES = 5
"""Of one request, by the client: 408, 409, 429, 5xx, timeouts and broken connections, as Retry-After says."""


def load(checkpoint: Path | str, *, chat_template: bool, batch_size: int | None, base_url: str | None) -> Any:
    """See `engine.load`."""
    if not base_url and not os.environ.get("OPENAI_BASE_URL", "").strip():
        raise ConfigError(
            "`--engine openai` needs the URL of a server",
            "give `--base-url http://host:8000/v1` or OPENAI_BASE_URL",
        )
    where = server(base_url)
    source, tokenizer, stops = read_tokenizer(checkpoint, chat_template=chat_template)
    # A server of one's own wants no key; the client wants one.
    key = key_or_none() or "none"
    http = openai.DefaultHttpxClient(
        headers=bounded.HEADERS, event_hooks={"response": [bounded.hook]}, timeout=TIMEOUT_S
    )
    client = openai.OpenAI(
        base_url=where.url, api_key=key, timeout=TIMEOUT_S, max_retries=RETRIES, http_client=http
    )
    return Served(
        client, where, source, tokenizer, stops=stops, chat_template=chat_template, workers=batch_size or WORKERS
    )


class Served(TemplateLM):  # type: ignore[misc]
    """The checkpoint on a server, as an lm-eval model."""

    _encode_pair = encode_pair

    def __init__(
        self,
        client: openai.OpenAI,
        where: Server,
        source: str,
        tokenizer: Any,
        *,
        stops: list[int],
        chat_template: bool,
        workers: int,
    ) -> None:
        super().__init__()
        self._client, self._host, self._workers = client, where.host, workers
        self.tokenizer = tokenizer
        self._chat_template = chat_template
        # Servers know stop strings only; the model's own end of sequence is theirs to know.
        self._ends = [text for text in map(tokenizer.decode, stops) if text.strip()]
        self._model, known = self._served_model(source)
        self.max_length = known or _max_length(source, tokenizer)
        self.truncated: set[tuple[str, str]] = set()

    @property
    def eot_token_id(self) -> int:
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As lm-eval asks: messages as text."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As lm-eval asks; special tokens as the `hf` engine adds them: none to what a template rendered."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not self._chat_template and not (bos and has_bos_prefix(string, bos))
        tokens: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return tokens

    def answers(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Answer]]]:
        """(number of the request, answer), one at a time, as the server gives them.

        Raises:
            ConfigError: the server refuses the key or the request.
            MissingError: the server does not answer, whatever was retried.
        """
        with ThreadPoolExecutor(self._workers) as pool:
            asked = {pool.submit(self._answer, *request): number for number, request in enumerate(requests)}
            try:
                for done in as_completed(asked):
                    yield [(asked[done], done.result())]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval asks for them: texts in the order of the requests."""
        return texts(self.answers([request.args for request in requests]), len(requests))

    def _answer(self, prompt: str, settings: dict[str, Any]) -> Answer:
        options = normalize_gen_kwargs(settings)
        limit = options.pop("max_gen_toks")
        until = handle_stop_sequences(options.pop("until", None), eos=self.tokenizer.eos_token)
        options.pop("do_sample")
        until += [end for end in self._ends if end not in until]
        said = self._complete(
            prompt=self.tok_encode(prompt)[-(self.max_length - limit) :],
            max_tokens=limit,
            temperature=options.pop("temperature"),
            stop=until[:4] if self._host == "api.openai.com" else until,  # it takes no more
            extra_body=options,
        )
        text = said.choices[0].text.encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair
        kept = postprocess_generated_text(text, until, None)
        cut = getattr(said.choices[0], "finish_reason", None) == "length" and kept == text
        count = getattr(said.usage, "completion_tokens", None)
        return Answer(kept, count if isinstance(count, int) else None, "length" if cut else "stop")

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                return list(pool.map(lambda request: self._compare(*request), requests))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _compare(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> tuple[float, bool]:
        # One token has to be written, and takes its place.
        most = self.max_length - 1
        tokens = (context + continuation)[-most:]
        if len(context) + len(continuation) > most:
            self.truncated.add(texts)
        said = self._complete(prompt=tokens, max_tokens=1, temperature=0, logprobs=1, echo=True)
        if not _are_logprobs(getattr(said.choices[0], "logprobs", None), len(tokens) + 1):
            raise self._no_logprobs()
        start = len(tokens) - len(continuation)
        parsed = LocalCompletionsAPI.parse_logprobs(
            said.model_dump(), ctxlens=[start] * len(said.choices)
        )  # (sum over the continuation, whether each token is the likeliest)
        value: tuple[float, bool] = parsed[0]
        return value

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """lm-eval's interface has it; no packaged task asks for it."""
        raise AssertionError("no packaged task scores whole texts")

    def _complete(self, **asked: Any) -> openai.types.Completion:
        try:
            said = self._client.completions.create(model=self._model, **asked)
        except openai.BadRequestError as error:
            if asked.get("echo"):
                raise self._no_logprobs() from None
            raise ConfigError(
                f"the server at {self._host} refuses a request: {self._said(error)}", "see the server's own log"
            ) from None
        except openai.OpenAIError as error:
            raise self._explained(error) from None
        choices = getattr(said, "choices", None)  # the client checks nothing of what a server sends
        if not isinstance(choices, list) or not choices or not isinstance(getattr(choices[0], "text", None), str):
            raise MissingError(f"the server at {self._host} sends no completion", "see the server's own log")
        return said

    def _served_model(self, source: str) -> tuple[str, int | None]:
        """The server's name for the checkpoint, and its context in tokens where the server says it."""
        try:
            served = {str(model.id): model for model in self._client.models.list().data}
        except openai.OpenAIError as error:
            raise self._explained(error) from None
        except (AttributeError, TypeError):
            raise MissingError(
                f"the server at {self._host} lists no models", "give the URL of one that does"
            ) from None
        if source not in served and len(served) != 1:
            names = ", ".join(sorted(served)[:8]) or "nothing"
            raise ConfigError(
                f"the server at {self._host} has no `{source}`, but {names}",
                "serve the checkpoint under its own name",
            )
        model = served.get(source) or next(iter(served.values()))
        length = getattr(model, "max_model_len", None)
        return model.id, length if isinstance(length, int) else None

    def _said(self, error: openai.OpenAIError) -> str:
        """A server's own words, which may repeat the key."""
        return without(self._client.api_key, first_line(error))[:_SHOWN]

    def _explained(self, error: openai.OpenAIError) -> PackcliError:
        # The messages of the package name no key; the URL, which may hold a password, is in none of them.
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return ConfigError(f"the server at {self._host} refuses the key", "set OPENAI_API_KEY")
        if isinstance(error, openai.NotFoundError):
            return ConfigError(
                f"the server at {self._host} has no completions: {self._said(error)}",
                "give the URL up to and with `/v1`, of a server that has `/completions`",
            )
        return MissingError(
            f"the server at {self._host} does not answer: {self._said(error)}",
            "see that it runs, and run the same command again: what it answered is kept",
        )

    def _no_logprobs(self) -> MissingError:
        return MissingError(
            f"the server at {self._host} does not give the log probability of each token of a prompt (`echo` with "
            "`logprobs`)",
            "score this task with `--engine hf`, or on a server that has them, such as `vllm serve`",
        )


def _are_logprobs(found: Any, count: int) -> bool:
    """One number a token, of all but the first, which nothing predicts. Of one more or less others would count."""
    chosen, best = getattr(found, "token_logprobs", None), getattr(found, "top_logprobs", None)
    if not isinstance(chosen, list) or not isinstance(best, list) or not len(chosen) == len(best) == count:
        return False
    numbers = all(isinstance(number, int | float) for number in chosen[1:])
    return numbers and all(isinstance(likeliest, dict) and likeliest for likeliest in best[1:])


def _max_length(source: str, tokenizer: Any) -> int:
    from transformers import AutoConfig

    length: int = resolve_max_length(AutoConfig.from_pretrained(source, trust_remote_code=False), tokenizer)
    return length
