"""A sweep handed to SLURM: jobs sent twice, or never, or somebody else's cancelled, when one of us fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Done
from fake_slurm import FakeSlurm
from test_graph import planned

from packcli.errors import (
    ConfigError,
    IntegrityError,
    LockedError,
    MissingError,
    OutOfMemoryError,
    QuarantinedError,
)
from packcli.files import locked, read_sealed, write_json
from packcli.launch import cluster, life, slurm
from packcli.launch.graph import Stage
from packcli.launch.profile import Profile
from packcli.launch.script import Submitted
from packcli.plan import Plan
from packcli.store import Store

TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
FULL = (
    "sbatch: error: AssocMaxSubmitJobLimit\n"
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
    "(job submit limit, user's size and/or time limits)"
)
REFUSED = "sbatch: error: Batch job submission failed: Requested node configuration is not available"


class Site:
    """A cluster, a run directory, and a sweep."""

    def __init__(self, directory: Path) -> None:
        self.slurm = FakeSlurm(directory / "slurm")
        self.store = Store(directory / "runs")
        self.plan = planned(arm=["padding", "greedy"], seed=[0, 1])

    def submit(
        self, plan: Plan | None = None, store: Store | None = None, *, retry: bool = False, **keys: Any
    ) -> cluster.Outcome:
        asked = Profile.model_validate({"name": "site", "partition": "gpu", "prepare_parts": 1, **keys})
        return cluster.submit(plan or self.plan, store or self.store, asked, {}, retry=retry)

    def accepted(self) -> list[tuple[str, list[Stage]]]:
        """(kind, stages) of every job that SLURM took, the oldest first."""
        found = []
        for job in self.slurm.jobs():
            submission, _, number = job["options"]["comment"].removeprefix("packcli:").partition(".")
            read = read_sealed(self.store.array_order(submission, int(number)))
            array = Submitted.model_validate(read).array
            found.append((array.job, [stage for element in array.elements for stage in element.stages]))
        return found

    def assert_all_once(self) -> None:
        """Every stage of the sweep is with SLURM, none of them twice, and nobody waits for what is not there."""
        stages = [stage for _, found in self.accepted() for stage in found]
        assert sorted(stages) == sorted(self.plan.stages())

    def states(self, job: str) -> list[str]:
        [found] = [item for item in self.slurm.jobs() if item["id"] == job]
        states: list[str] = found["states"]
        return states


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    found = Site(tmp_path)
    monkeypatch.setenv("PATH", found.slurm.env["PATH"])
    monkeypatch.setattr(slurm, "_FIRST_PAUSE_S", 0.0)
    return found


def test_a_profile_that_was_mended_is_not_silently_ignored_by_jobs_that_are_there(site: Site) -> None:
    site.submit(mem="1G")
    assert site.submit(mem="1G").otherwise == 0
    again = site.submit(mem="2G")
    assert (again.sent, again.otherwise) == ([], 10)


# Twice -------------------------------------------------------------------------------------------------


def test_the_same_sweep_again_submits_nothing(site: Site) -> None:
    first = site.submit()
    assert [sent.array.job for sent in first.sent] == ["prepare", "train", "eval", "report"]
    assert first.live == 0
    again = site.submit()
    assert (again.sent, again.failures, again.skipped) == ([], [], [])
    assert again.live == 10, "one that prepares, four that train, four that score, the table"
    assert len(site.slurm.jobs()) == 4
    site.assert_all_once()


def test_what_is_added_to_a_sweep_waits_for_jobs_that_are_there(site: Site) -> None:
    part = planned(arm=["padding"], seed=[0, 1])
    site.submit(part)
    for job, state in (("100", "RUNNING"), ("101", "PENDING")):
        site.slurm.set(job, state)
    outcome = site.submit()
    assert [sent.array.job for sent in outcome.sent] == ["prepare", "train", "eval", "report"]
    assert len([stage for stage in site.accepted()[5][1] if stage[0] == "train"]) == 2
    prepare, train = site.slurm.jobs()[4:6]
    assert prepare["options"]["dependency"] == "afterok:100_0", (
        "indexes of the new cells need the live token store"
    )
    assert set(train["options"]["dependency"].split(",")) == {"afterok:100_0", f"afterok:{prepare['id']}_0"}
    stages = [stage for _, found in site.accepted() for stage in found]
    assert len(stages) == len(set(stages))
    assert set(stages) == set(site.plan.stages())


def test_two_who_submit_at_once_do_not_send_everything_twice(site: Site) -> None:
    with locked(site.store.submissions(), "a submission"), pytest.raises(LockedError):
        site.submit()
    assert site.slurm.jobs() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "accepts", "sent"),
    [(1, True, 1), (2, False, 1), (3, True, 3)],
    ids=["after the first job, before it was noted", "between two jobs", "after the last but one"],
)
def test_what_a_killed_submission_left_is_completed_by_the_next(
    site: Site,
    tiny_sweep: Callable[..., Path],
    run_cli: Callable[..., Done],
    tmp_path: Path,
    call: int,
    accepts: bool,
    sent: int,
) -> None:
    sweep = tiny_sweep(eval={"tasks": ["tiny_copy"]})
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"partition": "gpu"}))
    site.slurm.fault("sbatch", "", at=call, accepts=accepts, kills=True)
    assert run_cli("sweep", sweep, "--on", "site.yaml", cwd=tmp_path, env=site.slurm.env).code == -9
    assert len(site.slurm.jobs()) == sent
    noted = list(site.store.root.glob("slurm/*/*/submitted.json"))
    assert len(noted) == sent - accepts
    site.plan = Plan.model_validate(read_sealed(site.store.plan_file("tiny_test")))
    outcome = site.submit()
    kinds = ["prepare", "train", "eval", "report"]
    assert [item.array.job for item in outcome.sent] == kinds[sent:]
    assert [kind for kind, _ in site.accepted()] == kinds
    site.assert_all_once()
    # Each waits for the jobs of the first submission by their ids.
    waits = [job["options"].get("dependency", "") for job in site.slurm.jobs()]
    assert waits[:3] == ["", "afterok:100_0", "aftercorr:101"]
    assert set(waits[3].split(",")) <= {"afterany:100", "afterany:101", "afterany:102"}


def test_case_34_what_was_held_by_a_job_that_slurm_no_longer_knows_is_sent_again(site: Site) -> None:
    site.submit()
    train = site.slurm.jobs()[1]["id"]
    site.slurm.set(train, "NODE_FAIL", element=0)
    lost = site.accepted()[1][1][0]
    site.submit()
    again = [stage for _, stages in site.accepted()[4:] for stage in stages]
    assert [stage for stage in again if stage[0] == "train"] == [lost]


def test_a_damaged_order_makes_strangers_of_our_jobs_which_are_all_sent_again(site: Site) -> None:
    site.submit()
    [order, *_] = sorted(site.store.submissions().glob("*/array-1/array.json"))
    written = order.read_bytes()
    for damaged in (written[:-30], written.replace(b'"train"', b'"trbin"', 1)):
        order.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"array-1/array.json: (damaged|its bytes changed)"):
            site.submit()
    order.write_bytes(written)
    site.submit()
    site.assert_all_once()


def test_the_table_of_a_sweep_does_not_wait_for_another_sweep(site: Site) -> None:
    site.submit()
    other = planned(arm=["sorted"]).model_copy(update={"name": "another"})
    site.submit(other)
    *_, prepare, train, score, report = site.slurm.jobs()
    own = {f"afterany:{job['id']}" for job in (prepare, train, score)}
    assert set(report["options"]["dependency"].split(",")) == {"afterany:100", *own}, (
        "100 makes their common tokens"
    )


# SLURM fails -------------------------------------------------------------------------------------------


def test_what_does_not_wait_for_a_refused_array_is_submitted(site: Site) -> None:
    *_, last = site.plan.trains
    wide = site.plan.trains[last]
    wide = wide.model_copy(update={"train": wide.train.model_copy(update={"nodes": 2})})
    site.plan = site.plan.model_copy(update={"trains": {**site.plan.trains, last: wide}})
    site.slurm.fault("sbatch", REFUSED, at=3)
    outcome = site.submit()
    assert [sent.array.job for sent in outcome.sent] == ["prepare", "train", "eval", "report"]
    [failure] = outcome.failures
    assert failure.exit_code == 2
    assert failure.cause.startswith("train jobs (1) were not submitted: SLURM refused: ")
    assert "Requested node configuration is not available" in failure.cause
    assert "partitions here: gpu, high, main" in failure.fix
    assert "\n" not in failure.cause + failure.fix
    site.slurm.mend()
    again = site.submit()
    assert [(sent.array.job, len(sent.array.elements)) for sent in again.sent] == [
        ("train", 1), ("eval", 1), ("report", 1),
    ]  # fmt: skip
    site.assert_all_once()


@pytest.mark.parametrize("accepts", [True, False])
def test_case_36_an_answer_that_was_lost_is_no_second_submission(site: Site, accepts: bool) -> None:
    site.slurm.fault("sbatch", TIMED_OUT, at=2, accepts=accepts)
    outcome = site.submit()
    assert outcome.failures == []
    assert [kind for kind, _ in site.accepted()] == ["prepare", "train", "eval", "report"]
    assert len(site.slurm.calls("sbatch")) == (4 if accepts else 5)
    site.assert_all_once()
    assert [sent.job for sent in outcome.sent] == ["100", "101", "102", "103"]


def test_a_controller_that_restarts_is_waited_for(site: Site) -> None:
    for call in (1, 2):
        site.slurm.fault("squeue", "slurm_load_jobs error: Unable to contact slurm controller", at=call)
    assert site.submit().failures == []
    site.assert_all_once()


def test_a_controller_that_goes_away_half_way_is_one_line(site: Site) -> None:
    for call in range(2, 20):
        site.slurm.fault("sbatch", TIMED_OUT, at=call)
    outcome = site.submit()
    [failure] = outcome.failures
    assert failure.exit_code == 6
    assert "SLURM does not answer: " in failure.cause
    assert "1 of 4 arrays are submitted" in failure.cause
    assert len(site.slurm.jobs()) == 1
    site.slurm.mend()
    assert site.submit().failures == []
    site.assert_all_once()


def test_a_queue_that_cannot_be_read_is_no_empty_queue(site: Site) -> None:
    site.submit()
    site.slurm.fault("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(MissingError, match="`squeue` failed"):
        site.submit()
    with pytest.raises(MissingError, match="`squeue` failed"):
        cluster.cancel(site.plan, site.store)
    assert len(site.slurm.jobs()) == 4


def test_a_limit_on_jobs_is_one_line_and_the_rest_comes_later(site: Site) -> None:
    site.slurm.fault("sbatch", FULL, at=2)
    outcome = site.submit()
    assert [sent.array.job for sent in outcome.sent] == ["prepare"]
    [failure] = outcome.failures
    assert failure.exit_code == 6
    assert "SLURM takes no more jobs from you now" in failure.cause
    assert "when some of your jobs have ended" in failure.fix
    assert [sent.array.job for sent in site.submit().sent] == ["train", "eval", "report"]
    site.assert_all_once()


def test_a_wrong_partition_is_found_before_anything_is_submitted(site: Site) -> None:
    """The training's comes last: without a look ahead, the token stores would be under way."""
    with pytest.raises(ConfigError) as caught:
        site.submit(stages={"train": {"partition": "gpuu"}})
    assert caught.value.cause == (
        "train jobs: SLURM refused: Invalid partition name specified; nothing was submitted"
    )
    assert "gpu, high, main" in caught.value.fix
    assert site.slurm.calls("sbatch") == []
    assert site.submit().failures == []
    site.assert_all_once()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"nodes": 9, "gpus_per_node": 8}, "train jobs: 9 nodes a job, but the partition has 8"),
        ({"nodes": 8, "gpus_per_node": 16}, "train jobs: 16 GPUs a node, but the partition's nodes have 8"),
    ],
)
def test_what_no_node_ever_has_does_not_wait_for_ever(site: Site, asked: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        site.submit(**asked)
    assert site.accepted() == []
    assert site.submit(nodes=8, gpus_per_node=8).sent


@pytest.mark.slow
def test_without_slurm_there_is_one_line_and_code_6(
    tiny_sweep: Callable[..., Path], run_cli: Callable[..., Done], tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"partition": "gpu"}))
    sweep, env = tiny_sweep(arms=["padding"]), {"PATH": str(tmp_path / "bin")}
    done = run_cli("sweep", sweep, "--on", "site.yaml", cwd=tmp_path, env=env)
    assert (done.code, done.stdout) == (6, "")
    assert done.stderr.startswith("error: no SLURM on this machine: `sbatch` was not found\n\nhint: ")
    assert not (tmp_path / "runs" / "slurm").exists()
    shown = run_cli("sweep", sweep, "--on", "site.yaml", "--dry-run", cwd=tmp_path, env=env)
    assert shown.code == 0, shown.stderr
    assert "#SBATCH --partition=gpu" in shown.stdout


