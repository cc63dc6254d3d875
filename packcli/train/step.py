"""The gradient of one step: the same whatever the micro-batches and however many the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from packcli import batching, flops
from packcli.batching import Ints
from packcli.data.framed import Reader
from packcli.data.index import Index
from packcli.model.collate import collate
from packcli.model.trainee import Trainee
from packcli.plan import TrainOrder
from packcli.train import distributed
from packcli.train.distributed import Processes
from packcli.train.loss import Weighting


@dataclass(frozen=True, slots=True)
class Objective:
    """What a run minimises. `costs` [R] float64: what each row costs to compute, to balance ranks."""

    order: TrainOrder
    tokens: Reader
    rows: Index
    weighting: Weighting
    costs: NDArray[np.float64]
    pad_id: int
    processes: Processes

    def backward(self, trainee: Trainee, chosen: Ints) -> tuple[float, int]:
        """Add the gradient of the step's loss over rows `chosen` to the parameters; its loss and its slots.

        Every rank calls this with the same rows; loss and slots are those of all ranks.
        """
        processes, supervised = self.processes, self.rows.supervised
        shares = self.shares(chosen)
        divisor = max(1.0, self.weighting.divisor(chosen, [own for share in shares for own in share], supervised))
        slots, total = 0, torch.zeros((), device=processes.device)
        own_share = shares[processes.rank]
        for number, own in enumerate(own_share):
            batch = collate(
                self.tokens,
                self.rows,
                own.tolist(),
                self.order.arm,
                self.order.max_length,
                self.pad_id,
                self.weighting.pieces,
            )
            distributed.reduce_over_replicas(trainee, number == len(own_share) - 1)
            summed = trainee(batch.to(processes.device)) * self.weighting.scale(own, supervised)
            # Divided by what the step holds on all ranks, so micro-batches and ranks only split a sum. Sharding
            # averages gradients over ranks; the factor undoes that.
            torch.autograd.backward(summed * (processes.world / divisor))
            total += summed.detach()
            slots += batch.num_slots if len(own) else 0
        counted = processes.sum(torch.tensor([slots], device=processes.device))
        return float(processes.sum(total)) / divisor, int(counted.item())

    def shares(self, chosen: Ints) -> list[list[Ints]]:
        """Each rank's micro-batches of a step."""
        # Where how rows share a micro-batch is part of the result, it is that of `train.ranks` processes.
        fixed = self.order.arm.loss == "micro_batch" or self.order.arm.pad_to == "longest"
        return batching.micro_batches(chosen, self.costs, self.order.train, self.processes.world, fixed=fixed)


def costs(order: TrainOrder, rows: Index, shape: flops.Shape | None) -> NDArray[np.float64]:
    """[R] float64: what each row costs, slots + a x sum(length^2); a follows from the model's shape, if known."""
    padded = order.arm.pad_to == "max_length"
    slots = np.full(rows.rows.num_rows, order.max_length) if padded else rows.filled
    if shape is None:
        return slots.astype(np.float64)
    square = flops.training(shape, tokens=0, squares=1, supervised=0)
    slot = flops.training(shape, tokens=1, squares=0, supervised=0)
    return np.asarray(slots + square / slot * rows.squares(order.arm.attention), dtype=np.float64)
