"""What the paper printed beside what a sweep found: `packcli report --against paper`.

The numbers are in paper_reference.yaml, with their source; where its columns disagree a number is marked. Scores
compare in direction only, and rates not at all: protocols and hardware differ.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from packcli import papersteps
from packcli.config import ARMS, ArmSpec, Spec
from packcli.data.hub import PAPER_SETS
from packcli.eval import protocol
from packcli.log import plain
from packcli.plan import Cell as PlanCell
from packcli.plan import Plan
from packcli.report import words
from packcli.report.records import Group, Report
from packcli.report.sheets import Cell, Sheet
from packcli.yamlfile import parse

SCORES = ("mmlu", "gsm8k", "math", "bbh", "ifeval", "humaneval", "average", "wildbench")
_TIMES = ("speedup", "steps", "steps_per_s", "samples_per_s", "total_time_s")
_HEADS = {
    "speedup": "time of\npadding / its",
    "steps": "optimizer\nsteps",
    "steps_per_s": "steps/s",
    "samples_per_s": "rows/s",
    "total_time_s": "total time\nas printed",
}
_METHODS = ("padding", "random", "greedy")

NO_FRACTION = "not one run scored over the full set; protocol not stated"
PRINTED_TIMES = "about ten times below what the printed step rate gives; not comparable as seconds"


class _Change(Spec):
    model: str
    dataset: str
    arm: str
    task: str
    printed: str


class _Reference(Spec):
    items: dict[str, int]
    models: dict[str, str]
    changes: tuple[_Change, ...]
    cells: dict[str, dict[str, dict[str, dict[str, float]]]]  # model -> data set -> arm -> column -> as printed


class Number(Spec):
    """One printed number and ours. Scores and their changes are fractions of 1.

    `measure`: a task, `average`, `steps`, `steps_per_s`, `samples_per_s` (rows), `total_time_s`, or `speedup`: the
    time of padding over that of the arm, the paper's from its steps and step rates. `paper_change`, `our_change`:
    against padding, each in its own runs. `difference`: ours less the paper's; null where the two do not compare.
    `marks`: what is wrong with the number, the paper's or ours.
    """

    labels: dict[str, str]
    model: str
    dataset: str
    arm: str
    measure: str
    paper: float
    ours: float | None
    difference: float | None
    paper_change: float | None
    our_change: float | None
    marks: tuple[str, ...]


class Against(Spec):
    """`unlike`: in which of epochs, batch, row length and data our runs are not the paper's."""

    numbers: tuple[Number, ...]
    unlike: tuple[str, ...]

    def sheet(self) -> Sheet | None:
        """Three rows an arm: the paper's, ours, and the difference; None where nothing has a counterpart."""
        if not self.numbers:
            return None
        notes = self._notes()
        found: dict[str, dict[str, dict[str, Number]]] = {}
        for one in self.numbers:
            setting = words.name({axis: value for axis, value in one.labels.items() if axis != "arm"})
            found.setdefault(setting or f"{one.model}, {one.dataset}", {}).setdefault(
                one.labels.get("arm", one.arm), {}
            )[one.measure] = one
        measures = [m for m in (*SCORES, *_TIMES) if any(one.measure == m for one in self.numbers)]
        blocks = [
            (setting, [row for arm, by_measure in arms.items() for row in _rows(arm, by_measure, measures, notes)])
            for setting, arms in found.items()
        ]
        title = "the paper and ours: scores in %, below each its change against padding in the same table"
        return Sheet(title, ["arm", *(_HEADS.get(measure, measure) for measure in measures)], blocks)

    def legend(self) -> list[str]:
        if not self.numbers:
            sets, arms = ", ".join(papersteps.datasets()), ", ".join(_METHODS)
            models = " and ".join(_reference().models.values())
            return [
                f"against the paper: none of these cells has a counterpart. It trained {models} on {sets}, with "
                f"the arms {arms} (here also NAME_released)."
            ]
        lines = [
            "the paper: arXiv 2410.08081, tables 3 to 5, from its repository's README at commit ca6945d; one "
            "seed, no errors given. Its scoring protocol and hardware are not ours: compare the direction of a "
            "change, not its size, and no rate. Single cells of the paper are mostly within sampling error; "
            "greedy's direction is consistent over its eight settings and confounded with steps, batch and "
            "dropped conversations.",
            *self._direction(),
        ]
        lines += [f"ours is no counterpart in full: {one}." for one in self.unlike]
        return [plain(line) for line in (*lines, *(f"[{n}] {note}." for note, n in self._notes().items()))]

    def _direction(self) -> list[str]:
        both = [
            one.paper_change * one.our_change > 0
            for one in self.numbers
            if one.measure in SCORES and one.measure != "average"
            if one.paper_change and one.our_change
        ]
        if not both:
            return []
        chance = "; by chance alone it would be half of them"
        return [f"direction: ours changes the paper's way in {sum(both)} of {len(both)} scores{chance}."]

    def _notes(self) -> dict[str, int]:
        marks = dict.fromkeys(mark for one in self.numbers for mark in one.marks)
        return {mark: number for number, mark in enumerate(marks, 1)}


