"""Whether the Hub and servers with a judge or a checkpoint answer. A key is sent to its own server alone."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping

from packcli.doctor.checks import Check, Finding
from packcli.errors import PackcliError
from packcli.eval.judge.spec import Server, server

_ANSWER_S = 5.0
_LIMIT_S = 15.0


def checks(servers: Mapping[str, str | None]) -> list[Check]:
    """`servers`: what of a sweep asks one -> its URL; None: as OPENAI_BASE_URL says, else OpenAI's own."""
    return [Check("hub", _hub, _LIMIT_S), Check("judge", lambda: _servers(servers), _LIMIT_S)]


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    token, endpoint = get_token(), constants.ENDPOINT
    said = "a token is set" if token else "no token: gated models and private data cannot be had"
    if constants.HF_HUB_OFFLINE:
        means = "models and data are taken from the cache of this machine alone"
        yield Finding("hub", "missing", f"HF_HUB_OFFLINE is set; {said}", means, "unset HF_HUB_OFFLINE")
        return
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    where = f"{endpoint}/api/whoami-v2" if token else endpoint
    answer = _asked("GET" if token else "HEAD", where, headers)
    if isinstance(answer, str):
        means = "models and data are taken from the cache of this machine alone"
        fix = "where there is internet: packcli fetch SWEEP, with HF_HOME on a disk that both share"
        yield Finding("hub", "missing", f"{endpoint} does not answer ({answer}); {said}", means, fix)
    elif token and answer in (401, 403):
        means = "gated models and private data cannot be had"
        yield Finding("hub", "failed", f"{endpoint} refuses the token ({answer})", means, "hf auth login")
    elif answer in (401, 403):
        means = "it is reached, and wants to know who asks"
        yield Finding("hub", "failed", f"{endpoint} answers {answer}; {said}", means, "hf auth login")
    elif answer >= 500:
        yield Finding("hub", "failed", f"{endpoint} answers {answer}", "", "try again later")
    else:
        fix = "" if token else "hf auth login"
        yield Finding("hub", "ok", f"{endpoint} answers; {said}", "models and data can be fetched", fix)


def _servers(servers: Mapping[str, str | None]) -> Iterator[Finding]:
    asked = dict(servers)
    if not asked and not os.environ.get("OPENAI_BASE_URL", "").strip():
        means = "WildBench and MT-bench are not scored; all else is"
        fix = "export OPENAI_BASE_URL=... OPENAI_API_KEY=...; then --judge MODEL, or `eval.judge` in a sweep"
        yield Finding("judge", "missing", "no server is named", means, fix)
        return
    for what, url in (asked or {"judge": None}).items():
        try:
            yield _served(what, server(url))
        except PackcliError as error:
            yield Finding(what, "failed", error.cause, fix=error.fix)


def _served(what: str, where: Server) -> Finding:
    """One server of OpenAI's interface: whether it lists its models, as nearly all do."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and what == "judge":
        fix = "export OPENAI_API_KEY=...; a server of your own that wants none still takes one, such as `none`"
        return Finding(
            what, "missing", f"{where.host}: OPENAI_API_KEY is not set", "no judge is asked without one", fix
        )
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = _asked("GET", f"{where.url.rstrip('/')}/models", headers)
    if isinstance(answer, str):
        means = "what it is to write or to judge is not scored"
        return Finding(
            what, "failed", f"{where.host} does not answer ({answer})", means, "start it, or mend its URL"
        )
    if answer in (401, 403):
        found = f"{where.host} refuses the key ({answer})"
        return Finding(
            what, "failed", found, "what it is to write or to judge is not scored", "export OPENAI_API_KEY=..."
        )
    if answer >= 500:
        return Finding(what, "failed", f"{where.host} answers {answer}", "", "try again later")
    return Finding(what, "ok", f"{where.host} answers{'; a key is set' if key else ''}")


class _Stays(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer: no key follows it elsewhere."""

    def redirect_request(self, *_: object) -> None:
        return None


def _asked(method: str, url: str, headers: Mapping[str, str]) -> int | str:
    """The status of the answer, or why there is none."""
    try:
        request = urllib.request.Request(url, method=method, headers=dict(headers))
        with urllib.request.build_opener(_Stays).open(request, timeout=_ANSWER_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
