"""Which arm, at what cost, with which certainty: in sentences, and none that an interval does not carry.

An arm is said to score above or below the baseline where that holds after Holm's correction over all differences
of the report; otherwise the text says what would have been seen. Arms are compared with the baseline, never with
each other: no interval is of that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

from packcli.data.sources import BUILTIN
from packcli.log import plain
from packcli.plan import Plan, TrainOrder
from packcli.report import confounds, words
from packcli.report.confounds import Arm
from packcli.report.costs import Timing, comparable, fastest, sentence, timing, told
from packcli.report.records import SIGNIFICANT, Group, Row, Train, by_setting

SAME_LOSS = 0.001
MOST_SETTINGS = 12
MOST_ARMS = 6

Standing = Literal["above", "below", "open", "equal", "unknown"]
"""Of an arm's average score: shown to be above or below the baseline's; neither shown; to the last item the
baseline's in each of several seeds, with its validation loss; nothing to say."""
_SHOWN: dict[Standing, str] = {"above": "higher", "below": "lower"}


def write(plan: Plan, rows: Sequence[Row], groups: tuple[Group, ...]) -> str:
    """What the numbers come from, one paragraph for each setting that arms are compared within, learning rates."""
    scope = " ".join([*_origin(plan, rows), *_incomplete(rows), *_contradictory(rows), *_partial(groups)])
    trains: dict[frozenset[tuple[str, str]], list[Train]] = {}
    orders: dict[frozenset[tuple[str, str]], TrainOrder] = {}
    for row in rows:
        labels = frozenset(item for item in row.labels.items() if item[0] != "seed")
        orders.setdefault(labels, plan.trains[row.ids["train"]])
        trains.setdefault(labels, []).extend([row.train] if row.train else [])
    grids = confounds.grids(groups, rows)
    comparisons = sum(group.p is not None for group in groups)
    answers = []
    for setting, members in by_setting(groups):
        keys = [frozenset(group.labels.items()) for group in members]
        arms = [
            Arm(group, orders[key], trains[key], grids.get(confounds.without_rate(group)))
            for key, group in zip(keys, members, strict=True)
        ]
        taken, text = _setting(arms, plan.baseline, comparisons)
        answers.append((taken, f"`{words.name(setting)}`: {text}" if setting else text))
    return "\n".join(part for part in (scope, *_shortened(answers), *confounds.rates(grids)) if part)


def _shortened(answers: list[tuple[str, str]]) -> list[str]:
    """Hundreds of settings: how often each arm is taken, and the first of the paragraphs."""
    texts = [text for _, text in answers]
    if len(texts) <= MOST_SETTINGS:
        return texts
    tally = [f"{taken} in {number:,}" for taken, number in Counter(taken for taken, _ in answers).most_common()]
    first = f"the first {MOST_SETTINGS} of them follow; `--only` shows others."
    return [f"Of {len(texts):,} settings: {words.listed(tally)}; {first}", *texts[:MOST_SETTINGS]]


# Where the numbers come from ---------------------------------------------------------------------------


