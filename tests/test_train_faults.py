"""What a training does when it is killed, stopped, starved or damaged: real signals to real processes.

Numbers are those of the list of cases this project was planned with; others are in `test_train.py`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Training
from training import Data

from packcli import stages
from packcli.errors import HangError, OutOfMemoryError, PeerError
from packcli.store import Store, normalized
from packcli.train import faults, watchdog

TRAIN = {"steps": 20, "global_batch": 16, "save_every": 3, "keep_last": 2}
LONGER = {**TRAIN, "steps": 150, "save_every": 20}
FOREVER = {"epochs": 2000, "save_every": 100000}
KILLED_AFTER_A_CHECKPOINT = {"PACKCLI_FAULT_LOG": "points", "PACKCLI_FAULT": "kill:manifest.json:after"}
KILLED_IN_A_CHECKPOINT = {"PACKCLI_FAULT_LOG": "points", "PACKCLI_FAULT": "kill:manifest.json:before"}
TWO = ("--nproc-per-node", 2)

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def run_cli(forked_cli: Callable[..., object]) -> Callable[..., object]:
    return forked_cli


@pytest.fixture
def training(
    tiny_sweep: Callable[..., Path], run_cli: Callable[..., object], tmp_path: Path
) -> Callable[..., Training]:
    """`training(steps=20, ...)`: a prepared sweep of one training."""

    def make(**train: object) -> Training:
        return Training(tiny_sweep(arms=["best_fit"], train=train), run_cli, tmp_path)

    return make


def python(code: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd)


def kill_with_two_checkpoints(run: Training) -> None:
    process = run.start("train")
    run.until(lambda: bool(run.directories()) and len(run.checkpoints()) == 2)
    process.kill()
    process.communicate()
    run.until(lambda: run.survivors() == [])


# Killed ---------------------------------------------------------------------------------------------------

# Each life is a fork that has torch loaded but has not used it, killed as it reports its step; the last is not.
LIVES = """
    import os, signal, sys
    from pathlib import Path
    import packcli.train.loop
    from packcli import stages, sweepfile
    from packcli.store import Store

    store = Store(Path("runs"))
    plan = stages.make_plan(sweepfile.load(Path(sys.argv[1]), (), ()), store)
    [order] = plan.trains.values()
    for life in (*map(int, sys.argv[2:]), None):
        if not (child := os.fork()):
            def note(step, steps, remark):
                if step == life:
                    os.kill(os.getpid(), signal.SIGKILL)
            stages.train(order, store, note)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@slow
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_case_20_killed_at_every_step_it_ends_bitwise_where_an_uninterrupted_run_does(
    training: Callable[..., Training], every: int
) -> None:
    deaths = range(every, 21, every)
    run = training(**TRAIN)
    assert run.cli("train").code == 0
    whole = run.steps()
    final = {path.name: path.read_bytes() for path in (run.directory / "final").iterdir()}
    run.forget()
    lives = python(LIVES, run.sweep, *deaths, cwd=run.cwd)
    assert lives.stdout.split() == ["-9"] * len(deaths) + ["0"], lives.stderr
    assert [normalized(step) for step in run.steps()] == [normalized(step) for step in whole]
    assert {path.name: path.read_bytes() for path in (run.directory / "final").iterdir()} == final


@slow
@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_case_20_killed_on_one_rank_count_and_resumed_on_another_the_losses_are_the_same(
    training: Callable[..., Training], first: int
) -> None:
    run = training(**TRAIN)
    assert run.cli("train").code == 0
    whole = run.losses()
    run.forget()
    killed = run.cli("train", "--nproc-per-node", first, env=KILLED_AFTER_A_CHECKPOINT)
    assert killed.code == 7
    assert run.checkpoints() == [3]
    assert run.cli("train", "--nproc-per-node", 3 - first).code == 0
    assert len(run.losses()) == 20
    assert run.losses() == pytest.approx(whole, rel=1e-6)


@slow
def test_case_20_two_ranks_of_which_one_is_killed_before_the_commit_have_no_checkpoint_left(
    training: Callable[..., Training],
) -> None:
    run = training(**TRAIN)
    env = {"PACKCLI_FAULT_LOG": "points", "PACKCLI_FAULT": "kill:final:after"}
    assert run.cli("train", *TWO, env=env).code == 7
    assert run.checkpoints() == [15, 18]
    kept = run.steps()[:18]
    assert run.cli("train", *TWO).code == 0
    assert run.steps()[:18] == kept  # with their times
    assert run.checkpoints() == []


