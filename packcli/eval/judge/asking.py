"""One run of questions to a judge: how many at once, how often again, what is spent, and when to stop.

The client (the package `openai`) retries what the server or the connection did wrong. What it does not know: that
a whole judgment may not take forever, that a reply may be no verdict, and that money is finite.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from packcli.config import JudgeSpec
from packcli.errors import ConfigError, MissingError
from packcli.eval.judge.replies import Replies, from_body, verdict, without
from packcli.eval.judge.spec import Price, Server, messages, most_tokens, sampling
from packcli.eval.judge.verdicts import Failure, Request, UnusableError
from packcli.log import plain

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Note = Callable[[int, int, str], None]
"""Progress: judgments done, judgments in all, a short remark."""

Why = tuple[Failure, str]
"""Why a request has no verdict: the kind, and a few words."""

GIVE_UP_AFTER = 20
"""Judgments in a row without a verdict after which no more are asked for: they would fail and cost like these."""

_HOPELESS: tuple[Failure, ...] = ("cut off", "content filter", "refusal")
"""What the same question would meet again."""


class Asking:
    """Asks for a verdict on each of `requests`, by key, unless `replies` holds one already."""

    def __init__(
        self,
        server: Server,
        secret: str,
        spec: JudgeSpec,
        price: Price | None,
        replies: Replies,
        requests: Mapping[str, Request],
    ) -> None:
        """
        Raises:
            MissingError: the package `openai` is not installed.
        """
        self._client = _client(server, secret, spec)
        self._server, self._secret, self._spec, self._price = server, secret, spec, price
        self._replies, self._requests = replies, requests
        self._reserved_usd: dict[str, float] = {}
        self._freed = asyncio.Condition()
        self._num_failed_in_a_row = 0
        self._stopped: Why | None = None
        self._num_done = 0

    async def all(self, note: Note) -> dict[str, Why]:
        """Why there is no verdict, by key, for those that have none. Everything else is in the replies.

        Raises:
            ConfigError: the server does not accept the key, or knows no such judge. Replies are kept.
        """
        failures: dict[str, Why] = {}
        todo = iter(self._requests.items())
        async with self._client:
            await asyncio.gather(*(self._work(todo, failures, note) for _ in range(self._spec.workers)))
        return failures

    async def _work(self, todo: Iterator[tuple[str, Request]], failures: dict[str, Why], note: Note) -> None:
        for key, request in todo:
            why = await self._ask(key, request)
            if why is not None:
                failures[key] = why
            self._num_done += 1
            note(self._num_done, len(self._requests), f"{len(failures)} without a verdict" if failures else "")

    async def _ask(self, key: str, request: Request) -> Why | None:
        """Ask until a reply is a verdict, as often as allowed; why none is."""
        why: Why | None = None
        left_s = self._spec.deadline_s
        for _ in range(self._spec.attempts):
            # There from before, or from another process: each reply written takes in those of others.
            if verdict(self._replies.by_key[key], request.form) is not None:
                return None
            if not await self._reserve(key):
                return why or self._stopped
            start = time.monotonic()
            try:
                async with asyncio.timeout(left_s):
                    body = await self._call(request)
                why = self._keep(key, request, body, time.monotonic() - start)
                await asyncio.to_thread(self._replies.sync)
            except Exception as error:
                why = self._why(error)
                break  # The client has retried what is worth it.
            finally:
                await self._release(key)
            left_s -= time.monotonic() - start
            if why is None or why[0] in _HOPELESS or left_s <= 0:
                break
        self._count(why)
        return why

    def _count(self, why: Why | None) -> None:
        self._num_failed_in_a_row = 0 if why is None else self._num_failed_in_a_row + 1
        if why is not None and self._num_failed_in_a_row >= GIVE_UP_AFTER and self._stopped is None:
            self._stopped = ("not asked", f"{GIVE_UP_AFTER} judgments in a row failed, the last by: {why[0]}")

    async def _call(self, request: Request) -> bytes:
        raw: Any = await self._client.chat.completions.with_raw_response.create(
            model=self._spec.model, messages=messages(request), **sampling(self._spec, request.form)
        )
        content: bytes = raw.content
        return content

    def _keep(self, key: str, request: Request, body: bytes, latency_s: float) -> Why | None:
        """Write a reply down; why it is no verdict."""
        reply = from_body(
            body,
            key=key,
            question=request.question,
            part=request.part,
            judge=self._spec.model,
            latency_s=latency_s,
            secret=self._secret,
        )
        self._replies.append(reply)
        try:
            reply.value(request.form)
        except UnusableError as error:
            return error.failure, error.detail
        return None

    def _why(self, error: Exception) -> Why:
        """What a failed call is counted as; an error that every call would meet is raised."""
        import openai

        from packcli.eval.engines import bounded

        match error:
            case bounded.TooLongError():
                return "too long", str(error)
            case openai.AuthenticationError():
                raise ConfigError(
                    f"the judge's server {self._server.host} does not accept the key", "check OPENAI_API_KEY"
                ) from None
            case openai.NotFoundError():
                raise ConfigError(
                    f"the judge's server {self._server.host} knows no judge `{self._spec.model}`",
                    "check the judge's name, and OPENAI_BASE_URL, which mostly ends in `/v1`",
                ) from None
            case openai.RateLimitError():
                return "rate limited", self._said(error)
            case openai.InternalServerError():
                return "server error", self._said(error)
            case openai.APITimeoutError() | TimeoutError():
                return "timeout", ""
            case openai.APIConnectionError():
                return "no connection", ""
            case openai.APIStatusError():
                return ("content filter" if error.code == "content_filter" else "request refused"), self._said(
                    error
                )
            case _:
                raise error

    def _said(self, error: Any) -> str:
        """The beginning of a server's own words."""
        return plain(without(self._secret, str(error.message)))[:200]

    # Money ---------------------------------------------------------------------------------------------------

    async def _reserve(self, key: str) -> bool:
        """Set aside what the next call may cost; False, and no more calls at all, where the budget is too small.

        Waits for calls under way, which mostly cost less than they might have.
        """
        async with self._freed:
            await self._freed.wait_for(lambda: self._stopped or self._fits(key) or not self._reserved_usd)
            if self._stopped is None and not self._fits(key):
                spent = sum(self._costs_usd())
                self._stopped = ("budget", f"{spent:.4f} of {self._spec.max_cost_usd} USD are spent")
            if self._stopped is None:
                self._reserved_usd[key] = self._most_usd(key)
            return self._stopped is None

    async def _release(self, key: str) -> None:
        async with self._freed:
            del self._reserved_usd[key]
            self._freed.notify_all()

    def _fits(self, key: str) -> bool:
        if self._spec.max_cost_usd is None:
            return True
        taken = sum(self._costs_usd()) + sum(self._reserved_usd.values())
        return taken + self._most_usd(key) <= self._spec.max_cost_usd

    def _most_usd(self, key: str) -> float:
        """What a call may cost: its size, and what calls did cost, should the server count more than we expect."""
        return max([self._estimated_usd(key), *self._costs_usd()])

    def _estimated_usd(self, key: str) -> float:
        return 0.0 if self._price is None else self._price.of(*most_tokens(self._requests[key], self._spec))

    def _costs_usd(self) -> list[float]:
        """What each reply to these requests cost, in this run and before; without a count, the most expected."""
        if self._price is None:
            return []
        return [
            self._estimated_usd(key) if reply.usage is None else self._price.of(*reply.tokens)
            for key in self._requests
            for reply in self._replies.by_key[key]
        ]


def _client(server: Server, secret: str, spec: JudgeSpec) -> AsyncOpenAI:
    try:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        from packcli.eval.engines import bounded
    except ImportError:
        raise MissingError("judging needs the package `openai`", "pip install 'packcli[judge]'") from None
    http = DefaultAsyncHttpxClient(
        headers=bounded.HEADERS, event_hooks={"response": [bounded.async_hook]}, timeout=spec.timeout_s
    )
    return AsyncOpenAI(
        api_key=secret,
        base_url=server.url,
        timeout=spec.timeout_s,
        max_retries=spec.max_retries,
        http_client=http,
    )
