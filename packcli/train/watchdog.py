"""Ends a process whose training stands still: a peer that was lost, a dead link, a deadlock.

Nothing else would: a rank in a collective that another never joins waits as long as it is let, and a job that
waits costs as much as one that works.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

from packcli.errors import HangError

FIRST_STEP = 3
"""The first step may take so many times as long: it compiles, and allocates."""
_COLLECTIVE_S = 1800.0
_LAST_WORDS_S = 10.0

Alive = Callable[[], None]


@contextlib.contextmanager
def watching(
    timeout_s: float | None, rank: int, fail: Callable[[HangError], None], what: str = "step"
) -> Iterator[Alive]:
    """Call what this yields after each `what`; if none comes for `timeout_s`, the process ends with exit code 7.

    Before it ends it writes every thread's stack to stderr and hands `fail` why. Neither is waited for long: a
    file system that hangs may be the cause. None: no watch.
    """
    if timeout_s is None:
        yield lambda: None
        return
    watch = _Watch(timeout_s, rank, fail, what)
    thread = threading.Thread(target=watch.run, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watch.alive
    finally:
        watch.done.set()


def collective_timeout(timeout_s: float | None) -> timedelta | None:
    """What to give `init_process_group`: later than the watchdog, whose word is clearer. None: torch's default."""
    return None if timeout_s is None else timedelta(seconds=max(_COLLECTIVE_S, 60 + FIRST_STEP * timeout_s))


class _Watch:
    def __init__(self, timeout_s: float, rank: int, fail: Callable[[HangError], None], what: str) -> None:
        self._timeout_s, self._rank, self._fail, self._what = timeout_s, rank, fail, what
        self._count = 0
        self.done = threading.Event()

    def alive(self) -> None:
        self._count += 1

    def run(self) -> None:
        period = min(1.0, self._timeout_s / 10)
        seen, waited, before = 0, 0.0, time.monotonic()
        while not self.done.wait(period):
            now = time.monotonic()
            # Only time in which this thread ran too: a process that was itself stopped (SIGSTOP, a suspended job,
            # a closed laptop) has not hung.
            waited += min(now - before, 2 * period)
            before = now
            if self._count != seen:
                seen, waited = self._count, 0.0
            elif waited > self._timeout_s * (1 if seen else FIRST_STEP):
                self._end(waited)

    def _end(self, waited: float) -> None:
        after = f"after {self._count} of this attempt" if self._count else "waiting for the first"
        error = HangError(
            f"rank {self._rank} hung: no {self._what} for {waited:.0f} s, {after}",
            "the stacks of its threads are on stderr; run the same command again: it goes on from its last "
            f"checkpoint. If a {self._what} takes so long, raise `train.hang_timeout_s`",
        )
        try:
            words = [_aside(partial(_tell, error)), _aside(partial(self._fail, error))]
            deadline = time.monotonic() + _LAST_WORDS_S
            for thread in words:
                thread.join(max(0.0, deadline - time.monotonic()))
        finally:
            os._exit(HangError.exit_code)


def _aside(do: Callable[[], object]) -> threading.Thread:
    """`do` in a thread of its own; what it raises is lost: the process ends in any case."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            do()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    return thread


def _tell(error: HangError) -> None:
    with open(2, "wb", closefd=False) as stderr:
        # Stacks are dumped under the interpreter's lock: where that blocks, no thread would get to end this.
        with contextlib.suppress(OSError), tempfile.TemporaryFile() as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            stderr.write(stacks.read())
        stderr.write(f"error: {error.cause}\n".encode())
