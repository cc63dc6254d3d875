"""Worker processes: a callable built once in each, items handed out in order, none orphaned."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from packcli.errors import RunError

GRACE_S = 300.0
"""How long a training that was asked to stop may take to write its checkpoint."""
ONE_REQUEST_S = 2.0
"""Signals this close together are one request: a cluster signals each process of a job, and we pass signals on."""
PR_SET_PDEATHSIG = 1
# Slow to import, and what most of this work needs; one that is not installed is passed over.
_PRELOADED = ("transformers.tokenization_utils_tokenizers", "gigatoken", "awkward")
_call: Callable[[Any], Any] | None = None


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere a no-op)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


@dataclass(slots=True)
class Stop:
    """What signals asked for: the first one to stop, a later one to do so at once, for which `end` is called."""

    end: Callable[[], None] | None = None
    number: int | None = None
    at_s: float = 0.0
    at_once: bool = False

    def ask(self, number: int, frame: Any) -> None:
        """A signal handler."""
        now = time.monotonic()
        if self.number is None:
            self.number, self.at_s = number, now
        elif now - self.at_s > ONE_REQUEST_S:
            self.at_once = True
            if self.end is not None:
                self.end()


@contextlib.contextmanager
def listening(stop: Stop, *numbers: int) -> Iterator[None]:
    """Signals only ask, and whoever works looks at `stop` where it can end well. Main thread only."""
    previous = {number: signal.signal(number, stop.ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def imap(
    make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], items: Sequence[Any], count: int
) -> Iterator[tuple[int, Any]]:
    """(place, `make(*arguments)(item)`) of each item as it ends, by `count` processes; here, if one.

    Raises:
        RunError: a process died (killed, out of memory).
    """
    if count <= 1:
        call = make(*arguments) if items else None
        for place, item in enumerate(items):
            assert call is not None
            yield place, call(item)
        return
    global _call
    ears, held = multiprocessing.Pipe(duplex=False)  # `held` closes when this process dies, whatever kills it
    if _may_fork():
        _call = make(*arguments)  # once for all: a tokenizer takes seconds to load and is only read
        context: Any = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(count, context, _begin, (ears, held, None, ()))
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([make.__module__, *_PRELOADED])
        pool = ProcessPoolExecutor(count, context, _begin, (ears, None, make, arguments))
    waiting = enumerate(items)
    try:
        running: dict[Future[Any], int] = {}
        while True:
            for place, item in waiting:  # two a process, so that none waits and little is lost
                running[pool.submit(_do, item)] = place
                if len(running) >= 2 * count:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise RunError("a worker process died (killed, or out of memory)", "run the same command again") from None
    finally:
        _call = None
        pool.shutdown(wait=True, cancel_futures=True)  # an item takes seconds at most; nothing is left behind
        held.close()


def _may_fork() -> bool:
    """A fork copies what is loaded for nothing, and the locks of running threads, too: torch has such threads."""
    return sys.platform == "linux" and "torch" not in sys.modules and threading.active_count() == 1


def _begin(
    ears: Connection, held: Connection | None, make: Callable[..., Callable[[Any], Any]] | None, arguments: Any
) -> None:
    global _call
    if held is not None:
        held.close()  # a fork's own copy, which would keep it from hearing
    threading.Thread(target=_die_with, args=(ears,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if make is not None:
        _call = make(*arguments)


def _die_with(ears: Connection) -> None:
    """Wait for the end of whoever started this; a server of forks, the parent elsewhere, may live on."""
    try:
        ears.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _do(item: Any) -> Any:
    assert _call is not None
    return _call(item)
