"""Pictures of what the probes found (`packcli/eval/probe/probes.py`), one each, from their JSON alone.

Equal results give equal files, byte for byte.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packcli.errors import ConfigError, IntegrityError
from packcli.log import plain
from packcli.report import figures, rows, words
from packcli.report.records import Report
from packcli.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json = Mapping[str, Any]

_BLUE, _GREY, _RED, _GREEN = "#4477aa", "#777777", "#aa3377", "#228833"
_READABLE = 24  # numbers in a panel of heads
_NEIGHBOURS = ("unrelated", "related", "duplicate")
_CUT_AND_KEPT = (
    ("document", "reset", "cut, positions reset", _GREY, "o"),
    ("document", "continue", "cut, positions continue", _GREEN, "s"),
    ("causal", "continue", "kept, positions continue", _BLUE, "D"),
)
_KEPT_RESET = (("causal", "reset", "kept, positions reset", _RED, "^"),)
_FACTORS = {"eos": "eos", "bos": "bos", "header": "system header", "mask": "document mask"}


def draw(result: Json, directory: Path) -> list[Path]:
    """Write `crossing`, `causal_effect` and `boundary`, each as SVG and PNG; their paths.

    `result`: what `probes.run` gives.

    Raises:
        ConfigError: matplotlib is not installed, or nothing can be written to `directory`.
    """
    figures.check()
    with figures.styled():
        made = {"crossing": _crossing(result), "causal_effect": _effect(result), "boundary": _boundary(result)}
        return figures.save(made, directory)


def of_cells(report: Report, store: Store, directory: Path) -> list[Path]:
    """The same for every probed cell of a sweep, in a directory for each, named by its labels; their paths."""
    written = []
    for row in report.rows:
        evals = {name.removeprefix("eval "): id_ for name, id_ in row.ids.items()}
        try:
            found = rows.probes_of(evals, store)
        except IntegrityError:  # the report names it
            continue
        if found:
            labels = words.name(row.labels)
            place = "probes-" + re.sub(r"[^A-Za-z0-9._=-]+", "-", labels)[:80]
            written += draw({**found, "checkpoint": labels}, directory / f"{place}-{row.cell[:6]}")
    return written


# Crossing attention ------------------------------------------------------------------------------------


def _crossing(result: Json) -> Figure:
    """A column for each arm: the share by layer, and below it by layer and head."""
    arms = result["crossing"]
    note = (
        "Means over tokens with an earlier document in their row. Evenly: over all a token may see. Rows' first "
        "token left out: of the attention that does not go to it."
    )
    figure, panels = _figure(result, "attention to other documents of the row", (2, len(arms)), note, 6.4)
    highest = max(
        (share for arm in arms.values() for layer in arm["layers"] for share in _known(layer)), default=0
    )
    for (name, arm), above, below in zip(arms.items(), panels[0], panels[1], strict=True):
        _shares(above, arm)
        above.set(title=f"{plain(name)}: {_seen(arm)}\n{arm['rows']:,} rows, n = {arm['tokens']:,} tokens")
        above.set(ylim=(-0.03, 1.03), xlabel="layer")
        image = _heads(below, arm, highest or 1.0)
    panels[0][0].set_ylabel("share of attention, 0 to 1")
    panels[0][-1].legend(fontsize=8, loc="best")
    panels[1][0].set_ylabel("layer")
    figure.colorbar(image, ax=panels[1], label="share of attention,\nrows' first token left out")
    return figure


def _seen(arm: Json) -> str:
    return "document mask" if arm["attention"] == "document" else "no mask"


def _known(layer: Json) -> list[float]:
    return [share for share in layer["heads_but_first"] if share is not None]


def _shares(axes: Axes, arm: Json) -> None:
    from matplotlib.ticker import MaxNLocator

    numbers = range(1, len(arm["layers"]) + 1)
    lines = (
        ("share", "to other documents", _BLUE, "o-"),
        ("share_but_first", "rows' first token left out", _RED, "s--"),
        ("uniform", "if spread evenly", _GREY, ":"),
    )
    for key, name, colour, style in lines:
        values = [layer[key] if layer[key] is not None else float("nan") for layer in arm["layers"]]
        axes.plot(numbers, values, style, color=colour, label=name, markersize=4)
    axes.set_xlim(0.5, len(numbers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if not any(any(layer["heads"]) for layer in arm["layers"]):
        axes.annotate("exactly 0 in every\nlayer and head", (0.5, 0.15), xycoords="axes fraction", ha="center")


def _heads(axes: Axes, arm: Json, highest: float) -> Any:
    from matplotlib.ticker import MaxNLocator

    rows = [layer["heads_but_first"] for layer in arm["layers"]]
    widest = max(map(len, rows))
    matrix = [[float("nan") if s is None else s for s in (*row, *[None] * (widest - len(row)))] for row in rows]
    extent = (0.5, widest + 0.5, len(rows) + 0.5, 0.5)
    image = axes.imshow(matrix, aspect="auto", cmap="Blues", vmin=0.0, vmax=highest, extent=extent)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("head")
    if len(rows) * widest <= _READABLE:
        for layer, shares in enumerate(rows, 1):
            for head, share in enumerate(shares, 1):
                shown = "-" if share is None else f"{share:.2f}"
                dark = share is not None and share > 0.6 * highest
                axes.text(head, layer, shown, ha="center", va="center", color="white" if dark else "0.2")
    return image


# Causal effect -----------------------------------------------------------------------------------------


def _effect(result: Json) -> Figure:
    """A line for each model: what neighbours do in layouts that are trained on, and in the one that is not."""
    models = {"": result["causal_effect"]}
    if "before" in result:
        models = {"before training": result["before"]["causal_effect"], "after training": result["causal_effect"]}
    note = (
        "Bars: 95% intervals over documents. Cut and kept: attention to the document before. Cut at positions "
        f"that reset must be 0: the largest difference of a document is {result['causal_effect']['check']:.1e} "
        "nats. Kept at positions that reset puts two tokens of a row at one position, which no arm trains on: "
        "mind its own scale."
    )
    figure, panels = _figure(result, "what the document before does to a loss", (len(models), 2), note, 3.2)
    for (name, found), (trained, other) in zip(models.items(), panels, strict=True):
        about = f"{name}: " if name else ""
        alone = f"alone {found['mean']:.3g} nats, n = {found['documents']:,} documents"
        _points(trained, found, _CUT_AND_KEPT)
        trained.set(title=about + alone, ylabel="loss behind it - loss alone,\nnats per supervised token")
        _points(other, found, _KEPT_RESET)
        other.set(title=f"{about}kept, positions reset")
    panels[0][1].legend(
        *_handles(panels[0]), fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="attention"
    )
    return figure


def _handles(axes: Sequence[Axes]) -> tuple[list[Any], list[Any]]:
    pairs = [axes_.get_legend_handles_labels() for axes_ in axes]
    return [handle for pair in pairs for handle in pair[0]], [name for pair in pairs for name in pair[1]]


def _points(axes: Axes, found: Json, layouts: Sequence[tuple[str, str, str, str, str]]) -> None:
    for number, (attention, positions, name, colour, marker) in enumerate(layouts):
        effects = [
            condition["effect"]
            for kind in _NEIGHBOURS
            for condition in found["conditions"]
            if (condition["neighbour"], condition["attention"], condition["positions"])
            == (kind, attention, positions)
        ]
        places = [at + (number - (len(layouts) - 1) / 2) * 0.2 for at in range(len(effects))]
        means = [effect["mean"] for effect in effects]
        axes.errorbar(places, means, _bars(effects), fmt=marker, color=colour, label=name, capsize=3, markersize=5)
    axes.axhline(0.0, color="0.4", linewidth=0.8)
    axes.set_xticks(range(len(_NEIGHBOURS)), _NEIGHBOURS)
    axes.set_xlim(-0.5, len(_NEIGHBOURS) - 0.5)
    axes.set_xlabel("document before")


def _bars(effects: Sequence[Json]) -> list[list[float]]:
    """How far intervals reach below and above their means; 0 where there is none."""
    return [
        [effect["mean"] - effect["low"] if effect["low"] is not None else 0.0 for effect in effects],
        [effect["high"] - effect["mean"] if effect["high"] is not None else 0.0 for effect in effects],
    ]


# Boundary ----------------------------------------------------------------------------------------------


def _boundary(result: Json) -> Figure:
    """Left the mean loss of every combination, right the effects with their intervals."""
    found = result["boundary"]
    missing = "".join(f" Not crossed: {_FACTORS[name]} ({why})." for name, why in found["missing"].items())
    note = (
        f"n = {found['documents']:,} documents, each the last of a row of two or three; the same in every "
        "combination. Bars: 95% intervals of paired differences, not corrected for their number. A x B: the "
        f"effect of A where B is present - where it is absent.{plain(missing)}"
    )
    marks = list(dict.fromkeys(_marks(cell) for cell in found["cells"]))
    height = max(2.6, 0.24 * max(len(marks), len(found["effects"])) + 0.8)
    figure, ((cells, effects),) = _figure(result, "what marks a border between documents", (1, 2), note, height)
    for is_masked, name, colour, marker in ((False, "no mask", _RED, "o"), (True, "document mask", _BLUE, "s")):
        own = [cell for cell in found["cells"] if ("mask" in cell["present"]) == is_masked]
        means, places = [cell["mean"] for cell in own], [marks.index(_marks(cell)) for cell in own]
        cells.plot(means, places, marker, color=colour, label=name)
    cells.set_yticks(range(len(marks)), marks)
    cells.set(xlabel="mean loss, nats per supervised token", title="every combination")
    cells.legend(fontsize=8, loc="best")
    differences = [effect["difference"] for effect in found["effects"]]
    rows = range(len(differences))
    main = [len(effect["factors"]) == 1 for effect in found["effects"]]
    for row, difference in zip(rows, differences, strict=True):
        colour = _BLUE if main[row] else _GREY
        effects.errorbar(difference["mean"], row, xerr=_bars([difference]), fmt="o", color=colour, capsize=3)
    effects.set_yticks(rows, [" x ".join(_FACTORS[name] for name in e["factors"]) for e in found["effects"]])
    effects.axvline(0.0, color="0.4", linewidth=0.8)
    effects.set(xlabel="change of the loss, nats per supervised token", title="effects, and pairs of them")
    for axes in (cells, effects):
        axes.invert_yaxis()
        axes.grid(axis="y", color="0.92")
    return figure


def _marks(cell: Json) -> str:
    return ", ".join(_FACTORS[name] for name in cell["present"] if name != "mask") or "no mark"


# All ---------------------------------------------------------------------------------------------------


def _figure(
    result: Json, title: str, shape: tuple[int, int], note: str, height: float
) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    if 0 in shape:
        raise ConfigError("these probes hold no arm: nothing to draw", "name an arm to probe")
    figure = Figure(figsize=(9.6, height + (0.8 if shape[0] == 1 or height > 5 else height)), layout="constrained")
    kind = {True: " (from random weights)", False: "", None: ""}[result["random_weights"]]
    checkpoint = "/".join(Path(result["checkpoint"]).parts[-2:])
    figure.suptitle(f"{plain(checkpoint)}: {title}{kind}")
    source = f"Documents: {plain(result['source'])}, seed {result['seed']}. "
    figure.supxlabel(textwrap.fill(source + note, 150), fontsize=7, color="0.3")
    return figure, figure.subplots(*shape, squeeze=False).tolist()
