"""Every error a user may meet, with its exit code and its kind, which `failure.json` keeps.

PackcliError (1: a bug, unless a subclass says otherwise)
 +-- ConfigError       2    config or usage: unknown key, file missing, weights that do not match
 +-- DataError         3    bad data: unparsable line, no schema fits, every conversation rejected
 +-- IntegrityError    4    a stored file is not what its manifest says
 +-- LockedError       5    another process holds this stage
 +-- MissingError      6    the machine lacks something: package, benchmark file, sandbox
 +-- RunError          7    a run failed
 |    +-- DivergedError, OutOfMemoryError, HangError, KilledError, PeerError, NodeError, QuarantinedError
 +-- PreemptedError   75    stopped at a step boundary; run the same command again
 +-- LeftError       130    the user looks away from jobs, which go on

A library call raises these; only `cli/` prints them. Anything else that escapes is a bug.
"""

from __future__ import annotations

from typing import ClassVar


class PackcliError(Exception):
    """What went wrong, and how to fix it, each as one line of plain text."""

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "bug"

    def __init__(self, cause: str, fix: str = "") -> None:
        # Both positional: an exception with keyword-only arguments cannot be unpickled from a worker.
        super().__init__(cause, fix)
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        return self.cause


class ConfigError(PackcliError):
    exit_code, kind = 2, "config"


class DataError(PackcliError):
    exit_code, kind = 3, "data"


class IntegrityError(PackcliError):
    exit_code, kind = 4, "integrity"


class LockedError(PackcliError):
    exit_code, kind = 5, "locked"


class MissingError(PackcliError):
    exit_code, kind = 6, "missing"


class RunError(PackcliError):
    exit_code, kind = 7, "failed"


class DivergedError(RunError):
    """A loss or gradient that is not finite."""

    kind = "diverged"


class OutOfMemoryError(RunError):
    kind = "oom"


class HangError(RunError):
    """No progress for longer than `train.hang_timeout_s`."""

    kind = "hang"


class KilledError(RunError):
    """A process died of a signal that packcli did not send."""

    kind = "killed"


class PeerError(RunError):
    """Another process of the same run was lost: an effect, whose cause that process knows."""

    kind = "peer"


class NodeError(RunError):
    """A node that does not answer, is far slower than the others, or computes something else."""

    kind = "node"


class QuarantinedError(RunError):
    """A stage that failed as often as its cluster profile allows; only `--retry` tries it again."""

    kind = "quarantined"


class PreemptedError(PackcliError):
    exit_code, kind = 75, "preempted"


class LeftError(PackcliError):
    exit_code, kind = 130, "left"


_CLASSES = (
    ConfigError, DataError, IntegrityError, LockedError, MissingError, PreemptedError,
    RunError, DivergedError, OutOfMemoryError, HangError, KilledError, PeerError, NodeError, QuarantinedError,
)  # fmt: skip


def of_kind(kind: str, cause: str, fix: str) -> PackcliError:
    """The error that another process reported, or left in `failure.json`."""
    return next((cls for cls in _CLASSES if cls.kind == kind), PackcliError)(cause, fix)
