"""`--wait`: what the jobs of a sweep do, live, until all have ended. Left and rejoined at will; it only looks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from packcli import log
from packcli.errors import LeftError, MissingError
from packcli.launch import slurm, watch
from packcli.launch.cluster import View
from packcli.launch.graph import Stage
from packcli.launch.show import duration
from packcli.launch.watch import Live
from packcli.plan import Plan
from packcli.report import progress
from packcli.report.progress import Progress
from packcli.store import Store

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live as Display

_EVERY_S, _SELDOM_S = 5.0, 30.0
_MANY_JOBS, _SLOW_S = 500, 2.0
_QUIET_LINE_S = 30.0
_REASONS, _NAMED = 3, 2


def follow(plan: Plan, store: Store, every_s: float = _EVERY_S) -> None:
    """Back when no job of the sweep is left.

    `every_s`: how often SLURM is asked; less often where it has much to answer.

    Raises:
        LeftError: Ctrl-C. The jobs go on.
    """
    from rich.live import Live as Display

    console = log.console()
    try:
        if not console.is_terminal:
            _Follower(plan, store, None, every_s).run()
            return
        with Display(console=console, transient=True, auto_refresh=False) as display:
            _Follower(plan, store, display, every_s).run()
    except KeyboardInterrupt:
        raise LeftError("left: the jobs go on", "the same command with --wait rejoins") from None


@dataclass(slots=True)
class _Counts:
    """Jobs as SLURM has them, by state and by what they wait for; stages as the disk has them."""

    queued: int = 0
    running: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    done: int = 0
    failed: int = 0
    stages: int = 0

    def __str__(self) -> str:
        named = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common(_REASONS))
        queued = f"{self.queued:,} queued" + (f" ({named})" if named else "")
        failed = f", {self.failed:,} failed" if self.failed else ""
        return f"jobs: {self.running:,} running, {queued}; stages: {self.done:,} of {self.stages:,} done{failed}"


class _Follower:
    """`display`: where there is a terminal; else lines are written."""

    def __init__(self, plan: Plan, store: Store, display: Display | None, every_s: float) -> None:
        self._plan, self._store, self._display, self._every_s = plan, store, display, every_s
        self._undone: set[Stage] = set(plan.stages())
        self._steps: dict[str, int] = {}
        self._silent = ""

    def run(self) -> None:
        before: dict[str, Live] | None = None
        said_s = -_QUIET_LINE_S
        while before is None or before:
            asked_s = time.monotonic()
            try:
                now = watch.live(self._plan, self._store, View(self._store))
            except MissingError as error:
                self._hear_nothing(error, before or {})
                time.sleep(self._every_s)
                continue
            slow = time.monotonic() - asked_s > _SLOW_S
            self._hear()
            counts = self._counts(now)
            if self._display is not None:
                self._display.update(self._picture(now, counts), refresh=True)
            else:
                for line in self._events(before, now):
                    log.logger.info("%s", line)
                if time.monotonic() - said_s >= _QUIET_LINE_S or not now:
                    said_s = time.monotonic()
                    log.logger.info("%s", self._summary(now, counts))
            before = now
            if now:
                time.sleep(max(self._every_s, _SELDOM_S) if slow or len(now) > _MANY_JOBS else self._every_s)

    # SLURM's silence -----------------------------------------------------------------------------------

    def _hear_nothing(self, error: MissingError, last: Mapping[str, Live]) -> None:
        if not self._silent:
            self._silent = f"{error.cause}; the jobs go on without us, we wait for its answer"
            if self._display is None:
                log.logger.warning("warning: %s", self._silent)
        if self._display is not None:
            self._display.update(self._picture(last, self._counts(last)), refresh=True)

    def _hear(self) -> None:
        if self._silent and self._display is None:
            log.logger.info("SLURM answers again")
        self._silent = ""

    # What is known -------------------------------------------------------------------------------------

    def _counts(self, now: Mapping[str, Live]) -> _Counts:
        states = self._store.states(self._undone)
        self._undone = {stage for stage, state in states.items() if state != "done"}
        busy = {stage for item in now.values() for stage in item.element.stages}
        counts = _Counts(stages=len(self._plan.stages()))
        counts.done = counts.stages - len(self._undone)
        counts.failed = sum(state == "failed" and stage not in busy for stage, state in states.items())
        for item in now.values():
            if item.is_running:
                counts.running += 1
            else:
                counts.queued += 1
                counts.reasons.update([item.seen.reason] if item.seen.reason else [])
        return counts

    def _progress(self, item: Live) -> Progress | None:
        """How far an element is; None of the report."""
        if not item.element.stages:
            return None
        kind, id_ = item.element.stages[0]
        match item.job:
            case "base" | "train":
                since_s = item.attempts[-1].started_s if item.attempts else 0.0
                return progress.training(self._plan.trains[id_], self._store, self._total(id_), since_s)
            case "parts" if item.element.part is not None:
                return progress.shards(self._plan.tokens[id_], self._store, item.element.part)
            case "prepare" if kind == "tokens" and (kind, id_) in self._undone:
                return progress.shards(self._plan.tokens[id_], self._store)
        own = [stage for stage in item.element.stages if stage[0] == ("eval" if item.job == "eval" else "index")]
        done = sum(self._store.state(*stage) == "done" for stage in own)
        return Progress("tasks" if item.job == "eval" else "indexes", done, len(own))

    def _total(self, train: str) -> int | None:
        """Steps of a training: of a long one they take a moment to count."""
        if train not in self._steps and (total := progress.num_steps(self._plan.trains[train], self._store)):
            self._steps[train] = total
        return self._steps.get(train)

    def _left(self, now: Mapping[str, Live], found: Mapping[str, Progress | None]) -> str:
        """Of the whole sweep, where it can be told: only trainings are left, and each runs."""
        rest = [found.get(key) for key, item in now.items() if item.job != "report"]
        left = [item.left_s for item in rest if item is not None and item.left_s is not None]
        return f"about {duration(max(left))} left in all" if left and len(left) == len(rest) else ""

    # Lines ---------------------------------------------------------------------------------------------

    def _events(self, before: Mapping[str, Live] | None, now: Mapping[str, Live]) -> list[str]:
        """One line for each element that began, ended, or was put back into the queue since the last look."""
        if before is None:
            return []
        gone = [item for key, item in before.items() if key not in now]
        how = slurm.ended({item.seen.job.partition("_")[0] for item in gone})
        lines = [f"{_name(item)}: {self._end(item, how.get(item.seen.job))}" for item in gone]
        return lines + [line for key, item in now.items() if (line := _event(before.get(key), item))]

    def _end(self, item: Live, how: str | None) -> str:
        stages = () if item.element.part is not None else item.element.stages
        if stages and all(self._store.state(*stage) == "done" for stage in stages):
            return "done"
        error = next((found for stage in stages if (found := self._store.failure(*stage)) is not None), None)
        if error is not None:
            return f"failed: {error.cause}"
        # Parts and the report leave no word of their own.
        return "done" if not stages and how == slurm.NO_RESULT else how or "ended"

    def _summary(self, now: Mapping[str, Live], counts: _Counts) -> str:
        running = {key: item for key, item in now.items() if item.is_running}
        found = {key: self._progress(item) for key, item in running.items()}
        named = [f"{_name(item)}: {_in_words(found[key])}" for key, item in list(running.items())[:_NAMED]]
        more = len(running) - len(named)
        parts = [str(counts), *named, *([f"and {more:,} more"] if more else []), self._left(now, found)]
        return "; ".join(part for part in parts if part)

    # Table ---------------------------------------------------------------------------------------------

    def _picture(self, now: Mapping[str, Live], counts: _Counts) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        assert self._display is not None
        running = {key: item for key, item in now.items() if item.is_running}
        found = {key: self._progress(item) for key, item in running.items()}
        table = Table(box=box.SIMPLE_HEAD)
        for header in ("job", "kind", "cell", "nodes", "done", "useful tokens/s", "loss", "left", "attempt"):
            table.add_column(header, justify="right" if header in ("useful tokens/s", "loss", "left") else "left")
        room = max(3, self._display.console.height - 8)
        for key, item in list(running.items())[:room]:
            table.add_row(*map(Text, _row(item, found[key])))
        more = len(running) - table.row_count
        lines = [f"and {more:,} more" if more else "", str(counts), self._left(now, found), self._silent]
        return Group(*([table] if running else []), *(Text(log.plain(line)) for line in lines if line))


def _name(item: Live) -> str:
    part = f" part {item.element.part[0] + 1} of {item.element.part[1]}" if item.element.part else ""
    name = "" if item.job == "report" else f" {item.element.name}"
    return f"{item.job}{name}{part} ({item.seen.job})"


def _event(before: Live | None, now: Live) -> str:
    attempt = f", attempt {len(now.attempts)}" if len(now.attempts) > 1 else ""
    began = f"runs on {now.seen.nodes}{attempt}"
    if before is None or not before.is_running:
        return f"{_name(now)}: {began}" if now.is_running else ""
    if not now.is_running:
        how = now.attempts[-1].how if now.attempts else None
        return f"{_name(now)}: requeued" + (f" ({how})" if how else "")
    if len(now.attempts) > len(before.attempts) > 0:
        return f"{_name(now)}: requeued ({now.attempts[-2].how}), {began}"
    return ""


def _in_words(found: Progress | None) -> str:
    if found is None:
        return "runs"
    loss = f", loss {found.loss:.3f}" if found.loss is not None else ""
    speed = f", {found.useful_tokens_per_s:,.0f} useful tokens/s" if found.useful_tokens_per_s is not None else ""
    left = f", about {duration(found.left_s)} left" if found.left_s is not None else ""
    return f"{found}{loss}{speed}{left}"


def _row(item: Live, found: Progress | None) -> tuple[str, ...]:
    rate, loss, left = (
        (found.useful_tokens_per_s, found.loss, found.left_s) if found is not None else (None, None, None)
    )
    return (
        item.seen.job,
        item.job,
        log.plain(item.element.name),
        item.seen.nodes,
        "" if found is None else str(found),
        "" if rate is None else f"{rate:,.0f}",
        "" if loss is None else f"{loss:.3f}",
        "" if left is None else duration(left),
        str(len(item.attempts) or ""),
    )
