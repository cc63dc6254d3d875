"""What a program tries inside a sandbox to find out whether it holds. Sent as text, as `guest.py` is.

Each attempt returns True where it got what no model-written program may have; one that is stopped may raise.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

CLONE_NEWUSER = 0x10000000
OUR_OWN = {"PYTHONHASHSEED", "PWD", "LC_CTYPE"}  # set for the guest, by bubblewrap, and by Python itself


def found(directory: str, port: int, namespace: str) -> list[str]:
    """The names of the attempts that succeeded.

    `directory` of the host holds a file `secret` and may be written by anyone; on `port` of the host's loopback
    something listens; `namespace` is the host's PID namespace, as /proc spells it.
    """
    new_namespace = functools.partial(ctypes.CDLL(None).unshare, CLONE_NEWUSER)
    attempts: dict[str, Callable[[], object]] = {
        "network": lambda: socket.create_connection(("127.0.0.1", port), timeout=1),
        "read": lambda: Path(directory, "secret").exists() or Path("/etc/passwd").exists(),
        "write": lambda: any([writes(where) for where in (directory, "/", "/usr", "/dev")]),
        "environment": environment,
        "processes": lambda: str(Path("/proc/self/ns/pid").readlink()) == namespace,
        "namespace": lambda: new_namespace() == 0,
        "capabilities": capabilities,
        "fork": lambda: forks(40),
        "memory": lambda: bytearray(2**30),
    }
    successes: list[str] = []
    for name, attempt in attempts.items():
        with contextlib.suppress(OSError, MemoryError):
            if attempt():
                successes.append(name)
    return successes


def writes(where: str) -> bool:
    try:
        path = Path(where, "packcli-was-here")
        path.touch(exist_ok=False)
        path.unlink()
    except OSError:
        return False
    return True


def environment() -> bool:
    """A variable that is not the sandbox's own, here or in any process that can be seen."""
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            variables = file.read_text(errors="replace").split("\0")
            if {variable.partition("=")[0] for variable in variables} - {"", *OUR_OWN}:
                return True
    return bool(os.environ.keys() - OUR_OWN)


def capabilities() -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    return any(line.startswith("CapEff:") and int(line.split()[1], 16) for line in lines)


def forks(count: int) -> bool:
    children = []
    try:
        for _ in range(count):
            child = os.fork()
            if child == 0:
                time.sleep(5)
                os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, 9)
    return True
