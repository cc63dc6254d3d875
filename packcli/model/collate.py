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

from packcli.config import ArmSpec
from packcli.data.index import Index
from packcli.data.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """N slots, M labels.

    input_ids, position_ids   [1, N] int64
    segments                  lengths of the runs of slots within which attention is causal; they sum to N
    predict                   [M] int64, slots whose hidden state predicts a label (already shifted by one)
    labels                    [M] int64, the tokens to predict
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[int, ...]
    predict: torch.Tensor
    labels: torch.Tensor

    @property
    def num_slots(self) -> int:
        return int(self.input_ids.shape[1])

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        moved = [
            t.to(device, non_blocking=True) for t in (self.input_ids, self.position_ids, self.predict, self.labels)
        ]
        return Batch(moved[0], moved[1], self.segments, moved[2], moved[3])


def collate(
    tokens: Tokens, index: Index, rows: Sequence[int], arm: ArmSpec, max_length: int, pad_id: int
) -> Batch:
    """The rows given, in order. No rows: one slot without a label, so that every rank has a forward pass."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[int] = []
    predict: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    slot = 0
    for row in rows:
        first, last = index.rows.offsets[row], index.rows.offsets[row + 1]
        filled = 0
        for piece in range(first, last):
            document = int(index.rows.document[piece])
            start, stop = int(index.rows.start[piece]), int(index.rows.stop[piece])
            length = stop - start
            piece_ids = tokens.ids(document)[start:stop]
            ids.append(piece_ids)
            offset = filled if arm.positions == "continue" else 0
            positions.append(np.arange(offset, offset + length))
            # Relative to the piece; its first token is no label, whatever the span says.
            for span_start, span_stop in tokens.supervised(document) - start:
                target = np.arange(max(int(span_start), 1), min(int(span_stop), length))
                predict.append(target + (slot + filled - 1))
                labels.append(piece_ids[target])
            if arm.attention == "document":
                segments.append(length)
            filled += length
        padding = max_length - filled if arm.pad_to == "max_length" else 0
        if padding:
            ids.append(np.full(padding, pad_id))
            positions.append(np.arange(filled, filled + padding))
        _close_row(segments, arm, filled, padding)
        slot += filled + padding
    if not slot:
        ids, positions, segments = [np.full(1, pad_id)], [np.zeros(1, np.int64)], [1]
    return Batch(
        input_ids=_tensor(ids)[None],
        position_ids=_tensor(positions)[None],
        segments=tuple(segments),
        predict=_tensor(predict),
        labels=_tensor(labels),
    )


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
