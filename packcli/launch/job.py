"""What a job does on the nodes it got: `python -m packcli.launch.job begin|run|after DIRECTORY`.

The batch script calls `begin` once, `run` on every node, and `after` once with what `run` ended with. A job needs
nothing but its array's directory: the plan lies there as it was submitted, so no sweep file and no internet.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from packcli import log, stages
from packcli.errors import (
    ConfigError,
    IntegrityError,
    KilledError,
    LockedError,
    OutOfMemoryError,
    PackcliError,
    PreemptedError,
)
from packcli.files import atomic_write, clear_unfinished, read_sealed
from packcli.launch import life, local, ranks, scratch, slurm
from packcli.launch.script import Submitted
from packcli.plan import Plan, TrainOrder
from packcli.store import Store

_LOCK_WAIT_S = 300.0
"""A node taken from its job may go on writing its checkpoint beside the new attempt."""
_CHECKPOINT_MARGIN_S = 20.0
_FIRST_PORT, _PORTS = 20_000, 20_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the cluster this process runs, from SLURM's environment."""

    job: str
    element: int
    number: int
    restart: int
    node: int
    nodes: tuple[str, ...]

    @classmethod
    def here(cls) -> Place:
        from submitit.slurm.slurm import SlurmJobEnvironment

        environment = SlurmJobEnvironment()
        return cls(
            job=environment.job_id,
            element=int(environment.array_task_id or 0),
            number=int(environment.raw_job_id),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            node=environment.node,
            nodes=tuple(environment.hostnames),
        )

    @property
    def endpoint(self) -> str:
        """Rank 0's address: another port for every job and attempt, as jobs may share a node."""
        port = _FIRST_PORT + (31 * self.number + 7 * self.restart) % _PORTS
        return f"{self.nodes[0]}:{port}"


