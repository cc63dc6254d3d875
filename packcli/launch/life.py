"""The life of a stage on a cluster: every attempt at it, and whether another one is worth a node's time."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from packcli.config import Spec
from packcli.errors import IntegrityError, LockedError, PackcliError, PreemptedError, QuarantinedError
from packcli.files import digest, read_sealed, write_sealed
from packcli.launch.graph import Stage
from packcli.launch.profile import RequeueSpec, Resources
from packcli.plan import Plan
from packcli.store import Store

TRANSIENT = frozenset({"hang", "killed", "peer", "node", "lost"})
"""Kinds of failures that another attempt, perhaps on other nodes, may not meet again."""
SAME_AGAIN = frozenset({"oom", "diverged"})
"""Kinds that the same settings meet again."""
ASKED_TO_STOP = frozenset({PreemptedError.exit_code, 128 + signal.SIGTERM, 128 + signal.SIGUSR2})
"""Exit codes: a signal may come before anything listens to it; SLURM's own count of it is 128 and its number."""
_STOPPED = ("preempted", "time limit", "locked", "lost")


class Attempt(Spec):
    """`began_at`, `stood_at`: what was done by then (steps in the newest checkpoint, shards, tasks).

    `how`: it ended: done, preempted, time limit, cancelled, the `kind` of an error, or lost: nobody lived to say
    so. None: it goes on.
    """

    job: str
    restart: int
    nodes: tuple[str, ...]
    started_s: float
    began_at: int
    stood_at: int | None = None
    how: str | None = None
    cause: str = ""


class Life(Spec):
    """`settings`: digest of what the attempts ran with, as out of memory comes back under the same."""

    settings: str = ""
    attempts: tuple[Attempt, ...] = ()

    def ended(self, how: str, stood_at: int, cause: str = "") -> Life:
        """With the end of the last attempt; one that nobody ended was lost with its node."""
        if not self.attempts:
            return self  # forgotten meanwhile
        *before, last = self.attempts
        last = last.model_copy(update={"how": how, "stood_at": stood_at, "cause": cause})
        return self.model_copy(update={"attempts": (*before, last)})

    def verdict(self, policy: RequeueSpec) -> str | None:
        """Why there should be no further attempt; None: there may be."""
        ended = [attempt for attempt in self.attempts if attempt.how is not None]
        failed = [attempt for attempt in ended if attempt.how in TRANSIENT - {"lost"}]
        if len(failed) >= policy.failures:
            return f"{_times(len(failed))} failed, the last: {failed[-1].cause or failed[-1].how}"
        stopped = [attempt for attempt in ended if attempt.how in _STOPPED]
        if len(stopped) > policy.limit:
            return f"{_times(len(stopped))} stopped ({_reasons(stopped)}), the profile's `requeue.limit`"
        # To be preempted early, again and again, is nobody's fault; other failures ended with their job.
        counted = TRANSIENT | {"time limit"}
        last = [attempt for attempt in ended if attempt.how in counted][-policy.without_progress :]
        if len(last) == policy.without_progress and all(attempt.stood_at == attempt.began_at for attempt in last):
            return f"{_times(len(last))} without any progress ({_reasons(last)})"
        return None


def _times(count: int) -> str:
    return f"{count} attempt{'s' if count != 1 else ''}"


def _listed(nodes: Sequence[str]) -> str:
    return ("one of " if len(nodes) > 1 else "") + ", ".join(nodes)


def _reasons(attempts: Sequence[Attempt]) -> str:
    return ", ".join(dict.fromkeys(str(attempt.how) for attempt in attempts))


def read(store: Store, stage: Stage) -> Life:
    """What is known of a stage's life; empty where no cluster tried it."""
    try:
        return Life.model_validate(read_sealed(store.job(*stage)))
    except FileNotFoundError:
        return Life()
    except (ValueError, IntegrityError):
        cause = f"{store.job(*stage)}: the attempts at a stage cannot be read"
        raise IntegrityError(cause, "delete it and run again: they are counted anew") from None


