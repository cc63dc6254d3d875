"""How a report writes numbers, labels and states: one way for tables, markdown and the verdict."""

from __future__ import annotations

from collections.abc import Mapping

from packcli.log import plain
from packcli.report.records import SIGNIFICANT, Interval, ItemDifference
from packcli.store import State

NONE = "-"


def plain_lines(text: str) -> str:
    """Control characters shown, line breaks left."""
    return "\n".join(map(plain, text.split("\n")))


def name(setting: Mapping[str, str]) -> str:
    """`data.source=tulu, train.lr=1e-5`; empty for no labels."""
    return plain(", ".join(f"{axis}={value}" for axis, value in setting.items()))


def listed(items: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)


def count(value: float | None) -> str:
    """A count, which as a mean over seeds may have a fraction: `1,234`, `80.3`."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 1000 or float(value).is_integer() else f"{value:,.1f}"


def rate(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """Three digits or more: `0.52`, `9.07`, `61.0`, `1,234`."""
    if value is None:
        return NONE
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def hours(value: float) -> str:
    """As `seconds`; of less than a tenth two digits: `0.0028`."""
    return seconds(value) if value >= 0.1 else f"{value:.2g}"


def percent(value: float | None) -> str:
    """A fraction times 100, one decimal."""
    return NONE if value is None else f"{100 * value:.1f}"


def share(value: float | None) -> str:
    """A fraction times 100; `0` is exactly 0, and nothing that was rounded to it."""
    return "0" if value == 0 else percent(value)


def points(value: float) -> str:
    """A signed difference times 100; two decimals where one would print a bound as 0 that is none."""
    scaled = 100 * value
    if abs(scaled) < 0.005:
        return "0.0"
    return f"{scaled:+.1f}" if abs(scaled) >= 0.05 else f"{scaled:+.2f}"


def interval(bounds: Interval) -> str:
    return f"[{points(bounds[0])}, {points(bounds[1])}]"


def over_items(found: ItemDifference | None) -> str:
    """Bounds over test items; empty where there are none."""
    return interval((found.low, found.high)) if found and found.low is not None and found.high is not None else ""


def p_value(value: float | None) -> str:
    """`0.012`, `< 0.001`; with as many digits as tell on which side of `SIGNIFICANT` it lies: `0.0496`."""
    if value is None:
        return NONE
    if value < 0.001:
        return "< 0.001"
    shown = value < SIGNIFICANT
    texts = (f"{value:.{digits}g}" for digits in range(2, 18))
    return next(text for text in texts if (float(text) < SIGNIFICANT) == shown)


def detectable(value: float | None) -> str:
    """An effect in points; more than scores can differ by is no number to go by."""
    return NONE if value is None else percent(value) if value <= 1 else "> 100"


def times(value: float | None) -> str:
    """A ratio: `2.9x`, `1.04x`."""
    return NONE if value is None else f"{value:.1f}x" if value >= 1.95 else f"{value:.2f}x"


def states(found: Mapping[State, int], total: int) -> str:
    """`failed` when all are; else `1 failed, 1 pending`. Done ones go without saying."""
    open_ = [(state, found[state]) for state in ("failed", "running", "pending") if found.get(state)]
    if len(open_) == 1 and open_[0][1] == total:
        return open_[0][0]
    return ", ".join(f"{number} {state}" for state, number in open_) or "done"


def large(value: float | None) -> str:
    """Three digits and a unit: `1.23M`."""
    if value is None:
        return NONE
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 1000 * size else f"{value / size:,.0f}{unit}"
    return f"{value:.3g}"


def error(value: float | None) -> str:
    """A standard error times 100, one decimal, or two digits where that would be 0 and it is not."""
    return NONE if value is None else _not_none(100 * value, 1)


def loss_error(value: float | None) -> str:
    return NONE if value is None else _not_none(value, 3)


def _not_none(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return f"{value:.1g}" if value and not float(text) else text


def loss(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"
