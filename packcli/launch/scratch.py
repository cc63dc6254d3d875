"""Copies of what a training reads, on a disk of the node: ranks that read a shared file system at random are slow.

    <directory>/packcli-<uid>/store/<kind>/<id>/       a stage's files, its manifest last, as in a run directory
    <directory>/packcli-<uid>/store/<kind>/<id>.users  held shared by each process that reads the copy
    <directory>/packcli-<uid>/store/<kind>/<id>.lock   held by the one that makes or checks it
    <directory>/packcli-<uid>/inductor  triton         what compilers keep

Copies are checked against the checksums of the run directory's own manifest each time they are to be used. They
stay for the next job of the node; one that no process holds makes room for others, the longest unused first.
Locks stay for good: one that is deleted while somebody waits for it would be held twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import IO, Any

from packcli.commit_points import passing
from packcli.errors import ConfigError, IntegrityError
from packcli.files import clear_unfinished, sha256_file, unfinished, write_sealed
from packcli.log import logger
from packcli.plan import Kind, TrainOrder
from packcli.processes import cores
from packcli.store import FileRecord, Manifest, Store, check_listed

Note = Callable[[int, int, str], None]

VARIABLES = ("SLURM_TMPDIR", "TMPDIR", "SLURM_JOB_ID", "USER")
"""All that `scratch` may hold of the environment."""

_KINDS: tuple[Kind, ...] = ("tokens", "index")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w*)\}|)")
_ID = re.compile(r"\w[\w.-]*")
_MARGIN = 1.05  # others write to the disk, too
_TICK_S = 0.2
_TRIES = 2
_THREADS = 8  # what a network disk and sha256 take at once; both let go of Python's lock

_held: list[IO[bytes]] = []
"""Locks of the copies that this process and its ranks read, until it ends."""


def expand(text: str, environ: Mapping[str, str]) -> Path:
    """The directory that `text` names on this node, its `$VARIABLES` filled in.

    Raises:
        ConfigError: a variable that is not allowed or not set; a path that is not absolute, or holds `..`.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2] or ""
        if name not in VARIABLES:
            allowed = ", ".join(f"${variable}" for variable in VARIABLES)
            raise ConfigError(f"`scratch: {text}`: `{found[0]}` cannot stand in it", f"it may hold {allowed}")
        if not environ.get(name):
            fix = "name a directory that every node has"
            raise ConfigError(f"`scratch: {text}`: ${name} is not set on {platform.node()}", fix)
        return environ[name]

    path = _VARIABLE.sub(value, text)
    if not path.startswith("/") or ".." in PurePosixPath(path).parts or not path.isprintable():
        shown = f"`scratch: {text}`" + (f" is `{path}`, which" if path != text else "")
        raise ConfigError(f"{shown} is no plain absolute path", "such as /local/scratch, without `..`")
    return Path(path)


def environment(directory: Path) -> dict[str, str]:
    """Where compilers keep what they make, for the environment of a node's ranks; nothing where a disk is broken.

    Raises:
        ConfigError: as `stage`.
    """
    home = _home(directory)
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {name: str(home / kept) for name, kept in names.items()} if home else {}


def stage(store: Store, order: TrainOrder, directory: Path, note: Note) -> Store:
    """`store` as the ranks of this node are to read it for `order`: tokens and rows from copies in `directory`.

    The copies stay until this process ends. Where the disk is too small or broken, it is `store` as it was, and a
    warning says why. `note` is called several times a second with (files, of all, remark), also while another
    process makes the same copy; what it raises ends the work, and the next call goes on with it.

    Raises:
        ConfigError: no such directory; what should be ours in it is someone else's; an id that is a path.
        IntegrityError: a file of the run directory is damaged.
    """
    home = _home(directory)
    if home is None:
        return store
    shared, copies = Store(store.root), Store(home)
    for kind, id_ in zip(_KINDS, (order.tokens, order.index), strict=True):
        if not _ID.fullmatch(id_):
            raise ConfigError(f"`{id_}` is no id of a stage", "submit the sweep again")
        manifest = shared.manifest(kind, id_)
        if manifest is None:
            return store  # the training says what is missing
        if not _stage(shared, copies, manifest, note):
            return store
    return Store(store.root, local=home)


def _home(directory: Path) -> Path | None:
    """Our directory in one that others may write to, made if need be; None where the disk does not let us."""
    try:
        if not directory.is_dir():
            fix = "name a directory that every node has as `scratch` in the profile, or leave it out"
            raise ConfigError(f"`scratch`: no directory `{directory}` on {platform.node()}", fix)
        return _own(directory / f"packcli-{os.geteuid()}")
    except OSError as error:
        logger.warning("`scratch`: `%s` on %s: %s; goes on without", directory, platform.node(), _reason(error))
        return None


def _own(path: Path) -> Path:
    """A directory that only this user can write to: code compiled here is run, and anyone may write to /tmp."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        why = "is no directory that belongs to you, and that only you can write to"
        fix = "have it removed, or name another directory as `scratch` in the profile"
        raise ConfigError(f"`scratch`: `{path}` on {platform.node()} {why}", fix)
    return path


def _stage(store: Store, copies: Store, manifest: Manifest, note: Note) -> bool:
    """Make one stage's copy whole, and keep it so; whether that could be."""
    kind, id_ = manifest.stage, manifest.id
    copy = copies.directory(kind, id_)
    wanted = manifest.model_copy(update={"outputs": _read_by_training(store, manifest)})
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        _hold(_beside(copy, "users"), note)
        with _beside(copy, "lock").open("ab") as file:
            _wait(file, fcntl.LOCK_EX, note)
            short = _complete(store, copies, wanted, note)
    except OSError as error:
        short = f"{_reason(error)} (in `{copies.root}`)"
    if short is not None:
        logger.warning("%s %s: no copy on %s, reads the run directory: %s", kind, id_, platform.node(), short)
    return short is None


