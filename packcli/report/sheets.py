"""What a report shows, as plain text cells: the terminal and markdown only draw it.

Two sheets a setting: what the arms cost (an arm a line) and what they score (a task a line, an arm a column),
because eight tasks side by side fit no terminal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from packcli.report import words
from packcli.report.records import Group, PooledScore, Report

ARMS_PER_SHEET = 6


@dataclass(frozen=True, slots=True)
class Sheet:
    """`lines`: one string a column of `header`. The first column names the line."""

    title: str
    header: list[str]
    lines: list[list[str]]


def sections(report: Report) -> list[tuple[str, list[Sheet]]]:
    """A titled list of sheets for each setting, all in the order of the sweep."""
    found = []
    for setting, groups in report.settings():
        title = ": ".join(part for part in (report.sweep, words.name(setting)) if part)
        scores = [
            _scores(groups[first : first + ARMS_PER_SHEET], report.baseline)
            for first in range(0, len(groups), ARMS_PER_SHEET)
        ]
        found.append((title, [_cost(groups, report.baseline), *(sheet for sheet in scores if sheet.lines)]))
    return found


# What the arms cost ------------------------------------------------------------------------------------

Column = tuple[str, Callable[[Group], str]]


def _cost(groups: list[Group], baseline: str | None) -> Sheet:
    columns: list[Column] = [
        ("rows", lambda group: _in_ledger(group, "rows")),
        ("documents cut", lambda group: _in_ledger(group, "documents_cut")),
        ("tokens truncated", lambda group: _in_ledger(group, "tokens_truncated")),
        ("efficiency, %", lambda group: words.percent(group.ledger.get("efficiency") if group.ledger else None)),
        ("steps", lambda group: words.count(group.train.steps) if group.train else _untrained(group)),
        ("slots", lambda group: words.large(group.train.slots) if group.train else _untrained(group)),
        ("wall time, s", lambda group: words.seconds(group.train.wall_s) if group.train else _untrained(group)),
        ("CPU time, s", lambda group: words.seconds(group.train.cpu_s) if group.train else _untrained(group)),
        ("useful tokens/s", lambda group: _rate(group)),
    ]
    if any(group.train and group.train.mfu is not None for group in groups):
        columns.append(("MFU, %", lambda group: words.percent(group.train.mfu if group.train else None)))
    columns += [
        ("speed-up, CPU time", lambda group: _speedup(group, baseline, cpu=True)),
        ("speed-up, wall time", lambda group: _speedup(group, baseline, cpu=False)),
        ("seeds trained", lambda group: f"{group.train.n if group.train else 0} of {group.n_cells}"),
    ]
    return Sheet(
        title="Cost of training, mean over seeds",
        header=["arm", *(header for header, _ in columns)],
        lines=[[words.plain(group.arm), *(shown(group) for _, shown in columns)] for group in groups],
    )


def _in_ledger(group: Group, word: str) -> str:
    return words.count(group.ledger.get(word) if group.ledger else None)


def _rate(group: Group) -> str:
    return (
        words.count(round(rate))
        if group.train and (rate := group.train.useful_tokens_per_s)
        else _untrained(group)
    )


def _untrained(group: Group) -> str:
    return words.NONE if group.train else words.states(group.train_states, group.n_cells)


def _speedup(group: Group, baseline: str | None, *, cpu: bool) -> str:
    if group.arm == baseline:
        return "baseline"
    found = group.speedup
    return words.times((found.cpu if cpu else found.wall) if found else None)


# What they score ---------------------------------------------------------------------------------------


def _scores(groups: list[Group], baseline: str | None) -> Sheet:
    tasks = dict.fromkeys(task for group in groups for task in group.task_states)
    lines = [[_task_name(task, groups), *(_score(group, task) for group in groups)] for task in tasks]
    if tasks:
        lines.append(["average, %", *(_average(group) for group in groups)])
        lines.append(["seeds scored", *(f"{group.n_seeds} of {group.n_cells}" for group in groups)])
        if baseline is not None:
            lines.append(
                [f"difference to {words.plain(baseline)}, points", *(_delta(g, baseline) for g in groups)]
            )
            lines.append(["  smallest effect it could show, points", *(_detectable(group) for group in groups)])
    if any(group.train and group.train.validation_loss is not None for group in groups):
        losses = [group.train.validation_loss if group.train else None for group in groups]
        lines.append(["validation loss, nats/token", *(words.loss(loss) for loss in losses)])
    return Sheet(
        title="Scores, mean over seeds",
        header=["task and metric, or what else", *(words.plain(group.arm) for group in groups)],
        lines=lines,
    )


def _task_name(task: str, groups: list[Group]) -> str:
    scores = [group.eval[task] for group in groups if task in group.eval]
    metric = f" {scores[0].metric}" if scores else ""
    limited = [score.n for score in scores if score.partial]
    return words.plain(f"{task}{metric}, %{f' (n={min(limited)})' if limited else ''}")


def _score(group: Group, task: str) -> str:
    if (score := group.eval.get(task)) is None:
        found = group.task_states.get(task)
        return words.states(found, group.n_cells) if found else words.NONE
    few = f" ({score.n_seeds} of {group.n_cells})" if score.n_seeds < group.n_cells else ""
    return f"{words.percent(score.score)}{_error(score.stderr, score.stderr_items)}{few}"


def _error(seeds: float | None, items: float | None) -> str:
    if seeds is not None:
        return f" ± {words.percent(seeds)}"
    return f" (± {words.percent(items)})" if items is not None else ""


def _average(group: Group) -> str:
    if group.average is None:
        return words.states(group.states, group.n_cells)
    return f"{words.percent(group.average)}{_error(group.stderr, group.stderr_items)}"


def _delta(group: Group, baseline: str) -> str:
    if group.arm == baseline:
        return "baseline"
    if group.delta is None:
        return words.NONE
    return f"{words.points(group.delta)}\n{words.interval(group.interval) if group.interval else 'no interval'}"


def _detectable(group: Group) -> str:
    return words.NONE if group.detectable is None else f"{100 * group.detectable:.1f}"


# Below the sheets --------------------------------------------------------------------------------------


def not_done(report: Report) -> list[str]:
    """One line for each cell that is not done, with the cause where a stage failed; many alike are one."""
    lines: dict[str, list[str]] = {}
    for row in report.rows:
        for failure in row.failures:
            hint = f" ({failure.fix})" if failure.fix else ""
            lines.setdefault(words.plain(f"failed, {failure.stage}: {failure.cause}{hint}"), []).append(
                words.name(row.labels)
            )
        if not row.failures and row.state != "done":
            lines.setdefault(row.state, []).append(words.name(row.labels))
    return [f"{what}: {_few(cells)}" for what, cells in lines.items()]


def _few(cells: list[str], most: int = 3) -> str:
    more = f"; and {len(cells) - most} more" if len(cells) > most else ""
    return "; ".join(cells[:most]) + more


def legend(report: Report) -> list[str]:
    """What the signs in the sheets mean, only those that occur."""
    lines = [
        "rows to efficiency: of one epoch. efficiency = kept tokens / slots. useful tokens/s: kept tokens, never padding."
    ]
    if any(group.speedup for group in report.groups):
        lines.append(f"speed-up: time of {report.baseline} / time of the arm, over the seeds both have.")
    scores = [score for group in report.groups for score in group.eval.values()]
    lines += _about_errors(scores)
    if any(group.delta is not None for group in report.groups):
        lines.append(
            "difference: mean over seeds both have, seed by seed, and its 95% interval (Student's t), each on its own: not "
            "corrected for their number. smallest effect: found in 80% of such sweeps."
        )
    return [words.plain(line) for line in lines]


def _about_errors(scores: list[PooledScore]) -> list[str]:
    lines = []
    if any(score.stderr is not None for score in scores):
        lines.append("a ± b: mean over seeds and its standard error, always on the same test items.")
    if any(score.stderr is None for score in scores):
        lines.append(
            "a (± b): a single seed; b is the standard error over test items, and says nothing about other seeds."
        )
    if any(score.partial for score in scores):
        lines.append("(n=...): only so many test items were scored; not comparable with a full run.")
    return lines
