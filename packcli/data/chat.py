"""Raw records as conversations.

A file's schema is detected from its first record; a file that fits none is an error. A single record that
cannot be trained on raises `Rejected`: the caller counts it and names it, and goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import orjson

from packcli.errors import DataError

Schema = Literal["messages", "conversations", "instruction", "prompt_completion", "question_answer", "tokenized"]
Messages = list[dict[str, str]]

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system",), "system"),
}
_ACCEPTED = (
    "`messages` (role, content), `conversations` (from, value), `instruction` with `output` or `response`, "
    "`prompt` with `completion`, `question` with `answer`, `input_ids` (tokenized)"
)
_SHOWN = 40  # characters of what a record holds that a message repeats
# Part of what "the same conversation" means: changing it moves documents between training and validation.
_CONTENT_SALT = b"packcli content 1\n"


class Rejected(Exception):
    """This conversation cannot be trained on; the text says why."""


def detect(record: Any, where: str) -> Schema:
    """The schema of a file, from its first record.

    Raises:
        DataError: no schema fits.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: a record is a {type(record).__name__}, not an object", f"accepted: {_ACCEPTED}")
    keys = set(record)
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "conversations"
    if "instruction" in keys and keys & {"output", "response"}:
        return "instruction"
    if {"prompt", "completion"} <= keys:
        return "prompt_completion"
    if {"question", "answer"} <= keys:
        return "question_answer"
    if "input_ids" in keys:
        return "tokenized"
    fields = ", ".join(f"`{str(key)[:_SHOWN]}`" for key in list(record)[:12]) or "none"
    raise DataError(
        f"{where}: no chat schema fits its fields ({fields})",
        f"accepted: {_ACCEPTED}; rename fields with `data.mapping`, for example {{question: my_field}}",
    )


def conversation(record: Any, schema: Schema) -> Messages:
    """A record as a list of messages with roles system, user, assistant.

    Raises:
        Rejected: a field is missing or not text, a role is unknown, or no assistant turn has text.
    """
    if type(record) is not dict and not isinstance(record, Mapping):  # the second takes a while to ask
        raise Rejected("the record is not an object")
    match schema:
        case "messages":
            messages = _turns(record.get("messages"), "messages", "role", "content")
        case "conversations":
            messages = _turns(record.get("conversations"), "conversations", "from", "value")
        case "instruction":
            messages = _instruction(record)
        case "prompt_completion":
            messages = [*_part(record, "prompt", "user"), *_part(record, "completion", "assistant")]
        case "question_answer":
            messages = [*_part(record, "question", "user"), *_part(record, "answer", "assistant")]
        case "tokenized":
            raise ValueError("a tokenized record holds no messages")
    if "system" in record:
        messages = _opening(record, messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise Rejected("no assistant turn")
    if not all(map(str.strip, answers)):
        raise Rejected("an assistant turn is empty")
    return messages


def _turns(turns: Any, field: str, role_key: str, text_key: str) -> Messages:
    if (type(turns) is not list and not isinstance(turns, Sequence)) or isinstance(turns, str) or not turns:
        what = "missing" if turns is None else "not a list of turns" if turns else "empty"
        raise Rejected(f"`{field}` is {what}")
    return [_turn(turn, field, number, role_key, text_key) for number, turn in enumerate(turns)]


def _turn(turn: Any, field: str, number: int, role_key: str, text_key: str) -> dict[str, str]:
    if type(turn) is dict:  # nearly all are, and well formed
        role, text = turn.get(role_key), turn.get(text_key)
        if type(text) is str and type(role) is str and role in _ROLES:
            return {"role": _ROLES[role], "content": text}
    if not isinstance(turn, Mapping):
        raise Rejected(f"`{field}[{number}]` is not an object")
    # Either naming is accepted in either field: both mixtures are common in the wild.
    role = turn.get(role_key, turn.get("role", turn.get("from")))
    text = turn.get(text_key, turn.get("content", turn.get("value")))
    if not isinstance(role, str):
        raise Rejected(f"`{field}[{number}]`: the role is {type(role).__name__}, not text")
    if role.lower() not in _ROLES:
        raise Rejected(f"`{field}[{number}]`: unknown role `{role[:_SHOWN]}`")
    if not isinstance(text, str):
        raise Rejected(f"`{field}[{number}]`: the text is {type(text).__name__}, not text")
    return {"role": _ROLES[role.lower()], "content": text}


def _instruction(record: Mapping[str, Any]) -> Messages:
    answer = "output" if "output" in record else "response"
    question, *more = _part(record, "instruction", "user")
    if more:
        raise Rejected("`instruction` is several turns, not text")
    if extra := _text(record, "input"):
        question["content"] += f"\n\n{extra}"
    return [*_history(record), question, *_part(record, answer, "assistant")]


def _history(record: Mapping[str, Any]) -> Messages:
    """The turns before the instruction, as LLaMA-Factory has them: pairs of an instruction and its answer."""
    pairs = record.get("history") or ()
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise Rejected(f"`history` is {type(pairs).__name__}, not a list of pairs")
    turns: Messages = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise Rejected(f"`history[{number}]` is not an instruction and its answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _opening(record: Mapping[str, Any], messages: Messages) -> Messages:
    """The record's own `system`, as the first message."""
    if not (system := _text(record, "system")):
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise Rejected("`system` is another text than its first message, a system message too")
    return messages


def _text(record: Mapping[str, Any], field: str) -> str:
    """A field that may be missing, or blank: ""; what is there must not be lost."""
    text = record.get(field)
    if not isinstance(text, str | None):
        raise Rejected(f"`{field}` is {type(text).__name__}, not text")
    return text if text and not text.isspace() else ""


def _part(record: Mapping[str, Any], field: str, role: str) -> Messages:
    value = record.get(field)
    if isinstance(value, list):
        return _turns(value, field, "role", "content")
    if not isinstance(value, str):
        raise Rejected(f"`{field}` is {'missing' if value is None else type(value).__name__}, not text")
    return [{"role": role, "content": value}]


def content_hash(messages: Messages) -> int:
    """64 bits of a salted sha256 of what is said; decides validation, whatever the seed, arm or file order.

    Raises:
        Rejected: the text cannot be written as UTF-8.
    """
    try:
        said = orjson.dumps([[message["role"], message["content"]] for message in messages])
    except TypeError:
        raise Rejected("its text is no valid Unicode: it holds half of a surrogate pair") from None
    return int.from_bytes(hashlib.sha256(_CONTENT_SALT + said).digest()[:8], "big")


def copies(content: int, weight: float) -> int:
    """How often a conversation is used: `weight` on average, its fraction drawn independently of validation."""
    whole = int(weight)
    drawn = content * 0x9E3779B97F4A7C15 % 2**64 < (weight - whole) * 2**64
    return whole + drawn


def in_validation(content: int, fraction: float) -> bool:
    return content < int(fraction * 2**64)
