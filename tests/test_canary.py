"""Secrets of the environment: a sweep that also fails, a cluster's scripts, servers; each variable a canary.

No byte of a canary may be anywhere that packcli wrote or printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MODEL, REPO, Done, chat_records, write_lines
from fake_slurm import FakeSlurm
from test_eval import build_tokenizer, save_llama

from packcli import cli, log

Run = Callable[..., Done]

CANARIES = {
    "HF_TOKEN": "hf_canaryAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "WANDB_API_KEY": "canarywandb0123456789abcdef012345678901",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/BBBBBBBBBBBBBBBBBBBBBBBBBBBB",
    "MY_PASSWORD": "canary password: with 'quotes'",
    "HTTPS_PROXY_USED": "http://someone:canary-proxy-CCCCCC@proxy.example:3128",
}
NEEDLES = ("canary",)
FORMATS = ("table", "md", "csv", "json", "latex", "html")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)


def assert_nowhere(root: Path, *said: str) -> None:
    """In no file below `root` but the inputs, in no file's name, and in nothing that was printed."""
    found = [
        str(path)
        for path in root.rglob("*")
        if path.is_file() and any(needle.encode() in path.read_bytes() for needle in NEEDLES)
    ]
    assert found == []
    assert not [path for path in root.rglob("*") if any(needle in path.name for needle in NEEDLES)]
    for text in said:
        assert not any(needle in text for needle in NEEDLES)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, run_cli: Run) -> tuple[Path, Done]:
    """A directory with `sweep.yaml`, of two cells of which the second diverges, and how the sweep ended."""
    root = tmp_path_factory.mktemp("swept")
    write_lines(root / "chats.jsonl", chat_records(40))
    budget = {"steps": 2, "save_every": 1, "global_batch": 8, "threads": 2, "trackers": ["tensorboard"]}
    document = {
        "name": "s",
        "model": MODEL,
        "data": {"source": "chats.jsonl", "max_length": 128, "validation": 0.2},
        "train": {**budget, "lr": 0.001},
        "eval": {"tasks": ["tiny_copy"], "limit": 2},
        "matrix": {"arm": ["best_fit"], "train.lr": [0.001, 1e30]},
    }
    (root / "sweep.yaml").write_text(yaml.safe_dump(document))
    return root, run_cli("sweep", "sweep.yaml", cwd=root, env=CANARIES)


@pytest.mark.slow
def test_case_37_a_run_that_fails_leaves_the_others_a_table_and_a_code(
    swept: tuple[Path, Done], run_cli: Run
) -> None:
    root, done = swept
    assert done.code == 7, done.stderr
    assert "failed" in done.stdout
    assert "Traceback" not in done.stderr
    states = [row["state"] for row in run_cli("report", "sweep.yaml", "--json", cwd=root).json()["rows"]]
    assert states == ["done", "failed"]


@pytest.mark.slow
def test_case_45_no_secret_of_the_environment_is_in_anything_a_sweep_writes_or_prints(
    swept: tuple[Path, Done], planted: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, done = swept
    said = [done.stdout, done.stderr]
    monkeypatch.chdir(root)
    for words in (
        *(["report", "sweep.yaml", "--all", "--format", kind] for kind in FORMATS),
        ["status", "sweep.yaml"],
        ["status", "sweep.yaml", "--json"],
        ["verify", "runs/store"],
    ):
        monkeypatch.setattr(sys, "argv", ["packcli", *words])
        with pytest.raises(SystemExit):
            cli.main()
        said += [*capsys.readouterr()]
    assert all(said[::2])
    assert list(root.rglob("worker-*.log"))
    assert list(root.rglob("failure.json"))
    assert list(root.rglob("events.out.*"))
    assert_nowhere(root, *said)


@pytest.mark.slow
def test_case_45_no_secret_is_in_what_a_cluster_is_sent(tmp_path: Path, planted: None) -> None:
    slurm = FakeSlurm(tmp_path / "slurm")
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "packcli", "sweep", str(REPO / "sweeps" / "tiny.yaml"), "--only", "seed=0"),
            *("--on", str(REPO / "slurm" / "a800_4x8.yaml"), "--runs", "runs"),
        ],
        cwd=tmp_path / "work",
        env={**os.environ, **slurm.env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert slurm.jobs(), done.stderr
    assert list((tmp_path / "work").rglob("submission.sh"))
    assert_nowhere(tmp_path, done.stdout, done.stderr)


class Echo(BaseHTTPRequestHandler):
    """Lists a model, and answers everything else in words that hold the key it was sent."""

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._send(404, {"error": {"message": f"no such key: {self.headers['authorization']}"}})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_case_45_a_server_that_repeats_the_key_in_its_refusal_tells_it_to_nobody(
    tmp_path: Path, run_cli: Run, planted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-DDDDDDDDDDDDDDDD")
    save_llama(tmp_path / "model", build_tokenizer())
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
        words = ("eval", "--ckpt", "model", "--tasks", "tiny_copy", "--engine", "openai", "--limit", 2)
        done = run_cli(*words, cwd=tmp_path)
        server.shutdown()
    assert done.code == 2
    assert "no such key: Bearer [key]" in done.stderr
    assert_nowhere(tmp_path, done.stdout, done.stderr)


@pytest.mark.slow
def test_case_45_a_traceback_in_a_workers_log_and_a_failure_hold_no_secret(tmp_path: Path, planted: None) -> None:
    """An exception may quote a variable: a library's message, an address with a password."""
    code = (
        "import os, sys; from pathlib import Path; from packcli import log, stages\n"
        "from packcli.launch.worker import Worker; from packcli.store import Store\n"
        "log.mask_output()\n"
        "def fail(*_, **__): raise RuntimeError(' '.join(os.environ[name] for name in sys.argv[2:]))\n"
        "stages.run = fail\n"
        "store, (receive, send) = Store(Path(sys.argv[1])), os.pipe()\n"
        "from test_tokens import order_for\n"
        "order = order_for('tiny').model_dump(mode='json')\n"
        "worker = Worker(store, send, 1)\n"
        "worker._do({'kind': 'tokens', 'ids': ['t0'], 'orders': [order]})\n"
        "answer = os.read(receive, 1 << 16)\n"
        "import orjson; from packcli.errors import PackcliError; [one] = orjson.loads(answer)['failures']\n"
        "store.fail('tokens', 't0', PackcliError(one['cause'], one['fix']))\n"
        "from packcli import console; console.complain(one['cause'], one['fix'])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs"), *CANARIES]
    env = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" in done.stderr  # of the worker's log, where it belongs
    assert "[masked]" in done.stderr
    assert_nowhere(tmp_path, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key VALUE!", "key [masked]!"),
        ("https://me:pass@host/x?y", "https://[masked]@host/x?y"),
        ("https://host:80/a@b", "https://host:80/a@b"),
        ("user@host", "user@host"),
        ("false", "false"),
    ],
)
def test_case_45_masking_leaves_other_words_alone(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {
        "OWN_TOKEN": "VALUE-OF-IT",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_TOKEN_PATH": "/x/yyyyyyy",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert log.masked(text.replace("VALUE", "VALUE-OF-IT")) == shown
    assert log.masked("/x/yyyyyyy") == "/x/yyyyyyy"
