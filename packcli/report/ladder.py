"""Which of the things that two arms differ in makes the difference: one at a time, in the order of a ladder. Pure.

A ladder is a list of arms (`ladders` of a sweep file), each of which differs in one thing from the one before it.
Every rung is paired by seed, over the seeds that all arms of the ladder have: so rungs add up to the whole, to the
last digit. What a factor does hangs on what came before it; two ladders between the same ends, in other orders,
show how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from packcli.config import Spec
from packcli.eval import stats
from packcli.log import plain
from packcli.plan import Plan, TrainOrder
from packcli.report import words
from packcli.report.records import Interval, Report, Row
from packcli.report.sheets import Cell, Sheet

_NO_SCATTER = 1e-9


class Effect(Spec):
    """A difference of average scores, as a fraction of 1: mean over seeds, 95% interval (Student's t), standard
    error, p-value, that corrected over all differences of all ladders (Holm), and the smallest effect that such a
    report finds in 80% of repetitions. All but `delta` are null for fewer than two seeds, and where these do not
    scatter."""

    delta: float
    interval: Interval | None = None
    stderr: float | None = None
    p: float | None = None
    p_holm: float | None = None
    detectable: float | None = None


class Rung(Spec):
    """An arm, `changes`: what differs from the one before it, `effect`: what that does. Both empty for the first.

    `average`: mean score over the ladder's seeds; `steps`, `documents_per_step`: of its trainings.
    """

    arm: str
    changes: tuple[str, ...]
    average: float | None
    steps: float | None
    documents_per_step: float | None
    effect: Effect | None


class Ladder(Spec):
    """`seeds`: those that all arms have a score of; `whole`: the last arm less the first, the sum of all rungs."""

    name: str
    setting: dict[str, str]
    seeds: tuple[str, ...]
    rungs: tuple[Rung, ...]
    whole: Effect | None


def climb(plan: Plan, report: Report) -> tuple[Ladder, ...]:
    """Every ladder of the sweep in every setting, with p-values corrected over all of them."""
    rows: dict[frozenset[tuple[str, str]], dict[tuple[str, str], Row]] = {}
    for row in report.rows:
        setting = frozenset(item for item in row.labels.items() if item[0] not in ("arm", "seed"))
        rows.setdefault(setting, {})[row.labels["arm"], row.labels.get("seed", "")] = row
    found = [
        _ladder(name, arms, dict(sorted(setting)), own, plan)
        for setting, own in rows.items()
        for name, arms in plan.ladders.items()
        if {arm for arm, _ in own} >= set(arms)  # `--only` or `exclude` may leave some out
    ]
    return _corrected(found)


def _ladder(
    name: str, arms: tuple[str, ...], setting: dict[str, str], rows: Mapping[tuple[str, str], Row], plan: Plan
) -> Ladder:
    seeds = dict.fromkeys(seed for _, seed in rows)
    scores = {(arm, seed): row.average for (arm, seed), row in rows.items() if row.average is not None}
    complete = tuple(seed for seed in seeds if all((arm, seed) in scores for arm in arms))
    orders = {arm: plan.trains[row.ids["train"]] for (arm, _), row in rows.items()}
    of = {arm: [scores[arm, seed] for seed in complete] for arm in arms}
    rungs = []
    for before, arm in zip((None, *arms), arms, strict=False):
        own = [row for (other, _), row in rows.items() if other == arm]
        changes = _changes(orders[before], orders[arm]) if before in orders and arm in orders else []
        rungs.append(
            Rung(
                arm=arm,
                changes=tuple(changes),
                average=sum(of[arm]) / len(complete) if complete else None,
                steps=_mean([row.train.steps for row in own if row.train]),
                documents_per_step=_mean([_documents_per_step(row) for row in own]),
                effect=_effect(of[before], of[arm]) if before is not None and complete else None,
            )
        )
    whole = _effect(of[arms[0]], of[arms[-1]]) if complete else None
    return Ladder(name=name, setting=setting, seeds=complete, rungs=tuple(rungs), whole=whole)


def _documents_per_step(row: Row) -> float | None:
    found = row.train
    return found.documents / found.steps if found and found.documents and found.steps else None


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _effect(before: list[float], after: list[float]) -> Effect:
    found = stats.paired_difference(before, after)
    if found.low is None or found.high is None or found.high - found.low < _NO_SCATTER:
        return Effect(delta=found.mean)
    return Effect(delta=found.mean, interval=(found.low, found.high), stderr=found.stderr, p=found.p)


def _corrected(ladders: list[Ladder]) -> tuple[Ladder, ...]:
    """A rung that several ladders share is one comparison."""
    known: dict[tuple[Any, ...], Effect] = {}
    for ladder in ladders:
        known.update((key, effect) for key, effect in _effects(ladder) if effect.p is not None)
    adjusted = dict(zip(known, stats.holm([effect.p or 0.0 for effect in known.values()]), strict=True))

    def corrected(ladder: Ladder, key: tuple[Any, ...], effect: Effect | None) -> Effect | None:
        if effect is None or key not in adjusted:
            return effect
        detectable = stats.detectable(effect.stderr or 0.0, len(ladder.seeds), len(known))
        return effect.model_copy(update={"p_holm": adjusted[key], "detectable": detectable})

    done = []
    for ladder in ladders:
        keys = _keys(ladder)
        rungs = [
            rung.model_copy(update={"effect": corrected(ladder, key, rung.effect)})
            for key, rung in zip(keys, ladder.rungs, strict=False)
        ]
        whole = corrected(ladder, keys[-1], ladder.whole)
        done.append(ladder.model_copy(update={"rungs": tuple(rungs), "whole": whole}))
    return tuple(done)


def _keys(ladder: Ladder) -> list[tuple[Any, ...]]:
    """What each rung compares, then the whole."""
    arms = [rung.arm for rung in ladder.rungs]
    pairs = [*zip(["", *arms], arms, strict=False), (arms[0], arms[-1])]
    return [(*sorted(ladder.setting.items()), ladder.seeds, *pair) for pair in pairs]


def _effects(ladder: Ladder) -> list[tuple[tuple[Any, ...], Effect]]:
    effects = [*(rung.effect for rung in ladder.rungs), ladder.whole]
    return [(key, effect) for key, effect in zip(_keys(ladder), effects, strict=True) if effect is not None]


# What differs ----------------------------------------------------------------------------------------------

_FACTORS = {
    "who shares a row": ("layout", "packer", "window", "workers", "order", "repack_each_epoch", "group_by"),
    "tokens cut or dropped": ("overlong", "truncation", "remainder"),
    "what is held out": ("validation_after_packing",),
    "tokens between documents": ("boundary",),
    "attention": ("attention",),
    "positions": ("positions",),
    "mean over": ("loss",),
}
"""What a rung varies, and the fields of an arm that say it. `pad_to` is none: padding changes no result."""


def _changes(before: TrainOrder, after: TrainOrder) -> list[str]:
    """Each factor that differs, `attention: document -> causal`."""
    batches = [_batch(before), _batch(after)]
    found = [f"batch: {batches[0]} -> {batches[1]}"] if batches[0] != batches[1] else []
    for factor, fields in _FACTORS.items():
        pairs = [(getattr(before.arm, name), getattr(after.arm, name)) for name in fields]
        unlike = [(name, *pair) for name, pair in zip(fields, pairs, strict=True) if pair[0] != pair[1]]
        if unlike:
            told = [f"{name} {_said(old)} -> {_said(new)}" for name, old, new in unlike]
            found.append(f"{factor}: {', '.join(told).removeprefix(f'{factor} ')}")
    return found


def _batch(order: TrainOrder) -> str:
    """Where a row is a document, steps of either are one thing."""
    spec = order.train
    unit = "documents" if order.arm.one_document_per_row and spec.batch_unit == "rows" else spec.batch_unit
    return f"{spec.global_batch:,} {unit}"


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


# As a table ------------------------------------------------------------------------------------------------

_HEAD = ["arm", "average,\n%", "points\n[95% interval]", "p\n(Holm)", "detectable,\npoints"]
_HEAD += ["steps", "documents\na step"]


def sheets(ladders: Sequence[Ladder]) -> list[Sheet]:
    """One for each ladder of each setting: an arm a row, the last row the whole."""
    found = []
    for ladder in ladders:
        setting = words.name(ladder.setting)
        title = f"ladder {plain(ladder.name)}, over {len(ladder.seeds)} seeds"
        rows = [_row(rung) for rung in ladder.rungs]
        first, last = ladder.rungs[0].arm, ladder.rungs[-1].arm
        whole = [Cell(f"{plain(last)} - {plain(first)}"), Cell(""), *_effect_cells(ladder.whole)]
        rows.append([*whole, *[Cell("")] * (len(_HEAD) - len(whole))])
        found.append(Sheet(f"{title}: {setting}" if setting else title, _HEAD, [("", rows)]))
    return found


def _row(rung: Rung) -> list[Cell]:
    return [
        Cell(plain(rung.arm)),
        Cell(words.percent(rung.average)),
        *_effect_cells(rung.effect),
        Cell(words.count(rung.steps)),
        Cell(words.count(None if rung.documents_per_step is None else round(rung.documents_per_step, 1))),
    ]


def _effect_cells(effect: Effect | None) -> list[Cell]:
    if effect is None:
        return [Cell(""), Cell(""), Cell("")]
    shown = effect.p_holm is not None and effect.p_holm < 0.05
    bounds = f"\n{words.interval(effect.interval)}" if effect.interval else ""
    p = "" if effect.p_holm is None else "<0.001" if effect.p_holm < 0.001 else f"{effect.p_holm:.2g}"
    detectable = words.percent(effect.detectable) if (effect.detectable or 0) <= 1 else "> 100"
    return [Cell("", f"{words.points(effect.delta)}{bounds}", shown), Cell(p or words.NONE), Cell(detectable)]


def notes(ladders: Sequence[Ladder]) -> list[str]:
    """What the table means, and what keeps it from meaning more."""
    told = dict.fromkeys(
        f"{rung.arm}, after {before.arm}: {'; '.join(rung.changes)}"
        for ladder in ladders
        for before, rung in pairwise(ladder.rungs)
    )
    lines = [
        *told,
        "points: average score against the arm above it, mean over the seeds that all arms of the ladder have, "
        "paired by seed; its 95% interval (Student's t) for this rung alone. p is corrected over all rungs and "
        "sums of these ladders (Holm); bold where it is below 0.05. Rungs add up to the last row.",
        "What a factor does hangs on those before it: compare ladders that take them in another order.",
    ]
    several = [f"`{rung.arm}`" for ladder in ladders for rung in ladder.rungs if len(rung.changes) > 1]
    if several:
        arms = words.listed(list(dict.fromkeys(several)))
        lines.append(f"more than one thing changes at {arms}: such a rung tells what they do together.")
    if thin := [ladder.name for ladder in ladders if len(ladder.seeds) < 2]:
        names = words.listed(list(dict.fromkeys(thin)))
        lines.append(f"no interval for {names}: it takes two seeds that are scored in every arm.")
    return [plain(line) for line in lines]
