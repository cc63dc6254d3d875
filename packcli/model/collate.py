"""Rows as one flat batch. The only file that makes `position_ids` and attention segments.

Every layout becomes one sequence of N slots: padded rows lie end to end, each with its padding computed, so
that what padding costs is really paid; packed and padding-free rows lie end to end too. Where attention may
look is said once, by `segments`; where a loss falls, by `predict` and `labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from packcli import batching
from packcli.config import ArmSpec
from packcli.data.framed import Reader
from packcli.data.index import Index


@dataclass(frozen=True, slots=True)
class Batch:
    """N slots, M labels.

    input_ids, position_ids   [1, N] int64
    segments                  lengths of the runs of slots within which attention is causal; they sum to N
    predict                   [M] int64, slots whose hidden state predicts a label (already shifted by one)
    labels                    [M] int64, the tokens to predict
    weights                   [M] float32, of each label in the loss; None: all count 1
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[int, ...]
    predict: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor | None = None

    @property
    def num_slots(self) -> int:
        return int(self.input_ids.shape[1])

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            moved(self.input_ids),
            moved(self.position_ids),
            self.segments,
            moved(self.predict),
            moved(self.labels),
            None if self.weights is None else moved(self.weights),
        )


def collate(
    tokens: Reader,
    index: Index,
    rows: Sequence[int],
    arm: ArmSpec,
    max_length: int,
    pad_id: int,
    piece_weights: np.ndarray | None = None,
) -> Batch:
    """The rows given, in order. No rows: one slot without a label, so that every rank has a forward pass.

    `piece_weights` [S] float: what each label of a piece of the index counts in the loss.
    """
    flat = _Flat()
    width = _width(index, rows, arm, max_length)
    for row in rows:
        filled, begun, previous = 0, 0, -1
        for piece in range(index.rows.offsets[row], index.rows.offsets[row + 1]):
            document = int(index.rows.document[piece])
            start, stop = int(index.rows.start[piece]), int(index.rows.stop[piece])
            if document != previous:  # else it goes on after a turn that was cut short
                previous, begun = document, filled
                if arm.attention == "document":
                    flat.segments.append(0)
            if arm.attention == "document":
                flat.segments[-1] += stop - start
            offset = filled if arm.positions == "continue" else filled - begun
            weight = None if piece_weights is None else float(piece_weights[piece])
            # The first token of a document in a row is no label, whatever the span says.
            flat.add(
                tokens.ids(document)[start:stop],
                offset,
                tokens.supervised(document) - start,
                filled > begun,
                weight,
            )
            filled += stop - start
        if padding := max(0, width - filled):
            flat.pad(padding, filled, pad_id)
        _close_row(flat.segments, arm, filled, padding)
    if not flat.slots:
        flat.pad(1, 0, pad_id)
        flat.segments.append(1)
    return Batch(
        input_ids=_tensor(flat.ids)[None],
        position_ids=_tensor(flat.positions)[None],
        segments=tuple(flat.segments),
        predict=_tensor(flat.predict),
        labels=_tensor(flat.labels),
        weights=None if piece_weights is None else torch.tensor(flat.weights, dtype=torch.float32),
    )


class _Flat:
    """A batch while it grows."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[int] = []
        self.predict: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.weights: list[float] = []
        self.slots = 0

    def add(self, ids: np.ndarray, offset: int, spans: np.ndarray, continued: bool, weight: float | None) -> None:
        """A piece; `spans` [P, 2] relative to its first token, `offset` its first position."""
        for start, stop in spans:
            target = np.arange(max(int(start), 0 if continued else 1), min(int(stop), len(ids)))
            self.predict.append(target + (self.slots - 1))
            self.labels.append(ids[target])
            if weight is not None:
                self.weights += [weight] * len(target)
        self.ids.append(ids)
        self.positions.append(np.arange(offset, offset + len(ids)))
        self.slots += len(ids)

    def pad(self, count: int, offset: int, pad_id: int) -> None:
        self.ids.append(np.full(count, pad_id))
        self.positions.append(np.arange(offset, offset + count))
        self.slots += count


def _width(index: Index, rows: Sequence[int], arm: ArmSpec, max_length: int) -> int:
    """Slots of each row; 0: as many as it has tokens."""
    match arm.pad_to:
        case "none":
            return 0
        case "max_length":
            return max_length
        case "longest":
            return batching.longest(index.filled[list(rows)], max_length) if len(rows) else 0


def _close_row(segments: list[int], arm: ArmSpec, filled: int, padding: int) -> None:
    """Padding at the end of a row: attention is causal, so it may share a segment and harm nothing before it."""
    if arm.attention == "causal":
        segments.append(filled + padding)
    elif arm.layout == "pad":
        # Equal segments of max_length run as one batched kernel, as padded training does elsewhere.
        segments[-1] += padding
    elif padding:
        segments.append(padding)


def _tensor(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts], dtype=np.int64))
