"""Rows pooled over seeds, and each arm set against the baseline seed by seed. Pure: rows in, groups out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from packcli.eval import protocol, stats
from packcli.eval.stats import mean_stderr
from packcli.report.records import (
    Group,
    Interval,
    ItemDifference,
    PooledScore,
    Row,
    Speedup,
    Train,
    TrainMeans,
)
from packcli.store import State

Key = frozenset[tuple[str, str]]
Pairs = list[tuple[Row, Row]]
Credits = Callable[[Row, str], Sequence[float | None] | NDArray[np.float64] | None]
"""What each item of a task earned with the model of a row, 0 to 1, in the task's own order; None: not known."""

NO_SCATTER = 1e-9
"""What is narrower, as a fraction of 1, is rounding: scores step by at least 1 item of a task."""


def pool(rows: Sequence[Row], baseline: str | None, credits: Credits) -> tuple[Group, ...]:
    """One group for each set of labels without `seed`, in the order of `rows`; p-values corrected over all."""
    members: dict[Key, list[Row]] = {}
    for row in rows:
        members.setdefault(_key(row, "seed"), []).append(row)
    partners = {_key(row, "arm"): row for row in rows if row.labels.get("arm") == baseline}
    pairs = [_pairs(found, partners, baseline) for found in members.values()]
    contrasts = _corrected([_contrast(own) for own in pairs])
    return tuple(
        _group(found, own, contrast, credits)
        for found, own, contrast in zip(members.values(), pairs, contrasts, strict=True)
    )


def _key(row: Row, without: str) -> Key:
    return frozenset((axis, value) for axis, value in row.labels.items() if axis != without)


def _pairs(rows: list[Row], partners: dict[Key, Row], baseline: str | None) -> Pairs:
    """(baseline's row, own row) wherever all labels but the arm agree; none for the baseline itself."""
    if rows[0].labels.get("arm") == baseline:
        return []
    return [(partner, row) for row in rows if (partner := partners.get(_key(row, "arm"))) is not None]


@dataclass(frozen=True, slots=True)
class _Contrast:
    """Of an arm's average to the baseline's; all but `n` and `delta` are None without scatter to go by."""

    n: int = 0
    delta: float | None = None
    interval: Interval | None = None
    stderr: float | None = None
    p: float | None = None
    p_holm: float | None = None
    detectable: float | None = None


def _contrast(pairs: Pairs) -> _Contrast:
    both = [(a.average, b.average) for a, b in pairs if a.average is not None and b.average is not None]
    if not both:
        return _Contrast()
    found = stats.paired_difference([a for a, _ in both], [b for _, b in both])
    if found.low is None or found.high is None or found.high - found.low < NO_SCATTER:
        # Seeds that happen to agree to the last item do not make a difference certain.
        return _Contrast(found.n, found.mean)
    return _Contrast(found.n, found.mean, (found.low, found.high), found.stderr, found.p)


def _corrected(contrasts: list[_Contrast]) -> list[_Contrast]:
    """Every one that was tested counts as a comparison, whatever its setting: a reader looks at them all."""
    adjusted = iter(stats.holm(tested := [found.p for found in contrasts if found.p is not None]))
    return [
        replace(found, p_holm=next(adjusted), detectable=stats.detectable(found.stderr, found.n, len(tested)))
        if found.p is not None and found.stderr is not None
        else found
        for found in contrasts
    ]