def _origin(plan: Plan, rows: Sequence[Row]) -> list[str]:
    synthetic = [
        all(source.source in BUILTIN for source in plan.tokens[cell.tokens].sources) for cell in plan.cells
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
    open_ = [f"{count:,} {state}" for state, count in states.items() if count]
    if not open_:
        return []
    number = sum(states.values())
    rest = "; what follows is about what is there" if number < len(rows) else ""
    return [f"{number:,} of {len(rows):,} cells are not done ({', '.join(open_)}){rest}."]


def _contradictory(rows: Sequence[Row]) -> list[str]:
    wrong = [words.name(row.labels) for row in rows if row.physics]
    if not wrong:
        return []
    more = f" and {len(wrong) - 3:,} more" if len(wrong) > 3 else ""
    return [
        f"The numbers of some trainings cannot be true, nor what follows from them: {'; '.join(wrong[:3])}{more}."
    ]


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


def _setting(arms: list[Arm], baseline: str | None, comparisons: int) -> tuple[str, str]:
    """Whom it takes, in a few words, and the paragraph."""
    others = [arm for arm in arms if arm.group.arm != baseline]
    if baseline is None:
        return "not compared", "The sweep names no `baseline` arm, so nothing is compared."
    if len(others) == len(arms):
        return "not compared", f"There is no `{plain(baseline)}` cell here, so nothing is compared."
    if not others:
        return "not compared", f"There is no arm besides `{plain(baseline)}` here, so nothing is compared."
    if all(arm.order.train.steps == 0 for arm in arms):
        return "not trained", "Nothing was trained (`train.steps: 0`): what is scored are models as they came."
    (base,) = [arm for arm in arms if arm.group.arm == baseline]
    timings = [found for arm in others if (found := timing(arm))] if comparable(arms) and told(arms) else []
    taken, answer = _answer(base, others, timings)
    scored = any(arm.group.task_states for arm in others)
    sentences = [
        answer,
        *(_scores(base, others, comparisons) if scored else []),
        sentence(base, arms, timings, next((arm for arm in others if arm.name == taken), None)),
        *confounds.sentence(base, others),
    ]
    return taken, " ".join(sentences)


def _answer(base: Arm, others: list[Arm], timings: list[Timing]) -> tuple[str, str]:
    """Scores decide where they differ, else cost, else nothing does."""
    by: dict[Standing, list[Arm]] = {standing: [] for standing in get_args(Standing)}
    for arm in others:
        by[_standing(arm.group, base.group)].append(arm)
    cheaper = [found for found in timings if found.n > 1 and found.low > 1]
    if by["above"]:
        known = fastest([found for found in timings if found.arm in by["above"]])
        arm = known.arm if known else max(by["above"], key=lambda arm: arm.group.delta or 0.0)
        return arm.name, f"Take {arm.name}: its average score is above {base.name}'s."
    if known := fastest([found for found in cheaper if found.arm in by["equal"]]):
        arm, seeds = known.arm, known.arm.group.n_pairs
        alike = (
            f"it scored as {base.name} did in each of {seeds} seeds, with a validation loss within {SAME_LOSS:.1%}"
        )
        return arm.name, f"Take {arm.name}: {alike}, and costs less."
    if known := fastest([found for found in cheaper if found.arm in by["open"]]):
        arm, low = known.arm, (known.arm.group.interval or (0.0, 0.0))[0]
        loss = (
            f" if a loss of {100 * -low:.1f} points would do, which its interval leaves room for"
            if low < 0
            else ""
        )
        return arm.name, f"Take {arm.name}{loss}: no difference in score was shown, and it costs less."
    if by["open"] or by["equal"]:
        below = ", of those not shown to score below it," if by["below"] else ""
        return base.name, f"Stay with {base.name}: no arm was shown to score above it or{below} to cost less."
    if by["below"]:
        whom = "no arm that has an interval scores as high" if by["unknown"] else "every other arm scored below it"
        return base.name, f"Stay with {base.name}: {whom}."
    if not any(arm.group.task_states for arm in others):
        return (
            "by cost alone",
            "By cost alone: nothing is evaluated (`eval.tasks` is empty), so quality is not compared.",
        )
    return "not settled", f"Not settled: {_why_not(others)}."


def _standing(group: Group, base: Group) -> Standing:
    if group.delta is None or group.n_pairs < 2:
        return "unknown"
    if group.interval is None or group.p_holm is None:
        return "equal" if group.delta == 0 and _same_loss(group, base) else "unknown"
    if not group.shown:
        return "open"
    return "above" if group.delta > 0 else "below"


def _same_loss(group: Group, base: Group) -> bool:
    """Models that can do nothing yet score alike too, all 0; their losses tell them apart."""
    own, other = (one.train.validation_loss if one.train else None for one in (group, base))
    return own is not None and other is not None and abs(own - other) <= SAME_LOSS * other


def _why_not(others: list[Arm]) -> str:
    pairs = max(arm.group.n_pairs for arm in others)
    if pairs == 0:
        return "no seed is scored in an arm and in the baseline"
    if pairs == 1:
        return "one seed an arm says nothing of the scatter between seeds; it takes two or more"
    return "without scatter between seeds a difference has no interval"


def _scores(base: Arm, others: list[Arm], comparisons: int) -> list[str]:
    """Arms that differ, then those for which it was not shown, then those that little can be said of."""
    by: dict[Standing, list[Arm]] = {}
    for arm in others:
        by.setdefault(_standing(arm.group, base.group), []).append(arm)
    clauses = [
        f"shown to be {word}, {_few([_estimate(arm, comparisons) for arm in by[standing]])}"
        for standing, word in _SHOWN.items()
        if standing in by
    ]
    if "open" in by:
        clauses.append(f"no difference shown, {_few([_estimate(arm, comparisons) for arm in by['open']])}")
    if "equal" in by:
        clauses.append(f"0 in every seed, {_few([arm.name for arm in by['equal']])}")
    clauses += _unbounded([arm.group for arm in by.get("unknown", [])])
    return [f"Average score less {base.name}'s, in points: {'; '.join(clauses)}.", *_seen(by.get("open", []))]


def _seen(arms: list[Arm]) -> list[str]:
    """What the sweep would have found, had it been there."""
    effects = sorted(arm.group.detectable for arm in arms if arm.group.detectable is not None)
    if not effects:
        return []
    if effects[0] > 1:  # more than scores can differ by
        return [
            "No difference shown is not none: with so few seeds and so much scatter, none could have been seen."
        ]
    least, most = f"{100 * effects[0]:.1f}", f"{100 * effects[-1]:.1f}" if effects[-1] <= 1 else "over 100"
    size = f"{least} points" if least == most else f"{least} to {most} points, by arm,"
    chance = f"a true difference of {size} is found 4 times in 5, a smaller one less often"
    return [f"No difference shown is not none: {chance}."]


def _estimate(arm: Arm, comparisons: int) -> str:
    """`best_fit` +1.2 [+0.3, +2.1]; with p where the interval alone would say more than Holm's correction does."""
    group = arm.group
    assert group.interval is not None
    assert group.p is not None
    assert group.p_holm is not None
    text = f"{arm.name} {words.points(group.delta or 0.0)} {words.interval(group.interval)}"
    if group.shown:
        return f"{text} (p {words.p_value(group.p_holm)}{' by Holm' if comparisons > 1 else ''})"
    if group.p < SIGNIFICANT:
        corrected = f"{words.p_value(group.p_holm)} over {comparisons} comparisons"
        return f"{text} (p {words.p_value(group.p)} by itself, {corrected})"
    return text


def _unbounded(groups: list[Group]) -> list[str]:
    """What is known of arms without an interval over seeds: clauses."""
    single = [group for group in groups if group.delta is not None and group.n_pairs == 1]
    steady = [group for group in groups if group.delta is not None and group.n_pairs > 1]
    without = [f"`{plain(group.arm)}`" for group in groups if group.delta is None]
    clauses = []
    if single:
        over = (
            " [of these very models, 95% over test items]" if any(group.average_items for group in single) else ""
        )
        clauses.append(f"in one seed{over}, {_few([_in_one_seed(group) for group in single])}")
    if steady:
        known = [f"`{plain(group.arm)}` {words.points(group.delta or 0.0)}" for group in steady]
        clauses.append(f"every seed gave the same, so no interval, {_few(known)}")
    if without:
        clauses.append(f"no seed scored in both, {_few(without)}")
    return clauses


def _in_one_seed(group: Group) -> str:
    items = words.over_items(group.average_items)
    return f"`{plain(group.arm)}` {words.points(group.delta or 0.0)}{' ' if items else ''}{items}"


def _few(items: list[str]) -> str:
    more = [f"{len(items) - MOST_ARMS} more"] if len(items) > MOST_ARMS else []
    return words.listed([*items[:MOST_ARMS], *more])