# Whose -------------------------------------------------------------------------------------------------


def test_jobs_of_others_are_neither_counted_nor_cancelled(site: Site) -> None:
    foreign = [
        site.slurm.add("packcli:deadbeef.0", 3),  # of another run directory
        site.slurm.add("packcli:../../etc.0"),
        site.slurm.add("packcli:deadbeef.x"),
        site.slurm.add("packcli: my|own|notes"),
        site.slurm.add("packcli:"),
        site.slurm.add(""),
    ]
    outcome = site.submit()
    assert (outcome.live, len(outcome.sent)) == (0, 4)
    theirs = site.slurm.add(site.slurm.jobs()[len(foreign)]["options"]["comment"], user="other")
    assert site.submit().live == 10
    assert len(cluster.cancel(site.plan, site.store)) == 10
    for job in [*foreign, theirs]:
        assert set(site.states(job)) == {"PENDING"}
    for sent in outcome.sent:
        assert set(site.states(sent.job)) == {"CANCELLED"}
    assert cluster.cancel(site.plan, site.store) == []


def test_a_copy_of_a_run_directory_has_jobs_of_its_own(site: Site, tmp_path: Path) -> None:
    site.submit()
    shutil.copytree(site.store.root, tmp_path / "copy")
    copy = Store(tmp_path / "copy")
    assert cluster.cancel(site.plan, copy) == []
    assert len(site.submit(store=copy).sent) == 4
    cluster.cancel(site.plan, copy)
    assert [set(site.states(job["id"])) for job in site.slurm.jobs()] == [{"PENDING"}] * 4 + [{"CANCELLED"}] * 4


