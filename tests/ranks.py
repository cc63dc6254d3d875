"""Run under torchrun by `test_distributed.py`: one rank of a job read from a JSON file.

{"runs": DIR, "per_node": N, "gradients": [...], "train": [order, ...]}; gradients go to `gradient-<i>.pt`.
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
from packcli.train import distributed


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
    for order in job.get("train", []):
        stages.train(TrainOrder.model_validate(order), store)
    distributed.finish()


main()
