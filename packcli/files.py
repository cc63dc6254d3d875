"""Bytes on disk: atomic writes, hashes, JSON lines, locks. Knows nothing of what the files mean."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from io import BufferedWriter
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from packcli.commit_points import passing
from packcli.errors import ConfigError, IntegrityError, LockedError, MissingError

_CHUNK_BYTES = 1 << 20
_SMALL_BYTES = 1 << 16
_LOOKS, _LOOK_S, _PATIENCE_S = 10, 0.02, 10.0
_ABANDONED_S = 600.0
"""After it nobody writes any more to an unfinished file of another machine, whose processes cannot be seen."""
_SEAL = re.compile(rb'\{"([^"]{8})":"([^"]{16})",')  # also with a damaged key: nothing unsealed begins so


def digest(value: object) -> str:
    """16 hex digits of the sha256 of `value` as canonical JSON (sorted keys, no spaces).

    Raises:
        ConfigError: a whole number in it does not fit JSON's 64 bits.
    """
    try:
        canonical = orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError as error:
        raise ConfigError(
            f"a value that ids cannot be made of: {error}", "give one of less than 64 bits"
        ) from None
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
    temporary = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        passing(path, "before")
        temporary.replace(path)
        fsync_directory(path.parent)
        passing(path, "after")
    except OSError as error:
        raise disk_full(error, path) from None
    finally:
        with contextlib.suppress(OSError):  # it may be gone, or never have been there
            temporary.unlink()


def make_directory(path: Path, what: str) -> None:
    """A directory that a user named for `what`, in their words.

    Raises:
        ConfigError: it is a file, or cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise ConfigError(
            f"{what} cannot be written to `{path}`: {why}", "name a directory that can be written"
        ) from error


def disk_full(error: OSError, path: Path) -> Exception:
    """The error a user can act on when a disk or quota is full, or nobody may write there; any other as it is."""
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        where = error.filename or path
        return ConfigError(f"{where}: {os.strerror(error.errno)}", "choose another run directory with --runs")
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    free = shutil.disk_usage(next(there for there in path.absolute().parents if there.exists())).free
    fix = "free some space, or choose another run directory with --runs; what is finished is kept"
    return MissingError(f"{path}: the disk is full ({free:,} bytes free)", fix)


