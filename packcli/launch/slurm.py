"""All that is asked of SLURM, in its words: nobody else knows a state, a flag or a message of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from packcli.commit_points import passing
from packcli.errors import ConfigError, MissingError, PackcliError
from packcli.launch.allowed import minutes
from packcli.launch.script import COMMENT

_ANSWER_S = 120.0
_LOOK_S = 15.0  # of a look that nothing depends on
_TRIES = 5
_FIRST_PAUSE_S = 2.0
# `sbatch` may have been heard although its answer was not: what was submitted is looked up before another try.
_BUSY = re.compile(
    r"unable to contact|socket timed out|connection (refused|timed out)|communication|temporarily|i/o error|"
    r"zero bytes were transmitted|unexpected message",
    re.IGNORECASE,
)
_FULL = re.compile(
    r"job limit|submit limit|QOSMaxSubmit|AssocMaxSubmit|AssocGrpSubmit|violates accounting", re.IGNORECASE
)
# What a test says of nodes that are too few for ever, but also of nodes that are down just now.
_NOT_NOW = re.compile(r"node configuration is not available|not available now|busy|down, drained", re.IGNORECASE)
_NEVER = "DependencyNeverSatisfied"
_QUEUED = frozenset(
    {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED", "RESV_DEL_HOLD"}
)
_AT_WORK = frozenset({"RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT"})
CANCELLED, NO_RESULT = "cancelled", "it ended without a result"
_WORDS = {
    "BOOT_FAIL": "its node did not start",
    "CANCELLED": CANCELLED,
    "DEADLINE": "its deadline passed",
    "FAILED": "it ended with an error",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "TIMEOUT": "it ran into its time limit",
    "COMPLETED": NO_RESULT,
}

JobState = Literal["queued", "running", "ended"]


@dataclass(frozen=True, slots=True)
class Seen:
    """One element of an array of ours. `array`: our id of it; `job`: SLURM's, as ARRAY_ELEMENT.

    `reason`: why it waits, or how it ended. `nodes`: as SLURM writes lists of hosts.
    """

    array: str
    job: str
    state: JobState
    reason: str
    nodes: str

    @property
    def element(self) -> int:
        return int(self.job.partition("_")[2] or 0)


@dataclass(frozen=True, slots=True)
class PartitionSize:
    """`gpus`: of the node that has the most."""

    nodes: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Partition:
    """`time_min`: the longest job; None: no limit. `gpus`: of the node that has the most."""

    name: str
    is_default: bool
    is_up: bool
    time_min: int | None
    nodes: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """What SLURM says of itself.

    requeues      whether a preempted job is put back into the queue; None: nothing is preempted.
    signals       whether a preempted job gets the signal that it asked for, not SIGTERM.
    accounting    whether it is known how jobs ended.
    max_array     elements of an array are numbered below it; None: it does not say.
    """

    version: str
    requeues: bool | None
    signals: bool
    kill_wait_s: int | None
    accounting: bool
    max_array: int | None


def is_here() -> bool:
    return shutil.which("sbatch") is not None


def is_cancelled(state: str) -> bool:
    """Of a job that was stopped: whether its state says that it is not to go on; "" is not known."""
    return state.strip() in ("CANCELLED", "COMPLETING")


def require() -> None:
    """Raise `MissingError` where there is no SLURM."""
    if not is_here():
        raise MissingError(
            "no SLURM on this machine: `sbatch` was not found",
            "run this on a login node of the cluster; `--dry-run` shows the jobs anywhere, and slurm/local/start "
            "makes a cluster of this machine (docs/local_cluster.md)",
        )


def live(*, patient: bool = True) -> list[Seen]:
    """Every element of ours that SLURM still has to do, or is doing, whoever submitted it from wherever.

    `patient`: asked again for half a minute; else once more.

    Raises:
        MissingError: SLURM does not answer.
    """
    seen = []
    command = ["squeue", "--me", "--noheader", "--array", "--format=%k|%i|%T|%r|%N"]
    answer = _patient(command, _TRIES if patient else 2)
    if answer.returncode:
        raise _failed(command[0], answer)
    for line in answer.stdout.splitlines():
        if not line.startswith(COMMENT) or line.count("|") != 4:
            continue
        comment, job, state, reason, nodes = line.split("|")
        if reason == _NEVER:
            continue  # SLURM cancels it at its next look
        found: JobState = "queued" if state in _QUEUED else "running"
        seen.append(Seen(comment.removeprefix(COMMENT), job, found, "" if reason == "None" else reason, nodes))
    return seen


def ended(jobs: Collection[str]) -> dict[str, str]:
    """How the elements of these arrays (SLURM's ids) ended, in a few words; empty without accounting."""
    if not jobs or shutil.which("sacct") is None:
        return {}
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
    answer = _call([*command, "--jobs", ",".join(sorted(jobs))])
    found = {}
    for line in answer.stdout.splitlines() if answer.returncode == 0 else ():
        job, _, state = line.partition("|")
        word = state.partition(" ")[0]
        if word not in _QUEUED and word not in _AT_WORK:  # accounting may be late
            found.update(dict.fromkeys(_elements(job), _WORDS.get(word, state.lower())))
    return found


def _elements(job: str) -> Iterator[str]:
    """Elements that never ran come together, as in `27_[2-5,8%2]`."""
    array, bracket, spans = job.partition("_[")
    if not bracket:
        yield job
    for first, last, step in re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", spans.partition("%")[0]):
        for element in range(int(first), int(last or first) + 1, int(step or 1)):
            yield f"{array}_{element}"


def submit(script: Path, find: Callable[[], str | None]) -> str:
    """SLURM's id of the array that `script` describes. `find`: looks it up among the jobs there.

    Raises:
        ConfigError: SLURM refuses the script, such as for its partition.
        MissingError: SLURM does not answer, or takes no more jobs from this user.
    """
    for attempt in range(_TRIES):
        passing(script, "before sbatch")
        answer = _call(["sbatch", "--parsable", str(script)])
        if answer.returncode == 0:
            passing(script, "after sbatch")
            return answer.stdout.strip().partition(";")[0]
        if not _BUSY.search(answer.stderr):
            break
        time.sleep(_FIRST_PAUSE_S * 2**attempt)
        if (job := find()) is not None:
            return job
    raise _refusal(answer.stderr)


def check(script: Path) -> PackcliError | None:
    """What SLURM has against a script, without submitting it; None where it would take it, sooner or later."""
    answer = _call(["sbatch", "--test-only", str(script)])
    if not answer.returncode or _NOT_NOW.search(answer.stderr):
        return None
    error = _refusal(answer.stderr)
    return error if isinstance(error, ConfigError) else None


def cancel(jobs: Sequence[str]) -> None:
    """Cancel arrays or elements; those that have ended meanwhile are passed over.

    Raises:
        MissingError: SLURM does not answer.
    """
    for start in range(0, len(jobs), 500):
        answer = _patient(["scancel", "--quiet", *jobs[start : start + 500]])
        if answer.returncode and answer.stderr.strip():
            raise _failed("scancel", answer)


def partitions() -> list[str]:
    answer = _call(["sinfo", "--noheader", "--format=%R"])
    return sorted(set(answer.stdout.split())) if answer.returncode == 0 else []


def partition_sizes() -> dict[str | None, PartitionSize]:
    """By partition; of None, the default one's. Those that SLURM does not tell are left out."""
    answer = _call(["sinfo", "--noheader", "--format=%P|%D|%G"])
    sizes: dict[str | None, PartitionSize] = {}
    for name, count, resources in re.findall(r"^([^|]+)\|(\d+)\|(.*)$", answer.stdout, re.MULTILINE):
        gpus = _gpus(resources)
        for key in {name.rstrip("*"), None} if name.endswith("*") else {name}:
            before = sizes.get(key, PartitionSize(0, 0))
            sizes[key] = PartitionSize(before.nodes + int(count), max(before.gpus, gpus))
    return sizes


def _gpus(resources: str) -> int:
    """Of `gpu:8`, `gpu:a100:8(S:0-1)`, `craynetwork:4,gpu:h100:4`, `(null)`."""
    return sum(map(int, re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", resources)))


def cluster() -> Cluster:
    """What `scontrol show config` and `sacct` say.

    Raises:
        MissingError: SLURM does not answer.
    """
    answer = _call(["scontrol", "show", "config"], _LOOK_S)
    if answer.returncode:
        raise _failed("scontrol", answer)
    said = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", answer.stdout, re.MULTILINE))
    # What a job that is preempted meets: "OFF", "REQUEUE", "CANCEL", "GANG,SUSPEND".
    mode = said.get("PreemptMode", "OFF").upper()
    off = mode == "OFF" or said.get("PreemptType", "").endswith("none")
    known = _call(
        ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID", "--jobs", "1"], _LOOK_S
    )
    return Cluster(
        version=_call(["sbatch", "--version"], _LOOK_S).stdout.strip().removeprefix("slurm ") or "unknown",
        requeues=None if off else "CANCEL" not in mode,
        signals="preempt_send_user_signal" in said.get("SlurmctldParameters", ""),
        kill_wait_s=_number(said.get("KillWait")),
        accounting=known.returncode == 0,
        max_array=_number(said.get("MaxArraySize")),
    )


def _number(text: str | None) -> int | None:
    """The first number in `30 sec` or `1001`."""
    found = re.match(r"\d+", text or "")
    return int(found[0]) if found else None


def limits() -> list[Partition]:
    """Every partition, with what a job there may ask for.

    Raises:
        MissingError: SLURM does not answer.
    """
    answer = _call(["sinfo", "--noheader", "--format=%P|%a|%l|%D|%G"], _LOOK_S)
    if answer.returncode:
        raise _failed("sinfo", answer)
    found: dict[str, Partition] = {}
    for line in answer.stdout.splitlines():
        if line.count("|") != 4:
            continue
        name, up, longest, nodes, resources = line.split("|")
        try:
            time_min = minutes(longest)
        except ValueError:  # `infinite`, `n/a`
            time_min = None
        own = Partition(
            name.rstrip("*"), name.endswith("*"), up.startswith("up"), time_min, int(nodes), _gpus(resources)
        )
        before = found.get(own.name, own)
        together = own.nodes + (before.nodes if before is not own else 0)
        found[own.name] = replace(own, nodes=together, gpus=max(own.gpus, before.gpus))
    return list(found.values())


def _refusal(stderr: str) -> PackcliError:
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("Try ")]
    said = next((line for line in reversed(lines) if "error" in line.lower() or "failure" in line.lower()), "")
    said = re.sub(
        r"^(sbatch: )?(error: |allocation failure: )?", "", said or (lines[-1] if lines else "no message")
    )
    if _BUSY.search(stderr):
        return MissingError(
            f"SLURM does not answer: {said}", "run the same command again later: no job is sent twice"
        )
    if _FULL.search(stderr):
        fix = "run the same command again when some of your jobs have ended: no job is sent twice"
        return MissingError(f"SLURM takes no more jobs from you now: {said}", fix)
    here = ", ".join(partitions())
    fix = f"mend the profile (docs/slurm_profile.md){'; partitions here: ' + here if here else ''}"
    return ConfigError(f"SLURM refused: {said}", fix)


def _failed(command: str, answer: subprocess.CompletedProcess[str]) -> MissingError:
    said = (answer.stderr.strip().splitlines() or ["no message"])[-1]
    return MissingError(f"`{command}` failed: {said}", "is SLURM up? `sinfo` should answer")


def _patient(command: list[str], tries: int = _TRIES) -> subprocess.CompletedProcess[str]:
    """The answer to what may be asked again; a controller that restarts answers after a while."""
    for attempt in range(tries - 1):
        answer = _call(command)
        if answer.returncode == 0 or not _BUSY.search(answer.stderr):
            return answer
        time.sleep(_FIRST_PAUSE_S * 2**attempt)
    return _call(command)


def _call(command: list[str], answer_s: float = _ANSWER_S) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SLURM_BITSTR_LEN": "0"}  # long lists of elements whole, not with `...`
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=answer_s, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: no answer: socket timed out")
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: not found on this machine")
