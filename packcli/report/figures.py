"""Pictures of a report: loss curves, throughput, and where the speed-up comes from.

Drawn from what the report holds and from `metrics.jsonl`; equal runs give equal files, byte for byte. Only cells
that finished training are drawn, and of shared base models nothing is.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from packcli.errors import ConfigError, IntegrityError
from packcli.files import read_jsonl
from packcli.log import plain
from packcli.report import words
from packcli.report.records import Group, Report, Row
from packcli.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""x and loss, each [steps] float64."""
Setting = tuple[dict[str, str], list[Group]]

SMOOTHING = 50
"""A curve's points are means over 1/50 of its steps."""
_GRID = 200
_KINDS = ("#4477aa", "#bbbbbb", "#ccbb44", "#aa3377")  # of bars; told apart in print and by the colour-blind
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
    "savefig.dpi": 150,
}


def check() -> None:
    """Raise `ConfigError` when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("figures need the package `matplotlib`", "pip install 'packcli[plot]'") from error


def draw(report: Report, store: Store, directory: Path) -> list[Path]:
    """Write `loss`, `throughput` and, where there is a baseline, `speedup`, each as SVG and PNG; their paths.

    Raises:
        ConfigError: matplotlib is not installed, no cell has finished training, or `directory` is a file.
        IntegrityError: a `metrics.jsonl` of a finished training is damaged.
    """
    check()
    if not any(row.train for row in report.rows):
        raise ConfigError(f"no cell of `{report.sweep}` has finished training: nothing to draw", "train it first")
    with styled():
        figures = {"loss": _loss(report, store), "throughput": _throughput(report), "speedup": _speedup(report)}
        return save({name: figure for name, figure in figures.items() if figure is not None}, directory)


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
        ConfigError: `directory` is a file.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(f"`{directory}` is a file", "name a directory for the figures") from None
    written = []
    for name, figure in figures.items():
        for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            written.append(directory / f"{name}.{suffix}")
            figure.savefig(written[-1], metadata=metadata)
    return written


# Loss --------------------------------------------------------------------------------------------------


def _loss(report: Report, store: Store) -> Figure:
    """A line of two panels for each setting: loss against steps and against useful tokens."""
    from matplotlib.ticker import EngFormatter

    settings = _trained(report)
    arms = list(dict.fromkeys(group.arm for group in report.groups))
    figure, panels = _figure(report, "training loss", (len(settings), 2), _SMOOTHED)
    for axes, (setting, groups) in zip(panels, settings, strict=True):
        for group in groups:
            curves = [curves_of(row, store) for row in _members(report, group)]
            for panel, number in zip(axes, (0, 1), strict=True):
                _lines(panel, [pair[number] for pair in curves], _text(group.arm), arms.index(group.arm))
        for panel, unit in zip(axes, ("optimizer steps", "useful tokens"), strict=True):
            panel.set(title=_text(words.name(setting)), xlabel=unit, ylabel="loss, nats per supervised token")
        axes[1].xaxis.set_major_formatter(EngFormatter(sep=""))
        axes[0].legend(fontsize=8)
    return figure


_SMOOTHED = (
    f"thin: one seed, mean over 1/{SMOOTHING} of its steps; thick: median of seeds. "
    "Arms that weight documents otherwise average otherwise: compare validation loss."
)


def curves_of(row: Row, store: Store) -> tuple[Curve, Curve]:
    """One cell's smoothed loss over steps, and over useful tokens."""
    path = store.metrics(row.ids["train"])
    try:
        records = read_jsonl(path)
        columns = ([record[key] for record in records] for key in ("step", "loss", "tokens"))
        step, loss, tokens = (np.array(column, np.float64) for column in columns)
        width = max(1, len(loss) // SMOOTHING)
        smooth = np.convolve(loss, np.full(width, 1 / width), mode="valid")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path}: not the log of a training", f"delete {path.parent} and train again"
        ) from error
    # A mean stands at the last step it holds.
    return (step[width - 1 :], smooth), (np.cumsum(tokens)[width - 1 :], smooth)


def _lines(axes: Axes, curves: Sequence[Curve], name: str, number: int) -> None:
    """The seeds of an arm and their median; arms that agree, as padded ones do, still show through each other."""
    colour, dashes = f"C{number}", ("-", "--", "-.", ":")[number % 4]
    for x, loss in curves if len(curves) > 1 else ():
        axes.plot(x, loss, color=colour, linewidth=0.6, alpha=0.35)
    middle = median(curves) if len(curves) > 1 else curves[0]
    axes.plot(*middle, color=colour, linestyle=dashes, linewidth=1.8, label=name)


def median(curves: Sequence[Curve]) -> Curve:
    """The median loss over the stretch of x that all curves cover: seeds differ a little in steps and tokens."""
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(first, last, _GRID)
    return grid, np.median([np.interp(grid, x, loss) for x, loss in curves], axis=0)


# Bars --------------------------------------------------------------------------------------------------


def _throughput(report: Report) -> Figure:
    """Useful and padded tokens a second of every arm, with the time a run took."""
    settings = _trained(report)
    note = f"Bars: mean over seeds; lines: lowest and highest. Measured on {machines(report.rows)}."
    figure, panels = _figure(report, "throughput of training", (len(settings), 1), note)
    for (axes,), (setting, groups) in zip(panels, settings, strict=True):
        trains = [[row.train for row in _members(report, group) if row.train] for group in groups]
        _bars(
            axes,
            {
                "useful: tokens of documents": [[own.useful_tokens_per_s for own in found] for found in trains],
                "padded: all slots": [[own.padded_tokens_per_s for own in found] for found in trains],
            },
        )
        names = [f"{_text(group.arm)}\n{words.seconds(group.train.wall_s)} s" for group in groups if group.train]
        _name(axes, setting, names)
        axes.set(ylabel="tokens per second", xlabel="arm, and wall time of its training")
    return figure


