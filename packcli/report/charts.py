"""Charts as plain data. `page/svg.py` draws them for the page, `figures.py` as files, in the same colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from packcli.report import words

COLOURS = ("#0072b2", "#d55e00", "#00795a", "#b2408a", "#8a6a00", "#5f56c9", "#2f8fc4", "#59636e")
"""Of arms, in the order of the sweep, or of kinds of bars; for the colour-blind too. On a light ground."""
PARTS = {
    "held": "#8a94a0",
    "truncated": "#d55e00",
    "dropped": "#a40e26",
    "kept": "#0072b2",
    "boundary": "#8a6a00",
    "padding": "#c9d1d9",
}
"""Of the parts of a ledger."""
LOG_FACTOR = 20

Curve = Sequence[tuple[float, float]]
"""Points (x, y)."""


@dataclass(frozen=True, slots=True)
class Series:
    """The `number`th arm's curve, and those of its single seeds."""

    name: str
    number: int
    middle: Curve
    single: Sequence[Curve] = ()


@dataclass(frozen=True, slots=True)
class Curves:
    """Lines over a common pair of axes."""

    title: str
    caption: str
    x_name: str
    y_name: str
    series: Sequence[Series]

    @property
    def log(self) -> bool:
        """y is logarithmic where values span more than `LOG_FACTOR`."""
        ys = [y for one in self.series for curve in (one.middle, *one.single) for _, y in curve]
        return min(ys) > 0 and max(ys) / min(ys) > LOG_FACTOR


@dataclass(frozen=True, slots=True)
class Bar:
    """`low`, `high`: its range, drawn as a line; `value` None: only `shown` is written."""

    value: float | None
    shown: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """`rows`: name, number of the arm, and a bar of each kind. Of one kind, an arm has its own colour.

    `mark`: a line at that value in every row.
    """

    title: str
    caption: str
    x_name: str
    kinds: Sequence[str]
    rows: Sequence[tuple[str, int, Sequence[Bar]]]
    mark: float | None = None

    def colour(self, arm: int, kind: int) -> int:
        return kind if len(self.kinds) > 1 else arm


@dataclass(frozen=True, slots=True)
class Point:
    """A difference. `over`: what its interval is over; `certain`: it is shown after Holm's correction."""

    name: str
    value: float
    shown: str
    low: float | None
    high: float | None
    over: Literal["seeds", "items"]
    certain: bool


@dataclass(frozen=True, slots=True)
class Differences:
    """Points with their intervals around 0, over `bounds`, which several such charts share."""

    title: str
    caption: str
    x_name: str
    points: Sequence[Point]
    bounds: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Dots:
    """For each row a name, and a mark of each kind around 0."""

    title: str
    caption: str
    x_name: str
    kinds: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]


@dataclass(frozen=True, slots=True)
class Balance:
    """Stacked bars: the first `before` parts lie left of one common line, the others right of it.

    `kinds`: name of each part, and its key in `PARTS`. No part that is not empty is thinner than a line.
    """

    title: str
    caption: str
    x_name: str
    kinds: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, Sequence[float]]]
    before: int

    def counts(self, parts: Sequence[float]) -> str:
        """`1,200 held out | 9,000 kept, 800 padding`."""
        known = [f"{_count(n)} {name}" if n else "" for n, (name, _) in zip(parts, self.kinds, strict=True)]
        sides = (known[: self.before], known[self.before :])
        return " | ".join(", ".join(one for one in side if one) or "none" for side in sides)


@dataclass(frozen=True, slots=True)
class Strip:
    """How something is spread: `shares` of each bin of the common axis."""

    name: str
    shown: str
    number: int
    shares: Sequence[float]


@dataclass(frozen=True, slots=True)
class Strips:
    """One histogram above the other over the same bins, each to its own height; a line at `limit`."""

    title: str
    caption: str
    x_name: str
    edges: Sequence[float]
    limit: float
    strips: Sequence[Strip]


Chart = Curves | Bars | Differences | Dots | Balance | Strips


def _count(value: float) -> str:
    return words.large(value) if value >= 100_000 else f"{value:,.0f}"


def dashes(number: int) -> int:
    """Those of an arm, of four kinds: two that share a colour have other dashes."""
    return (number + number // len(COLOURS)) % 4


def shorten(name: str, longest: int = 34) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
