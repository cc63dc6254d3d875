"""The life of a stage on a cluster: what would keep nodes busy for nothing, or give up on what would end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from test_plan import SWEEP, changed, made

from packcli.errors import (
    ConfigError,
    DataError,
    DivergedError,
    HangError,
    NodeError,
    OutOfMemoryError,
    PackcliError,
    PreemptedError,
    QuarantinedError,
)
from packcli.files import write_json
from packcli.launch import cluster, job, life
from packcli.launch.graph import Known, Stage, graph
from packcli.launch.life import Attempt
from packcli.launch.profile import Profile, RequeueSpec
from packcli.store import Store

TRAIN: Stage = ("train", "a" * 16)
OTHER: Stage = ("train", "b" * 16)


class Job:
    """A stage under one policy, attempted as often as a test says."""

    def __init__(self, store: Store, policy: RequeueSpec, stages: tuple[Stage, ...] = (TRAIN,)) -> None:
        self.store, self.policy, self.stages = store, policy, stages
        self.restart = -1

    def begin(self) -> None:
        self.restart += 1
        attempt = Attempt(
            job="7_0",
            restart=self.restart,
            nodes=("node0",),
            started_s=0.0,
            began_at=life.progress(self.store, self.stages),
        )
        life.begin(self.store, self.stages, attempt, "settings", self.policy)

    def attempt(
        self, code: int, error: PackcliError | None = None, *, step: int | None = None, late: bool = False
    ) -> int:
        """One attempt that leaves a checkpoint at `step`, or `error`, and ends with `code`; the job's code."""
        self.begin()
        if step is not None:
            checkpoint(self.store, step)
        if error is not None:
            self.store.fail(*self.stages[-1], error)
        return life.end(self.store, self.stages, code, "time limit" if late else "preempted", self.policy)

    @property
    def hows(self) -> list[str | None]:
        return [attempt.how for attempt in life.read(self.store, self.stages[0]).attempts]

    def failure(self) -> PackcliError | None:
        return self.store.failure(*self.stages[-1])


def checkpoint(store: Store, step: int, *, whole: bool = True) -> None:
    directory = store.checkpoint(TRAIN[1], step)
    directory.mkdir(parents=True)
    if whole:
        write_json(directory / "manifest.json", {})


def finish(store: Store, stage: Stage, steps: int = 0) -> None:
    """As a stage that is done leaves its directory, as far as is looked at here."""
    store.directory(*stage).mkdir(parents=True, exist_ok=True)
    store.commit(*stage, spec={}, inputs={}, results={"steps": steps}, provenance={})


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def make(*stages: Stage, **policy: int) -> Job:
        return Job(Store(tmp_path), RequeueSpec(**policy), stages or (TRAIN,))

    return make


# Another attempt ---------------------------------------------------------------------------------------


def test_a_preempted_stage_gets_another_attempt(start: Start) -> None:
    running = start()
    assert running.attempt(75, step=5) == PreemptedError.exit_code
    [attempt] = life.read(running.store, TRAIN).attempts
    assert (attempt.how, attempt.began_at, attempt.stood_at) == ("preempted", 0, 5)
    finish(running.store, TRAIN)
    assert running.attempt(0) == 0
    assert running.hows == ["preempted", "done"]


def test_preemption_early_again_and_again_is_no_quarantine(start: Start) -> None:
    running = start(without_progress=3)
    assert {running.attempt(75) for _ in range(20)} == {75}
    assert running.failure() is None


def test_a_time_limit_that_is_too_short_for_one_checkpoint_is_not_met_for_ever(start: Start) -> None:
    running = start(without_progress=3)
    assert [running.attempt(75, late=True) for _ in range(3)] == [75, 75, 7]
    failure = running.failure()
    assert isinstance(failure, QuarantinedError)
    assert "3 attempts without any progress (time limit)" in failure.cause
    assert "--retry" in failure.fix


