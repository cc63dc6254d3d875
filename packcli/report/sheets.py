"""What a report shows, as text cells: the terminal, markdown and LaTeX only draw it.

As in the paper's tables an arm is a row, in blocks of what arms are compared within; a seed is neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from packcli.eval import protocol
from packcli.log import plain
from packcli.report import words
from packcli.report.records import Group, Probed, Report
from packcli.store import State


@dataclass(frozen=True, slots=True)
class Cell:
    """`change`: a signed difference, below `text`; `shown`: it is, after Holm's correction.

    `value`: what to sort by, None where nothing is known; `missing`: `text` says why that is.
    """

    text: str
    change: str = ""
    shown: bool = False
    value: float | str | None = None
    missing: bool = False

    @property
    def lines(self) -> list[str]:
        return [part for part in (*self.text.split("\n"), *self.change.split("\n")) if part]


@dataclass(frozen=True, slots=True)
class Sheet:
    """`header`: a name for each column, the first that of the row names. `blocks`: a setting and its rows."""

    title: str
    header: list[str]
    blocks: list[tuple[str, list[list[Cell]]]]


Column = tuple[str, Callable[[Group], Cell]]
Key = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Table:
    """What a sheet says of a group, column by column; of a single cell too, taken as a group of one.

    The last `summary` columns are what the others come to.
    """

    id: str
    title: str
    columns: list[Column]
    summary: int = 0

    @property
    def header(self) -> list[str]:
        return ["arm", *(words.plain_lines(name) for name, _ in self.columns)]

    def row(self, group: Group) -> list[Cell]:
        return [Cell(plain(group.arm) or "all"), *(shown(group) for _, shown in self.columns)]


def sheets(report: Report, *, everything: bool = False) -> list[Sheet]:
    """Every table of a report over all its groups, by setting."""
    settings = report.settings()
    return [
        Sheet(
            table.title,
            table.header,
            [(words.name(setting), [table.row(group) for group in groups]) for setting, groups in settings],
        )
        for table in tables(report, everything=everything)
    ]


def tables(report: Report, *, everything: bool = False) -> list[Table]:
    """Scores, judged scores, cost of training, and what probes found; those that hold anything.

    `everything`: also the columns that only a doubt asks for, and the health of each score.
    """
    groups = report.groups
    benchmarks, judged = _tasks(groups, "benchmark"), _tasks(groups, "judged")
    base = plain(report.baseline) if report.baseline is not None else None
    against = f"; below each its difference to {base}, in points" if base else ""
    tail = _overall(report)
    tails = (tail if benchmarks or not judged else [], tail if judged and not benchmarks else [])
    scores = f"scores, %, mean over seeds{against}" if benchmarks else "validation loss, mean over seeds"
    found = [
        Table(
            "scores",
            scores,
            [*_scores(benchmarks, groups), *tails[0]],
            len(tails[0]),
        ),
        Table(
            "judged",
            f"scores by a judge, %, mean over seeds{against}",
            [*_scores(judged, groups), *tails[1]],
            len(tails[1]),
        ),
        Table("costs", "cost of training, mean over seeds", _costs(report, everything)),
        Table("probes", "inside the model, mean over seeds", _probes(groups)),
        Table("health", "health of the scores, mean over seeds", _health(report) if everything else []),
    ]
    return [table for table in found if table.columns]


def _tasks(groups: Iterable[Group], kind: protocol.Kind) -> list[str]:
    tasks = dict.fromkeys(task for group in groups for task in group.task_states)
    return [task for task in tasks if protocol.kind(task) == kind]


# What they score ---------------------------------------------------------------------------------------


def _scores(tasks: list[str], groups: Iterable[Group]) -> list[Column]:
    return [(_task_name(task, groups), partial(_score, task=task)) for task in tasks]


def _task_name(task: str, groups: Iterable[Group]) -> str:
    scores = [group.eval[task] for group in groups if task in group.eval]
    limited = min(((score.n, score.n_total) for score in scores if score.partial), default=None)
    counts = f"({limited[0]:,}/{limited[1]:,})" if limited else ""
    return "\n".join(part for part in (task, scores[0].metric if scores else "", counts) if part)


def _score(group: Group, task: str) -> Cell:
    if (score := group.eval.get(task)) is None:
        if task in group.left_out:
            return Cell(f"partial\n{group.left_out[task]}", missing=True)
        found = group.task_states.get(task)
        return _states(found, group.n_cells) if found else Cell(words.NONE)
    as_expected = score.n_seeds == (group.n_seeds or group.n_cells)
    few = "" if as_expected else f"\n({score.n_seeds} of {group.n_cells})"
    items = group.items.get(task)
    change = words.points(items.delta) if items else ""
    text = f"{words.percent(score.score)}{_error(score.stderr, score.stderr_items)}{few}"
    return Cell(text, change, value=score.score)


def _states(found: Mapping[State, int], total: int) -> Cell:
    return Cell(words.states(found, total).replace(", ", ",\n"), missing=True)


def _error(seeds: float | None, items: float | None) -> str:
    if seeds is not None:
        return f" ± {words.error(seeds)}"
    return f" (± {words.error(items)})" if items is not None else ""


def _overall(report: Report) -> list[Column]:
    """The average and how it differs from the baseline's; then what needs no task."""
    groups, columns = report.groups, list[Column]()
    if any(protocol.kind(task) != "probes" for group in groups for task in group.task_states):
        limited = any(score.partial for group in groups for score in group.eval.values())
        columns.append(("average" + "\n(partial)" * limited, _average))
        if report.baseline is not None:
            columns.append((f"average less\n{report.baseline}'s", partial(_delta, baseline=report.baseline)))
        if any(group.p_holm is not None for group in groups):
            columns.append(("p\n(Holm)", lambda group: Cell(words.p_value(group.p_holm), value=group.p_holm)))
        if report.baseline is not None:
            columns.append(("detectable,\npoints", _detectable))
        columns.append(("seeds\nscored", lambda group: _counted(group.n_seeds, group.n_cells)))
    if any(group.train and group.train.validation_loss is not None for group in groups):
        columns.append(("validation loss,\nnats/token", _validation))
    return columns


