"""`--wait`: what would be said wrong, said again and again, or done to jobs by somebody who only looks."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import listen_to_ctrl_c
from followed import Sent, planned
from rich.console import Console
from test_graph import profile

from packcli import log, stages, sweepfile
from packcli.errors import DivergedError, LeftError
from packcli.launch import cluster, follow, slurm
from packcli.launch.graph import Stage
from packcli.store import Store

SILENT = "slurm_load_jobs error: Unable to contact slurm controller"
Scene = Callable[[], object]


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sent:
    """One training of 80 steps, queued, and its scores."""
    return Sent(planned(), tmp_path, monkeypatch)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is told, line by line."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    level = log.logger.level
    log.logger.addHandler(handler)
    log.logger.setLevel(logging.INFO)
    yield found
    log.logger.removeHandler(handler)
    log.logger.setLevel(level)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """`play(sent, scene, ...)` follows a sweep to its end; what happens between two looks, each in its turn."""

    def run(sent: Sent, *scenes: Scene) -> list[float]:
        waiting, slept, clock = list(scenes), [], [1000.0]

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            clock[0] += seconds
            assert waiting, "it goes on although no job is left"
            waiting.pop(0)()

        monkeypatch.setattr(slurm, "_TRIES", 1)
        monkeypatch.setattr(follow, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
        follow.follow(sent.plan, sent.store)
        assert not waiting, "it did not wait for all"
        return slept

    return run


def all_end(sent: Sent) -> Scene:
    """Every stage is done."""
    return lambda: (sent.finish(*sent.jobs), sent.slurm.set(sent.ids["report"], "COMPLETED"))


def nothing() -> None:
    """Time passes."""


def train(sent: Sent) -> Stage:
    return ("train", sent.plan.cells[0].train)


def begins(sent: Sent, stage: Stage, *ends: str | None, nodes: str = "node0") -> Scene:
    return lambda: (sent.attempt(stage, *ends, None), sent.set(stage, "RUNNING", nodes=nodes))


# What is told ------------------------------------------------------------------------------------------


def test_every_start_requeue_and_end_is_told_once(
    sent: Sent, lines: list[str], play: Callable[..., list[float]]
) -> None:
    stage = train(sent)

    def preempted() -> None:
        sent.attempt(stage, "preempted")
        sent.set(stage, "PENDING", reason="BeginTime")

    play(
        sent,
        begins(sent, stage, nodes="node[0-3]"),
        preempted,
        begins(sent, stage, "preempted", nodes="node2"),
        nothing,
        lambda: sent.finish(stage),
        all_end(sent),
    )
    name = f"train padding 0 ({sent.id(stage)}): "
    told = [line.removeprefix(name) for line in lines if line.startswith(name)]
    assert told == ["runs on node[0-3]", "requeued (preempted)", "runs on node2, attempt 2", "done"]


def test_a_requeue_between_two_looks_is_not_missed(
    sent: Sent, lines: list[str], play: Callable[..., list[float]]
) -> None:
    stage = train(sent)
    play(sent, begins(sent, stage), begins(sent, stage, "time limit", nodes="node1"), all_end(sent))
    assert f"train padding 0 ({sent.id(stage)}): requeued (time limit), runs on node1, attempt 2" in lines


def test_the_end_of_a_failed_job_says_why(sent: Sent, lines: list[str], play: Callable[..., list[float]]) -> None:
    stage, (first, *_) = train(sent), sent.plan.evals

    def fails() -> None:
        sent.fail(stage, DivergedError("step 3: loss nan", "lower `train.lr`"))
        sent.set(("eval", first), "CANCELLED")

    play(sent, begins(sent, stage), fails, all_end(sent))
    assert f"train padding 0 ({sent.id(stage)}): failed: step 3: loss nan" in lines
    assert f"eval padding 0 ({sent.id(('eval', first))}): cancelled" in lines


def test_a_log_is_not_filled_by_looking(sent: Sent, lines: list[str], play: Callable[..., list[float]]) -> None:
    play(sent, *[nothing] * 23, all_end(sent))
    counted = [line for line in lines if line.startswith("jobs:")]
    # Looks are 5 s apart, lines 30 s: at 0, 30, 60, 90, and at the end.
    assert len(counted) == 5
    assert counted[-1] == "jobs: 0 running, 0 queued; stages: 5 of 5 done"


def test_a_line_says_how_far_a_training_is_and_what_the_others_wait_for(
    sent: Sent, lines: list[str], play: Callable[..., list[float]]
) -> None:
    stage = train(sent)
    begins(sent, stage)()
    sent.train_to(stage[1], 20, step_s=2.0, torn=True)
    play(sent, all_end(sent))
    assert lines[0] == (
        "jobs: 1 running, 3 queued (2 Dependency, 1 Resources); stages: 0 of 5 done; "
        f"train padding 0 ({sent.id(stage)}): 20 of 80 steps, loss 2.800, 500 useful tokens/s, about 2 min left"
    )


# What is not told --------------------------------------------------------------------------------------


def test_the_time_left_is_not_guessed_while_something_waits_in_the_queue(
    sent: Sent, lines: list[str], play: Callable[..., list[float]]
) -> None:
    stage = train(sent)
    begins(sent, stage)()
    sent.train_to(stage[1], 20, step_s=2.0)
    rest = [other for other in sent.jobs if other != stage]
    play(sent, lambda: sent.finish(*rest), *[nothing] * 6, all_end(sent))
    counted = [line for line in lines if line.startswith("jobs:")]
    assert "left in all" not in counted[0]
    assert counted[1].endswith("about 2 min left in all")


def test_jobs_of_another_sweep_are_not_waited_for(
    sent: Sent, lines: list[str], play: Callable[..., list[float]]
) -> None:
    outcome = cluster.submit(planned(seeds=2), sent.store, profile(nodes=1), {})
    assert any(item.array.job == "report" for item in outcome.sent)  # it waits for cells that nobody follows
    play(sent, all_end(sent))
    assert lines[-1] == "jobs: 0 running, 0 queued; stages: 5 of 5 done"


def test_an_attempt_that_only_begins_has_no_pace(
    sent: Sent, lines: list[str], play: Callable[..., list[float]]
) -> None:
    stage = train(sent)
    sent.train_to(stage[1], 20)
    sent.attempt(stage, "preempted", None, started_s=time.time() + 60)
    sent.set(stage, "RUNNING", nodes="node0")
    play(sent, all_end(sent))
    assert lines[0].endswith(f"train padding 0 ({sent.id(stage)}): 20 of 80 steps")


# SLURM -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_controller_that_restarts_is_waited_for_and_told_once(
    sent: Sent, lines: list[str], play: Callable[..., list[float]]
) -> None:
    play(sent, lambda: sent.slurm.fault("squeue", SILENT), *[nothing] * 20, sent.slurm.mend, all_end(sent))
    assert [line for line in lines if "Unable to contact" in line] == [
        f"warning: `squeue` failed: {SILENT}; the jobs go on without us, we wait for its answer"
    ]
    assert lines.count("SLURM answers again") == 1


def test_a_controller_with_thousands_of_jobs_is_not_asked_every_five_seconds(
    sent: Sent, play: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = len(slurm.live())
    assert play(sent, all_end(sent)) == [5.0]
    for stage in sent.jobs:
        sent.store.manifest_file(*stage).unlink()
        sent.set(stage, "PENDING")
    monkeypatch.setattr(follow, "_MANY_JOBS", jobs - 2)
    assert play(sent, all_end(sent)) == [30.0]


# Ctrl-C ------------------------------------------------------------------------------------------------


def interrupt() -> None:
    raise KeyboardInterrupt


def test_looking_away_is_no_failure_and_stops_nothing(sent: Sent, play: Callable[..., list[float]]) -> None:
    with pytest.raises(LeftError) as caught:
        play(sent, interrupt)
    assert caught.value.exit_code == 130
    assert sent.slurm.calls("scancel") == []


@pytest.mark.slow
def test_ctrl_c_says_that_the_jobs_go_on_and_not_that_work_was_interrupted(
    tiny_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = sweepfile.load(tiny_sweep(arms=["padding"], train={"steps": 3}))
    sent = Sent(stages.make_plan(spec, Store(Path("runs"))), tmp_path, monkeypatch)
    (tmp_path / "site.yaml").write_text("partition: gpu\ngpus_per_node: 0\n")
    words: Sequence[str] = ("sweep", "sweep.yaml", "--on", "site.yaml", "--wait")
    process = subprocess.Popen(
        [sys.executable, "-m", "packcli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_ctrl_c,
    )
    assert process.stderr is not None
    told = ""
    while "jobs: 0 running" not in told:
        line = process.stderr.readline()
        assert line, told
        told += line
    process.send_signal(signal.SIGINT)
    told += process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert told.endswith("\nleft: the jobs go on; the same command with --wait rejoins\n")
    assert "interrupted" not in told
    assert sent.slurm.calls("scancel") == []
    assert len(slurm.live()) == 3  # as before: all there, and none sent twice


# A terminal --------------------------------------------------------------------------------------------


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> StringIO:
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=160, height=12, color_system=None)
    monkeypatch.setattr(log, "console", lambda: console)
    return out


def test_a_terminal_shows_each_running_job_with_its_attempt(
    sent: Sent, screen: StringIO, lines: list[str], play: Callable[..., list[float]]
) -> None:
    stage = train(sent)
    begins(sent, stage, "preempted", nodes="node[0-3]")()
    sent.train_to(stage[1], 20, step_s=2.0)
    play(sent, lambda: sent.slurm.fault("squeue", SILENT), sent.slurm.mend, all_end(sent))
    [row] = {line.strip() for line in screen.getvalue().split("\n") if "padding 0" in line}
    cells = row.split()
    known = "train padding 0 node[0-3] 20 of 80 steps 500 2.800 2 min 2"
    assert cells == [sent.id(stage), *known.split()]
    assert "the jobs go on without us" in screen.getvalue()
    assert lines == []  # they would be written across the table


def test_more_jobs_than_a_terminal_has_lines_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: StringIO, play: Callable[..., list[float]]
) -> None:
    many = Sent(planned(seeds=9), tmp_path, monkeypatch)
    for cell in many.plan.cells:
        many.set(("train", cell.train), "RUNNING", nodes="node0")
    play(many, all_end(many))
    assert "and 5 more" in screen.getvalue()
    assert "jobs: 9 running" in screen.getvalue()
