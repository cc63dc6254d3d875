"""Which of the things that two arms differ in makes the difference: one at a time, in the order of a ladder. Pure.

A ladder is a list of arms (`ladders` of a sweep file), each of which differs in one thing from the one before it.
Every rung is paired by seed, over the seeds that all arms of the ladder have: so rungs add up to the whole, to the
last digit. What a factor does hangs on what came before it; two ladders between the same ends, in other orders,
show how much.

A learning rate that suits small steps need not suit large ones. A ladder with `best: train.lr` takes each arm at
the rate whose validation loss, a mean over seeds, is lowest: scores choose nothing, and losses of unlike arms are
never compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import Field

from packcli.config import Spec
from packcli.eval import stats
from packcli.log import plain
from packcli.plan import Plan, TrainOrder
from packcli.report import confounds, words
from packcli.report.groups import NO_SCATTER
from packcli.report.records import SIGNIFICANT, Interval, Report, Row
from packcli.report.sheets import Cell, Sheet


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

    `at`: the value of the ladder's `best` axis that it stands at; `at_end`: no value tried lies beyond it;
    `failed`: values at which every training failed, which cannot be chosen.
    `average`: mean score over the ladder's seeds; `steps`, `documents_per_step`: of its trainings.
    """

    arm: str
    at: dict[str, str] = Field(default_factory=dict)
    at_end: bool = False
    failed: tuple[str, ...] = ()
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


@dataclass(frozen=True, slots=True)
class _Stand:
    """Where an arm of a ladder stands: its rows by seed, at one value of the ladder's `best` axis."""

    rows: Mapping[str, Row]
    at: dict[str, str]
    at_end: bool = False
    failed: tuple[str, ...] = ()


def climb(plan: Plan, report: Report) -> tuple[Ladder, ...]:
    """Every ladder of the sweep in every setting, with p-values corrected over all of them."""
    found = []
    for name, spec in plan.ladders.items():
        aside = {"arm", "seed", spec.best}
        settings: dict[tuple[tuple[str, str], ...], list[Row]] = {}
        for row in report.rows:
            setting = tuple(sorted(item for item in row.labels.items() if item[0] not in aside))
            settings.setdefault(setting, []).append(row)
        for setting, rows in settings.items():
            own = {arm: [row for row in rows if row.labels["arm"] == arm] for arm in spec.arms}
            if all(own.values()):  # `--only` or `exclude` may leave some out
                stands = {arm: _stand(own[arm], spec.best) for arm in spec.arms}
                found.append(_ladder(name, dict(setting), stands, plan))
    return _corrected(found)


def _stand(rows: Sequence[Row], best: str | None) -> _Stand:
    """The rows of one arm, where `best` names an axis those at its best value, over the seeds all values have."""
    values: dict[str, dict[str, Row]] = {}
    for row in rows:
        values.setdefault(row.labels[best] if best else "", {})[row.labels.get("seed", "")] = row
    if best is None:
        return _Stand(values[""], {})
    every = {
        value: {
            seed: row.train.validation_loss
            for seed, row in own.items()
            if row.train and row.train.validation_loss is not None
        }
        for value, own in values.items()
    }
    # One at which all failed, say diverged, is none to choose; one that was not trained yet might be the best.
    failed = tuple(
        value for value, own in values.items() if all(row.train_state == "failed" for row in own.values())
    )
    losses = {value: own for value, own in every.items() if value not in failed}
    if not (seeds := confounds.common(list(losses.values()))):
        return _Stand({}, {}, failed=failed)
    means = {value: math.fsum(own[seed] for seed in seeds) / len(seeds) for value, own in losses.items()}
    chosen = min(means, key=means.__getitem__)
    at_end = len(losses) > 1 and chosen in _ends(list(losses))
    return _Stand(values[chosen], {best: chosen}, at_end, failed)


def _ends(values: Sequence[str]) -> tuple[str, ...]:
    """The least and the greatest number; values that are no numbers have no ends."""
    try:
        ordered = sorted(values, key=float)
    except ValueError:
        return ()
    return ordered[0], ordered[-1]


def _ladder(name: str, setting: dict[str, str], stands: Mapping[str, _Stand], plan: Plan) -> Ladder:
    scores = {
        arm: {seed: row.average for seed, row in stand.rows.items() if row.average is not None}
        for arm, stand in stands.items()
    }
    seeds = tuple(seed for seed in next(iter(scores.values())) if all(seed in own for own in scores.values()))
    of = {arm: [own[seed] for seed in seeds] for arm, own in scores.items()}
    rungs = []
    for before, arm in zip((None, *stands), stands, strict=False):
        stand = stands[arm]
        rungs.append(
            Rung(
                arm=arm,
                at=stand.at,
                at_end=stand.at_end,
                failed=stand.failed,
                changes=_changes(stands[before], stand, plan) if before is not None else (),
                average=sum(of[arm]) / len(seeds) if seeds else None,
                steps=_mean([row.train.steps for row in stand.rows.values() if row.train]),
                documents_per_step=_mean([_documents_per_step(row) for row in stand.rows.values()]),
                effect=_effect(of[before], of[arm]) if before is not None and seeds else None,
            )
        )
    ends = list(of.values())
    whole = _effect(ends[0], ends[-1]) if seeds else None
    return Ladder(name=name, setting=setting, seeds=seeds, rungs=tuple(rungs), whole=whole)