def _group(rows: list[Row], pairs: Pairs, contrast: _Contrast, credits: Credits) -> Group:
    averages = [row.average for row in rows if row.average is not None]
    average, stderr = mean_stderr(averages) if averages else (None, None)
    tasks = dict.fromkeys(task for row in rows for task in row.tasks)
    pooled = {task: score for task in tasks if (score := _task(rows, task)) is not None}
    differences = _by_item(pairs, credits)
    averaged = protocol.averaged(tasks)
    # Bounds of `delta` are of the very models that it is a mean over.
    whole = [pair for pair in pairs if all(row.average is not None for row in pair)]
    of_whole = differences if len(whole) == len(pairs) else _by_item(whole, credits)
    return Group(
        labels={axis: value for axis, value in rows[0].labels.items() if axis != "seed"},
        n_seeds=len(averages),
        average=average,
        stderr=stderr,
        delta=contrast.delta,
        interval=contrast.interval,
        n_cells=len(rows),
        n_pairs=contrast.n,
        stderr_items=_of_average([pooled[task] for task in averaged if task in pooled]) if averages else None,
        detectable=contrast.detectable,
        p=contrast.p,
        p_holm=contrast.p_holm,
        states=_count([row.state for row in rows]),
        train_states=_count([row.train_state for row in rows]),
        task_states={task: _count([row.tasks[task] for row in rows if task in row.tasks]) for task in tasks},
        train=_train(rows),
        ledger=_ledger(rows),
        eval=pooled,
        left_out=_left_out(rows),
        items={task: found.stated() for task, found in differences.items()},
        average_items=_mean_of(of_whole, averaged),
        speedup=_speedup(pairs),
        slot_ratio=_ratio(pairs, _slots)[0],
        probes=tuple(row.probes for row in rows if row.probes is not None),
    )


def _count(states: list[State]) -> dict[State, int]:
    return dict(Counter(states))


@dataclass(frozen=True, slots=True)
class _Items:
    """A difference over `n` test items, each a mean over the seeds; `freedom`: degrees of it in the error."""

    mean: float
    stderr: float
    n: int
    n_seeds: int
    freedom: float

    def stated(self) -> ItemDifference:
        margin = stats.critical(self.freedom) * self.stderr
        # Items that all tell the same do not make a difference certain.
        bounds = (None, None) if self.stderr < NO_SCATTER else (self.mean - margin, self.mean + margin)
        low, high = bounds
        return ItemDifference(delta=self.mean, low=low, high=high, n_items=self.n, n_seeds=self.n_seeds)


def _by_item(pairs: Pairs, credits: Credits) -> dict[str, _Items]:
    """Of each task, item by item: a hard one is hard for both models of a pair.

    Their protocols are one: all labels but the arm agree, and an arm sets nothing of `eval`.
    """
    found = {}
    for task in dict.fromkeys(task for _, own in pairs for task in own.eval):
        scored = [
            (a, b) for a, b in pairs if all(task in row.eval and not row.eval[task].left_out for row in (a, b))
        ]
        earned = [(credits(a, task), credits(b, task)) for a, b in scored]
        differences = [
            np.asarray(b, float) - np.asarray(a, float)  # NaN: no verdict
            for a, b in earned
            if a is not None and b is not None and len(a) == len(b)
        ]
        if not differences or len({len(items) for items in differences}) > 1:
            continue
        # An item without a verdict for one of the models is left out for all: the others stay paired.
        items = np.mean(differences, axis=0)
        items = items[~np.isnan(items)]
        if len(items) > 1:
            stderr = float(items.std(ddof=1)) / math.sqrt(len(items))
            found[task] = _Items(float(items.mean()), stderr, len(items), len(differences), len(items) - 1)
    return found


def _mean_of(differences: dict[str, _Items], tasks: Collection[str]) -> ItemDifference | None:
    """Of the unweighted mean over tasks, which share no items; None unless it is known for all of them, and where
    no item tells anything else than the others. Degrees of freedom: Welch and Satterthwaite's.
    """
    found = [differences[task] for task in tasks if task in differences]
    if not found or len(found) < len(tasks):
        return None
    mean = math.fsum(one.mean for one in found) / len(found)
    variance = math.fsum(one.stderr**2 for one in found)
    stderr = math.sqrt(variance) / len(found)
    if stderr < NO_SCATTER:
        return None
    freedom = variance**2 / math.fsum(one.stderr**4 / one.freedom for one in found)
    return _Items(mean, stderr, sum(one.n for one in found), min(one.n_seeds for one in found), freedom).stated()