def test_a_training_longer_than_its_time_limit_ends(start: Start) -> None:
    running = start(without_progress=3)
    assert {running.attempt(75, step=step, late=True) for step in range(1, 13)} == {75}
    assert set(running.hows) == {"time limit"}


def test_preemptions_between_do_not_hide_a_stage_that_gets_nowhere(start: Start) -> None:
    running = start(without_progress=2)
    assert [running.attempt(75, late=late) for late in (True, False, False, True)] == [75, 75, 75, 7]


def test_case_37_a_stage_is_not_requeued_without_end(start: Start) -> None:
    running = start(limit=4)
    assert [running.attempt(75, step=step) for step in range(1, 6)] == [75, 75, 75, 75, 7]
    failure = running.failure()
    assert isinstance(failure, QuarantinedError)
    assert "5 attempts stopped (preempted), the profile's `requeue.limit`" in failure.cause


def test_a_failure_that_may_pass_is_tried_again_and_then_not(start: Start) -> None:
    running = start(failures=3)
    hang = HangError("no step for 600 s", "look at the links")
    assert running.attempt(7, hang, step=1) == 75
    assert running.failure() is None, "what is tried again has not failed"
    assert running.attempt(7, NodeError("node3 is slow", ""), step=2) == 75
    assert running.attempt(75, step=3) == 75
    assert running.attempt(7, hang, step=4) == 7
    failure = running.failure()
    assert isinstance(failure, QuarantinedError)
    assert failure.cause == "quarantined: 3 attempts failed, the last: no step for 600 s"


def test_a_process_that_died_without_a_word_is_tried_again(start: Start) -> None:
    running = start(failures=2)
    assert [running.attempt(137, step=1), running.attempt(1, step=2)] == [75, 7]
    assert running.hows == ["killed", "killed"]


def test_success_without_a_manifest_is_no_success(start: Start) -> None:
    running = start(failures=2)
    assert running.attempt(0, step=1) == 75
    assert running.hows == ["killed"]


@pytest.mark.parametrize("error", [OutOfMemoryError("out of memory", "less"), DivergedError("loss is nan", "lr")])
def test_what_the_same_settings_meet_again_is_not_tried_again(start: Start, error: PackcliError) -> None:
    running = start()
    assert running.attempt(7, error, step=3) == 7
    failure = running.failure()
    assert failure is not None
    assert (failure.kind, failure.cause, failure.fix) == (error.kind, error.cause, error.fix)


def test_bad_data_ends_with_its_own_code_at_once(start: Start) -> None:
    running = start()
    assert running.attempt(3, DataError("chats.jsonl:7: not valid JSON", "")) == 3
    assert running.hows == ["data"]


def test_out_of_memory_under_one_setting_after_another_is_no_quarantine(start: Start) -> None:
    """Somebody looks for what fits: every try is a submission of theirs."""
    running = start(without_progress=2, failures=2, limit=2)
    assert [running.attempt(7, OutOfMemoryError("out of memory", "")) for _ in range(5)] == [7] * 5
    running.begin()
    assert running.hows == ["oom"] * 5 + [None]


@pytest.mark.parametrize("code", [143, 140])
def test_a_signal_before_anything_listens_is_a_preemption(start: Start, code: int) -> None:
    running = start(failures=1, without_progress=1)
    assert running.attempt(code) == 75
    assert running.hows == ["preempted"]


def test_a_lock_that_the_last_attempt_still_holds_is_waited_for(start: Start) -> None:
    running = start(failures=1, without_progress=1)
    assert running.attempt(5) == 75
    assert running.hows == ["locked"]


# Nobody lived to say so --------------------------------------------------------------------------------


def test_an_attempt_that_died_with_its_node_is_noticed_by_the_next(start: Start) -> None:
    running = start()
    running.begin()
    checkpoint(running.store, 4)
    running.begin()
    lost, now = life.read(running.store, TRAIN).attempts
    assert (lost.how, lost.began_at, lost.stood_at) == ("lost", 0, 4)
    assert (now.how, now.began_at) == (None, 4)


