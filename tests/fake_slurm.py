"""SLURM's commands as small programs over a file: they say what SLURM says, and run nothing.

    slurm = FakeSlurm(tmp_path / "slurm")        # slurm.env: PATH with our sbatch, squeue, ... in front
    slurm.fault("sbatch", "error: Socket timed out", at=2, accepts=True)
    slurm.jobs()                                  # what sbatch accepted, oldest first
    slurm.set("100", "RUNNING", element=3, nodes="node0"); slurm.set("100", "COMPLETED")

`sbatch --test-only` counts as the command `test-only`. This file is also the program: STATE COMMAND ARGUMENT ...
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "sinfo", "scontrol", "srun")
FIRST_JOB = 100
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")
LIVE = (*WAITING, "RUNNING", "COMPLETING", "CONFIGURING")


class FakeSlurm:
    """A cluster in `directory`; `bin` holds its commands."""

    def __init__(self, directory: Path, partitions: tuple[str, ...] = ("gpu", "main", "high")) -> None:
        self.directory, self.bin = directory, directory / "bin"
        self.bin.mkdir(parents=True)
        self.write({"partitions": partitions, "jobs": [], "calls": [], "faults": []})
        for command in COMMANDS:
            words = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(directory), command]
            path = self.bin / command
            path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            path.chmod(0o755)

    @property
    def env(self) -> dict[str, str]:
        return {"PATH": f"{self.bin}:{os.environ['PATH']}"}

    def jobs(self) -> list[dict[str, Any]]:
        """Each: id, user, options (long names of sbatch's), script; and of its elements indices, states, reasons,
        nodes."""
        found: list[dict[str, Any]] = read(self.directory)["jobs"]
        return found

    def calls(self, command: str) -> list[list[str]]:
        """Arguments of every call of a command, failed ones included."""
        return [words for name, *words in read(self.directory)["calls"] if name == command]

    def add(self, comment: str, elements: int = 1, *, user: str = "me", name: str = "other") -> str:
        """A job that somebody else submitted; its id."""
        with changing(self.directory) as state:
            return accept(state, {"comment": comment, "job-name": name, "array": f"0-{elements - 1}"}, "", user)

    def set(
        self, job: str, state: str, *, element: int | None = None, reason: str = "None", nodes: str = ""
    ) -> None:
        """What becomes of a job, or of one element of its."""
        with changing(self.directory) as document:
            [found] = [item for item in document["jobs"] if item["id"] == job]
            for number in range(len(found["states"])) if element is None else [found["indices"].index(element)]:
                found["states"][number] = state
                found["reasons"][number] = reason
                found["nodes"][number] = nodes

    def fault(
        self,
        command: str,
        stderr: str,
        *,
        at: int | None = None,
        code: int = 1,
        accepts: bool = False,
        kills: bool = False,
    ) -> None:
        """Let call `at` (from 1; None: every one) of a command fail; it `accepts` what it was given all the same,
        it `kills` whoever called it."""
        with changing(self.directory) as state:
            fault = {"command": command, "stderr": stderr, "at": at, "code": code}
            state["faults"].append({**fault, "accepts": accepts, "kills": kills})

    def config(self, text: str) -> None:
        """What `scontrol show config` prints."""
        with changing(self.directory) as state:
            state["config"] = text

    def mend(self) -> None:
        """No more faults."""
        with changing(self.directory) as state:
            state["faults"] = []

    def write(self, state: dict[str, Any]) -> None:
        (self.directory / "state.json").write_text(json.dumps(state))


def read(directory: Path) -> dict[str, Any]:
    with (directory / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found: dict[str, Any] = json.loads((directory / "state.json").read_text())
        return found


@contextlib.contextmanager
def changing(directory: Path) -> Iterator[dict[str, Any]]:
    with (directory / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads((directory / "state.json").read_text())
        yield state
        (directory / "state.json").write_text(json.dumps(state))


def options(script: str) -> dict[str, str]:
    """What the `#SBATCH` lines of a script ask for; a flag alone is ''."""
    found = {}
    for line in script.splitlines():
        if line and not line.startswith("#"):
            break  # as sbatch does: none after the first command
        if line.startswith("#SBATCH "):
            for word in shlex.split(line.removeprefix("#SBATCH ")):
                name, _, value = word.removeprefix("--").partition("=")
                found[name] = value
    return found


def accept(state: dict[str, Any], asked: dict[str, str], script: str, user: str) -> str:
    indices: list[int] = []
    for span in asked.get("array", "0").partition("%")[0].split(","):
        first, _, last = span.partition("-")
        indices += range(int(first), int(last or first) + 1)
    count = len(indices)
    job = str(FIRST_JOB + len(state["jobs"]))
    waits = "Dependency" if asked.get("dependency") else "Resources"
    state["jobs"].append(
        {
            "id": job, "user": user, "options": asked, "script": script,
            "indices": indices, "states": ["PENDING"] * count, "reasons": [waits] * count, "nodes": [""] * count,
        }
    )  # fmt: skip
    return job


# The program -------------------------------------------------------------------------------------------


def sbatch(state: dict[str, Any], arguments: list[str]) -> tuple[int, str, str]:
    if "--version" in arguments:
        return 0, "slurm 22.05.8", ""
    script = Path(arguments[-1]).read_text()
    asked = options(script)
    if "--test-only" in arguments:
        if asked.get("partition", state["partitions"][0]) not in state["partitions"]:
            return 1, "", "allocation failure: Invalid partition name specified"
        return 0, "", "sbatch: Job 1 to start at 2026-01-01T00:00:00 using 8 processors on nodes node0"
    for word in filter(None, asked.get("dependency", "").split(",")):
        job = word.partition(":")[2].partition("_")[0]
        if job not in [item["id"] for item in state["jobs"]]:
            return 1, "", "sbatch: error: Batch job submission failed: Job dependency problem"
    return 0, accept(state, asked, script, "me"), ""


def elements(state: dict[str, Any], *, mine: bool = False) -> Iterator[dict[str, str]]:
    for job in state["jobs"]:
        if not mine or job["user"] == "me":
            for number, word in enumerate(job["states"]):
                yield {
                    "k": job["options"].get("comment", ""), "j": job["options"].get("job-name", ""),
                    "i": f"{job['id']}_{job['indices'][number]}", "F": job["id"], "u": job["user"], "T": word,
                    "r": job["reasons"][number], "N": job["nodes"][number],
                }  # fmt: skip


def squeue(state: dict[str, Any], arguments: list[str]) -> tuple[int, str, str]:
    text = shlex.join(arguments)
    shape = re.search(r"--format[= ]'?([^ ']*)", text)
    job = re.search(r"--jobs?[= ](\S+)", text)
    lines = [
        re.sub(r"%(\w)", lambda found, one=one: one[found[1]], shape[1] if shape else "%i|%T")  # type: ignore[misc]
        for one in elements(state, mine="--me" in arguments)
        if one["T"] in LIVE and (job is None or job[1] in (one["i"], one["F"]))
    ]
    return 0, "\n".join(lines), ""


def sacct(state: dict[str, Any], arguments: list[str]) -> tuple[int, str, str]:
    wanted = arguments[arguments.index("--jobs") + 1].split(",")
    found = [f"{one['i']}|{one['T']}" for one in elements(state) if one["F"] in wanted]
    return 0, "\n".join(found), ""


def scancel(state: dict[str, Any], arguments: list[str]) -> tuple[int, str, str]:
    wanted = {word for word in arguments if not word.startswith("-")}
    for job in state["jobs"]:
        for number, word in enumerate(job["states"]):
            if word in LIVE and wanted & {job["id"], f"{job['id']}_{job['indices'][number]}"}:
                job["states"][number] = "CANCELLED"
    return 0, "", ""


def srun(state: dict[str, Any], arguments: list[str]) -> tuple[int, str, str]:
    """Its own options left out, what it is given to run is run here."""
    while arguments and arguments[0].startswith("-"):
        del arguments[: 2 if arguments[0] in ("--output", "--error") else 1]
    os.execvp(arguments[0], arguments)


def sinfo(state: dict[str, Any], arguments: list[str]) -> tuple[int, str, str]:
    """Partitions of eight nodes, half of them with four GPUs and half with eight."""
    if not any("%G" in argument for argument in arguments):
        return 0, "\n".join(state["partitions"]), ""
    shape = next(argument for argument in arguments if "%G" in argument).partition("=")[2]
    limits = "%a" in shape  # then the default partition is marked, too
    lines = []
    for number, name in enumerate(state["partitions"]):
        for gpus in ("gpu:a100:4(S:0-1)", "gpu:8,shard:16"):
            mark = "*" if limits and number == 0 else ""
            one = {"P": name + mark, "a": "up", "l": "1-00:00:00", "D": "4", "G": gpus}
            lines.append(re.sub(r"%(\w)", lambda found, one=one: one[found[1]], shape))  # type: ignore[misc]
    return 0, "\n".join(lines), ""


def scontrol(state: dict[str, Any], arguments: list[str]) -> tuple[int, str, str]:
    return 0, state.get("config", "") if arguments == ["show", "config"] else "", ""


def main(directory: Path, command: str, arguments: list[str]) -> int:
    name = "test-only" if "--test-only" in arguments else command
    with changing(directory) as state:
        state["calls"].append([name, *arguments])
        number = sum(call[0] == name for call in state["calls"])
        fault = next((f for f in state["faults"] if f["command"] == name and f["at"] in (None, number)), None)
        code, out, err = 0, "", ""
        if command != "srun" and (fault is None or fault["accepts"]):
            code, out, err = {
                "sbatch": sbatch, "squeue": squeue, "sacct": sacct, "scancel": scancel,
                "sinfo": sinfo, "scontrol": scontrol,
            }[command](state, list(arguments))  # fmt: skip
    if fault is not None:
        if fault["kills"]:
            os.kill(os.getppid(), signal.SIGKILL)
        code, out, err = fault["code"], "", fault["stderr"]
    elif command == "srun":
        srun(state, list(arguments))
    if out:
        print(out)
    if err:
        print(err, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
