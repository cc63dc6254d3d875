"""Every error a user may meet, with its exit code.

PackcliError (1: a bug, unless a subclass says otherwise)
 +-- ConfigError       2    config or usage: unknown key, file missing, weights that do not match
 +-- DataError         3    bad data: unparsable line, no schema fits, every conversation rejected
 +-- IntegrityError    4    a stored file is not what its manifest says
 +-- LockedError       5    another process holds this stage
 +-- MissingError      6    the machine lacks something: package, benchmark file, sandbox
 +-- RunError          7    a run failed: diverged, out of memory, lost
 +-- PreemptedError   75    stopped at a step boundary; run the same command again

A library call raises these; only `cli.py` prints them. Anything else that escapes is a bug.
"""


class PackcliError(Exception):
    """What went wrong, and how to fix it, each as one line of plain text."""

    exit_code = 1

    def __init__(self, cause: str, fix: str = "") -> None:
        # Both positional: an exception with keyword-only arguments cannot be unpickled from a worker.
        super().__init__(cause, fix)
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        return self.cause


class ConfigError(PackcliError):
    exit_code = 2


class DataError(PackcliError):
    exit_code = 3


class IntegrityError(PackcliError):
    exit_code = 4


class LockedError(PackcliError):
    exit_code = 5


class MissingError(PackcliError):
    exit_code = 6


class RunError(PackcliError):
    exit_code = 7


class PreemptedError(PackcliError):
    exit_code = 75