@slow
def test_case_21_killed_while_it_writes_a_checkpoint_it_leaves_that_one_out(
    training: Callable[..., Training],
) -> None:
    run = training(**TRAIN)
    assert run.cli("train").code == 0
    whole = run.losses()
    run.forget()
    assert run.cli("train", env=KILLED_IN_A_CHECKPOINT).code == 7
    assert (run.directory / "checkpoint-3").is_dir()
    assert run.checkpoints() == []
    assert run.cli("train").code == 0
    assert run.losses() == whole


@slow
@pytest.mark.parametrize(
    "damage", ["flipped", *(pytest.param(damage, marks=pytest.mark.soak) for damage in ("missing", "short"))]
)
def test_case_22_a_damaged_checkpoint_is_refused_by_name_unless_a_fallback_is_allowed(
    training: Callable[..., Training], damage: str
) -> None:
    run = training(**LONGER)
    kill_with_two_checkpoints(run)
    before, newest = run.checkpoints()
    [shard] = (run.directory / f"checkpoint-{newest}").glob("*.distcp")
    whole = bytearray(shard.read_bytes())
    match damage:
        case "missing":
            shard.unlink()
        case "short":
            shard.write_bytes(whole[:-1])
        case "flipped":
            whole[len(whole) // 2] ^= 1
            shard.write_bytes(whole)
    refused = run.cli("train")
    assert refused.code == 4
    assert str(shard.relative_to(run.cwd)) in refused.stderr
    assert "--allow-fallback" in refused.stderr
    kept = run.steps()[before - 1]
    assert run.cli("train", "--allow-fallback").code == 0
    assert len(run.steps()) == LONGER["steps"]
    assert run.steps()[before - 1] == kept  # its times, too: this step was not done again


# Stopped --------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGTERM, 1),
        (signal.SIGUSR2, 2),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.soak),
        pytest.param(signal.SIGUSR2, 1, marks=pytest.mark.soak),
    ],
)
def test_case_26_sigterm_and_usr2_save_and_exit_75(
    training: Callable[..., Training], number: signal.Signals, ranks: int
) -> None:
    run = training(**FOREVER)
    process = run.start("train", "--nproc-per-node", ranks)
    run.until_step(2, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "run the same command again" in stderr
    assert run.checkpoints() == [len(run.steps())]
    assert not (run.directory / "failure.json").exists()
    assert run.survivors() == []


@slow
def test_cancel_stops_the_sweep_of_this_machine_and_leaves_a_checkpoint(training: Callable[..., Training]) -> None:
    run = training(**FOREVER)
    # A killed sweep's, and the number is another process's.
    stale = Store(run.cwd / "runs").process("tiny_test", 1)
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    process = run.start("sweep")
    run.until_step(2, process)
    cancelled = run.cli("cancel", "--json")
    assert cancelled.code == 0
    assert cancelled.json()["processes"] == [process.pid]
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert run.checkpoints() == [len(run.steps())]
    assert run.survivors() == []
    assert run.cli("cancel", "--json").json()["processes"] == []


@slow
def test_case_26_a_cluster_that_signals_every_process_of_the_job_does_not_cut_the_checkpoint_short(
    training: Callable[..., Training],
) -> None:
    run = training(**FOREVER)
    process = run.start("train", *TWO)
    run.until_step(2, process)
    for pid in run.survivors():
        os.kill(pid, signal.SIGUSR2)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert run.checkpoints() == [len(run.steps())]


@slow
def test_case_26_a_second_signal_ends_it_at_once_though_a_rank_would_never_save(
    training: Callable[..., Training],
) -> None:
    run = training(**FOREVER)
    process = run.start("train", *TWO)
    run.until_step(2, process)
    os.kill(run.rank(1), signal.SIGSTOP)
    process.terminate()
    time.sleep(3)
    assert process.poll() is None  # it waits for the checkpoint
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75
    run.until(lambda: run.survivors() == [])


@slow
def test_case_26_after_the_grace_period_a_rank_that_does_not_save_is_killed(
    training: Callable[..., Training],
) -> None:
    run = training(**FOREVER)
    process = run.start("train", *TWO, "--grace", 2)
    run.until_step(2, process)
    os.kill(run.rank(1), signal.SIGSTOP)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75
    run.until(lambda: run.survivors() == [])


@slow
def test_case_27_a_requeued_job_goes_on_with_the_same_run_and_its_steps_go_on_counting(
    training: Callable[..., Training],
) -> None:
    run = training(**{**FOREVER, "epochs": 40})
    process = run.start("train", env={"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"})
    run.until_step(5, process)
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=120)
    assert process.returncode == 75
    before = run.steps()
    directory = run.directory
    assert run.cli("train", env={"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}).code == 0
    assert run.directory == directory
    after = run.steps()
    assert after[: len(before)] == before
    assert [record["step"] for record in after] == list(range(1, len(after) + 1))
    assert len(after) > len(before)


# Lost, hung, starved --------------------------------------------------------------------------------------


@slow
def test_case_28_a_rank_that_hangs_fails_the_run_within_the_timeout_and_it_resumes(
    training: Callable[..., Training],
) -> None:
    run = training(**{**FOREVER, "epochs": 60, "save_every": 5, "hang_timeout_s": 4})
    process = run.start("train", *TWO)
    run.until_step(8, process)
    stopped = time.monotonic()
    os.kill(run.rank(1), signal.SIGSTOP)
    _, stderr = process.communicate(timeout=120)
    assert time.monotonic() - stopped < 4 + 20
    assert process.returncode == 7
    assert stderr.count("error:") == 1
    assert "rank 0 hung: no step for" in stderr
    assert run.failure()["kind"] == "hang"
    run.until(lambda: run.survivors() == [])
    [log] = run.cwd.glob("runs/*/worker-0.log")
    assert "all_reduce" in log.read_text() or "File" in log.read_text()  # where it hung
    assert run.cli("train", *TWO).code == 0
    assert not (run.directory / "failure.json").exists()
    assert [record["step"] for record in run.steps()] == list(range(1, len(run.steps()) + 1))


@pytest.mark.parametrize(
    ("first_s", "then_s", "code"), [(0.0, 0.2, 0), (0.6, 0.2, 0), (0.0, 1.5, 7), (3.0, 0.0, 7)]
)
def test_case_28_a_step_that_takes_too_long_ends_the_process_and_the_first_may_take_longer(
    first_s: float, then_s: float, code: int
) -> None:
    program = """
        import sys, time
        from packcli.train.watchdog import watching
        with watching(0.5, 3, lambda error: print(error, error.kind, flush=True)) as alive:
            for pause in map(float, sys.argv[1:]):
                time.sleep(pause)
                alive()
    """
    done = python(program, first_s, then_s)
    assert done.returncode == code, done.stderr
    if code:
        assert "rank 3 hung: no step for" in done.stdout
        assert done.stdout.split()[-1] == "hang"
        assert done.stderr.count("error: rank 3 hung") == 1
        assert 'File "<string>", line 6' in done.stderr  # the stack of the thread that sleeps


def test_case_28_a_process_that_was_itself_suspended_has_not_hung() -> None:
    program = """
        import os, signal, subprocess, sys, time
        from packcli.train.watchdog import watching
        with watching(0.5, 0, lambda error: None) as alive:
            alive()
            subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
            alive()
    """
    assert python(program).returncode == 0


def test_case_28_a_file_system_that_hangs_does_not_keep_the_process_from_ending() -> None:
    program = """
        import time
        from packcli.train import watchdog
        watchdog._LAST_WORDS_S = 0.2
        with watchdog.watching(0.2, 0, lambda error: time.sleep(60)):
            time.sleep(60)
    """
    started = time.monotonic()
    assert python(program).returncode == 7
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("state", ["gone", "full"])
def test_case_28_a_stderr_that_nobody_reads_keeps_a_hung_process_from_ending(state: str, tmp_path: Path) -> None:
    """Its reader is gone (`| tee`, killed), or hangs; the cause is told all the same."""
    program = """
        import sys, time
        from pathlib import Path
        from packcli.train import watchdog
        watchdog._LAST_WORDS_S = 1
        with watchdog.watching(0.2, 0, lambda error: Path(sys.argv[1]).write_text(error.kind)):
            time.sleep(60)
    """
    reader, writer = os.pipe()
    if state == "gone":
        os.close(reader)
    else:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.set_blocking(writer, True)
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "said")]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=writer, timeout=40, check=False)
    assert done.returncode == 7
    assert (tmp_path / "said").read_text() == "hang"


