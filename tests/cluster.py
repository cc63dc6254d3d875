"""A real SLURM of four nodes on this machine, for tests marked `slurm`: the fixture `cluster`.

It lies in a directory of its own, beside whatever else runs here. With PACKCLI_SLURM_DIR set, that cluster is used
instead, and left running if it was: its jobs are cancelled after each test.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

LOCAL = Path(__file__).resolve().parents[1] / "slurm" / "local"
NODES = ("node0", "node1", "node2", "node3")
_MISSING = 6  # exit code of `start`: this machine cannot have a cluster


def command(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`slurm/local/NAME`; whatever it starts must not hold its pipes, or this never returns."""
    return subprocess.run(
        [LOCAL / name, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def slurm(*arguments: str) -> str:
    """stdout of one of SLURM's own commands, which must succeed."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


@dataclass(frozen=True)
class Cluster:
    """The cluster whose files lie in `directory`."""

    directory: Path

    def start(self) -> str:
        return self._run("start")

    def stop(self) -> None:
        self._run("stop")

    def crash(self, node: str) -> None:
        """Power loss: all its processes are gone at once, and SLURM is not told."""
        self._run("crash", node)

    def boot(self, node: str) -> None:
        self._run("boot", node)

    def down(self, node: str) -> None:
        """An administrator takes it out of service: its job is requeued, its processes may live on for a while."""
        slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def submit(self, script: str, *options: str) -> str:
        """Hands in a shell script; returns the job's id."""
        return slurm("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}")

    def jobs(self) -> dict[str, str]:
        """Id ("7", "8_3") -> state of all that wait, run or end."""
        lines = slurm("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows about a job; values end at the first space."""
        return dict(re.findall(r"(\S+?)=(\S*)", slurm("scontrol", "--oneliner", "show", "job", job)))

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def accounting(self, job: str, field: str) -> str:
        """One of sacct's fields of a job as a whole; it may come a second late."""
        return slurm("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", f"--format={field}")

    def is_up(self, node: str) -> bool:
        """Idle or at work. `State` alone may say MIXED of a node that died: SLURM states a reason beside it."""
        record = slurm("scontrol", "--oneliner", "show", "node", node)
        return " Reason=" not in record and re.search(r" State=(IDLE|MIXED|ALLOCATED) ", record) is not None

    def wait(self, predicate: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not predicate():
            seen = f"{slurm('squeue')}\n{slurm('sinfo', '-N')}" if time.monotonic() > deadline else None
            assert seen is None, f"not after {timeout_s} s: {what}\n{seen}\nlogs are in {self.directory}/log"
            time.sleep(0.2)

    def wait_state(self, job: str, state: str, timeout_s: float = 30) -> None:
        self.wait(lambda: self.state(job) == state, timeout_s, f"{job} is {state}")

    def cancel_all(self) -> None:
        jobs = sorted({job.partition("_")[0] for job in self.jobs()})
        if jobs:
            slurm("scancel", *jobs)

    def quiet(self) -> None:
        """No job, all nodes idle: as each test finds it."""
        self.cancel_all()
        self.start()  # a node that crashed a moment ago still looks well to SLURM
        self.wait(lambda: not self.jobs(), 60, "no job is left")
        self.wait(lambda: all(self.is_up(node) for node in NODES), 60, "all nodes are up")

    def _run(self, name: str, *arguments: str) -> str:
        done = command(name, *arguments)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        return done.stdout


def _free_base_port() -> int:
    """The first of six ports that nobody listens on."""
    for base in range(24100, 32000, 10):
        try:
            for port in range(base, base + 6):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return base
    raise AssertionError("no free ports")


def _runs(directory: Path) -> bool:
    conf = directory / "slurm.conf"
    if not conf.is_file() or not shutil.which("scontrol"):
        return False
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    done = subprocess.run(["scontrol", "ping"], env=environment, capture_output=True, text=True, check=False)
    return "is UP" in done.stdout


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        if "PACKCLI_SLURM_DIR" not in os.environ:
            patch.setenv("PACKCLI_SLURM_DIR", str(tmp_path_factory.mktemp("slurm")))
            patch.setenv("PACKCLI_SLURM_PORT", str(_free_base_port()))
        directory = Path(os.environ["PACKCLI_SLURM_DIR"])
        patch.setenv("SLURM_CONF", str(directory / "slurm.conf"))
        found = _runs(directory)
        started = command("start")
        if started.returncode == _MISSING:
            pytest.skip(started.stderr.strip())
        try:
            assert started.returncode == 0, started.stderr
            yield Cluster(directory)
        finally:
            if not found:
                command("stop")


@pytest.fixture(autouse=True)
def _quiet_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "cluster" in request.fixturenames:
        # A test that was skipped for want of a cluster has none.
        made = (request.node.funcargs or {}).get("cluster")
        if isinstance(made, Cluster):
            made.quiet()
