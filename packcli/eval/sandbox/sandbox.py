"""Runs programs that a model wrote, where they can harm nothing: bubblewrap, tried before it is trusted.

Accident-proof, not cheat-proof: docs/sandbox.md says what is kept out and what is not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packcli.errors import MissingError, RunError
from packcli.log import plain
from packcli.processes import cores

Why = Literal["passed", "failed", "timeout", "output", "killed"]
Note = Callable[[int, int, str], None]

TIMEOUT_S = 8.0
STARTUP_S = 60.0
"""How long the sandbox itself may take to start on a machine that is busy; no program's time."""
OUTPUT_BYTES = 2**20
MAX_WORKERS = 8
WORST_CASE_BYTES = 4 * 2**30
"""What one sandbox can hold at most: processes times address space (`guest.py`), and its /tmp."""

_TMP_BYTES = 64 * 2**20
_SHM_BYTES = 2**20  # semaphores of `multiprocessing`
_TAIL_BYTES = 4096
_NOBODY = 65534
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # all of it; the order of a set of strings must not decide a score
_SYSTEM_PYTHON = "/usr/bin/python3"
_OLDEST_PYTHON = (3, 11)  # packcli's own floor
_OLDEST = (0, 8)  # the first with --disable-userns
_UNSAFE = "`--unsafe-no-sandbox` runs model-written code without one"
_FINDINGS = {
    "network": "reach this machine's network",
    "read": "read files outside",
    "write": "write files outside",
    "environment": "read environment variables",
    "processes": "see processes outside",
    "namespace": "make a user namespace",
    "capabilities": "keep capabilities",
    "fork": "start processes without end",
    "memory": "take memory without end",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: `passed` only if it ran to its last line without an exception.

    `why` it did not: `failed` (an exception, or an exit before the end), `timeout`, `output` (over 1 MiB),
    `killed` (by a signal: out of memory, a crash). `detail`: the last line it wrote to stderr, 200 characters at
    most, control characters shown; `wall_s`: its own time, without the start of the sandbox.
    """

    passed: bool
    why: Why
    detail: str
    wall_s: float


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One way of running programs. `name` says which, in results and in the protocol's hash."""

    name: str
    command: tuple[str, ...]
    """What starts a Python; its options and what it runs are appended."""
    confined: bool

    def run(self, program: str, *, timeout_s: float = TIMEOUT_S) -> Outcome:
        """Run the Python source `program`.

        Raises:
            RunError: the sandbox did not start, so that nothing is known of the program.
        """
        nonce = secrets.token_hex(16)
        order = json.dumps({"program": program, "nonce": nonce, "cpu_s": math.ceil(timeout_s) + 1}).encode()
        receiver, sender = os.pipe()
        try:
            process = self._start(sender)
        except OSError as error:
            os.close(receiver)
            raise RunError(f"the sandbox did not start: {error}", _UNSAFE) from None
        finally:
            os.close(sender)
        with process, os.fdopen(receiver, "rb") as channel:
            try:
                heard = _converse(process, channel.fileno(), order, timeout_s)
            finally:  # the sandbox's first process goes, and the kernel takes all others with it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if heard.begun_s is None:
            raise RunError(f"the sandbox did not start: {_last_line(heard.errors) or 'no word'}", _UNSAFE)
        return _outcome(heard, b"+" + nonce.encode(), process.returncode, timeout_s)

    def run_all(
        self, programs: Sequence[str], *, workers: int | None = None, note: Note | None = None
    ) -> list[Outcome]:
        """`run` of each program, in order; `note(done, total, "")` as each ends.

        `workers` run at a time, as many as there are cores and memory for (`MAX_WORKERS` at most) if None.
        """
        with ThreadPoolExecutor(workers or _num_workers()) as pool:
            futures = [pool.submit(self.run, program) for program in programs]
            try:
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    if note is not None:
                        note(done, len(programs), "")
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in futures]

    def _start(self, channel: int) -> subprocess.Popen[bytes]:
        guest = Path(__file__).with_name("guest.py").read_text(encoding="utf-8")
        # -S: the standard library alone, so that a score does not depend on what else is installed.
        python = ("-s", "-S", "-B", "-X", "utf8", "-c", guest, str(channel))
        # The kernel counts no processes of the real root, and what only root may read stays shut.
        drop = self.confined and os.geteuid() == 0
        return subprocess.Popen(
            [*self.command, *python],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[channel],
            # Not left to bubblewrap, whose own process would show what it was started with in /proc/1/environ.
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
            user=_NOBODY if drop else None,
            group=_NOBODY if drop else None,
            extra_groups=[] if drop else None,
        )


