"""Scores checkpoints with lm-eval.

lm-eval builds the requests, filters and scores. What is ours: which rows it gets (`rows.py`, `prompts.py`, put
together in `lmtasks.py`), what writes the answers (`engine.py`), where its scorers need help (`scorers.py`), and
what comes out as a result (`lmresults.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from packcli.config import EvalSpec
from packcli.errors import MissingError
from packcli.eval import lmresults, lmtasks, prompts, protocol, scorers, stats
from packcli.eval.engines import engine
from packcli.eval.engines.responses import Recorded
from packcli.files import digest

if TYPE_CHECKING:
    from packcli.eval.sandbox.sandbox import Sandbox

Sample = dict[str, Any]
Note = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The headline score of one task on one checkpoint.

    `score` and `stderr` are fractions of 1, over all items of all parts; `stderr` is NaN for a single item. `n` of
    the task's `n_total` items were scored: fewer means a partial run, by a limit or for the reason in `left_out`.
    `health` says how far the score can be trusted, each a share of the `n` items: `truncated` (of the prompts, of
    which an item may have several: it did not fit and lost its beginning); for generated
    answers also `empty` (nothing was written), `no_answer` (none was
    found in it) and `cut` (it reached the length limit), and `mean_tokens`, a number of tokens; and the scores
    beside the headline by the name of their filter or metric.
    `parts` are score and `n` of each part of a task that has several. `protocol` says how the items were asked.
    """

    task: str
    metric: str
    score: float
    stderr: float
    n: int
    n_total: int
    version: int
    health: dict[str, float]
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: scorers.LeftOut | None = None
    protocol: dict[str, Any] = field(default_factory=dict)


class ScoredTask(NamedTuple):
    """The result of one task, what each of its items earned (0 to 1), and lm-eval's samples and report of it."""

    result: TaskResult
    items: list[float]
    samples: list[Sample]
    report: dict[str, Any]


class Harness:
    """Keeps the parsed tasks between checkpoints: importing and loading cost more than scoring a small model."""

    def __init__(
        self,
        spec: EvalSpec | None = None,
        *,
        device: str | None = None,
        unsafe_no_sandbox: bool = False,
        note: Note | None = None,
    ) -> None:
        """`spec`: its `tasks` are not looked at; its `limit` is for every part of a task. `device`: see `engine`.

        `note(done, total, what)` is told what goes on.
        """
        self._spec = spec or EvalSpec()
        self._bench_data = Path(self._spec.bench_data) if self._spec.bench_data else None
        self._device = device
        self._unsafe_no_sandbox = unsafe_no_sandbox
        self._built: dict[str, tuple[str, lmtasks.Built]] = {}
        self._note = note

    @property
    def _as_turns(self) -> bool:
        return self._spec.fewshot == "turns"

    def require(self, task: str) -> None:
        """Make sure that all it takes to score `task` is there, but for the checkpoint; loads no model.

        Raises:
            ConfigError: no such task.
            MissingError: a benchmark file, a package or the sandbox is not there.
            IntegrityError: a benchmark file is not the one the task scores.
        """
        protocol.check_files(task, self._bench_data)
        _require_lm_eval()
        packaged = protocol.load(task)
        with engine.quiet():
            scorers.require(packaged)
        self._sandbox(packaged)

    def evaluate(self, checkpoint: Path | str, tasks: Sequence[str]) -> Iterator[tuple[TaskResult, list[Sample]]]:
        """`load` once and `score` each of `tasks`, as soon as it is asked for.

        Raises, before anything is scored:
            ConfigError: unknown task; as `load`.
            MissingError, IntegrityError: as `require`.
        """
        names = protocol.expand(tasks)
        for name in names:
            self.require(name)
        lm = self.load(checkpoint)
        return ((scored.result, scored.samples) for scored in (self.score(lm, name) for name in names))

    def load(self, checkpoint: Path | str) -> Any:
        """What answers, for `score`.

        Raises:
            ConfigError, MissingError: as `engine.load`; lm-eval is not there.
        """
        _require_lm_eval()
        with engine.quiet():
            return engine.load(
                checkpoint,
                chat_template=self._spec.chat_template,
                batch_size=self._spec.batch_size,
                device=self._device,
                engine=self._spec.engine,
                base_url=self._spec.base_url,
                processes=self._spec.processes,
            )

    def score(self, lm: Any, task: str, kept: tuple[Path, str] | None = None) -> ScoredTask:
        """Ask and score one task.

        `kept`: a file, and the eval id it belongs to, where answers are kept as they come: what is in it already
        is not asked again.

        Raises:
            IntegrityError: `kept` is damaged or another's.
        """
        from lm_eval.evaluator import evaluate

        packaged = protocol.load(task).asked(chat_template=self._spec.chat_template)
        with engine.quiet():
            engine.check_room(packaged, lm.max_length)
            built = self._task(packaged, lm)
            asked = Recorded(lm, *kept, self._tell) if kept else lm
            scores = evaluate(
                asked,
                {"tasks": {part.config.task: part for part in built.parts.values()}, "groups": built.groups},
                limit=self._spec.limit,
                bootstrap_iters=lmresults.BOOTSTRAP_ITERS,
                # Embedded items come rendered: lm-eval's own chat prompts know no turns before the last.
                apply_chat_template=self._spec.chat_template and not packaged.facts.embedded,
                fewshot_as_multiturn=self._as_turns,
            )
            earned = {
                name: [float(entry[packaged.facts.metric]) for entry in _items(packaged, scores, part)]
                for name, part in built.parts.items()
            }
            health = _health(packaged, built, scores, _truncated(lm, built)) | (asked.facts() if kept else {})
            prompt = next(iter(scores["samples"].values()))[0]["arguments"][0][0]
            result = _result(packaged, built, earned, health, self._protocol(packaged, built, lm, prompt))
            report = lmresults.document(packaged, built, scores, lm, self._spec)
            items = [one for own in earned.values() for one in own]
            return ScoredTask(result, items, lmresults.samples(packaged, scores), report)

    def _task(self, packaged: protocol.Task, lm: Any) -> lmtasks.Built:
        """lm-eval's task objects, kept while their rows stay the same."""
        key = ""
        if packaged.facts.embedded:
            key = prompts.rendering_key(lm.tokenizer) if self._spec.chat_template else "plain"
        elif packaged.family is not None:
            key = prompts.tokenizing_key(lm.tokenizer)
        kept = self._built.get(packaged.name)
        if kept is None or kept[0] != key:
            built = lmtasks.build(
                packaged,
                lm.tokenizer,
                bench_data=self._bench_data,
                chat_template=self._spec.chat_template,
                sandbox=self._sandbox(packaged),
                note=self._tell,
            )
            kept = self._built[packaged.name] = (key, built)
        return kept[1]

    def _tell(self, done: int, total: int, what: str) -> None:
        if self._note is not None:
            self._note(done, total, what)

    def _sandbox(self, packaged: protocol.Task) -> Sandbox | None:
        """What runs the code that a model wrote, where the task has any."""
        if packaged.facts.scorer != "humaneval":
            return None
        from packcli.eval.sandbox import sandbox

        return sandbox.find(unsafe=self._unsafe_no_sandbox)

    def _protocol(self, packaged: protocol.Task, built: lmtasks.Built, lm: Any, prompt: str) -> dict[str, Any]:
        """How the items were asked: what two scores have to share to be compared."""
        config, facts = packaged.config, packaged.facts
        generation = config.get("generation_kwargs", {})
        task = next(iter(built.parts.values()))
        description = task.resolve_field(task.eval_docs[0], task.config.description)
        box = self._sandbox(packaged)
        return {
            "shots": config["num_fewshot"],
            "shots_as": "turns" if self._spec.chat_template and self._as_turns else "text",
            "chat_template": digest(lm.tokenizer.chat_template) if self._spec.chat_template else None,
            # lm-eval drops it without a word where a chat template takes no system turn.
            "description": description.strip() in prompt if description else None,
            "decoding": "greedy" if generation else "likelihood of given answers",
            "stops": generation.get("until", []),
            "max_tokens": generation.get("max_gen_toks"),
            "extractor": facts.extractor,
            "metric": facts.metric,
            "data": built.data,
            "sandbox": box.name if box else None,
            "engine": engine.identity(self._spec.engine),
            "lm_eval": protocol.lm_eval_version(),
        }


