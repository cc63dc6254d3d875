"""Charts as SVG text, from plain numbers. Pure: equal input gives equal bytes.

All are `WIDTH` wide, so that words stay readable on a phone; y grows downwards. Colours are classes that
`page.css` gives values for light and dark: `k0`..`k7`, told apart by the colour-blind too; `d0`..`d3` are dashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from packcli.data.svg import at, flow, px, safe, text, text_width
from packcli.report import words

WIDTH = 360
COLOURS = 8
_LEFT, _RIGHT = 44, 8
_PLOT = 190  # height of a plot of lines
_BAR = 11
_STRIP = 34
_LONGEST = 34  # letters of a name beside a value

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Drawing:
    """`about` says in words what the marks show: a reader may not see them."""

    title: str
    about: str
    height: float
    marks: str

    def svg(self, id_: str) -> str:
        return (
            f'<svg viewBox="0 0 {WIDTH} {px(self.height)}" role="img" aria-labelledby="{id_}-t {id_}-d">'
            f'<title id="{id_}-t">{safe(self.title)}</title><desc id="{id_}-d">{safe(self.about)}</desc>'
            f"{self.marks}</svg>"
        )


@dataclass(frozen=True, slots=True)
class Series:
    """The `number`th arm's curve, and those of its single seeds."""

    name: str
    number: int
    middle: Curve
    single: Sequence[Curve] = ()


@dataclass(frozen=True, slots=True)
class Bar:
    """`low`, `high`: its range, drawn as a line; `value` None: only `shown` is written."""

    value: float | None
    shown: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """A difference. `sure`: the interval is one over seeds; else it is drawn hollow and dashed."""

    name: str
    value: float
    shown: str
    low: float | None
    high: float | None
    sure: bool


@dataclass(frozen=True, slots=True)
class Strip:
    """How something is spread: `shares` of each bin of the common axis."""

    name: str
    shown: str
    number: int
    shares: Sequence[float]


# Lines -------------------------------------------------------------------------------------------------


def lines(title: str, series: Sequence[Series], x_name: str, y_name: str) -> Drawing:
    """Curves over a common pair of axes; y is logarithmic where values span more than a factor of 20."""
    points = [point for one in series for curve in (one.middle, *one.single) for point in curve]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    log = min(ys) > 0 and max(ys) / min(ys) > 20
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
    for one in series:
        kind = f"k{one.number % COLOURS}"
        parts += [f'<path class="thin {kind}" d="{_path(curve, to_x, to_y)}"/>' for curve in one.single]
        parts.append(
            f'<path class="line {kind} d{_dashes(one.number)}" d="{_path(one.middle, to_x, to_y)}">'
            f"<title>{safe(one.name)}</title></path>"
        )
    key, high = flow([_swatch(one.name, one.number) for one in series], WIDTH - 8, 16)
    parts.append(at(4, 18 + _PLOT + 40, key))
    ends = "; ".join(f"{one.name} ends at {one.middle[-1][1]:.3g}" for one in series if one.middle)
    return Drawing(title, f"{y_name} over {x_name}. {ends}.", 18 + _PLOT + 40 + high, "".join(parts))