def _read_by_training(store: Store, manifest: Manifest) -> dict[str, FileRecord]:
    """Shards, rows and the tokenizer, not what only making them needs.

    Raises:
        IntegrityError: a file outside the stage's directory.
    """
    directory = store.directory(manifest.stage, manifest.id)
    tokenizer = store.tokenizer(manifest.id)
    found = {}
    for name, record in manifest.outputs.items():
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            file = store.manifest_file(manifest.stage, manifest.id)
            raise IntegrityError(f"{file}: `{name}` is outside it", f"delete {directory} and run again")
        path = directory / name
        if path.suffix == ".arrow" or tokenizer in path.parents:
            found[name] = record
    return found


def _complete(store: Store, copies: Store, wanted: Manifest, note: Note) -> str | None:
    """Copy what is not there or damaged, then the manifest. Why not, if the disk is too small."""
    kind, id_ = wanted.stage, wanted.id
    source, copy = store.directory(kind, id_), copies.directory(kind, id_)
    _own(copy)
    for left in copy.rglob(".*.tmp-*"):  # of a process that was killed, as this one holds the lock
        left.unlink()
    checks = {name: (_is_whole, copy / name, record) for name, record in wanted.outputs.items()}
    whole = _side_by_side(checks, note, f"checks the copy of {kind} {id_}")
    missing = {name: record for name, record in wanted.outputs.items() if not whole[name]}
    if missing:
        started, num_bytes = time.monotonic(), sum(record.bytes for record in missing.values())
        needed = int(num_bytes * _MARGIN)
        if (free := _make_room(copies, needed)) < needed:
            return f"it needs {needed:,} bytes in `{copies.root}`, {free:,} are free"
        work = {name: (_copy, source, copy, name, record) for name, record in missing.items()}
        _side_by_side(work, note, f"copies {kind} {id_} to this node")
        spent = time.monotonic() - started
        logger.info("%s %s: %s bytes copied to %s in %.1f s", kind, id_, f"{num_bytes:,}", platform.node(), spent)
    if missing or _manifest(copies, kind, id_) != wanted:
        write_sealed(copies.manifest_file(kind, id_), wanted.model_dump())
    return None


def _manifest(copies: Store, kind: Kind, id_: str) -> Manifest | None:
    try:
        return copies.manifest(kind, id_)
    except IntegrityError:
        return None


def _is_whole(path: Path, record: FileRecord) -> bool:
    try:
        return path.stat().st_size == record.bytes and sha256_file(path) == record.sha256
    except OSError:  # not there, or the disk cannot read it
        return False


def _copy(source: Path, copy: Path, name: str, record: FileRecord) -> None:
    """Copy one file; it gets its name once its bytes, as they can be read back, are those of the manifest."""
    target = copy / name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(target)
    try:
        for _ in range(_TRIES):
            shutil.copyfile(source / name, temporary)
            if _is_whole(temporary, record):
                passing(target, "before")
                temporary.replace(target)
                passing(target, "after")
                return
            check_listed(source, {name: record}, checksums=True)
    finally:
        temporary.unlink(missing_ok=True)
    raise OSError(errno.EIO, "bytes change on their way to this disk")


def _make_room(copies: Store, needed: int) -> int:
    """Bytes free, once as many unused copies are gone as it takes to have `needed`."""
    directories = [copies.directory(kind, "") for kind in _KINDS]
    for directory in directories:
        clear_unfinished(directory)  # copies of which a deleter was killed
    found = [path for directory in directories for path in directory.glob("*.users")]
    for users in sorted(found, key=lambda path: path.stat().st_mtime):
        if copies.free_bytes() >= needed:
            break
        copy = users.with_name(users.name.removesuffix(".users"))
        with users.open("rb") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if copy.is_dir() and not copy.is_symlink():
                copies.remove(copy)
                logger.info("%s: an unused copy, deleted to make room", copy)
    return copies.free_bytes()


def _beside(copy: Path, role: str) -> Path:
    return copy.with_name(f"{copy.name}.{role}")


def _hold(path: Path, note: Note) -> None:
    """Be one of a copy's users until this process ends."""
    file = path.open("ab")
    _wait(file, fcntl.LOCK_SH, note)
    _held.append(file)
    os.utime(path)  # what has not been used for longest makes room


def _wait(file: IO[bytes], how: int, note: Note) -> None:
    """Lock a file, in short steps: `note` may raise because the job is to stop."""
    while True:
        try:
            return fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            note(0, 0, f"waits for the process that holds {file.name}")
            time.sleep(_TICK_S)


def _side_by_side(work: Mapping[str, tuple[Any, ...]], note: Note, remark: str) -> dict[str, Any]:
    """`function(*arguments)` of each item by threads; each one's result."""
    pool = ThreadPoolExecutor(min(_THREADS, cores()))
    try:
        futures = {name: pool.submit(*call) for name, call in work.items()}
        pending = set(futures.values())
        while pending:
            ended, pending = wait(pending, _TICK_S, FIRST_COMPLETED)
            for future in ended:
                future.result()
            note(len(futures) - len(pending), len(futures), remark)
        return {name: future.result() for name, future in futures.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
