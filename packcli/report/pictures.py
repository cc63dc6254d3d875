"""Which chart shows what of a report. Each comes with a caption that says what was measured and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from packcli.log import plain
from packcli.report import figures, words
from packcli.report.page import charts
from packcli.report.page.charts import Bar, Drawing, Point, Series, Strip
from packcli.report.page.gather import Data, Members, Spread, bin_edges, curves
from packcli.report.page.tables import mean
from packcli.report.records import Group, Report
from packcli.store import Store

Bounds = tuple[float, float]

SEEDS = 10
"""Curves of single seeds that an arm has at most."""
_LEDGER = (
    ("held out", "held"),
    ("truncated", "truncated"),
    ("dropped", "dropped"),
    ("kept", "kept"),
    ("boundary", "boundary"),
    ("padding", "padding"),
)


@dataclass(frozen=True, slots=True)
class Figure:
    drawing: Drawing
    caption: str


def of_setting(
    report: Report, groups: Sequence[Group], members: Members, store: Store, bounds: Bounds
) -> list[Figure]:
    """Differences, loss, throughput, efficiency, speed-up and probes of arms that compare with each other.

    `bounds`: those of `bounds_of(report)`.
    """
    trained = [group for group in groups if group.train]
    found = [
        *(_difference(report, groups, bounds)),
        *(_loss(report, trained, members, store)),
        *(_throughput(trained, members)),
        *(_efficiency(groups)),
        *(_speedup(report, trained)),
        *(_crossing(groups)),
        *(_behind(groups)),
    ]
    return found


def _name(group: Group) -> str:
    return plain(group.arm) or "all"


# Scores ------------------------------------------------------------------------------------------------


def _difference(report: Report, groups: Sequence[Group], bounds: Bounds) -> list[Figure]:
    points = [point for group in groups if (point := _point(group)) is not None]
    if not points or report.baseline is None:
        return []
    drawing = charts.forest(
        f"Average score against {plain(report.baseline)}", points, "points, 100 = all items", bounds
    )
    kinds = []
    if any(point.sure for point in points):
        kinds.append("Filled, solid: 95% interval over seeds.")
    if any(not point.sure for point in points):
        kinds.append(
            "Hollow, dashed: 95% over test items of these very models; it says nothing about other seeds, and so "
            "nothing about the arm."
        )
    return [Figure(drawing, " ".join([*kinds, "An interval that holds 0 shows no difference."]))]


def _point(group: Group) -> Point | None:
    if group.delta is None:
        return None
    shown, items = words.points(group.delta), group.average_items
    if group.interval is not None:
        low, high = (100 * end for end in group.interval)
        return Point(_name(group), 100 * group.delta, f"{shown} {words.interval(group.interval)}", low, high, True)
    if items is not None:
        text = f"{shown} ({words.interval((items.low, items.high))})"
        return Point(_name(group), 100 * group.delta, text, 100 * items.low, 100 * items.high, False)
    return Point(_name(group), 100 * group.delta, f"{shown}, no interval", None, None, False)


def bounds_of(report: Report) -> Bounds:
    """Of the differences, for all settings alike, so that their charts compare."""
    points = [point for group in report.groups if (point := _point(group)) is not None]
    ends = [end for point in points for end in (point.value, point.low, point.high) if end is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return (low, high) if high > low else (-1.0, 1.0)


# Training ----------------------------------------------------------------------------------------------


def _loss(report: Report, groups: Sequence[Group], members: Members, store: Store) -> list[Figure]:
    """Two charts: over steps, and over useful tokens."""
    arms = list(dict.fromkeys(group.arm for group in report.groups))
    panels: tuple[list[Series], list[Series]] = ([], [])
    missing = 0
    for group in groups:
        rows = [row for row in members.of(group.labels) if row.train]
        found = [one for row in rows if (one := curves(row, store)) is not None]
        missing += len(rows) - len(found)
        for number, panel in enumerate(panels if found else ()):
            own = [one[number] for one in found]
            middle = figures.median(own) if len(own) > 1 else own[0]
            single = [_pairs(curve) for curve in own[:SEEDS]] if len(own) > 1 else []
            panel.append(Series(_name(group), arms.index(group.arm), _pairs(middle), single))
    if not panels[0]:
        return []
    caption = (
        f"Thin: one seed (at most {SEEDS}), mean over 1/{figures.SMOOTHING} of its steps; thick: median of seeds. "
        "Arms that weight documents otherwise average otherwise: compare validation loss."
    )
    if missing:
        caption += f" Left out: {missing} whose log cannot be read."
    names = (
        ("optimizer steps", "Training loss over steps"),
        ("useful tokens", "Training loss over useful tokens"),
    )
    return [
        Figure(charts.lines(title, panel, unit, "loss, nats per supervised token"), caption)
        for panel, (unit, title) in zip(panels, names, strict=True)
    ]


def _pairs(curve: figures.Curve) -> charts.Curve:
    return list(zip(curve[0].tolist(), curve[1].tolist(), strict=True))


def _throughput(groups: Sequence[Group], members: Members) -> list[Figure]:
    def bars(group: Group) -> list[Bar]:
        trains = [row.train for row in members.of(group.labels) if row.train]
        return [
            _bar([one.useful_tokens_per_s for one in trains], words.rate),
            _bar([one.padded_tokens_per_s for one in trains], words.rate),
        ]

    if not groups:
        return []
    rows = [
        (f"{charts.shorten(_name(group), 40)} ({words.seconds(group.train.wall_s)} s)", bars(group))
        for group in groups
        if group.train
    ]
    kinds = ("useful: tokens of documents", "padded: all slots")
    drawing = charts.bars("Tokens a second, and wall time of training", rows, kinds)
    rows_ = [row for group in groups for row in members.of(group.labels)]
    return [Figure(drawing, f"Mean over seeds; lines: lowest and highest. Measured on {figures.machines(rows_)}.")]


def _bar(values: Sequence[float | None], text: Callable[[float | None], str]) -> Bar:
    known = [value for value in values if value is not None]
    value = mean(known)
    if len(known) < 2:
        return Bar(value, text(value))
    return Bar(value, text(value), min(known), max(known))


def _efficiency(groups: Sequence[Group]) -> list[Figure]:
    known = [(group, group.ledger["efficiency"]) for group in groups if group.ledger]
    if not known:
        return []
    rows = [(_name(group), [Bar(100 * value, f"{100 * value:.1f}%")]) for group, value in known]
    drawing = charts.bars("Efficiency of the rows", rows, ("kept tokens / slots",), mark=100.0)
    return [Figure(drawing, "Kept tokens / slots of one epoch; the line is 100%.")]


def _speedup(report: Report, groups: Sequence[Group]) -> list[Figure]:
    own = next((group for group in groups if group.arm == report.baseline), None)
    others = [group for group in groups if group.speedup]
    if own is None or not others:
        return []
    on_cpu = all(group.train.device == "cpu" for group in groups if group.train)
    found = [figures.ratios(own, group, on_cpu=on_cpu) for group in others]
    rows = [
        (_name(group), [Bar(value, words.times(value)) for value in ratios.values()])
        for group, ratios in zip(others, found, strict=True)
    ]
    baseline = plain(own.arm)
    drawing = charts.bars(f"Why arms take less time than {baseline}", rows, list(found[0]), mark=1.0)
    caption = (
        f"{baseline} / arm; the line is 1. Less time = fewer slots x less time a slot: a slot takes longer where "
        "a step holds few of them, and where attention looks further."
    )
    return [Figure(drawing, caption)]


# Probes ------------------------------------------------------------------------------------------------


def _crossing(groups: Sequence[Group]) -> list[Figure]:
    probed = [group for group in groups if group.probes]
    arms = list(dict.fromkeys(arm for group in probed for one in group.probes for arm in one.crossing))
    if not arms:
        return []

    def share(group: Group, arm: str) -> Bar:
        value = mean([one.crossing.get(arm) for one in group.probes])
        return Bar(None if value is None else 100 * value, "-" if value is None else f"{words.share(value)}%")

    rows = [(_name(group), [share(group, arm) for arm in arms]) for group in probed]
    drawing = charts.bars("Attention that goes to other documents", rows, [f"in rows of {plain(a)}" for a in arms])
    caption = (
        "Of what does not go to the row's first token, mean over layers and seeds. A name is the arm a model was "
        "trained with; its bars are the rows it was shown."
    )
    return [Figure(drawing, caption)]


def _behind(groups: Sequence[Group]) -> list[Figure]:
    probed = [group for group in groups if group.probes]
    others = list(dict.fromkeys(name for group in probed for one in group.probes for name in one.behind))
    if not others:
        return []
    rows = [
        (_name(group), [mean([one.behind.get(other) for one in group.probes]) for other in others])
        for group in probed
    ]
    drawing = charts.dots(
        "What a document before adds to the loss",
        rows,
        [plain(other) for other in others],
        "nats per supervised token",
    )
    return [
        Figure(drawing, "Loss behind another document, seen without a mask, minus loss alone; mean over seeds.")
    ]


# Data --------------------------------------------------------------------------------------------------


def of_data(data: Data) -> list[Figure]:
    """Lengths with each arm's rows, and where every token went."""
    return [*_lengths(data), *_balance(data)]


