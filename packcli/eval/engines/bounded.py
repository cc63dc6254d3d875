"""How much of a server's reply is read: it may have no end, or unpack to far more than was sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai

MOST_BYTES = 16 << 20
"""Unpacked. A judge's verdict is a thousandth of it, the log-probabilities of a long text a tenth."""


HEADERS = {"accept-encoding": "gzip"}
"""What a client asks for: read piece by piece it grows a thousandfold at most, other packings without bound."""
_GROW_LITTLE = ("", "identity", "gzip", "deflate")


class TooLongError(openai.OpenAIError):  # type: ignore[misc]
    """One of the client's own, so that it neither tries again nor takes it for a broken connection."""

    def __init__(self, said: str = "") -> None:
        super().__init__(said or f"a reply of more than {MOST_BYTES >> 20} MiB")


def hook(response: Any) -> None:
    """For `event_hooks` of an HTTP client: reading this response ends with `TooLongError` at `MOST_BYTES`."""
    _refuse_packed(response)
    theirs = response.iter_bytes

    def ours(chunk_size: int | None = None) -> Iterator[bytes]:
        read = 0
        for part in theirs(chunk_size):
            read = _more(read, part)
            yield part

    response.iter_bytes = ours


async def async_hook(response: Any) -> None:
    """The same for an asynchronous client."""
    _refuse_packed(response)
    theirs = response.aiter_bytes

    async def ours(chunk_size: int | None = None) -> AsyncIterator[bytes]:
        read = 0
        async for part in theirs(chunk_size):
            read = _more(read, part)
            yield part

    response.aiter_bytes = ours


def _refuse_packed(response: Any) -> None:
    """What is packed twice, or otherwise than asked, would be unpacked whole before it is counted."""
    packed = response.headers.get("content-encoding", "").strip().lower()
    if packed not in _GROW_LITTLE:
        raise TooLongError(f"a reply packed as `{packed[:40]}`, where gzip was asked for: it may be of any length")


def _more(read: int, part: bytes) -> int:
    if read + len(part) > MOST_BYTES:
        raise TooLongError
    return read + len(part)
