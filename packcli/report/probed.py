"""What the probes of one checkpoint found, in few numbers and as tables (docs/probes.md says what each means)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from packcli.log import plain
from packcli.report import words
from packcli.report.records import Probed

if TYPE_CHECKING:
    from rich.table import Table

_KEPT = ("causal", "continue")
UNFAMILIAR = 6.0
"""Nats per token: a model that knows the language and the template of a text is far below."""


def summary(found: Mapping[str, Any]) -> Probed:
    """The few numbers that a comparison of arms shows; `found`: what `probes.run` gives."""
    effect = found["causal_effect"]
    return Probed(
        crossing={name: _mean(arm, "share_but_first") for name, arm in found["crossing"].items()},
        even={name: _mean(arm, "uniform_but_first") for name, arm in found["crossing"].items()},
        alone=effect["mean"],
        behind={
            one["neighbour"]: one["effect"]["mean"]
            for one in effect["conditions"]
            if (one["attention"], one["positions"]) == _KEPT
        },
        mask=next((one["mean"] for one in _main_effects(found) if one["factor"] == "mask"), None),
        n=effect["documents"],
    )


def _mean(arm: Mapping[str, Any], field: str) -> float | None:
    known = [layer[field] for layer in arm["layers"] if layer[field] is not None]
    return math.fsum(known) / len(known) if known else None


def _main_effects(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"factor": one["factors"][0], **one["difference"]}
        for one in found["boundary"]["effects"]
        if len(one["factors"]) == 1
    ]


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Crossing attention, causal effects and the boundary experiment of one checkpoint."""
    kind = " (from random weights)" if found["random_weights"] else ""
    origin = f"{found['checkpoint']}{kind}; documents: {found['source']}, seed {found['seed']}"
    return [_crossing(found, origin), _effects(found), _boundary(found)]


def _crossing(found: Mapping[str, Any], origin: str) -> Table:
    title = f"{origin}\nattention to other documents of the row, % of what does not go to its first token"
    shown = _table(title, "rows as", "seen", "tokens", "mean over layers", "spread evenly", "by layer")
    for name, arm in found["crossing"].items():
        layers = [layer["share_but_first"] for layer in arm["layers"]]
        mask = "with a document mask" if arm["attention"] == "document" else "without a mask"
        few = layers if len(layers) <= 4 else [layers[0], layers[len(layers) // 2], layers[-1]]
        shown.add_row(
            plain(name),
            mask,
            f"{arm['tokens']:,}",
            words.share(_mean(arm, "share_but_first")),
            words.share(_mean(arm, "uniform_but_first")),
            (", " if len(layers) <= 4 else " .. ").join(map(words.share, few)),
        )
    return shown


def _effects(found: Mapping[str, Any]) -> Table:
    effect = found["causal_effect"]
    title = (
        f"a document's loss behind another - alone ({effect['mean']:.3f}), nats per supervised token, "
        f"n = {effect['documents']:,} documents, 95% intervals; check {effect['check']:.1g}"
    )
    earlier = found.get("before")
    if earlier and earlier["causal_effect"]["mean"] > UNFAMILIAR:
        nats = earlier["causal_effect"]["mean"]
        title += (
            f"\nbefore training: {nats:.1f} nats alone, so that model does not know this template; "
            "what training changed says that first"
        )
    shown = _table(
        title, "behind", "attention to it", "positions", "effect", *(["before training"] if earlier else [])
    )
    was = {_key(one): one["effect"] for one in earlier["causal_effect"]["conditions"]} if earlier else {}
    for one in effect["conditions"]:
        cut = "cut" if one["attention"] == "document" else "kept"
        before = [_interval(was[_key(one)])] if was else []
        shown.add_row(one["neighbour"], cut, one["positions"], _interval(one["effect"]), *before)
    return shown


def _key(one: Mapping[str, Any]) -> tuple[str, str, str]:
    return one["neighbour"], one["attention"], one["positions"]


def _boundary(found: Mapping[str, Any]) -> Table:
    about = found["boundary"]
    missing = "".join(f"; not crossed: {name} ({why})" for name, why in about["missing"].items())
    title = (
        "what marks a border: change of the last document's loss, nats per supervised token, "
        f"n = {about['documents']:,} documents, 95% intervals{plain(missing)}"
    )
    shown = _table(title, "factor", "effect")
    for one in about["effects"]:
        shown.add_row(" x ".join(one["factors"]), _interval(one["difference"]))
    return shown


def _interval(one: Mapping[str, Any]) -> str:
    if one["low"] is None:
        return f"{one['mean']:+.3f}"
    return f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def _table(title: str, *headers: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, title=Text(words.plain_lines(title)), title_justify="left")
    for header in headers:
        left = header in ("rows as", "seen", "behind", "attention to it", "positions", "factor")
        shown.add_column(header, justify="left" if left else "right")
    return shown
