"""One training over several processes: started, stopped, and told of as one."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Training

from packcli import processes
from packcli.errors import (
    ConfigError,
    HangError,
    KilledError,
    MissingError,
    OutOfMemoryError,
    PackcliError,
    PeerError,
    PreemptedError,
    RunError,
)
from packcli.files import read_jsonl
from packcli.launch import ranks
from packcli.launch.ranks import Group
from packcli.processes import Stop
from packcli.store import Store

TRAIN = {"steps": 12, "global_batch": 16, "save_every": 3, "keep_last": 2}
FOREVER = {"epochs": 2000, "save_every": 100000}


@pytest.fixture
def training(
    tiny_sweep: Callable[..., Path], run_cli: Callable[..., object], tmp_path: Path
) -> Callable[..., Training]:
    """`training(steps=20, ...)`: a prepared sweep of one training."""

    def make(**train: object) -> Training:
        return Training(tiny_sweep(arms=["best_fit"], train=train or TRAIN), run_cli, tmp_path)

    return make


# Which error it was ---------------------------------------------------------------------------------------


class Ended:
    """Ranks as they ended: `Ended(0, told=...)`, `Ended(1, died=-9)`, `Ended(2)` well."""

    def __new__(cls, number: int, *, told: PackcliError | None = None, died: int | None = None) -> ranks._Rank:
        return ranks._Rank(number, None, 0, ended=True, failure=told, died=died)  # type: ignore[arg-type]


class Order:
    id = "x"


def verdict(tmp_path: Path, *ended: ranks._Rank, stop: Stop | None = None) -> PackcliError | None:
    return ranks._verdict(ended, stop or Stop(), Order, Store(tmp_path))  # type: ignore[arg-type]


def test_the_rank_that_was_killed_is_named_not_the_peers_that_lost_it(tmp_path: Path) -> None:
    lost = (Ended(0, told=PeerError("lost another rank")), Ended(2, told=PackcliError("bug: RuntimeError")))
    error = verdict(tmp_path, lost[0], Ended(1, died=-9), lost[1])
    assert isinstance(error, KilledError)
    assert error.cause == "rank 1: the process died (signal 9, SIGKILL; out of memory?)"
    assert "micro_batch" in error.fix


def test_a_crash_is_not_called_out_of_memory(tmp_path: Path) -> None:
    error = verdict(tmp_path, Ended(0, died=-11), Ended(1, told=PeerError("lost another rank")))
    assert error is not None
    assert error.cause == "rank 0: the process died (signal 11, SIGSEGV)"


def test_what_one_rank_says_of_itself_counts_more_than_what_its_end_did_to_others(tmp_path: Path) -> None:
    memory = OutOfMemoryError("step 3: out of memory")
    assert verdict(tmp_path, Ended(0, told=PeerError("lost")), Ended(1, told=memory), Ended(2, died=-6)) is memory


def test_a_hang_is_told_as_the_rank_that_noticed_it_left_it(tmp_path: Path) -> None:
    Store(tmp_path).fail("train", "x", HangError("rank 1 hung: no step for 9 s"))
    error = verdict(tmp_path, Ended(0, told=PeerError("lost another rank")), Ended(1, died=7))
    assert isinstance(error, HangError)
    assert error.cause == "rank 1 hung: no step for 9 s"


def test_a_lost_peer_does_not_replace_the_cause_that_is_already_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.fail("train", "x", HangError("rank 1 hung"))
    store.fail("train", "x", PeerError("lost another rank"))
    assert isinstance(store.failure("train", "x"), HangError)
    store.fail("train", "x", RunError("diverged"))
    assert isinstance(store.failure("train", "x"), RunError)


def test_ranks_that_die_of_the_stop_they_were_asked_for_are_preempted_not_failed(tmp_path: Path) -> None:
    stop = Stop(number=signal.SIGTERM)
    assert isinstance(verdict(tmp_path, Ended(0, died=-15), Ended(1, died=-9), stop=stop), PreemptedError)
    assert isinstance(verdict(tmp_path, Ended(0, died=75), Ended(1, died=-9)), PreemptedError)
    told = PreemptedError("stopped at step 3 of 9")
    assert verdict(tmp_path, Ended(0, told=told), Ended(1, told=told), stop=stop) is told


def test_a_checkpoint_that_could_not_be_written_is_told_even_when_asked_to_stop(tmp_path: Path) -> None:
    full = MissingError("the disk is full")
    assert verdict(tmp_path, Ended(0, told=full), Ended(1, died=-9), stop=Stop(number=signal.SIGTERM)) is full


def test_a_training_that_ended_before_it_heard_of_the_stop_is_done(tmp_path: Path) -> None:
    assert verdict(tmp_path, Ended(0), Ended(1), stop=Stop(number=signal.SIGTERM)) is None


# How ranks are started ------------------------------------------------------------------------------------


def test_signals_sent_together_are_one_request_and_a_later_one_is_another() -> None:
    stop = Stop()
    stop.ask(signal.SIGUSR2, None)
    stop.ask(signal.SIGTERM, None)
    assert (stop.number, stop.at_once) == (signal.SIGUSR2, False)
    stop.at_s -= processes.ONE_REQUEST_S + 1
    stop.ask(signal.SIGTERM, None)
    assert (stop.number, stop.at_once) == (signal.SIGUSR2, True)


def test_two_trainings_in_turn_do_not_meet_on_one_port() -> None:
    group = Group(nodes=2, endpoint="node0:29400")
    assert [group.address(number) for number in (0, 1)] == [("node0", 29400), ("node0", 29401)]
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Group(nodes=2, endpoint="node0").address(0)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "gpus", lambda: 2)
    assert ranks.processes_here(None) == (2, 2)
    assert ranks.processes_here(1) == (1, 2)
    with pytest.raises(MissingError, match="3 processes, but 2 GPUs"):
        ranks.processes_here(3)
    monkeypatch.setattr(ranks, "gpus", lambda: 0)
    assert ranks.processes_here(3) == (3, 0)
    assert ranks.processes_here(None) == (1, 0)


@pytest.mark.parametrize("options", [("--nnodes", 2), ("--nnodes", 2, "--node-rank", 2, "--rdzv-endpoint", "a:1")])
def test_machines_that_cannot_find_each_other_are_a_usage_error(
    options: tuple[object, ...], tiny_sweep: Callable[..., Path], run_cli: Callable[..., object], tmp_path: Path
) -> None:
    done = run_cli("train", tiny_sweep(), *options, cwd=tmp_path)
    assert done.code == 2  # type: ignore[attr-defined]
    assert "--rdzv-endpoint" in done.stderr  # type: ignore[attr-defined]


# As a user starts them ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_show_progress_and_leave_no_process_and_the_losses_of_one(
    training: Callable[..., Training],
) -> None:
    run = training(**TRAIN)
    assert run.cli("train", "--nproc-per-node", 2).code == 0
    two = run.losses()
    assert run.manifest()["results"]["processes"] == 2
    run.forget()
    assert run.cli("train").code == 0
    assert run.losses() == pytest.approx(two, rel=1e-6)
    assert run.survivors() == []


@pytest.mark.slow
def test_two_machines_train_what_one_does(training: Callable[..., Training]) -> None:
    run = training(**TRAIN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ("--nnodes", 2, "--rdzv-endpoint", f"127.0.0.1:{port}")
    other = run.start("train", *common, "--node-rank", 1)
    one = run.cli("train", *common, "--node-rank", 0)
    stdout, stderr = other.communicate(timeout=120)
    assert (one.code, other.returncode) == (0, 0), one.stderr + stderr
    assert "best_fit" in one.stdout
    assert stdout == ""
    two = run.losses()
    run.forget()
    assert run.cli("train").code == 0
    assert run.losses() == pytest.approx(two, rel=1e-6)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_at_once_and_is_named_once(training: Callable[..., Training]) -> None:
    run = training(**FOREVER)
    process = run.start("train", "--nproc-per-node", 2)
    run.until_step(3, process)
    os.kill(run.rank(1), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 7
    assert stderr.count("error:") == 1
    assert "rank 1: the process died (signal 9, SIGKILL; out of memory?)" in stderr
    assert run.failure()["kind"] == "killed"
    assert run.survivors() == []


@pytest.mark.slow
def test_ranks_die_with_whoever_started_them(training: Callable[..., Training]) -> None:
    run = training(**FOREVER)
    process = run.start("train", "--nproc-per-node", 2)
    run.until_step(1, process)
    assert len(run.survivors()) >= 4
    process.kill()
    process.wait()
    run.until(lambda: run.survivors() == [])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["own", "torchrun"])
def test_an_error_of_all_ranks_is_shown_once(training: Callable[..., Training], launcher: str) -> None:
    run = training(**{**TRAIN, "lr": 1e30, "clip": None})
    if launcher == "own":
        done = run.cli("train", "--nproc-per-node", 2)
        assert done.code == 7
        stderr = done.stderr
    else:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "-m",
            "packcli",
            "train",
        ]
        plain = subprocess.run(
            [*command, str(run.sweep)], cwd=run.cwd, capture_output=True, text=True, timeout=120
        )
        assert plain.returncode == 1  # torchrun's own
        stderr = plain.stderr
    assert stderr.count("no update was made") == 1
    assert run.failure()["kind"] == "diverged"


@pytest.mark.slow
def test_a_sweep_gives_each_training_all_processes_and_goes_on_after_one_failed(
    tiny_sweep: Callable[..., Path], run_cli: Callable[..., object], tmp_path: Path
) -> None:
    matrix = {"train.lr": [1e30, 1e-3]}
    sweep = tiny_sweep(arms=["best_fit"], train={**TRAIN, "clip": None}, matrix=matrix)
    done = run_cli("sweep", sweep, "--nproc-per-node", 2, cwd=tmp_path)
    assert done.code == 7  # type: ignore[attr-defined]
    assert "3 stages to do, 1 at a time" in done.stderr or "4 stages to do" in done.stderr  # type: ignore[attr-defined]
    [finished] = (tmp_path / "runs" / "store" / "train").glob("*/manifest.json")
    assert len(read_jsonl(finished.with_name("metrics.jsonl"))) == TRAIN["steps"]
