"""Charts as SVG text. Pure: equal input gives equal bytes.

All are `WIDTH` wide, so that words stay readable on a phone; y grows downwards. Colours are classes that
`page.css` gives values for light and dark: `k0`..`k7`; `d0`..`d3` are dashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from packcli.data.svg import at, flow, px, safe, text, text_width
from packcli.report import words
from packcli.report.charts import (
    COLOURS,
    Balance,
    Bar,
    Bars,
    Chart,
    Curve,
    Curves,
    Differences,
    Dots,
    Point,
    Strip,
    Strips,
    dashes,
    shorten,
)

WIDTH = 360
_LEFT, _RIGHT = 44, 8
_PLOT = 190  # height of a plot of lines
_BAR = 11
_STRIP = 34


@dataclass(frozen=True, slots=True)
class _Drawing:
    """`about` says in words what the marks show: a reader may not see them."""

    about: str
    height: float
    marks: str


def draw(chart: Chart, id_: str) -> str:
    """The chart as an `svg` element, its ids beginning with `id_`."""
    found = _drawing(chart)
    return (
        f'<svg viewBox="0 0 {WIDTH} {px(found.height)}" role="img" aria-labelledby="{id_}-t {id_}-d">'
        f'<title id="{id_}-t">{safe(chart.title)}</title><desc id="{id_}-d">{safe(found.about)}</desc>'
        f"{found.marks}</svg>"
    )


def _drawing(chart: Chart) -> _Drawing:
    match chart:
        case Curves():
            return _curves(chart)
        case Bars():
            return _bars(chart)
        case Differences():
            return _differences(chart)
        case Dots():
            return _dots(chart)
        case Balance():
            return _balance(chart)
        case Strips():
            return _strips(chart)


# Lines -------------------------------------------------------------------------------------------------


def _curves(chart: Curves) -> _Drawing:
    points = [point for one in chart.series for curve in (one.middle, *one.single) for point in curve]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    log, x_name, y_name = chart.log, chart.x_name, chart.y_name
    y_ticks = _log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    x_ticks = ticks(0, max(xs))
    to_y = _scale(min([*ys, *y_ticks]), max([*ys, *y_ticks]), 18 + _PLOT, 18, log=log)
    to_x = _scale(0, max([*xs, x_ticks[-1]]), _LEFT, WIDTH - _RIGHT)
    parts = [text(0, 10, f"{y_name}{' (log scale)' if log else ''}", "small muted")]
    for value in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {px(to_y(value))}H{WIDTH - _RIGHT}"/>')
        parts.append(text(_LEFT - 5, to_y(value) + 4, _short(value), "small end"))
    for value in x_ticks:
        parts.append(text(to_x(value), 18 + _PLOT + 15, _short(value), "small middle"))
    parts.append(text(WIDTH - _RIGHT, 18 + _PLOT + 29, x_name, "small muted end"))
    for one in chart.series:
        kind = f"k{one.number % len(COLOURS)}"
        parts += [f'<path class="thin {kind}" d="{_path(curve, to_x, to_y)}"/>' for curve in one.single]
        parts.append(
            f'<path class="line {kind} d{dashes(one.number)}" d="{_path(one.middle, to_x, to_y)}">'
            f"<title>{safe(one.name)}</title></path>"
        )
    key, high = flow([_swatch(one.name, one.number) for one in chart.series], WIDTH - 8, 16)
    parts.append(at(4, 18 + _PLOT + 40, key))
    ends = "; ".join(f"{one.name} ends at {one.middle[-1][1]:.3g}" for one in chart.series if one.middle)
    return _Drawing(f"{y_name} over {x_name}. {ends}.", 18 + _PLOT + 40 + high, "".join(parts))


def _path(curve: Curve, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    return "M" + "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in curve)


def _swatch(name: str, number: int) -> tuple[float, str]:
    name = shorten(name)
    sample = f'<path class="line {_k(number)} d{dashes(number)}" d="M0 7H22"/>'
    return 27 + text_width(name), sample + text(27, 11, name, "small")


# Bars --------------------------------------------------------------------------------------------------


def _bars(chart: Bars) -> _Drawing:
    """For each row a name, and below it a bar of each kind."""
    found = [bar for _, _, bars in chart.rows for bar in bars]
    most = max((bar.high or bar.value or 0.0 for bar in found), default=0.0) or 1.0
    to_x = _scale(0, max(most, chart.mark or 0.0), 0, WIDTH - 62)
    parts, y = [], 0.0
    if len(chart.kinds) > 1:
        key, high = flow([_box(name, number) for number, name in enumerate(chart.kinds)], WIDTH, 16)
        parts, y = [key], high + 6
    for name, arm, bars in chart.rows:
        top = y
        parts.append(text(0, y + 10, shorten(name, 56), "small"))
        y += 15
        labels = []
        for number, bar in enumerate(bars):
            parts.append(at(0, y, _bar(bar, chart.colour(arm, number), to_x, chart.kinds[number])))
            end = to_x(max(bar.value or 0.0, bar.high or 0.0))
            labels.append(text(end + 5 if bar.value is not None else 0, y + 9.5, bar.shown, "small value"))
            y += _BAR + 3
        if chart.mark is not None:
            parts.append(f'<path class="mark" d="M{px(to_x(chart.mark))} {px(top + 14)}V{px(y - 1)}"/>')
        parts += labels
        y += 6
    said = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {bar.shown}" for kind, bar in zip(chart.kinds, bars, strict=True))
        for name, _, bars in chart.rows
    )
    return _Drawing(f"{said}.", y, "".join(parts))


def _bar(bar: Bar, number: int, to_x: Callable[[float], float], kind: str) -> str:
    if bar.value is None:
        return ""
    parts = [
        f'<rect class="bar {_k(number)}" width="{px(to_x(bar.value))}" height="{_BAR}">'
        f"<title>{safe(f'{kind}: {bar.shown}')}</title></rect>"
    ]
    if bar.low is not None and bar.high is not None:
        parts.append(f'<path class="range" d="M{px(to_x(bar.low))} {_BAR / 2}H{px(to_x(bar.high))}"/>')
    return "".join(parts)


def _k(number: int) -> str:
    return f"k{number % len(COLOURS)}"


def _box(name: str, number: int) -> tuple[float, str]:
    return 15 + text_width(name), f'<rect class="bar {_k(number)}" width="{_BAR}" height="{_BAR}"/>' + text(
        15, 10, name, "small"
    )


# Differences -------------------------------------------------------------------------------------------


def _differences(chart: Differences) -> _Drawing:
    x_ticks = ticks(*chart.bounds)
    to_x = _scale(min(chart.bounds[0], x_ticks[0]), max(chart.bounds[1], x_ticks[-1]), 8, WIDTH - 12)
    bottom, parts = 34.0 * len(chart.points) + 4, []
    for number, point in enumerate(chart.points):
        kind, y = _kind(point), 34.0 * number + 23
        parts.append(_rulers(x_ticks, to_x, y))
        parts.append(text(0, y - 11, shorten(point.name, 22), "small"))
        parts.append(text(WIDTH, y - 11, point.shown, "small end"))
        if point.low is not None and point.high is not None:
            ends = "".join(f"M{px(to_x(end))} {y - 3}v6" for end in (point.low, point.high))
            parts.append(f'<path class="{kind}" d="M{px(to_x(point.low))} {y}H{px(to_x(point.high))}{ends}"/>')
        parts.append(f'<circle class="{kind}" cx="{px(to_x(point.value))}" cy="{y}" r="4"/>')
    parts.append(_signed(x_ticks, to_x, bottom, chart.x_name))
    said = "; ".join(f"{point.name} {point.shown}" for point in chart.points)
    return _Drawing(f"{chart.x_name}. {said}.", bottom + 32, "".join(parts))


def _kind(point: Point) -> str:
    return "sure" if point.certain else "open" if point.over == "seeds" else "open items"


def _dots(chart: Dots) -> _Drawing:
    kinds = chart.kinds
    known = [value for _, values in chart.rows for value in values if value is not None]
    x_ticks = ticks(min([0.0, *known]), max([0.0, *known]))
    to_x = _scale(x_ticks[0], x_ticks[-1], 8, WIDTH - 12)
    key, y = flow([_dot_of(name, number) for number, name in enumerate(kinds)], WIDTH, 16)
    parts = [key]
    for name, values in chart.rows:
        y += 34
        parts += [text(0, y - 16, shorten(name, 56), "small"), _rulers(x_ticks, to_x, y - 4)]
        for number, value in enumerate(values):
            if value is not None:
                parts.append(at(to_x(value), y - 4, _dot(number, f"{kinds[number]}: {value:+.3f}")))
    parts.append(_signed(x_ticks, to_x, y + 6, chart.x_name))
    said = "; ".join(
        f"{name}: " + ", ".join(f"{k} {v:+.3f}" for k, v in zip(kinds, values, strict=True) if v is not None)
        for name, values in chart.rows
    )
    return _Drawing(f"{chart.x_name}. {said}.", y + 38, "".join(parts))


_SHAPES = ("M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z", "M-4-4h8v8h-8z", "M0-5.5L5.5 4H-5.5z")


def _dot(number: int, said: str) -> str:
    shape = _SHAPES[number % len(_SHAPES)]
    return f'<path class="bar {_k(number)}" d="{shape}"><title>{safe(said)}</title></path>'


def _dot_of(name: str, number: int) -> tuple[float, str]:
    return 15 + text_width(name), at(5, 6, _dot(number, name)) + text(15, 10, name, "small")


def _rulers(values: Sequence[float], to_x: Callable[[float], float], y: float) -> str:
    """A short line at each value, where the marks of a row lie."""
    lines_ = [
        f'<path class="{"grid" if value else "axis"}" d="M{px(to_x(value))} {px(y - 7)}v14"/>' for value in values
    ]
    return "".join(lines_)


def _signed(values: Sequence[float], to_x: Callable[[float], float], y: float, name: str) -> str:
    numbers = [text(to_x(value), y + 13, f"{value:+g}" if value else "0", "small middle") for value in values]
    return "".join([*numbers, text(WIDTH, y + 27, name, "small muted end")])


# Where tokens went -------------------------------------------------------------------------------------


def _balance(chart: Balance) -> _Drawing:
    """A part that is not empty is never thinner than a pixel and a half."""
    rows, before = chart.rows, chart.before
    left_most, right_most = (
        max(sum(parts[own]) for _, parts in rows) for own in (slice(before), slice(before, None))
    )
    scale = (WIDTH - 8) / ((left_most + right_most) or 1)
    zero = 4 + left_most * scale
    kinds = [kind for n, kind in enumerate(chart.kinds) if any(parts[n] for _, parts in rows)]
    key, y = flow([_class_box(*kind) for kind in kinds], WIDTH, 16)
    y += 8
    marks, said = [key], []
    for name, parts in rows:
        known = list(zip(chart.kinds, parts, strict=True))
        out, in_rows = known[:before], known[before:]
        said.append(f"{name}: {chart.counts(parts)}")
        marks.append(text(0, y + 10, shorten(name, 40), "small"))
        marks.append(text(WIDTH, y + 10, f"{words.large(sum(parts[before:]))} slots", "small muted end"))
        marks += [_stack(reversed(out), zero, y + 15, -scale), _stack(in_rows, zero, y + 15, scale)]
        marks.append(f'<path class="mark" d="M{px(zero)} {px(y + 12)}v3m0 15v3"/>')
        counts = chart.counts(parts)
        for line in counts.split(" | ") if text_width(counts) > WIDTH else [counts]:
            marks.append(text(0, y + 43, line, "tiny muted"))
            y += 13
        y += 41
    return _Drawing(f"{'. '.join(said)}.", y, "".join(marks))


Parts = Iterable[tuple[tuple[str, str], float]]
"""(name, class) and size of each part of a bar."""


def _stack(parts: Parts, x: float, y: float, scale: float) -> str:
    """Parts side by side from x on, to the left where `scale` is negative."""
    marks = []
    for (name, style), part in parts:
        if part:
            wide = max(1.5, part * abs(scale))
            left = x if scale > 0 else x - wide
            marks.append(
                f'<rect class="{style}" x="{px(left)}" y="{px(y)}" width="{px(wide)}" height="15">'
                f"<title>{safe(f'{name}: {part:,.0f}')}</title></rect>"
            )
            x = left + (wide if scale > 0 else 0)
    return "".join(marks)


def _class_box(name: str, kind: str) -> tuple[float, str]:
    box = f'<rect class="{kind}" width="{_BAR}" height="{_BAR}"/>'
    return 15 + text_width(name), box + text(15, 10, name, "small")


# Distributions -----------------------------------------------------------------------------------------


def _strips(chart: Strips) -> _Drawing:
    to_x = _scale(chart.edges[0], chart.edges[-1], 4, WIDTH - 8)
    marks, y = [], 0.0
    for strip in chart.strips:
        marks.append(text(0, y + 10, shorten(strip.name), "small"))
        if text_width(shorten(strip.name)) + text_width(strip.shown) > WIDTH:
            y += 14
        marks.append(text(WIDTH, y + 10, strip.shown, "small muted end"))
        base = y + 16 + _STRIP
        marks.append(_histogram(strip, chart.edges, to_x, base))
        marks.append(f'<path class="axis" d="M4 {px(base)}H{WIDTH - 8}"/>')
        marks.append(f'<path class="mark" d="M{px(to_x(chart.limit))} {px(base - _STRIP)}V{px(base)}"/>')
        y = base + 8
    shown = [value for value in ticks(chart.edges[0], chart.limit) if value <= chart.edges[-1]]
    marks += [text(to_x(value), y + 10, _short(value), "small middle") for value in shown]
    marks.append(text(WIDTH, y + 24, chart.x_name, "small muted end"))
    said = "; ".join(f"{strip.name}: {strip.shown}" for strip in chart.strips)
    return _Drawing(f"{chart.x_name}. {said}.", y + 30, "".join(marks))


def _histogram(strip: Strip, edges: Sequence[float], to_x: Callable[[float], float], base: float) -> str:
    marks, most = [], max(strip.shares) or 1.0
    for share, left, right in zip(strip.shares, edges, edges[1:], strict=False):
        if share:
            high = max(1.0, share / most * _STRIP)
            marks.append(
                f'<rect class="bar {_k(strip.number)}" x="{px(to_x(left))}" y="{px(base - high)}"'
                f' width="{px(to_x(right) - to_x(left) - 0.6)}" height="{px(high)}"/>'
            )
    return "".join(marks)


# Axes --------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover `low` to `high`, about `most` of them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... within the range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [size * 10.0**power for power in powers for size in (1, 2, 5)]
    return [round(value, 12) for value in found if low <= value <= high]


def _scale(low: float, high: float, first: float, last: float, *, log: bool = False) -> Callable[[float], float]:
    if log:
        low, high = math.log(low), math.log(high)
    span = (high - low) or 1.0
    return lambda value: first + ((math.log(value) if log else value) - low) / span * (last - first)


def _short(value: float) -> str:
    return words.large(value) if abs(value) >= 1000 else f"{value:g}"
