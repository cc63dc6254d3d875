"""The charts of a report as files: one for each kind, with a panel for each setting or data set.

Equal runs give equal files, byte for byte. Of shared base models nothing is drawn.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packcli.errors import ConfigError
from packcli.files import make_directory
from packcli.log import plain
from packcli.plan import Plan
from packcli.report import gather, pictures, words
from packcli.report.charts import (
    COLOURS,
    PARTS,
    Balance,
    Bars,
    Chart,
    Curves,
    Differences,
    Dots,
    Strips,
    dashes,
    shorten,
)
from packcli.report.records import Report
from packcli.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "packcli",  # ids in the file, else random
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label may hold a `$`
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "figure.titlesize": 11,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 150,
}
_DASHES = ("-", (0, (4, 2)), (0, (1, 1)), (0, (5, 2, 1, 2)))
_GREY = "#57606a"
_BESIDE: dict[str, Any] = {"textcoords": "offset points"}
_CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # a line behind a number is interrupted
_LONGEST = 60  # letters of a name
_THIN = 0.004  # of a bar: what is drawn thinner is not seen
_MARKERS = ("o", "s", "^")

Panel = tuple[str, Chart]


def check() -> None:
    """Raise `ConfigError` when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("figures need the package `matplotlib`", "pip install 'packcli[plot]'") from error


def draw(plan: Plan, report: Report, store: Store, directory: Path) -> list[Path]:
    """Write the charts of the report's page, each kind as SVG and PNG; their paths.

    Raises:
        ConfigError: matplotlib is not installed, nothing is there to draw, or `directory` cannot be written.
    """
    check()
    found = pictures.pictures(plan, report, store, gather.Members(report.rows))
    panels: dict[str, list[Panel]] = {}
    for name, charts in (*found.settings, *found.sets):
        for kind, chart in charts.items():
            panels.setdefault(kind, []).append((name, chart))
    if not panels:
        raise ConfigError(f"no cell of `{report.sweep}` is prepared: nothing to draw", "run the sweep first")
    about = [_text(report.sweep), *gather.origin(plan, report)]
    with styled():
        drawn = {kind: _figure(about, own, found.left_out()) for kind, own in panels.items()}
        return save(drawn, directory)


@contextmanager
def styled() -> Iterator[None]:
    """packcli's style, whatever a user's own matplotlibrc says: figures are made and saved in here."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def save(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Write each figure as SVG and PNG, equal ones byte for byte; their paths.

    Raises:
        ConfigError: `directory` is a file, or cannot be made or written.
    """
    written = []
    make_directory(directory, "figures")
    try:
        for name, figure in figures.items():
            for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                written.append(directory / f"{name}.{suffix}")
                figure.savefig(written[-1], metadata=metadata)
    except OSError as error:
        cause = f"figures cannot be written to `{directory}`: {error.strerror or error}"
        raise ConfigError(cause, "name a directory that can be written") from error
    return written


def _figure(about: Sequence[str], panels: Sequence[Panel], left_out: Sequence[str]) -> Figure:
    """Panels one below the other, titles above and notes below. No pyplot: nothing global, no display."""
    from matplotlib.figure import Figure

    heights = [_height(chart) for _, chart in panels]
    note = textwrap.fill(" ".join([*_sentences([chart.caption for _, chart in panels]), *left_out]), 130)
    figure = Figure(figsize=(8.0, 0.7 + 0.13 * note.count("\n") + sum(heights)), layout="constrained")
    figure.suptitle(f"{panels[0][1].title}\n{' · '.join(about)}")
    figure.supxlabel(note, fontsize=7, color=_GREY)
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (name, chart) in zip(grid[:, 0], panels, strict=True):
        axes.set_title(_text(name), loc="left", color=_GREY)
        axes.set_xlabel(chart.x_name)
        _draw(axes, chart)
    return figure


def _sentences(captions: Sequence[str]) -> list[str]:
    """Of all captions, each once, in the captions' own order."""
    last: dict[str, int] = {}
    for caption in captions:
        for place, sentence in enumerate(re.split(r"(?<=\.) (?=[A-Z])", caption)):
            last[sentence] = max(place, last.get(sentence, 0))
    return sorted(last, key=last.__getitem__)


def _height(chart: Chart) -> float:
    """Of a panel, in inches: lines need room, all else as much as its rows do."""
    match chart:
        case Curves():
            return 3.2
        case Bars():
            return 0.8 + len(chart.rows) * (0.12 + 0.19 * len(chart.kinds))
        case Differences():
            return 0.8 + 0.42 * len(chart.points)
        case Strips():
            return 0.8 + 0.55 * len(chart.strips)
        case Dots() | Balance():
            return 1.0 + 0.36 * len(chart.rows)


def _draw(axes: Axes, chart: Chart) -> None:
    match chart:
        case Curves():
            _curves(axes, chart)
        case Bars():
            _bars(axes, chart)
        case Differences():
            _differences(axes, chart)
        case Dots():
            _dots(axes, chart)
        case Balance():
            _balance(axes, chart)
        case Strips():
            _strips(axes, chart)


