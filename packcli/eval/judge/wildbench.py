"""WildBench v2: 1,024 tasks of real users. Answers judged alone (WB-Score) or against another model's (WB-Reward).

Lin et al., "WildBench", arXiv 2406.04770. How conversations and checklists are written into the templates, what an
empty answer gets, and the arithmetic of rewards and categories:
https://github.com/allenai/WildBench/tree/d6b8dcaf377d173d031980f97c16e1a82618c03d (`src/eval.py`,
`src/view_wb_eval.py`, `leaderboard/data_dir/_create_tables.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from packcli.errors import DataError, IntegrityError, MissingError
from packcli.eval.judge import templates
from packcli.eval.judge.templates import PublicFile
from packcli.eval.judge.verdicts import JudgedResult, Judgment, Part, Request, Scored, settle, stderr
from packcli.files import digest

NUM_QUESTIONS = 1024
HUB_ID, HUB_CONFIG, HUB_SPLIT = "allenai/WildBench", "v2", "test"
QUESTIONS = "wildbench/test.jsonl"

_COMMIT = "d6b8dcaf377d173d031980f97c16e1a82618c03d"
_SOURCE = f"https://raw.githubusercontent.com/allenai/WildBench/{_COMMIT}/evaluation"
SCORE_TEMPLATE = PublicFile(
    "wildbench/eval_template.score.v2.md",
    "c5984ae77b009f8dad0e8e37093348345f4e8d3099ce812bd7799ef7b73f005f",
    f"{_SOURCE}/eval_template.score.v2.md",
)
PAIR_TEMPLATE = PublicFile(
    "wildbench/eval_template.pairwise.v2.md",
    "ccd57bd8c4c73f4f83cf8963ef3c2697c1c7b9e907ead91e0d0512cca4ae7a11",
    f"{_SOURCE}/eval_template.pairwise.v2.md",
)

SCORE_RULE = "WB-Score: (mean score - 5) * 2, every task counts once; an empty answer scores 1"
REWARD_RULE = "WB-Reward: 1, 0.5, 0, -0.5, -1 for much better to much worse, mean over tasks, each in both orders"

CATEGORIES = {
    "Information seeking": "Information/Advice seeking",
    "Advice seeking": "Information/Advice seeking",
    "Creative Writing": "Creative Tasks",
    "Editing": "Creative Tasks",
    "Brainstorming": "Creative Tasks",
    "Role playing": "Creative Tasks",
    "Others": "Creative Tasks",
    "Coding & Debugging": "Coding & Debugging",
    "Math": "Math & Data Analysis",
    "Data Analysis": "Math & Data Analysis",
    "Reasoning": "Planning & Reasoning",
    "Planning": "Planning & Reasoning",
}
"""The leaderboard's five categories by the tags of a task, which may belong to several."""

WEIGHTS = {
    "Creative Tasks": 0.5,
    "Planning & Reasoning": 1.25,
    "Math & Data Analysis": 1.0,
    "Information/Advice seeking": 0.75,
    "Coding & Debugging": 1.25,
}

_EMPTY = "[This model response is empty.]"
_FIRST, _SECOND = "shown first", "shown second"


class Message(BaseModel):
    """One turn; other columns of the dataset are not looked at."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    role: Literal["user", "assistant", "system"]
    content: str


class Question(BaseModel):
    """A row of the dataset as far as it is needed. The last message is the query to answer."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    session_id: str
    conversation_input: tuple[Message, ...]
    checklist: tuple[str, ...]
    primary_tag: str
    secondary_tags: tuple[str, ...] = ()

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(CATEGORIES[tag] for tag in (self.primary_tag, *self.secondary_tags)))


def load(bench_data: Path | None) -> tuple[Question, ...]:
    """The 1,024 questions from `bench_data`/wildbench/test.jsonl, or without `bench_data` from the hub.

    packcli knows no checksum of them: `fingerprint` says which ones a result is about.

    Raises:
        MissingError: the file is not there, or the hub cannot be reached.
        IntegrityError: not 1,024 rows.
        DataError: a row that is no question.
    """
    rows = _from_hub() if bench_data is None else _from_file(bench_data / QUESTIONS)
    if len(rows) != NUM_QUESTIONS:
        raise IntegrityError(f"WildBench has {NUM_QUESTIONS} tasks, {len(rows)} were found", how_to_fetch())
    return questions(rows)


def questions(rows: Sequence[object]) -> tuple[Question, ...]:
    """Rows of the dataset as questions, in their order.

    Raises:
        DataError: a row that is no question, names a category nobody knows, or is there twice.
    """
    found: dict[str, Question] = {}
    for number, row in enumerate(rows):
        try:
            question = Question.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"WildBench row {number}: `{where}`: {first['msg']}", how_to_fetch()) from None
        unknown = [tag for tag in (question.primary_tag, *question.secondary_tags) if tag not in CATEGORIES]
        if unknown or not question.conversation_input or question.session_id in found:
            problem = f"unknown tag `{unknown[0]}`" if unknown else "no conversation, or there twice"
            raise DataError(f"WildBench row {number}: {problem}", how_to_fetch())
        found[question.session_id] = question
    return tuple(found.values())


