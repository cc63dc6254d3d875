"""Whole sweeps on a real SLURM of four nodes: they end well, and as if nothing had happened, whatever happens.

Its GPUs are pretended and its nodes are one machine: what is shown is the life of jobs, not speed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, slurm
from conftest import listen_to_ctrl_c

from packcli.files import read_sealed
from packcli.plan import Plan
from packcli.store import Store

pytestmark = pytest.mark.slurm

MODEL = {"name": "tiny", "base": {"train": {"steps": 4}}}
DATA = {"source": "tiny", "max_length": 192, "validation": 0.05, "max_documents": 300}
TRAIN = {"lr": 3.0e-3, "global_batch": 8, "micro_batch": 2, "threads": 1, "sharding": "full", "save_every": 10}
PROFILE = {
    "partition": "main",
    "time": "10",
    "nodes": 4,
    "gpus_per_node": 8,
    "processes_per_node": 1,
    "signal_s": 30,
    "burn_in": False,
    "stages": {"eval": {"gpus_per_node": 0}},
}


class Sweep:
    """A sweep file, a profile and a run directory."""

    def __init__(self, directory: Path, name: str, *, steps: int, profile: dict[str, Any], **keys: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.file, self.profile, self.runs = (
            directory / f"{name}.yaml",
            directory / "cluster.yaml",
            directory / "runs",
        )
        document = {
            "name": name,
            "model": MODEL,
            "data": DATA,
            "train": {**TRAIN, "steps": steps},
            "eval": {"tasks": []},
            "matrix": {"arm": ["best_fit"], "seed": [0]},
            **keys,
        }
        self.file.write_text(yaml.safe_dump(document))
        self.profile.write_text(yaml.safe_dump({**PROFILE, **profile}))
        self.store = Store(self.runs)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "packcli", *arguments, str(self.file), "--runs", str(self.runs)]
        return subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=listen_to_ctrl_c,
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=400)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def submit(self, *arguments: str) -> dict[str, Any]:
        done = self.run("sweep", "--on", str(self.profile), "--json", *arguments)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def status(self) -> dict[str, Any]:
        done = self.run("status", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def plan(self) -> Plan:
        return Plan.model_validate(read_sealed(self.runs / self.file.stem / "plan.json"))

    def train(self) -> str:
        """The id of the only training that is no base."""
        plan = self.plan()
        (id_,) = set(plan.trains) - set(plan.shared)
        return id_

    def step(self) -> int:
        try:
            lines = self.store.metrics(self.train()).read_text().splitlines()
        except FileNotFoundError:
            return 0
        return len(lines)

    def attempts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.store.job("train", self.train()).read_text())["attempts"]
        return found

    def ends(self) -> list[str]:
        return [attempt["how"] for attempt in self.attempts()]


def weights(sweep: Sweep, id_: str) -> str:
    """The checksum of a training's final weights."""
    manifest = sweep.store.manifest("train", id_)
    assert manifest is not None
    return manifest.outputs["final/model.safetensors"].sha256