def write(store: Store, stage: Stage, life: Life) -> None:
    write_sealed(store.job(*stage), life.model_dump())


def settings(plan: Plan, stage: Stage, resources: Resources) -> str:
    """What decides whether a stage fits: its order with what enters no id, and the machine."""
    order = plan.order(*stage).model_dump(mode="json")
    return digest([order, resources.model_dump(mode="json")])


def progress(store: Store, stages: Sequence[Stage]) -> int:
    """How far these are: stages done; of the next one, shards; of a training, steps in its newest checkpoint."""
    if stages[0][0] == "train" and (manifest := store.manifest(*stages[0])) is not None:
        return int(manifest.results["steps"])
    done = [stage for stage in stages if store.state(*stage) == "done"]
    rest = [stage for stage in stages if stage not in done]
    if not rest:
        return len(done)
    kind, id_ = rest[0]
    steps = (
        next((step for step, path in store.checkpoints(id_) if store.is_whole(path)), 0) if kind == "train" else 0
    )
    shards = len(store.shard_records(id_)) if kind == "tokens" else 0
    return len(done) + steps + shards


def begin(store: Store, stages: Sequence[Stage], attempt: Attempt, settings: str, policy: RequeueSpec) -> None:
    """Note that an attempt starts. `settings`: of `settings()`.

    Raises:
        QuarantinedError: there were enough; `failure.json` says so.
    """
    life = read(store, stages[0])
    if life.attempts:
        last = life.attempts[-1]
        if last.how is None:
            life = life.ended("lost", attempt.began_at)
        elif last.how == "cancelled" and last.job == attempt.job and last.stood_at is not None:
            # SLURM starts no job again that was cancelled: it was SLURM that ended it, because a node was gone.
            life = life.ended("lost", last.stood_at, f"SLURM started it again: {_listed(last.nodes)} failed")
    reason = life.verdict(policy)
    if reason is not None:
        write(store, stages[0], life)
        raise quarantine(store, stages, reason)
    write(store, stages[0], Life(settings=settings, attempts=(*life.attempts, attempt)))


def end(store: Store, stages: Sequence[Stage], code: int, stopped: str, policy: RequeueSpec) -> int:
    """Note how an attempt ended; the exit code of its job, 75 where there is to be another one.

    `code`: what the job's processes ended with. `stopped`: preempted, time limit or cancelled, if it was stopped.
    """
    lead = stages[0]
    life = read(store, lead)
    stood_at = progress(store, stages)
    if all(store.state(*stage) == "done" for stage in stages):
        write(store, lead, life.ended("done", stood_at))
        return 0
    error = next((found for stage in stages if (found := store.failure(*stage)) is not None), None)
    how = _how(error, code, stopped)
    life = life.ended(how, stood_at, error.cause if error else "")
    write(store, lead, life)
    if how not in TRANSIENT and how not in _STOPPED:
        return error.exit_code if error else code or 1
    reason = life.verdict(policy)
    if reason is not None:
        return quarantine(store, stages, reason).exit_code
    for stage in stages:
        store.failure_file(*stage).unlink(missing_ok=True)
    return PreemptedError.exit_code


def _how(error: PackcliError | None, code: int, stopped: str) -> str:
    if error is not None:
        return error.kind
    if code in ASKED_TO_STOP:
        return stopped
    return "locked" if code == LockedError.exit_code else "killed"


def quarantine(store: Store, stages: Sequence[Stage], reason: str) -> QuarantinedError:
    """Leave `failure.json` in the first stage that is not done; the error to raise."""
    stage = next(stage for stage in stages if store.state(*stage) != "done")
    error = QuarantinedError(f"quarantined: {reason}", "mend the cause, then `packcli sweep ... --retry`")
    store.fail(*stage, error)
    return error