def _task(rows: list[Row], task: str) -> PooledScore | None:
    scores = [row.eval[task] for row in rows if task in row.eval and not row.eval[task].left_out]
    if not scores:
        return None
    mean, stderr = mean_stderr([score.score for score in scores])
    squares = [score.stderr**2 for score in scores if score.stderr is not None]
    return PooledScore(
        metric=scores[0].metric,
        score=mean,
        stderr=stderr,
        stderr_items=math.sqrt(math.fsum(squares) / len(squares)) if squares else None,
        n_seeds=len(scores),
        n=min(score.n for score in scores),
        n_total=max(score.n_total for score in scores),
        partial=any(score.partial for score in scores),
        protocols=tuple(dict.fromkeys(score.protocol for score in scores)),
    )


def _left_out(rows: list[Row]) -> dict[str, str]:
    return {
        task: f"{score.n:,}/{score.n_total:,}"
        for row in rows
        for task, score in row.eval.items()
        if score.left_out
    }


def _of_average(scores: list[PooledScore]) -> float | None:
    """Standard error over test items of the unweighted mean of tasks that share no items."""
    errors = [score.stderr_items for score in scores if score.stderr_items is not None]
    if not errors or len(errors) < len(scores):
        return None
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)


def _train(rows: list[Row]) -> TrainMeans | None:
    trains = [row.train for row in rows if row.train is not None]
    if not trains:
        return None
    own = ("device", "own_validation")
    names = [name for name in TrainMeans.model_fields if name in Train.model_fields and name not in own]
    means = {name: _mean([getattr(train, name) for train in trains]) for name in names}
    losses = [train.validation_loss for train in trains if train.validation_loss is not None]
    stderr = mean_stderr(losses)[1] if losses else None
    device = trains[0].device if len({train.device for train in trains}) == 1 else None
    return TrainMeans(
        n=len(trains),
        validation_loss_stderr=stderr,
        device=device,
        own_validation=any(train.own_validation for train in trains),
        **means,
    )


def _ledger(rows: list[Row]) -> dict[str, float] | None:
    ledgers = [row.ledger for row in rows if row.ledger is not None]
    if not ledgers:
        return None
    means = {word: _mean([ledger.get(word) for ledger in ledgers]) for word in ledgers[0]}
    return {word: mean for word, mean in means.items() if mean is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _speedup(pairs: Pairs) -> Speedup | None:
    # Times of unlike runs (one of them under torchrun, say) are no ratio of anything.
    trained = [
        (a, b)
        for a, b in pairs
        if a.train is not None and b.train is not None
        if (a.train.device, a.train.processes, a.train.threads)
        == (b.train.device, b.train.processes, b.train.threads)
    ]
    if not trained:
        return None
    cpu, cpu_range = _ratio(trained, lambda row: row.train.cpu_s if row.train else None)
    wall, wall_range = _ratio(trained, lambda row: row.train.wall_s if row.train else None)
    slots, _ = _ratio(trained, _slots)
    return Speedup(
        cpu=cpu,
        cpu_range=cpu_range,
        wall=wall,
        wall_range=wall_range,
        cpu_per_slot=cpu / slots if cpu and slots else None,
        wall_per_slot=wall / slots if wall and slots else None,
        n_pairs=len(trained),
    )


def _slots(row: Row) -> float | None:
    return row.train.slots if row.train else None


def _ratio(pairs: Pairs, measure: Callable[[Row], float | None]) -> tuple[float | None, Interval | None]:
    """Mean of the baseline over the own mean, and the least and greatest ratio of a single pair."""
    both = [(a, b) for one, other in pairs if (a := measure(one)) and (b := measure(other))]
    if not both:
        return None, None
    ratios = [a / b for a, b in both]
    return math.fsum(a for a, _ in both) / math.fsum(b for _, b in both), (min(ratios), max(ratios))
