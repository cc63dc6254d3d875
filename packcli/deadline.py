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
    left_s, again_s = signal.setitimer(
        signal.ITIMER_REAL, 0
    )  # somebody else's alarm rings for them, before or after
    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)  # in here, as it may ring until then
    except _Late as raised:
        raise (error if raised is late else raised) from None
    finally:
        signal.signal(signal.SIGALRM, before)
        rest_s = max(left_s - (time.monotonic() - start), 1e-3) if left_s else 0.0
        signal.setitimer(signal.ITIMER_REAL, rest_s, again_s)
