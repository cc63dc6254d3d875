"""Which charts a report has, and what they say: each comes with a caption of what was measured and how.

The page and the files that `--figures` writes hold the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from packcli.log import plain
from packcli.plan import Plan
from packcli.report import gather, words
from packcli.report.charts import (
    Balance,
    Bar,
    Bars,
    Chart,
    Curves,
    Differences,
    Dots,
    Point,
    Series,
    Strip,
    Strips,
)
from packcli.report.gather import Data, Members, Spread
from packcli.report.records import Group, Report, Speedup
from packcli.store import Store

SETTINGS = 24
"""Settings whose charts are drawn."""
SETS = 12
"""Token stores and row lengths whose lengths and ledgers are drawn."""
SEEDS = 10
"""Curves of single seeds that an arm has at most."""

Bounds = tuple[float, float]
Charts = dict[str, Chart]
"""By the name of the file that `--figures` writes."""
Arms = list[str]
"""All of a sweep: an arm's number is its colour."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """Charts of each setting, and of each data set, with their names; how many there are that are not drawn."""

    settings: list[tuple[str, Charts]]
    sets: list[tuple[str, Charts]]
    more_settings: int
    more_sets: int

    def left_out(self) -> list[str]:
        found = []
        if self.more_settings:
            total = SETTINGS + self.more_settings
            found.append(
                f"Charts: of the first {SETTINGS} of {total:,} settings. Use `--only axis=value` for others."
            )
        if self.more_sets:
            found.append(f"Lengths and ledgers: {self.more_sets:,} more data sets or row lengths are not drawn.")
        return found


def pictures(plan: Plan, report: Report, store: Store, members: Members) -> Pictures:
    """What is not known yet has no chart, and a setting without any is left out."""
    settings, bounds = report.settings(), _bounds(report)
    arms = list(dict.fromkeys(group.arm for group in report.groups))
    found = [
        (words.name(setting) or "all arms", _of_setting(_Setting(report, groups, members, store, bounds, arms)))
        for setting, groups in settings[:SETTINGS]
    ]
    data, more_sets = gather.data(plan, report, store, SETS)
    return Pictures(
        settings=[(name, charts) for name, charts in found if charts],
        sets=[(one.name, charts) for one in data if (charts := _of_data(one, arms))],
        more_settings=max(0, len(settings) - SETTINGS),
        more_sets=more_sets,
    )


@dataclass(frozen=True, slots=True)
class _Setting:
    """Arms that compare with each other. `bounds`: of the differences of all settings."""

    report: Report
    groups: Sequence[Group]
    members: Members
    store: Store
    bounds: Bounds
    arms: Arms

    @property
    def trained(self) -> list[Group]:
        return [group for group in self.groups if group.train]


def _of_setting(one: _Setting) -> Charts:
    found = {
        "differences": _differences(one),
        **_loss(one),
        "throughput": _throughput(one),
        "efficiency": _efficiency(one),
        "speedup": _speedup(one),
        "crossing": _crossing(one),
        "behind": _behind(one),
    }
    return {name: chart for name, chart in found.items() if chart is not None}


def _name(group: Group) -> str:
    return plain(group.arm) or "all"


