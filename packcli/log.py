"""What a user sees while work goes on: messages and progress, all on stderr.

Nothing here is a result: results go to stdout (`cli/`), numbers of a run to `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

logger = logging.getLogger("packcli")

_SECRET = re.compile(
    r"(?!.*(PATH|FILE|DIR)$).*(SECRET|PASSW|PASSPHRASE|TOKEN|CREDENTIAL|API_?KEY|ACCESS_?KEY|KEY$|WEBHOOK)"
)
# Tokens of a text, which are no secret: `eos_token`, `max_new_tokens`, `include_tokens_per_second`.
_OF_TEXT = re.compile(
    r"TOKENIZ|(?<![A-Z])((BOS|EOS|EOT|PAD|UNK|SEP|CLS|MASK)_TOKEN|(SPECIAL|ADD|ADDED|NEW|NUM|INPUT|MAX)_TOKENS)"
    r"|^TOKENS$|TOKENS_(PER|ACROSS)"
)
# DEL, control characters beyond ASCII, marks of direction.
_OBEYED = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_SHORTEST = 8  # of a secret: `none` and `false` are words of many messages
_USERINFO = re.compile(r"(?<=://)[^/\s@]+:[^/\s@]+@")


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(plain, masked(super().format(record)).split("\n")))


def setup(level: int = logging.INFO) -> None:
    """Send packcli's messages to stderr, plain, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def is_secret(name: str) -> bool:
    """Whether what stands under a name, of a variable or of a key of a file, may be a password or a token."""
    return bool(_SECRET.match(_OF_TEXT.sub("", name.upper())))


def masked(text: str) -> str:
    """`text` without what the environment holds under a name like HF_TOKEN or MY_PASSWORD, and without the names
    and passwords of addresses. For words of others that we repeat: a server's answer, an exception."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and is_secret(name):
            text = text.replace(value, "[masked]")
    return _USERINFO.sub("[masked]@", text)


class _Masked:
    """A stream whose text is masked on its way."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(masked(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def mask_output() -> None:
    """Mask whatever this process prints, libraries and tracebacks too: for one whose output becomes a file."""
    sys.stdout, sys.stderr = _Masked(sys.stdout), _Masked(sys.stderr)


def plain(text: str) -> str:
    """`text` with control characters shown, so that data cannot drive the user's terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def plain_json(text: str) -> str:
    """JSON with escapes for what its strings may hold as it is, and a terminal obeys."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


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