def losses(sweep: Sweep, id_: str) -> list[float]:
    return [json.loads(line)["loss"] for line in sweep.store.metrics(id_).read_text().splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with what all trainings here begin with: prepared data, and the base model."""
    sweep = Sweep(tmp_path_factory.mktemp("base"), "short", steps=1, profile={})
    done = sweep.run("sweep", "--nproc-per-node", "1")
    assert done.returncode == 0, done.stderr
    return sweep.runs


STEPS = 240  # some seconds on an idle machine: whoever interrupts must come in time


@pytest.fixture
def long(base: Path, tmp_path: Path) -> Callable[..., Sweep]:
    """A training long enough to be interrupted, its inputs there."""

    def make(name: str = "long", **profile: Any) -> Sweep:
        sweep = Sweep(tmp_path / name, name, steps=STEPS, profile=profile)
        shutil.copytree(base / "store", sweep.runs / "store")
        return sweep

    return make


@pytest.fixture(scope="module")
def uninterrupted(
    base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], tuple[str, list[float]]]:
    """(final weights, losses) of the long training by the local launcher with so many processes."""
    known: dict[int, tuple[str, list[float]]] = {}

    def run(processes: int) -> tuple[str, list[float]]:
        if processes not in known:
            sweep = Sweep(tmp_path_factory.mktemp("local"), "long", steps=STEPS, profile={})
            shutil.copytree(base / "store", sweep.runs / "store")
            done = sweep.run("sweep", "--nproc-per-node", str(processes))
            assert done.returncode == 0, done.stderr
            known[processes] = weights(sweep, sweep.train()), losses(sweep, sweep.train())
        return known[processes]

    return run


def ended(cluster: Cluster, timeout_s: float = 240) -> None:
    cluster.wait(lambda: not cluster.jobs(), timeout_s, "all jobs have ended")


def training(sweep: Sweep, cluster: Cluster, step: int, timeout_s: float = 120) -> str:
    """The job of the training, once it is at `step`."""
    cluster.wait(lambda: sweep.step() >= step, timeout_s, f"step {step}")
    (job,) = [name for name, state in cluster.jobs().items() if state == "RUNNING"]
    return job


# End to end --------------------------------------------------------------------------------------------


def test_a_sweep_over_two_and_four_nodes_trains_and_scores_what_the_local_launcher_does(
    cluster: Cluster, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "eval": {"tasks": ["tiny_copy"], "limit": 16},
        "matrix": {"arm": ["padding", "best_fit"], "seed": [0]},
        "include": [{"arm": "padding", "train.nodes": 2}],
    }
    there = Sweep(tmp_path / "there", "both", steps=12, profile={"burn_in": True}, **keys)
    submitted = there.submit()
    assert [item["nodes"] for item in submitted["submitted"] if item["kind"] == "train"] == [2, 4]
    followed = there.run("sweep", "--on", str(there.profile), "--wait")
    assert followed.returncode == 0, followed.stderr
    assert "best_fit" in followed.stdout, "the table"
    assert not cluster.jobs()
    assert (there.runs / "both" / "report.md").read_text() in followed.stdout + there.run(
        "report", "--format", "md"
    ).stdout

    here = Sweep(tmp_path / "here", "both", steps=12, profile={}, **keys)
    for arm, processes in (("best_fit", "4"), ("padding", "2")):  # the base is trained by four, as there
        done = here.run("sweep", "--nproc-per-node", processes, "--only", f"arm={arm}")
        assert done.returncode == 0, done.stderr
    plan = there.plan()
    for id_ in plan.trains:
        assert weights(there, id_) == weights(here, id_)
        assert losses(there, id_) == losses(here, id_)
    for id_ in plan.evals:
        theirs, ours = there.store.manifest("eval", id_), here.store.manifest("eval", id_)
        assert theirs is not None
        assert ours is not None
        assert theirs.results["score"] == ours.results["score"]
    (wide,) = [id_ for id_, order in plan.trains.items() if order.train.nodes is None and id_ not in plan.shared]
    manifest = there.store.manifest("train", wide)
    assert manifest is not None
    assert manifest.results["processes"] == 4
    assert [node["node"] for node in manifest.provenance["burn_in"]["nodes"]] == [
        "node0",
        "node1",
        "node2",
        "node3",
    ]

    again = there.submit()
    assert again["submitted"] == []


# The life of a job -------------------------------------------------------------------------------------


def test_a_node_that_crashes_under_a_four_node_training_changes_no_bit_of_its_weights(
    cluster: Cluster, long: Callable[..., Sweep], uninterrupted: Callable[[int], tuple[str, list[float]]]
) -> None:
    sweep = long()
    sweep.submit()
    job = training(sweep, cluster, 15)
    cluster.crash("node2")
    cluster.wait(lambda: cluster.state(job) == "PENDING", 90, "requeued")
    (cell,) = sweep.status()["cells"]
    assert cell["stages"]["train"]["state"] == "queued"
    cluster.boot("node2")
    ended(cluster)
    # Who is first: SLURM, which finds the node dead, or the other ranks, which find it gone.
    assert sweep.ends() in (["lost", "done"], ["peer", "done"])
    assert sweep.attempts()[1]["began_at"] >= 10, "from the checkpoint"
    assert (weights(sweep, sweep.train()), losses(sweep, sweep.train())) == uninterrupted(4)


@pytest.mark.soak  # one signal and one requeue are in the test of a preemption
def test_two_time_limits_cost_no_step_and_no_bit(
    cluster: Cluster, long: Callable[..., Sweep], uninterrupted: Callable[[int], tuple[str, list[float]]]
) -> None:
    # SLURM's signal before the limit, sent by hand: limits are whole minutes. `make soak` waits for real ones.
    sweep = long(nodes=2)
    sweep.submit()
    for attempt, step in ((1, 15), (2, 30)):
        job = training(sweep, cluster, step)
        slurm("scancel", "--signal=USR2", job)
        cluster.wait(lambda: len(sweep.attempts()) == attempt + 1, 90, "the next attempt")  # noqa: B023
    ended(cluster)
    first, second, last = sweep.attempts()
    assert first["began_at"] == 0
    assert first["stood_at"] == second["began_at"] >= 15
    assert second["stood_at"] == last["began_at"] >= 30
    assert last["how"] == "done"
    assert (weights(sweep, sweep.train()), losses(sweep, sweep.train())) == uninterrupted(2)


@pytest.mark.soak
def test_each_element_of_an_array_is_requeued_and_no_other(cluster: Cluster, base: Path, tmp_path: Path) -> None:
    # The last element of an array has the array's own id as SLURM_JOB_ID.
    keys = {"matrix": {"arm": ["best_fit"], "train.lr": [1.0e-3, 2.0e-3, 3.0e-3], "seed": [0]}}
    sweep = Sweep(tmp_path, "three", steps=1000, profile={"nodes": 1, "array_cap": 2}, **keys)
    shutil.copytree(base / "store", sweep.runs / "store")
    (train,) = [item["job"] for item in sweep.submit()["submitted"] if item["kind"] == "train"]

    def begun(id_: str) -> bool:
        return sweep.store.metrics(id_).exists()

    trains = [id_ for id_ in sweep.plan().trains if id_ not in sweep.plan().shared]
    for element, id_ in enumerate(trains):
        cluster.wait(lambda: begun(id_), 120, f"training {element} has begun")  # noqa: B023
        slurm("scancel", "--signal=USR2", f"{train}_{element}")
    ended(cluster)
    for id_ in trains:
        attempts = json.loads(sweep.store.job("train", id_).read_text())["attempts"]
        assert [attempt["how"] for attempt in attempts] == ["preempted", "done"]
        assert len({attempt["job"] for attempt in attempts}) == 1


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_real_time_limits_cost_no_step_and_no_bit(cluster: Cluster, base: Path, tmp_path: Path) -> None:
    runs = {}
    for name, profile in (("limited", {"time": "1", "signal_s": 10, "nodes": 2}), ("free", {"nodes": 2})):
        sweep = Sweep(tmp_path / name, "long", steps=2500, profile=profile, train={**TRAIN, "steps": 2500})
        shutil.copytree(base / "store", sweep.runs / "store")
        sweep.submit()
        ended(cluster, 1200)
        runs[name] = sweep
    limited = runs["limited"]
    assert limited.ends().count("time limit") >= 2
    assert limited.ends()[-1] == "done"
    assert weights(limited, limited.train()) == weights(runs["free"], limited.train())


def test_a_preempted_training_goes_on_where_it_was(
    cluster: Cluster, long: Callable[..., Sweep], uninterrupted: Callable[[int], tuple[str, list[float]]]
) -> None:
    sweep = long(nodes=2)
    sweep.submit()
    job = training(sweep, cluster, 15)
    other = cluster.submit("sleep 5", "--partition=high", "--nodes=4", "--gpus-per-node=8")
    cluster.wait(lambda: cluster.state(job) == "PENDING", 60, "preempted")
    cluster.wait_state(other, "COMPLETED", 60)
    ended(cluster)
    first, last = sweep.attempts()
    assert (first["how"], last["how"]) == ("preempted", "done")
    assert first["stood_at"] == last["began_at"] >= 15, "nothing is lost"
    assert (weights(sweep, sweep.train()), losses(sweep, sweep.train())) == uninterrupted(2)


@pytest.mark.soak
def test_a_node_taken_away_with_its_processes_alive_does_not_get_two_writers(
    cluster: Cluster, long: Callable[..., Sweep], uninterrupted: Callable[[int], tuple[str, list[float]]]
) -> None:
    sweep = long(nodes=2)
    sweep.submit()
    job = training(sweep, cluster, 15)
    cluster.down("node0")
    cluster.wait(lambda: len(sweep.attempts()) == 2, 120, "the next attempt, on other nodes")
    ended(cluster)
    assert cluster.accounting(job, "State").startswith("COMPLETED")
    assert (weights(sweep, sweep.train()), losses(sweep, sweep.train())) == uninterrupted(2)


@pytest.mark.soak
def test_a_rank_that_is_killed_is_another_attempt_and_three_of_them_are_enough(
    cluster: Cluster, long: Callable[..., Sweep]
) -> None:
    sweep = long(nodes=2)
    sweep.submit()
    for attempt in range(3):
        training(sweep, cluster, 12 * (attempt + 1))
        ranks = subprocess.run(
            ["pgrep", "-f", f"launch.worker {sweep.runs}"], capture_output=True, text=True, check=True
        )
        os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
        if attempt < 2:
            cluster.wait(lambda: len(sweep.attempts()) == attempt + 2, 120, "the next attempt")  # noqa: B023
    ended(cluster)
    assert sweep.ends() == ["killed"] * 3
    again = sweep.run("sweep", "--on", str(sweep.profile))
    assert again.returncode == 7
    assert "quarantined: 3 attempts failed" in again.stderr
    assert "--retry" in again.stderr
    assert sweep.submit("--retry")["submitted"]


# Submission ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point", ["submitted.json:before", pytest.param("submitted.json:after", marks=pytest.mark.soak)]
)
def test_a_submission_that_is_killed_half_way_is_completed_and_no_job_comes_twice(
    cluster: Cluster, base: Path, tmp_path: Path, point: str
) -> None:
    keys = {
        "matrix": {"arm": ["best_fit", "padding"], "seed": [0, 1]},
        "eval": {"tasks": ["tiny_copy"], "limit": 4},
    }
    sweep = Sweep(tmp_path, "cut", steps=1, profile={"nodes": 1}, **keys)
    shutil.copytree(base / "store", sweep.runs / "store")
    before = set(cluster.jobs())
    killed = sweep.run(
        "sweep",
        "--on",
        str(sweep.profile),
        PACKCLI_FAULT=f"kill:{point}",
        PACKCLI_FAULT_LOG=str(tmp_path / "points"),
    )
    assert killed.returncode == -signal.SIGKILL
    first = set(cluster.jobs()) - before
    assert first, "the first array was submitted"
    states = {stage["state"] for cell in sweep.status()["cells"] for stage in cell["stages"].values()}
    assert states & {"queued", "running", "done"}, "what was submitted is known"
    sweep.submit()
    ended(cluster)
    assert sweep.status()["total"].keys() == {"done"}
    done: dict[tuple[str, str], int] = {}
    for path in sweep.store.submissions().glob("*/array-*/array.json"):
        if not list(path.parent.glob("*_log.out")):
            continue  # it never became a job
        for element in json.loads(path.read_text())["array"]["elements"]:
            for kind, id_ in element["stages"]:
                done[kind, id_] = done.get((kind, id_), 0) + 1
    assert done
    assert set(done.values()) == {1}, "no stage was given to two jobs"


def test_a_partition_that_is_not_there_is_one_line_before_any_job(cluster: Cluster, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "lost", steps=1, profile={"partition": "nowhere"})
    done = sweep.run("sweep", "--on", str(sweep.profile))
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "invalid partition" in done.stderr.lower()
    assert "partitions here: high, main" in done.stderr
    assert not cluster.jobs()


def test_more_nodes_than_there_are_is_one_line_and_not_a_job_that_waits_for_ever(
    cluster: Cluster, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, "wide", steps=1, profile={"nodes": 40})
    done = sweep.run("sweep", "--on", str(sweep.profile))
    assert done.returncode == 2
    assert "40 nodes a job, but the partition has 4; nothing was submitted" in done.stderr
    assert not cluster.jobs()


# Failures --------------------------------------------------------------------------------------------------


def test_a_failed_a_cancelled_and_a_foreign_job_leave_the_rest_of_the_sweep_unharmed(
    cluster: Cluster, base: Path, tmp_path: Path
) -> None:
    sweep = Sweep(
        tmp_path,
        "mixed",
        steps=4,
        profile={"nodes": 1, "array_cap": 1},
        train={**TRAIN, "steps": 4, "clip": None},
        eval={"tasks": ["tiny_copy"], "limit": 4},
        matrix={"arm": ["best_fit"], "train.lr": [1.0e36, 2.0e-3, 1.0e-3], "seed": [0]},
    )
    shutil.copytree(base / "store", sweep.runs / "store")
    foreign = cluster.submit("sleep 300", "--nodes=1", "--comment=somebody:else")
    jobs = {item["kind"]: item["job"] for item in sweep.submit()["submitted"]}
    slurm("scancel", f"{jobs['train']}_2")
    cluster.wait(lambda: set(cluster.jobs()) == {foreign}, 240, "all of ours have ended")
    states = [
        (cell["stages"]["train"]["state"], cell["stages"]["eval"]["state"]) for cell in sweep.status()["cells"]
    ]
    assert states[0] == ("failed", "pending")
    assert states[1] == ("done", "done")
    assert "done" not in states[2]
    assert (sweep.runs / "mixed" / "report.md").exists()

    again = sweep.run("sweep", "--on", str(sweep.profile), "--json")
    assert again.returncode == 7, "the diverged one would diverge again"
    assert "gradient norm nan" in again.stderr
    assert [item["elements"] for item in json.loads(again.stdout)["submitted"]] == [1, 1, 1], "train, eval, report"
    cancelled = sweep.run("cancel", "--json")
    assert cancelled.returncode == 0
    cluster.wait(lambda: set(cluster.jobs()) == {foreign}, 60, "ours are cancelled, another's is not")


def test_leaving_a_followed_sweep_leaves_its_jobs_alone(cluster: Cluster, long: Callable[..., Sweep]) -> None:
    sweep = long(nodes=1)
    following = sweep.start("sweep", "--on", str(sweep.profile), "--wait")
    training(sweep, cluster, 1)
    time.sleep(1)
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=60)
    assert following.returncode == 130
    assert "the jobs go on" in err
    assert cluster.jobs()
    ended(cluster)
    assert sweep.store.state("train", sweep.train()) == "done"
