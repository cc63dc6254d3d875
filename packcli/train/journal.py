"""`metrics.jsonl` while a run goes on: one line a step, from which its results are read at its end."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from packcli.errors import IntegrityError
from packcli.files import atomic_write, json_line, sha256_file
from packcli.plan import TrainOrder
from packcli.store import Store
from packcli.train import trackers
from packcli.train.distributed import Processes


@contextlib.contextmanager
def writing(
    order: TrainOrder, store: Store, resume_step: int, processes: Processes
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What appends one JSON line a step and shows it to the trackers; on rank 0, the others write nothing.

    Flushed each time, so a killed run keeps all but a torn last line.
    """
    if not processes.is_main:
        yield lambda record: None
        return
    watched = trackers.open_trackers(
        order.train.trackers,
        store.tracker_logs(order.id),
        run_id=order.id,
        name=order.id,
        config=order.model_dump(mode="json"),
        resume_step=resume_step,
    )
    with watched, store.metrics(order.id).open("ab") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json_line(record))
            file.flush()
            watched.log(record)

        yield write


def synced(store: Store, train_id: str) -> str:
    """sha256 of `metrics.jsonl` so far, which is on disk then: a run's results are read from it at its end."""
    with store.metrics(train_id).open("rb") as file:
        os.fsync(file.fileno())
    return sha256_file(store.metrics(train_id))


def truncate(store: Store, train_id: str, step: int, sha256: str | None) -> None:
    """Cut `metrics.jsonl` to the steps of a checkpoint. `sha256`: of these, as the checkpoint has it.

    Raises:
        IntegrityError: they are others now.
    """
    path = store.metrics(train_id)
    content = path.read_bytes() if path.exists() else b""
    kept = b"".join(line + b"\n" for line in content.split(b"\n")[:-1][:step])
    if sha256 not in (None, hashlib.sha256(kept).hexdigest()):
        cause = (
            f"{path}: its first {step:,} lines are not those that were there at the checkpoint of step {step:,}"
        )
        raise IntegrityError(cause, f"delete {path.parent} and run again")
    with atomic_write(path) as file:
        file.write(kept)
