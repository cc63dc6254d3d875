"""Shared by all tests: the command line as a real process, and a sweep small enough to train in a second."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import settings
from judge_server import CANARY, JudgeServer

from packcli import sweepfile
from packcli.config import SweepSpec

if TYPE_CHECKING:
    from training import Data

pytest_plugins = ["bubblewrap", "cluster"]

REPO = Path(__file__).resolve().parents[1]
SHARED_DATA = REPO.parent / "shared" / "data"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two test processes on two cores: threads of each would wait for those of the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Machines that run tests are shared and slow: no test fails for being late by itself.
settings.register_profile("packcli", deadline=None)
settings.load_profile("packcli")

MODEL: dict[str, Any] = {
    "config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    "tokenizer": "train",
    "vocab_size": 300,
}


def listen_to_ctrl_c() -> None:
    """For `preexec_fn`: a test run started in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def harness_of(*, unsafe_no_sandbox: bool = False, note: Any = None, **settings: Any) -> Any:
    """A harness of these keys of `eval`."""
    from packcli.config import EvalSpec
    from packcli.eval.harness import Harness

    if settings.get("bench_data") is not None:
        settings["bench_data"] = str(settings["bench_data"])
    return Harness(EvalSpec(**settings), unsafe_no_sandbox=unsafe_no_sandbox, note=note)


ARMS = ("padding", "padding_free", "random", "greedy", "best_fit")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """stdout as the one JSON document it must be."""
        return json.loads(self.stdout)


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Done]:
    """`run_cli("prepare", path, "--json", cwd=tmp_path)`: `python -m packcli ...` in a process of its own."""

    def run(*args: object, cwd: Path, timeout: float = 300, env: dict[str, str] | None = None) -> Done:
        command = [sys.executable, "-m", "packcli", *map(str, args)]
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "COLUMNS": "140", "NO_COLOR": "1", **(env or {})},
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture(scope="session")
def forked_cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Done]]:
    """`run_cli` by forks of a packcli that is loaded: whole commands without the start of the interpreter.

    For files with many commands: a module's own `run_cli` returns it. Of variables that libraries read as they are
    imported (HF_HOME and the like) it knows those of its own start.
    """
    from forked import Forked

    packcli = Forked(tmp_path_factory.mktemp("forked"), "import packcli.stages, packcli.views")

    def run(*args: object, cwd: Path, env: dict[str, str] | None = None) -> Done:
        ended = packcli.run(*args, cwd=cwd, env={**os.environ, "COLUMNS": "140", "NO_COLOR": "1", **(env or {})})
        return Done(ended.code, ended.stdout, ended.stderr)

    yield run
    packcli.close()


