"""One rank of several that talk to each other, in a process of its own (`elsewhere.py`).

By torch alone: what trains imports three times as much, and each rank would.
"""

from __future__ import annotations

import os
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from packcli.errors import RunError

_TIMEOUT = timedelta(seconds=30)
_BYTES = {"gloo": 4 << 20, "nccl": 256 << 20}
_REPEATS = 5


def exchange(backend: str) -> dict[str, Any]:
    """Ranks as torchrun's environment describes them add up their numbers, and time it.

    Raises:
        RunError: the sum is another one.
    """
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=_TIMEOUT)
    given = torch.full((_BYTES[backend] // 4,), float(rank + 1), device=device)
    times = []
    for _ in range(1 + _REPEATS):
        total = given.clone()
        began = time.perf_counter()
        dist.all_reduce(total)
        wrong = int((total != ranks * (ranks + 1) / 2).sum())  # waits for the device, too
        times.append(time.perf_counter() - began)
        if wrong:
            raise RunError(f"{ranks} processes sum their numbers to another sum", "")
    dist.destroy_process_group()
    seconds = statistics.median(times[1:])  # the first one connects
    moved = 2 * (ranks - 1) / ranks * _BYTES[backend]
    return {"ranks": ranks, "bytes": _BYTES[backend], "bus_gb_per_s": moved / seconds / 1e9}
