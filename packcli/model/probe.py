"""Start-up probe: does this model, with this attention, keep documents apart (or let them meet) as the arm says?

Tested on the loaded model itself, because layers leak in their own ways; the result goes into the manifest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from packcli.config import ArmSpec
from packcli.errors import RunError
from packcli.model.collate import Batch
from packcli.model.trainee import Trainee

_LENGTHS = (7, 9)


@dataclass(frozen=True, slots=True)
class Isolation:
    """`expected`: what the arm asks for. `crosses`: whether changing document 1 moved document 2's logits."""

    expected: str
    crosses: bool
    device: str

    def record(self) -> dict[str, Any]:
        return asdict(self)


def isolation(model: Trainee, arm: ArmSpec, vocab_size: int) -> Isolation:
    """Change the first of two packed documents and compare the second's logits, bit for bit.

    Raises:
        RunError: documents meet although the arm masks them, or stay apart although it does not.
    """
    device = next(model.parameters()).device
    total, first = sum(_LENGTHS), _LENGTHS[0]
    ids = (torch.arange(total, device=device) * 7 + 3) % vocab_size
    changed = ids.clone()
    changed[:first] = (changed[:first] + 1) % vocab_size
    lengths = _LENGTHS if arm.attention == "document" else (total,)
    starts = [torch.arange(length, device=device) for length in _LENGTHS]
    positions = torch.cat(starts) if arm.positions == "reset" else torch.arange(total, device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        none = torch.zeros(0, dtype=torch.int64, device=device)
        one, other = (
            model(Batch(tokens[None], positions[None], lengths, none, none), "hidden")[first:]
            for tokens in (ids, changed)
        )
    model.train(was_training)
    crosses = not torch.equal(one, other)
    if crosses != (arm.attention == "causal"):
        found = "one document's tokens change another's outputs" if crosses else "packed documents never meet"
        raise RunError(
            f"start-up probe: the arm asks for `attention: {arm.attention}`, but {found} in this model",
            "this model or attention backend cannot run this arm",
        )
    return Isolation(expected=arm.attention, crosses=crosses, device=device.type)
