"""Bytes on disk: atomic writes, hashes, JSON lines, locks. Knows nothing of what the files mean."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from io import BufferedWriter
from pathlib import Path
from typing import Any

import orjson

from packcli.errors import LockedError, MissingError

_CHUNK_BYTES = 1 << 20
_SMALL_BYTES = 1 << 16
_LOOKS, _LOOK_S, _PATIENCE_S = 10, 0.02, 10.0


def digest(value: object) -> str:
    """16 hex digits of the sha256 of `value` as canonical JSON (sorted keys, no spaces)."""
    canonical = orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    return hashlib.sha256(canonical).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def fsync_directory(path: Path) -> None:
    """Make renames inside `path` survive a power cut; a rename alone may not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BufferedWriter]:
    """A binary file that appears under its name whole or not at all (temporary file, fsync, rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _commit_point(path, "before")
        temporary.replace(path)
        fsync_directory(path.parent)
        _commit_point(path, "after")
    except OSError as error:
        raise disk_full(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


def disk_full(error: OSError, path: Path) -> Exception:
    """The error a user can act on when a disk or quota is full; any other as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    free = shutil.disk_usage(path.parent).free
    fix = "free some space, or choose another run directory with --runs; what is finished is kept"
    return MissingError(f"{path}: the disk is full ({free:,} bytes free)", fix)


def _commit_point(path: Path, when: str) -> None:
    """Where tests kill a process: just before and just after a file gets its final name.

    `PACKCLI_FAULT=log:FILE` appends each point's name to FILE, `kill:NAME` dies at the point of that name.
    """
    fault = os.environ.get("PACKCLI_FAULT")
    if fault is None:
        return
    action, _, argument = fault.partition(":")
    name = f"{path.name}:{when}"
    if action == "log":
        with Path(argument).open("a") as log:
            log.write(f"{name}\n")
    elif action == "kill" and argument == name:
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def atomic_directory(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A directory that appears under its name whole or not at all. An older one is replaced, or stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        _commit_point(path, "before")
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        try:
            temporary.replace(path)
        except OSError:  # somebody else's is there now
            if replace or not path.is_dir():
                raise
        fsync_directory(path.parent)
        _commit_point(path, "after")
    except OSError as error:
        raise disk_full(error, path) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON with sorted keys and a final newline, atomically."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    with atomic_write(path) as file:
        file.write(orjson.dumps(value, option=options | orjson.OPT_SERIALIZE_NUMPY))


def read_json(path: Path | str) -> Any:
    """The JSON document in `path`; raises `OSError` or `orjson.JSONDecodeError`."""
    return orjson.loads(read_bytes(path))


def read_bytes(path: Path | str) -> bytes:
    """All of a small file, by the fewest calls: a report reads seventy thousand."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.read(file, _SMALL_BYTES)
        if len(found) < _SMALL_BYTES:
            return found
        with open(file, "rb", closefd=False) as rest:
            return found + rest.read()
    finally:
        os.close(file)


def json_line(value: object) -> bytes:
    """`value` as one line of JSON, newline included, keys in the order given."""
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)


def write_jsonl(path: Path, values: list[Any]) -> None:
    """One JSON line per value, atomically."""
    with atomic_write(path) as file:
        for value in values:
            file.write(json_line(value))


def read_jsonl(path: Path) -> list[Any]:
    """Values of a JSON-lines log. A torn last line (the writer was killed) is left out."""
    lines = path.read_bytes().split(b"\n")
    return [orjson.loads(line) for line in lines[:-1] if line]


def _take(descriptor: int) -> bool:
    """Lock a file for oneself. Who only looks whether it is locked shares it for a moment, and is waited for; a
    writer may be about to die.
    """
    deadline, refused = time.monotonic() + _PATIENCE_S, 0
    while refused < _LOOKS and time.monotonic() < deadline:
        if _flock(descriptor, fcntl.LOCK_EX):
            return True
        if _flock(descriptor, fcntl.LOCK_SH):  # nobody writes
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        else:
            refused += 1
        time.sleep(_LOOK_S)
    return False


def _flock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(directory: Path, what: str) -> Iterator[None]:
    """Hold `directory` for one writer. The kernel frees the lock when the holder dies.

    Raises:
        LockedError: another process holds it; the message names its process id.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a+b") as file:
        if not _take(file.fileno()):
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown"
            raise LockedError(
                f"{what} is being written by process {holder}",
                "wait for it, or stop it and run the same command again",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        yield
