"""The synthetic corpus: what it asks, and that nothing held out is ever asked in training."""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from collections.abc import Iterator
from typing import Any

import pytest

from packcli.data import corpus
from packcli.errors import ConfigError

SPLITS = ("tuning", "test")
Messages = list[dict[str, str]]


def solve(messages: Messages) -> tuple[str, str]:
    """Read a conversation from its text alone; return (content of its last question, right answer).

    Written against the wording, not against the generator: a second opinion on keys and answers.
    """
    ask = messages[-1]["content"]
    earlier = messages[:-1]
    if ask.startswith("given "):
        table, name = ask.removeprefix("given ").split(": ")
        pairs = dict(pair.split() for pair in table.split(", "))
        return f"lookup {name} {table}", f"= {name} {pairs[name]}"
    if ask.startswith("list "):
        words, start = ask.removeprefix("list ").split(": from ")
        return f"from {start} {words}", f"= {words[words.index(start) :]}"
    if earlier and earlier[0]["content"].startswith("given "):
        table = earlier[0]["content"].split(": ")[0]
        return solve([{"role": "user", "content": f"{table}: {ask}"}])
    if ask.startswith("now "):
        operation, words = ask.removeprefix("now "), earlier[-1]["content"].removeprefix("= ").split()
    elif ": " in ask:
        operation, _, rest = ask.partition(": ")
        words = rest.split()
    else:  # a shot: a bare list, answered by itself and the mark of the example before it
        mark = earlier[-1]["content"].split()[-1] if earlier else "?"
        return f"mark {mark} {ask}", f"= {ask} {mark}"
    match operation:
        case "copy":
            answer = words
        case "reverse":
            answer = list(reversed(words))
        case "rotate":
            answer = [*words[1:], words[0]]
        case "swap":
            answer = [words[1], words[0], *words[2:]]
        case _:
            raise AssertionError(ask)
    return f"{operation} {' '.join(words)}", f"= {' '.join(answer)}"


def solved_turns(messages: Messages) -> Iterator[tuple[str, str, str]]:
    """Yield (content, right answer, answer given) of every question in a training conversation."""
    for turn in range(1, len(messages), 2):
        content, answer = solve(messages[:turn])
        given = messages[turn]["content"]
        if content.startswith("mark ?"):  # the first shot tells the mark, nothing can foretell it
            mark = given.split()[-1]
            content, answer = content.replace("?", mark, 1), answer.replace("?", mark)
        yield content, answer, given


def digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Any]]]:
    return {source: list(corpus.conversations(source)) for source in corpus.SOURCES}


def test_held_out_questions_never_occur_in_training(trained: dict[str, list[dict[str, Any]]]) -> None:
    asked = {
        content
        for conversations in trained.values()
        for conversation in conversations
        for content, _, _ in solved_turns(conversation["messages"])
    }
    seen: set[str] = set()
    for split in SPLITS:
        held_out = {solve(item["messages"])[0] for task in corpus.TASKS for item in corpus.items(task, split)}
        assert not held_out & asked
        assert not held_out & seen
        seen |= held_out


def test_training_answers_are_right(trained: dict[str, list[dict[str, Any]]]) -> None:
    for conversations in trained.values():
        for conversation in conversations[:3000]:
            for _, answer, given in solved_turns(conversation["messages"]):
                assert given == answer


@pytest.mark.parametrize("task", corpus.TASKS)
def test_items_have_right_answers_and_no_question_comes_twice(task: str) -> None:
    for split in SPLITS:
        found = corpus.items(task, split)
        contents = {solve(item["messages"])[0] for item in found}
        assert len(found) == len(contents) == corpus.ITEMS_PER_SPLIT
        for item in found:
            assert item["messages"][-1]["role"] == "user"
            assert item["answer"] == solve(item["messages"])[1]


def test_corpus_is_the_same_on_every_call(trained: dict[str, list[dict[str, Any]]]) -> None:
    for source in corpus.SOURCES:
        again = itertools.islice(corpus.conversations(source), 2000)
        assert digest(list(again)) == digest(trained[source][:2000])
    assert corpus.items("tiny_turns", "test") == corpus.items("tiny_turns", "test")


def test_lengths_of_the_chat_data_have_a_long_tail(trained: dict[str, list[dict[str, Any]]]) -> None:
    lengths = sorted(
        sum(len(message["content"].split()) for message in conversation["messages"])
        for conversation in trained["tiny"]
    )
    assert statistics.mean(lengths) > 1.2 * statistics.median(lengths)
    assert lengths[-1] > 5 * statistics.median(lengths)


def test_unknown_names_are_refused_at_the_call_not_while_reading() -> None:
    with pytest.raises(ConfigError):
        corpus.conversations("tinny")
    with pytest.raises(ConfigError):
        corpus.items("tinny", "test")
