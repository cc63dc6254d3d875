"""The tables of a page: an arm a line, seeds pooled, its single cells below it.

Each cell is a text, with the value to sort by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from packcli.eval import protocol
from packcli.log import plain
from packcli.report import words
from packcli.report.page.gather import Members, Provenance
from packcli.report.records import Group, Probed, Report, Row

Member = Group | Row

UNFOLDED = 20
"""Settings that a page shows all at once: a browser takes seconds to lay out thousands of lines."""


@dataclass(frozen=True, slots=True)
class Cell:
    """`value`: what to sort by, None last; `kind`: a class of `page.css`."""

    text: str
    value: float | str | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    cells: list[Cell]
    single: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """Lines that are compared with each other; `single` ones follow the line they are part of.

    `folded`: only the setting is shown at first.
    """

    setting: str
    lines: list[Line]
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    id: str
    title: str
    about: str
    first: str
    columns: list[str]
    blocks: list[Block]
    code: frozenset[int] = field(default_factory=frozenset)
    """Columns of ids."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Which single cells a page holds: of the first groups, as many as fit in `most`."""

    members: Members
    labels: frozenset[frozenset[tuple[str, str]]]
    rows: list[Row]


def select(report: Report, members: Members, most: int) -> Shown:
    labels, rows = set(), list[Row]()
    for group in report.groups:
        own = members.of(group.labels)
        if len(rows) + len(own) > most:
            break
        labels.add(frozenset(group.labels.items()))
        rows += own
    return Shown(members, frozenset(labels), rows)


Column = tuple[str, Callable[[Member], Cell]]


def comparison(report: Report, single: Shown) -> list[Table]:
    """Scores, what training cost, and what the probes found; those that have anything to show."""
    found = [
        ("scores", "Scores", _scores(report)),
        ("costs", "Cost of training", _costs(report)),
        ("probes", "Inside the model", _probes(report)),
    ]
    return [_table(report, single, id_, title, columns) for id_, title, columns in found if columns]


def _table(report: Report, single: Shown, id_: str, title: str, columns: Sequence[Column]) -> Table:
    blocks, settings = [], report.settings()
    for setting, groups in settings:
        lines = []
        for group in groups:
            lines.append(Line(plain(group.arm) or "all", [shown(group) for _, shown in columns]))
            if frozenset(group.labels.items()) in single.labels:
                for row in single.members.of(group.labels):
                    name = f"seed {plain(row.labels['seed'])}" if "seed" in row.labels else "cell"
                    lines.append(Line(name, [shown(row) for _, shown in columns], single=True))
        blocks.append(Block(words.name(setting), lines, folded=len(settings) > UNFOLDED))
    return Table(id_, title, "Mean over seeds.", "arm", [name for name, _ in columns], blocks)


# Scores ------------------------------------------------------------------------------------------------


def _scores(report: Report) -> list[Column]:
    tasks = dict.fromkeys(
        task for group in report.groups for task in group.task_states if protocol.kind(task) != "probes"
    )
    columns: list[Column] = []
    if tasks and report.baseline is not None:
        columns.append(("difference, points", lambda member: _difference(member, report.baseline)))
        columns.append(("95% interval", _interval))
        columns.append(("detectable, points", _detectable))
    if tasks:
        columns.insert(0, ("average, %", _average))
        columns += [(_task_name(task, report), _task(task)) for task in tasks]
    if any(group.train and group.train.validation_loss is not None for group in report.groups):
        columns.append(("validation loss, nats/token", _validation))
    if tasks:
        columns.append(("scored", _scored))
    return columns


def _task_name(task: str, report: Report) -> str:
    scores = [group.eval[task] for group in report.groups if task in group.eval]
    metric = f" {scores[0].metric}" if scores else ""
    limited = [score.n for score in scores if score.partial]
    return plain(f"{task}{metric}, %{f' (n={min(limited)})' if limited else ''}")


