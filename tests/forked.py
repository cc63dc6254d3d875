"""A packcli that is loaded once and forked for every command: to kill one at each of many points takes seconds.

    packcli = Forked(directory, setup="import ...")           # `setup`: Python to run before the first fork
    packcli.run("sweep", path, "--runs", "runs", cwd=..., env={...})  -> (exit code, negative for a signal; output)

Commands are whole: `main()` of the command line, which forks its worker where it would start one, with the same
pipes, in a session of its own, dying with its parent. What is not tried here is the start of the interpreter.
This file is also the program: it reads one request a line and answers each with one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


@dataclass(frozen=True)
class Ended:
    """`code`: as `Popen.returncode` has it."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        return json.loads(self.stdout)


class Forked:
    """The loaded process; `close` ends it."""

    def __init__(self, directory: Path, setup: str) -> None:
        self._directory, self._number = directory, 0
        (directory / "setup.py").write_text(setup)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(REPO), "NO_COLOR": "1", "COLUMNS": "140"},
        )

    def run(
        self, *words: object, cwd: Path, env: dict[str, str] | None = None, family: bool = False, main: str = "cli"
    ) -> Ended:
        """`family`: a worker that is killed takes along who started it, as when a machine goes down.

        `main`: `cli`, or `job`, what a cluster's job runs.
        """
        self._number += 1
        out = self._directory / f"{self._number}.out"
        request = {"words": list(map(str, words)), "cwd": str(cwd), "env": env or {}, "out": str(out)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({**request, "family": family, "main": main}) + "\n"
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the forking process itself died"
        return Ended(int(answer), out.read_text(), Path(f"{out}.err").read_text())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# The program -------------------------------------------------------------------------------------------


class _Worker:
    """A forked worker, as much of a `Popen` as `launch/local.py` asks of one."""

    def __init__(self, pid: int, stdin: int) -> None:
        self.pid, self.stdin = pid, os.fdopen(stdin, "wb")
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def kill(self) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)

    terminate = kill


def _fork_worker(store: Any, logs: Path, number: int, threads: int) -> Any:
    """What `local._start` does, by a fork."""
    from packcli.launch import local, worker

    answers, send = os.pipe()
    requests, stdin = os.pipe()
    path = store.worker_log(logs, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["worker", str(store.root), str(send), str(threads), str(os.getpid())]

    def serve() -> None:
        for descriptor in (answers, stdin):
            os.close(descriptor)
        os.setsid()
        for name in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(name, signal.SIG_DFL)
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for source, target in ((requests, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        sys.stdin = os.fdopen(0, "r")
        sys.argv = arguments
        worker.main()

    pid = _fork(serve)
    os.close(send)
    os.close(requests)
    return local._Worker(_Worker(pid, stdin), answers)  # type: ignore[arg-type]


def _fork(call: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        call()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _noting(do: Callable[..., None]) -> Callable[..., None]:
    """Write down, after each job, what the first worker had to import for it."""

    def wrapped(self: Any, job: dict[str, Any]) -> None:
        do(self, job)
        if not _loaded:
            Path(_directory, "modules").write_text("\n".join(sys.modules))

    return wrapped


def _load_noted() -> None:
    """What the first worker had to import, for all that come after it."""
    noted = Path(_directory, "modules")
    if not noted.exists() or _loaded:
        return
    _loaded.append(True)
    for name in noted.read_text().splitlines():
        if name not in sys.modules and not name.startswith("__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would copy locks of other threads"


_directory = ""
_loaded: list[bool] = []


def _command(request: dict[str, Any]) -> None:
    from packcli import cli
    from packcli.launch import job, local

    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for name, target in ((request["out"], 1), (request["out"] + ".err", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["family"]:
        local._bury = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,return-value]
    if request["main"] == "job":
        sys.exit(job.main(request["words"]))
    sys.argv = ["packcli", *request["words"]]
    cli.main()


def serve(directory: str) -> None:
    global _directory
    _directory = directory
    from packcli.launch import local, worker

    worker.Worker._do = _noting(worker.Worker._do)  # type: ignore[method-assign]
    local.cores = lambda: 1  # type: ignore[assignment]  # one worker at a time: what is passed when is the same in every run
    local._start = _fork_worker
    exec(compile(Path(directory, "setup.py").read_text(), "setup", "exec"), {})
    for line in sys.stdin:
        _load_noted()
        request = json.loads(line)
        pid = _fork(lambda request=request: _command(request))  # type: ignore[misc]
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(1, f"{code}\n".encode())


if __name__ == "__main__":
    serve(sys.argv[1])