def _curves(axes: Axes, chart: Curves) -> None:
    from matplotlib.ticker import EngFormatter

    for one in chart.series:
        colour = COLOURS[one.number % len(COLOURS)]
        for curve in one.single:
            axes.plot(*_xy(curve), color=colour, linewidth=0.6, alpha=0.4)
        axes.plot(
            *_xy(one.middle),
            color=colour,
            linestyle=_DASHES[dashes(one.number)],
            linewidth=1.8,
            label=_text(one.name),
        )
    axes.set_ylabel(chart.y_name)
    if chart.log:
        _log(axes, chart.y_name)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color="0.9")
    _legend(axes)


def _log(axes: Axes, name: str) -> None:
    """A log y axis. matplotlib's own numbers there are mathematics, which `_STYLE` does not read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylabel(f"{name} (log scale)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _xy(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def _bars(axes: Axes, chart: Bars) -> None:
    """A cluster of bars for each row, from above; their ranges as lines."""
    from matplotlib.ticker import EngFormatter

    size = 0.8 / len(chart.kinds)
    for number, kind in enumerate(chart.kinds):
        for row, (_, arm, bars) in enumerate(chart.rows):
            bar, y = bars[number], row + (number - (len(chart.kinds) - 1) / 2) * size
            colour = COLOURS[chart.colour(arm, number) % len(COLOURS)]
            axes.barh(y, bar.value or 0.0, size, color=colour, label=kind if row == 0 else None)
            if bar.low is not None and bar.high is not None:
                axes.hlines(y, bar.low, bar.high, color="0.2", linewidth=1)
            end = max(bar.value or 0.0, bar.high or 0.0)
            axes.annotate(bar.shown, (end, y), (3, 0), **_BESIDE, va="center_baseline", fontsize=7.5, bbox=_CLEAR)
    if chart.mark is not None:
        axes.axvline(chart.mark, color="0.4", linewidth=0.8, linestyle="--")
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _rows(axes, [name for name, _, _ in chart.rows])
    if len(chart.kinds) > 1:
        _legend(axes)


def _differences(axes: Axes, chart: Differences) -> None:
    for row, point in enumerate(chart.points):
        colour = COLOURS[0] if point.certain else _GREY
        if point.low is not None and point.high is not None:
            style = "--" if point.over == "items" else "-"
            axes.hlines(row, point.low, point.high, color=colour, linewidth=1.5, linestyle=style)
        axes.plot(point.value, row, "o", color=colour, markerfacecolor=colour if point.certain else "white")
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlim(*_widened(*chart.bounds))
    _rows(axes, [f"{point.name}\n{point.shown}" for point in chart.points])


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _dots(axes: Axes, chart: Dots) -> None:
    for number, kind in enumerate(chart.kinds):
        known = [(values[number], row) for row, (_, values) in enumerate(chart.rows) if values[number] is not None]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(*zip(*known, strict=True), marker, color=COLOURS[number % len(COLOURS)], label=_text(kind))
    axes.axvline(0, color="0.4", linewidth=0.8)
    _rows(axes, [name for name, _ in chart.rows])
    _legend(axes)


def _balance(axes: Axes, chart: Balance) -> None:
    from matplotlib.ticker import FuncFormatter

    widest = max(sum(parts) for _, parts in chart.rows)
    for row, (_, parts) in enumerate(chart.rows):
        for order, side in ((reversed(range(chart.before)), -1), (range(chart.before, len(parts)), 1)):
            start = 0.0
            for number in order:
                if parts[number]:
                    wide = side * max(parts[number], _THIN * widest)
                    axes.barh(row, wide, 0.5, left=start, color=PARTS[chart.kinds[number][1]])
                    start += wide
        axes.annotate(chart.counts(parts), (0, row + 0.27), (3, -1), **_BESIDE, va="top", fontsize=6.5)
    for number, (name, key) in enumerate(chart.kinds):
        if any(parts[number] for _, parts in chart.rows):
            axes.barh(0, 0, color=PARTS[key], label=name)
    axes.axvline(0, color="0.2", linewidth=0.8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.large(abs(value))))
    _rows(axes, [name for name, _ in chart.rows])
    _legend(axes)


def _strips(axes: Axes, chart: Strips) -> None:
    widths = [right - left for left, right in zip(chart.edges, chart.edges[1:], strict=False)]
    for row, strip in enumerate(chart.strips):
        most = max(strip.shares) or 1.0
        heights = [-0.8 * share / most for share in strip.shares]  # y grows downwards
        colour = COLOURS[strip.number % len(COLOURS)]
        axes.bar(chart.edges[:-1], heights, widths, row + 0.4, align="edge", color=colour)
        axes.axhline(row + 0.4, color="0.8", linewidth=0.6)
    axes.axvline(chart.limit, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_xlim(chart.edges[0], chart.edges[-1])
    _rows(axes, [f"{strip.name}\n{strip.shown}" for strip in chart.strips])


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """A name at each of the rows 0, 1, ... from above."""
    axes.set_yticks(range(len(names)), [_text(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _text(text: str) -> str:
    """Cut where it would leave no room to draw. In a legend, a name that begins with `_` would be left out."""
    shown = "\n".join(shorten(plain(line), _LONGEST) for line in text.split("\n"))
    return f" {shown}" if shown.startswith("_") else shown
