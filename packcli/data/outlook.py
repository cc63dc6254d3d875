"""What each arm would make of the data, from lengths alone: nothing is written to a store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcli import batching
from packcli.config import ArmSpec, Spec
from packcli.data import index as indexes
from packcli.data import tokenize
from packcli.data.tokenize import Lengths
from packcli.errors import DataError
from packcli.plan import Plan, TrainOrder

Note = Callable[[int, int, str], None]

HISTOGRAM_BINS = 40


class Outlook(Spec):
    """One way of making rows, for one epoch of the training part.

    ledger                  as `packcli prepare` prints it; None: the arm makes nothing of this data, see `problem`
    conversations_per_row   documents that start in a row, on average
    steps_per_epoch         of `global_batch` as the arm counts it
    documents_per_step      on average: what a step holds
    sum_squares             of the lengths that attention runs over, in tokens^2 (crossing arms: whole rows)
    """

    labels: dict[str, str]
    arm: str
    max_length: int
    ledger: dict[str, Any] | None
    conversations_per_row: float | None = None
    steps_per_epoch: int | None = None
    documents_per_step: float | None = None
    sum_squares: int | None = None
    problem: str | None = None

    @property
    def made(self) -> dict[str, Any]:
        """The ledger of an arm that made rows."""
        assert self.ledger is not None
        return self.ledger


class Distribution(Spec):
    """Lengths of all documents in tokens. `counts`: documents in each of the bins that `edges` bound."""

    documents: int
    tokens: int
    mean: float
    median: float
    p90: float
    p99: float
    longest: int
    edges: list[float]
    counts: list[int]


class Outlooks(Spec):
    """`tokens`: token store id -> lengths and rejects; `cells`: one per cell of the plan, in its order."""

    distributions: dict[str, Distribution]
    rejected: dict[str, int]
    cells: list[Outlook]


def look(plan: Plan, note: Note) -> Outlooks:
    """Tokenize each source once, keep the lengths, pack them every way the plan asks for.

    Raises:
        DataError: as `tokenize.build`; no document is left to train on.
    """
    found: dict[str, Lengths] = {}
    wanted = dict.fromkeys(cell.tokens for cell in plan.cells)
    with tempfile.TemporaryDirectory(prefix="packcli-") as scratch:
        for id_ in wanted:
            found[id_] = tokenize.measure(plan.tokens[id_], Path(scratch) / id_, note)
    packed: dict[str, tuple[indexes.Index, dict[str, Any]] | DataError] = {}
    cells = []
    for cell in plan.cells:
        order, lengths = plan.indexes[cell.index], found[cell.tokens]
        if order.id not in packed:
            try:
                index, _, ledger = indexes.build(order, lengths, lengths.conversations, len(lengths.rejected))
                packed[order.id] = index.epoch(0), ledger
            except DataError as error:
                packed[order.id] = error
        cells.append(_outlook(cell.labels, plan.trains[cell.train], packed[order.id]))
    if all(cell.ledger is None for cell in cells):
        raise DataError(str(cells[0].problem), "see docs/data.md")
    return Outlooks(
        distributions={id_: _distribution(lengths.lengths) for id_, lengths in found.items()},
        rejected={id_: len(lengths.rejected) for id_, lengths in found.items()},
        cells=cells,
    )


def _outlook(
    labels: dict[str, str], train: TrainOrder, packed: tuple[indexes.Index, dict[str, Any]] | DataError
) -> Outlook:
    arm, spec = labels.get("arm", ""), train.train
    if isinstance(packed, DataError):
        return Outlook(labels=labels, arm=arm, max_length=train.max_length, ledger=None, problem=packed.cause)
    index, ledger = packed
    steps = batching.steps(
        index.sizes,
        batching.Budget(epochs=1),
        global_batch=spec.global_batch,
        unit=spec.batch_unit,
        seed=train.seed,
        order=train.arm.order,
    )
    documents = int(index.documents.sum())
    return Outlook(
        labels=labels,
        arm=arm,
        max_length=train.max_length,
        ledger=ledger,
        conversations_per_row=documents / ledger["rows"],
        steps_per_epoch=len(steps),
        documents_per_step=documents / len(steps),
        sum_squares=squares(index, train.arm.attention == "causal"),
    )


def squares(index: indexes.Index, crossing: bool) -> int:
    """Sum of squared lengths of what attention runs over: whole rows, or each document's part of a row."""
    rows = index.rows
    if crossing:
        return int((index.tokens**2).sum())
    part = np.cumsum(indexes.opens(rows)) - 1
    lengths = np.bincount(part, rows.stop - rows.start).astype(np.int64)
    return int((lengths**2).sum())


