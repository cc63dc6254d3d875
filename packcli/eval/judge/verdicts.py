"""What a judge is asked, what its replies are worth, and when there is a score. Pure; sends nothing.

The text that is judged is not trusted, and neither is the reply: whatever is not exactly a verdict in the form the
template asks for is a failed judgment with a reason, never a number.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Form = Literal["score", "choice", "rating"]
"""How a template asks for a verdict: JSON with a `score` of 1 to 10, JSON with a `choice`, or `[[8]]` in text."""

Failure = Literal[
    "rate limited", "server error", "timeout", "no connection", "request refused",
    "content filter", "refusal", "cut off", "empty", "too long", "unreadable", "no score", "out of range",
    "budget", "not asked",
]  # fmt: skip
MISSING: tuple[Failure, ...] = ("budget", "not asked")
"""Not failures of the judge: judgments that this run never asked for."""

MAX_FAILED = 0.01
"""The share of failed or missing judgments above which there is no score."""

CHOICES = {"A++": 1.0, "A+": 0.5, "A=B": 0.0, "B+": -0.5, "B++": -1.0}
"""What a choice is worth to the answer that was shown first."""

_MAX_CHARS = 100_000
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_FENCE = "```"
_RATING = re.compile(r"\[\[(\d{1,4}(?:\.\d{1,4})?)\]\]")
_NUMBER = re.compile(r"\d{1,4}(?:\.\d{1,4})?")


@dataclass(frozen=True, slots=True)
class Request:
    """One verdict to ask for.

    `question` and `part` (which turn, which order) name it; `groups` are the categories its question belongs to.
    `system` (may be empty) and `prompt` are sent as they are; `template` is the sha256 of the unfilled text.
    `answers` are the judged texts in the order shown. `known` is a verdict that needs no call. `breaks_out`: an
    answer holds a mark that the template uses to show where answers end.
    """

    question: str
    part: str
    groups: tuple[str, ...]
    system: str
    prompt: str
    template: str
    answers: tuple[str, ...]
    references: tuple[str, ...]
    form: Form
    known: float | None = None
    breaks_out: bool = False


@dataclass(frozen=True, slots=True)
class Judgment:
    """A verdict, or why there is none: exactly one of `value` and `failure` is None.

    `value` is 1 to 10, or, for a `choice`, -1 to 1 from the side of the answer that was shown first. `calls`,
    `tokens` (input, output; None: the server did not say), `cost_usd` (None: unknown) and `returned` (what the
    server calls the judge) are those of all replies behind it, in whichever run they came.
    """

    request: Request
    value: float | None
    failure: Failure | None = None
    detail: str = ""
    calls: int = 0
    tokens: tuple[int, int] | None = (0, 0)
    cost_usd: float | None = 0.0
    returned: tuple[str, ...] = ()


class UnusableError(Exception):
    """A reply that is no verdict: `failure`, and a few words of what was found."""

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(failure, detail)
        self.failure: Failure = failure
        self.detail = detail


def read(text: str, form: Form) -> float:
    """The verdict in a judge's reply.

    Raises:
        UnusableError: there is none, more than one, or one outside of what the template allows.
    """
    if not text.strip():
        raise UnusableError("empty", "nothing was written")
    if len(text) > _MAX_CHARS:
        raise UnusableError("too long", f"{len(text):,} characters")
    if _CONTROL.search(text):
        raise UnusableError("unreadable", "control characters")
    match form:
        case "score":
            return _score(_object(text, ("strengths", "weaknesses", "score"))["score"])
        case "choice":
            return _choice(_object(text, ("choice",))["choice"])
        case "rating":
            # A judge may quote an answer that says `[[10]]`: two different ratings are none.
            ratings = {float(rating) for rating in _RATING.findall(text)}
            if len(ratings) != 1:
                raise UnusableError("no score", f"{len(ratings)} different ratings")
            return _in_range(ratings.pop())


def _object(text: str, keys: Sequence[str]) -> dict[str, Any]:
    # WildBench's reader, too, takes line breaks inside of strings for spaces; JSON does not allow them.
    plain = _unfenced(text).replace("\n", " ")
    try:
        found = json.loads(plain, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise UnusableError("unreadable", "not the JSON that was asked for") from None
    if not isinstance(found, dict):
        raise UnusableError("unreadable", "JSON, but no object")
    missing = [key for key in keys if key not in found]
    if missing:
        raise UnusableError("no score", f"no `{missing[0]}`")
    return found


def _unfenced(text: str) -> str:
    """What stands between a first and a last line of ```, where all of `text` does. (A pattern that says so takes
    a second on a thousand line breaks, and years on what a reply may hold.)"""
    first, _, rest = text.strip().partition("\n")
    inner, closing, last = rest.rpartition("\n")
    fenced = first.strip() in (_FENCE, f"{_FENCE}json") and closing and last.strip() == _FENCE
    return inner if fenced else text


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _score(value: object) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return _in_range(float(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _in_range(value)
    raise UnusableError("no score", f"`score` is a {type(value).__name__} that is no number")


def _choice(value: object) -> float:
    if not isinstance(value, str) or value not in CHOICES:
        raise UnusableError("out of range", "`choice` is none of the five")
    return CHOICES[value]


def _in_range(value: float) -> float:
    if not 1 <= value <= 10:
        raise UnusableError("out of range", f"a score of {str(value)[:20]}, not 1 to 10")
    return float(value)


# From judgments to a result ------------------------------------------------------------------------------------


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Part(_Frozen):
    """The score of some of the judgments, and their number."""

    score: float
    n: int


class Scored(_Frozen):
    """What a benchmark's rule makes of judgments: its number, by which rule, and what stands beside it."""

    score: float
    stderr: float | None
    parts: dict[str, Part] = {}
    others: dict[str, float] = {}


class JudgedResult(_Frozen):
    """A judged task on one checkpoint.

    `score` is None where more than 1% of the judgments failed or are missing; `reason` says so, and `parts` and
    `others` are left out with it. `rule` is the arithmetic in words. `n` of `n_total` judgments have a verdict,
    `n_failed` have none although the judge was asked, `n_missing` were not asked for (budget); `failures` counts
    both by reason. `answers_with_marks` counts judgments whose answer holds one of the template's marks. `judges`:
    by which names the server called the judge. `tokens_input`, `tokens_output` and `cost_usd` are None where they
    are not known, and never 0 then.
    """

    task: str
    metric: str
    rule: str
    score: float | None
    stderr: float | None
    reason: str
    n: int
    n_total: int
    n_failed: int
    n_missing: int
    failures: dict[str, int]
    parts: dict[str, Part]
    others: dict[str, float]
    answers_with_marks: int
    judges: tuple[str, ...]
    tokens_input: int | None
    tokens_output: int | None
    cost_usd: float | None

    @property
    def cost(self) -> str:
        """The cost in words."""
        return "cost unknown" if self.cost_usd is None else f"{self.cost_usd:.4f} USD"


def settle(
    task: str, metric: str, rule: str, judgments: Sequence[Judgment], score: Callable[[list[Judgment]], Scored]
) -> JudgedResult:
    """Count the judgments and, where enough of them have a verdict, score these by `score`."""
    usable = [judgment for judgment in judgments if judgment.failure is None]
    failures = Counter(judgment.failure for judgment in judgments if judgment.failure is not None)
    n_missing = sum(failures[name] for name in MISSING)
    n_failed = failures.total() - n_missing
    reason = _why_no_score(len(judgments), n_failed, n_missing, failures)
    scored = None if reason else score(usable)
    tokens = [judgment.tokens for judgment in judgments]
    costs = [judgment.cost_usd for judgment in judgments]
    known = [pair for pair in tokens if pair is not None]
    all_known = len(known) == len(tokens)
    return JudgedResult(
        task=task,
        metric=metric,
        rule=rule,
        score=scored.score if scored else None,
        stderr=scored.stderr if scored else None,
        reason=reason,
        n=len(usable),
        n_total=len(judgments),
        n_failed=n_failed,
        n_missing=n_missing,
        failures=dict(sorted(failures.items())),
        parts=scored.parts if scored else {},
        others=scored.others if scored else {},
        answers_with_marks=sum(judgment.request.breaks_out for judgment in judgments),
        judges=tuple(sorted({name for judgment in judgments for name in judgment.returned})),
        tokens_input=sum(pair[0] for pair in known) if all_known else None,
        tokens_output=sum(pair[1] for pair in known) if all_known else None,
        cost_usd=None if None in costs else math.fsum(cost for cost in costs if cost is not None),
    )


def _why_no_score(n_total: int, n_failed: int, n_missing: int, failures: Counter[Failure]) -> str:
    if n_total == 0:
        return "nothing to judge"
    if n_failed + n_missing <= MAX_FAILED * n_total:
        return ""
    causes = ", ".join(f"{name} {count}" for name, count in sorted(failures.items()))
    return f"{n_failed} of {n_total} judgments failed, {n_missing} are missing ({causes}); at most 1% may"


def stderr(pulls: Mapping[str, float]) -> float | None:
    """Standard error of a score from how far each question pulls it (its influence; they sum to 0).

    For a plain mean, with pulls (x - mean) / n, this is s / sqrt(n). Verdicts on one question are added up before:
    they are not independent. None for a single question.
    """
    if len(pulls) < 2:
        return None
    return math.sqrt(len(pulls) / (len(pulls) - 1) * math.fsum(pull * pull for pull in pulls.values()))
