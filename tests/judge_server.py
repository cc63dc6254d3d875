"""A judge on this machine: the part of OpenAI's HTTP interface that judging uses, and all the ways it can fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECONDS_AT_MOST = 60.0
CANARY = "sk-canary-5f3a9c71d2"
"""The key that the tests send; it must be written nowhere."""


@dataclass(frozen=True)
class Asked:
    """One call: its JSON, the last message's text, the key that came with it, how many calls came before with
    the same text."""

    body: dict[str, Any]
    prompt: str
    authorization: str
    nth: int


@dataclass(frozen=True)
class Answer:
    """`half`: promises all of `body`, sends half of it and hangs up. `drip_s`: so long between single bytes.
    `silent`: takes the call and never answers."""

    body: bytes
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    delay_s: float = 0.0
    half: bool = False
    drip_s: float = 0.0
    silent: bool = False


def completion(
    text: str | None,
    *,
    finish: str = "stop",
    refusal: str | None = None,
    usage: tuple[int, int] | None = (1000, 100),
    judge: str = "judge-2026-01-01",
    **how: Any,
) -> Answer:
    """A chat completion that says `text`."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": judge,
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }
    if usage is not None:
        body["usage"] = {
            "prompt_tokens": usage[0],
            "completion_tokens": usage[1],
            "total_tokens": sum(usage),
        }
    return Answer(json.dumps(body).encode(), **how)


def failure(status: int, message: str = "no", *, code: str | None = None, retry_after_s: float = 0.01) -> Answer:
    """An error as OpenAI's server words it."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": code}}).encode()
    return Answer(body, status=status, headers=(("retry-after", str(retry_after_s)),))


@dataclass
class JudgeServer:
    """`reply` decides what each call gets. `asked`: all calls, in order of arrival."""

    reply: Callable[[Asked], Answer]
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    most_at_once: int = 0

    @contextmanager
    def running(self) -> Iterator[JudgeServer]:
        self._lock, self._over, self._at_once = threading.Lock(), threading.Event(), 0
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"judge": self}))
        server.daemon_threads = True
        server.block_on_close = False
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            server.shutdown()
            server.server_close()
            thread.join()

    @contextmanager
    def took(self, body: dict[str, Any], authorization: str) -> Iterator[Asked]:
        prompt = body["messages"][-1]["content"]
        with self._lock:
            nth = sum(one.prompt == prompt for one in self.asked)
            asked = Asked(body, prompt, authorization, nth)
            self.asked.append(asked)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield asked
        finally:
            with self._lock:
                self._at_once -= 1

    def wait(self, seconds: float) -> None:
        """Until then, or until the server is to stop."""
        self._over.wait(seconds)


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.judge.took(body, self.headers.get("authorization", "")) as asked, suppress(OSError):
            self._send(self.judge.reply(asked))

    def _send(self, answer: Answer) -> None:
        self.judge.wait(SECONDS_AT_MOST if answer.silent else answer.delay_s)
        if answer.silent:
            self.close_connection = True
            return
        self.send_response(answer.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer.body)))
        for name, value in answer.headers:
            self.send_header(name, value)
        self.end_headers()
        if answer.half:
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self.close_connection = True
        elif answer.drip_s:
            for byte in answer.body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                self.judge.wait(answer.drip_s)
        else:
            self.wfile.write(answer.body)

    def log_message(self, *_: object) -> None:
        pass


def closed_port() -> int:
    """A port where nothing listens."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port
