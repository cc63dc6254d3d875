"""Randomness: one generator per (seed, purpose, epoch), never per arm.

`padding` and `padding_free` therefore see the same order, and resuming needs no generator state on disk.
"""

from typing import Literal

import numpy as np

Purpose = Literal["init", "pack", "order", "dropout", "group", "rounding"]
_PURPOSES: tuple[Purpose, ...] = ("init", "pack", "order", "dropout", "group", "rounding")


def rng(seed: int, purpose: Purpose, epoch: int = 0) -> np.random.Generator:
    """The generator of one purpose in one epoch, counted from 0 (for `dropout`: in one step)."""
    return np.random.default_rng([seed, _PURPOSES.index(purpose), epoch])


def integer(seed: int, purpose: Purpose, epoch: int = 0) -> int:
    """A 63-bit integer of the same stream, for libraries that want a number (torch.manual_seed)."""
    return int(rng(seed, purpose, epoch).integers(2**63 - 1))
