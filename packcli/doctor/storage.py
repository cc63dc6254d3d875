"""Whether a file system keeps packcli's promises: what is written is there, appears whole, and has one writer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packcli.doctor import elsewhere
from packcli.doctor.checks import Check, Finding
from packcli.doctor.machine import shown, size
from packcli.errors import MissingError, PackcliError
from packcli.files import atomic_write, locked

_LIMIT_S = 15.0
_SECOND_S = 10.0
SHARED = frozenset({
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "cifs", "smb3", "9p", "afs", "glusterfs",
    "fuse.glusterfs", "wekafs", "panfs", "orangefs", "pvfs2", "virtiofs",
})  # fmt: skip
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_LITTLE_BYTES = 64 * 2**20
_LITTLE_FILES = 1000
_ELSEWHERE = "choose another run directory with --runs"
# By itself, so that no lock is inherited: says whether it gets the lock that somebody holds.
_SECOND = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "rb"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("got it")
except BlockingIOError:
    print("refused")
"""


def checks(runs: Path) -> list[Check]:
    return [
        Check("run directory", lambda: _run_directory(runs), _LIMIT_S + 1),
        Check("disk", lambda: [disk(there(runs))]),
    ]


def _run_directory(runs: Path) -> Iterator[Finding]:
    """In a process of its own, as a file server that is gone keeps whoever asks it."""
    for found in elsewhere.ask("storage", str(runs), limit_s=_LIMIT_S):
        yield Finding(**found)


def there(path: Path) -> Path:
    """The directory that exists, of a path and those above it."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.is_dir())


def look(runs: str) -> list[dict[str, Any]]:
    """The findings on a run directory, which need not exist yet."""
    directory = there(Path(runs))
    if Path(runs).exists() and not Path(runs).is_dir():
        cause = f"{shown(Path(runs))} is a file"
        return [_record(Finding("run directory", "failed", cause, "no stage can be made there", _ELSEWHERE))]
    found = [_kind(directory)]
    try:
        with tempfile.TemporaryDirectory(prefix=".packcli-doctor-", dir=directory) as name:
            found += [_writes(Path(name)), _locks(Path(name))]
    except (OSError, MissingError) as error:
        why = error.strerror if isinstance(error, OSError) else "the disk is full"
        cause = f"nothing can be written in {directory}: {why}"
        found.append(Finding("files", "failed", cause, "no stage can be made there", _ELSEWHERE))
    return [_record(one) for one in found]


def _record(one: Finding) -> dict[str, Any]:
    return {key: getattr(one, key) for key in ("name", "state", "found", "means", "fix")}


def _kind(directory: Path) -> Finding:
    kind = file_system(directory)
    if kind in SHARED:
        means = "shared: the nodes of a cluster can work in it. Each node's clock and locks count"
    elif kind in _IN_MEMORY:
        means = "in memory: all is gone when the machine restarts"
    else:
        means = "of this machine alone, unless it is exported: a cluster's nodes would not see it"
    return Finding(
        "run directory", "ok", f"{shown(directory)} on {kind or 'a file system of unknown kind'}", means
    )


def file_system(directory: Path) -> str:
    """Its type as the kernel names it; "" where it does not say."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    mounts = [line.split() for line in lines]
    real = directory.resolve()
    holding = [(len(where), kind) for _, where, kind, *_ in mounts if real.is_relative_to(_unescaped(where))]
    # Of two at one place the later one hides the other.
    return max(enumerate(holding), key=lambda item: (item[1][0], item[0]), default=(0, (0, "")))[1][1]


def _unescaped(where: str) -> str:
    return where.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _writes(directory: Path) -> Finding:
    """As every file of a stage is written: temporary file, fsync, rename over what is there, fsync of both."""
    path, times = directory / "file", []
    for content in (b"one", b"two"):
        began = time.perf_counter()
        with atomic_write(path) as file:
            file.write(content)
        times.append(time.perf_counter() - began)
        if path.read_bytes() != content or [one.name for one in directory.iterdir()] != [path.name]:
            cause = "a file that was renamed over another is not the one that is read"
            return Finding("files", "failed", cause, "a stage may look done and hold other bytes", _ELSEWHERE)
    found = f"written, synced, renamed and read back in {1000 * min(times):.1f} ms"
    return Finding("files", "ok", found, "files appear whole or not at all")


def _locks(directory: Path) -> Finding:
    """Two processes want one lock, as two sweeps want one stage."""
    means = "one writer a stage"
    fix = f"mount it with locks (Lustre: -o flock; NFS: without nolock), or {_ELSEWHERE}"
    try:
        with locked(directory, "the doctor's lock"):
            second = _second(directory / ".lock")
    except PackcliError as error:
        return Finding("locks", "failed", error.cause, "no stage can be made there", fix)
    if second != "refused":
        bad = "two packcli could write one stage at once, and spoil it"
        return Finding("locks", "failed", f"a second process gets a lock that another holds: {second}", bad, fix)
    if (after := _second(directory / ".lock")) != "got it":
        bad = "a stage whose writer died would stay locked"
        return Finding("locks", "failed", f"a lock that was given back is not free: {after}", bad, fix)
    return Finding("locks", "ok", "flock keeps a second process out, and lets it in afterwards", means)


def _second(path: Path) -> str:
    command = [sys.executable, "-I", "-S", "-c", _SECOND, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECOND_S, check=False)
    return done.stdout.strip() or (done.stderr.strip().splitlines() or ["no word"])[-1]


def disk(directory: Path, needed_bytes: int = 0) -> Finding:
    """Room on the disk of a directory; with `needed_bytes`: for a sweep."""
    free, nodes = shutil.disk_usage(directory).free, os.statvfs(directory)
    files = nodes.f_favail if nodes.f_files else None  # some have no fixed number
    found = f"{size(free)} free" + (f", {files:,} more files" if files is not None else "")
    fix = f"free some space, or {_ELSEWHERE}; what is finished is kept"
    if free < _LITTLE_BYTES or (files is not None and files < _LITTLE_FILES):
        return Finding("disk", "failed", found, "the disk is all but full: little can be made there", fix)
    if free < needed_bytes:
        means = f"the sweep takes about {size(needed_bytes)}"
        return Finding("disk", "missing", found, means, fix)
    means = f"the sweep takes about {size(needed_bytes)}" if needed_bytes else ""
    return Finding("disk", "ok", found, means)
