"""Killed at any moment at which something becomes durable, the same command ends in the tree of an unkilled one.

Every commit point of a whole sweep, with a real SIGKILL there: in turn of the process that passes it, and of all
of the sweep at once, as when a machine goes down.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import damage
import pytest
from fake_slurm import FakeSlurm
from forked import Ended
from judge_server import CANARY, JudgeServer
from whole_run import Point, WholeRun, differing, rating, tree

from packcli.files import read_sealed
from packcli.launch.script import Submitted
from packcli.plan import Plan
from packcli.store import Store, normalized

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KINDS = {
    "plan.json:before", "fingerprints.json:after", "process:after", "tokenizer:after", "pieces.json:before",
    "shard-00001.arrow:before", "shard-00001.json:after", "rejected.jsonl:before", "rows.arrow:before",
    "validation.arrow:after", "config.yaml:before", "metrics.jsonl:before", "checkpoint-1:before",
    "checkpoint-1:after", "progress.json:after", "checkpoint-1:gone", "final:before", "responses.jsonl:after",
    "responses.jsonl:gone", "samples.jsonl:before", "items.json:before", "results.json:after",
    "manifest.json:before", "manifest.json:after", ".lock:after",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeRun]:
    server = JudgeServer(rating)
    with server.running():
        run = WholeRun(tmp_path_factory.mktemp("whole"), server.url, CANARY)
        yield run
        run.packcli.close()


def walk(whole: WholeRun, number: int, point: Point) -> None:
    """Kill there, run again, compare."""
    cwd = whole.root / f"life-{number}"
    whole.before(point, cwd)
    there = {path: path.stat().st_mtime_ns for path in cwd.rglob("manifest.json")}
    family = bool(number % 2)
    killed, passed = whole.logged(cwd, f"kill:{point.name}:{point.nth}", family=family)
    assert passed.count(point.name) >= point.nth, f"{point}: not passed again"
    assert killed.code == (-9 if family or point.stage is None else 7), (point, killed.code, killed.stderr)
    assert outlived(cwd) == [], f"{point}: a process outlived who started it"
    again = whole.command(cwd)
    assert again.code == 0, (point, again.stderr)
    found = tree(cwd / "runs")
    assert found == whole.tree, (point, differing(found, whole.tree))
    assert normalized(again.json()) == whole.report, point
    assert there == {path: path.stat().st_mtime_ns for path in there}, f"{point}: a finished stage was done again"
    shutil.rmtree(cwd)


def outlived(cwd: Path) -> list[str]:
    """Processes at work in `cwd`, once those had their moment that the kernel ends."""
    deadline = time.monotonic() + 10
    while True:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "cwd").readlink() == cwd:
                    found.append((process / "cmdline").read_text())
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def test_every_kind_of_commit_point_is_passed(whole: WholeRun) -> None:
    """Else the walk below would walk past it."""
    passed = {point.name.rpartition("/")[2] for point in whole.points}
    assert passed >= KINDS
    assert {"judge"} <= {Path(point.name).parent.name for point in whole.points}


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.soak)])
def test_case_35_killed_at_any_commit_point_the_same_sweep_ends_in_the_tree_of_an_uninterrupted_one(
    whole: WholeRun, every: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sample in CI: every twentieth point. What is copied for each, and why: `WholeRun.before`."""
    chosen = list(enumerate(whole.points))[::every]
    for number, point in chosen:
        walk(whole, number, point)
    with capsys.disabled():
        print(f"\n{len(chosen)} commit points walked, {len(chosen)} equal (of {len(whole.points)})")


# A submission ------------------------------------------------------------------------------------------


def _below(name: str) -> str:
    """The name of a point without the submission's id, which is another in every run."""
    return re.sub(r"^.*/slurm/[0-9a-f]{8}/", "", name)


def _stages_sent(slurm: FakeSlurm, store: Store) -> list[tuple[str, str]]:
    """Of every job that SLURM took."""
    found = []
    for job in slurm.jobs():
        submission, _, number = job["options"]["comment"].removeprefix("packcli:").partition(".")
        order = Submitted.model_validate(read_sealed(store.array_order(submission, int(number))))
        found += [stage for element in order.array.elements for stage in element.stages]
    return found


def _submit(whole: WholeRun, cwd: Path, slurm: FakeSlurm, fault: str = "") -> tuple[Ended, list[str]]:
    (cwd / "site.yaml").write_text("partition: gpu\nprepare_parts: 1\n")
    log = cwd / "points"
    env = {**whole.env, **slurm.env, "PACKCLI_FAULT_LOG": str(log), "PACKCLI_FAULT": fault}
    done = whole.packcli.run("sweep", whole.sweep, "--on", "site.yaml", "--json", cwd=cwd, env=env)
    return done, [_below(name) for name in log.read_text().splitlines()]


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.soak)])
def test_a_submission_killed_at_any_commit_point_and_typed_again_sends_every_stage_once(
    whole: WholeRun, tmp_path: Path, every: int, capsys: pytest.CaptureFixture[str]
) -> None:
    done, passed = _submit(whole, tmp_path, FakeSlurm(tmp_path / "slurm"))
    assert done.code == 0, done.stderr
    assert {"array-0/submission.sh:before sbatch", "array-1/submitted.json:before", "plan.json:after"} <= set(
        passed
    )
    chosen = list(enumerate(passed))[::every]
    for number, name in chosen:
        cwd = tmp_path / f"life-{number}"
        slurm = FakeSlurm(cwd / "slurm")
        nth = passed[: number + 1].count(name)
        killed, _ = _submit(whole, cwd, slurm, f"kill:{name}:{nth}")
        assert killed.code == -9, (name, nth, killed.stderr)
        again, _ = _submit(whole, cwd, slurm)
        assert again.code == 0, (name, nth, again.stderr)
        store = Store(cwd / "runs")
        stages = Plan.model_validate(read_sealed(store.plan_file("whole"))).stages()
        assert sorted(_stages_sent(slurm, store)) == sorted(stages), (name, nth)
        assert [path for path in (store.root / "whole").iterdir() if ".tmp-" in path.name] == []
        shutil.rmtree(cwd)
    with capsys.disabled():
        print(f"\n{len(chosen)} commit points of a submission walked, {len(chosen)} equal (of {len(passed)})")


