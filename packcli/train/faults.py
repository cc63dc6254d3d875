"""Failures of the machine, told apart from bugs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from packcli.errors import OutOfMemoryError, PeerError
from packcli.files import disk_full

# What raises a bare RuntimeError: torch's allocator of the CPU, what CUDA, cuBLAS and NCCL take for themselves.
_ALLOCATORS = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Failed to CUDA calloc",
)


@contextlib.contextmanager
def memory(step: Callable[[], int], micro_batch: int) -> Iterator[None]:
    """Around the steps; `step` says which one is being done, counted from 1.

    Raises:
        OutOfMemoryError: in place of torch's or Python's, saying what to change. One rank alone may raise it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        detail = " ".join(str(error).split())
        raise OutOfMemoryError(
            f"step {step()}: out of memory with micro_batch {micro_batch}"
            + (f": {detail[:200]}" if detail else ""),
            "lower `train.micro_batch`, or set `train.checkpointing: full`; either changes no result "
            "(but the cut of `loss: micro_batch`)",
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    kinds = torch.OutOfMemoryError | MemoryError
    return isinstance(error, kinds) or any(words in str(error) for words in _ALLOCATORS)


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Around what talks to other ranks.

    Raises:
        PeerError: in place of what torch raises when one of them is gone (gloo a bare RuntimeError).
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        cause = f"lost another rank: {' '.join(str(error).split())[:200]}"
        raise PeerError(cause, "the rank that ended first says why; run the same command again") from error


@contextlib.contextmanager
def disk(directory: Path) -> Iterator[None]:
    """Around what writes below `directory`: logs and weights are written by those who know nothing of full disks.

    Raises:
        MissingError, ConfigError: in place of what a full disk, or one that nobody may write to, raises.
    """
    try:
        yield
    except OSError as error:
        raise disk_full(error, directory) from None
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise disk_full(OSError(int(found[1]), str(error)), directory) from None