def answers(path: Path) -> dict[str, str]:
    """Another model's answers by `session_id`, from a JSON list or JSON lines as WildBench publishes them.

    `output` is a text, or a list whose first text counts.

    Raises:
        DataError: an entry without `session_id` and `output`, or no JSON.
    """
    fix = 'one object an answer: {"session_id": ..., "output": "..."}'
    text = path.read_bytes()
    try:
        listed = text.lstrip().startswith(b"[")
        rows = orjson.loads(text) if listed else [orjson.loads(line) for line in text.splitlines() if line.strip()]
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: no JSON: {error}", fix) from None
    found = {}
    for number, row in enumerate(rows, 1):
        try:
            output = row["output"]
            found[str(row["session_id"])] = output if isinstance(output, str) else str(output[0])
        except (TypeError, KeyError, IndexError):
            raise DataError(f"{path}: entry {number} is no answer", fix) from None
    return found


def fingerprint(asked: Sequence[Question]) -> str:
    """16 hex digits over all that is read of the questions."""
    return digest([question.model_dump(mode="json") for question in asked])


def score_requests(asked: Sequence[Question], answers: Mapping[str, str], template: str) -> list[Request]:
    """One request for each question; an empty answer gets 1 without a call.

    `answers` maps `session_id` to the candidate's text; `template` is the text of `SCORE_TEMPLATE`.

    Raises:
        DataError: a question has no answer.
    """
    found = []
    for question in asked:
        answer = _answer(answers, question)
        values = _context(question) | {"model_output": answer}
        known = None if answer.strip() else 1.0
        found.append(_request(question, "", template, values, (answer,), known))
    return found


def pair_requests(
    asked: Sequence[Question], answers: Mapping[str, str], others: Mapping[str, str], template: str
) -> list[Request]:
    """Two requests for each question: the candidate's answer shown first, and shown second.

    `others` are the answers of the model to compare with; `template` is the text of `PAIR_TEMPLATE`. Where a side
    is empty the other is much better without a call; where both are, it is a tie.

    Raises:
        DataError: a question has no answer.
    """
    found = []
    for question in asked:
        own, other = _answer(answers, question), _answer(others, question)
        for part, pair in ((_FIRST, (own, other)), (_SECOND, (other, own))):
            shown = [answer if answer.strip() else _EMPTY for answer in pair]
            values = _context(question) | {"candidate_A": shown[0], "candidate_B": shown[1]}
            filled = [bool(answer.strip()) for answer in pair]
            known = None if all(filled) else float(filled[0]) - float(filled[1])
            found.append(_request(question, part, template, values, pair, known))
    return found


def score(judgments: Sequence[Judgment]) -> JudgedResult:
    """WB-Score. Parts: the five categories; beside it `task_macro`, their mean by the leaderboard's weights."""
    return settle("wildbench", "wb_score", SCORE_RULE, judgments, _wb_score)


def reward(judgments: Sequence[Judgment], *, margin: int | None) -> JudgedResult:
    """WB-Reward against the other model.

    `margin` (the paper's K, in characters): where the slightly better answer is longer than the other by more than
    that, it is a tie; None leaves lengths alone. Beside the reward: shares of `win_much` to `lose_much`, and for
    position bias, before the length rule, `favours_first` (the mean reward of whichever answer was shown first; 0
    is none) and `orders_agree` (the share of tasks whose two orders name the same winner, or both none).
    """
    length = "no length rule (K = None)"
    if margin is not None:
        length = f"a slight win of an answer longer by more than K = {margin} characters is a tie"
    return settle(
        "wildbench_pair", "wb_reward", f"{REWARD_RULE}; {length}", judgments, partial(_wb_reward, margin)
    )


def how_to_fetch() -> str:
    """What to do about missing questions."""
    return (
        f"export `{HUB_ID}` (config `{HUB_CONFIG}`, split `{HUB_SPLIT}`) to `{QUESTIONS}` below the directory of "
        "`--bench-data`: docs/judge.md"
    )


def _from_file(path: Path) -> list[object]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        raise MissingError(f"WildBench needs the file `{path}`, which is not there", how_to_fetch()) from None
    try:
        return [orjson.loads(line) for line in lines if line.strip()]
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON lines: {error}", how_to_fetch()) from None


def _from_hub() -> list[object]:
    import datasets

    try:
        return list(datasets.load_dataset(HUB_ID, HUB_CONFIG, split=HUB_SPLIT))
    except Exception as error:  # What a hub client raises is no closed set; nothing is judged in here.
        raise MissingError(
            f"cannot load `{HUB_ID}` from the hub ({type(error).__name__})", how_to_fetch()
        ) from error