def _lengths(data: Data) -> list[Figure]:
    spreads = ([data.documents] if data.documents else []) + data.rows
    if not spreads:
        return []
    edges = bin_edges(data.max_length).tolist()
    edges.append(edges[-1] + 2 * (edges[1] - edges[0]))
    strips = [
        Strip(spread.name, _said(spread, first), 7 if first else 0, spread.shares.tolist())
        for spread, first in ((spread, spread is data.documents) for spread in spreads)
    ]
    drawing = charts.strips(
        "How long documents are, and how full rows", strips, edges, data.max_length, "tokens in a document or row"
    )
    caption = (
        f"Height: share of documents or rows, each strip to its own highest. Line: {data.max_length:,} tokens, "
        "the longest row; behind it all documents that are longer. First epoch, of several seeds the first."
    )
    if data.documents is None:
        caption += " The token store is not here, so the documents are not shown."
    return [Figure(drawing, caption)]


def _said(spread: Spread, is_documents: bool) -> str:
    count = f"{spread.count:,}{'' if is_documents else ' rows'}"
    return f"{count}, median {spread.median:,.0f}, longest {spread.longest:,}"


def _balance(data: Data) -> list[Figure]:
    parts = ("validation", "truncated", "dropped", "kept", "boundary", "padding")
    rows = [
        (name, [float(ledger[f"tokens_{part}"]) for part in parts])
        for name, ledger in data.ledgers
        if all(f"tokens_{part}" in ledger for part in parts)
    ]
    if not rows:
        return []
    drawing = charts.balance("Where every token went", rows, _LEDGER, 3)
    caption = (
        "One epoch, of several seeds the first. Left of the line: tokens that are in no training row. Right of "
        "it: the slots that are computed. What is there is never drawn thinner than a line."
    )
    return [Figure(drawing, caption)]
