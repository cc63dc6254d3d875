"""What `packcli prepare` prints: for each way of making rows, where every conversation and token went."""

from __future__ import annotations

from typing import Any

from packcli.errors import IntegrityError
from packcli.plan import Plan
from packcli.report.fit import Fitted
from packcli.store import Store

# Each block adds up: its first line is the sum of those below it, up to the blank.
_BLOCKS: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("conversations read", "conversations_in"),
        ("  rejected", "conversations_rejected"),
        ("  documents", "documents"),
    ),
    (
        ("documents", "documents"),
        ("  held out for validation", "documents_validation"),
        ("  dropped: no label left", "documents_dropped"),
        ("  kept", "documents_kept"),
        ("    of these cut over rows", "documents_cut"),
    ),
    (
        ("tokens read", "tokens_in"),
        ("  held out for validation", "tokens_validation"),
        ("  truncated", "tokens_truncated"),
        ("  dropped", "tokens_dropped"),
        ("  kept", "tokens_kept"),
        ("    of these supervised", "tokens_supervised"),
    ),
    (
        ("slots computed an epoch", "slots"),
        ("  kept tokens", "tokens_kept"),
        ("  padding", "tokens_padding"),
        ("  boundary tokens", "tokens_boundary"),
    ),
    (("rows", "rows"), ("  fewest possible", "rows_lower_bound")),
)

_KEYS = {key for block in _BLOCKS for _, key in block} | {"efficiency"}
_REMARKS = (
    ("conversations say the same as another one (kept)", "conversations_repeated"),
    ("conversations were left out by the weights of their sources", "conversations_not_drawn"),
)


def collect(plan: Plan, store: Store) -> dict[str, Any]:
    """The contract's `prepare` document; `ledger` is null for a cell whose prepare failed."""
    cells = []
    for cell in plan.cells:
        manifest, source = store.manifest("index", cell.index), store.manifest("tokens", cell.tokens)
        if manifest is not None and not manifest.results["ledger"].keys() >= _KEYS:
            cause = f"{store.manifest_file('index', cell.index)}: its ledger is not whole"
            raise IntegrityError(cause, store.again("index", cell.index))
        cells.append(
            {
                "cell": cell.id,
                "labels": cell.labels,
                "prepare_id": cell.index,
                "tokens_path": str(store.directory("tokens", cell.tokens)),
                "index_path": str(store.directory("index", cell.index)),
                "rejected_path": str(store.rejected(cell.tokens)),
                "ledger": manifest.results["ledger"] if manifest else None,
                "sharing": manifest.results.get("sharing") if manifest else None,
                "conversations_repeated": source.results["duplicates"] if source else None,
                "conversations_not_drawn": source.results["not_drawn"] if source else None,
            }
        )
    return {"cells": cells}


def table(document: dict[str, Any]) -> Fitted:
    """One column per distinct row index; of several seeds the first."""
    columns = _columns(document)
    names = dict.fromkeys(name for _, _, shares in columns for name in shares)
    caption = "One epoch. Of several seeds, the first."
    rejecting = (c for c in document["cells"] if c["ledger"] and c["ledger"]["conversations_rejected"])
    for path in dict.fromkeys(cell["rejected_path"] for cell in rejecting):
        caption += f"\nRejected conversations, with reasons: {path}"
    for words, key in _REMARKS:
        if most := max((cell[key] or 0 for cell in document["cells"]), default=0):
            caption += f"\n{most:,} {words}"
    texts = [text for block in _BLOCKS for text, _ in (*block, ("", ""))]
    keys = [key for block in _BLOCKS for _, key in (*block, ("", ""))]
    who = [word for name in names for word in ("", f"documents in a row, alike by {name}", *_SHARING)]
    shown = [("ledger", [*texts, "efficiency: kept tokens / slots", *who])]
    for name, ledger, shares in columns:
        cells = ["" if not key else "failed" if ledger is None else f"{ledger[key]:,}" for key in keys]
        cells.append("failed" if ledger is None else f"{ledger['efficiency']:.2%}")
        shown.append((name, [*cells, *(cell for by in names for cell in _shared(shares.get(by)))]))
    return Fitted(shown, caption=caption)


_SHARING = ("  groups", "  documents of none", "  pairs of one group", "    by chance", "  rows of one group")


def _shared(shares: dict[str, Any] | None) -> list[str]:
    """Who shares a row, below an empty line and a heading; "-" where no two documents do."""
    if shares is None:
        return [""] * (2 + len(_SHARING))
    parts = (shares["pairs_within"], shares["pairs"]), (shares["rows_pure"], shares["rows_shared"])
    pairs, rows = (f"{part / whole:.1%}" if whole else "-" for part, whole in parts)
    by_chance = shares["pairs_by_chance"]
    chance = "-" if by_chance is None else f"{by_chance:.1%}"
    return ["", "", f"{shares['groups']:,}", f"{shares.get('without', 0):,}", pairs, chance, rows]


def _columns(document: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, ledger, who shares rows) of each distinct index, named by the labels that tell the columns apart."""
    first: dict[tuple[str, ...], dict[str, Any]] = {}
    indexes: set[str] = set()
    for cell in document["cells"]:
        labels = tuple(f"{value}" for axis, value in cell["labels"].items() if axis != "seed")
        if cell["prepare_id"] not in indexes and labels not in first:
            first[labels] = cell
        indexes.add(cell["prepare_id"])
    varying = [len({labels[n] for labels in first}) > 1 for n in range(len(next(iter(first))))]
    if not any(varying):
        varying[-1] = True
    return [
        (
            " ".join(part for part, keep in zip(labels, varying, strict=True) if keep),
            cell["ledger"],
            cell.get("sharing") or {},
        )
        for labels, cell in first.items()
    ]
