"""The `openai` engine against a server on this machine: the same answers as here, and all the ways it can fail."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from test_engine import asks, ours, prompts
from test_eval import build_tokenizer, save_llama

from packcli.errors import ConfigError, MissingError, PackcliError
from packcli.eval.engines import engine
from packcli.eval.engines import server as engine_openai
from packcli.eval.engines.responses import Recorded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_llama(path, build_tokenizer())
    return path


class Server:
    """`/v1/completions` on this machine, answered by a checkpoint; `fails` says what goes wrong, call by call."""

    def __init__(self, checkpoint: Path, name: str = "served") -> None:
        self.name, self.asked, self.keys = name, [], []  # type: ignore[var-annotated]
        self.fails: list[tuple[int, str]] = []
        self.usage: dict[str, Any] = {}
        self.logprobs = True
        self.wrong: dict[str, Any] = {}
        self.lm = ours(checkpoint, 1)
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, {"object": "list", "data": [{"id": server.name, "object": "model"}]})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:  # one model, one thread
                    server.asked.append(asked)
                    server.keys.append(self.headers["Authorization"])
                    if server.fails:
                        status, text = server.fails.pop(0)
                        if text == "slow":
                            time.sleep(0.7)
                        return self._send(status, {"error": {"message": text}})
                    self._send(
                        200, {"object": "text_completion", "choices": [server.choice(asked)]} | server.usage
                    )

            def _send(self, status: int, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(body)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._http.server_close()

    def choice(self, asked: dict[str, Any]) -> dict[str, Any]:
        ids, model = torch.tensor([asked["prompt"]]), self.lm.model
        if asked.get("echo"):
            if not self.logprobs:
                return {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
            with torch.no_grad():
                scores = torch.log_softmax(model(ids).logits[0], -1)
            chosen = [None, *(float(scores[n, token]) for n, token in enumerate(ids[0, 1:]))]
            best = [None, *({"best": float(row.max())} for row in scores[:-1])]
            found = {"token_logprobs": [*chosen, -1.0], "top_logprobs": [*best, {"x": -1.0}], "tokens": []}
            found |= {key: change(found[key]) for key, change in self.wrong.items()}
            return {"index": 0, "text": "", "finish_reason": "length", "logprobs": found}
        [(_, said)] = next(self.lm._writer.write([asked["prompt"]], asked["stop"], asked["max_tokens"], {}))
        text = self.lm.tok_decode(said.tokens)
        self.usage = {"usage": {"prompt_tokens": 1, "total_tokens": 1, "completion_tokens": len(said.tokens)}}
        for stop in asked["stop"]:
            text = text.split(stop)[0]
        return {"index": 0, "text": text, "finish_reason": said.ended, "logprobs": None}


@pytest.fixture
def server(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(engine_openai, "RETRIES", 2)
    monkeypatch.setattr(engine_openai, "TIMEOUT_S", 20.0)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with Server(llama) as running:
        yield running


def served(checkpoint: Path, server: Server, **settings: Any) -> Any:
    return engine.load(
        checkpoint, **{"chat_template": False, "engine": "openai", "base_url": server.url} | settings
    )


@pytest.mark.parametrize("chat_template", [True, False])
def test_server_reads_or_answers_something_else(chat_template: bool, llama: Path, server: Server) -> None:
    here = engine.load(llama, chat_template=chat_template, device="cpu")
    there = served(llama, server, chat_template=chat_template)
    requests = asks(["<|im_start|>user\nswap: sun<|im_end|>\n<|im_start|>assistant\n", *prompts()], ["\n\n"], 6)
    assert there.generate_until(requests) == here.generate_until(requests)
    assert sorted(asked["prompt"] for asked in server.asked) == sorted(
        here._prompt(r.args[0], 500) for r in requests
    )
    answers = dict(item for batch in there.answers([r.args for r in requests]) for item in batch)
    expected = dict(item for batch in here.answers([r.args for r in requests]) for item in batch)
    assert answers == expected
    pairs = [Instance("loglikelihood", {}, (request.args[0], " cat pen"), 0) for request in requests]
    for (value, greedy), (reference, same) in zip(
        there.loglikelihood(pairs, disable_tqdm=True), here.loglikelihood(pairs, disable_tqdm=True), strict=True
    ):
        assert value == pytest.approx(reference, abs=1e-3)
        assert greedy == same


@pytest.mark.parametrize("failure", [(429, "slow down"), (500, "oops"), (503, "busy")])
def test_server_that_fails_for_a_moment_ends_the_run(
    failure: tuple[int, str], llama: Path, server: Server
) -> None:
    lm = served(llama, server, batch_size=1)
    server.fails = [failure] * 2
    assert lm.generate_until(asks(["swap:"], [], 3)) == ours(llama).generate_until(asks(["swap:"], [], 3))
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("failure", "error", "words", "num_calls"),
    [
        ((500, "oops"), MissingError, "does not answer", 3),
        ((429, "slow down"), MissingError, "does not answer", 3),
        ((401, "bad key"), ConfigError, "refuses the key", 1),
        ((400, "prompt too long"), ConfigError, "prompt too long", 1),
        ((404, "no such page"), ConfigError, "has no completions", 1),
    ],
)
def test_server_that_keeps_failing_is_a_traceback_or_shows_the_key(
    failure: tuple[int, str],
    error: type[PackcliError],
    words: str,
    num_calls: int,
    llama: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary-4711")
    lm = served(llama, server, batch_size=1)
    server.fails = [failure] * 9
    with pytest.raises(error, match=words) as caught:
        lm.generate_until(asks(["swap:"], [], 3))
    assert len(server.asked) == num_calls
    assert set(server.keys) == {"Bearer canary-4711"}
    assert "canary" not in caught.value.cause + caught.value.fix
    assert "\n" not in caught.value.cause


def test_answers_before_a_failure_are_lost(llama: Path, server: Server, tmp_path: Path) -> None:
    lm = served(llama, server, batch_size=1)
    requests = asks(prompts(), [], 3)
    choice = server.choice

    def dies(asked: dict[str, Any]) -> dict[str, Any]:
        if len(server.asked) == 5:
            server.fails = [(500, "down")] * 3
        return choice(asked)

    server.choice = dies  # type: ignore[method-assign]
    with pytest.raises(MissingError):
        Recorded(lm, tmp_path / "r.jsonl", "id").generate_until(requests)
    server.choice = choice  # type: ignore[method-assign]
    server.fails = []
    again = Recorded(lm, tmp_path / "r.jsonl", "id")
    assert again.generate_until(requests) == ours(llama).generate_until(requests)
    assert again.num_asked == len(requests) - 5


def test_slow_server_stops_everything(llama: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_openai, "TIMEOUT_S", 0.3)
    lm = served(llama, server, batch_size=1)
    server.fails = [(200, "slow")] * 3
    with pytest.raises(MissingError, match="does not answer"):
        lm.generate_until(asks(["swap:"], [], 3))


def test_server_without_log_probabilities_scores_zero(llama: Path, server: Server) -> None:
    lm = served(llama, server)
    server.logprobs = False
    pair = [Instance("loglikelihood", {}, ("swap: sun", " cat"), 0)]
    with pytest.raises(MissingError, match="does not give the log probability of each token"):
        lm.loglikelihood(pair, disable_tqdm=True)
    server.fails = [(400, "echo is not supported")]
    with pytest.raises(MissingError, match="does not give the log probability of each token"):
        lm.loglikelihood(pair, disable_tqdm=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_logprobs": lambda found: found[:-1], "top_logprobs": lambda found: found[:-1]},
        {"token_logprobs": lambda found: [None, *found], "top_logprobs": lambda found: [None, *found]},
        {"token_logprobs": lambda found: [None] * len(found)},
        {"top_logprobs": lambda found: [{}] * len(found)},
        {"top_logprobs": lambda _: "none"},
    ],
    ids=["its own token left out", "one added", "no numbers", "no likeliest", "text"],
)
def test_log_probabilities_of_other_tokens_are_counted(llama: Path, server: Server, wrong: dict[str, Any]) -> None:
    lm = served(llama, server)
    server.wrong = wrong
    pair = [Instance("loglikelihood", {}, ("swap: sun", " cat"), 0)]
    with pytest.raises(MissingError, match="does not give the log probability of each token"):
        lm.loglikelihood(pair, disable_tqdm=True)


def test_a_pair_that_was_cut_to_leave_room_for_a_token_counts_as_whole(llama: Path, server: Server) -> None:
    lm = served(llama, server)
    pair = Instance("loglikelihood", {}, ("swap: sun", " cat"), 0)
    length = sum(map(len, lm._encode_pair("swap: sun", " cat")))
    for lm.max_length, cut in ((length + 1, set()), (length, {pair.args})):
        lm.loglikelihood([pair], disable_tqdm=True)
        assert lm.truncated == cut


def test_an_answer_without_the_usual_facts_is_a_traceback(llama: Path, server: Server) -> None:
    lm, choice = served(llama, server), server.choice

    def bare(asked: dict[str, Any]) -> dict[str, Any]:
        text = choice(asked)["text"]
        server.usage = {"usage": {}}
        return {"text": text}

    server.choice = bare  # type: ignore[method-assign]
    assert lm.generate_until(asks(["swap:"], [], 3)) == ours(llama).generate_until(asks(["swap:"], [], 3))


def test_no_server_or_none_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(engine_openai, "RETRIES", 0)
    with pytest.raises(ConfigError, match="needs the URL"):
        engine.load(llama, chat_template=False, engine="openai")
    with pytest.raises(MissingError, match=r"127\.0\.0\.1 does not answer"):
        engine.load(llama, chat_template=False, engine="openai", base_url="http://user:canary@127.0.0.1:9/v1")