def _mean(values: Sequence[float | None]) -> float | None:
    """Of what is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# Scores ------------------------------------------------------------------------------------------------


def _differences(one: _Setting) -> Chart | None:
    points = [point for group in one.groups if (point := _point(group)) is not None]
    if not points or one.report.baseline is None:
        return None
    over_seeds = [point.certain for point in points if point.over == "seeds" and point.low is not None]
    kinds = [
        (True in over_seeds, "Filled: shown, by the 95% interval over seeds and after Holm's correction."),
        (False in over_seeds, "Hollow, solid: 95% over seeds; not shown after Holm's correction."),
        (
            any(point.over == "items" and point.low is not None for point in points),
            "Hollow, dashed: 95% over test items of these very models; it says nothing about other seeds, and so "
            "nothing about the arm.",
        ),
    ]
    return Differences(
        title=f"Average score against {plain(one.report.baseline)}",
        caption=" ".join([*(text for occurs, text in kinds if occurs), "Not shown does not mean none."]),
        x_name="points, 100 = all items",
        points=points,
        bounds=one.bounds,
    )


def _point(group: Group) -> Point | None:
    if group.delta is None:
        return None
    name, value, text = _name(group), 100 * group.delta, words.points(group.delta)
    if group.interval is not None:
        low, high = (100 * end for end in group.interval)
        p = f", p {words.p_value(group.p_holm)}" if group.p_holm is not None else ""
        return Point(name, value, f"{text} {words.interval(group.interval)}{p}", low, high, "seeds", group.shown)
    if (items := group.average_items) is not None and items.low is not None and items.high is not None:
        shown = f"{text} ({words.interval((items.low, items.high))})"
        return Point(name, value, shown, 100 * items.low, 100 * items.high, "items", False)
    return Point(name, value, f"{text}, no interval", None, None, "items", False)


def _bounds(report: Report) -> Bounds:
    """Of the differences, for all settings alike, so that their charts compare."""
    points = [point for group in report.groups if (point := _point(group)) is not None]
    ends = [end for point in points for end in (point.value, point.low, point.high) if end is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return (low, high) if high > low else (-1.0, 1.0)


# Training ----------------------------------------------------------------------------------------------


def _loss(one: _Setting) -> Charts:
    """Two charts: over steps, and over useful tokens."""
    panels: tuple[list[Series], list[Series]] = ([], [])
    missing = 0
    for group in one.trained:
        rows = [row for row in one.members.of(group.labels) if row.train]
        found = [curves for row in rows if (curves := gather.curves(row, one.store)) is not None]
        missing += len(rows) - len(found)
        for number, panel in enumerate(panels if found else ()):
            own = [curves[number] for curves in found]
            middle = gather.median(own) if len(own) > 1 else own[0]
            single = [_pairs(curve) for curve in own[:SEEDS]] if len(own) > 1 else []
            panel.append(Series(_name(group), one.arms.index(group.arm), _pairs(middle), single))
    if not panels[0]:
        return {}
    caption = (
        f"Thin: one seed (at most {SEEDS}), mean over 1/{gather.SMOOTHING} of its steps; thick: median of seeds. "
        "Arms that weight documents otherwise average otherwise: compare validation loss."
    )
    if any(group.train and group.train.own_validation for group in one.trained):
        caption += " That of arms with held-out rows of their own compares with none."
    if missing:
        caption += f" Left out: {missing} whose log cannot be read."
    y_name = "loss, nats per supervised token"
    return {
        "loss": Curves("Training loss over steps", caption, "optimizer steps", y_name, panels[0]),
        "loss_tokens": Curves("Training loss over useful tokens", caption, "useful tokens", y_name, panels[1]),
    }


def _pairs(curve: gather.Curve) -> list[tuple[float, float]]:
    return list(zip(curve[0].tolist(), curve[1].tolist(), strict=True))


def _throughput(one: _Setting) -> Chart | None:
    def bars(group: Group) -> list[Bar]:
        trains = [row.train for row in one.members.of(group.labels) if row.train]
        return [
            _bar([train.useful_tokens_per_s for train in trains], words.rate),
            _bar([train.padded_tokens_per_s for train in trains], words.rate),
        ]

    if not one.trained:
        return None
    rows = [row for group in one.trained for row in one.members.of(group.labels)]
    return Bars(
        title="Tokens a second, and wall time of training",
        caption=f"Mean over seeds; lines: lowest and highest. Measured on {gather.machines(rows)}.",
        x_name="tokens per second",
        kinds=("useful: tokens of documents", "padded: all slots"),
        rows=[
            (f"{_name(group)} ({words.seconds(group.train.wall_s)} s)", one.arms.index(group.arm), bars(group))
            for group in one.trained
            if group.train
        ],
    )


def _bar(values: Sequence[float | None], text: Callable[[float | None], str]) -> Bar:
    known = [value for value in values if value is not None]
    value = _mean(known)
    if len(known) < 2:
        return Bar(value, text(value))
    return Bar(value, text(value), min(known), max(known))


def _efficiency(one: _Setting) -> Chart | None:
    known = [
        (group, value) for group in one.groups if (value := (group.ledger or {}).get("efficiency")) is not None
    ]
    if not known:
        return None
    return Bars(
        title="Efficiency of the rows",
        caption="Kept tokens / slots of one epoch; the line is 100%.",
        x_name="kept tokens / slots, %",
        kinds=("kept tokens / slots",),
        rows=[
            (_name(group), one.arms.index(group.arm), [Bar(100 * value, f"{words.percent(value)}%")])
            for group, value in known
        ],
        mark=100.0,
    )


def _speedup(one: _Setting) -> Chart | None:
    own = next((group for group in one.trained if group.arm == one.report.baseline), None)
    on_cpu = all(group.train.device == "cpu" for group in one.trained if group.train)
    others = [(group, group.speedup) for group in one.trained if group.speedup]
    if own is None or not others:
        return None
    found = [(group, _ratios(own, group, speedup, on_cpu=on_cpu)) for group, speedup in others]
    baseline = plain(own.arm)
    return Bars(
        title=f"Why arms take less time than {baseline}",
        caption=f"{baseline} / arm; the line is 1. Less time = fewer slots x less time a slot: a slot takes "
        "longer where a step holds few of them, and where attention looks further.",
        x_name=f"{baseline} / arm",
        kinds=list(found[0][1]),
        rows=[
            (
                _name(group),
                one.arms.index(group.arm),
                [Bar(value, words.times(value)) for value in ratios.values()],
            )
            for group, ratios in found
        ],
        mark=1.0,
    )


def _ratios(baseline: Group, arm: Group, speedup: Speedup, *, on_cpu: bool) -> dict[str, float | None]:
    """Where an arm's speed-up comes from: the baseline over the arm in rows, steps, slots and time."""
    return {
        "fewer rows": _over(*((group.ledger or {}).get("rows") for group in (baseline, arm))),
        "fewer steps": _over(*(group.train.steps if group.train else None for group in (baseline, arm))),
        "fewer slots": arm.slot_ratio,
        f"less {'CPU' if on_cpu else 'wall'} time": speedup.cpu if on_cpu else speedup.wall,
    }


