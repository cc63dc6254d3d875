"""What a label counts in the loss, and what a step's sum is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from packcli.config import Loss
from packcli.data.index import Index, Labels, supervised

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Weighting:
    """What a label counts, and what a step's weighted sum is divided by.

    `pieces` [S] float64: the weight of each label in each piece of the index; None: all count 1.
    `rows` [R] float64: what each row adds to the divisor of its step.

        token         1 each, divided by the step's supervised tokens
        document      1 / N_i, N_i = supervised tokens of the document in the epoch; divided by the documents that
                      start in the step (LongAlign, arXiv 2401.18058, equation 4)
        row           1 / supervised tokens of its row; divided by the rows that have any
        micro_batch   1 / supervised tokens of its micro-batch; divided by the micro-batches that have any
    """

    kind: Loss
    pieces: NDArray[np.float64] | None
    rows: NDArray[np.float64]

    def divisor(self, chosen: Ints, micro_batches: Sequence[Ints], supervised: Ints) -> float:
        """Of one step: `chosen` rows on all ranks, cut into `micro_batches` over all ranks."""
        if self.kind == "micro_batch":
            return float(sum(1 for rows in micro_batches if supervised[rows].sum()))
        return float(self.rows[chosen].sum())

    def scale(self, rows: Ints, supervised: Ints) -> float:
        """A further factor on one micro-batch's sum: its mean under `micro_batch`."""
        return 1.0 / max(1, int(supervised[rows].sum())) if self.kind == "micro_batch" else 1.0


def weighting(kind: Loss, index: Index, labels: Labels) -> Weighting:
    match kind:
        case "token" | "micro_batch":
            return Weighting(kind, None, index.supervised.astype(np.float64))
        case "document":
            return Weighting(kind, _per_document(index, labels), index.documents.astype(np.float64))
        case "row":
            pieces = np.repeat(1.0 / np.maximum(index.supervised, 1), np.diff(index.rows.offsets))
            return Weighting(kind, pieces, (index.supervised > 0).astype(np.float64))


def _per_document(index: Index, labels: Labels) -> NDArray[np.float64]:
    """[S] float64: 1 / supervised tokens of the piece's document that reach the loss in that epoch."""
    counts = supervised(index.rows, labels).astype(np.float64)
    weights = np.zeros_like(counts)
    for first, last in pairwise(index.rows.offsets[index.blocks].tolist()):
        document = index.rows.document[first:last]
        totals = np.bincount(document, counts[first:last])
        weights[first:last] = 1.0 / np.maximum(totals[document], 1)
    return weights
