"""What a cell will cost, from counts that are known before it runs. Pure.

Rows and steps are exact once the row index exists. Hours need a measured rate of a cluster, so without one
they are null: never a guess.
"""

from __future__ import annotations

from packcli import flops
from packcli.config import Spec


class Estimate(Spec):
    """`flops`: model FLOPs of the whole run. null: not known yet (`packcli prepare` first), or no rate given."""

    rows: int | None = None
    steps: int | None = None
    flops: float | None = None
    hours: float | None = None
    gpu_hours: float | None = None


def estimate(
    *, rows: int, steps: int, tokens: int, squares: int, supervised: int, shape: flops.Shape | None
) -> Estimate:
    """`tokens`, `squares` (sum of squared segment lengths) and `supervised` count the whole run."""
    total = (
        flops.training(shape, tokens=tokens, squares=squares, supervised=supervised) if shape is not None else None
    )
    return Estimate(rows=rows, steps=steps, flops=total)


def total(estimates: list[Estimate]) -> Estimate:
    """Sums over cells; null where any cell's is null."""

    def add(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if values and len(known) == len(values) else None

    rows, steps = (add([getattr(e, key) for e in estimates]) for key in ("rows", "steps"))
    return Estimate(
        rows=None if rows is None else int(rows),
        steps=None if steps is None else int(steps),
        flops=add([e.flops for e in estimates]),
    )