def test_a_run_directory_that_goes_by_another_path_is_the_same(site: Site, tmp_path: Path) -> None:
    site.submit()
    (tmp_path / "link").symlink_to(site.store.root)
    assert site.submit(store=Store(tmp_path / "link")).sent == []


def test_cancelling_one_sweep_leaves_the_other_alone(site: Site) -> None:
    first = site.submit()
    other = planned(arm=["sorted"], seed=[0, 1]).model_copy(update={"name": "another"})
    second = site.submit(other)
    cancelled = cluster.cancel(other, site.store)
    assert {job.partition("_")[0] for job in cancelled} == {sent.job for sent in second.sent}
    for sent in first.sent:
        assert set(site.states(sent.job)) == {"PENDING"}


def test_cancelling_some_cells_leaves_the_others_alone(site: Site) -> None:
    site.submit()
    _, train, score, _ = (job["id"] for job in site.slurm.jobs())
    chosen = planned(arm=["greedy"], seed=[1])
    [cell] = chosen.cells
    index = [order.train for order in site.plan.cells].index(cell.train)
    alone = chosen.model_copy(update={"tokens": {}, "indexes": {}})
    cluster.cancel(alone, site.store)
    expected = ["CANCELLED" if number == index else "PENDING" for number in range(4)]
    assert site.states(train) == expected
    assert site.states(score) == expected