def chat_records(count: int, *, turns: int = 1, first: int = 0) -> list[dict[str, Any]]:
    """`count` different conversations in the `messages` schema, of lengths that vary."""
    records = []
    for number in range(first, first + count):
        messages = []
        for turn in range(turns):
            words = " ".join(f"word{number % 7}" for _ in range(1 + (number * 5 + turn) % 9))
            messages.append({"role": "user", "content": f"Question {number}.{turn}: {words}?"})
            messages.append({"role": "assistant", "content": f"Answer {number}: {words}."})
        records.append({"messages": messages})
    return records


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """`records` as a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def tiny_sweep(tmp_path: Path) -> Callable[..., Path]:
    """Writes `tmp_path/chats.jsonl` and a sweep over it with a one-layer model; returns the sweep's path.

    `tiny_sweep(arms=["padding"], seeds=[0], train={"steps": 3}, matrix={...}, records=[...], eval={...})`; each
    section given is merged over the defaults, and other top-level keys are written as they are. The source is
    the relative path `chats.jsonl`: run commands in `tmp_path`, or call `monkeypatch.chdir(tmp_path)`.
    """

    def write(
        *,
        name: str = "tiny_test",
        file: str = "sweep.yaml",
        arms: Sequence[str] = ("padding", "best_fit"),
        seeds: Sequence[int] = (0,),
        records: Sequence[Any] | None = None,
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        matrix: dict[str, Any] | None = None,
        **other: Any,
    ) -> Path:
        write_lines(tmp_path / "chats.jsonl", chat_records(40, turns=2) if records is None else records)
        budget = {} if train and train.keys() & {"epochs", "steps", "tokens"} else {"epochs": 1}
        document = {
            "name": name,
            "model": {**MODEL, **(model or {})},
            "data": {"source": "chats.jsonl", "max_length": 128, "validation": 0.2, **(data or {})},
            "train": {**budget, "lr": 0.001, "global_batch": 8, "micro_batch": 4, "threads": 1, **(train or {})},
            "matrix": {"arm": list(arms), "seed": list(seeds), **(matrix or {})},
            **other,
        }
        path = tmp_path / file
        path.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path

    return write


@pytest.fixture
def load_text(tmp_path: Path) -> Callable[..., SweepSpec]:
    """`load_text(yaml_text, sets=[...], only=[...])`: the sweep that text stands for, read from `sweep.yaml`."""

    def load(text: str, sets: Sequence[str] = (), only: Sequence[str] = ()) -> SweepSpec:
        path = tmp_path / "sweep.yaml"
        path.write_text(text, encoding="utf-8")
        return sweepfile.load(path, sets, only)

    return load


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real conversations and benchmarks, kept beside the repository and not in it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder ../shared/data beside the repository is not there")
    return SHARED_DATA


# Training: a prepared store of the toy's conversations, one of real ones, and both in turn. -------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Data:
    from training import Data

    return Data(tmp_path_factory.mktemp("tiny"), "tiny", 200)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Data:
    from training import Data

    if not SHARED_DATA.is_dir():
        pytest.skip("the real chat data is not beside this checkout")
    return Data(tmp_path_factory.mktemp("real"), str(SHARED_DATA / "sft" / "sharegpt_dummy.json"), 60)


@pytest.fixture(params=["tiny", "real"])
def data(request: pytest.FixtureRequest) -> Data:
    found: Data = request.getfixturevalue(request.param)
    return found


class Training:
    """One prepared training, run by commands that may be killed at will."""

    def __init__(self, sweep: Path, run_cli: Callable[..., Done], cwd: Path) -> None:
        self.sweep, self.cwd, self._run = sweep, cwd, run_cli
        assert self.cli("prepare").code == 0

    def cli(self, command: str, *options: object, env: dict[str, str] | None = None) -> Done:
        return self._run(command, self.sweep, *options, cwd=self.cwd, env=env)

    def start(self, command: str, *options: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "packcli", command, str(self.sweep), *map(str, options)],
            cwd=self.cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
            preexec_fn=listen_to_ctrl_c,
        )

    def directories(self) -> list[Path]:
        return list((self.cwd / "runs" / "store" / "train").glob("*"))

    @property
    def directory(self) -> Path:
        """Of the one training there is: a second id would be an error."""
        [found] = self.directories()
        return found

    def steps(self) -> list[dict[str, Any]]:
        """What `metrics.jsonl` says, a torn last line left out."""
        lines = (self.directory / "metrics.jsonl").read_bytes().split(b"\n")
        return [json.loads(line) for line in lines[:-1]]

    def losses(self) -> list[float]:
        return [record["loss"] for record in self.steps()]

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.directory / "manifest.json").read_bytes())  # type: ignore[no-any-return]

    def failure(self) -> dict[str, Any]:
        assert not (self.directory / "manifest.json").exists()
        return json.loads((self.directory / "failure.json").read_bytes())  # type: ignore[no-any-return]

    def checkpoints(self) -> list[int]:
        """Steps of the finished ones."""
        found = self.directory.glob("checkpoint-*/manifest.json")
        return sorted(int(path.parent.name.partition("-")[2]) for path in found)

    def forget(self) -> None:
        shutil.rmtree(self.cwd / "runs" / "store" / "train", ignore_errors=True)

    def until_step(self, step: int, process: subprocess.Popen[str]) -> None:
        def reached() -> bool:
            assert process.poll() is None, process.communicate()
            found = list((self.cwd / "runs" / "store" / "train").glob("*/metrics.jsonl"))
            return bool(found) and len(self.steps()) >= step

        self.until(reached)

    @staticmethod
    def until(reached: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def survivors(self) -> list[int]:
        """Processes that work on this run directory."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "cwd").readlink() == self.cwd:
                    found.append(int(entry.name))
        return found

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        for pid in self.survivors():
            with contextlib.suppress(OSError):
                if f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return pid
        raise AssertionError(f"no rank {number}")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A judge's server, and an environment that names it."""
    servers = []
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def begin(reply: Any) -> JudgeServer:
        server = JudgeServer(reply)
        context = server.running()
        context.__enter__()
        servers.append(context)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", CANARY)
        return server

    yield begin
    for context in servers:
        context.__exit__(None, None, None)