@dataclass(frozen=True, slots=True)
class _Heard:
    """All that came out of a sandbox until it ended, or had to; of each file its last bytes."""

    channel: bytes
    errors: bytes
    num_bytes: int
    begun_s: float | None
    ended_s: float
    late: bool


def _converse(process: subprocess.Popen[bytes], channel: int, order: bytes, timeout_s: float) -> _Heard:
    """Hand over `order`; listen until nobody is left to speak, the time is up, or too much was said."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    stdin, stderr = process.stdin.fileno(), process.stderr.fileno()
    os.set_blocking(stdin, False)
    said = {channel: b"", stderr: b"", process.stdout.fileno(): b""}
    num_bytes, begun_s, deadline_s = 0, None, time.monotonic() + STARTUP_S
    with selectors.DefaultSelector() as waiting:
        waiting.register(stdin, selectors.EVENT_WRITE)
        for file in said:
            waiting.register(file, selectors.EVENT_READ)
        while waiting.get_map() and num_bytes <= OUTPUT_BYTES and (left_s := deadline_s - time.monotonic()) > 0:
            for key, _ in waiting.select(left_s):
                if key.fd == stdin:
                    order = order[_written(stdin, order) :]
                    if not order:
                        waiting.unregister(stdin)
                        process.stdin.close()
                elif part := os.read(key.fd, 2**16):
                    num_bytes += len(part)
                    said[key.fd] = (said[key.fd] + part)[-_TAIL_BYTES:]
                else:
                    waiting.unregister(key.fd)
            if begun_s is None and said[channel]:
                begun_s = time.monotonic()
                deadline_s = begun_s + timeout_s
        late = bool(waiting.get_map()) and num_bytes <= OUTPUT_BYTES
    return _Heard(said[channel], said[stderr], num_bytes, begun_s, time.monotonic(), late)


def _written(file: int, data: bytes) -> int:
    """How much of `data` is dealt with; all, where nobody reads it."""
    try:
        return os.write(file, data[: 2**16])
    except BrokenPipeError:
        return len(data)


def _outcome(heard: _Heard, expected: bytes, code: int, timeout_s: float) -> Outcome:
    why: Why
    own_words = ""
    # bubblewrap reports a signal as a shell does; started without it, Python does so by a negative number.
    number = -code if code < 0 else code - 128
    if heard.num_bytes > OUTPUT_BYTES:
        why, own_words = "output", f"wrote more than {OUTPUT_BYTES} bytes"
    elif heard.channel == expected:
        why = "passed"
    elif heard.late:
        why, own_words = "timeout", f"did not end in {timeout_s:g} s"
    elif number > 0:
        why, own_words = "killed", f"killed by signal {number}"
    else:
        why, own_words = "failed", f"exited with status {code} before its end"
    assert heard.begun_s is not None
    detail = _last_line(heard.errors) or own_words
    return Outcome(why == "passed", why, detail, heard.ended_s - heard.begun_s)


def _last_line(errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    return plain(lines[-1])[:200] if lines else ""


def find(*, unsafe: bool = False) -> Sandbox:
    """The sandbox of this machine, tried out once per process; with `unsafe` a plain process with limits.

    Raises:
        MissingError: there is none, or a program inside could do what it must not.
    """
    python = _python()
    if unsafe:
        return Sandbox(f"no sandbox, {python.name}", (python.path,), confined=False)
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise MissingError(
            "model-written code runs only in a sandbox, and bubblewrap (`bwrap`) is not installed",
            f"apt install bubblewrap; or {_UNSAFE}",
        )
    return _tried(bwrap, python)


@functools.cache
def _tried(bwrap: str, python: _Python) -> Sandbox:
    version = _version(bwrap)
    if tuple(map(int, version.split("."))) < _OLDEST:
        raise MissingError(f"{bwrap} is version {version}", f"version 0.8.0 or later is needed; or {_UNSAFE}")
    sandbox = Sandbox(f"bwrap {version}, {python.name}", _bwrap(bwrap, python), confined=True)
    if findings := preflight(sandbox):
        raise MissingError(f"`{sandbox.name}` is refused: {'; '.join(findings)}", _UNSAFE)
    return sandbox


def preflight(sandbox: Sandbox) -> list[str]:
    """Let a program try to break out of `sandbox`; what it could do, as sentences, empty where it holds."""
    attempts = Path(__file__).with_name("escapes.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="packcli-") as name, socket.create_server(("127.0.0.1", 0)) as server:
        directory, port = Path(name), server.getsockname()[1]
        (directory / "secret").write_text("not for models")
        directory.chmod(0o777)  # or permissions would do the sandbox's work, and a user's own files have others
        facts = f"{name!r}, {port}, {str(Path('/proc/self/ns/pid').readlink())!r}"
        program = f"{attempts}\nimport sys\nprint('found', *found({facts}), file=sys.stderr)\n"
        try:
            outcome = sandbox.run(program)
        except RunError as error:
            return [error.cause]
    if not outcome.passed:
        return [f"it ran no program: {outcome.why}, {outcome.detail}"]
    return [f"a program could {_FINDINGS[finding]}" for finding in outcome.detail.split()[1:]]


@dataclass(frozen=True, slots=True)
class _Python:
    """A Python that runs programs: `binds` must be visible inside, beside /usr."""

    path: str
    version: str
    binds: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"python {self.version}"


@functools.cache
def _python() -> _Python:
    """packcli's own where it lies in /usr; else the system's, if it is new enough; else packcli's own.

    The sandbox shows /usr anyway, and nothing of a home directory need be shown. What decides a score is the minor
    version, which is part of the sandbox's name.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    prefix = Path(sys.base_prefix).resolve()
    own = str(prefix / "bin" / f"python{version}")
    if prefix.is_relative_to("/usr"):
        return _Python(own, version, ())
    ask = "import ctypes, sys; print('%d.%d' % sys.version_info[:2])"  # ctypes: not a minimal installation
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        command = [_SYSTEM_PYTHON, "-I", "-S", "-c", ask]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
        if tuple(map(int, found.split("."))) >= _OLDEST_PYTHON:
            return _Python(_SYSTEM_PYTHON, found, ())
    return _Python(own, version, (own, str(prefix / "lib")))