def test_the_table_of_other_cells_of_a_sweep_is_neither_counted_nor_cancelled(site: Site) -> None:
    others = planned(arm=["sorted"], seed=[0])
    assert others.name == site.plan.name
    *_, report = site.submit().sent
    assert cluster.cancel(others, site.store) == []
    assert site.states(report.job) == ["PENDING"]
    outcome = site.submit(others, mem="2G")
    assert [sent.array.job for sent in outcome.sent] == ["prepare", "train", "eval", "report"]
    assert outcome.otherwise == outcome.live == 1, "the token store, which both need"
    assert len(cluster.cancel(others, site.store)) == 4
    assert site.states(report.job) == ["PENDING"]


def test_a_token_store_that_more_cells_wait_for_is_not_cancelled_with_some_of_them(site: Site) -> None:
    prepare, train, _, _ = site.submit().sent
    site.slurm.set(prepare.job, "RUNNING")
    some = planned(arm=["greedy"], seed=[0, 1])
    assert len(cluster.cancel(some, site.store)) == 4, "two trainings, two scorings"
    assert site.states(prepare.job) == ["RUNNING"]
    assert sorted(site.states(train.job)) == ["CANCELLED"] * 2 + ["PENDING"] * 2
    assert len(cluster.cancel(site.plan, site.store)) == 6, "the rest, the token store, the table"