def test_a_job_that_slurm_starts_again_after_a_crash_was_not_cancelled(start: Start) -> None:
    # SLURM ends the rest of a job whose node is gone as it ends a cancelled one.
    running = start()
    running.begin()
    checkpoint(running.store, 4)
    assert life.end(running.store, running.stages, 143, "cancelled", running.policy) != 75
    assert running.hows == ["cancelled"]
    running.begin()
    lost, now = life.read(running.store, TRAIN).attempts
    assert (lost.how, lost.stood_at, now.how) == ("lost", 4, None)
    assert lost.cause == "SLURM started it again: node0 failed"


def test_a_stage_that_takes_its_node_down_every_time_is_quarantined(start: Start) -> None:
    running = start(without_progress=3)
    for _ in range(3):
        running.begin()
    with pytest.raises(QuarantinedError, match=r"3 attempts without any progress \(lost\)"):
        running.begin()
    assert isinstance(running.failure(), QuarantinedError)
    assert running.hows == ["lost"] * 3


def test_case_37_a_quarantined_stage_harms_no_other(start: Start, tmp_path: Path) -> None:
    running, other = start(failures=1), start(OTHER)
    finish(other.store, OTHER)
    assert running.attempt(137) == 7
    assert other.store.failure(*OTHER) is None
    assert other.store.state(*OTHER) == "done"
    # Of several stages in one job, the one that is not done.
    several = start(OTHER, ("eval", "c" * 16), failures=1)
    assert several.attempt(137) == 7
    assert several.store.state(*OTHER) == "done"
    assert isinstance(several.failure(), QuarantinedError)


def test_a_stage_whose_directory_was_deleted_while_it_ran_is_no_traceback(start: Start) -> None:
    running = start()
    running.begin()
    running.store.job(*TRAIN).unlink()
    assert life.end(running.store, (TRAIN,), 75, "preempted", running.policy) == 75


# How far ----------------------------------------------------------------------------------------------


def test_half_a_checkpoint_is_no_progress(start: Start) -> None:
    store = start().store
    assert life.progress(store, [TRAIN]) == 0
    checkpoint(store, 10)
    checkpoint(store, 20, whole=False)
    assert life.progress(store, [TRAIN]) == 10


def test_progress_of_several_stages_counts_those_that_are_done(start: Start) -> None:
    store = start().store
    tokens: Stage = ("tokens", "d" * 16)
    evals: list[Stage] = [("eval", letter * 16) for letter in "ef"]
    assert life.progress(store, [tokens, *evals]) == 0
    for number in range(3):
        write_json(store.shard_record(tokens[1], number), {})
    assert life.progress(store, [tokens, *evals]) == 3
    finish(store, tokens)
    finish(store, evals[0])
    assert life.progress(store, [tokens, *evals]) == 2
    finish(store, evals[1])
    assert life.progress(store, [tokens, *evals]) == 3


def test_settings_that_change_what_fits_are_other_settings() -> None:
    def settings(mem: str = "64G", micro_batch: int = 2) -> str:
        plan = made(changed("train.micro_batch", micro_batch))
        resources = Profile.model_validate({"name": "site", "mem": mem}).resources("train")
        return life.settings(plan, ("train", next(iter(plan.trains))), resources)

    assert settings() == settings()
    assert len({settings(), settings(mem="128G"), settings(micro_batch=1)}) == 3