def compare(plan: Plan, report: Report) -> Against:
    """Every printed number that a group of `report` is a counterpart of."""
    cells = {_labels(cell): cell for cell in reversed(plan.cells)}
    to_padding = {
        key - {("arm", plan.baseline or "")}
        for key, cell in cells.items()
        if cell.labels.get("arm") == plan.baseline
        if (found := _counterpart(cell, plan)) and found[2] == "padding"
    }
    numbers, unlike = list[Number](), dict[str, None]()
    for group in report.groups:
        cell = cells[frozenset(group.labels.items())]
        if (key := _counterpart(cell, plan)) is not None:
            # The paper's changes are against padding; ours are against whatever is the baseline.
            compares = frozenset(group.setting.items()) in to_padding
            numbers += _numbers(group, *key, plan.trains[cell.train].train.epochs, compares=compares)
            unlike.update(dict.fromkeys(_unlike(cell, plan, key[0])))
    return Against(numbers=tuple(numbers), unlike=tuple(unlike))


def _labels(cell: PlanCell) -> frozenset[tuple[str, str]]:
    return frozenset(item for item in cell.labels.items() if item[0] != "seed")


def _counterpart(cell: PlanCell, plan: Plan) -> tuple[str, str, str] | None:
    """(model, data set, arm) of the paper that a cell is, as released or as described."""
    train, sources = plan.trains[cell.train], plan.tokens[cell.tokens].sources
    name = (train.model.name or "").rstrip("/").rpartition("/")[2]
    models = [model for model, hub in _reference().models.items() if hub == name]
    sets = [short for short, id_ in PAPER_SETS.items() if [one.source for one in sources] in ([short], [id_])]
    arms = [arm for arm in _METHODS for form in (arm, f"{arm}_released") if train.arm == _built_in(form)]
    return (models[0], sets[0], arms[0]) if models and sets and arms else None


@cache
def _built_in(name: str) -> ArmSpec:
    return ArmSpec.model_validate(ARMS[name]).model_copy(update={"batch_unit": None, "global_batch": None})


def _unlike(cell: PlanCell, plan: Plan, model: str) -> list[str]:
    order, tokens = plan.trains[cell.train], plan.tokens[cell.tokens]
    epochs, rows = papersteps.budget(model)
    ours = f"{order.train.global_batch} {order.train.batch_unit}"
    found = {
        f"{order.train.epochs or 'no full'} epochs, not {epochs}": order.train.epochs != epochs,
        f"{ours} a step, not {rows} rows": ours != f"{rows} rows",
        f"rows of {order.max_length:,} tokens, not {papersteps.MAX_LENGTH:,}": order.max_length
        != papersteps.MAX_LENGTH,
        f"{tokens.max_documents or 0:,} conversations of each set, not all": tokens.max_documents is not None,
    }
    return [f"{model} has {text}" for text, differs in found.items() if differs]


def _numbers(
    group: Group, model: str, dataset: str, arm: str, epochs: int | None, *, compares: bool
) -> list[Number]:
    """`compares`: whether our differences are to a counterpart of the paper's padding."""
    printed, padding = (_printed(model, dataset, one) for one in (arm, "padding"))

    def number(measure: str, paper: float, ours: float | None, **rest: float | None) -> Number:
        alike = measure in (*SCORES, "steps", "speedup")
        marks = [*_marks(model, dataset, arm, measure), *_our_marks(group, measure)]
        return Number(
            labels=group.labels,
            model=model,
            dataset=dataset,
            arm=arm,
            measure=measure,
            paper=paper,
            ours=ours,
            difference=ours - paper if alike and ours is not None else None,
            paper_change=rest.get("paper_change"),
            our_change=rest.get("our_change"),
            marks=tuple(marks),
        )

    found = [
        number(
            task,
            round(printed[task] / 100, 6),
            _our_score(group, task),
            paper_change=None if arm == "padding" else round((printed[task] - padding[task]) / 100, 6),
            our_change=_our_change(group, task) if compares else None,
        )
        for task in SCORES
    ]
    if arm != "padding":
        ratio = padding["steps"] / padding["steps_per_s"] / (printed["steps"] / printed["steps_per_s"])
        found.append(number("speedup", ratio, group.speedup.wall if group.speedup and compares else None))
    ours = _our_rates(group, epochs)
    return found + [
        number(measure, printed[measure], ours.get(measure)) for measure in _TIMES if measure != "speedup"
    ]


def _our_score(group: Group, task: str) -> float | None:
    if task == "average":
        same = set(protocol.averaged(group.task_states)) == set(SCORES[:6]) <= group.eval.keys()
        whole = same and not any(group.eval[one].partial for one in SCORES[:6])
        return group.average if whole else None
    score = group.eval.get(task)
    return None if score is None or score.partial else score.score