def test_jobs_that_could_not_be_cancelled_are_not_called_cancelled(site: Site) -> None:
    site.submit()
    site.slurm.fault("scancel", "scancel: error: Kill job error on job id 100: Unable to contact slurm controller")
    with pytest.raises(MissingError, match="`scancel` failed"):
        cluster.cancel(site.plan, site.store)


def test_jobs_that_can_never_start_are_sent_again(site: Site) -> None:
    site.submit()
    site.slurm.set("100", "FAILED")
    for job in ("101", "102", "103"):
        site.slurm.set(job, "PENDING", reason="DependencyNeverSatisfied")
    assert [sent.array.job for sent in site.submit().sent] == ["prepare", "train", "eval", "report"]


def test_what_waits_for_a_job_that_is_gone_is_not_taken_for_work_under_way(site: Site) -> None:
    site.submit()
    _, train, score, _ = (job["id"] for job in site.slurm.jobs())
    site.slurm.set(train, "CANCELLED", element=2)
    site.slurm.set(train, "RUNNING", element=1)
    outcome = site.submit()
    assert [(sent.array.job, len(sent.array.elements)) for sent in outcome.sent] == [
        ("train", 1), ("eval", 1), ("report", 1),
    ]  # fmt: skip
    assert site.states(score) == ["PENDING", "PENDING", "CANCELLED", "PENDING"]
    assert outcome.live == 8, "one that prepares, three that train, three that score, the table"
    assert site.submit().sent == []


# What failed before ------------------------------------------------------------------------------------


def failed(site: Site, stage: Stage, error: Exception, **resources: Any) -> None:
    """`stage` as a job that ended with `error` leaves it."""
    asked = Profile.model_validate({"name": "site", "partition": "gpu", **resources}).resources(
        "eval" if stage[0] == "eval" else "train"
    )
    write_json(site.store.job(*stage), life.Life(settings=life.settings(site.plan, stage, asked)).model_dump())
    site.store.fail(*stage, error)  # type: ignore[arg-type]


