"""Whatever `eval.tasks` names, scored on one checkpoint.

Benchmarks: `harness.py`. Judged tasks: `judge/`. Probes, which have no score: `probe/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from packcli.config import EvalSpec, SourceSpec
from packcli.eval import protocol
from packcli.eval.engines import engine
from packcli.eval.harness import Harness
from packcli.eval.judge import tasks as judged
from packcli.eval.probe import probes

Note = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`record` is kept in the manifest; beside it what each item earned (None: no verdict), `samples`, and the
    `report` that lm-eval writes of its tasks.

    Probes have no items, and no score in their record.
    """

    record: dict[str, Any]
    items: Sequence[float | None] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trained:
    """What is known of a checkpoint that packcli trained, for the probes.

    `name`: as they call it. `before`: what training started from, if not random weights, and what they call that.
    `sources`: the data it was trained on; None for packcli's own toy corpus.
    """

    name: str
    before: tuple[Path | str, str] | None
    sources: tuple[SourceSpec, ...] | None
    random_weights: bool


def check_files(task: str, spec: EvalSpec) -> None:
    """Make sure the files that `task` reads are there, and the right ones.

    Raises:
        MissingError, IntegrityError, ConfigError: as `protocol.check_files` and `judge.tasks.check_files`.
    """
    match protocol.kind(task):
        case "benchmark":
            protocol.check_files(task, Path(spec.bench_data) if spec.bench_data else None)
        case "judged":
            judged.check_files(task, spec)
        case "probes":
            pass


def check_room(task: str, spec: EvalSpec, context: int) -> None:
    """Raise ConfigError where an answer, or the text of a long task, fills a model of so many positions."""
    match protocol.kind(task):
        case "benchmark":
            engine.check_room(protocol.load(task), context)
        case "judged":
            judged.check_room(task, spec, context)
        case "probes":
            pass


class Scorer:
    """Scores checkpoints by one protocol, one after another: what is loaded for the first serves the next."""

    def __init__(self, spec: EvalSpec, *, unsafe_no_sandbox: bool = False, note: Note | None = None) -> None:
        """`spec`: its `tasks` are not looked at. `note(done, total, what)` is told what goes on."""
        self.spec = spec
        self.harness = Harness(spec, unsafe_no_sandbox=unsafe_no_sandbox, note=self.tell)
        self.task = ""
        self._note = note

    def tell(self, done: int, total: int, what: str) -> None:
        if self._note is not None:
            self._note(done, total, f"{self.task}: {what}")

    def require(self, task: str) -> None:
        """Make sure that all it takes is there but the checkpoint; loads no model and asks nobody.

        Raises:
            ConfigError, MissingError, IntegrityError: as `Harness.require` and `judge.tasks.require`.
        """
        match protocol.kind(task):
            case "benchmark":
                self.harness.require(task)
            case "judged":
                judged.require(task, self.spec)
            case "probes":
                pass

    def on(self, checkpoint: Path | str, trained: Trained | None = None) -> OnCheckpoint:
        """This checkpoint, to be scored; nothing is loaded before a task asks for it."""
        return OnCheckpoint(self, checkpoint, trained)


class OnCheckpoint:
    """One checkpoint; its model is loaded once for all tasks that have it answer."""

    def __init__(self, scorer: Scorer, checkpoint: Path | str, trained: Trained | None) -> None:
        self._scorer, self._checkpoint, self._trained = scorer, checkpoint, trained
        self._lm: Any = None

    def score(self, task: str, *, kept: tuple[Path, str], replies: Callable[[str], Path]) -> Outcome:
        """Score one task, for which `Scorer.require` was called.

        `kept`: where answers are kept as they come, and the eval id they belong to. `replies(judge)`: the file of
        a judge's replies.

        Raises:
            PackcliError: as `Harness.score`, `judge.tasks.score` and `probes.run`.
        """
        scorer, spec = self._scorer, self._scorer.spec
        scorer.task = task
        match protocol.kind(task):
            case "benchmark":
                done = scorer.harness.score(self._model(), task, kept)
                return Outcome(asdict(done.result), done.items, done.samples, done.report)
            case "judged":
                assert spec.judge is not None, "`require` comes first"
                where = replies(spec.judge.model)
                scored = judged.score(self._model(), task, spec, kept=kept, replies=where, note=scorer.tell)
                record = asdict(scored.result)
                record["judged"] = {name: one.model_dump(mode="json") for name, one in scored.judged.items()}
                return Outcome(record, scored.items, scored.samples)
            case "probes":
                return Outcome({"task": task, "probes": self._probes()})

    def _model(self) -> Any:
        if self._lm is None:
            self._lm = self._scorer.harness.load(self._checkpoint)
        return self._lm

    def _probes(self) -> dict[str, Any]:
        chosen, trained = self._scorer.spec.probes, self._trained
        sources = trained.sources if trained and chosen.source is None else None
        before = trained.before if trained and chosen.before is None else None
        if before is not None:
            chosen = chosen.model_copy(update={"before": str(before[0])})
        found = probes.run(
            self._checkpoint,
            chosen,
            sources=sources,
            name=trained.name if trained else None,
            random_weights=trained.random_weights if trained else None,
            note=self._scorer.tell,
        )
        if before is not None:
            found["before"]["checkpoint"] = before[1]  # a path would differ from machine to machine
        return found