def _documents_per_step(row: Row) -> float | None:
    found = row.train
    return found.documents / found.steps if found and found.documents and found.steps else None


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _effect(before: list[float], after: list[float]) -> Effect:
    found = stats.paired_difference(before, after)
    if found.low is None or found.high is None or found.high - found.low < NO_SCATTER:
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
    arms = [(rung.arm, *sorted((ladder.setting | rung.at).items())) for rung in ladder.rungs]
    pairs = [*zip([(), *arms], arms, strict=False), (arms[0], arms[-1])]
    return [(ladder.seeds, *pair) for pair in pairs]


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


def _changes(before: _Stand, after: _Stand, plan: Plan) -> tuple[str, ...]:
    """Each factor that differs, `attention: document -> causal`."""
    if not (before.rows and after.rows):
        return ()
    old, new = (plan.trains[next(iter(stand.rows.values())).ids["train"]] for stand in (before, after))
    batches = [_batch(old), _batch(new)]
    found = [f"batch: {batches[0]} -> {batches[1]}"] if batches[0] != batches[1] else []
    found += [f"{axis}: {before.at[axis]} -> {at}" for axis, at in after.at.items() if before.at[axis] != at]
    for factor, fields in _FACTORS.items():
        pairs = [(getattr(old.arm, name), getattr(new.arm, name)) for name in fields]
        unlike = [(name, *pair) for name, pair in zip(fields, pairs, strict=True) if pair[0] != pair[1]]
        if unlike:
            told = [f"{name} {_said(one)} -> {_said(other)}" for name, one, other in unlike]
            found.append(f"{factor}: {', '.join(told).removeprefix(f'{factor} ')}")
    return tuple(found)


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
        Cell("\n".join([plain(rung.arm), *(f"at {name} {value}" for name, value in rung.at.items())])),
        Cell(words.percent(rung.average)),
        *_effect_cells(rung.effect),
        Cell(words.count(rung.steps)),
        Cell(words.count(None if rung.documents_per_step is None else round(rung.documents_per_step, 1))),
    ]


def _effect_cells(effect: Effect | None) -> list[Cell]:
    if effect is None:
        return [Cell(""), Cell(""), Cell("")]
    shown = effect.p_holm is not None and effect.p_holm < SIGNIFICANT
    bounds = f"\n{words.interval(effect.interval)}" if effect.interval else ""
    points = Cell("", f"{words.points(effect.delta)}{bounds}", shown)
    return [points, Cell(words.p_value(effect.p_holm)), Cell(words.detectable(effect.detectable))]


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
        f"sums of these ladders (Holm); bold where it is below {SIGNIFICANT}. Rungs add up to the last row.",
        "What a factor does hangs on those before it: compare ladders that take them in another order.",
    ]
    several = [
        " at ".join([f"`{rung.arm}`", *(f"{axis} {value}" for axis, value in rung.at.items())])
        for ladder in ladders
        for rung in ladder.rungs
        if len(rung.changes) > 1
    ]
    if several:
        arms = words.listed(list(dict.fromkeys(several)))
        lines.append(f"more than one thing changes at {arms}: such a rung tells what they do together.")
    if axes := dict.fromkeys(axis for ladder in ladders for rung in ladder.rungs for axis in rung.at):
        lines.append(
            f"at {words.listed(list(axes))}: each arm at the value with its lowest validation loss, mean over "
            "seeds. Scores chose nothing. That other seeds might choose another value is in no interval."
        )
    if ends := [f"`{rung.arm}`" for ladder in ladders for rung in ladder.rungs if rung.at_end]:
        arms = words.listed(list(dict.fromkeys(ends)))
        lines.append(f"best at an end of its grid: {arms}. A wider grid may move these rungs.")
    if lost := [
        f"`{rung.arm}` at {value}" for ladder in ladders for rung in ladder.rungs for value in rung.failed
    ]:
        arms = words.listed(list(dict.fromkeys(lost)))
        lines.append(f"not to be chosen, as every training failed there: {arms}.")
    if thin := [ladder.name for ladder in ladders if len(ladder.seeds) < 2]:
        names = words.listed(list(dict.fromkeys(thin)))
        lines.append(f"no interval for {names}: it takes two seeds that are scored in every arm.")
    return [plain(line) for line in lines]
