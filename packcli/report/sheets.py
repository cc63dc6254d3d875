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
    """`change`: a signed difference, below `text`; `shown`: 0 lies outside its interval over seeds."""

    text: str
    change: str = ""
    shown: bool = False

    @property
    def lines(self) -> list[str]:
        return [part for part in (*self.text.split("\n"), *self.change.split("\n")) if part]


@dataclass(frozen=True, slots=True)
class Sheet:
    """`header`: a name for each column, the first that of the row names. `blocks`: a setting and its rows."""

    title: str
    header: list[str]
    blocks: list[tuple[str, list[list[Cell]]]]


Column = tuple[str, Callable[[Group], Cell | str]]
Key = frozenset[tuple[str, str]]


def sheets(report: Report, *, everything: bool = False) -> list[Sheet]:
    """Scores, judged scores, cost of training, and what probes found; those that hold anything.

    `everything`: also the columns that only a doubt asks for, and the health of each score.
    """
    groups = report.groups
    benchmarks, judged = _tasks(groups, "benchmark"), _tasks(groups, "judged")
    base = plain(report.baseline) if report.baseline is not None else None
    against = f"; below each its difference to {base}, in points" if base else ""
    tail = _overall(report)
    found = [
        (
            f"scores, %, mean over seeds{against}",
            [*_scores(benchmarks, groups), *(tail if benchmarks or not judged else [])],
        ),
        (
            f"scores by a judge, %, mean over seeds{against}",
            [*_scores(judged, groups), *([] if benchmarks else tail)],
        ),
        ("cost of training, mean over seeds", _costs(report, everything)),
        ("inside the model, mean over seeds", _probes(groups)),
        ("health of the scores, mean over seeds", _health(report) if everything else []),
    ]
    return [_sheet(title, columns, report) for title, columns in found if columns]


def _tasks(groups: Iterable[Group], kind: protocol.Kind) -> list[str]:
    tasks = dict.fromkeys(task for group in groups for task in group.task_states)
    return [task for task in tasks if protocol.kind(task) == kind]


def _sheet(title: str, columns: list[Column], report: Report) -> Sheet:
    def row(group: Group) -> list[Cell]:
        cells = [shown(group) for _, shown in columns]
        return [Cell(plain(group.arm)), *(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)]

    blocks = [(words.name(setting), [row(group) for group in groups]) for setting, groups in report.settings()]
    return Sheet(title, ["arm", *(words.plain_lines(name) for name, _ in columns)], blocks)


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
            return Cell(f"partial\n{group.left_out[task]}")
        found = group.task_states.get(task)
        return Cell(_states(found, group.n_cells) if found else words.NONE)
    as_expected = score.n_seeds == (group.n_seeds or group.n_cells)
    few = "" if as_expected else f"\n({score.n_seeds} of {group.n_cells})"
    items = group.items.get(task)
    change = words.points(items.delta) if items else ""
    return Cell(f"{words.percent(score.score)}{_error(score.stderr, score.stderr_items)}{few}", change)


def _states(found: Mapping[State, int], total: int) -> str:
    return words.states(found, total).replace(", ", ",\n")


def _error(seeds: float | None, items: float | None) -> str:
    if seeds is not None:
        return f" ± {words.percent(seeds)}"
    return f" (± {words.percent(items)})" if items is not None else ""


def _overall(report: Report) -> list[Column]:
    """The average and how it differs from the baseline's; then what needs no task."""
    groups, columns = report.groups, list[Column]()
    if any(protocol.kind(task) != "probes" for group in groups for task in group.task_states):
        limited = any(score.partial for group in groups for score in group.eval.values())
        columns.append(("average" + "\n(partial)" * limited, _average))
        if report.baseline is not None:
            columns += [
                (f"average less\n{report.baseline}'s", lambda group: _delta(group, report.baseline)),
                ("detectable", _detectable),
            ]
        if any(group.p_holm is not None for group in groups):
            columns.append(
                ("p\n(Holm)", lambda group: words.NONE if group.p_holm is None else f"{group.p_holm:.3f}")
            )
        columns.append(("seeds\nscored", lambda group: f"{group.n_seeds} of {group.n_cells}"))
    if any(group.train and group.train.validation_loss is not None for group in groups):
        columns.append(("validation loss,\nnats/token", _validation))
    return columns


def _average(group: Group) -> str:
    if group.average is None:
        return "partial" if group.left_out else _states(group.states, group.n_cells)
    return f"{words.percent(group.average)}{_error(group.stderr, group.stderr_items)}"


