"""Resumable state at step boundaries: torch's distributed checkpoint behind a manifest of checksums.

A directory without a manifest was never finished and is ignored. DCP's own metadata is a pickle, and a flipped
byte in its tensors loads silently: so nothing is read before every checksum of our manifest holds.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.utils._pytree import tree_leaves, tree_map_only

from packcli.commit_points import passing
from packcli.errors import IntegrityError, MissingError, PackcliError, RunError
from packcli.files import disk_full, read_json, read_sealed, sha256_file, write_json, write_sealed
from packcli.log import logger
from packcli.store import MANIFEST, FileRecord, Store, check_listed, listed
from packcli.train.distributed import Processes

_LAST_WRITE_S = 60.0


class Checkpoints:
    """Those of one training; every rank makes one and calls the same methods.

    keep         how many to keep; an older one is deleted only after a newer one was read back and hashed.
    background   copy the state, then write, hash and prune while training goes on.
    """

    def __init__(
        self,
        store: Store,
        train: str,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        *,
        keep: int,
        background: bool,
    ) -> None:
        self._store, self._train, self._processes = store, train, processes
        self._model, self._optimizer = model, optimizer
        self._keep, self._background = keep, background
        # Collectives of the writing thread must not meet those of the training.
        self._group = dist.new_group(backend="gloo") if processes.world > 1 else None
        frozen = any(not parameter.requires_grad for parameter in model.parameters())
        # What LoRA freezes is the model that was loaded; it is loaded again.
        self._options = StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The training is over, well or not: nobody may find a checkpoint still being written."""
        if kind is None:
            self.wait()
        elif self._thread is not None:
            # It may wait for a rank that is gone. Alone it does not, and a worker that lives on is not to write
            # what somebody else then trains.
            self._thread.join(_LAST_WRITE_S if self._processes.world > 1 else None)
            if self._error is not None:  # what ended the training is raised; this would go unseen
                logger.warning("the checkpoint being written was not finished: %s", self._error)

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """Write `checkpoint-<step>`; `progress` is kept beside the tensors.

        Raises:
            MissingError: the disk is full. The checkpoint before is kept. In the background: raised by the next
                `save` or `wait`.
        """
        self.wait()
        path = self._store.checkpoint(self._train, step)
        state = self._state()
        if self._processes.is_main:
            self._store.remove(path)
        self._check_space(state, path)  # which no rank passes before rank 0
        if self._background:
            copied = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
            arguments = (copied, path, step, progress)
            self._thread = threading.Thread(target=self._write_aside, args=arguments, daemon=True)
            self._thread.start()
        else:
            self._write(state, path, step, progress)

    def wait(self) -> None:
        """Until the checkpoint being written is there; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def restore(self, *, fallback: bool) -> dict[str, Any] | None:
        """Load the newest finished checkpoint, whatever number of processes wrote it; its progress, None if none.

        What cannot be gone on from is deleted: it takes room, and would count as progress.

        Raises:
            IntegrityError: a file of it is missing or changed; with `fallback`, the one before is taken instead.
        """
        for path in self._processes.gather(self._finished() if self._processes.is_main else [])[0]:
            problem = self._problem(path)
            if problem is None:
                self._load(path)
                progress: dict[str, Any] = read_json(Store.progress(path))
                return progress
            if not fallback:
                fix = f"--allow-fallback goes on from the checkpoint before it, if any; or delete {path}"
                raise IntegrityError(problem, fix)
            if self._processes.is_main:
                logger.warning("%s; deleted, going on from the checkpoint before it, or from the start", problem)
                self._store.remove(path)
        return None

    def clear(self) -> None:
        """Delete all: the training is done. Other ranks wait until rank 0 comes here."""
        if self._processes.is_main:
            self._store.clear_checkpoints(self._train)
        self._barrier()

    def _state(self) -> dict[str, Any]:
        weights, state = get_state_dict(self._model, self._optimizer, options=self._options)
        return {"model": weights, "optimizer": state}

    def _check_space(self, state: dict[str, Any], path: Path) -> None:
        """Before the first byte: a half-written checkpoint fills the disk for everybody."""
        # Whole tensors, not the shards here: what replicas hold in common is written once.
        needed = sum(t.numel() * t.element_size() for t in tree_leaves(state) if isinstance(t, torch.Tensor))
        free = self._processes.gather(self._store.free_bytes(), self._group)[0]
        if free < needed:
            raise MissingError(
                f"{path}: a checkpoint takes {needed:,} bytes, {free:,} are free",
                "free some space and run the same command again; the checkpoint before is kept",
            )

    def _write_aside(self, state: dict[str, Any], path: Path, step: int, progress: dict[str, Any]) -> None:
        try:
            self._write(state, path, step, progress)
        except BaseException as error:  # raised where the training waits for this thread
            self._error = error

    def _write(self, state: dict[str, Any], path: Path, step: int, progress: dict[str, Any]) -> None:
        processes = self._processes
        try:
            passing(path, "before")
            dcp.save(  # type: ignore[attr-defined]
                state, checkpoint_id=path, no_dist=processes.world == 1, process_group=self._group
            )
            passing(path, "after")
            if processes.is_main:
                write_json(Store.progress(path), {"step": step, **progress})
            # Each rank reads back and hashes what it wrote: one for all would take minutes for a large model.
            own = {file.name: _record(file) for file in path.iterdir() if _is_of(file, processes.rank)}
            outputs: dict[str, Any] = {}
            for found in processes.gather(own, self._group):
                outputs.update(found)
            if processes.is_main:
                write_sealed(path / MANIFEST, {"train": self._train, "step": step, "outputs": outputs})
        except (OSError, CheckpointException, PackcliError) as error:
            if processes.is_main:
                self._store.remove(path)
            raise _explained(error, path) from None
        if processes.is_main:
            prune(self._store, self._train, self._keep)
        self._barrier()

    def _finished(self) -> list[Path]:
        """Newest first; unfinished ones are named and deleted."""
        finished = []
        for _, path in self._store.checkpoints(self._train):
            if self._store.is_whole(path):
                finished.append(path)
            else:
                logger.warning("%s was not finished: it is deleted", path.name)
                self._store.remove(path)
        return finished

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, the same on every rank; each rank reads its share of the files."""
        found: str | None = None
        try:
            if read_sealed(path / MANIFEST).get("train") != self._train:
                found = f"{path}: a checkpoint of another training"
            else:
                outputs = sorted(listed(path / MANIFEST, "outputs").items())
                check_listed(path, dict(outputs[self._processes.rank :: self._processes.world]), checksums=True)
        except PackcliError as error:
            found = error.cause
        except (OSError, ValueError) as error:
            found = f"{path / MANIFEST}: unreadable ({type(error).__name__})"
        return next((problem for problem in self._processes.gather(found, self._group) if problem), None)

    def _load(self, path: Path) -> None:
        kept = [dict(group) for group in self._optimizer.param_groups]
        state = self._state()
        dcp.load(  # type: ignore[attr-defined]
            state, checkpoint_id=path, no_dist=self._processes.world == 1, process_group=self._group
        )
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=self._options,
        )
        # How updates are computed is this run's affair, not that of the processes which wrote the checkpoint.
        for group, own in zip(self._optimizer.param_groups, kept, strict=True):
            group.update({key: value for key, value in own.items() if key in ("fused", "foreach")})

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)


def prune(store: Store, train: str, keep: int) -> None:
    """Delete all but the newest `keep` finished checkpoints, and every unfinished one."""
    finished = 0
    for _, path in store.checkpoints(train):
        complete = store.is_whole(path)
        finished += complete
        if finished > keep or not complete:
            store.remove(path)


def _is_of(file: Path, rank: int) -> bool:
    """DCP names a rank's files after it; what is not named so is rank 0's."""
    if file.suffix == ".distcp":
        return file.name.startswith(f"__{rank}_")
    return rank == 0 and file.name != MANIFEST


def _record(file: Path) -> dict[str, Any]:
    return FileRecord(sha256=sha256_file(file), bytes=file.stat().st_size).model_dump()


def _explained(error: OSError | CheckpointException | PackcliError, path: Path) -> Exception:
    """The disk error inside what DCP raises, as one a user can act on."""
    if isinstance(error, PackcliError):
        return error
    if isinstance(error, OSError):
        return disk_full(error, path)
    for wrapped, _ in error.failures.values():
        if isinstance(wrapped, OSError):
            return disk_full(wrapped, path)
    return RunError(f"{path}: cannot write a checkpoint: {' '.join(str(error).split())[:300]}")