def test_a_table_that_a_killed_job_wrote_is_half_a_table_or_leaves_one_behind(
    whole: WholeRun, tmp_path: Path
) -> None:
    """The last job of a submission; SLURM's part is played by its environment."""
    shutil.copytree(whole.runs, tmp_path / "runs")
    last = tmp_path / whole.stages[-1]
    last.rename(tmp_path / "aside")
    done, _ = _submit(whole, tmp_path, FakeSlurm(tmp_path / "slurm"))
    assert done.code == 0, done.stderr
    (tmp_path / "aside").rename(last)
    store = Store(tmp_path / "runs")
    number, submission = max((number, submission) for submission, number in store.arrays())
    element = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "0"}
    node = {"SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node0", "SLURM_JOB_NUM_NODES": "1"}
    log = tmp_path / "points"

    def job(fault: str = "") -> Ended:
        log.unlink(missing_ok=True)
        env = {**whole.env, **element, **node, "PACKCLI_FAULT_LOG": str(log), "PACKCLI_FAULT": fault}
        words = "run", store.array(submission, number).absolute()
        return whole.packcli.run(*words, cwd=tmp_path, env=env, main="job")

    assert job().code == 0
    reports = [store.report("whole", suffix) for suffix in ("json", "md")]
    written = [path.read_bytes() for path in reports]
    for point in [line.rpartition("/")[2] for line in log.read_text().splitlines()]:
        for path in reports:
            path.unlink()
        assert job(f"kill:{point}").code == -9, point
        assert all(path.read_bytes() in written for path in reports if path.exists()), point
        assert job().code == 0
        assert [path.read_bytes() for path in reports] == written, point
        assert not [path for path in reports[0].parent.iterdir() if ".tmp-" in path.name], point


# What a finished run is made of --------------------------------------------------------------------------


def test_case_35_a_finished_task_whose_results_changed_is_not_taken_for_done(
    whole: WholeRun, tmp_path: Path
) -> None:
    shutil.copytree(whole.runs, tmp_path / "life" / "runs")
    results = sorted((tmp_path / "life").rglob("results.json"))[0]
    results.write_bytes(results.read_bytes().replace(b"0", b"1", 1))
    refused = whole.command(tmp_path / "life")
    assert refused.code == 4, refused.stderr
    assert f"{results.parent.name}/results.json: its bytes changed" in refused.stderr
    shutil.rmtree(results.parent)
    again = whole.command(tmp_path / "life")
    assert again.code == 0, again.stderr
    assert tree(tmp_path / "life" / "runs") == whole.tree


EVERY_KIND = {
    "fingerprints.json", "judge", "plan.json", "manifest.json", "pieces.json", "rejected.jsonl", "shard-*.arrow",
    "shard-*.json", "tokenizer/*", "rows.arrow", "validation.arrow", "config.yaml", "final/*", "checkpoint-*/*",
    "metrics.jsonl", "responses.jsonl", "samples.jsonl", "items.json", "results.json",
}  # fmt: skip
KILLED_AT = ("tokens/*/rejected.jsonl:before", "train/*/checkpoint-2:before", "eval/*/samples.jsonl:before")


@pytest.mark.parametrize("flips", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_a_flipped_bit_or_a_cut_in_any_file_of_a_run_goes_unnoticed(
    whole: WholeRun, tmp_path: Path, flips: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits at random places and a cut, in each file of the finished run, and of stages killed half way."""
    places = [tmp_path / f"{number}" for number in range(1 + len(KILLED_AT))]
    shutil.copytree(whole.runs, places[0] / "runs")
    for place, pattern in zip(places[1:], KILLED_AT, strict=True):
        point = next(point for point in whole.points if fnmatch(point.name, f"*/{pattern}"))
        whole.before(point, place)
        whole.logged(place, f"kill:{point.name}:{point.nth}", family=True)
    kinds, found = Counter[str](), list[str]()
    for place in places:
        for kind, path in damage.files(place / "runs", unfinished=place != places[0]):
            found += damage.unnoticed(kind, path, place / "runs", flips)
            kinds[kind] += 1
    assert found == []
    assert kinds.keys() >= EVERY_KIND
    with capsys.disabled():
        where = f"each of {kinds.total()} files of {len(kinds)} kinds"
        print(f"\n{flips} flipped bits and a cut in {where}, none unnoticed")
