"""Judgments by a language model: any OpenAI-compatible server, within a budget, no reply ever paid for twice.

What is asked and what replies are worth: `verdicts.py`. How it is asked: `spec.py`. Where replies are kept:
`replies.py`. How they are got: `asking.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packcli.config import JudgeSpec
from packcli.eval.judge.asking import Asking, Note, Why
from packcli.eval.judge.replies import Replies, Reply, verdict
from packcli.eval.judge.spec import Price, api_key, key_of, most_tokens, num_bytes, price_of, server
from packcli.eval.judge.verdicts import Judgment, Request

_BYTES_PER_TOKEN = 4  # of English, about


def judge(
    requests: Sequence[Request], *, spec: JudgeSpec, cache: Path, note: Note = lambda *_: None
) -> list[Judgment]:
    """A judgment for each request, in their order. Replies in `cache` are used; new ones are appended to it.

    A judgment that failed in an earlier run is asked for again. Nothing that a judge writes raises.

    Raises, before anything is asked:
        MissingError: there is something to ask, and no `OPENAI_API_KEY`, or the package `openai` is not installed.
        ConfigError: `OPENAI_BASE_URL`, the key or the prices cannot be used, or a budget without a price.
        IntegrityError: `cache` holds something else.
    Raises later, with all replies kept:
        ConfigError: the server does not accept the key, or knows no such judge.
    """
    where, price, replies = server(spec.base_url), price_of(spec), Replies(cache)
    keys = [key_of(request, spec, where.host) for request in requests]
    asked = {key: one for key, one in zip(keys, requests, strict=True) if one.known is None}
    failures: dict[str, Why] = {}
    if any(verdict(replies.by_key[key], one.form) is None for key, one in asked.items()):
        failures = asyncio.run(Asking(where, api_key(), spec, price, replies, asked).all(note))
    return [
        _judgment(one, replies.by_key[key], price, failures.get(key))
        for key, one in zip(keys, requests, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What judging would take, without asking anything. Token counts are estimates: no tokenizer of the judge's.

    `n_known` of `n_total` need no call, `n_kept` have a verdict already, `n_calls` are to be asked. For
    `cost_usd_at_most` every reply is as long as it may be, and none has to be asked for again; None: no price.
    """

    n_total: int
    n_known: int
    n_kept: int
    n_calls: int
    estimated_tokens_input: int
    most_tokens_output: int
    cost_usd_at_most: float | None


def outlook(requests: Sequence[Request], *, spec: JudgeSpec, cache: Path) -> Outlook:
    """What `judge` would have to ask for; needs neither the key nor the server, and writes nothing.

    Raises:
        ConfigError, IntegrityError: as `judge`.
    """
    host, price = server(spec.base_url).host, price_of(spec)
    replies = Replies(cache) if cache.is_file() else None
    needed = {key_of(one, spec, host): one for one in requests if one.known is None}
    asked = [
        one for key, one in needed.items() if replies is None or verdict(replies.by_key[key], one.form) is None
    ]
    most = [most_tokens(one, spec) for one in asked]
    return Outlook(
        n_total=len(requests),
        n_known=sum(one.known is not None for one in requests),
        n_kept=len(needed) - len(asked),
        n_calls=len(asked),
        estimated_tokens_input=sum(map(num_bytes, asked)) // _BYTES_PER_TOKEN,
        most_tokens_output=sum(output for _, output in most),
        cost_usd_at_most=None if price is None else sum(price.of(*pair) for pair in most),
    )


def _judgment(request: Request, replies: Sequence[Reply], price: Price | None, why: Why | None) -> Judgment:
    if request.known is not None:
        return Judgment(request, request.known)
    value = verdict(replies, request.form)
    failure, detail = why or ("not asked", "")
    counted = all(reply.usage is not None for reply in replies)
    tokens = (sum(reply.tokens[0] for reply in replies), sum(reply.tokens[1] for reply in replies))
    return Judgment(
        request=request,
        value=value,
        failure=failure if value is None else None,
        detail=detail if value is None else "",
        calls=len(replies),
        tokens=tokens if counted else None,
        cost_usd=price.of(*tokens) if counted and price else None,
        returned=tuple(dict.fromkeys(reply.returned for reply in replies if reply.returned)),
    )
