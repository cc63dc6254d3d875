"""A synthetic instruction corpus that packcli generates itself: small questions with one right answer.

Source `tiny` is chat data: single questions, few-shot questions and multi-turn exchanges over a vocabulary of 24
words, with a long tail of lengths. Source `tiny_base` holds the same kinds of question, shorter and many more, and
is meant to warm up a small model from scratch.

What is held out: every question has a key that spells its operation and its operands (`reverse sun cat pen`), and
a hash of the key alone makes it a training (80%), tuning (10%) or test (10%) question. No tuning or test key is
ever asked in either source, be it directly, as a shot, as a turn of an exchange or in the warm-up. A *different*
operation on the same words may be. Nothing here depends on the seed of a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from packcli.errors import ConfigError

VERSION = 1
"""Raised by hand whenever any output of this file changes."""

SOURCES: tuple[str, ...] = ("tiny", "tiny_base")
TASKS: tuple[str, ...] = (
    "tiny_copy",
    "tiny_reverse",
    "tiny_rotate",
    "tiny_swap",
    "tiny_from",
    "tiny_lookup",
    "tiny_few_shot",
    "tiny_turns",
)

ITEMS_PER_SPLIT = 100
"""Per task. A score of one task then has a binomial standard error of at most 5 points."""

NUM_CONVERSATIONS = {"tiny": 3200, "tiny_base": 60000}

Split = Literal["train", "tuning", "test"]
Words = tuple[str, ...]

# Short and few, so that each, with the space before it, becomes one token of even a small trained vocabulary.
WORDS: Words = (
    "red", "sun", "cat", "dog", "map", "cup", "hat", "pen",
    "box", "key", "bus", "ant", "owl", "fig", "jam", "nut",
    "oak", "pie", "rug", "sea", "tin", "van", "web", "yak",
)  # fmt: skip
VALUES: Words = tuple("abcdefghijklmnop")
# Not letters: repeating some letter seen before would be right for marks and a guess for tables.
MARKS: Words = tuple("0123456789")

OPERATIONS: dict[str, Callable[[Words], Words]] = {
    "copy": lambda words: words,
    "reverse": lambda words: words[::-1],
    "rotate": lambda words: words[1:] + words[:1],
    "swap": lambda words: (words[1], words[0], *words[2:]),
}
"""Pairwise different on any three or more distinct words, which is the least that is ever asked."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question on its own. `key` names its content and nothing of its wording."""

    key: str
    ask: str
    answer: str


def split_of(key: str) -> Split:
    """Return where a question belongs; depends on its key only."""
    bucket = hashlib.sha256(key.encode()).digest()[0]
    if bucket < 26:
        return "test"
    return "tuning" if bucket < 52 else "train"


def conversations(source: str) -> Iterator[dict[str, Any]]:
    """Return the training conversations of `source`, always the same ones in the same mixed order.

    Each is `{"messages": [{"role", "content"}, ...], "task": str}`. Raises `ConfigError` for an unknown source.
    """
    if source not in SOURCES:
        raise ConfigError(f"no built-in data source `{source}`", f"choose from: {', '.join(SOURCES)}")
    return (_conversation(source, index) for index in range(NUM_CONVERSATIONS[source]))


def items(task: str, split: Literal["tuning", "test"]) -> list[dict[str, Any]]:
    """Return the held-out items of `task`: `{"messages": [...], "answer": str}`, no question twice.

    `messages` ends with the user turn to answer; a multi-turn item has its right answers before it. An answer is
    right when it equals `answer` exactly. Raises `ConfigError` for an unknown task.
    """
    if task not in TASKS:
        raise ConfigError(f"no built-in task `{task}`", f"choose from: {', '.join(TASKS)}")
    rng = Random(f"{task} {split}")
    found: dict[str, dict[str, Any]] = {}
    while len(found) < ITEMS_PER_SPLIT:
        questions = _exchange(task, rng, split)
        last = questions[-1]
        found.setdefault(last.key, {"messages": _messages(questions)[:-1], "answer": last.answer})
    return list(found.values())


_SHARES = {
    "tiny_copy": 1.0,
    "tiny_reverse": 1.0,
    "tiny_rotate": 1.0,
    "tiny_swap": 1.0,
    "tiny_from": 1.0,
    "tiny_lookup": 1.5,
    "tiny_few_shot": 1.5,
    "tiny_turns": 1.5,
}


def _conversation(source: str, index: int) -> dict[str, Any]:
    rng = Random(f"{source} {index}")
    if source == "tiny_base":
        return {"messages": _messages(_primitive(rng)), "task": source}
    task = rng.choices(TASKS, [_SHARES[task] for task in TASKS])[0]
    return {"messages": _messages(_exchange(task, rng, "train")), "task": task}