def test_a_quarantined_stage_waits_for_a_retry_and_the_rest_runs(site: Site) -> None:
    stage: Stage = ("train", next(iter(site.plan.trains)))
    failed(site, stage, QuarantinedError("quarantined: 3 attempts failed", "mend the cause, then --retry"))
    outcome = site.submit()
    assert outcome.skipped == [stage]
    [failure] = outcome.failures
    assert (failure.exit_code, failure.fix) == (7, "mend the cause, then --retry")
    assert [(sent.array.job, len(sent.array.elements)) for sent in outcome.sent] == [
        ("prepare", 1), ("train", 3), ("eval", 3), ("report", 1),
    ]  # fmt: skip
    retried = site.submit(retry=True)
    assert (retried.skipped, retried.failures) == ([], [])
    assert [(sent.array.job, len(sent.array.elements)) for sent in retried.sent] == [
        ("train", 1), ("eval", 1), ("report", 1),
    ]  # fmt: skip
    assert life.read(site.store, stage) == life.Life(), "attempts are counted anew"
    site.assert_all_once()


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_out_of_memory_is_tried_again_with_other_settings_only(site: Site, kind: str) -> None:
    stage: Stage = ("train", next(iter(site.plan.trains)))
    if kind == "eval":
        stage = ("eval", next(iter(site.plan.evals)))
    failed(site, stage, OutOfMemoryError("node0 ran out of memory", "ask for more `mem`"))
    outcome = site.submit()
    assert outcome.skipped == [stage]
    assert outcome.failures[0].exit_code == 7
    assert "--retry" in outcome.failures[0].fix
    assert stage not in [stage for _, stages in site.accepted() for stage in stages]
    again = site.submit(mem="200G")
    assert again.skipped == []
    assert stage in [stage for sent in again.sent for element in sent.array.elements for stage in element.stages]


def test_a_failure_of_a_stage_that_runs_again_blocks_nobody(site: Site) -> None:
    site.submit()
    stage: Stage = ("train", next(iter(site.plan.trains)))
    site.slurm.set("101", "RUNNING", element=0)
    failed(site, stage, QuarantinedError("quarantined: of an earlier life", ""))
    outcome = site.submit(retry=True)
    assert (outcome.sent, outcome.skipped, outcome.failures) == ([], [], [])
    assert site.store.failure(*stage) is not None, "it belongs to the job that is there"


def test_a_job_that_ended_without_a_word_is_reported_as_slurm_says_and_its_victims_are_not(site: Site) -> None:
    site.submit()
    for job, state in (("100", "TIMEOUT"), ("101", "CANCELLED by 0"), ("102", "CANCELLED"), ("103", "CANCELLED")):
        site.slurm.set(job, state)
    [found] = cluster.problems(site.plan, site.store, cluster.View(site.store))
    assert found.exit_code == 7
    assert found.cause.startswith("tokens ")
    assert found.cause.endswith(": job 100_0: it ran into its time limit")


@pytest.mark.slow
def test_the_command_line_says_what_it_submitted_and_cancelled(
    site: Site, tiny_sweep: Callable[..., Path], run_cli: Callable[..., Done], tmp_path: Path
) -> None:
    sweep = tiny_sweep()
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"partition": "gpu", "nodes": 2}))
    done = run_cli("sweep", sweep, "--on", "site.yaml", cwd=tmp_path, env=site.slurm.env)
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:3] == [
        "submitted 1 prepare job of 1 node as 100",
        "submitted 2 train jobs of 2 nodes as 101",
        "submitted 1 report job of 1 node as 102",
    ]
    done = run_cli("cancel", sweep, "--json", cwd=tmp_path, env=site.slurm.env)
    assert done.json() == {"processes": [], "jobs": ["100_0", "101_0", "101_1", "102_0"]}
    assert [set(site.states(job["id"])) for job in site.slurm.jobs()] == [{"CANCELLED"}] * 3
