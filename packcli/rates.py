"""How fast a slot is computed: as the sweep says, else as published for such a model on such a card. Pure.

The published figures are in rates.yaml, with their sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib import resources

from packcli import flops, memory, shapes
from packcli.config import EstimateSpec, Gpu, PositiveFloat, Spec
from packcli.yamlfile import parse

AS_FULL = "; rows padded to the longest of a shuffled micro-batch count as full ones, as they took as long there"
_LIKE = 3.0
"""A rate serves models up to so many times smaller or larger than the one it was measured with."""


@dataclass(frozen=True, slots=True)
class SlotRate:
    """`mfu`: model FLOPs of all slots, padding included, over the dense peak.

    as_full   it was measured where shuffled rows, padded to the longest of their micro-batch, took as long as full
              ones: ranks wait for each other, and one of them nearly always has a full row.
    text      where it comes from, for the user.
    """

    mfu: float
    as_full: bool
    text: str


class Published(Spec):
    """`model`: a name in shapes.yaml. `tokens_per_s`: of one GPU, on full rows of `max_length`."""

    model: str
    gpu: Gpu
    max_length: int
    tokens_per_s: PositiveFloat
    as_full: bool = False
    setup: str
    source: str

    @property
    def shape(self) -> flops.Shape:
        return shapes.packaged()[self.model]

    @property
    def mfu(self) -> float:
        """By our own count of FLOPs: attention as masked by causality, the head at every token."""
        row, peak = self.max_length, memory.peak_flops(self.gpu)
        assert peak is not None, self.gpu
        work = flops.training(self.shape, tokens=row, squares=row * row, supervised=row)
        return work / row * self.tokens_per_s / peak


def slot_rate(spec: EstimateSpec, shape: flops.Shape) -> SlotRate | None:
    """`slot_mfu` where it is given; else that published for the nearest model on this card, or one of its peak.

    None: no cluster is named, or nothing like it was published: no hours then, and no guess.
    """
    if spec.cluster is None:
        return None
    if spec.slot_mfu is not None:
        return SlotRate(spec.slot_mfu, as_full=False, text=f"slot MFU {spec.slot_mfu:g}, given")
    gpu, size = spec.cluster.gpu, memory.parameters(shape)

    def distance(one: Published) -> float:
        return abs(math.log(memory.parameters(one.shape) / size))

    alike = [one for one in _published() if memory.peak_flops(one.gpu) == memory.peak_flops(gpu)]
    alike = [one for one in alike if distance(one) <= math.log(_LIKE)]
    if not alike:
        return None
    best = min(alike, key=lambda one: (one.gpu != gpu, distance(one)))
    model = best.model.partition("/")[2]
    text = f"slot MFU {best.mfu:.3f}, of {model} on {best.gpu} ({best.setup}): {best.source}"
    return SlotRate(best.mfu, best.as_full, text)


@cache
def _published() -> tuple[Published, ...]:
    name = "rates.yaml"
    text = (resources.files("packcli") / name).read_text(encoding="utf-8")
    return tuple(Published.model_validate(one) for one in parse(text, name)[0]["rates"])