def _distribution(lengths: NDArray[np.int64]) -> Distribution:
    longest = int(lengths.max()) if len(lengths) else 0
    edges = np.geomspace(max(1, int(lengths.min())), longest + 1, HISTOGRAM_BINS + 1) if longest else np.ones(1)
    at = np.percentile(lengths, [50, 90, 99]) if longest else np.zeros(3)
    return Distribution(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        mean=float(lengths.mean()) if longest else 0.0,
        median=float(at[0]),
        p90=float(at[1]),
        p99=float(at[2]),
        longest=longest,
        edges=edges.tolist(),
        counts=np.histogram(lengths, edges)[0].tolist() if longest else [],
    )


# What we would take ------------------------------------------------------------------------------------

FREE_OF_LOSS = 0.001
"""Share of training tokens cut or dropped below which a row length is long enough."""

_WORTH_PACKING = 1.2


class Advice(Spec):
    arm: str
    max_length: int
    reasons: list[str]


def advise(cells: list[Outlook], arms: Mapping[str, ArmSpec]) -> Advice | None:
    """The arm we would take of those looked at, and why.

    Only arms that train on the same objective as padding qualify: whole documents that do not see each other.
    Of these, the one that computes on the fewest slots; where rows hold hardly more than one conversation, the
    simplest. The row length is the shortest that cuts or drops at most `FREE_OF_LOSS` of the tokens. None: no arm
    looked at qualifies.
    """
    safe = [cell for cell in cells if cell.ledger and _keeps_the_objective(arms[cell.arm])]
    if not safe:
        return None
    by_length: dict[int, list[Outlook]] = {}
    for cell in safe:
        by_length.setdefault(cell.max_length, []).append(cell)
    length = next((n for n in sorted(by_length) if lost(by_length[n][0]) <= FREE_OF_LOSS), max(by_length))
    own = {cell.arm: cell for cell in by_length[length]}
    best = own.get("best_fit") or min(own.values(), key=lambda cell: cell.made["slots"])
    padded = own.get("padding") or max(own.values(), key=lambda cell: cell.made["slots"])
    ratio = padded.made["slots"] / best.made["slots"]
    padding = 1 - best.made["efficiency"]
    reasons = [
        f"a row holds {best.conversations_per_row:.1f} conversations and {padding:.2%} padding",
        f"an epoch computes {best.made['slots']:,} slots, {ratio:.1f} times fewer than `{padded.arm}`",
        "documents stay whole and do not see each other, so with equal batches the gradient is that of padding",
    ]
    if (best.conversations_per_row or 0) < _WORTH_PACKING and "padding_free" in own:
        best = own["padding_free"]
        reasons = [
            "rows would hold hardly more than one conversation: packing gains nothing, padding-free is simpler"
        ]
    share = lost(by_length[length][0])
    reasons.append(f"at {length:,} tokens a row, {share:.2%} of the training tokens are cut or dropped")
    return Advice(arm=best.arm, max_length=length, reasons=reasons)


def _keeps_the_objective(arm: ArmSpec) -> bool:
    return arm.attention == "document" and arm.loss == "token" and not arm.validation_after_packing


def lost(cell: Outlook) -> float:
    """Share of the training part's tokens that this arm never trains on."""
    ledger = cell.made
    gone = ledger["tokens_truncated"] + ledger["tokens_dropped"]
    return float(gone / max(1, gone + ledger["tokens_kept"]))