def unfinished(path: Path) -> Path:
    """What `path` is called until it is whole: it says who writes it, should that be killed."""
    return path.with_name(f".{path.name}.tmp-{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def clear_unfinished(directory: Path, below: str = "", *, held: bool = False) -> None:
    """Delete what writers that were killed left unfinished, in `directory` or (`below`: `**/`) anywhere in it.

    `held`: nobody else writes there, so whatever is unfinished was left.
    """
    for left in list(directory.glob(f"{below}.*.tmp-*")):
        if held or _is_abandoned(left):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Whether this has, or lies in something that has, no name of its own yet, or no longer."""
    return any(part.startswith(".") and ".tmp-" in part for part in path.parts)


def _is_abandoned(left: Path) -> bool:
    host, _, writer = left.name.rpartition(".tmp-")[2].rpartition("-")[0].rpartition("-")
    if host == platform.node() and writer.isdigit():
        return not is_alive(int(writer))
    try:
        return time.time() - left.lstat().st_mtime > _ABANDONED_S
    except FileNotFoundError:
        return False


def is_alive(process: int) -> bool:
    """Whether this machine has a process of that number. One that ended, which nobody has asked after, is none."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):  # not Linux, or it ended just now
        return True


@contextlib.contextmanager
def atomic_directory(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A directory that appears under its name whole or not at all. An older one goes just before, or stays."""
    temporary = unfinished(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        passing(path, "before")
        if replace:
            remove_directory(path)
        try:
            temporary.replace(path)
        except OSError:  # somebody else's is there now
            if replace or not path.is_dir():
                raise
        fsync_directory(path.parent)
        passing(path, "after")
    except OSError as error:
        raise disk_full(error, path) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete a directory that is gone under its name at once: killed half way, this leaves no half of it there."""
    doomed = unfinished(path)
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return
    except OSError:  # such as a mount point
        doomed = path
    passing(path, "gone")
    shutil.rmtree(doomed, ignore_errors=True)


def _indented(value: object) -> bytes:
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(value, option=options | orjson.OPT_SERIALIZE_NUMPY)


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON with sorted keys and a final newline, atomically."""
    with atomic_write(path) as file:
        file.write(_indented(value))


def seal(document: bytes) -> bytes:
    """A JSON object, not an empty one, that begins with a checksum of what follows: 16 digits of its sha256."""
    rest = document[1:]
    return b'{"checksum":"' + _checksum(rest) + b'",' + rest


def unseal(document: bytes, path: Path | str) -> Any:
    """What was sealed, without its checksum. A document without one, as older versions wrote it, is not checked.

    Raises:
        IntegrityError: the checksum differs, or it is no JSON. `path`: where it lies.
    """
    found = _SEAL.match(document)
    try:
        value = orjson.loads(document)
    except orjson.JSONDecodeError:
        fix = f"delete {Path(path).parent} and run again"
        raise IntegrityError(f"{path}: damaged, or cut short", fix) from None
    if found is None:
        return value
    if found.groups() != (b"checksum", _checksum(document[found.end() :])):
        fix = f"delete {Path(path).parent} and run again"
        raise IntegrityError(f"{path}: its bytes changed (its own checksum differs)", fix)
    del value["checksum"]
    return value


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content.rstrip(b"\n")).hexdigest()[:16].encode()  # a line may be read without its end


def write_sealed(path: Path, value: object) -> None:
    """A JSON object as `write_json` writes it, sealed."""
    with atomic_write(path) as file:
        file.write(seal(_indented(value)))


def read_sealed(path: Path | str) -> Any:
    """The JSON object in `path`.

    Raises:
        OSError: it cannot be read.
        IntegrityError: as `unseal`.
    """
    return unseal(read_bytes(path), path)


def read_json(path: Path | str) -> Any:
    """The JSON document in `path`; raises `OSError` or `orjson.JSONDecodeError`."""
    return orjson.loads(read_bytes(path))


def read_bytes(path: Path | str) -> bytes:
    """All of a small file, by the fewest calls: a report reads seventy thousand."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.read(file, _SMALL_BYTES)
        while more := os.read(file, _SMALL_BYTES):  # some file systems give less than is asked for
            found += more
        return found
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


def append_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Add whole lines to a file and wait until they are on disk.

    Raises:
        MissingError: the disk is full.
    """
    try:
        passing(path, "before")
        with path.open("ab") as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        passing(path, "after")
    except OSError as error:
        raise disk_full(error, path) from None


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
    """Hold `directory` for one writer.

    Raises:
        LockedError: another process holds it; the message names its process id, its host, and since when.
        ConfigError, MissingError: as `held`.
    """
    with held(directory / ".lock", what):
        passing(directory / ".lock", "after")
        yield


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file. The kernel frees it when the holder dies.

    Raises:
        LockedError: as `locked`.
        ConfigError: nobody may write there, or the file system has no locks.
        MissingError: the disk is full.
    """
    try:
        file = _lock(path, what)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise ConfigError(
                f"{path.parent}: its file system has no locks ({os.strerror(error.errno)})",
                "choose another run directory with --runs; `packcli doctor --runs DIR` tries one",
            ) from None
        raise disk_full(error, path) from None
    with file:
        yield


def _lock(path: Path, what: str) -> BinaryIO:
    """A lock file, locked, and signed by its holder."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(path.open("a+b"))
            if not _take(file.fileno()):
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "unknown"
                raise LockedError(
                    f"{what} is being written by process {holder}",
                    "wait for it, or stop it and run the same command again",
                ) from None
            if not _has_name(file, path):
                continue  # deleted since it was opened: whoever comes next would lock another
            file.truncate(0)
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            file.write(f"{os.getpid()} on {platform.node()} since {since}\n".encode())
            file.flush()
            opened.pop_all()
            return file


def _has_name(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock. Shared, so that two who ask do not take each other for the holder."""
    try:
        with path.open("rb") as file:
            return not _flock(file.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise disk_full(error, path) from None