def test_case_28_a_rank_that_hangs_after_its_last_step_is_not_seen(
    tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Counter[str]()

    @contextlib.contextmanager
    def watching(timeout_s: float, rank: int, fail: object, what: str) -> Iterator[Callable[[], None]]:
        yield lambda: seen.update([what])

    monkeypatch.setattr(watchdog, "watching", watching)
    order = tiny.train_order("best_fit", "watched", steps=2, hang_timeout_s=5)
    stages.train(order, tiny.store)
    assert seen.pop("validation batch") > 1
    assert seen == {"step": 2, "tensor of `final/`": len(tiny.model().model.state_dict())}


def test_case_28_collectives_give_up_later_than_the_watchdog() -> None:
    assert watchdog.collective_timeout(None) is None
    for timeout_s in (1.0, 600.0, 7200.0):
        found = watchdog.collective_timeout(timeout_s)
        assert found is not None
        assert found.total_seconds() > watchdog.FIRST_STEP * timeout_s
    assert HangError.exit_code == 7


def test_case_29_out_of_memory_is_told_with_step_and_micro_batch_and_what_to_change() -> None:
    message = "step 3: out of memory with micro_batch 8"
    with pytest.raises(OutOfMemoryError, match=message) as caught, faults.memory(lambda: 3, 8):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "train.micro_batch" in caught.value.fix
    others = [
        RuntimeError(f"{words}, and more")
        for words in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Failed to CUDA calloc 512 bytes")
    ]
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        *others,
    ):
        with pytest.raises(OutOfMemoryError), faults.memory(lambda: 1, 1):
            raise error


