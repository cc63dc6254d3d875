"""What the groups allow one to say, in sentences: no claim that an interval does not carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packcli.data.corpus import SOURCES
from packcli.log import plain
from packcli.plan import Plan
from packcli.report import words
from packcli.report.records import Group, Row, Train, by_setting

STEPS_CONFOUND = 0.2
"""Steps that differ by more than this share of the baseline's are named as a confound."""
BY_SLOTS = 0.1
"""A slot that takes as long as the baseline's within this share leaves the speed-up to fewer slots."""


def write(plan: Plan, rows: Sequence[Row], groups: tuple[Group, ...]) -> str:
    """What the numbers come from, then one paragraph for each setting that arms are compared within."""
    scope = " ".join([*_origin(plan, rows), *_incomplete(rows), *_partial(groups)])
    trains: dict[frozenset[tuple[str, str]], list[Train]] = {}
    for row in rows:
        if row.train is not None:
            labels = frozenset(item for item in row.labels.items() if item[0] != "seed")
            trains.setdefault(labels, []).append(row.train)
    settings = []
    for setting, members in by_setting(groups):
        own = [train for group in members for train in trains.get(frozenset(group.labels.items()), [])]
        text = _setting(members, plan.baseline, own)
        settings.append(f"`{words.name(setting)}`: {text}" if setting else text)
    return "\n".join(part for part in (scope, *settings) if part)


# Where the numbers come from ---------------------------------------------------------------------------


def _origin(plan: Plan, rows: Sequence[Row]) -> list[str]:
    synthetic = [
        all(source.source in SOURCES for source in plan.tokens[cell.tokens].sources) for cell in plan.cells
    ]
    toy = all(plan.trains[cell.train].model.config is not None for cell in plan.cells)
    found = []
    if all(synthetic):
        what = "Toy model on synthetic data" if toy else "Synthetic data"
        found.append(f"{what}: what holds here need not hold for a real model on real data.")
    elif any(synthetic):
        found.append("Some cells are on synthetic data.")
    if any(row.train.random_weights for row in rows if row.train):
        found.append("Training started from random weights, not from a pretrained model.")
    return found


def _incomplete(rows: Sequence[Row]) -> list[str]:
    states = {state: [row.state for row in rows].count(state) for state in ("failed", "running", "pending")}
    open_ = [f"{count} {state}" for state, count in states.items() if count]
    if not open_:
        return []
    number = sum(states.values())
    rest = "; what follows is about what is there" if number < len(rows) else ""
    return [f"{number} of {len(rows)} cells are not done ({', '.join(open_)}){rest}."]


def _partial(groups: Sequence[Group]) -> list[str]:
    limited = {task: score for group in groups for task, score in group.eval.items() if score.partial}
    left_out = {task: counts for group in groups for task, counts in group.left_out.items()}
    found = []
    if limited:
        tasks = [f"`{plain(task)}` n={score.n} of {score.n_total}" for task, score in limited.items()]
        more = f" and {len(tasks) - 3} more" if len(tasks) > 3 else ""
        found.append(f"Limited run, scored on a part of the test items: {', '.join(tasks[:3])}{more}.")
    if left_out:
        tasks = [f"`{plain(task)}` {counts}" for task, counts in left_out.items()]
        found.append(f"Not all rows could be scored, so these are in no average: {', '.join(tasks)}.")
    return found


# One setting -------------------------------------------------------------------------------------------


def _setting(groups: list[Group], baseline: str | None, trains: list[Train]) -> str:
    others = [group for group in groups if group.arm != baseline]
    if baseline is None:
        return "The sweep names no `baseline` arm, so nothing is compared."
    if len(others) == len(groups):
        return f"There is no `{baseline}` cell here, so nothing is compared."
    if not others:
        return f"There is no arm besides `{baseline}` here, so nothing is compared."
    steps = _steps(next(group for group in groups if group.arm == baseline), others)
    speed = [_speed(others, baseline, trains), *_by_slots(groups, baseline, trains)]
    return " ".join([*speed, *_quality(others, baseline), *steps])


@dataclass(frozen=True, slots=True)
class _Timing:
    """`ratio`: the baseline's time over this arm's; `low` and `high`: seed by seed."""

    group: Group
    ratio: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.n == 1:
            return f"{words.times(self.ratio)} (one seed)"
        low, high = words.times(self.low), words.times(self.high)
        return f"{words.times(self.ratio)} ({low} to {high} over {self.n} seeds)"


def _timing(group: Group, *, cpu: bool) -> _Timing | None:
    if (found := group.speedup) is None:
        return None
    ratio, bounds = (found.cpu, found.cpu_range) if cpu else (found.wall, found.wall_range)
    return _Timing(group, ratio, *bounds, found.n_pairs) if ratio and bounds else None


