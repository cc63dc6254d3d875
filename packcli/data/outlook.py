"""What each arm would make of the data, from lengths alone: nothing is written to a store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcli import batching
from packcli.config import ArmSpec, BatchUnit, Spec
from packcli.data import alike, framed, tokenize
from packcli.data import index as indexes
from packcli.data.framed import Documents
from packcli.data.tokenizer import stored
from packcli.data.tokens import Tokens
from packcli.errors import DataError
from packcli.plan import IndexOrder, Plan, TrainOrder

Note = Callable[[int, int, str], None]

HISTOGRAM_BINS = 40


class Outlook(Spec):
    """One way of making rows, for one epoch of the training part.

    ledger                  as `packcli prepare` prints it; None: the arm makes nothing of this data, see `problem`
    conversations_per_row   documents that start in a row, on average
    global_batch            what a step holds, counted in `batch_unit`
    steps_per_epoch         of that size; the last one may be smaller
    documents_per_step      on average: what a step holds
    sum_squares             of the lengths that attention runs over, in tokens^2 (crossing arms: whole rows)
    """

    labels: dict[str, str]
    arm: str
    max_length: int
    global_batch: int
    batch_unit: BatchUnit
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


@dataclass(frozen=True, slots=True)
class Known:
    """Documents that a store holds already, and how many conversations were read and rejected for them.

    `tokenizer`: the directory of the one that made them.
    """

    documents: Documents
    conversations: int
    rejected: int
    tokenizer: Path


def look(plan: Plan, note: Note, known: Mapping[str, Known]) -> Outlooks:
    """Tokenize each source once, keep the lengths, pack them every way the plan asks for.

    `known`: token store id -> what is prepared already, and not tokenized again.

    Raises:
        DataError: as `tokenize.build`; no document is left to train on.
    """
    found = dict(known)
    wanted = dict.fromkeys(cell.tokens for cell in plan.cells)
    with tempfile.TemporaryDirectory(prefix="packcli-") as scratch:
        for id_ in (id_ for id_ in wanted if id_ not in found):
            tokenizer = Path(scratch) / id_
            measured = tokenize.measure(plan.tokens[id_], tokenizer, note)
            found[id_] = Known(measured, measured.conversations, len(measured.rejected), tokenizer)
        packed: dict[str, tuple[indexes.Index, dict[str, Any]] | DataError] = {}
        for cell in plan.cells:
            if cell.index not in packed:
                packed[cell.index] = _packed(plan.indexes[cell.index], found[cell.tokens])
    cells = [_outlook(cell.labels, plan.trains[cell.train], packed[cell.index]) for cell in plan.cells]
    if all(cell.ledger is None for cell in cells):
        raise DataError(str(cells[0].problem), "see docs/data.md")
    return Outlooks(
        distributions={id_: _distribution(found[id_].documents.lengths) for id_ in wanted},
        rejected={id_: found[id_].rejected for id_ in wanted},
        cells=cells,
    )


def _packed(order: IndexOrder, have: Known) -> tuple[indexes.Index, dict[str, Any]] | DataError:
    marks = framed.marks(order.layout.boundary, lambda: stored(have.tokenizer))
    documents, groups = have.documents, None
    if isinstance(documents, Tokens):  # what is prepared says what documents are about, too
        groups = alike.groups(order, documents, len(stored(have.tokenizer)), lambda done, total, remark: None)
    try:
        index, _, ledger = indexes.build(order, documents, have.conversations, have.rejected, marks, groups)
    except DataError as error:
        return error
    return index.epoch(0), ledger


def _outlook(
    labels: dict[str, str], train: TrainOrder, packed: tuple[indexes.Index, dict[str, Any]] | DataError
) -> Outlook:
    arm, spec = labels.get("arm", ""), train.train
    batch, unit = spec.global_batch, spec.batch_unit
    if isinstance(packed, DataError):
        problem = f"{arm} at {train.max_length:,} tokens: {packed.cause}"
        return Outlook(
            labels=labels,
            arm=arm,
            max_length=train.max_length,
            global_batch=batch,
            batch_unit=unit,
            ledger=None,
            problem=problem,
        )
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
        global_batch=batch,
        batch_unit=unit,
        ledger=ledger,
        conversations_per_row=documents / ledger["rows"],
        steps_per_epoch=len(steps),
        documents_per_step=documents / len(steps),
        sum_squares=int(index.squares(train.arm.attention).sum()),
    )


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

_WORTH_PACKING, _WORTH_ROWS = 1.2, 0.8


class Advice(Spec):
    arm: str
    max_length: int
    reasons: list[str]


def advise(cells: list[Outlook], arms: Mapping[str, ArmSpec], longest: int) -> Advice | None:
    """The arm we would take of those looked at, at the middle one of their row lengths, and why.

    Only arms that train on the same objective as padding qualify: whole documents that do not see each other.
    `best_fit` of these, unless its rows stay so empty or so single that packing gains nothing: then
    `padding_free`. None: no arm looked at qualifies. `longest`: tokens of the longest conversation.
    """
    safe = [cell for cell in cells if cell.ledger and _keeps_the_objective(arms[cell.arm])]
    if not safe:
        return None
    lengths = sorted({cell.max_length for cell in safe})
    length = lengths[len(lengths) // 2]
    own = {cell.arm: cell for cell in safe if cell.max_length == length}
    best = own.get("best_fit") or min(own.values(), key=lambda cell: cell.made["slots"])
    free = own.get("padding_free")
    if free and (best.made["efficiency"] < _WORTH_ROWS or (best.conversations_per_row or 0) < _WORTH_PACKING):
        rows = f"rows of {length:,} tokens would hold {best.conversations_per_row or 1:.1f} conversations"
        reasons = [
            f"{rows} and {1 - best.made['efficiency']:.1%} padding: packing gains nothing over padding-free"
        ]
        best = free
    else:
        reasons = _reasons(best, own)
    return Advice(arm=best.arm, max_length=length, reasons=[*reasons, _of_length(best, safe, longest)])


def _reasons(best: Outlook, own: dict[str, Outlook]) -> list[str]:
    padding = 1 - best.made["efficiency"]
    reasons = [f"a row holds {best.conversations_per_row:.1f} conversations and {padding:.2%} padding"]
    if padded := own.get("padding"):
        ratio = padded.made["slots"] / best.made["slots"]
        slots = f"{best.made['slots']:,}"
        reasons.append(f"an epoch computes {slots} slots, {ratio:.1f} times fewer than `padding`")
    if free := own.get("padding_free"):
        slots = f"{free.made['slots']:,}"
        reasons.append(
            f"`padding_free` computes about as much ({slots}), in batches whose size varies from step to step"
        )
    reasons.append(
        "documents stay whole and apart: with the same conversations in a step, the gradient is that of padding"
    )
    return reasons


def _of_length(best: Outlook, safe: list[Outlook], longest: int) -> str:
    share = f"at {best.max_length:,} tokens a row, {lost(best):.2%} of the training tokens are cut or dropped"
    others = [cell for cell in safe if cell.arm == best.arm]
    if lost(best) > FREE_OF_LOSS:
        less = [f"{lost(cell):.2%} at {cell.max_length:,}" for cell in others if cell.max_length > best.max_length]
        return f"{share} ({', '.join([*less, f'none at {longest:,}, the longest conversation'])})"
    shorter = [
        cell.max_length for cell in others if cell.max_length < best.max_length and lost(cell) <= FREE_OF_LOSS
    ]
    return f"{share}; {min(shorter):,} would do too, with more steps of fewer conversations" if shorter else share


def _keeps_the_objective(arm: ArmSpec) -> bool:
    return arm.attention == "document" and arm.loss == "token" and not arm.validation_after_packing


def lost(cell: Outlook) -> float:
    """Share of the training part's tokens that this arm never trains on."""
    ledger = cell.made
    gone = ledger["tokens_truncated"] + ledger["tokens_dropped"]
    return float(gone / max(1, gone + ledger["tokens_kept"]))
