"""What a job finds out about the node it is on."""

from __future__ import annotations

from pathlib import Path

import pytest

from packcli.launch.job import Place, was_out_of_memory

V2 = "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n"
V1 = "9:cpuset:/slurm/uid_0/job_7/step_0\n4:memory:/slurm/uid_0/job_7/step_0/task_0\n1:name=systemd:/x\n"


def events(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        (V2, "system.slice/slurmstepd.scope/job_7/step_0/user/task_0/memory.events"),
        (V1, "memory/slurm/uid_0/job_7/step_0/task_0/memory.oom_control"),
    ],
)
def test_a_rank_killed_for_memory_is_not_tried_again_as_a_lost_one(tmp_path: Path, groups: str, file: str) -> None:
    assert not was_out_of_memory(groups, tmp_path), "nothing is known"
    events(tmp_path, file, "low 0\nmax 12\noom 0\noom_kill 0\n")
    assert not was_out_of_memory(groups, tmp_path)
    (tmp_path / file).write_text("low 0\nmax 12\noom 1\noom_kill 1\n")
    assert was_out_of_memory(groups, tmp_path)


def test_what_was_killed_outside_of_jobs_is_not_taken_for_a_job_without_memory(tmp_path: Path) -> None:
    events(tmp_path, "user.slice/memory.events", "oom_kill 3\n")
    assert not was_out_of_memory("0::/user.slice\n", tmp_path)


def test_two_jobs_or_attempts_on_one_node_do_not_meet_at_one_port() -> None:
    ports = {
        Place(f"{number}_0", 0, number, restart, 0, ("node0",)).endpoint
        for number in range(1000, 1004)
        for restart in range(3)
    }
    assert len(ports) == 12
    assert all(20_000 <= int(port.partition(":")[2]) < 40_000 for port in ports)