def _speed(others: list[Group], baseline: str, trains: list[Train]) -> str:
    """The fastest arm; by CPU time on CPUs, where it is steadier, else by wall time."""
    cpu = {train.device for train in trains} == {"cpu"}
    if len({(train.device, train.processes, train.threads) for train in trains}) > 1:
        return "Speed: runs used unlike devices, processes or threads, so their times are not compared."
    timings = [timing for group in others if (timing := _timing(group, cpu=cpu)) is not None]
    if not timings:
        return f"Speed: no finished training to set against `{baseline}` yet."
    best, measure = max(timings, key=lambda timing: timing.ratio), "CPU time" if cpu else "wall time"
    arm = f"`{plain(best.group.arm)}`"
    if best.high < 1:
        return f"Speed: `{baseline}` itself was fastest; next was {arm}: ratio of {measure} {best}."
    if best.low <= 1:
        return f"Speed: no arm is clearly faster than `{baseline}`; nearest was {arm}: ratio of {measure} {best}."
    slots = f", and {words.times(best.group.slot_ratio)} its slots" if best.group.slot_ratio else ""
    near = [timing for timing in timings if timing is not best and timing.high >= best.low]
    close = words.listed([f"`{plain(timing.group.arm)}` ({words.times(timing.ratio)})" for timing in near])
    beside = f" Not clearly behind it: {close}." if near else ""
    return f"Speed: {arm} was fastest; `{baseline}` took {best} its {measure}{slots}.{beside}"


def _by_slots(groups: list[Group], baseline: str, trains: list[Train]) -> list[str]:
    """Whether arms are faster because they compute fewer slots; else what else there is to look at."""
    measure = "cpu" if {train.device for train in trains} == {"cpu"} else "wall"
    found = [
        (group, ratio)
        for group in groups
        if group.speedup and (ratio := getattr(group.speedup, f"{measure}_per_slot"))
    ]
    if not found:
        return []
    other = [(group, ratio) for group, ratio in found if abs(ratio - 1) > BY_SLOTS]
    if not other:
        return [
            f"Time follows slots: a slot took as long as in `{baseline}`, within {BY_SLOTS:.0%}, in every arm."
        ]
    (own,) = [group for group in groups if group.arm == baseline]
    arms = [
        f"`{plain(group.arm)}` {words.times(group.slot_ratio)} by fewer slots, {words.times(ratio)} by time a slot"
        f" ({_step_sizes(group)})"
        for group, ratio in other
    ]
    return [f"Slots alone do not explain the time: {words.listed(arms)}; `{baseline}` took {_step_sizes(own)}."]


def _step_sizes(group: Group) -> str:
    if group.train is None or not group.train.steps or not group.train.slots:
        return "steps unknown"
    return f"{words.count(group.train.steps)} steps of {words.large(group.train.slots / group.train.steps)} slots"


def _quality(others: list[Group], baseline: str) -> list[str]:
    """Arms that differ, then arms for which no difference was shown, then arms nothing can be said of."""
    if not any(group.task_states for group in others):
        return ["Nothing is evaluated (`eval.tasks` is empty), so quality is not compared."]
    bounded = [(group, group.interval) for group in others if group.interval is not None]
    differ = [(group, bounds) for group, bounds in bounded if not bounds[0] <= 0 <= bounds[1]]
    clauses = [
        f"`{plain(group.arm)}` difference {words.points(group.delta or 0.0)} points {words.interval(bounds)}"
        for group, bounds in differ
    ]
    if shown_none := [group for group, bounds in bounded if bounds[0] <= 0 <= bounds[1]]:
        clauses.append(_no_difference(shown_none))
    if open_ := [f"`{plain(group.arm)}` ({_unbounded(group)})" for group in others if group.interval is None]:
        clauses.append(f"no interval for {words.listed(open_)}")
    return [f"Average score against `{baseline}`: {'; '.join(clauses)}."]


def _no_difference(groups: list[Group]) -> str:
    arms = [f"`{plain(group.arm)}` {words.interval(group.interval)}" for group in groups if group.interval]
    effects = [f"{100 * group.detectable:.1f}" for group in groups if group.detectable is not None]
    covers = "interval covers" if len(arms) == 1 else "intervals cover"
    return (
        f"no difference shown for {words.listed(arms)} ({covers} 0; "
        f"this sweep would have seen a true one of {words.listed(effects)} points 4 times in 5, "
        "a smaller one less often)"
    )


def _unbounded(group: Group) -> str:
    """Why a group has no interval."""
    if group.delta is None:
        return "no seed scored in both arms"
    if group.n_pairs == 1:
        found = group.average_items
        items = f", {words.interval((found.low, found.high))} over test items" if found else ""
        return f"{words.points(group.delta)} points{items} in the one seed both have; two or more are needed"
    return f"{words.points(group.delta)} points in every one of {group.n_pairs} seeds, without scatter"


def _steps(baseline: Group, others: list[Group]) -> list[str]:
    own = baseline.train.steps if baseline.train else None
    unlike = [
        f"`{plain(group.arm)}` {words.count(group.train.steps)}"
        for group in others
        if own and group.train and group.train.steps
        if abs(group.train.steps / own - 1) > STEPS_CONFOUND
    ]
    if not unlike:
        return []
    return [
        f"Optimizer steps differ (`{baseline.arm}` {words.count(own)}, {', '.join(unlike)}), "
        "so quality may follow from the number of steps and not from the layout."
    ]