def _answer(answers: Mapping[str, str], question: Question) -> str:
    if question.session_id not in answers:
        raise DataError(
            f"no answer to WildBench task `{question.session_id}`", "give one to each; an empty one is an answer"
        )
    return answers[question.session_id]


def _context(question: Question) -> dict[str, str]:
    *earlier, query = question.conversation_input
    names = {"user": "USER: ", "assistant": "ASSISTANT: "}
    return {
        "history": "".join(f"{names[turn.role]}{turn.content}\n\n" for turn in earlier if turn.role in names),
        "user_query": query.content,
        "checklist": "".join(f"- {item}\n" for item in question.checklist),
    }


def _request(
    question: Question,
    part: str,
    template: str,
    values: dict[str, str],
    answers: tuple[str, ...],
    known: float | None,
) -> Request:
    return Request(
        question=question.session_id,
        part=part,
        groups=question.categories,
        system="",
        prompt=templates.fill(template, values, "{$"),
        template=hashlib.sha256(template.encode()).hexdigest(),
        answers=answers,
        references=(),
        form="choice" if part else "score",
        known=known,
        breaks_out=templates.breaks_out(template, answers),
    )


def _wb_score(judgments: list[Judgment]) -> Scored:
    values = {judgment.request.question: _adjusted(judgment) for judgment in judgments}
    groups = {judgment.request.question: judgment.request.groups for judgment in judgments}
    mean = math.fsum(values.values()) / len(values)
    parts = _parts(values, groups)
    macro = _task_macro(values, groups, parts)
    return Scored(
        score=mean,
        stderr=stderr({question: (value - mean) / len(values) for question, value in values.items()}),
        parts=parts,
        others=macro,
    )


def _adjusted(judgment: Judgment) -> float:
    assert judgment.value is not None
    return (judgment.value - 5) * 2


def _parts(values: Mapping[str, float], groups: Mapping[str, tuple[str, ...]]) -> dict[str, Part]:
    found: dict[str, list[float]] = defaultdict(list)
    for question, value in values.items():
        for name in groups[question]:
            found[name].append(value)
    return {
        name: Part(score=math.fsum(found[name]) / len(found[name]), n=len(found[name])) for name in sorted(found)
    }


def _task_macro(
    values: Mapping[str, float], groups: Mapping[str, tuple[str, ...]], parts: Mapping[str, Part]
) -> dict[str, float]:
    """The weighted mean of the categories and its standard error; nothing where one of the five has no task."""
    if parts.keys() != WEIGHTS.keys():
        return {}
    shares = {name: weight / math.fsum(WEIGHTS.values()) for name, weight in WEIGHTS.items()}
    macro = math.fsum(shares[name] * part.score for name, part in parts.items())
    pulls = {
        question: math.fsum(
            shares[name] * (value - parts[name].score) / parts[name].n for name in groups[question]
        )
        for question, value in values.items()
    }
    spread = stderr(pulls)
    return {"task_macro": macro} | ({} if spread is None else {"task_macro_stderr": spread})


def _wb_reward(margin: int | None, judgments: list[Judgment]) -> Scored:
    rewards: dict[str, list[float]] = defaultdict(list)
    said: dict[str, list[float]] = defaultdict(list)
    groups: dict[str, tuple[str, ...]] = {}
    toward_first: list[float] = []
    for judgment in judgments:
        assert judgment.value is not None
        request = judgment.request
        own = judgment.value if request.part == _FIRST else -judgment.value
        said[request.question].append(own)
        rewards[request.question].append(0.0 if _only_longer(judgment, margin) else own)
        groups[request.question] = request.groups
        toward_first.append(judgment.value)
    whole = {question: pair for question, pair in rewards.items() if len(pair) == 2}
    means = {question: sum(pair) / 2 for question, pair in whole.items()}
    mean = math.fsum(means.values()) / len(means)
    every = [reward for pair in whole.values() for reward in pair]
    names = {1.0: "win_much", 0.5: "win", 0.0: "tie", -0.5: "lose", -1.0: "lose_much"}
    agree = [_sign(one) == _sign(two) for one, two in (said[question] for question in whole)]
    return Scored(
        score=mean,
        stderr=stderr({question: (value - mean) / len(means) for question, value in means.items()}),
        parts=_parts(means, groups),
        others={name: every.count(value) / len(every) for value, name in names.items()}
        | {
            "favours_first": math.fsum(toward_first) / len(toward_first),
            "orders_agree": sum(agree) / len(agree),
        },
    )


def _only_longer(judgment: Judgment, margin: int | None) -> bool:
    if margin is None or judgment.value is None or abs(judgment.value) != 0.5:
        return False
    first, second = (len(answer) for answer in judgment.request.answers)
    return (first - second if judgment.value > 0 else second - first) > margin


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
