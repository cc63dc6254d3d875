"""`packcli status`: what would be told wrong of a sweep, on a cluster and off it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Done
from fake_slurm import FakeSlurm
from followed import Sent, age, planned

from packcli import costs, stages, sweepfile
from packcli.errors import DataError, MissingError, OutOfMemoryError, PackcliError, PeerError, QuarantinedError
from packcli.files import locked
from packcli.launch import slurm, watch
from packcli.launch.cluster import View
from packcli.report import progress, status
from packcli.store import Store

Run = Callable[..., Done]


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sent:
    """Two seeds of one arm, each scored on two tasks, all queued."""
    return Sent(planned(seeds=2), tmp_path, monkeypatch)


def collected(sent: Sent) -> dict[str, Any]:
    document = status.collect(sent.plan, sent.store, sent.seen())
    return orjson.loads(orjson.dumps(document))  # type: ignore[no-any-return]


def cells(sent: Sent) -> list[dict[str, Any]]:
    """The stages of each cell."""
    return [cell["stages"] for cell in collected(sent)["cells"]]


def shown(document: dict[str, Any]) -> str:
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    Console(file=out, width=250).print(status.table(document))
    return out.getvalue()


# States ------------------------------------------------------------------------------------------------


def test_work_that_waits_in_the_queue_is_not_said_to_be_forgotten(sent: Sent) -> None:
    sent.set(("train", sent.plan.cells[0].train), "PENDING", reason="Priority")
    first, second = cells(sent)
    assert first["train"] == {
        "id": sent.plan.cells[0].train,
        "state": "queued",
        "job": {
            "id": sent.id(("train", sent.plan.cells[0].train)),
            "state": "queued",
            "reason": "Priority",
            "nodes": "",
            "attempt": 0,
        },
    }
    assert second["train"]["job"]["reason"] == "Dependency"
    assert first["eval"]["state"] == first["eval"]["tasks"]["gsm8k"]["state"] == "queued"
    assert first["prepare"]["state"] == "queued"
    assert "queued (Priority)" in shown(collected(sent))


def test_a_requeued_training_is_not_taken_for_one_that_never_began(sent: Sent) -> None:
    stage = ("train", sent.plan.cells[0].train)
    sent.attempt(stage, "preempted", "time limit")
    sent.set(stage, "PENDING", reason="BeginTime")
    train = cells(sent)[0]["train"]
    assert (train["state"], train["job"]["attempt"]) == ("queued", 2)
    assert "queued (BeginTime), 2 attempts so far" in shown(collected(sent))


def test_a_torn_line_of_metrics_does_not_hide_how_far_a_training_is(sent: Sent) -> None:
    stage = ("train", sent.plan.cells[0].train)
    sent.attempt(stage, "preempted", None)
    sent.set(stage, "RUNNING", nodes="node[0-3]")
    sent.train_to(stage[1], 12, torn=True)
    train = cells(sent)[0]["train"]
    assert (train["state"], train["progress"]) == ("running", {"step": 12, "steps": 80})
    assert train["job"]["nodes"] == "node[0-3]"
    words = f"running, step 12 of 80 ({sent.id(stage)} on node[0-3]), attempt 2"
    assert words in shown(collected(sent))


def test_what_slurm_has_not_noticed_yet_is_done_all_the_same(sent: Sent) -> None:
    stage = ("train", sent.plan.cells[0].train)
    sent.set(stage, "COMPLETING", nodes="node0")
    told = sent.seen()
    sent.finish(stage)
    [first, _] = status.collect(sent.plan, sent.store, told)["cells"]
    assert first["stages"]["train"] == {"id": stage[1], "state": "done"}


def test_an_old_failure_does_not_hide_the_job_that_is_to_mend_it(sent: Sent) -> None:
    stage = ("train", sent.plan.cells[0].train)
    sent.store.fail(*stage, OutOfMemoryError("step 3: out of memory", "take less"))
    document = collected(sent)
    assert document["cells"][0]["stages"]["train"]["state"] == "queued"
    assert document["failures"] == []


def test_a_stage_that_this_machine_works_at_runs_without_a_job(tmp_path: Path) -> None:
    plan, store = planned(), Store(tmp_path)
    [cell] = plan.cells
    with locked(store.directory("train", cell.train), "train"):
        document = status.collect(plan, store, watch.jobs(plan, store, None))
    found = document["cells"][0]["stages"]["train"]
    assert (found["state"], "job" in found) == ("running", False)


def test_a_job_lost_long_ago_is_not_what_runs_here(sent: Sent) -> None:
    stage = ("train", sent.plan.cells[0].train)
    sent.set(stage, "NODE_FAIL")
    told = sent.seen()
    with locked(sent.store.directory(*stage), "train"):
        [first, _] = status.collect(sent.plan, sent.store, told)["cells"]
    assert first["stages"]["train"] == {"id": stage[1], "state": "running", "progress": {"step": 0, "steps": 80}}


def test_tokens_that_failed_are_seen_in_every_cell_that_waits_for_them(sent: Sent) -> None:
    [tokens] = sent.plan.tokens
    sent.store.fail("tokens", tokens, DataError("a.jsonl:3: no JSON", "mend it"))
    for stage in sent.jobs:
        sent.set(stage, "CANCELLED")
    document = collected(sent)
    for cell in document["cells"]:
        found = cell["stages"]
        assert (found["prepare"]["state"], found["prepare"]["why"]) == ("failed", "a.jsonl:3: no JSON")
        # They were cancelled because of it: told as failures of their own they would bury the one that matters.
        assert (found["train"]["state"], found["eval"]["state"]) == ("pending", "pending")
    assert document["failures"] == [{"cause": "a.jsonl:3: no JSON", "fix": "mend it", "stages": 1}]


def test_a_job_that_its_node_took_along_is_not_pending_for_ever(sent: Sent) -> None:
    stage = ("train", sent.plan.cells[0].train)
    sent.attempt(stage, None)
    sent.set(stage, "NODE_FAIL")
    train = cells(sent)[0]["train"]
    assert (train["state"], train["why"]) == ("failed", "its node failed")
    assert train["job"]["attempt"] == 1


def test_a_cancelled_job_is_not_called_a_failure(sent: Sent) -> None:
    stage = ("train", sent.plan.cells[0].train)
    sent.set(stage, "CANCELLED")
    document = collected(sent)
    train = document["cells"][0]["stages"]["train"]
    assert (train["state"], train["why"], train["job"]["state"]) == ("pending", "cancelled", "cancelled")
    assert "cancelled" in shown(document)


def test_a_requeued_job_that_was_cancelled_is_not_told_by_how_its_last_attempt_ended(sent: Sent) -> None:
    stage = ("train", sent.plan.cells[0].train)
    sent.attempt(stage, "preempted", "peer")
    sent.store.fail(*stage, PeerError("lost another rank: gloo", "see the other node's log"))
    sent.set(stage, "CANCELLED")
    document = collected(sent)
    train = document["cells"][0]["stages"]["train"]
    assert (train["state"], train["why"]) == ("pending", "cancelled")
    assert train["job"] == {
        "id": sent.id(stage),
        "state": "cancelled",
        "reason": "cancelled",
        "nodes": "",
        "attempt": 2,
    }
    assert [failure["cause"] for failure in document["failures"]] == ["cancelled"]
    assert "cancelled, 2 attempts so far" in shown(document)
    sent.set(stage, "PENDING", reason="BeginTime")
    assert cells(sent)[0]["train"]["state"] == "queued"


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (PeerError("lost another rank: gloo", "see its log"), "FAILED"),
        (PeerError("lost another rank: gloo", "see its log"), None),
        (QuarantinedError("quarantined: 3 attempts failed", "mend the cause"), "CANCELLED"),
        (DataError("a.jsonl:3: no JSON", "mend it"), "CANCELLED"),
    ],
    ids=["ended", "no accounting", "verdict", "not transient"],
)
def test_a_failure_that_still_stands_is_not_hidden(sent: Sent, error: PackcliError, state: str | None) -> None:
    stage = ("train", sent.plan.cells[0].train)
    sent.attempt(stage, error.kind)
    sent.store.fail(*stage, error)
    sent.set(stage, state or "CANCELLED")
    if state is None:
        (sent.slurm.bin / "sacct").write_text("#!/bin/sh\nexit 1\n")
    train = cells(sent)[0]["train"]
    assert (train["state"], train["why"], train["job"]["reason"]) == ("failed", error.cause, error.kind)


def test_jobs_cancelled_before_they_began_are_found_in_the_list_that_slurm_writes(sent: Sent) -> None:
    """As sacct 22.05 answers: elements that never ran share a line, and it knows no `--array`."""
    job, _ = sent.jobs["train", sent.plan.cells[0].train]
    for stage in sent.jobs:
        sent.set(stage, "CANCELLED")
    answer = f"case $* in *--array*) exit 1;; esac\necho '{job}_[0-1%2]|CANCELLED by 0'\n"
    (sent.slurm.bin / "sacct").write_text(f"#!/bin/sh\n{answer}")
    told = sent.seen()
    assert {told["train", cell.train]["state"] for cell in sent.plan.cells} == {"cancelled"}


def test_a_job_submitted_while_we_look_is_not_called_lost(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    there, asked = slurm.live(), []

    def live(*, patient: bool = True) -> list[slurm.Seen]:
        asked.append(patient)
        return there if len(asked) > 1 else []

    monkeypatch.setattr(slurm, "live", live)
    assert {info["train"]["state"] for info in cells(sent)} == {"queued"}
    assert len(asked) == 2


def test_attempts_of_a_stage_that_was_given_up_are_told(sent: Sent) -> None:
    stage = ("train", sent.plan.cells[0].train)
    sent.attempt(stage, "killed", "killed", "killed")
    sent.fail(stage, OutOfMemoryError("quarantined", "mend the cause"))
    document = collected(sent)
    assert document["cells"][0]["stages"]["train"]["job"]["attempt"] == 3
    assert "failed, 3 attempts so far" in shown(document)


# Failures ----------------------------------------------------------------------------------------------


def test_one_cause_that_met_many_cells_is_one_line(tmp_path: Path) -> None:
    plan, store = planned(seeds=30), Store(tmp_path)
    for number, cell in enumerate(plan.cells):
        cause = "no sandbox" if number < 15 else f"diverged at step {number}"
        store.fail("train", cell.train, MissingError(cause, "mend it"))
    lines = status.failure_lines(status.collect(plan, store, {}))
    assert lines[0] == "15 stages: no sandbox; hint: mend it"
    assert len(lines) == 11
    assert lines[-1] == "and 6 more failures: see --json"


# Without SLURM -----------------------------------------------------------------------------------------


@pytest.fixture
def submitted(tiny_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A sweep in `tmp_path`, all of it queued."""
    monkeypatch.chdir(tmp_path)
    spec = sweepfile.load(tiny_sweep(arms=["padding"], train={"steps": 3}))
    return Sent(stages.make_plan(spec, Store(Path("runs"))), tmp_path, monkeypatch).slurm