def _items(packaged: protocol.Task, scores: dict[str, Any], part: Any) -> list[dict[str, Any]]:
    """What lm-eval logged of a part's items under the headline's filter: it does so once for each filter."""
    return [entry for entry in scores["samples"][part.config.task] if entry["filter"] == packaged.facts.filter]


def _health(
    packaged: protocol.Task, built: lmtasks.Built, scores: dict[str, Any], truncated: float
) -> dict[str, float]:
    """How far the score can be trusted, and the other scores that lm-eval gives."""
    headline = f"{packaged.facts.metric},{packaged.facts.filter}"
    health = {"truncated": truncated}
    if packaged.config["output_type"] == "generate_until":
        entries = [entry for part in built.parts.values() for entry in _items(packaged, scores, part)]
        silent = sum(not entry["resps"][0][0].strip() for entry in entries)
        unfound = sum(scorers.extracted(packaged, entry["filtered_resps"][0]) is None for entry in entries)
        health |= {"empty": silent / len(entries), "no_answer": unfound / len(entries)}
    counts = {name: int(count["effective"]) for name, count in scores["n-samples"].items()}
    for name in scores["results"][next(iter(counts))]:
        metric, _, filter_ = name.partition(",")
        if name == headline or not filter_ or metric.endswith("_stderr"):
            continue
        total = math.fsum(scores["results"][task][name] * count for task, count in counts.items())
        health[filter_ if metric == packaged.facts.metric else metric] = total / sum(counts.values())
    return health


def _result(
    packaged: protocol.Task,
    built: lmtasks.Built,
    earned: dict[str, list[float]],
    health: dict[str, float],
    stated: dict[str, Any],
) -> TaskResult:
    """`earned`: what each item of each part did, 0 to 1."""
    every = [one for own in earned.values() for one in own]
    score, stderr = stats.mean_stderr(every)
    return TaskResult(
        task=packaged.name,
        metric=packaged.facts.metric,
        score=score,
        stderr=math.nan if stderr is None else stderr,
        n=len(every),
        n_total=built.n_total,
        version=packaged.facts.version,
        health=health,
        parts={part: {"score": stats.mean_stderr(own)[0], "n": len(own)} for part, own in earned.items() if part},
        left_out=built.left_out,
        protocol=stated,
    )


def _truncated(lm: Any, built: lmtasks.Built) -> float:
    """The share of requests that lost the beginning of their prompt."""
    tasks = list(built.parts.values())
    requests = [request for task in tasks for request in task.instances]
    asked = SimpleNamespace(OUTPUT_TYPE=tasks[0].OUTPUT_TYPE, instances=requests)
    return engine.num_truncated(lm, asked) / len(requests)


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingError("evaluation needs lm-eval", "pip install 'packcli[eval]'") from error