def test_case_29_an_error_that_is_not_about_memory_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes"), faults.memory(lambda: 1, 1):
        raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"), faults.peers():
        raise RuntimeError("shapes do not match")


def test_case_28_a_lost_peer_is_told_from_a_bug() -> None:
    gone = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:37"
    for error in (RuntimeError(gone), torch.distributed.DistBackendError("NCCL error")):
        with pytest.raises(PeerError, match="lost another rank"), faults.peers():
            raise error


@slow
def test_case_29_a_process_that_the_kernel_killed_is_told_as_killed_and_goes_on_when_run_again(
    training: Callable[..., Training],
) -> None:
    run = training(**TRAIN)
    done = run.cli("train", env=KILLED_AFTER_A_CHECKPOINT)
    assert done.code == 7
    assert "the process died (signal 9, SIGKILL; out of memory?)" in done.stderr
    assert run.failure()["kind"] == "killed"
    assert run.cli("train").code == 0
    assert len(run.steps()) == 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 4 MB at `tmp_path/runs`."""
    small = tmp_path / "runs"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this process may not mount a small file system")
    yield small
    subprocess.run(["umount", "-l", str(small)], check=True)


@slow
def test_case_30_a_full_disk_stops_the_training_and_keeps_the_checkpoint_before(
    training: Callable[..., Training], small_disk: Path
) -> None:
    run = training(**TRAIN)
    assert run.cli("train", env=KILLED_AFTER_A_CHECKPOINT).code == 7
    filler = small_disk / "filler"
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize - 100_000))
    full = run.cli("train")
    assert full.code == 6
    assert "free some space" in full.stderr
    assert run.checkpoints() == [3]
    assert run.failure()["kind"] == "missing"
    filler.unlink()
    assert run.cli("train").code == 0
    assert len(run.steps()) == 20


@slow
def test_case_31_checkpoints_go_by_step_whatever_the_clock_says(training: Callable[..., Training]) -> None:
    run = training(**LONGER)
    kill_with_two_checkpoints(run)
    older, newest = run.checkpoints()
    for step, when in ((older, 4102444800), (newest, 315532800)):  # 2100, 1980
        for path in (run.directory / f"checkpoint-{step}", *(run.directory / f"checkpoint-{step}").iterdir()):
            os.utime(path, (when, when))
    kept = run.steps()[:newest]
    assert run.cli("train").code == 0
    assert run.steps()[:newest] == kept  # with their times: none of them was done again
    assert len(run.steps()) == LONGER["steps"]
