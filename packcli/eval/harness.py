"""Scores checkpoints with lm-eval.

lm-eval builds the requests, filters and scores. What is ours: which rows it gets (`rows.py`, `prompts.py`, put
together in `lmtasks.py`), what writes the answers (`engine.py`), where its scorers need help (`scorers.py`), and
what comes out as a result.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from packcli.config import EvalSpec
from packcli.errors import MissingError
from packcli.eval import lmtasks, prompts, protocol, scorers, stats
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
    `health` says how far the score can be trusted, each a share of the `n` items: `truncated` (the prompt did not
    fit and lost its beginning); for generated answers also `empty` (nothing was written), `no_answer` (none was
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
        with _quiet():
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
        return (self.score(lm, name) for name in names)

    def load(self, checkpoint: Path | str) -> Any:
        """What answers, for `score`.

        Raises:
            ConfigError, MissingError: as `engine.load`; lm-eval is not there.
        """
        _require_lm_eval()
        with _quiet():
            return engine.load(
                checkpoint,
                chat_template=self._spec.chat_template,
                batch_size=self._spec.batch_size,
                device=self._device,
                engine=self._spec.engine,
                base_url=self._spec.base_url,
            )

    def score(self, lm: Any, task: str, kept: tuple[Path, str] | None = None) -> tuple[TaskResult, list[Sample]]:
        """The result of one task and its samples.

        A sample is ready for JSON: `doc_id`, `prompt`, `target`, `response` (None where the answer was compared
        without generating), `loglikelihood` of the target (None where it was generated), `extracted` by filter,
        `correct`, lm-eval's `doc_hash`, `prompt_hash`, `target_hash`, and `part` in a task that has parts.
        `kept`: a file, and the eval id it belongs to, where answers are kept as they come: what is in it already
        is not asked again.

        Raises:
            IntegrityError: `kept` is damaged or another's.
        """
        from lm_eval.evaluator import evaluate

        packaged = protocol.load(task).asked(chat_template=self._spec.chat_template)
        with _quiet():
            engine.check_room(packaged, lm)
            built = self._task(packaged, lm)
            asked = Recorded(lm, *kept, self._tell) if kept else lm
            scores = evaluate(
                asked,
                {"tasks": dict(built.parts), "groups": {}},
                limit=self._spec.limit,
                bootstrap_iters=0,  # `_result` works standard errors out, over all parts
                # Embedded items come rendered: lm-eval's own chat prompts know no turns before the last.
                apply_chat_template=self._spec.chat_template and not packaged.facts.embedded,
                fewshot_as_multiturn=self._as_turns,
            )
            samples = [
                sample for part in built.parts for sample in _samples(packaged, part, scores["samples"][part])
            ]
            health = _health(packaged, scores, samples, _truncated(lm, built)) | (asked.facts() if kept else {})
            stated = self._protocol(packaged, built, lm, samples[0]["prompt"])
        return _result(packaged, built, samples, health, stated), samples

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


def _samples(packaged: protocol.Task, part: str, logged: list[dict[str, Any]]) -> list[Sample]:
    """lm-eval logs one entry per item and filter; make it one per item, in plain types."""
    facts, kind = packaged.facts, packaged.config["output_type"]
    samples: dict[int, Sample] = {}
    extracted: dict[int, dict[str, Any]] = {}
    for entry in logged:
        number = int(entry["doc_id"])
        found = extracted.setdefault(number, {})
        responses = [response[0] for response in entry["resps"]]
        target, aimed = str(entry["target"]), 0
        earned = float(entry[facts.metric])
        correct = earned if facts.scorer == "long_context" else bool(earned)
        if kind == "generate_until":
            answer = scorers.extracted(packaged, entry["filtered_resps"][0])
            found[entry["filter"]] = {"answer": answer, "correct": correct}
        elif kind == "multiple_choice":
            choices = [str(arguments[1]).strip() for arguments in entry["arguments"]]
            aimed = int(entry["target"])
            target = choices[aimed]
            answer = choices[max(range(len(choices)), key=lambda choice: responses[choice][0])]
            found[entry["filter"]] = {"answer": answer, "correct": correct}
        if entry["filter"] == facts.filter:
            generated = kind == "generate_until"
            samples[number] = {
                "doc_id": number,
                "prompt": str(entry["arguments"][0][0]),
                "target": target,
                "response": responses[0] if generated else None,
                "loglikelihood": None if generated else float(responses[aimed][0]),
                "extracted": found,
                "correct": correct,
                **({"part": part} if part else {}),
                **{key: str(entry[key]) for key in ("doc_hash", "prompt_hash", "target_hash")},
            }
    return list(samples.values())


def _health(
    packaged: protocol.Task, scores: dict[str, Any], samples: list[Sample], truncated: float
) -> dict[str, float]:
    """How far the score can be trusted, and the other scores that lm-eval gives."""
    headline = f"{packaged.facts.metric},{packaged.facts.filter}"
    health = {"truncated": truncated}
    if samples[0]["response"] is not None:
        answers = [sample["extracted"][packaged.facts.filter]["answer"] for sample in samples]
        health["empty"] = sum(not sample["response"].strip() for sample in samples) / len(samples)
        health["no_answer"] = sum(answer is None for answer in answers) / len(answers)
    counts = {part: int(count["effective"]) for part, count in scores["n-samples"].items()}
    for name in next(iter(scores["results"].values())):
        metric, _, filter_ = name.partition(",")
        if name == headline or not filter_ or metric.endswith("_stderr"):
            continue
        total = math.fsum(scores["results"][part][name] * count for part, count in counts.items())
        health[filter_ if metric == packaged.facts.metric else metric] = total / sum(counts.values())
    return health


def _result(
    packaged: protocol.Task,
    built: lmtasks.Built,
    samples: list[Sample],
    health: dict[str, float],
    stated: dict[str, Any],
) -> TaskResult:
    score, stderr = stats.mean_stderr([float(sample["correct"]) for sample in samples])
    by_part: dict[str, list[float]] = {part: [] for part in built.parts if part}
    for sample in samples:
        if "part" in sample:
            by_part[sample["part"]].append(float(sample["correct"]))
    return TaskResult(
        task=packaged.name,
        metric=packaged.facts.metric,
        score=score,
        stderr=math.nan if stderr is None else stderr,
        n=len(samples),
        n_total=built.n_total,
        version=packaged.facts.version,
        health=health,
        parts={part: {"score": stats.mean_stderr(own)[0], "n": len(own)} for part, own in by_part.items()},
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval, transformers and datasets from writing to the user's terminal; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    silence = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        # Their progress bars take no switch from `evaluate`; they write to whatever stderr is when they start.
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
