"""How the judge is asked, at what price, and by what key its replies are kept. Loads no client, sends nothing.

Its server is `base_url`, else `OPENAI_BASE_URL`, else OpenAI's own; the key is in `OPENAI_API_KEY`. Neither is
written anywhere but for the server's host.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from packcli import yamlfile
from packcli.config import JudgeSpec
from packcli.errors import ConfigError, MissingError
from packcli.eval.judge.verdicts import Form, Request

DOCS = "docs/judge.md"

_DEFAULT_URL = "https://api.openai.com/v1"


def named(judge: str | None, given: Mapping[str, object]) -> JudgeSpec | None:
    """A judge by its model's name, or by a YAML file of `JudgeSpec`'s keys; `given`: keys that win over the file.

    Raises:
        ConfigError: no such file, or something else in it; keys without a judge.
    """
    keys = {name: value for name, value in given.items() if value is not None}
    if judge is None:
        if keys:
            raise ConfigError(f"`{next(iter(keys))}` is given, but no judge", "name one: `--judge MODEL`")
        return None
    if not judge.endswith((".yaml", ".yml")):
        try:
            return JudgeSpec.model_validate({"model": judge, **keys})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"the judge's `{where}`: {first['msg']}", f"see {DOCS}") from None
    text = yamlfile.read(Path(judge), "judge's file", f"see {DOCS}")
    document, lines = yamlfile.parse(text, judge, DOCS)
    try:
        return JudgeSpec.model_validate({**document, **keys})
    except ValidationError as error:
        problems = yamlfile.Problems(judge, lines, DOCS)
        for one in error.errors():
            key = tuple(map(str, one["loc"]))
            problems.add(key, f"`{'.'.join(key)}`: {one['msg']}")
        problems.raise_if_any()
        raise


def sampling(spec: JudgeSpec, form: Form) -> dict[str, object]:
    """The keys of a call that decide what is written, besides model and messages."""
    keys: dict[str, object] = {spec.token_limit: spec.max_tokens}
    if spec.temperature is not None:
        keys["temperature"] = spec.temperature
    if spec.json_mode and form != "rating":
        keys["response_format"] = {"type": "json_object"}
    return keys


class Price(BaseModel):
    """USD per million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    input: float = Field(ge=0)
    output: float = Field(ge=0)

    def of(self, tokens_input: float, tokens_output: float) -> float:
        return (tokens_input * self.input + tokens_output * self.output) / 1e6


@dataclass(frozen=True, slots=True)
class Server:
    """Where the judge is. `host` is the part of `url` that may be written down."""

    url: str
    host: str


def server(base_url: str | None = None, environment: Mapping[str, str] = os.environ) -> Server:
    """The server at `base_url`, else where `OPENAI_BASE_URL` says, else OpenAI's own.

    Raises:
        ConfigError: that is no http(s) URL.
    """
    url = base_url or environment.get("OPENAI_BASE_URL", "").strip() or _DEFAULT_URL
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        # The URL is not shown: it may hold a password.
        name = "the server's `base_url`" if base_url else "OPENAI_BASE_URL"
        raise ConfigError(f"{name} is no URL", "write it like `https://host:8000/v1`")
    return Server(url, host)


def prices(path: Path) -> dict[str, Price]:
    """Prices by model from a YAML file of lines like `gpt-4o: {input: 2.5, output: 10}`, USD per million tokens.

    Raises:
        ConfigError: no such file, or something else in it.
    """
    text = yamlfile.read(path, "file of prices", f"see {DOCS}")
    document, lines = yamlfile.parse(text, str(path), DOCS)
    problems = yamlfile.Problems(str(path), lines, DOCS)
    found = {}
    for name, value in document.items():
        try:
            found[str(name)] = Price.model_validate(value)
        except ValidationError as error:
            for one in error.errors():
                key = (str(name), *map(str, one["loc"]))
                problems.add(key, f"`{'.'.join(key)}`: {one['msg']}")
    problems.raise_if_any()
    return found


def key_of(request: Request, spec: JudgeSpec, host: str) -> str:
    """sha256 over all that a verdict depends on: judge, host, template, sampling, question, texts, messages."""
    identity = {
        "judge": spec.model,
        "host": host,
        "template": request.template,
        "sampling": sampling(spec, request.form),
        "question": request.question,
        "answers": request.answers,
        "references": request.references,
        "messages": messages(request),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def num_bytes(request: Request) -> int:
    """Size of what the judge reads."""
    return len(request.system.encode()) + len(request.prompt.encode())


def most_tokens(request: Request, spec: JudgeSpec) -> tuple[int, int]:
    """Tokens that one call takes at most: input (hardly any text has tokens of under two bytes), output."""
    return num_bytes(request) // 2 + 50, spec.max_tokens


def messages(request: Request) -> list[dict[str, str]]:
    """What the judge is sent."""
    system = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": request.prompt}]


def api_key(environment: Mapping[str, str] = os.environ) -> str:
    """The key, as `key_or_none`.

    Raises:
        MissingError: there is none.
    """
    if not (key := key_or_none(environment)):
        raise MissingError(
            "the judge needs a key, and OPENAI_API_KEY is not set",
            "export OPENAI_API_KEY=...; a server of your own that wants none still takes one, such as `none`",
        )
    return key


def key_or_none(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key; None: there is none.

    Raises:
        ConfigError: it cannot be one. It is not shown.
    """
    key = environment.get("OPENAI_API_KEY", "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("OPENAI_API_KEY holds characters that no key has", "set it again, without line breaks")
    return key or None


def price_of(spec: JudgeSpec) -> Price | None:
    """The judge's price; None where it is not known and there is no budget.

    Raises:
        ConfigError: a budget without a price, or as `prices`.
    """
    price = prices(Path(spec.prices)).get(spec.model) if spec.prices else None
    if price is None and spec.max_cost_usd is not None:
        raise ConfigError(
            f"a budget for judge `{spec.model}`, whose price is not known",
            f"name a file of prices that lists it ({DOCS}), or set no budget",
        )
    return price