def _average(group: Group) -> Cell:
    if group.average is None:
        return Cell("partial", missing=True) if group.left_out else _states(group.states, group.n_cells)
    text = f"{words.percent(group.average)}{_error(group.stderr, group.stderr_items)}"
    return Cell(text, value=group.average)


def _delta(group: Group, baseline: str) -> Cell:
    if group.arm == baseline:
        return Cell("baseline")
    if group.delta is None:
        return Cell(words.NONE)
    bounds = "no interval"
    if group.interval:
        bounds = words.interval(group.interval)
    elif over_items := words.over_items(group.average_items):
        bounds = f"({over_items})"
    return Cell("", f"{words.points(group.delta)}\n{bounds}", group.shown, value=group.delta)


def _detectable(group: Group) -> Cell:
    return Cell(words.detectable(group.detectable), value=group.detectable)


def _counted(number: int, of: int) -> Cell:
    return Cell(f"{number} of {of}", value=number)


def _validation(group: Group) -> Cell:
    if group.train is None:
        return _states(group.train_states, group.n_cells)
    stderr, loss = group.train.validation_loss_stderr, group.train.validation_loss
    text = words.loss(loss) + (f" ± {words.loss_error(stderr)}" if stderr is not None else "")
    return Cell(f"{text}\n(own rows)" if group.train.own_validation and loss is not None else text, value=loss)


def _health(report: Report) -> list[Column]:
    """Mean over seeds of what each score says of its own trustworthiness: shares in %, mean tokens as such."""
    found: dict[Key, dict[tuple[str, str], list[float]]] = {}
    for row in report.rows:
        pooled = {axis: value for axis, value in row.labels.items() if axis != "seed"}
        for labels in {frozenset(pooled.items()), frozenset(row.labels.items())}:
            own = found.setdefault(labels, {})
            for task, score in row.eval.items():
                for name, value in score.health.items():
                    own.setdefault((task, name), []).append(value)

    def cell(group: Group, task: str, name: str) -> Cell:
        values = found.get(frozenset(group.labels.items()), {}).get((task, name))
        mean = math.fsum(values) / len(values) if values else None
        return Cell(words.count(mean) if name == "mean_tokens" else words.share(mean), value=mean)

    names = dict.fromkeys(key for own in found.values() for key in own)
    units = {name: "" if name == "mean_tokens" else ", %" for _, name in names}
    return [(f"{task}\n{name}{units[name]}", partial(cell, task=task, name=name)) for task, name in names]


# What the arms cost ------------------------------------------------------------------------------------


