"""What a user sees while work goes on: messages and progress, all on stderr.

Nothing here is a result: results go to stdout (`cli.py`), numbers of a run to `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

logger = logging.getLogger("packcli")


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(plain, super().format(record).splitlines()))


def setup(level: int = logging.INFO) -> None:
    """Send packcli's messages to stderr, plain, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def plain(text: str) -> str:
    """`text` with control characters shown, so that data cannot drive the user's terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def console() -> Console:
    """The terminal on stderr; rich honours `NO_COLOR` and falls quiet when it is not a terminal.

    On stderr as it is now: who silences a noisy library later does not silence this.
    """
    from rich.console import Console

    return Console(file=sys.stderr)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A progress display with count, remark and time left; invisible when not a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    terminal = console()
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=terminal,
        disable=not terminal.is_terminal,
        transient=True,
    ) as display:
        yield display
