"""What differs between an arm and the baseline besides the layout, so that a score is not the layout's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from packcli import batching
from packcli.log import plain
from packcli.plan import TrainOrder
from packcli.report import words
from packcli.report.records import Group, Row, Train

STEPS = 0.2
"""Steps, or documents a step, that differ by more than this share of the baseline's are named."""
TOKENS = 0.001
"""So is a share of the tokens that one loses and the other does not, if it is more than this."""
CUT = 0.01
"""And a share of the documents that lie in more than one row."""

RATE = "train.lr"
Key = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Grid:
    """Learning rates tried for an arm, ascending, and which did best, by what."""

    arm: str
    setting: dict[str, str]
    rates: tuple[str, ...]
    best: str
    by: str

    @property
    def edge(self) -> str | None:
        """Where the best lies, if it is at an end of the grid."""
        return {self.rates[0]: "lowest", self.rates[-1]: "highest"}.get(self.best)


@dataclass(frozen=True, slots=True)
class Arm:
    """An arm of a setting; `order`: of one of its trainings, which differ in the seed only."""

    group: Group
    order: TrainOrder
    trains: list[Train]
    grid: Grid | None

    @property
    def name(self) -> str:
        return f"`{plain(self.group.arm)}`"


@dataclass(frozen=True, slots=True)
class Unlike:
    """One thing that differs, in words, and the arms in which it does."""

    text: str
    arms: list[Arm]


def sentence(base: Arm, others: Sequence[Arm]) -> list[str]:
    """All that differs, with the arms and numbers; nothing where it is the layout alone."""
    known = [
        _numbers("optimizer steps", base, others, _steps),
        _numbers("documents a step", base, others, _documents),
        _shares("tokens truncated or dropped", base, others, _lost, TOKENS),
        _shares("documents cut over rows", base, others, _cut, CUT),
        _crossing(base, others),
        _marked(base, others),
        _differs("what is held out", "validation_after_packing", base, others),
        _differs("the order of conversations", "order", base, others),
        _numbers("peak learning rate", base, others, _peak_rate, "{:.3g}"),
        _grouped(base, others),
        _loss(base, others),
        _elsewhere(base, others),
    ]
    found = [one for one in known if one is not None and one.arms]
    if not found:
        return []
    named = [arm.name for arm in others if any(arm in one.arms for one in found)]
    told = "; ".join(one.text for one in found)
    if len(named) == len(others) > 1:
        whose = "No score here is"
    elif len(named) == 1:
        whose = f"The score of {named[0]} is not"
    else:
        whose = f"The scores of {words.listed(named)} are not"
    return [f"{whose} packing's own effect, for more than the layout differs from {base.name}: {told}."]


# One thing that may differ -----------------------------------------------------------------------------

Measure = Callable[[Arm], float | None]


def _numbers(what: str, base: Arm, others: Sequence[Arm], measure: Measure, written: str = "") -> Unlike | None:
    own = measure(base)
    if not own:
        return None
    values = [(arm, value) for arm in others if (value := measure(arm)) is not None]
    unlike = [(arm, value) for arm, value in values if abs(value / own - 1) > STEPS]

    def shown(value: float) -> str:
        return written.format(value) if written else words.count(round(value, 1))

    told = [f"{arm.name} {shown(value)}" for arm, value in unlike]
    text = f"{what} ({base.name} {shown(own)}, {', '.join(told)})"
    return Unlike(text, [arm for arm, _ in unlike])


def _shares(what: str, base: Arm, others: Sequence[Arm], measure: Measure, least: float) -> Unlike | None:
    own = measure(base)
    if own is None:
        return None
    values = [(arm, value) for arm in others if (value := measure(arm)) is not None]
    unlike = [(arm, value) for arm, value in values if abs(value - own) > least]
    told = [f"{arm.name} {100 * value:.1f}%" for arm, value in unlike]
    return Unlike(f"{what} ({base.name} {100 * own:.1f}%, {', '.join(told)})", [arm for arm, _ in unlike])


def _crossing(base: Arm, others: Sequence[Arm]) -> Unlike:
    unlike = [arm for arm in others if arm.order.arm.attention != base.order.arm.attention]
    crosses = base.order.arm.attention == "causal"
    names = words.listed([arm.name for arm in unlike])
    return Unlike(f"attention across documents ({'not ' if crosses else ''}in {names})", unlike)


def _marked(base: Arm, others: Sequence[Arm]) -> Unlike:
    own = base.order.arm.boundary
    unlike = [arm for arm in others if arm.order.arm.boundary != own]
    told = [f"{arm.name} {arm.order.arm.boundary}" for arm in unlike]
    return Unlike(f"tokens between documents ({base.name} {own}, {', '.join(told)})", unlike)


def _differs(what: str, field: str, base: Arm, others: Sequence[Arm]) -> Unlike:
    own = getattr(base.order.arm, field)
    unlike = [(arm, value) for arm in others if (value := getattr(arm.order.arm, field)) != own]
    told = [f"{arm.name} {_said(value)}" for arm, value in unlike]
    return Unlike(f"{what} ({base.name} {_said(own)}, {', '.join(told)})", [arm for arm, _ in unlike])


def _said(value: object) -> str:
    return (
        {True: "rows, after packing", False: "conversations"}.get(value, str(value))
        if isinstance(value, bool)
        else str(value)
    )


