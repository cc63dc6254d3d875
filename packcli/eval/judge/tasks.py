"""The judged tasks: the checkpoint answers, a judge gives verdicts, the benchmark's rule makes a score of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from packcli.config import EvalSpec, JudgeSpec
from packcli.errors import ConfigError, MissingError, RunError
from packcli.eval.checkpoint import first_line
from packcli.eval.engines import engine
from packcli.eval.engines.responses import Recorded
from packcli.eval.harness import TaskResult
from packcli.eval.judge import judge as judging
from packcli.eval.judge import mt_bench, templates, wildbench
from packcli.eval.judge.spec import api_key, key_of, price_of, sampling, server
from packcli.eval.judge.verdicts import JudgedResult, Judgment
from packcli.files import digest

VERSION = 1
"""Raised by hand when a score changes its meaning."""

Chat = list[dict[str, str]]
Note = Callable[[int, int, str], None]

_MOST = 10.0
"""The best score of both benchmarks: WB-Score runs from -8 to 10, ratings from 1 to 10. Ours are shares of it."""
_ANSWER_TOKENS = {"wildbench": 4096, "mt_bench": 1024}
"""As WildBench's scripts (`MAX_TOKENS` of `scripts/_common_vllm.sh`) and FastChat's default have it."""
_PLAIN = {"user": "User", "assistant": "Assistant", "system": "System"}
_PLAIN_STOP = "\n\nUser:"


@dataclass(frozen=True, slots=True)
class Scored:
    """`items`: what each question earned, None without a verdict. `judged`: what the judge's part came to, by name
    (`score`, and `reward` where it was asked for)."""

    result: TaskResult
    items: list[float | None]
    samples: list[dict[str, Any]]
    judged: dict[str, JudgedResult]


@dataclass(frozen=True, slots=True)
class _Question:
    """`turns`: messages up to each answer that is to be written; between them stand the answers before."""

    id: str
    turns: tuple[Chat, ...]


# What is needed ------------------------------------------------------------------------------------------------


def check_files(task: str, spec: EvalSpec) -> None:
    """Make sure that a judge is named and what is to be asked is there.

    Raises:
        MissingError: no judge, or a file is not there.
        IntegrityError: a file is another one.
        ConfigError: the prices, or a budget without a price.
    """
    if spec.judge is None:
        raise MissingError(
            f"task `{task}` is scored by a judge, and none is named",
            "`--judge MODEL` (in a sweep `eval.judge: {model: MODEL}`): docs/judge.md",
        )
    for file in _files(task, spec.judge):
        templates.read(_bench_data(spec), file)
    questions = _questions_file(task, spec)
    if questions is not None and not questions.is_file():
        raise MissingError(f"WildBench needs the file `{questions}`, which is not there", wildbench.how_to_fetch())
    if spec.judge.against is not None and not Path(spec.judge.against).is_file():
        raise ConfigError(f"no file `{spec.judge.against}`", "`against` names another model's WildBench answers")
    price_of(spec.judge)


def require(task: str, spec: EvalSpec) -> None:
    """As `check_files`, and that the judge can be asked; asks nothing.

    Raises:
        MissingError: also: no `OPENAI_API_KEY`, or the package `openai` is not installed.
        ConfigError: also: a URL or key that cannot be one.
    """
    check_files(task, spec)
    server(_judge(spec).base_url)
    api_key()
    if importlib.util.find_spec("openai") is None:
        raise MissingError("judging needs the package `openai`", "pip install 'packcli[judge]'")


def fingerprint(task: str, spec: EvalSpec, sha256: Callable[[Path], str]) -> str:
    """16 hex digits over all that a score depends on but the checkpoint; `sha256` of a file.

    The host that OPENAI_BASE_URL names is not among it: it is not known wherever a sweep is planned. The result
    names it, and replies are kept by it.
    """
    judge = spec.judge
    questions = _questions_file(task, spec)
    files = [questions] if questions else []
    files += [Path(judge.against)] if judge and judge.against else []
    return digest(
        {
            "version": VERSION,
            "task": task,
            "files": [file.sha256 for file in _files(task, judge)],
            "given": [sha256(file) if file.is_file() else "missing" for file in files],
            "limit": spec.limit,
            "chat_template": spec.chat_template,
            "engine": engine.identity(spec.engine),
            "answer_tokens": _answer_tokens(task, judge),
            "judge": judge and [judge.model, judge.base_url and server(judge.base_url).host],
            "asked": judge and [sampling(judge, "score"), judge.length_margin, bool(judge.against)],
        }
    )


def _files(task: str, judge: JudgeSpec | None) -> tuple[templates.PublicFile, ...]:
    if task == "mt_bench":
        return (mt_bench.QUESTIONS, mt_bench.REFERENCES, mt_bench.PROMPTS)
    pairs = (wildbench.PAIR_TEMPLATE,) if judge and judge.against else ()
    return (wildbench.SCORE_TEMPLATE, *pairs)


def _questions_file(task: str, spec: EvalSpec) -> Path | None:
    """Where the questions are that have no checksum; None: on the hub, or not this task."""
    data = _bench_data(spec)
    return data / wildbench.QUESTIONS if data is not None and task == "wildbench" else None


def _bench_data(spec: EvalSpec) -> Path | None:
    return Path(spec.bench_data) if spec.bench_data else None


def _answer_tokens(task: str, judge: JudgeSpec | None) -> int:
    return (judge.max_answer_tokens if judge else None) or _ANSWER_TOKENS[task]


def check_room(task: str, spec: EvalSpec, context: int) -> None:
    """Raise ConfigError where an answer alone would fill a model of so many positions."""
    engine.check_answer_fits(task, _answer_tokens(task, spec.judge), context)


def _judge(spec: EvalSpec) -> JudgeSpec:
    assert spec.judge is not None, "`require` comes first"
    return spec.judge


# The score -----------------------------------------------------------------------------------------------------


def score(lm: Any, task: str, spec: EvalSpec, *, kept: tuple[Path, str], replies: Path, note: Note) -> Scored:
    """Have `lm` answer and the judge give verdicts. Both are kept as they come, in `kept` and `replies`.

    `kept`: as `Recorded` has it. Scores are fractions of 1: WB-Score / 10 (-0.8 to 1), a rating / 10 (0.1 to 1).

    Raises:
        RunError: more than 1% of the verdicts failed, or the budget was too small. What there is, is kept.
        ConfigError, MissingError, IntegrityError, DataError: as `judge.judge` and the loading of the questions.
    """
    match task:
        case "wildbench":
            return _wildbench(lm, spec, kept, replies, note)
        case "mt_bench":
            return _mt_bench(lm, spec, kept, replies, note)
    raise ValueError(task)


def _wildbench(lm: Any, spec: EvalSpec, kept: tuple[Path, str], replies: Path, note: Note) -> Scored:
    judge, data = _judge(spec), _bench_data(spec)
    everything = wildbench.load(data)
    asked = everything[: spec.limit]
    answers = _Answers("wildbench", spec, lm, kept, note)
    questions = [
        _Question(one.session_id, ([message.model_dump() for message in one.conversation_input],)) for one in asked
    ]
    written = answers.write(questions)
    texts = {id_: one[0] for id_, one in written.items()}
    requests = wildbench.score_requests(asked, texts, templates.read(data, wildbench.SCORE_TEMPLATE))
    judgments = judging.judge(requests, spec=judge, cache=replies, note=_saying(note, "verdicts"))
    judged = {"score": wildbench.score(judgments)}
    if judge.against is not None:
        others = wildbench.answers(Path(judge.against))
        pairs = wildbench.pair_requests(asked, texts, others, templates.read(data, wildbench.PAIR_TEMPLATE))
        compared = judging.judge(pairs, spec=judge, cache=replies, note=_saying(note, "comparisons"))
        judged["reward"] = wildbench.reward(compared, margin=judge.length_margin)
        judgments = [*judgments, *compared]
    values = {
        one.request.question: (one.value - 5) * 2 / _MOST
        for one in judgments
        if one.value is not None and not one.request.part
    }
    stated = {"questions": wildbench.fingerprint(asked)}
    return answers.settled("wildbench", judged, len(everything), judgments, values, stated)


def _mt_bench(lm: Any, spec: EvalSpec, kept: tuple[Path, str], replies: Path, note: Note) -> Scored:
    bench = mt_bench.load(_bench_data(spec))
    total = len(bench.questions)
    bench = mt_bench.MtBench(bench.questions[: spec.limit], bench.templates)
    answers = _Answers("mt_bench", spec, lm, kept, note)
    questions = [
        _Question(one.id, tuple([{"role": "user", "content": turn}] for turn in one.turns))
        for one in bench.questions
    ]
    requests = mt_bench.requests(bench, answers.write(questions))
    judgments = judging.judge(requests, spec=_judge(spec), cache=replies, note=_saying(note, "verdicts"))
    ratings: dict[str, list[float]] = {}
    for one in judgments:
        if one.value is not None:
            ratings.setdefault(one.request.question, []).append(one.value)
    values = {id_: sum(found) / len(found) / _MOST for id_, found in ratings.items() if len(found) > 1}
    return answers.settled("mt_bench", {"score": mt_bench.result(judgments)}, total, judgments, values, {})


class _Answers:
    """The checkpoint's answers to the questions of one task, and what is to be said about them."""

    def __init__(self, task: str, spec: EvalSpec, lm: Any, kept: tuple[Path, str], note: Note) -> None:
        self._task, self._spec, self._lm = task, spec, lm
        self._asked = Recorded(lm, *kept, note)
        self._limit = _answer_tokens(task, spec.judge)
        self._num_truncated = 0
        self._written: dict[str, list[str]] = {}
        self._chats: dict[str, Chat] = {}
        check_room(task, spec, lm.max_length)

    def write(self, questions: Sequence[_Question]) -> dict[str, list[str]]:
        """One answer for each turn of each question, by its id; white space around it is cut off."""
        self._written = {question.id: [] for question in questions}
        self._chats = {question.id: [] for question in questions}
        for turn in range(max((len(question.turns) for question in questions), default=0)):
            asked = [question for question in questions if turn < len(question.turns)]
            for question in asked:
                self._chats[question.id] += question.turns[turn]
            requests = [self._request(question.id) for question in asked]
            for question, text in zip(asked, self._asked.generate_until(requests), strict=True):
                self._written[question.id].append(text.strip())
                self._chats[question.id].append({"role": "assistant", "content": text.strip()})
        return self._written

    def _request(self, id_: str) -> SimpleNamespace:
        """As lm-eval's `Instance`: what an engine looks at of it."""
        settings = {
            "until": [] if self._spec.chat_template else [_PLAIN_STOP],
            "max_gen_toks": self._limit,
            "do_sample": False,
            "temperature": 0.0,
        }
        text = self._rendered(id_)
        self._num_truncated += len(self._lm.tok_encode(text)) > self._lm.max_length - self._limit
        return SimpleNamespace(args=(text, settings))

    def _rendered(self, id_: str) -> str:
        chat = self._chats[id_]
        if not self._spec.chat_template:
            return "\n\n".join([*(f"{_PLAIN[one['role']]}: {one['content']}" for one in chat), "Assistant:"])
        from jinja2 import TemplateError

        try:
            text: str = self._lm.apply_chat_template(chat)
        except TemplateError as error:
            raise ConfigError(
                f"{self._task}: the checkpoint's chat template refuses question {id_}: {first_line(error)}",
                "`--no-chat-template` asks in plain text",
            ) from None
        return text

    def settled(
        self,
        task: str,
        judged: Mapping[str, JudgedResult],
        total: int,
        judgments: Sequence[Judgment],
        values: Mapping[str, float],
        stated: dict[str, Any],
    ) -> Scored:
        """`values`: what each question earned, by id; `total` questions there are."""
        found, judge = judged["score"], _judge(self._spec)
        if found.score is None:
            raise RunError(f"no score: {found.reason}", _what_to_do(found, server(judge.base_url).host))
        result = TaskResult(
            task=task,
            metric=found.metric,
            score=found.score / _MOST,
            stderr=float("nan") if found.stderr is None else found.stderr / _MOST,
            n=len(self._written),
            n_total=total,
            version=VERSION,
            health=self._health(judged, len(judgments)),
            parts={name: {"score": part.score / _MOST, "n": part.n} for name, part in found.parts.items()},
            protocol=self._protocol(judged, judgments) | stated,
        )
        items = [values.get(id_) for id_ in self._written]
        return Scored(result, items, self._samples(judgments), dict(judged))

    def _health(self, judged: Mapping[str, JudgedResult], num_judgments: int) -> dict[str, float]:
        texts = [text for one in self._written.values() for text in one]
        found = judged["score"]
        health = {
            "truncated": self._num_truncated / len(texts),
            "empty": sum(not text for text in texts) / len(texts),
            **self._asked.facts(),
            "no_verdict": sum(one.n_failed + one.n_missing for one in judged.values()) / num_judgments,
            "with_marks": found.answers_with_marks / found.n_total,
        }
        if "task_macro" in found.others:
            health["task_macro"] = found.others["task_macro"] / _MOST
        if (reward := judged.get("reward")) is not None and reward.score is not None:
            health["wb_reward"] = reward.score
        return health

    def _protocol(self, judged: Mapping[str, JudgedResult], judgments: Sequence[Judgment]) -> dict[str, Any]:
        spec, judge = self._spec, _judge(self._spec)
        tokenizer = self._lm.tokenizer
        return {
            "chat_template": digest(tokenizer.chat_template) if spec.chat_template else None,
            "decoding": "greedy",
            "stops": [] if spec.chat_template else [_PLAIN_STOP],
            "max_tokens": self._limit,
            "engine": engine.identity(spec.engine),
            "judge": judge.model,
            "judge_host": server(judge.base_url).host,
            "judge_says_it_is": sorted({name for one in judged.values() for name in one.judges}),
            "judge_sampling": sampling(judge, judgments[0].request.form),
            "templates": sorted({one.request.template for one in judgments}),
            "rules": {name: one.rule for name, one in judged.items()},
        }

    def _samples(self, judgments: Sequence[Judgment]) -> list[dict[str, Any]]:
        judge = _judge(self._spec)
        host = server(judge.base_url).host
        verdicts: dict[str, list[dict[str, Any]]] = {id_: [] for id_ in self._written}
        for one in judgments:
            verdicts[one.request.question].append(
                {
                    "part": one.request.part,
                    "value": one.value,
                    "failure": one.failure,
                    "detail": one.detail,
                    "replies": None if one.request.known is not None else key_of(one.request, judge, host),
                }
            )
        return [
            {
                "doc_id": number,
                "question": id_,
                "conversation": self._chats[id_],
                "verdicts": verdicts[id_],
            }
            for number, id_ in enumerate(self._written)
        ]


def _what_to_do(found: JudgedResult, host: str) -> str:
    if "budget" in found.failures:
        return "raise `max_cost_usd` and run again: verdicts that are there are kept"
    if "no connection" in found.failures:
        return f"does {host} answer? Check `--judge-url` or OPENAI_BASE_URL, then run again"
    if found.failures.keys() & {"unreadable", "no score", "out of range", "empty", "cut off"}:
        return "see what this judge writes in `store/judge/` of the run directory: it may not be fit to judge"
    return "run again: verdicts that are there are kept, the others asked for again"


def _saying(note: Note, what: str) -> Note:
    return lambda done, total, remark: note(done, total, f"{what}; {remark}" if remark else what)
