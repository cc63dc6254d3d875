"""The loss of a batch as a sum; who divides it by what is `loop.py`'s one line."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from packcli.model.attention import Segments
from packcli.model.collate import Batch


def token_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Sum of cross entropies over the batch's labels, fp32, a scalar that always carries a gradient.

    The head is computed only where there is a label: exact, and with short answers most of its cost saved.
    """
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        segments=Segments(batch.segments),
        logits_to_keep=batch.predict if len(batch.predict) else 1,
        use_cache=False,
    )
    logits: torch.Tensor = output.logits[0].float()
    if not len(batch.labels):
        # A rank without a label in this micro-batch still takes part in every collective of the backward pass.
        return logits.sum() * 0.0
    return F.cross_entropy(logits, batch.labels, reduction="sum")
