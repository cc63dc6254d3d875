"""A synthetic corpus of topics, made so that it matters who shares a row: source `tiny_topics`.

A topic is a pair of words, with a value of its own for each of three names, drawn at random: `cat` of `oak sun`
is `k`. A conversation asks for some values of one topic, `oak sun: cat` -> `= cat k`. Nothing in it tells them:
one has to know them, or to have read another conversation of the topic, which in a row may stand before it.
Half of the conversations are about a few lasting topics, met so often that they can be learned by heart; the
other half about passing ones, met a few times each.

    topics_recall    a value of a lasting topic, asked alone: all of them, in either split
    topics_context   a value of a topic that is in no conversation, told some turns before

Nothing here depends on the seed of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Literal

from packcli.data.corpus import VALUES, WORDS, Words

VERSION = 1
"""Raised by hand whenever any output of this file changes."""

SOURCES: tuple[str, ...] = ("tiny_topics",)
TASKS: tuple[str, ...] = ("topics_recall", "topics_context")
NUM_ITEMS = 100
"""Of `topics_context`; of `topics_recall` as many as there are values to know."""

NUM_CONVERSATIONS = 1600
LASTING = 20
PASSING = 130
NAMES_PER_TOPIC = 3

Messages = list[dict[str, str]]


def conversations() -> Iterator[dict[str, Any]]:
    """The training conversations, always the same: `{"messages": [{"role", "content"}, ...], "topic": str}`."""
    return (_conversation(index) for index in range(NUM_CONVERSATIONS))


def items(task: str, split: Literal["tuning", "test"]) -> list[dict[str, Any]]:
    """The items of `task`: `{"messages": [...], "answer": str}`, as `corpus.items` gives them."""
    if task == "topics_recall":
        return [_item(topic, [name]) for topic in _TOPICS[:LASTING] for name in _facts(topic)]
    rng = Random(f"{task} {split}")
    unseen = _TOPICS[LASTING + PASSING :][split == "tuning" :: 2]
    return [_item(topic, [*_shuffled(topic, rng), rng.choice([*_facts(topic)])]) for topic in unseen[:NUM_ITEMS]]


def _conversation(index: int) -> dict[str, Any]:
    rng = Random(f"tiny_topics {index}")
    place = rng.choice((rng.randrange(LASTING), LASTING + rng.randrange(PASSING)))
    topic = _TOPICS[place]
    return {
        "messages": _messages(topic, _shuffled(topic, rng)[: rng.choice((1, 1, 2, 3))]),
        "topic": " ".join(topic),
    }


def _item(topic: Words, names: list[str]) -> dict[str, Any]:
    messages = _messages(topic, names)
    return {"messages": messages[:-1], "answer": messages[-1]["content"]}


def _shuffled(topic: Words, rng: Random) -> list[str]:
    names = list(_facts(topic))
    rng.shuffle(names)
    return names


def _facts(topic: Words) -> dict[str, str]:
    """What is to be known of a topic: name -> value."""
    rng = Random(f"facts {' '.join(topic)}")
    return {name: rng.choice(VALUES) for name in rng.sample(WORDS, NAMES_PER_TOPIC)}


def _messages(topic: Words, names: list[str]) -> Messages:
    facts = _facts(topic)
    return [
        {"role": role, "content": content}
        for name in names
        for role, content in (("user", f"{' '.join(topic)}: {name}"), ("assistant", f"= {name} {facts[name]}"))
    ]


_TOPICS: list[Words] = [(one, two) for one in WORDS for two in WORDS if one != two]
Random("topics").shuffle(_TOPICS)