# In a job ---------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., job.Job]:
    """`on_a_node("train", requeue={...})`: the first element of that kind of array, on the node that runs it."""
    slurm = FakeSlurm(tmp_path / "slurm", partitions=("gpu",))
    monkeypatch.setenv("PATH", slurm.env["PATH"])
    plan, store = made(SWEEP), Store(tmp_path / "runs")

    def place(kind: str, restart: int = 0, **keys: object) -> job.Job:
        asked = Profile.model_validate({"name": "site", "prepare_parts": 2, "time": "1:00:00", **keys})
        arrays = graph(plan, asked, Known())
        for order in cluster.orders(plan, store, asked, arrays, "0a1b2c3d"):
            write_json(store.array_order("0a1b2c3d", order.array.number), order.model_dump(mode="json"))
        write_json(store.submitted_plan("0a1b2c3d"), plan.model_dump(mode="json"))
        [number] = [array.number for array in arrays if array.job == kind]
        environment = {
            "SLURM_JOB_ID": "101", "SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": "0", "SLURM_NODEID": "0",
            "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_RESTART_COUNT": str(restart),
        }  # fmt: skip
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return job.Job(store.array("0a1b2c3d", number))

    return place


def test_a_job_knows_where_it_is(on_a_node: Callable[..., job.Job]) -> None:
    running = on_a_node("train", restart=2)
    assert running.begin() == 0
    [attempt] = life.read(running.store, running.element.stages[0]).attempts
    assert (attempt.job, attempt.restart, attempt.nodes) == ("100_0", 2, ("node0", "node1"))
    assert running.place.endpoint.startswith("node0:")


def test_a_time_limit_is_told_from_a_preemption(on_a_node: Callable[..., job.Job]) -> None:
    """SLURM sends the same signal for both; what differs is how much time was left."""
    running = on_a_node("train", signal_s=300)
    stage = running.element.stages[0]
    running.begin()
    assert running.after(75, "RUNNING") == 75
    running.begin()
    story = life.read(running.store, stage)
    *before, last = story.attempts
    early = last.model_copy(update={"started_s": time.time() - 56 * 60})
    life.write(running.store, stage, story.model_copy(update={"attempts": (*before, early)}))
    assert running.after(75, "RUNNING") == 75
    assert [attempt.how for attempt in life.read(running.store, stage).attempts] == ["preempted", "time limit"]


def test_another_attempt_does_not_begin_with_the_failure_of_the_last(on_a_node: Callable[..., job.Job]) -> None:
    running = on_a_node("train")
    stage = running.element.stages[0]
    running.store.fail(*stage, OutOfMemoryError("out of memory", "less"))
    running.begin()
    assert running.after(75, "RUNNING") == 75
    assert running.store.failure(*stage) is None


def test_a_cancelled_job_is_not_told_as_preempted(on_a_node: Callable[..., job.Job]) -> None:
    running = on_a_node("train")
    running.begin()
    running.after(75, "COMPLETING")
    assert [item.how for item in life.read(running.store, running.element.stages[0]).attempts] == ["cancelled"]


def test_an_input_that_is_gone_is_not_taken_for_a_killed_process_and_tried_again(
    on_a_node: Callable[..., job.Job],
) -> None:
    running = on_a_node("train")
    running.begin()
    running.leave(ConfigError("index 1234 is missing", "run `packcli prepare SWEEP` first"))
    assert running.after(2, "RUNNING") == 2
    [attempt] = life.read(running.store, running.element.stages[0]).attempts
    assert (attempt.how, attempt.cause) == ("config", "index 1234 is missing")


def test_a_part_that_is_preempted_for_ever_ends_too(on_a_node: Callable[..., job.Job]) -> None:
    limit = {"requeue": {"limit": 3}}
    assert [on_a_node("parts", restart=count, **limit).after(75, "RUNNING") for count in (0, 2, 3)] == [75, 75, 7]
    assert on_a_node("parts", **limit).after(3, "RUNNING") == 3
    early = [on_a_node("parts", **limit).after(128 + number, "RUNNING") for number in (15, 12, 9)]
    assert early == [75, 75, 137], "a signal that came before Python listened ends the element"
    assert on_a_node("parts", **limit).after(143, "CANCELLED") == 143


def test_a_job_of_a_deleted_run_directory_says_so(on_a_node: Callable[..., job.Job]) -> None:
    directory = Path(on_a_node("train").order.directory)
    Store.order_in(directory).unlink()
    with pytest.raises(ConfigError, match="is gone"):
        job.Job(directory)