def _costs(report: Report, everything: bool) -> list[Column]:
    groups, baseline = report.groups, report.baseline
    # Beside an accelerator the CPU only waits: its time says nothing of the arm.
    on_cpu = all(group.train.device == "cpu" for group in groups if group.train)
    has_mfu = any(group.train and group.train.mfu is not None for group in groups)
    columns: list[tuple[bool, str, Callable[[Group], Cell]]] = [
        (True, "rows\nan epoch", _in_ledger("rows")),
        (_any(groups, "documents_cut"), "documents\ncut", _in_ledger("documents_cut")),
        (_any(groups, "tokens_truncated"), "tokens\ncut off", _in_ledger("tokens_truncated")),
        (_any(groups, "tokens_dropped"), "tokens\ndropped", _in_ledger("tokens_dropped")),
        (True, "efficiency,\n%", _in_ledger("efficiency", words.percent)),
        (True, "optimizer\nsteps", _trained("steps", words.count)),
        (True, "slots\ncomputed", _trained("slots", words.large)),
        (everything, "slots\na step", _slots_a_step),
        (True, "wall\ntime, s", _trained("wall_s", words.seconds)),
        (on_cpu or everything, "CPU\ntime, s", _trained("cpu_s", words.seconds)),
        (True, "useful\ntokens/s", _trained("useful_tokens_per_s", words.rate)),
        (everything, "padded\ntokens/s", _trained("padded_tokens_per_s", words.rate)),
        (has_mfu, "MFU, %", _trained("mfu", words.percent)),
        (everything, "final\nloss", _trained("final_loss", words.loss)),
    ]
    if baseline is not None:
        time = "CPU" if on_cpu else "wall"
        columns += [
            (on_cpu, "speed-up,\nCPU time", _against(baseline, _speedup("cpu"))),
            (True, "speed-up,\nwall time", _against(baseline, _speedup("wall"))),
            (True, "fewer\nslots", _against(baseline, lambda group: group.slot_ratio)),
            (
                True,
                f"{time} time a slot,\nbaseline's / its",
                _against(baseline, _speedup(f"{time.lower()}_per_slot")),
            ),
        ]
    columns.append(
        (True, "seeds\ntrained", lambda group: _counted(group.train.n if group.train else 0, group.n_cells))
    )
    return [(name, shown) for wanted, name, shown in columns if wanted]


def _any(groups: Iterable[Group], word: str) -> bool:
    return any(group.ledger and group.ledger.get(word) for group in groups)


def _in_ledger(word: str, text: Callable[[float | None], str] = words.count) -> Callable[[Group], Cell]:
    def shown(group: Group) -> Cell:
        value = group.ledger.get(word) if group.ledger else None
        return Cell(text(value), value=value)

    return shown


def _trained(field: str, text: Callable[[float | None], str]) -> Callable[[Group], Cell]:
    """A mean of the group's trainings, or in words why there is none."""

    def shown(group: Group) -> Cell:
        if group.train is None:
            return _states(group.train_states, group.n_cells)
        value = getattr(group.train, field)
        return Cell(text(value), value=value)

    return shown


def _against(baseline: str, ratio: Callable[[Group], float | None]) -> Callable[[Group], Cell]:
    def shown(group: Group) -> Cell:
        value = ratio(group)
        return Cell("baseline", value=1.0) if group.arm == baseline else Cell(words.times(value), value=value)

    return shown


def _slots_a_step(group: Group) -> Cell:
    found = group.train
    value = found.slots / found.steps if found and found.slots and found.steps else None
    return Cell(words.large(value), value=value)


def _speedup(field: str) -> Callable[[Group], float | None]:
    return lambda group: getattr(group.speedup, field) if group.speedup else None


# What the probes found -----------------------------------------------------------------------------------


def _probes(groups: Iterable[Group]) -> list[Column]:
    """Nothing where no checkpoint was probed."""
    probed = [one for group in groups for one in group.probes]
    columns = list[Column]()
    for arm in dict.fromkeys(arm for one in probed for arm in one.crossing):
        columns.append(
            (
                f"attention\nacross, rows\nof {arm}, %",
                partial(_probe, values=partial(_across, arm=arm), shown=words.share),
            )
        )
        even = partial(_probe, values=partial(_even, arm=arm), shown=words.share)
        if any(one.even.get(arm) for one in probed):
            columns.append((f"the same,\nspread evenly,\nrows of {arm}, %", even))
    if probed:
        columns.append(("loss of a\ndocument\nalone, nats", partial(_probe, values=_alone, shown=words.loss)))
    for other in dict.fromkeys(neighbour for one in probed for neighbour in one.behind):
        columns.append(
            (
                f"more behind\n{other}\ntext",
                partial(_probe, values=partial(_behind, other=other), shown=words.loss),
            )
        )
    return columns


def _across(one: Probed, arm: str) -> float | None:
    return one.crossing.get(arm)


def _even(one: Probed, arm: str) -> float | None:
    return one.even.get(arm)


def _alone(one: Probed) -> float | None:
    return one.alone


def _behind(one: Probed, other: str) -> float | None:
    return one.behind.get(other)


def _probe(group: Group, values: Callable[[Probed], float | None], shown: Callable[[float | None], str]) -> Cell:
    known = [found for one in group.probes if (found := values(one)) is not None]
    if known:
        mean = math.fsum(known) / len(known)
        return Cell(shown(mean), value=mean)
    states = {} if group.probes else group.task_states.get(protocol.PROBES, {})
    return _states(states, group.n_cells) if states else Cell(words.NONE)
