"""What every worker of the GPU benchmark needs: one JSON line a result, and times of work on a device."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch


def setting() -> dict[str, Any]:
    """What this process was asked to do."""
    found: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return found


def emit(kind: str, **fields: Any) -> None:
    """One result, on stdout at once: what a process has said stays when it is stopped."""
    print(json.dumps({"kind": kind, **fields}), flush=True)


@contextmanager
def recorded(kind: str, **fields: Any) -> Iterator[None]:
    """A part that may fail without ending the process. Running out of memory ends it: the next setting is due."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if "device-side" in str(error) or "illegal memory" in str(error):
            raise  # the CUDA context is gone
        cause = " ".join(str(error).split())[:400]
        emit(kind, **fields, failed=f"{type(error).__name__}: {cause}")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and range, in milliseconds."""
    return {
        "ms": 1e3 * median(seconds),
        "least_ms": 1e3 * min(seconds),
        "most_ms": 1e3 * max(seconds),
        "n": len(seconds),
    }


def timed(call: Callable[[], Any], device: torch.device, *, budget_s: float = 0.15, least: int = 3) -> list[float]:
    """Seconds of each of several calls, after warming up: CUDA events on a GPU, the wall clock elsewhere."""
    for _ in range(2):
        call()
    seconds: list[float] = []
    synchronize(device)
    while len(seconds) < least or sum(seconds) < budget_s:
        if device.type == "cuda":
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            call()
            ended.record()
            ended.synchronize()
            seconds.append(begun.elapsed_time(ended) / 1e3)
        else:
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return seconds


def device_of(name: str) -> torch.device:
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")