def _delta(group: Group, baseline: str | None) -> Cell:
    if group.arm == baseline:
        return Cell("baseline")
    if group.delta is None:
        return Cell(words.NONE)
    bounds, shown = "no interval", False
    if group.interval:
        bounds, shown = words.interval(group.interval), not group.interval[0] <= 0 <= group.interval[1]
    elif found := group.average_items:
        bounds = f"({words.interval((found.low, found.high))})"
    return Cell("", f"{words.points(group.delta)}\n{bounds}", shown)


def _detectable(group: Group) -> str:
    return words.NONE if group.detectable is None else f"{100 * group.detectable:.1f}"


def _validation(group: Group) -> str:
    if group.train is None:
        return _states(group.train_states, group.n_cells)
    stderr = group.train.validation_loss_stderr
    return words.loss(group.train.validation_loss) + (f" ± {words.loss(stderr)}" if stderr is not None else "")


def _health(report: Report) -> list[Column]:
    """Mean over seeds of what each score says of its own trustworthiness: shares in %, mean tokens as such."""
    found: dict[Key, dict[tuple[str, str], list[float]]] = {}
    for row in report.rows:
        labels = frozenset(item for item in row.labels.items() if item[0] != "seed")
        own = found.setdefault(labels, {})
        for task, score in row.eval.items():
            for name, value in score.health.items():
                own.setdefault((task, name), []).append(value)

    def cell(group: Group, task: str, name: str) -> str:
        values = found.get(frozenset(group.labels.items()), {}).get((task, name))
        if not values:
            return words.NONE
        mean = math.fsum(values) / len(values)
        return words.count(mean) if name == "mean_tokens" else words.share(mean)

    names = dict.fromkeys(key for own in found.values() for key in own)
    units = {name: "" if name == "mean_tokens" else ", %" for _, name in names}
    return [(f"{task}\n{name}{units[name]}", partial(cell, task=task, name=name)) for task, name in names]


# What the arms cost ------------------------------------------------------------------------------------


def _costs(report: Report, everything: bool) -> list[Column]:
    groups, baseline = report.groups, report.baseline
    # Beside an accelerator the CPU only waits: its time says nothing of the arm.
    on_cpu = all(group.train.device == "cpu" for group in groups if group.train)
    has_mfu = any(group.train and group.train.mfu is not None for group in groups)
    columns: list[tuple[bool, str, Callable[[Group], Cell | str]]] = [
        (True, "rows\nan epoch", lambda group: _in_ledger(group, "rows")),
        (_any(groups, "documents_cut"), "documents\ncut", lambda group: _in_ledger(group, "documents_cut")),
        (_any(groups, "tokens_truncated"), "tokens\ncut off", lambda group: _in_ledger(group, "tokens_truncated")),
        (_any(groups, "tokens_dropped"), "tokens\ndropped", lambda group: _in_ledger(group, "tokens_dropped")),
        (True, "efficiency,\n%", _efficiency),
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
            (True, f"less {time}\ntime a slot", _against(baseline, _speedup(f"{time.lower()}_per_slot"))),
        ]
    columns.append(
        (True, "seeds\ntrained", lambda group: f"{group.train.n if group.train else 0} of {group.n_cells}")
    )
    return [(name, shown) for wanted, name, shown in columns if wanted]


def _any(groups: Iterable[Group], word: str) -> bool:
    return any(group.ledger and group.ledger.get(word) for group in groups)


def _in_ledger(group: Group, word: str) -> str:
    return words.count(group.ledger.get(word) if group.ledger else None)


def _efficiency(group: Group) -> str:
    return words.percent(group.ledger.get("efficiency") if group.ledger else None)


def _trained(field: str, shown: Callable[[float | None], str]) -> Callable[[Group], str]:
    """A mean of the group's trainings, or in words why there is none."""
    return lambda group: (
        _states(group.train_states, group.n_cells) if group.train is None else shown(getattr(group.train, field))
    )


def _against(baseline: str, ratio: Callable[[Group], float | None]) -> Callable[[Group], str]:
    return lambda group: "baseline" if group.arm == baseline else words.times(ratio(group))


def _slots_a_step(group: Group) -> str:
    found = group.train
    return words.large(found.slots / found.steps if found and found.slots and found.steps else None)


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


def _probe(group: Group, values: Callable[[Probed], float | None], shown: Callable[[float | None], str]) -> str:
    known = [found for one in group.probes if (found := values(one)) is not None]
    if known:
        return shown(math.fsum(known) / len(known))
    states = {} if group.probes else group.task_states.get(protocol.PROBES, {})
    return _states(states, group.n_cells) if states else words.NONE
