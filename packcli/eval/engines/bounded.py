"""How much of a server's reply is read: it may have no end, or unpack to far more than was sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai

MOST_BYTES = 16 << 20
"""Unpacked. A judge's verdict is a thousandth of it, the log-probabilities of a long text a tenth."""


class TooLongError(openai.OpenAIError):  # type: ignore[misc]
    """One of the client's own, so that it neither tries again nor takes it for a broken connection."""

    def __init__(self) -> None:
        super().__init__(f"a reply of more than {MOST_BYTES >> 20} MiB")


def hook(response: Any) -> None:
    """For `event_hooks` of an HTTP client: reading this response ends with `TooLongError` at `MOST_BYTES`."""
    theirs = response.iter_bytes

    def ours(chunk_size: int | None = None) -> Iterator[bytes]:
        read = 0
        for part in theirs(chunk_size):
            read = _more(read, part)
            yield part

    response.iter_bytes = ours


async def async_hook(response: Any) -> None:
    """The same for an asynchronous client."""
    theirs = response.aiter_bytes

    async def ours(chunk_size: int | None = None) -> AsyncIterator[bytes]:
        read = 0
        async for part in theirs(chunk_size):
            read = _more(read, part)
            yield part

    response.aiter_bytes = ours


def _more(read: int, part: bytes) -> int:
    if read + len(part) > MOST_BYTES:
        raise TooLongError
    return read + len(part)
