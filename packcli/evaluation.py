"""`packcli eval`: one checkpoint by itself, whoever trained it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from packcli import log, stages
from packcli.config import EvalSpec
from packcli.errors import ConfigError, PackcliError
from packcli.launch import local
from packcli.launch.local import Failure
from packcli.report import probe_figures, probed, scores
from packcli.store import Store

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What there is of each task, and why there is not more."""

    checkpoint: str
    results: list[dict[str, Any]]
    directories: dict[str, str]
    failures: list[Failure]

    def document(self) -> dict[str, Any]:
        """As JSON; `directories`: where each task's results and samples are; `not_run`: causes, and what to do."""
        not_run = {failure.cause: failure.fix for failure in self.failures}
        return {
            "checkpoint": self.checkpoint,
            "results": self.results,
            "directories": self.directories,
            "not_run": not_run,
        }

    def shown(self) -> list[RenderableType]:
        """As tables."""
        from rich.text import Text

        scored = [result for result in self.results if "score" in result]
        parts: list[RenderableType] = [scores.table(scored), *scores.notes(scored)] if scored else []
        for result in self.results:
            if "probes" in result:
                parts += probed.tables(result["probes"])
        if self.directories:
            parts.append("results.json and samples.jsonl of each task:")
            parts += [Text(f"  {task}: {place}") for task, place in self.directories.items()]
        return parts


def spec_of(**keys: Any) -> EvalSpec:
    """What the command line asks for.

    Raises:
        ConfigError: a value that none can be.
    """
    try:
        return EvalSpec.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + "-".join(map(str, first["loc"])).replace("_", "-")
        raise ConfigError(f"`{option}`: {first['msg']}", "see `packcli eval --help`") from None


def evaluate(checkpoint: str, spec: EvalSpec, store: Store, *, unsafe_no_sandbox: bool = False) -> Evaluated:
    """Score what is missing, with progress on stderr; a task that cannot run leaves the others alone.

    Raises:
        ConfigError: no such task or checkpoint.
    """
    _check(spec)
    orders = stages.foreign_orders(checkpoint, spec, store)
    failures = []
    with local.terminable(), log.progress() as display:
        bar = display.add_task("eval", total=None, note="")

        def note(done: int, total: int, what: str) -> None:
            display.update(bar, completed=done, total=total or None, note=what)

        scorer = stages.scorer_for(spec, unsafe_no_sandbox=unsafe_no_sandbox, note=note)
        for order, outcome in stages.evaluate(orders, store, scorer, checkpoint=checkpoint):
            if not isinstance(outcome, PackcliError):
                log.logger.info("%s", scores.line(outcome.results))
            if error := stages.shortfall(order, outcome):
                failures.append(Failure(("eval", order.id), f"{order.task}: {error}", error.fix, error.exit_code))
    # As kept, in the order asked for: a rerun prints the same.
    done = {order.task: manifest for order in orders if (manifest := store.manifest("eval", order.id))}
    return Evaluated(
        checkpoint,
        results=[manifest.results for manifest in done.values()],
        directories={task: str(store.directory("eval", manifest.id)) for task, manifest in done.items()},
        failures=failures,
    )


def _check(spec: EvalSpec) -> None:
    """What would be passed over in silence."""
    if not spec.tasks:
        raise ConfigError("`--tasks` names no task", "such as `--tasks paper` or `--tasks gsm8k,probes`")
    if spec.base_url is not None and spec.engine != "openai":
        raise ConfigError(f"`--base-url` with `--engine {spec.engine}`, which asks no server", "`--engine openai`")
    if spec.processes is not None and spec.engine != "hf":
        raise ConfigError(f"`--processes` with `--engine {spec.engine}`", "it is for `--engine hf`")


def draw(evaluated: Evaluated, directory: Path) -> list[Path]:
    """The pictures of the probes, where there are any; their paths.

    Raises:
        ConfigError: as `probe_figures.draw`.
    """
    found = [result["probes"] for result in evaluated.results if "probes" in result]
    if not found:
        raise ConfigError("`--figures` draws what `probes` found, and there is nothing of it", "`--tasks probes`")
    return [path for one in found for path in probe_figures.draw(one, directory)]