def _exchange(task: str, rng: Random, split: Split) -> list[Question]:
    """Draw one conversation of `task`: its last question lies in `split`, all before it in training."""
    match task:
        case "tiny_from":
            return [_draw(lambda: _from(rng, _length(rng, 4, 3, 14)), split)]
        case "tiny_lookup":
            return [_draw(lambda: _lookup(rng, _length(rng, 4, 5, 24)), split)]
        case "tiny_few_shot":
            return _few_shot(rng, _length(rng, 2, 1.5, 10), split)
        case "tiny_turns":
            return _turns(rng, _length(rng, 2, 1.2, 10), split)
        case _:
            operation = task.removeprefix("tiny_")
            return [_draw(lambda: _direct(operation, _words(rng, _length(rng, 3, 2, 12))), split)]


def _primitive(rng: Random) -> list[Question]:
    """Draw a short training question of any kind; a table is asked about several times."""
    kind = rng.choice((*OPERATIONS, "from", *["lookup"] * 4, "few_shot", "turns"))
    match kind:
        case "from":
            return [_draw(lambda: _from(rng, rng.randint(3, 8)), "train")]
        case "lookup":
            return _lookups(rng, rng.randint(3, 8))
        case "few_shot":
            return _few_shot(rng, rng.randint(2, 5), "train")
        case "turns":
            return _turns(rng, rng.randint(2, 3), "train")
        case _:
            return [_draw(lambda: _direct(kind, _words(rng, rng.randint(3, 7))), "train")]


def _direct(operation: str, words: Words) -> Question:
    return Question(f"{operation} {_text(words)}", f"{operation}: {_text(words)}", _equals(operation, words))


def _from(rng: Random, num_words: int) -> Question:
    """Copy the list from this word on."""
    words = _words(rng, num_words)
    place = rng.randrange(num_words - 1)
    key = f"list {_text(words)}: from {words[place]}"
    return Question(key, key, f"= {_text(words[place:])}")


def _lookup(rng: Random, num_pairs: int) -> Question:
    """Which value goes with this name? Names do not repeat, values may."""
    return rng.choice(_table(rng, num_pairs))


def _lookups(rng: Random, num_pairs: int) -> list[Question]:
    """Several training questions to one table, which only the first spells out."""
    questions = [q for q in _table(rng, num_pairs) if split_of(q.key) == "train"]
    rng.shuffle(questions)
    later = [Question(q.key, q.ask.rsplit(": ", 1)[1], q.answer) for q in questions]
    return questions[:1] + later[1:] or _lookups(rng, num_pairs)


def _table(rng: Random, num_pairs: int) -> list[Question]:
    pairs = [(name, rng.choice(VALUES)) for name in _words(rng, num_pairs)]
    listed = ", ".join(f"{name} {value}" for name, value in pairs)
    return [
        Question(f"lookup {name} in {listed}", f"given {listed}: {name}", f"= {name} {value}")
        for name, value in pairs
    ]


def _few_shot(rng: Random, num_shots: int, split: Split) -> list[Question]:
    """Lists whose answers all end in the same mark; nothing but the examples, one to a turn, tells which."""
    mark = rng.choice(MARKS)

    def draw() -> Question:
        words = _text(_words(rng, rng.randint(3, 5)))
        return Question(f"mark {mark} {words}", words, f"= {words} {mark}")

    shots = [_draw(draw, "train") for _ in range(num_shots)]
    return [*shots, _draw(draw, split)]


def _turns(rng: Random, num_turns: int, split: Split) -> list[Question]:
    """A direct question, then operations on the answer before: `now reverse`."""

    def attempt() -> list[Question]:
        words = _words(rng, rng.randint(3, 6))
        questions: list[Question] = []
        for turn in range(num_turns):
            operation = rng.choice(tuple(OPERATIONS))
            question = _direct(operation, words)
            ask = question.ask if turn == 0 else f"now {operation}"
            questions.append(Question(question.key, ask, question.answer))
            words = OPERATIONS[operation](words)
        return questions

    while True:
        questions = attempt()
        parts = [split_of(question.key) for question in questions]
        if parts[-1] == split and all(part == "train" for part in parts[:-1]):
            return questions


def _draw(make: Callable[[], Question], split: Split) -> Question:
    while split_of((question := make()).key) != split:
        pass
    return question


def _words(rng: Random, count: int) -> Words:
    return tuple(rng.sample(WORDS, count))


def _length(rng: Random, least: int, mean_more: float, most: int) -> int:
    """Draw from a long tail: `least` plus an exponential of mean `mean_more`, at most `most`."""
    return min(most, least + int(rng.expovariate(1 / mean_more)))


def _text(words: Words) -> str:
    return " ".join(words)


def _equals(operation: str, words: Words) -> str:
    # The sign gives every word of an answer a space before it: the same token there as in the question.
    return f"= {_text(OPERATIONS[operation](words))}"


def _messages(questions: list[Question]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for question in questions
        for role, content in (("user", question.ask), ("assistant", question.answer))
    ]