def _over(baseline: float | None, own: float | None) -> float | None:
    return baseline / own if baseline and own else None


# Probes ------------------------------------------------------------------------------------------------


def _crossing(one: _Setting) -> Chart | None:
    probed = [group for group in one.groups if group.probes]
    arms = list(dict.fromkeys(arm for group in probed for own in group.probes for arm in own.crossing))
    if not arms:
        return None

    def share(group: Group, arm: str) -> Bar:
        value = _mean([own.crossing.get(arm) for own in group.probes])
        return Bar(None, words.NONE) if value is None else Bar(100 * value, f"{words.share(value)}%")

    return Bars(
        title="Attention that goes to other documents" + (f", rows of {plain(arms[0])}" if len(arms) == 1 else ""),
        caption="Of what does not go to the row's first token, mean over layers and seeds. A name is the arm a "
        "model was trained with; its bars are the rows it was shown.",
        x_name="share of attention, %",
        kinds=[f"in rows of {plain(arm)}" for arm in arms],
        rows=[(_name(group), one.arms.index(group.arm), [share(group, arm) for arm in arms]) for group in probed],
    )


def _behind(one: _Setting) -> Chart | None:
    probed = [group for group in one.groups if group.probes]
    others = list(dict.fromkeys(name for group in probed for own in group.probes for name in own.behind))
    if not others:
        return None
    return Dots(
        title="What a document before adds to the loss",
        caption="Loss behind another document, seen without a mask, minus loss alone; mean over seeds.",
        x_name="nats per supervised token",
        kinds=[plain(other) for other in others],
        rows=[
            (_name(group), [_mean([own.behind.get(other) for own in group.probes]) for other in others])
            for group in probed
        ],
    )


# Data --------------------------------------------------------------------------------------------------


def _of_data(data: Data, arms: Arms) -> Charts:
    """Lengths with each arm's rows, and where every token went."""
    found = {"lengths": _lengths(data, arms), "ledger": _balance(data)}
    return {name: chart for name, chart in found.items() if chart is not None}


def _lengths(data: Data, arms: Arms) -> Chart | None:
    spreads = ([data.documents] if data.documents else []) + data.rows
    if not spreads:
        return None
    edges = gather.bin_edges(data.max_length).tolist()
    edges.append(edges[-1] + 2 * (edges[1] - edges[0]))
    caption = (
        f"Height: share of documents or rows, each strip to its own highest. Line: {data.max_length:,} tokens, "
        "the longest row; behind it all documents that are longer. First epoch, of several seeds the first."
    )
    if data.documents is None:
        caption += " The token store is not here, so the documents are not shown."
    return Strips(
        title="How long documents are, and how full rows",
        caption=caption,
        x_name="tokens in a document or row",
        edges=edges,
        limit=data.max_length,
        strips=[
            Strip(
                one.name, _said(one), _DOCUMENTS if one.arm is None else arms.index(one.arm), one.shares.tolist()
            )
            for one in spreads
        ],
    )


_DOCUMENTS = 7  # the grey of `COLOURS`


def _said(spread: Spread) -> str:
    count = f"{spread.count:,}{'' if spread.arm is None else ' rows'}"
    return f"{count}, median {spread.median:,.0f}, longest {spread.longest:,}"


_PARTS = ("validation", "truncated", "dropped", "kept", "boundary", "padding")


def _balance(data: Data) -> Chart | None:
    rows = [
        (name, [float(ledger[f"tokens_{part}"]) for part in _PARTS])
        for name, ledger in data.ledgers
        if all(f"tokens_{part}" in ledger for part in _PARTS)
    ]
    if not rows:
        return None
    return Balance(
        title="Where every token went",
        caption="One epoch, of several seeds the first. Left of the line: tokens that are in no training row. "
        "Right of it: the slots that are computed. What is there is never drawn thinner than a line.",
        x_name="tokens",
        kinds=[("held out", "held"), *((part, part) for part in _PARTS[1:])],
        rows=rows,
        before=3,
    )
