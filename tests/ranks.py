"""Run under torchrun by `test_distributed.py`: one rank of a job read from a JSON file.

{"runs": DIR, "per_node": N, "gradients": [...], "train": [order, ...]}; gradients go to `gradient-<i>.pt`, with
"rounded" the sums of rounded moments to `rounded-<rank>.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from training import one_step

from packcli import stages
from packcli.plan import TrainOrder
from packcli.store import Store
from packcli.train import distributed, optim


def main() -> None:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    if job.get("per_node"):
        os.environ["LOCAL_WORLD_SIZE"] = str(job["per_node"])  # as on a cluster of smaller nodes
    torch.set_num_threads(1)
    store = Store(Path(job["runs"]))
    for number, asked in enumerate(job.get("gradients", [])):
        loss, found = one_step(store, TrainOrder.model_validate(asked["order"]), np.asarray(asked["rows"]))
        if distributed.rank() == 0:
            torch.save((loss, found), path.with_name(f"gradient-{number}.pt"))
    rounded = _recorded_rounding() if job.get("rounded") else []
    for order in job.get("train", []):
        stages.train(TrainOrder.model_validate(order), store)
    if job.get("rounded"):
        path.with_name(f"rounded-{distributed.rank()}.json").write_text(json.dumps(rounded))
    distributed.finish()


def _recorded_rounding() -> list[float]:
    """What every moment that was rounded at random sums to, as training goes on."""
    found: list[float] = []
    stochastic = optim.stochastic

    def recorded(value: torch.Tensor) -> torch.Tensor:
        rounded = stochastic(value)
        found.append(float(rounded.double().sum()))
        return rounded

    optim.stochastic = recorded
    return found


main()
