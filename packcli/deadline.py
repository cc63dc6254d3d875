"""A limit on time for what others wrote: a chat template is a program, and may never end."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from packcli.errors import PackcliError


class _Late(BaseException):
    """No `Exception`: what runs in the meantime may swallow those."""


@contextlib.contextmanager
def within(seconds: float, error: PackcliError) -> Iterator[None]:
    """Raise `error` when this takes longer. Only in a main thread, which hears signals; elsewhere no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    late = _Late()

    def ring(number: int, frame: FrameType | None) -> None:
        raise late

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, ring)
    left_s, again_s = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Late as raised:
        raise (error if raised is late else raised) from None
    finally:
        # Somebody else's alarm goes on as if nothing had been.
        rest_s = max(left_s - (time.monotonic() - start), 1e-3) if left_s else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, rest_s, again_s)
