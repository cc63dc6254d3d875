"""The waterfall of each ladder: from the first arm's score to the last one's, a bar for what each rung does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packcli.log import plain
from packcli.report import words
from packcli.report.figures import check, save, styled
from packcli.report.ladder import Ladder, Rung

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UP, _DOWN, _END, _GREY = "#228833", "#ee6677", "#4477aa", "#57606a"


def draw(ladders: Sequence[Ladder], directory: Path) -> list[Path]:
    """Write `ladder` as SVG and PNG: a panel for each ladder that has a seed scored in all its arms; their paths.

    Raises:
        ConfigError: matplotlib is not installed, or nothing can be written to `directory`.
    """
    scored = [ladder for ladder in ladders if ladder.seeds]
    if not scored:
        return []
    check()
    with styled():
        return save({"ladder": _figure(scored)}, directory)


def _figure(ladders: Sequence[Ladder]) -> Figure:
    from matplotlib.figure import Figure

    most = max(len(ladder.rungs) for ladder in ladders)
    figure = Figure(figsize=(2.2 + 0.95 * most, 0.6 + 3.4 * len(ladders)), layout="constrained")
    panels = figure.subplots(len(ladders), 1, squeeze=False, sharey=True)[:, 0]
    for axes, ladder in zip(panels, ladders, strict=True):
        _waterfall(axes, ladder)
    figure.supylabel("average score, %")
    figure.supxlabel(
        "Bars: what a rung does to the mean over seeds, from the score before it to the one after it.\n"
        "Lines: its 95% interval (Student's t, paired by seed, for this rung alone), where there is one.",
        fontsize=8,
        color=_GREY,
    )
    return figure


def _waterfall(axes: Axes, ladder: Ladder) -> None:
    setting = words.name(ladder.setting)
    seeds = f"{len(ladder.seeds)} seed{'' if len(ladder.seeds) == 1 else 's'}"
    axes.set_title(f"{plain(ladder.name)}, {seeds}{f', {setting}' if setting else ''}", pad=14)
    level = 100 * (ladder.rungs[0].average or 0.0)
    axes.bar(0, level, color=_END, width=0.7)
    axes.annotate(f"{level:.1f}", (0, level), xytext=(0, 3), textcoords="offset points", ha="center")
    for place, rung in enumerate(ladder.rungs[1:], 1):
        level = _step(axes, place, level, rung)
    last = len(ladder.rungs)
    axes.bar(last, level, color=_END, width=0.7)
    axes.annotate(f"{level:.1f}", (last, level), xytext=(0, 3), textcoords="offset points", ha="center")
    names = [
        "\n".join([("+ " if place else "") + plain(rung.arm).replace("_", "_\n"), *rung.at.values()])
        for place, rung in enumerate(ladder.rungs)
    ]
    names.append(plain(ladder.rungs[-1].arm).replace("_", "_\n"))
    axes.set_xticks(range(last + 1), names, fontsize=7)
    axes.axhline(0, color=_GREY, linewidth=0.8)


def _step(axes: Axes, place: int, level: float, rung: Rung) -> float:
    """The bar of one rung; where it ends."""
    effect = rung.effect
    assert effect is not None  # all but the first have one where a seed is complete
    change = 100 * effect.delta
    axes.bar(place, change, bottom=level, color=_UP if change > 0 else _DOWN, width=0.7)
    axes.plot([place - 1.35, place + 0.35], [level, level], color=_GREY, linewidth=0.6)
    top = max(level, level + change)
    if effect.interval is not None:
        low, high = (level + 100 * bound for bound in effect.interval)
        axes.plot([place, place], [low, high], color="black", linewidth=1)
        top = max(top, high)
    axes.annotate(
        words.points(effect.delta),
        (place, top),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
    return level + change
