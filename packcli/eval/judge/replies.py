"""What judges replied, as a file: one line a reply, only ever appended to, each on disk before the next is asked.

Several processes may write to one file at once, and any of them may be killed at any time.
"""

from __future__ import annotations

import fcntl
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from packcli.commit_points import passing
from packcli.errors import IntegrityError
from packcli.eval.judge.verdicts import Form, UnusableError, read
from packcli.files import disk_full, fsync_directory, json_line, seal, unseal
from packcli.log import logger

_MAX_RESPONSE = 400_000
_MIN_SECRET = 8


class Usage(BaseModel):
    """Tokens of one reply, as the server counts them."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    prompt_tokens: int
    completion_tokens: int


class Reply(BaseModel):
    """One line. `response` is the server's body as it came, or its beginning where it was far too long.

    What follows from the body stands beside it for readers of the file; a verdict is read from the body each time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    question: str
    part: str
    judge: str
    returned: str | None
    finish_reason: str | None
    usage: Usage | None
    latency_s: float
    response: str

    @property
    def tokens(self) -> tuple[int, int]:
        """Input, output; 0 where the server does not say."""
        return (self.usage.prompt_tokens, self.usage.completion_tokens) if self.usage else (0, 0)

    def value(self, form: Form) -> float:
        """The verdict.

        Raises:
            UnusableError: there is none.
        """
        if len(self.response) >= _MAX_RESPONSE:
            raise UnusableError("too long", f"{_MAX_RESPONSE:,} characters and more")
        content, refusal, finish = _message(self.response)
        if finish == "content_filter":
            raise UnusableError("content filter", "the server withheld the reply")
        if refusal:
            raise UnusableError("refusal", "the judge refused")
        if finish == "length":
            raise UnusableError("cut off", "the reply reached the limit of tokens")
        return read(content, form)


def from_body(
    body: bytes, *, key: str, question: str, part: str, judge: str, latency_s: float, secret: str
) -> Reply:
    """A reply from a server's bytes, whatever they are. `secret` is taken out of them: a server may echo it."""
    text = body.decode("utf-8", "replace")
    parsed = _parsed(text)
    choice = _first_choice(parsed)
    returned, finish, usage = parsed.get("model"), choice.get("finish_reason"), parsed.get("usage")
    return Reply(
        key=key,
        question=question,
        part=part,
        judge=judge,
        returned=without(secret, returned[:200]) if isinstance(returned, str) else None,
        finish_reason=without(secret, finish[:200]) if isinstance(finish, str) else None,
        usage=_usage(usage),
        latency_s=round(latency_s, 3),
        response=without(secret, text)[:_MAX_RESPONSE],
    )


def verdict(replies: Sequence[Reply], form: Form) -> float | None:
    """The first verdict among the replies to one request."""
    for reply in replies:
        try:
            return reply.value(form)
        except UnusableError:
            continue
    return None


def without(secret: str, text: str) -> str:
    """`text` with `secret` blotted out; keys too short to be one (`none`, `EMPTY`) are left alone."""
    return text.replace(secret, "[key]") if len(secret) >= _MIN_SECRET else text


class Replies:
    """The file, and what it holds by key."""

    def __init__(self, path: Path) -> None:
        """Read `path`; it need not exist. A torn last line, whose writer was killed, is cut off with a note.

        Raises:
            IntegrityError: a line that is no reply, or was changed.
        """
        self.by_key: defaultdict[str, list[Reply]] = defaultdict(list)
        self._path = path
        self._offset = self._num_lines = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                self._catch_up(file)
            fsync_directory(path.parent)
        except OSError as error:
            raise disk_full(error, self._path) from None

    def append(self, reply: Reply) -> None:
        """Write one line, on disk for sure after `sync`; takes in what others wrote before it.

        Raises:
            MissingError: the disk is full.
        """
        line = seal(json_line(reply.model_dump(mode="json")))
        try:
            passing(self._path, "before")
            with self._path.open("a+b") as file:
                self._catch_up(file)
                file.write(line)
                file.flush()
                self._catch_up(file)
            passing(self._path, "after")
        except OSError as error:
            raise disk_full(error, self._path) from None

    def sync(self) -> None:
        """Have all lines on disk. A method of its own because it is slow and may run in another thread."""
        try:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_full(error, self._path) from None

    def _catch_up(self, file: BinaryIO) -> None:
        """Read the lines behind the offset. The lock, held until the file is closed, keeps others from writing."""
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        file.seek(self._offset)
        whole, newline, torn = file.read().rpartition(b"\n")
        for line in whole.split(b"\n") if newline else []:
            self._num_lines += 1
            reply = self._reply(line)
            self.by_key[reply.key].append(reply)
        self._offset += len(whole) + len(newline)
        if torn:
            logger.warning("%s: a torn last line (%d bytes) was dropped", self._path, len(torn))
            file.truncate(self._offset)

    def _reply(self, line: bytes) -> Reply:
        try:
            return Reply.model_validate(unseal(line, f"{self._path}:{self._num_lines}"))
        except (IntegrityError, ValidationError):
            raise IntegrityError(
                f"{self._path}:{self._num_lines}: not a judge's reply as packcli writes it",
                "delete this line, or the file: what is missing is asked again",
            ) from None


def _message(response: str) -> tuple[str, bool, object]:
    """(text, refused, why it ended) of the server's body."""
    choice = _first_choice(_parsed(response))
    message = choice.get("message")
    if not isinstance(message, dict):
        raise UnusableError("unreadable", "not a chat completion")
    content = message.get("content")
    return content if isinstance(content, str) else "", bool(message.get("refusal")), choice.get("finish_reason")


def _parsed(text: str) -> dict[str, object]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _first_choice(parsed: dict[str, object]) -> dict[str, object]:
    choices = parsed.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def _usage(value: object) -> Usage | None:
    try:
        found = Usage.model_validate(value)
    except ValidationError:
        return None
    return found if min(found.prompt_tokens, found.completion_tokens) >= 0 else None
