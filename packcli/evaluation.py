"""`packcli eval`: one checkpoint by itself, whoever trained it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packcli import log, stages
from packcli.config import EvalSpec
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
    failures: list[Failure]

    def document(self) -> dict[str, Any]:
        """As JSON; `not_run`: causes and what to do about them."""
        not_run = {failure.cause: failure.fix for failure in self.failures}
        return {"checkpoint": self.checkpoint, "results": self.results, "not_run": not_run}

    def shown(self) -> list[RenderableType]:
        """As tables."""
        scored = [result for result in self.results if "score" in result]
        parts: list[RenderableType] = [scores.table(scored), *scores.notes(scored)] if scored else []
        for result in self.results:
            if "probes" in result:
                parts += probed.tables(result["probes"])
        return parts


def evaluate(checkpoint: str, spec: EvalSpec, store: Store, *, unsafe_no_sandbox: bool = False) -> Evaluated:
    """Score what is missing, with progress on stderr; a task that cannot run leaves the others alone.

    Raises:
        ConfigError: no such task or checkpoint.
    """
    orders = stages.foreign_orders(checkpoint, spec, store)
    failures = []
    with log.progress() as display:
        bar = display.add_task("eval", total=None, note="")

        def note(done: int, total: int, what: str) -> None:
            display.update(bar, completed=done, total=total or None, note=what)

        scorer = stages.scorer_for(spec, unsafe_no_sandbox=unsafe_no_sandbox, note=note)
        for order, outcome in stages.evaluate(orders, store, scorer, checkpoint=checkpoint):
            if error := stages.shortfall(order, outcome):
                failures.append(Failure(("eval", order.id), f"{order.task}: {error}", error.fix, error.exit_code))
    # As kept, in the order asked for: a rerun prints the same.
    manifests = [store.manifest("eval", order.id) for order in orders]
    return Evaluated(checkpoint, [manifest.results for manifest in manifests if manifest], failures)


def draw(evaluated: Evaluated, directory: Path) -> list[Path]:
    """The pictures of the probes, where there are any; their paths.

    Raises:
        ConfigError: as `probe_figures.draw`.
    """
    found = [result["probes"] for result in evaluated.results if "probes" in result]
    return [path for one in found for path in probe_figures.draw(one, directory)]
