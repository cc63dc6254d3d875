"""MT-bench, each answer graded by itself: 80 questions of two turns, a rating of 1 to 10 for each turn.

Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685. Which template judges
which turn, and when the reference answer is shown:
https://github.com/lm-sys/FastChat/blob/0e6d3e4beaab/fastchat/llm_judge/gen_judgment.py
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from packcli.errors import DataError
from packcli.eval.judge import templates
from packcli.eval.judge.templates import PublicFile
from packcli.eval.judge.verdicts import JudgedResult, Judgment, Part, Request, Scored, settle, stderr

RULE = "mean of the ratings 1 to 10 over both turns, as FastChat's `single` mode averages them"

_SOURCE = "https://raw.githubusercontent.com/lm-sys/FastChat/0e6d3e4beaab/fastchat/llm_judge/data"
QUESTIONS = PublicFile(
    "mt_bench/question.jsonl",
    "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    f"{_SOURCE}/mt_bench/question.jsonl",
)
REFERENCES = PublicFile(
    "mt_bench/reference_answer_gpt-4.jsonl",
    "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    f"{_SOURCE}/mt_bench/reference_answer/gpt-4.jsonl",
)
PROMPTS = PublicFile(
    "mt_bench/judge_prompts.jsonl",
    "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    f"{_SOURCE}/judge_prompts.jsonl",
)
_WITH_REFERENCE = ("math", "reasoning", "coding")


@dataclass(frozen=True, slots=True)
class Question:
    """Two turns of a user, and for some categories the reference answer to each."""

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Template:
    """`system` and `prompt` as the judge gets them, `{fields}` not filled in."""

    system: str
    prompt: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(orjson.dumps([self.system, self.prompt])).hexdigest()


@dataclass(frozen=True, slots=True)
class MtBench:
    """The questions in the order of their file, and the judge's templates by name."""

    questions: tuple[Question, ...]
    templates: dict[str, Template]


def load(bench_data: Path | None) -> MtBench:
    """The benchmark from its three files below `bench_data`.

    Raises:
        MissingError, IntegrityError: as `templates.read`.
    """
    references = {
        str(row["question_id"]): tuple(row["choices"][0]["turns"]) for row in _rows(bench_data, REFERENCES)
    }
    questions = []
    for row in _rows(bench_data, QUESTIONS):
        number, category = str(row["question_id"]), row["category"]
        shown = references[number] if category in _WITH_REFERENCE else ()
        questions.append(Question(number, category, tuple(row["turns"]), shown))
    prompts = {
        row["name"]: Template(row["system_prompt"], row["prompt_template"]) for row in _rows(bench_data, PROMPTS)
    }
    return MtBench(tuple(questions), prompts)


def requests(bench: MtBench, answers: Mapping[str, Sequence[str]]) -> list[Request]:
    """Two requests for each question: its first turn, and the whole conversation for the second.

    `answers` maps a question's id to the candidate's answer to each turn. An empty one is judged like any other.

    Raises:
        DataError: a question has not as many answers as turns.
    """
    found = []
    for question in bench.questions:
        given = tuple(answers.get(question.id, ()))
        if len(given) != len(question.turns):
            raise DataError(
                f"MT-bench question {question.id} has {len(given)} answers, expected {len(question.turns)}",
                "give the answer to each turn; an empty one counts as an answer",
            )
        found += [_first(bench, question, given), _second(bench, question, given)]
    return found


def result(judgments: Sequence[Judgment]) -> JudgedResult:
    """The mean rating; parts: each turn, and each category over both turns."""
    return settle("mt_bench", "rating", RULE, judgments, _score)


def _rows(bench_data: Path | None, file: PublicFile) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in templates.read(bench_data, file).splitlines() if line.strip()]


def _first(bench: MtBench, question: Question, answers: tuple[str, ...]) -> Request:
    values = {"question": question.turns[0], "answer": answers[0]}
    name = "single-v1"
    if question.references:
        name = "single-math-v1"
        values["ref_answer_1"] = question.references[0]
    return _request(bench.templates[name], question, "turn 1", values, answers[:1])


def _second(bench: MtBench, question: Question, answers: tuple[str, ...]) -> Request:
    values = {f"question_{turn}": text for turn, text in enumerate(question.turns, 1)}
    values |= {f"answer_{turn}": text for turn, text in enumerate(answers, 1)}
    name = "single-v1-multi-turn"
    if question.references:
        name = "single-math-v1-multi-turn"
        values |= {f"ref_answer_{turn}": text for turn, text in enumerate(question.references, 1)}
    return _request(bench.templates[name], question, "turn 2", values, answers)


def _request(
    template: Template, question: Question, part: str, values: dict[str, str], answers: tuple[str, ...]
) -> Request:
    return Request(
        question=question.id,
        part=part,
        groups=(question.category,),
        system=template.system,
        prompt=templates.fill(template.prompt, values, "{"),
        template=template.sha256,
        answers=answers,
        references=question.references,
        form="rating",
        breaks_out=templates.breaks_out(template.prompt, answers),
    )


def _score(judgments: list[Judgment]) -> Scored:
    parts: dict[str, list[float]] = defaultdict(list)
    values: list[float] = []
    questions: list[str] = []
    for judgment in judgments:
        assert judgment.value is not None
        values.append(judgment.value)
        questions.append(judgment.request.question)
        for name in (judgment.request.part, *judgment.request.groups):
            parts[name].append(judgment.value)
    mean = math.fsum(values) / len(values)
    pulls: dict[str, float] = defaultdict(float)
    for question, value in zip(questions, values, strict=True):
        pulls[question] += (value - mean) / len(values)
    return Scored(
        score=mean,
        stderr=stderr(pulls),
        parts={name: Part(score=math.fsum(found) / len(found), n=len(found)) for name, found in parts.items()},
    )