def _grouped(base: Arm, others: Sequence[Arm]) -> Unlike:
    own = base.order.arm.group_by
    unlike = [arm for arm in others if arm.order.arm.group_by != own]
    told = [f"{arm.name} by {arm.order.arm.group_by}" for arm in unlike]
    by = "chance" if own == "none" else f"by {own}"
    return Unlike(f"who shares a row ({base.name} {by}, {', '.join(told)})", unlike)


def _loss(base: Arm, others: Sequence[Arm]) -> Unlike:
    own = base.order.arm.loss
    unlike = [arm for arm in others if arm.order.arm.loss != own]
    told = [f"{arm.name} by {arm.order.arm.loss}" for arm in unlike]
    return Unlike(f"what the loss is a mean over ({base.name} by {own}, {', '.join(told)})", unlike)


def _elsewhere(base: Arm, others: Sequence[Arm]) -> Unlike:
    """Arms that do better at another learning rate than the one of this setting; the baseline's concerns all."""
    unlike = [arm for arm in (base, *others) if arm.grid and arm.grid.best != arm.group.labels[RATE]]
    told = [f"{arm.name} does best at {arm.grid.best}" for arm in unlike if arm.grid]
    return Unlike(
        f"how well the learning rate fits ({', '.join(told)})", list(others) if base in unlike else unlike
    )


def _steps(arm: Arm) -> float | None:
    return arm.group.train.steps if arm.group.train else None


def _documents(arm: Arm) -> float | None:
    found = arm.group.train
    return found.documents / found.steps if found and found.documents and found.steps else None


def _peak_rate(arm: Arm) -> float | None:
    documents = _documents(arm)
    return None if documents is None else batching.peak_lr(arm.order.train, documents)


def _lost(arm: Arm) -> float | None:
    """Share of the training tokens that no row holds."""
    ledger = arm.group.ledger
    if ledger is None:
        return None
    lost = ledger.get("tokens_truncated", 0.0) + ledger.get("tokens_dropped", 0.0)
    whole = lost + ledger.get("tokens_kept", 0.0)
    return lost / whole if whole else None


def _cut(arm: Arm) -> float | None:
    ledger = arm.group.ledger
    if ledger is None or not ledger.get("documents_kept"):
        return None
    return ledger.get("documents_cut", 0.0) / ledger["documents_kept"]


# Learning rates ----------------------------------------------------------------------------------------


def without_rate(group: Group) -> Key:
    return frozenset(item for item in group.labels.items() if item[0] != RATE)


def grids(groups: Sequence[Group], rows: Sequence[Row]) -> dict[Key, Grid]:
    """By all labels but the rate: which of several did best, by validation loss if all have one, else by score."""
    members: dict[Key, list[Group]] = {}
    for group in groups:
        if RATE in group.labels:
            members.setdefault(without_rate(group), []).append(group)
    members = {key: own for key, own in members.items() if len(own) > 1}
    of_group: dict[Key, list[Row]] = {}
    for row in rows if members else ():
        labels = frozenset(item for item in row.labels.items() if item[0] != "seed")
        of_group.setdefault(labels, []).append(row)
    found = {}
    for key, own in members.items():
        if (grid := _grid(own, [of_group[frozenset(group.labels.items())] for group in own])) is not None:
            found[key] = grid
    return found


def _grid(groups: list[Group], rows: list[list[Row]]) -> Grid | None:
    by, measures = "validation loss", [_by_seed(own, _negative_loss) for own in rows]
    if not common(measures):
        by, measures = "average score", [_by_seed(own, lambda row: row.average) for own in rows]
    if not (seeds := common(measures)):
        return None
    means = [math.fsum(own[seed] for seed in seeds) for own in measures]
    best = groups[max(range(len(groups)), key=means.__getitem__)]
    return Grid(
        arm=best.arm,
        setting={axis: value for axis, value in best.setting.items() if axis != RATE},
        rates=tuple(sorted((group.labels[RATE] for group in groups), key=float)),
        best=best.labels[RATE],
        by=by,
    )


def _by_seed(rows: Sequence[Row], measure: Callable[[Row], float | None]) -> dict[str, float]:
    found = {row.labels.get("seed", ""): measure(row) for row in rows}
    return {seed: value for seed, value in found.items() if value is not None}


def _negative_loss(row: Row) -> float | None:
    loss = row.train.validation_loss if row.train else None
    return None if loss is None else -loss


def common(values: Sequence[Mapping[str, object]]) -> list[str]:
    """The seeds that all have: means over others would not compare."""
    return [seed for seed in values[0] if all(seed in own for own in values)] if values else []


def rates(found: dict[Key, Grid]) -> list[str]:
    """One line for each setting, and grid, in which an arm does best at the end of its grid."""
    members: dict[tuple[Key, tuple[str, ...], str], list[Grid]] = {}
    for grid in found.values():
        members.setdefault((frozenset(grid.setting.items()), grid.rates, grid.by), []).append(grid)
    return [line for own in members.values() if (line := _edges(own))]


def _edges(own: list[Grid]) -> str:
    at_edge = [f"`{plain(grid.arm)}` at the {grid.edge}, {grid.best}" for grid in own if grid.edge]
    if not at_edge:
        return ""
    setting = f"`{words.name(own[0].setting)}`: " if own[0].setting else ""
    return (
        f"{setting}At the edge of the learning rates tried ({', '.join(own[0].rates)}; by {own[0].by}), and so "
        f"maybe not at its best: {words.listed(at_edge)}."
    )