def _dashes(number: int) -> int:
    """Those of an arm: two that share a colour have other dashes."""
    return (number + number // COLOURS) % 4


def _path(curve: Curve, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    return "M" + "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in curve)


def _swatch(name: str, number: int) -> tuple[float, str]:
    name = shorten(name)
    sample = f'<path class="line k{number % COLOURS} d{_dashes(number)}" d="M0 7H22"/>'
    return 27 + text_width(name), sample + text(27, 11, name, "small")


# Bars --------------------------------------------------------------------------------------------------


def bars(
    title: str, rows: Sequence[tuple[str, Sequence[Bar]]], kinds: Sequence[str], mark: float | None = None
) -> Drawing:
    """For each row a name, and below it a bar of each kind. `mark`: a line at that value in every row."""
    most = max((bar.high or bar.value or 0.0 for _, found in rows for bar in found), default=0.0) or 1.0
    to_x = _scale(0, max(most, mark or 0.0), 0, WIDTH - 62)
    parts, y = [], 0.0
    if len(kinds) > 1:
        key, high = flow([_box(name, number) for number, name in enumerate(kinds)], WIDTH, 16)
        parts, y = [key], high + 6
    for name, found in rows:
        top = y
        parts.append(text(0, y + 10, shorten(name, 56), "small"))
        y += 15
        for number, bar in enumerate(found):
            parts.append(at(0, y, _bar(bar, number, to_x, kinds[number])))
            y += _BAR + 3
        if mark is not None:
            parts.append(f'<path class="mark" d="M{px(to_x(mark))} {px(top + 14)}V{px(y - 1)}"/>')
        y += 6
    said = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {bar.shown}" for kind, bar in zip(kinds, found, strict=True))
        for name, found in rows
    )
    return Drawing(title, f"{said}.", y, "".join(parts))


def _bar(bar: Bar, number: int, to_x: Callable[[float], float], kind: str) -> str:
    if bar.value is None:
        return text(0, 9.5, bar.shown, "small muted")
    end = to_x(max(bar.value, bar.high or bar.value))
    parts = [
        f'<rect class="bar k{number % COLOURS}" width="{px(to_x(bar.value))}" height="{_BAR}">'
        f"<title>{safe(f'{kind}: {bar.shown}')}</title></rect>"
    ]
    if bar.low is not None and bar.high is not None:
        parts.append(f'<path class="range" d="M{px(to_x(bar.low))} {_BAR / 2}H{px(to_x(bar.high))}"/>')
    return "".join([*parts, text(end + 5, 9.5, bar.shown, "small")])


def _box(name: str, number: int) -> tuple[float, str]:
    return 15 + text_width(name), f'<rect class="bar k{number % COLOURS}" width="{_BAR}" height="{_BAR}"/>' + text(
        15, 10, name, "small"
    )


# Differences -------------------------------------------------------------------------------------------


def forest(title: str, points: Sequence[Point], x_name: str, bounds: tuple[float, float]) -> Drawing:
    """Differences with their intervals around 0, over `bounds`, which several such charts may share."""
    x_ticks = ticks(*bounds)
    to_x = _scale(min(bounds[0], x_ticks[0]), max(bounds[1], x_ticks[-1]), 8, WIDTH - 12)
    bottom, parts = 34.0 * len(points) + 4, []
    for number, point in enumerate(points):
        kind = "sure" if point.sure else "open"
        y = 34.0 * number + 23
        parts.append(_rulers(x_ticks, to_x, y))
        parts.append(text(0, y - 11, shorten(point.name), "small"))
        parts.append(text(WIDTH, y - 11, point.shown, "small end"))
        if point.low is not None and point.high is not None:
            ends = "".join(f"M{px(to_x(end))} {y - 3}v6" for end in (point.low, point.high))
            parts.append(f'<path class="{kind}" d="M{px(to_x(point.low))} {y}H{px(to_x(point.high))}{ends}"/>')
        parts.append(f'<circle class="{kind}" cx="{px(to_x(point.value))}" cy="{y}" r="4"/>')
    parts.append(_signed(x_ticks, to_x, bottom, x_name))
    said = "; ".join(f"{point.name} {point.shown}" for point in points)
    return Drawing(title, f"{x_name}. {said}.", bottom + 32, "".join(parts))


def dots(
    title: str, rows: Sequence[tuple[str, Sequence[float | None]]], kinds: Sequence[str], x_name: str
) -> Drawing:
    """For each row a name, and below it a mark of each kind around 0."""
    known = [value for _, values in rows for value in values if value is not None]
    x_ticks = ticks(min([0.0, *known]), max([0.0, *known]))
    to_x = _scale(x_ticks[0], x_ticks[-1], 8, WIDTH - 12)
    key, y = flow([_dot_of(name, number) for number, name in enumerate(kinds)], WIDTH, 16)
    parts = [key]
    for name, values in rows:
        y += 34
        parts += [text(0, y - 16, shorten(name, 56), "small"), _rulers(x_ticks, to_x, y - 4)]
        for number, value in enumerate(values):
            if value is not None:
                parts.append(at(to_x(value), y - 4, _dot(number, f"{kinds[number]}: {value:+.3f}")))
    parts.append(_signed(x_ticks, to_x, y + 6, x_name))
    said = "; ".join(
        f"{name}: " + ", ".join(f"{k} {v:+.3f}" for k, v in zip(kinds, values, strict=True) if v is not None)
        for name, values in rows
    )
    return Drawing(title, f"{x_name}. {said}.", y + 38, "".join(parts))


_SHAPES = ("M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z", "M-4-4h8v8h-8z", "M0-5.5L5.5 4H-5.5z")


def _dot(number: int, said: str) -> str:
    shape = _SHAPES[number % len(_SHAPES)]
    return f'<path class="bar k{number % COLOURS}" d="{shape}"><title>{safe(said)}</title></path>'


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


def balance(
    title: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    kinds: Sequence[tuple[str, str]],
    before: int,
) -> Drawing:
    """Stacked bars; the first `before` parts lie left of one common line, the others right of it.

    `kinds`: name and class of each part. A part that is not empty is never thinner than a pixel and a half.
    """
    left_most, right_most = (
        max(sum(parts[own]) for _, parts in rows) for own in (slice(before), slice(before, None))
    )
    scale = (WIDTH - 8) / ((left_most + right_most) or 1)
    zero = 4 + left_most * scale
    key, y = flow(
        [_class_box(*kind) for n, kind in enumerate(kinds) if any(parts[n] for _, parts in rows)], WIDTH, 16
    )
    y += 8
    marks, said = [key], []
    for name, parts in rows:
        known = list(zip(kinds, parts, strict=True))
        out, in_rows = known[:before], known[before:]
        said.append(f"{name}: {_listed(out)}; {_listed(in_rows)}")
        marks.append(text(0, y + 10, shorten(name, 40), "small"))
        marks.append(text(WIDTH, y + 10, f"{_count(sum(parts[before:]))} slots", "small muted end"))
        marks += [_stack(reversed(out), zero, y + 15, -scale), _stack(in_rows, zero, y + 15, scale)]
        marks.append(f'<path class="mark" d="M{px(zero)} {px(y + 12)}v3m0 15v3"/>')
        marks.append(text(0, y + 43, f"{_listed(out)} | {_listed(in_rows)}", "tiny muted"))
        y += 54
    return Drawing(title, f"{'. '.join(said)}.", y, "".join(marks))


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


def _listed(parts: Parts) -> str:
    return ", ".join(f"{_count(part)} {name}" for (name, _), part in parts if part)


def _count(value: float) -> str:
    return words.large(value) if value >= 100_000 else f"{value:,.0f}"


def _class_box(name: str, kind: str) -> tuple[float, str]:
    box = f'<rect class="{kind}" width="{_BAR}" height="{_BAR}"/>'
    return 15 + text_width(name), box + text(15, 10, name, "small")


# Distributions -----------------------------------------------------------------------------------------


def strips(title: str, found: Sequence[Strip], edges: Sequence[float], limit: float, x_name: str) -> Drawing:
    """One histogram above the other over the same bins, each to its own height; a line at `limit`."""
    to_x = _scale(edges[0], edges[-1], 4, WIDTH - 8)
    marks, y = [], 0.0
    for strip in found:
        marks.append(text(0, y + 10, shorten(strip.name, 26), "small"))
        marks.append(text(WIDTH, y + 10, strip.shown, "small muted end"))
        base, most = y + 16 + _STRIP, max(strip.shares) or 1.0
        for share, left, right in zip(strip.shares, edges, edges[1:], strict=False):
            if share:
                high = max(1.0, share / most * _STRIP)
                wide = to_x(right) - to_x(left) - 0.6
                marks.append(
                    f'<rect class="bar k{strip.number % COLOURS}" x="{px(to_x(left))}" y="{px(base - high)}"'
                    f' width="{px(wide)}" height="{px(high)}"/>'
                )
        marks.append(f'<path class="axis" d="M4 {px(base)}H{WIDTH - 8}"/>')
        marks.append(f'<path class="mark" d="M{px(to_x(limit))} {px(base - _STRIP)}V{px(base)}"/>')
        y = base + 8
    shown = [value for value in ticks(edges[0], limit) if value <= edges[-1]]
    marks += [text(to_x(value), y + 10, _short(value), "small middle") for value in shown]
    marks.append(text(WIDTH, y + 24, x_name, "small muted end"))
    said = "; ".join(f"{strip.name}: {strip.shown}" for strip in found)
    return Drawing(title, f"{x_name}. {said}.", y + 30, "".join(marks))


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


def shorten(name: str, longest: int = _LONGEST) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
