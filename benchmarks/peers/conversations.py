"""Chat files of several schemas as one JSONL file of `messages`, as many conversations as asked for.

Real text, repeated where there is too little of it. Every conversation's first user turn begins with a number of
its own, so that no two are equal; they are shuffled (seed 0), because peers pack in file order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_ROLES = {"human": "user", "gpt": "assistant"}
Messages = list[dict[str, str]]


def write(files: Sequence[Path], count: int, path: Path) -> int:
    """Write `count` conversations to `path`; how many different ones there were."""
    real = [messages for file in files for messages in _read(file) if _plain(messages)]
    with path.open("w", encoding="utf-8") as out:
        for number, place in enumerate(_order(len(real), count), start=1):
            first, *rest = real[place]
            first = {**first, "content": f"{number}. {first['content']}"}
            out.write(json.dumps({"messages": [first, *rest]}, ensure_ascii=False) + "\n")
    return min(len(real), count)


def _order(size: int, count: int) -> Iterator[int]:
    """Places 0..size-1, each once in random order, then again in another, `count` of them."""
    shuffler = random.Random(0)
    while count > 0:
        yield from shuffler.sample(range(size), min(size, count))
        count -= size


def _read(file: Path) -> list[Messages]:
    text = file.read_text(encoding="utf-8")
    records = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return [_messages(record) for record in records]


def _messages(record: dict[str, Any]) -> Messages:
    if turns := record.get("messages"):
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    if turns := record.get("conversations"):
        return [{"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]
    if "question" in record:
        question, answer = record["question"], record["answer"]
    else:
        question = "\n\n".join(part for part in (record["instruction"], record.get("input", "")) if part)
        answer = record["output"] if "output" in record else record["response"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _plain(messages: Messages) -> bool:
    """User and assistant in turn, each with text and without a spelled control token: what all programs take."""
    roles = [message["role"] for message in messages]
    texts = [message["content"] for message in messages]
    alternate = roles == ["user", "assistant"] * (len(roles) // 2) and bool(roles)
    return alternate and all(text.strip() and "<|" not in text for text in texts)