def _bwrap(bwrap: str, python: _Python) -> tuple[str, ...]:
    """bubblewrap's command line: nothing of the host but programs and libraries, read-only."""
    roots = []
    for name in ("/bin", "/lib", "/lib32", "/lib64"):
        path = Path(name)
        if path.is_symlink():  # into /usr, nearly everywhere
            roots += ["--symlink", str(path.readlink()), name]
        elif path.is_dir():
            roots += ["--ro-bind", name, name]
    return (
        *(bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"),
        *("--uid", str(_NOBODY), "--gid", str(_NOBODY), "--hostname", "sandbox"),
        *("--die-with-parent", "--new-session"),
        *("--ro-bind", "/usr", "/usr", *roots, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"),
        *("--proc", "/proc", "--dev", "/dev", "--size", str(_SHM_BYTES), "--tmpfs", "/dev/shm"),
        *("--size", str(_TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *(word for path in python.binds for word in ("--ro-bind", path, path)),
        # bubblewrap's own root and /dev are file systems in memory without a limit.
        *("--remount-ro", "/dev", "--remount-ro", "/"),
        python.path,
    )


def _version(bwrap: str) -> str:
    """ "0.8.0" of "bubblewrap 0.8.0"."""
    try:
        told = subprocess.run([bwrap, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        told = ""
    match = re.search(r"\d+(\.\d+)+", told)
    if match is None:
        raise MissingError(f"{bwrap} does not tell its version", f"apt install bubblewrap; or {_UNSAFE}")
    return match[0]


def _num_workers() -> int:
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores(), MAX_WORKERS, memory_bytes // WORST_CASE_BYTES))
