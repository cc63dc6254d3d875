"""How much less an arm costs than the baseline, as a sentence: times only of like machines, with their range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packcli.report import words
from packcli.report.confounds import Arm

SHORT_S = 1.0
"""Of a training that takes less than this, starting it is most of what was timed."""
ALIKE = 0.1
"""Time a slot that differs by more than this share is said to."""


@dataclass(frozen=True, slots=True)
class Timing:
    """`ratio`: the baseline's time over this arm's; `low` and `high`: seed by seed. `cpu`: of CPU time."""

    arm: Arm
    ratio: float
    low: float
    high: float
    n: int
    cpu: bool

    def __str__(self) -> str:
        if self.n == 1:
            return f"{words.times(self.ratio)} (one seed)"
        low, high = words.times(self.low), words.times(self.high)
        return f"{words.times(self.ratio)} ({low} to {high} over {self.n} seeds)"


def comparable(arms: Sequence[Arm]) -> bool:
    """Whether all trainings used like devices, processes and threads."""
    used = {(train.device, train.processes, train.threads) for arm in arms for train in arm.trains}
    return len(used) == 1


def told(arms: Sequence[Arm]) -> bool:
    """Whether the trainings took long enough for their times to tell anything."""
    return all(train.wall_s is None or train.wall_s >= SHORT_S for arm in arms for train in arm.trains)


def timing(arm: Arm) -> Timing | None:
    """By CPU time on CPUs, where it is steadier, else by wall time; None where no seed is in both arms."""
    if (found := arm.group.speedup) is None:
        return None
    cpu = all(train.device == "cpu" for train in arm.trains)
    ratio, bounds = (found.cpu, found.cpu_range) if cpu else (found.wall, found.wall_range)
    return Timing(arm, ratio, *bounds, found.n_pairs, cpu) if ratio and bounds else None


def fastest(timings: Sequence[Timing]) -> Timing | None:
    return max(timings, key=lambda found: found.ratio, default=None)


def sentence(base: Arm, arms: Sequence[Arm], timings: Sequence[Timing], taken: Arm | None) -> str:
    """What the arm that is taken saves, and which was fastest, under the budget of the setting."""
    if any(arm.trains for arm in arms) and not comparable(arms):
        return "Runs used unlike devices, processes or threads, so their times are not compared."
    if not told(arms):
        return f"Some trainings took less than {SHORT_S:g} s, so nothing is said of speed."
    best = fastest(timings)
    if best is None:
        return f"Cost: no finished training to set against {base.name} yet."
    own = next((found for found in timings if found.arm is taken), None)
    close = [found for found in timings if found.n > 1 and found.low > 1 and found.high >= best.low]
    if own is None:
        clauses = [_fastest(base, best)]
    elif own is best:
        clauses = [_saving(base, own)]
    else:
        clearly = ", not clearly faster" if own in close else ""
        clauses = [_saving(base, own), f"fastest was {best.arm.name} ({words.times(best.ratio)}{clearly})"]
    if near := [f"{found.arm.name} ({words.times(found.ratio)})" for found in close if found not in (best, own)]:
        clauses.append(f"not clearly behind {'it' if own is not best else best.arm.name}: {words.listed(near)}")
    return f"At {_budget([arm for arm in arms if arm.trains])}, {'; '.join(clauses)}."


def _fastest(base: Arm, best: Timing) -> str:
    measure = "CPU time" if best.cpu else "wall time"
    if best.high < 1:
        return f"{base.name} itself was fastest; next was {best.arm.name}, ratio of {measure} {best}"
    if best.n > 1 and best.low <= 1:
        return f"no arm is clearly faster than {base.name}; nearest was {best.arm.name}, ratio of {measure} {best}"
    return f"{best.arm.name} was fastest: {_saving(base, best)}"


def _saving(base: Arm, found: Timing) -> str:
    """`padding` took 4.8x (4.5x to 5.0x over 5 seeds) the CPU time of `best_fit`, 33.8 s a run against 7.03 s, for
    4.9x its slots."""
    group, measure = found.arm.group, "CPU time" if found.cpu else "wall time"
    text = f"{base.name} took {found} the {measure} of {found.arm.name}"
    if spent := _spent(base, found):
        text += f", {spent}"
    if group.slot_ratio:
        text += f", for {words.times(group.slot_ratio)} its slots"
        each = found.ratio / group.slot_ratio
        if abs(each - 1) > ALIKE:
            text += f" (a slot took {words.times(1 / each)} as long in {found.arm.name})"
    return text


def _spent(base: Arm, found: Timing) -> str:
    """Means of both, where they are over the very seeds that the ratio is of."""
    own, other = found.arm.group.train, base.group.train
    if own is None or other is None or not own.n == other.n == found.n:
        return ""
    if found.cpu:
        return f"{words.seconds(other.cpu_s)} s a run against {words.seconds(own.cpu_s)} s"
    run = found.arm.trains[0]
    if own.wall_s is None or other.wall_s is None or run.processes is None or run.device is None:
        return ""
    hours = [words.hours(time * run.processes / 3600) for time in (other.wall_s, own.wall_s)]
    return f"{hours[0]} GPU-hours a run against {hours[1]} ({run.device})"


def _budget(arms: Sequence[Arm]) -> str:
    """`32 rows a step for 3 epochs`."""
    # Where a row is a document, steps of either are one thing, and the plan says rows.
    packed = [arm for arm in arms if not arm.order.arm.one_document_per_row]
    found: dict[str, None] = {}
    for arm in packed or arms:
        spec = arm.order.train
        if spec.epochs is not None:
            length = f"{spec.epochs:,} epoch{'s' if spec.epochs > 1 else ''}"
        elif spec.steps is not None:
            length = f"{spec.steps:,} steps"
        else:
            length = f"{spec.tokens:,} tokens"
        found[f"{spec.global_batch:,} {spec.batch_unit} a step for {length}"] = None
    return " or ".join(found)