class Job:
    """One element of an array, on one node.

    Raises:
        ConfigError: the array's directory is gone.
    """

    def __init__(self, directory: Path) -> None:
        try:
            self.order = Submitted.model_validate(read_sealed(Store.order_in(directory)))
        except FileNotFoundError:
            cause = f"`{directory}` is gone: the run directory was deleted or moved after this job was submitted"
            raise ConfigError(cause, "run `packcli sweep` again") from None
        except ValueError:
            raise _damaged(Store.order_in(directory)) from None
        self.place = Place.here()
        self.store = Store(Path(self.order.runs))
        self.element = self.order.array.at(self.place.element)

    @cached_property
    def plan(self) -> Plan:
        path = self.store.submitted_plan(self.order.submission)
        try:
            return Plan.model_validate(read_sealed(path))
        except (OSError, ValueError):
            raise _damaged(path) from None

    @property
    def is_recorded(self) -> bool:
        """Whether attempts are counted on disk: parts of a stage, and the report, only have SLURM's own count."""
        return bool(self.element.stages) and self.element.part is None

    # Once, before --------------------------------------------------------------------------------------

    def begin(self) -> int:
        policy, place = self.order.profile.requeue, self.place
        log.logger.info(
            "%s %s on %s%s",
            self.order.array.job,
            self.element.name,
            ", ".join(place.nodes),
            f", attempt {place.restart + 1}" if place.restart else "",
        )
        if not self.is_recorded:
            return 0
        for stage in self.element.stages:
            self.store.failure_file(*stage).unlink(missing_ok=True)
        attempt = life.Attempt(
            job=place.job,
            restart=place.restart,
            nodes=place.nodes,
            started_s=time.time(),
            began_at=life.progress(self.store, self.element.stages),
        )
        settings = life.settings(self.plan, self.element.stages[0], self.order.resources)
        life.begin(self.store, self.element.stages, attempt, settings, policy)
        return 0

    # On every node -------------------------------------------------------------------------------------

    def run(self) -> int:
        match self.order.array.job:
            case "parts":
                assert self.element.part is not None
                tokens = self.plan.tokens[self.element.stages[0][1]]
                stages.prepare_part(tokens, self.store, self.element.part, ranks.Lines())
            case "prepare" | "eval":
                return self._stages()
            case "base" | "train":
                self._train()
            case "report":
                self._report()
        return 0

    def _stages(self) -> int:
        own = set(self.element.stages)
        for stage in own:
            for upstream in self.plan.inputs(*stage):
                if upstream not in own and self.store.state(*upstream) != "done":
                    raise ConfigError(
                        f"{' '.join(upstream)}, which this job reads, is not there", "run `packcli sweep`"
                    )
        logs = self.store.workers(self.order.submission, self.order.array.number, self.place.job)
        unsafe = self.order.unsafe_no_sandbox
        failures = local.run(self.plan, self.store, self.element.stages, unsafe_no_sandbox=unsafe, logs=logs)
        for failure in failures:
            log.logger.error("error: %s", failure.cause)
        return next((failure.exit_code for failure in failures), 0)

    def _train(self) -> None:
        order = self.plan.trains[self.element.stages[0][1]]
        if self.store.state("train", order.id) == "done":
            return
        resources, profile, place = self.order.resources, self.order.profile, self.place
        processes, _ = ranks.processes_here(resources.processes_per_node)
        group = ranks.Group(
            processes=processes,
            nodes=len(place.nodes),
            node=place.node,
            endpoint=place.endpoint,
            grace_s=max(1.0, profile.signal_s - _CHECKPOINT_MARGIN_S),
            burn_in=profile.burn_in,
            names=place.nodes,
        )
        if place.node == 0:
            self._wait_for_lock(order)
        store = self._staged(order)
        try:
            ranks.run(order, store, group, ranks.Lines(), fallback=self.order.fallback)
        except KilledError as error:
            if not was_out_of_memory(Path("/proc/self/cgroup").read_text()):
                raise
            memory = OutOfMemoryError(
                f"{error.cause}: {socket.gethostname()} ran out of the memory this job was given",
                "ask for more `mem` in the profile, or see docs/training.md for what takes less",
            )
            self.store.fail("train", order.id, memory)
            raise memory from None

    def _staged(self, order: TrainOrder) -> Store:
        """The store as this node's ranks read it: from a disk of its own, where the profile names one."""
        if self.order.profile.scratch is None:
            return self.store
        directory = scratch.expand(self.order.profile.scratch, os.environ)
        os.environ.update(scratch.environment(directory))
        return scratch.stage(self.store, order, directory, ranks.Lines())

    def _wait_for_lock(self, order: TrainOrder) -> None:
        deadline, said = time.monotonic() + _LOCK_WAIT_S, False
        while self.store.state("train", order.id) == "running" and time.monotonic() < deadline:
            if not said:
                log.logger.info("another process still writes this training; waiting for it")
            said = True
            time.sleep(1.0)

    def _report(self) -> None:
        from packcli.report import ladder, render, rows

        collected = rows.collect(self.plan, self.store)
        clear_unfinished(self.store.sweep(self.plan.name))
        json = render.json_text(collected, ladders=ladder.climb(self.plan, collected))
        for suffix, text in (("md", render.markdown(collected)), ("json", json)):
            with atomic_write(self.store.report(self.plan.name, suffix)) as file:
                file.write(text.encode())
        sys.stdout.write(render.markdown(collected))  # its log

    def leave(self, error: PackcliError) -> None:
        """Note an error of the job's own, such as an input that is gone; a stage leaves those it meets itself."""
        waits = isinstance(error, PreemptedError | LockedError)
        if self.is_recorded and not waits and not any(self.store.failure(*stage) for stage in self.element.stages):
            self.store.fail(*self.element.stages[0], error)

    # Once, afterwards ----------------------------------------------------------------------------------

    def after(self, code: int, state: str) -> int:
        """`state`: of this job, as SLURM has it; empty where it did not answer."""
        policy = self.order.profile.requeue
        if self.is_recorded:
            how = "time limit" if self._is_late() else "preempted"
            how = "cancelled" if slurm.is_cancelled(state) else how
            return life.end(self.store, self.element.stages, code, how, policy)
        if code not in life.ASKED_TO_STOP or slurm.is_cancelled(state):
            return code
        return 7 if self.place.restart >= policy.limit else PreemptedError.exit_code

    def _is_late(self) -> bool:
        """Whether the time limit was near: SLURM tells a job of it by the same signals as of preemption."""
        attempts = life.read(self.store, self.element.stages[0]).attempts
        if not attempts:
            return False
        left_s = attempts[-1].started_s + 60 * self.order.resources.time_min - time.time()
        return left_s < self.order.profile.signal_s + 90


def was_out_of_memory(groups: str, root: Path = Path("/sys/fs/cgroup")) -> bool:
    """Whether the kernel killed a process of this job for memory, as the job's control group counts.

    `groups`: of `/proc/self/cgroup`. False where the site gives jobs no groups of their own: others' count there.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if "/job_" not in path or controllers not in ("", "memory"):
            continue
        file = root / path.lstrip("/") / "memory.events"  # version 2
        if controllers:
            file = root / "memory" / path.lstrip("/") / "memory.oom_control"
        with contextlib.suppress(OSError):
            counts = dict(row.split() for row in file.read_text().splitlines())
            if int(counts.get("oom_kill", 0)):
                return True
    return False


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError(f"{path}: gone, or not as packcli wrote it", "run `packcli sweep` again")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes as those of packcli; 75 asks the batch script for another attempt."""
    what, directory, *rest = arguments if arguments is not None else sys.argv[1:]
    log.mask_output()
    log.setup()
    job = None
    try:
        job = Job(Path(directory))
        match what:
            case "begin":
                return job.begin()
            case "run":
                with local.terminable():
                    return job.run()
            case _:
                return job.after(int(rest[0]), rest[1])
    except PackcliError as error:
        if job is not None and what == "run":
            job.leave(error)
        log.logger.error("error: %s\nhint: %s", error.cause, error.fix)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