def _task(task: str) -> Callable[[Member], Cell]:
    def shown(member: Member) -> Cell:
        if isinstance(member, Row):
            score = member.eval.get(task)
            return _score(score.score, None, score.stderr) if score else _state(member.tasks.get(task))
        if (pooled := member.eval.get(task)) is None:
            states = member.task_states.get(task)
            return _state(words.states(states, member.n_cells) if states else None)
        return _score(pooled.score, pooled.stderr, pooled.stderr_items)

    return shown


def _score(score: float, seeds: float | None, items: float | None) -> Cell:
    error = f" ± {words.percent(seeds)}" if seeds is not None else ""
    if seeds is None and items is not None:
        error = f" (± {words.percent(items)})"
    return Cell(words.percent(score) + error, score)


def _state(state: str | None) -> Cell:
    return Cell(state or words.NONE, None, "state" if state else "")


def _average(member: Member) -> Cell:
    if member.average is None:
        return _state(words.states(member.states, member.n_cells) if isinstance(member, Group) else member.state)
    if isinstance(member, Row):
        return _score(member.average, None, None)
    return _score(member.average, member.stderr, member.stderr_items)


def _difference(member: Member, baseline: str | None) -> Cell:
    """Set off only where an interval over seeds leaves out 0."""
    if isinstance(member, Row):
        return Cell("")
    if member.arm == baseline:
        return Cell("baseline")
    if member.delta is None:
        return Cell(words.NONE)
    sure = member.interval is not None and not member.interval[0] <= 0 <= member.interval[1]
    kind = ("better" if member.delta > 0 else "worse") if sure else ""
    return Cell(words.points(member.delta), member.delta, kind)


def _interval(member: Member) -> Cell:
    if isinstance(member, Row) or member.delta is None:
        return Cell("")
    if member.interval is not None:
        return Cell(words.interval(member.interval), member.interval[0])
    if (items := member.average_items) is not None:
        return Cell(f"({words.interval((items.low, items.high))})", items.low)
    return Cell("none")


def _detectable(member: Member) -> Cell:
    if isinstance(member, Row) or member.detectable is None:
        return Cell("" if isinstance(member, Row) else words.NONE)
    return Cell(f"{100 * member.detectable:.1f}", member.detectable)


def _validation(member: Member) -> Cell:
    if member.train is None or member.train.validation_loss is None:
        return _state(None if member.train else _train_state(member))
    error = getattr(member.train, "validation_loss_stderr", None)
    text = words.loss(member.train.validation_loss) + (f" ± {words.loss(error)}" if error is not None else "")
    return Cell(text, member.train.validation_loss)


def _scored(member: Member) -> Cell:
    if isinstance(member, Row):
        return Cell(member.state, member.state, "state" if member.state != "done" else "")
    number = f"{member.n_seeds} of {member.n_cells}"
    return Cell(number, member.n_seeds, "" if member.n_seeds == member.n_cells else "state")


# Costs -------------------------------------------------------------------------------------------------


def _costs(report: Report) -> list[Column]:
    on_cpu = all(row.train.device == "cpu" for row in report.rows if row.train)
    columns: list[Column] = [
        ("steps", _trained("steps", words.count)),
        ("slots", _trained("slots", words.large)),
        ("wall time, s", _trained("wall_s", words.seconds)),
        ("CPU time, s", _trained("cpu_s", words.seconds)),
    ]
    if (baseline := report.baseline) is not None:
        measure, name = ("cpu", "less CPU time") if on_cpu else ("wall", "less wall time")
        times = _against(baseline, lambda group: getattr(group.speedup, measure) if group.speedup else None)
        columns += [(name, times), ("fewer slots", _against(baseline, lambda group: group.slot_ratio))]
    columns += [
        ("useful tokens/s", _trained("useful_tokens_per_s", words.rate)),
        ("padded tokens/s", _trained("padded_tokens_per_s", words.rate)),
    ]
    if any(group.train and group.train.mfu is not None for group in report.groups):
        columns.append(("MFU, %", _trained("mfu", words.percent)))
    return [
        *columns,
        ("efficiency, %", _ledger("efficiency", words.percent)),
        ("rows an epoch", _ledger("rows", words.count)),
        ("documents cut", _ledger("documents_cut", words.count)),
        ("tokens truncated", _ledger("tokens_truncated", words.count)),
        ("tokens dropped", _ledger("tokens_dropped", words.count)),
        ("trained", _trained_cells),
    ]