def _speedup(report: Report) -> Figure | None:
    """Baseline over arm in rows, steps, slots and time. None without an arm that can be compared."""
    settings = [
        (setting, own, others)
        for setting, groups in _trained(report)
        for own in groups
        if own.arm == report.baseline and (others := [group for group in groups if group.speedup])
    ]
    if not settings:
        return None
    note = (
        "less time = fewer slots x less time a slot. A slot takes longer where a step holds few of them, and "
        f"where attention looks further. Measured on {machines(report.rows)}."
    )
    title = f"why arms take less time than {_text(report.baseline or '')}"
    figure, panels = _figure(report, title, (len(settings), 1), note)
    for (axes,), (setting, own, groups) in zip(panels, settings, strict=True):
        found = [ratios(own, group, on_cpu=_on_cpu(groups)) for group in groups]
        _bars(axes, {kind: [[one[kind]] for one in found] for kind in found[0]})
        axes.axhline(1.0, color="0.4", linewidth=0.8)
        _name(axes, setting, [_text(group.arm) for group in groups])
        axes.set(ylabel=f"{_text(own.arm)} / arm", xlabel="arm")
    return figure


def ratios(baseline: Group, arm: Group, *, on_cpu: bool) -> dict[str, float | None]:
    """Where an arm's speed-up comes from: the baseline over the arm in rows, steps, slots and time."""
    return {
        "fewer rows": _over(_rows(baseline), _rows(arm)),
        "fewer steps": _over(_steps(baseline), _steps(arm)),
        "fewer slots": arm.slot_ratio,
        f"less {'CPU' if on_cpu else 'wall'} time": _less_time(arm, on_cpu),
    }


def _on_cpu(groups: Sequence[Group]) -> bool:
    return all(group.train.device == "cpu" for group in groups if group.train)


def _rows(group: Group) -> float | None:
    return group.ledger.get("rows") if group.ledger else None


def _steps(group: Group) -> float | None:
    return group.train.steps if group.train else None


def _less_time(group: Group, on_cpu: bool) -> float | None:
    if group.speedup is None:
        return None
    return group.speedup.cpu if on_cpu else group.speedup.wall


def _over(baseline: float | None, own: float | None) -> float | None:
    return baseline / own if baseline and own else None


def _bars(axes: Axes, kinds: dict[str, list[list[float | None]]]) -> None:
    """A cluster of bars at 0, 1, ...: of each kind one, the mean of what is known, its range as a line."""
    width = 0.8 / len(kinds)
    for number, (kind, clusters) in enumerate(kinds.items()):
        known = [(at, found) for at, values in enumerate(clusters) if (found := [v for v in values if v])]
        places = [at + (number - (len(kinds) - 1) / 2) * width for at, _ in known]
        means = [sum(found) / len(found) for _, found in known]
        axes.bar(places, means, width, label=kind, color=_KINDS[number])
        for place, mean, (_, found) in zip(places, means, known, strict=True):
            if len(found) > 1:
                axes.vlines(place, min(found), max(found), color="0.2", linewidth=1)
            axes.annotate(_short(mean), (place, max(found)), ha="center", va="bottom", fontsize=7)


def _short(value: float) -> str:
    return words.large(value) if value >= 1000 else f"{value:.3g}"


def _name(axes: Axes, setting: dict[str, str], arms: list[str]) -> None:
    axes.set_title(_text(words.name(setting)))
    crowded: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if len(arms) > 6 else {}
    axes.set_xticks(range(len(arms)), arms, **crowded)
    axes.margins(y=0.15)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


# Both --------------------------------------------------------------------------------------------------


def _trained(report: Report) -> list[Setting]:
    """Settings with the groups of which something has finished training."""
    found = [(setting, [group for group in groups if group.train]) for setting, groups in report.settings()]
    return [(setting, groups) for setting, groups in found if groups]


def _members(report: Report, group: Group) -> list[Row]:
    """The trained cells of a group, in the order of the sweep."""
    return [row for row in report.rows if row.train and group.labels.items() <= row.labels.items()]


def _figure(report: Report, title: str, shape: tuple[int, int], note: str) -> tuple[Figure, list[list[Axes]]]:
    """A grid of `shape` panels, its title above and `note` below. No pyplot: nothing global, no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 0.9 + 2.9 * shape[0]), layout="constrained")
    random = any(row.train.random_weights for row in report.rows if row.train)
    figure.suptitle(f"{_text(report.sweep)}: {title}{' (from random weights)' if random else ''}")
    figure.supxlabel(textwrap.fill(note, 150), fontsize=7, color="0.3")
    return figure, figure.subplots(*shape, squeeze=False).tolist()


def machines(rows: Sequence[Row]) -> str:
    """`cpu (1 process, 1 thread)`, each kind once."""
    kinds = dict.fromkeys(
        f"{row.train.device} ({_number(row.train.processes, 'process', 'processes')}"
        + (f", {_number(row.train.threads, 'thread', 'threads')})" if row.train.threads else ")")
        for row in rows
        if row.train
    )
    return words.listed(list(kinds))


def _number(count: int | None, one: str, many: str) -> str:
    return f"{count if count is not None else '?'} {one if count == 1 else many}"


def _text(text: str) -> str:
    """In a legend, a name that begins with `_` would be left out."""
    shown = plain(text)
    return f" {shown}" if shown.startswith("_") else shown
