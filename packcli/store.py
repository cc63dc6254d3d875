"""Every path and manifest of a run directory. The file system is the database: no other file spells a path.

    runs/<sweep>/plan.json  worker-0.log
    runs/store/fingerprints.json                 hashes of input files, by size, mtime and inode
    runs/store/tokens/<id>/  tokenizer/  shard-00000.arrow  shard-00000.json  pieces.json  rejected.jsonl
    runs/store/index/<id>/   rows.arrow  validation.arrow
    runs/store/train/<id>/   config.yaml  metrics.jsonl  trackers/  checkpoint-<step>/  final/
    runs/store/eval/<id>/    results.json  samples.jsonl  items.json
    runs/store/judge/        what judges replied, by judge; of no single checkpoint

In each stage directory `manifest.json`, written last, means done and `failure.json` failed. Deleting a
directory is the reset. `metrics.jsonl` and `trackers/` are logs: they hold times, so no checksum is kept of them.
A manifest, and any other JSON that packcli reads back, begins with a checksum of its own (docs/reliability.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packcli import __version__
from packcli.commit_points import passing
from packcli.config import Spec
from packcli.errors import ConfigError, IntegrityError, PackcliError, PeerError, PreemptedError, RunError, of_kind
from packcli.files import (
    clear_unfinished,
    digest,
    is_locked,
    is_unfinished,
    locked,
    read_bytes,
    read_json,
    read_sealed,
    remove_directory,
    sha256_file,
    write_json,
    write_sealed,
)
from packcli.log import masked
from packcli.plan import VERSIONS, Kind, Plan

State = Literal["pending", "running", "done", "failed"]

MANIFEST = "manifest.json"
RESULTS, ITEMS = "results.json", "items.json"
EXPORT = "packcli.json"
"""Lists the files of an export, which may lie anywhere."""
_CHECKPOINT = "checkpoint-"
LOGS = frozenset({"metrics.jsonl", "trackers", "job.json"})


class FileRecord(Spec):
    sha256: str
    bytes: int


class Manifest(Spec):
    """What a stage made, from what. `outputs`: path inside the directory -> checksum."""

    stage: Kind
    id: str
    version: int
    spec: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, FileRecord]
    results: dict[str, Any]
    provenance: dict[str, Any]


class Store:
    """The run directory `root` (default `runs/`).

    `local`: another, on a disk of this machine, whose finished stages are copies of ours, to be read in our stead.
    """

    def __init__(self, root: Path, local: Path | None = None) -> None:
        self.root, self.local, self._text = root, local, str(root)

    def check(self, *, writable: bool) -> None:
        """Raise `ConfigError` when the run directory cannot be one, or cannot be written."""
        try:
            str(self.root).encode()
        except UnicodeEncodeError:
            raise ConfigError("the run directory's name is no UTF-8", "choose another with --runs") from None
        there = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ConfigError(f"`{there}` is a file, not a run directory", "choose another with --runs")
        if writable and not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"no permission to write in `{there}`", "choose another run directory with --runs")

    def free_bytes(self) -> int:
        """On the disk that holds, or will hold, the run directory."""
        there = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        return shutil.disk_usage(there).free

    def sweep(self, name: str) -> Path:
        return self.root / name

    def plan_file(self, name: str) -> Path:
        return self.sweep(name) / "plan.json"

    @staticmethod
    def worker_log(logs: Path, number: int) -> Path:
        return logs / f"worker-{number}.log"

    def submissions(self) -> Path:
        """What was handed to a cluster: a directory for each submission."""
        return self.root / "slurm"

    def submission(self, id_: str) -> Path:
        return self.submissions() / id_

    def submitted_plan(self, submission: str) -> Path:
        """The plan as it was then: jobs need no sweep file and no internet."""
        return self.submission(submission) / "plan.json"

    def array(self, submission: str, number: int) -> Path:
        """Script, order and logs of one array of jobs."""
        return self.submission(submission) / f"array-{number}"

    @staticmethod
    def order_in(array: Path) -> Path:
        """What an array is to do, in its directory."""
        return array / "array.json"

    def array_order(self, submission: str, number: int) -> Path:
        return self.order_in(self.array(submission, number))

    def workers(self, submission: str, number: int, job: str) -> Path:
        """Logs of the processes that an element of an array started."""
        return self.array(submission, number) / f"workers-{job}"

    def job_log(self, submission: str, number: int, job: str) -> Path:
        """What the first node of an element wrote, all attempts; SLURM makes it when the job starts."""
        return self.array(submission, number) / f"{job}_0_log.out"

    def array_job(self, submission: str, number: int) -> Path:
        """The id that the cluster gave an array: written once it was accepted."""
        return self.array(submission, number) / "submitted.json"

    def array_script(self, submission: str, number: int) -> Path:
        return self.array(submission, number) / "submission.sh"

    def arrays(self) -> list[tuple[str, int]]:
        """(submission, number) of all that were submitted, in no order that means anything."""
        found = sorted(self.submissions().glob("*/array-*/array.json"))
        return [(path.parents[1].name, int(path.parent.name.partition("-")[2])) for path in found]

    def job(self, kind: Kind, id_: str) -> Path:
        """What a cluster's attempts at a stage came to."""
        return self.directory(kind, id_) / "job.json"

    def report(self, name: str, suffix: str) -> Path:
        return self.sweep(name) / f"report.{suffix}"

    def process(self, name: str, number: int) -> Path:
        """Held by a process of this machine that does the sweep."""
        return self.sweep(name) / f"process-{platform.node()}-{number}.lock"

    def processes(self, name: str) -> list[tuple[Path, int]]:
        """Of this machine: another's numbers are of other processes here."""
        found = [(path, path.stem.rpartition("-")[2]) for path in self.sweep(name).glob("process-*.lock")]
        return [
            (path, int(text)) for path, text in found if text.isdigit() and path == self.process(name, int(text))
        ]

    def fingerprints_file(self) -> Path:
        return self.root / "store" / "fingerprints.json"

    def directory(self, kind: Kind, id_: str) -> Path:
        return self.root.joinpath("store", kind, id_)

    def source(self, kind: Kind, id_: str) -> Path:
        """Where a stage is read. One that is being made has no manifest yet: it is written to its directory."""
        if self.local is not None and self.manifest_file(kind, id_).exists():
            copies = Store(self.local)
            if copies.manifest_file(kind, id_).exists():
                return copies.directory(kind, id_)
        return self.directory(kind, id_)

    def manifest_file(self, kind: Kind, id_: str) -> Path:
        return self.root.joinpath("store", kind, id_, MANIFEST)

    def failure_file(self, kind: Kind, id_: str) -> Path:
        return self.directory(kind, id_) / "failure.json"

    def tokenizer(self, tokens: str) -> Path:
        return self.source("tokens", tokens) / "tokenizer"

    @staticmethod
    def tokenizer_record(manifest: Manifest) -> FileRecord:
        """The checksum of the tokenizer a token store was made with."""
        return manifest.outputs["tokenizer/tokenizer.json"]

    def shard(self, tokens: str, number: int) -> Path:
        return self.source("tokens", tokens) / f"shard-{number:05d}.arrow"

    def shard_record(self, tokens: str, number: int) -> Path:
        return self.directory("tokens", tokens) / f"shard-{number:05d}.json"

    def shard_records(self, tokens: str) -> list[Path]:
        """Those that are there."""
        return sorted(self.directory("tokens", tokens).glob("shard-*.json"))

    def pieces(self, tokens: str) -> Path:
        return self.directory("tokens", tokens) / "pieces.json"

    def rejected(self, tokens: str) -> Path:
        return self.directory("tokens", tokens) / "rejected.jsonl"

    def rows(self, index: str) -> Path:
        return self.source("index", index) / "rows.arrow"

    def validation(self, index: str) -> Path:
        return self.source("index", index) / "validation.arrow"

    def config(self, train: str) -> Path:
        return self.directory("train", train) / "config.yaml"

    def metrics(self, train: str) -> Path:
        return self.directory("train", train) / "metrics.jsonl"

    def tracker_logs(self, train: str) -> Path:
        """What TensorBoard and W&B keep of a run."""
        return self.directory("train", train) / "trackers"

    def checkpoint(self, train: str, step: int) -> Path:
        return self.directory("train", train) / f"{_CHECKPOINT}{step}"

    def checkpoints(self, train: str) -> list[tuple[int, Path]]:
        """Checkpoint directories, newest first, complete or not."""
        found = [(int(path.name.partition("-")[2]), path) for path in self._glob(train, f"{_CHECKPOINT}*")]
        return sorted(found, reverse=True)

    @staticmethod
    def is_whole(checkpoint: Path) -> bool:
        """Whether a checkpoint was finished: its manifest comes last."""
        return (checkpoint / MANIFEST).exists()

    def clear_checkpoints(self, train: str) -> None:
        """Delete those of a training that is done, and what is left of one that a killed process was deleting."""
        half = list(self.directory("train", train).glob(f".{_CHECKPOINT}*.tmp-*"))
        for path in [*half, *(path for _, path in self.checkpoints(train))]:
            self.remove(path)

    def _glob(self, train: str, pattern: str) -> Iterable[Path]:
        paths = self.directory("train", train).glob(pattern)
        return [path for path in paths if path.name.partition("-")[2].isdigit()]

    @staticmethod
    def progress(checkpoint: Path) -> Path:
        """What a checkpoint keeps beside the tensors."""
        return checkpoint / "progress.json"

    def handed_over(self, train: str) -> Path:
        """What another trainer is given, and leaves, while it trains: gone when the stage is done."""
        return self.directory("train", train) / "handed_over"

    def final(self, train: str) -> Path:
        return self.directory("train", train) / "final"

    def results(self, eval_: str) -> Path:
        return self.directory("eval", eval_) / RESULTS

    def samples(self, eval_: str) -> Path:
        return self.directory("eval", eval_) / "samples.jsonl"

    def responses(self, eval_: str) -> Path:
        """What was answered so far, while a task is being scored."""
        return self.directory("eval", eval_) / "responses.jsonl"

    def replies(self, judge: str) -> Path:
        """What a judge replied, to whichever checkpoint's answers."""
        return self.root / "store" / "judge" / f"{digest(judge)}.jsonl"

    def items(self, eval_: str) -> Path:
        """What each item of the task earned, 0 to 1 (null: no verdict), in the task's own order."""
        return self.directory("eval", eval_) / ITEMS

    def state(self, kind: Kind, id_: str) -> State:
        if self.manifest_file(kind, id_).exists():
            return "done"
        if self.failure_file(kind, id_).exists():
            return "failed"
        if is_locked(self.directory(kind, id_) / ".lock"):
            return "running"
        # It may have ended since the first look, and is not to go back to where it was before it began.
        return "done" if self.manifest_file(kind, id_).exists() else "pending"

    def begun(self) -> set[tuple[str, str]]:
        """Stages that have a directory: to ask about a thousand others takes no look at each."""
        return {(path.parent.name, path.name) for path in (self.root / "store").glob("*/*")}

    def states(self, stages: Iterable[tuple[Kind, str]]) -> dict[tuple[Kind, str], State]:
        begun = self.begun()
        return {stage: self.state(*stage) if stage in begun else "pending" for stage in stages}

    def manifest(self, kind: Kind, id_: str) -> Manifest | None:
        """The manifest of a finished stage, or None.

        Raises:
            IntegrityError: the file is there but is no manifest of this stage, or was changed.
        """
        path = self._place(kind, id_, MANIFEST)
        try:
            manifest = Manifest.model_validate(read_sealed(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(error, path) from None
        except ValueError as error:
            raise IntegrityError(f"{path}: not a manifest", self.again(kind, id_)) from error
        if (manifest.stage, manifest.id) != (kind, id_):
            belongs = f"{path}: belongs to {manifest.stage} {manifest.id}"
            raise IntegrityError(belongs, f"delete {self.directory(kind, id_)}")
        try:
            _check_results(manifest)
        except (LookupError, TypeError, AttributeError):
            raise IntegrityError(f"{path}: its results cannot be read", self.again(kind, id_)) from None
        return manifest

    def checked(self, kind: Kind, id_: str, name: str, record: FileRecord | None) -> bytes | None:
        """The bytes of a small file of a finished stage, seen to be as its manifest says; None: it lists no such.

        Raises:
            IntegrityError: they are not, or it is gone.
        """
        if record is None:
            return None
        path = self._place(kind, id_, name)
        try:
            found = read_bytes(path)
        except FileNotFoundError:
            raise IntegrityError(f"{path}: missing", self.again(kind, id_)) from None
        except OSError as error:
            raise _unreadable(error, path) from None
        if hashlib.sha256(found).hexdigest() != record.sha256:
            raise IntegrityError(f"{path}: its bytes changed (sha256 differs)", self.again(kind, id_))
        return found

    def _place(self, kind: Kind, id_: str, name: str) -> str:
        # Text: to make a `Path` takes as long as to read what lies there, and a report reads seventy thousand.
        return f"{self._text}/store/{kind}/{id_}/{name}"

    def again(self, kind: Kind, id_: str) -> str:
        """What mends a damaged stage."""
        return f"delete {self.directory(kind, id_)} and run again"

    @contextlib.contextmanager
    def writing(self, kind: Kind, id_: str) -> Iterator[Path]:
        """The directory of a stage, held by this process; an error leaves `failure.json`, a kill anything.

        Another process may have made the stage before this one got hold of it: look for its manifest first.
        """
        directory = self.directory(kind, id_)
        with locked(directory, f"{kind} {id_}"):
            self.failure_file(kind, id_).unlink(missing_ok=True)
            clear_unfinished(directory, "**/", held=kind != "tokens")  # whose parts take no lock
            try:
                yield directory
            except PreemptedError:
                raise  # not failed: it goes on from its checkpoint
            except PackcliError as error:
                self.fail(kind, id_, error)
                raise
            except Exception as error:
                if isinstance(error, FileNotFoundError) and not (directory / ".lock").exists():
                    cause = f"{directory} was deleted while it was written"
                    raise IntegrityError(cause, "run the same command again: it begins anew") from None
                bug = PackcliError(
                    f"bug: {type(error).__name__}", "see the sweep's worker-*.log; please report it"
                )
                self.fail(kind, id_, bug)
                raise

    def fail(self, kind: Kind, id_: str, error: PackcliError) -> None:
        """Leave `failure.json`: also for a writer that was killed, or hangs, and cannot leave its own."""
        effect = isinstance(error, PeerError) and self.failure_file(kind, id_).exists()
        if not effect and not self.manifest_file(kind, id_).exists():
            record = {"kind": error.kind, "cause": masked(error.cause), "fix": masked(error.fix)}
            write_json(self.failure_file(kind, id_), record)

    def failure(self, kind: Kind, id_: str) -> PackcliError | None:
        """Why a stage failed, as its `failure.json` says."""
        path = self.failure_file(kind, id_)
        try:
            found = read_json(path)
            return of_kind(str(found["kind"]), str(found["cause"]), str(found["fix"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return IntegrityError(f"{path}: cannot be read", f"delete {path} and run again")

    def commit(
        self,
        kind: Kind,
        id_: str,
        *,
        spec: Mapping[str, Any],
        inputs: Mapping[str, str],
        results: Mapping[str, Any],
        provenance: Mapping[str, Any],
        spent: Path | None = None,
    ) -> Manifest:
        """Write the manifest over every file of the stage directory: from here on the stage is done.

        `spent`: a file of no use from here on, and of much before, should this be killed: deleted last of all.
        """
        directory = self.directory(kind, id_)
        manifest = Manifest(
            stage=kind,
            id=id_,
            version=VERSIONS[kind],
            spec=dict(spec),
            inputs=dict(inputs),
            outputs=records(directory, leave_out=spent),
            results=dict(results),
            provenance={**machine(), **provenance},
        )
        if spent is not None and spent.exists():
            spent.unlink()
            passing(spent, "gone")
        write_sealed(self.manifest_file(kind, id_), manifest.model_dump())
        return manifest

    def check_sizes(self, manifest: Manifest) -> None:
        """Raise `IntegrityError` for a file of a finished stage that is missing or short. Checksums: `verify`."""
        directory = self.source(manifest.stage, manifest.id)
        outputs = manifest.outputs
        if directory != self.directory(manifest.stage, manifest.id):  # a copy has only what is read of it
            outputs = listed(directory / MANIFEST, "outputs")
        check_listed(directory, outputs, checksums=False)

    def remove(self, directory: Path) -> None:
        """Delete a directory of ours, nothing outside the run directory."""
        if not directory.resolve().is_relative_to(self.root.resolve()):
            raise RunError(f"refusing to delete {directory}: it is outside {self.root}")
        remove_directory(directory)

    def write_plan(self, plan: Plan) -> None:
        for directory in (self.sweep(plan.name), *(self.directory(kind, "") for kind in VERSIONS)):
            clear_unfinished(directory)
        write_sealed(self.plan_file(plan.name), plan.model_dump())


def _check_results(manifest: Manifest) -> None:
    """What other stages take from a manifest as it is; raises what its absence raises."""
    results = manifest.results
    match manifest.stage:
        case "index":
            if not all(type(value) in (int, float) for value in results["ledger"].values()):
                raise TypeError
        case "tokens":
            counts = [results[key] for key in ("conversations", "rejected", "shards", "duplicates", "not_drawn")]
            if not all(type(value) is int for value in counts) or not isinstance(results["files"], list):
                raise TypeError


def records(directory: Path, leave_out: Path | None = None) -> dict[str, FileRecord]:
    """sha256 and size of every file below `directory`, logs, checkpoints, locks and unfinished files left out."""
    found = {}
    for path in sorted(directory.rglob("*")):
        below = path.relative_to(directory)
        name, first = below.as_posix(), below.parts[0]
        kept = first not in LOGS and not first.startswith(_CHECKPOINT) and not is_unfinished(below)
        if path.is_file() and kept and path != leave_out and path.name != ".lock" and name != MANIFEST:
            found[name] = FileRecord(sha256=sha256_file(path), bytes=path.stat().st_size)
    return found


def verify(directory: Path) -> int:
    """Check every file of a directory against the manifest that vouches for it; how many were checked.

    A stage or checkpoint directory, a part of one (`final/`), a store of many, or an export.

    Raises:
        ConfigError: no such directory.
        IntegrityError: no manifest, or a file that is missing, short or changed.
    """
    if not directory.is_dir():
        raise ConfigError(f"no directory `{directory}`", "name a directory below runs/store")
    if (directory / EXPORT).exists():
        return _verify_listed(directory / EXPORT, "files", directory)
    home = next((path for path in (directory, *directory.absolute().parents) if (path / MANIFEST).exists()), None)
    if home is None:
        found = (path.parent for path in directory.rglob(MANIFEST))
        stages = sorted(path for path in found if not is_unfinished(path.relative_to(directory)))
        if not stages:
            hint = "name a stage directory in runs/store or a checkpoint, finished by packcli"
            raise IntegrityError(f"{directory}: no manifest.json, so nothing vouches for it", hint)
        return _verify_each(stages)
    return _verify_listed(home / MANIFEST, "outputs", directory)


def _verify_each(directories: Sequence[Path]) -> int:
    """All that is damaged, said at once."""
    checked, problems = 0, list[IntegrityError]()
    for directory in directories:
        try:
            checked += verify(directory)
        except IntegrityError as error:
            problems.append(error)
    if len(problems) > 1:
        causes = "\n".join(problem.cause for problem in problems)
        raise IntegrityError(causes, "delete the directory of each, and run again")
    if problems:
        raise problems[0]
    return checked


def _verify_listed(path: Path, key: str, inside: Path) -> int:
    """Check the files that `path` lists under `key`, of those that lie in `inside`."""
    home, within = path.parent, inside.absolute()
    outputs = {
        name: record
        for name, record in listed(path, key).items()
        if (home.absolute() / name).is_relative_to(within)
    }
    check_listed(home, outputs, checksums=True)
    return len(outputs)


def listed(path: Path, key: str) -> dict[str, FileRecord]:
    """The files that the manifest `path` lists under `key`.

    Raises:
        IntegrityError: it is no manifest.
    """
    try:
        found = {name: FileRecord.model_validate(item) for name, item in read_sealed(path)[key].items()}
        if outside := next((name for name in found if name.startswith("/") or ".." in name.split("/")), None):
            raise ValueError(outside)
    except OSError as error:
        raise _unreadable(error, path) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IntegrityError(f"{path}: not a manifest", f"delete {path.parent} and run again") from None
    return found


def _unreadable(error: OSError, path: Path | str) -> IntegrityError:
    """What may be whole: a server of files that is away says so, too."""
    fix = "see that the disk, or the server behind it, is well, and run the same command again; delete nothing"
    return IntegrityError(f"{path}: cannot be read: {error.strerror or error}", fix)


def check_listed(directory: Path, outputs: Mapping[str, FileRecord], *, checksums: bool) -> None:
    """Raise `IntegrityError` for a file that is missing, short or (`checksums`) changed."""
    for name, record in outputs.items():
        file = directory / name
        if not file.is_file():
            raise IntegrityError(f"{file}: missing", f"delete {directory} and run again")
        if (size := file.stat().st_size) != record.bytes:
            raise IntegrityError(f"{file}: {size:,} bytes, not {record.bytes:,}", f"delete {directory}")
        if checksums and sha256_file(file) != record.sha256:
            raise IntegrityError(f"{file}: its bytes changed (sha256 differs)", f"delete {directory}")


def normalized(value: Any) -> Any:
    """`value` without what changes from run to run: provenance, times, rates, peaks."""
    if isinstance(value, Mapping):
        return {key: normalized(inner) for key, inner in value.items() if not _varies(str(key))}
    if isinstance(value, list | tuple):
        return [normalized(inner) for inner in value]
    return value


def _varies(key: str) -> bool:
    # A report's speed-up is a ratio of times, its verdict a text that quotes them; a checksum is of the rest, too.
    return (
        key in ("provenance", "checksum", "mfu", "mfu_full_square", "speedup", "verdict")
        or key.endswith(("_s", "_per_s"))
        or key.startswith("peak_")
    )


def machine() -> dict[str, Any]:
    """Where and with what a stage ran, from an allow-list: never the environment."""
    return {
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "cpu_count": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": _packages(),
        "commit": _commit(),
    }


@cache
def _packages() -> dict[str, str]:
    found = {"packcli": __version__}
    for name in ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "lm_eval"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@cache
def _commit() -> str | None:
    """The commit of the source tree packcli runs from, `-dirty` when changed; None when installed."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and (here.parent / ".git").exists() else None
