"""Resumable state at step boundaries: torch's distributed checkpoint behind a manifest of checksums.

A directory without a manifest was never finished and is ignored. DCP's own metadata is a pickle, and a flipped
byte in its tensors loads silently: so nothing is read before every checksum of our manifest holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from packcli.files import read_json, write_json
from packcli.store import MANIFEST, Store, records, verify
from packcli.train.distributed import Processes


def save(
    store: Store, train: str, step: int, model: Any, optimizer: Any, progress: dict[str, Any], processes: Processes
) -> None:
    """Write `checkpoint-<step>`; `progress` is kept beside the tensors."""
    path = store.checkpoint(train, step)
    if processes.is_main:
        store.remove(path)
    processes.barrier()
    weights, state = get_state_dict(model, optimizer)
    dcp.save(  # type: ignore[attr-defined]
        {"model": weights, "optimizer": state}, checkpoint_id=path, no_dist=processes.world == 1
    )
    processes.barrier()
    if processes.is_main:
        write_json(Store.progress(path), {"step": step, **progress})
        outputs = {name: record.model_dump() for name, record in records(path).items()}
        write_json(path / MANIFEST, {"step": step, "outputs": outputs})
    processes.barrier()


def latest(store: Store, train: str) -> Path | None:
    """The newest finished checkpoint, its checksums verified.

    Raises:
        IntegrityError: it is finished but a file of it changed.
    """
    for _, path in store.checkpoints(train):
        if (path / MANIFEST).exists():
            verify(path)
            return path
    return None


def restore(path: Path, model: Any, optimizer: Any, processes: Processes) -> dict[str, Any]:
    """Load a checkpoint written with any number of processes; its progress."""
    weights, state = get_state_dict(model, optimizer)
    loaded: dict[str, Any] = {"model": weights, "optimizer": state}
    dcp.load(  # type: ignore[attr-defined]
        loaded, checkpoint_id=path, no_dist=processes.world == 1
    )
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    progress: dict[str, Any] = read_json(Store.progress(path))
    return progress


def prune(store: Store, train: str, keep: int) -> None:
    """Delete all but the newest `keep` finished checkpoints, and every unfinished one."""
    finished = 0
    for _, path in store.checkpoints(train):
        finished += (path / MANIFEST).exists()
        if finished > keep or not (path / MANIFEST).exists():
            store.remove(path)


def full_weights(model: Any) -> dict[str, Any]:
    """Whole, unsharded weights on rank 0's CPU (empty on other ranks)."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