def test_a_login_node_without_slurm_still_tells_what_the_disk_knows(
    run_cli: Run, submitted: FakeSlurm, tmp_path: Path
) -> None:
    done = run_cli("status", "sweep.yaml", "--json", cwd=tmp_path, env={"PATH": str(tmp_path)})
    assert done.code == 0
    assert done.json()["total"] == {"pending": 3}
    assert done.stderr.count("warning:") == 1
    assert "`sbatch` was not found" in done.stderr


def test_a_silent_slurm_is_asked_twice_and_not_for_half_a_minute(
    run_cli: Run, submitted: FakeSlurm, tmp_path: Path
) -> None:
    submitted.fault("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    before = len(submitted.calls("squeue"))
    done = run_cli("status", "sweep.yaml", "--json", cwd=tmp_path, env=submitted.env)
    assert (done.code, done.json()["total"]) == (0, {"pending": 3})
    assert done.stderr.count("warning:") == 1
    assert len(submitted.calls("squeue")) - before == 2


def test_slurm_is_not_asked_about_a_sweep_that_never_went_there(
    run_cli: Run, tiny_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    found = FakeSlurm(tmp_path / "slurm")
    done = run_cli("status", tiny_sweep(), cwd=tmp_path, env=found.env)
    assert (done.code, done.stderr, found.calls("squeue")) == (0, "", [])


def test_status_of_a_queued_sweep_is_one_json_document(run_cli: Run, submitted: FakeSlurm, tmp_path: Path) -> None:
    document = run_cli("status", "sweep.yaml", "--json", cwd=tmp_path, env=submitted.env).json()
    [cell] = document["cells"]
    assert {stage: info["state"] for stage, info in cell["stages"].items()} == {
        "prepare": "queued",
        "train": "queued",
        "eval": "done",
    }
    assert document["total"] == {"queued": 3}


def test_a_stage_that_began_before_slurm_fell_silent_is_not_called_failed(sent: Sent) -> None:
    stage = ("train", sent.plan.cells[0].train)
    sent.attempt(stage, "preempted")
    document = status.collect(sent.plan, sent.store, watch.jobs(sent.plan, sent.store, None))
    train = document["cells"][0]["stages"]["train"]
    assert (train["state"], train["job"]["state"]) == ("pending", "unknown")
    # With SLURM's word that nothing is there, it is.
    for other in sent.jobs:
        if other[0] in ("tokens", "index"):
            sent.finish(other)
        sent.set(other, "COMPLETED")
    assert View(sent.store).by_stage == {}
    assert cells(sent)[0]["train"]["state"] == "failed"


# How far -----------------------------------------------------------------------------------------------


def test_the_steps_of_a_training_by_epochs_are_those_it_will_make(
    tiny_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "runs")
    path = tiny_sweep(arms=["best_fit"], train={"epochs": 2, "batch_unit": "documents"})
    plan = stages.make_plan(sweepfile.load(path), store)
    [order] = plan.trains.values()
    assert progress.num_steps(order, store) is None
    for kind, id_ in plan.stages()[:2]:
        stages.run(kind, plan.order(kind, id_), store)  # type: ignore[arg-type]
    estimate = costs.of(order, plan, store, plan.cells[0].estimate).estimate
    assert estimate.steps is not None
    assert progress.num_steps(order, store) == estimate.steps


def test_the_pace_of_an_earlier_attempt_is_not_told_as_that_of_this_one(sent: Sent) -> None:
    order = sent.plan.trains[sent.plan.cells[0].train]
    sent.train_to(order.id, 10, step_s=0.5)
    now = progress.training(order, sent.store, 80)
    assert (now.done, now.left_s, now.useful_tokens_per_s) == (10, 35.0, 2000.0)
    path = sent.store.metrics(order.id)
    age(path, 60)
    since = progress.training(order, sent.store, 80, since_s=path.stat().st_mtime + 1)
    assert (since.done, since.left_s, since.useful_tokens_per_s, since.loss) == (10, None, None, None)


def test_a_long_log_is_not_read_from_its_beginning(sent: Sent) -> None:
    train = sent.plan.cells[0].train
    sent.train_to(train, 20_000)
    records = progress.tail(sent.store.metrics(train))
    assert records[-1]["step"] == 20_000
    steps = [record["step"] for record in records]
    assert steps == list(range(steps[0], 20_001))
    assert 20 <= len(records) < 2_000