def _ledger(word: str, text: Callable[[float | None], str]) -> Callable[[Member], Cell]:
    def shown(member: Member) -> Cell:
        value = member.ledger.get(word) if member.ledger else None
        return Cell(text(value), value)

    return shown


def _trained(name: str, text: Callable[[float | None], str]) -> Callable[[Member], Cell]:
    def shown(member: Member) -> Cell:
        if member.train is None:
            return _state(_train_state(member))
        value = getattr(member.train, name)
        return Cell(text(value), value)

    return shown


def _train_state(member: Member) -> str:
    return member.train_state if isinstance(member, Row) else words.states(member.train_states, member.n_cells)


def _against(baseline: str, ratio: Callable[[Group], float | None]) -> Callable[[Member], Cell]:
    def shown(member: Member) -> Cell:
        if isinstance(member, Row):
            return Cell("")
        if member.arm == baseline:
            return Cell("baseline", 1.0)
        value = ratio(member)
        return Cell(words.times(value), value)

    return shown


def _trained_cells(member: Member) -> Cell:
    if isinstance(member, Row):
        return Cell(member.train_state, member.train_state, "state" if member.train_state != "done" else "")
    number = member.train.n if member.train else 0
    return Cell(f"{number} of {member.n_cells}", number, "" if number == member.n_cells else "state")


# Probes ------------------------------------------------------------------------------------------------


def _probes(report: Report) -> list[Column]:
    probed = [one for group in report.groups for one in group.probes]
    if not probed:
        return []
    columns: list[Column] = []
    for arm in dict.fromkeys(arm for one in probed for arm in one.crossing):
        columns.append((f"attention across, rows of {plain(arm)}, %", _crossing(arm)))
    columns.append(("loss of a document alone, nats", _alone))
    for other in dict.fromkeys(neighbour for one in probed for neighbour in one.behind):
        columns.append((f"more behind {plain(other)} text, nats", _behind(other)))
    return columns


def mean(values: Sequence[float | None]) -> float | None:
    """Of what is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _probed(member: Member) -> list[Probed]:
    if isinstance(member, Row):
        return [member.probes] if member.probes else []
    return list(member.probes)


def _crossing(arm: str) -> Callable[[Member], Cell]:
    return lambda member: _number(mean([one.crossing.get(arm) for one in _probed(member)]), words.share)


def _alone(member: Member) -> Cell:
    return _number(mean([one.alone for one in _probed(member)]), words.loss)


def _behind(other: str) -> Callable[[Member], Cell]:
    return lambda member: _number(mean([one.behind.get(other) for one in _probed(member)]), words.loss)


def _number(value: float | None, text: Callable[[float | None], str]) -> Cell:
    return Cell(text(value), value)


# Provenance --------------------------------------------------------------------------------------------


def ids(single: Shown) -> Table:
    """The stages behind each single cell: name and id."""
    names = list(dict.fromkeys(name for row in single.rows for name in row.ids))
    lines = [
        Line(words.name(row.labels), [Cell(row.ids.get(name, ""), row.ids.get(name)) for name in names])
        for row in single.rows
    ]
    return Table(
        "ids",
        "Cells and their stages",
        "The id of each stage of a cell.",
        "cell",
        names,
        [Block("", lines)],
        frozenset(range(len(names))),
    )


def stages(found: Provenance) -> Table:
    """When, with what and on what each stage was made."""
    lines = [
        Line(
            stage.id,
            [
                Cell(stage.kind, stage.kind),
                Cell(plain(stage.what), stage.what),
                Cell(stage.finished, stage.finished),
                Cell(str(stage.software), stage.software),
                Cell(str(stage.version), stage.version),
                Cell(plain(stage.ran), stage.ran),
            ],
        )
        for stage in found.stages
    ]
    columns = ["stage", "of", "finished (UTC)", "software", "stage version", "ran on"]
    return Table(
        "stages", "Stages", "When, with what and on what each was made.", "id", columns, [Block("", lines)]
    )