def _our_change(group: Group, task: str) -> float | None:
    if _our_score(group, task) is None:
        return None
    found = group.delta if task == "average" else (items.delta if (items := group.items.get(task)) else None)
    return found


def _our_rates(group: Group, epochs: int | None) -> dict[str, float | None]:
    train, rows = group.train, (group.ledger or {}).get("rows")
    if train is None or not train.steps:
        return {}
    found: dict[str, float | None] = {"steps": train.steps}
    if train.wall_s:
        found["steps_per_s"] = train.steps / train.wall_s
        found["samples_per_s"] = rows * epochs / train.wall_s if rows and epochs else None
    return found


# What is printed, and where it disagrees with itself ------------------------------------------------------


def _marks(model: str, dataset: str, arm: str, measure: str) -> list[str]:
    """What is wrong with a printed number, in words that claim no more than the numbers carry."""
    printed, reference = _printed(model, dataset, arm), _reference()
    epochs, rows = papersteps.budget(model)
    rate = printed["samples_per_s"] / rows
    match measure:
        case "steps" if printed["steps"] % epochs:
            return [f"{printed['steps']:,.0f} steps is no multiple of {epochs} epochs"]
        case "steps_per_s" if abs(rate / printed["steps_per_s"] - 1) > RATES_AGREE:
            return [
                f"its rows/s over {rows} rows a step give {rate:.4f} steps/s, not {printed['steps_per_s']:.3f}"
            ]
        case "total_time_s":
            below = printed["steps"] / printed["steps_per_s"] / printed["total_time_s"]
            return [PRINTED_TIMES if 9.5 <= below <= 10.5 else f"{below:.1f} times below what its step rate gives"]
    found = []
    if (items := reference.items.get(measure)) and not is_fraction(printed[measure], items):
        found.append(NO_FRACTION)
    for change in reference.changes:
        if (change.model, change.dataset, change.arm, change.task) == (model, dataset, arm, measure):
            found.append(f"its change against padding is printed as {change.printed}; its scores give this one")
    return found


RATES_AGREE = 0.03
"""A step rate of three decimals is known to within 2%."""


def is_fraction(percent: float, items: int) -> bool:
    """Whether a printed score can be k right answers of `items`, rounded to the decimals it was printed with."""
    decimals = len(repr(percent).partition(".")[2])
    nearest = round(percent / 100 * items)
    return any(round(100 * k / items, decimals) == percent for k in (nearest - 1, nearest, nearest + 1))


def _our_marks(group: Group, measure: str) -> list[str]:
    score = group.eval.get(measure)
    partial = (score is not None and score.partial) or measure in group.left_out
    return ["ours is of a part of the test items, and not compared"] if partial else []


@cache
def _printed(model: str, dataset: str, arm: str) -> dict[str, float]:
    key = dataset, model, f"{arm}_released"
    known = {"steps": papersteps.expected_steps(*key), "steps_per_s": papersteps.steps_per_s(*key)}
    return _reference().cells[model][dataset][arm] | known


@cache
def _reference() -> _Reference:
    name = "paper_reference.yaml"
    text = (resources.files("packcli.report") / name).read_text(encoding="utf-8")
    return _Reference.model_validate(parse(text, name)[0])


# As rows of a sheet ---------------------------------------------------------------------------------------


def _rows(arm: str, found: dict[str, Number], measures: list[str], notes: dict[str, int]) -> list[list[Cell]]:
    paper, ours, difference = [Cell(f"{plain(arm)}, paper")], [Cell("  ours")], [Cell("  difference")]
    for measure in measures:
        if (one := found.get(measure)) is None:
            paper, ours, difference = [*paper, Cell("")], [*ours, Cell("")], [*difference, Cell("")]
            continue
        marks = "".join(f" [{notes[mark]}]" for mark in one.marks)
        paper.append(Cell(f"{_value(measure, one.paper)}{marks}", _change(one.paper_change)))
        ours.append(Cell(_value(measure, one.ours), _change(one.our_change)))
        difference.append(Cell(_difference(measure, one)))
    return [paper, ours, difference]


def _value(measure: str, value: float | None) -> str:
    if value is None:
        return words.NONE
    match measure:
        case "steps":
            return words.count(value)
        case "speedup":
            return words.times(value)
        case "steps_per_s" | "samples_per_s" | "total_time_s":
            return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
        case _:
            return f"{100 * value:.2f}"


def _change(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.2f}"


def _difference(measure: str, one: Number) -> str:
    if one.difference is None:
        return words.NONE
    match measure:
        case "steps":
            return f"{100 * one.difference / one.paper:+.1f}%"
        case "speedup":
            return f"{one.difference:+.2f}x"
        case _:
            return f"{100 * one.difference:+.2f}"
