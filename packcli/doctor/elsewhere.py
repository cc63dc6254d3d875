"""Looks that may crash or hang, in processes of their own: a broken kernel ends with a signal, not an exception.

`ask` starts one; this file is also the program: PARENT QUESTION ARGUMENT ... -> the answer as one line of JSON.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from packcli.errors import PackcliError, RunError, of_kind
from packcli.processes import die_with_parent

_LAST_S = 1.0
# A doctor may be asked inside a job: the processes here are no ranks of it.
_OF_A_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def ask(question: str, *arguments: str, limit_s: float, environment: Mapping[str, str] | None = None) -> Any:
    """What another process answers.

    Raises:
        PackcliError: what it raised.
        RunError: it crashed, or did not answer in time.
    """
    [answer] = ask_several(question, *arguments, limit_s=limit_s, environments=[environment or {}])
    return answer


def ask_several(
    question: str, *arguments: str, limit_s: float, environments: Sequence[Mapping[str, str]]
) -> list[Any]:
    """One process for each environment, all at the same time; raises as `ask`."""
    deadline = time.monotonic() + limit_s
    command = [sys.executable, "-m", __name__, str(os.getpid()), question, *arguments]
    own = {name: value for name, value in os.environ.items() if name not in _OF_A_JOB}
    processes = [
        subprocess.Popen(
            command,
            env={**own, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for more in environments
    ]
    try:
        return [_answer(process, deadline, limit_s) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # what waits for a dead file server stays
                    process.communicate(timeout=_LAST_S)


def _answer(process: subprocess.Popen[bytes], deadline: float, limit_s: float) -> Any:
    try:
        out, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise RunError(f"no answer in {limit_s:g} s", "") from None
    lines = out.splitlines()
    if process.returncode == 0 and lines:
        answer = orjson.loads(lines[-1])  # libraries print before it
        if error := answer["error"]:
            raise of_kind(error["kind"], error["cause"], error["fix"])
        return answer["found"]
    said = errors.decode(errors="replace").strip().splitlines()
    if process.returncode < 0:
        raise RunError(f"a process of its own was killed by {signal.Signals(-process.returncode).name}", "")
    raise RunError(f"a process of its own ended with: {said[-1] if said else 'no word'}", "")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _found(question: str, arguments: Sequence[str]) -> Any:
    match question:
        case "storage":
            from packcli.doctor import storage

            return storage.look(*arguments)
        case "torch":
            from packcli.doctor import answers

            return answers.facts()
        case "attention":
            from packcli.doctor import answers

            return answers.attend(*arguments)
        case "loop-back":
            from packcli.doctor import loopback

            return loopback.exchange(*arguments)
        case "sentences":
            from packcli.doctor import scoring

            return scoring.split(*arguments)
        case _:
            raise ValueError(question)


def main() -> None:
    parent, question, *arguments = sys.argv[1:]
    die_with_parent(int(parent))
    answer: dict[str, Any] = {"found": None, "error": None}
    try:
        answer["found"] = _found(question, arguments)
    except PackcliError as error:
        answer["error"] = {"kind": error.kind, "cause": error.cause, "fix": error.fix}
    sys.stdout.buffer.write(b"\n" + orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE))


if __name__ == "__main__":
    main()
