"""Batch scripts: what a user's text could make a shell do, and what a shell makes of signals and exit codes.

`tests/golden/slurm/*.sh` are the scripts of every kind of job. When a change of them is meant:
`python tests/test_script.py --write`, and the diff shows reviewers what SLURM will be told.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_slurm import FakeSlurm, options
from test_graph import planned
from test_plan import SWEEP, load, made
from test_profile import PLACES, placed

from packcli.errors import ConfigError
from packcli.launch import cluster, profile, script, show
from packcli.launch.graph import Array, Known, graph
from packcli.launch.profile import Profile
from packcli.launch.script import Submitted
from packcli.plan import Plan
from packcli.store import Store

REPO = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden" / "slurm"
RUNS = Path("/shared/runs")

CONTAINER = {
    "container": {
        "image": "registry/packcli:1",
        "mounts": ["/shared:/shared", "/data:/data:ro"],
        "workdir": "/shared",
    }
}
GRES = {
    "gpus_as": "gres", "gpu_type": "a800", "account": "lab", "qos": "long", "constraint": "a800&ib",
    "exclude": "node[3,7]", "setup": ["module load cuda/12.4", "ulimit -c 0"], "sbatch": {"mail-type": "FAIL"},
    "environment": {"NOTE": "it's \"quoted\"; & # not run"},
}  # fmt: skip


def a800(**keys: Any) -> Profile:
    found = profile.load(REPO / "slurm" / "a800_4x8.yaml")
    return Profile.model_validate(
        {**found.model_dump(exclude_unset=True), "python": "/opt/packcli/bin/python", "prepare_parts": 3, **keys}
    )


def submitted(asked: Profile, runs: Path = RUNS, plan: Plan | None = None) -> list[Submitted]:
    plan = plan or planned(base=True, arm=["padding", "greedy"], seed=[0, 1])
    return cluster.orders(plan, Store(runs), asked, graph(plan, asked, Known()), "0a1b2c3d")


def written(order: Submitted) -> str:
    jobs = {number: str(1000 + number) for number in range(order.array.number)}
    return script.text(order, cluster.dependency(order.array, jobs))


def goldens() -> dict[str, str]:
    """File name -> script."""
    first: dict[str, str] = {}
    for order in submitted(a800()):
        first.setdefault(f"{order.array.job}.sh", written(order))
    for variant, keys in (("container", CONTAINER), ("gres", GRES)):
        [order] = [order for order in submitted(a800(**keys)) if order.array.job == "train"]
        first[f"train-{variant}.sh"] = written(order)
    return first


def test_a_change_of_what_slurm_is_told_is_a_decision() -> None:
    assert {path.name: path.read_text() for path in GOLDEN.glob("*.sh")} == goldens()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_shell(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_parameter_comes_before_the_first_command() -> None:
    """sbatch reads no `#SBATCH` line after it."""
    for text in goldens().values():
        assert len(options(text)) == text.count("#SBATCH")


def test_a_dry_run_shows_what_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", slurm.env["PATH"])
    plan, store, asked = planned(base=True, seed=[0, 1]), Store(tmp_path / "runs"), a800()
    arrays = graph(plan, asked, Known())
    shown = show.planned(plan, store, asked, arrays, "sweep.yaml")["scripts"]
    assert not store.root.exists()
    outcome = cluster.submit(plan, store, asked, {})
    assert outcome.failures == []
    jobs = slurm.jobs()
    assert len(jobs) == len(arrays)
    [submission] = {job["options"]["comment"].removeprefix("packcli:").partition(".")[0] for job in jobs}
    compared = set()
    for array, job in reversed(list(zip(arrays, jobs, strict=True))):
        given = job["script"].replace(submission, "preview")
        for number, other in enumerate(jobs):
            for ending in ("_", ",", "\n"):
                given = given.replace(f":{other['id']}{ending}", f":ARRAY{number}{ending}")
        if array.number == next(other.number for other in arrays if other.job == array.job):
            assert given == shown[array.job]
            compared.add(array.job)
        assert store.array_script(submission, array.number).read_text() == job["script"]
    assert compared == shown.keys()


# Text that is not ours ---------------------------------------------------------------------------------

HOSTILE = [
    "$(touch CANARY)", "`touch CANARY`", "x; touch CANARY", "x & touch CANARY", "x | touch CANARY",
    "a'b; touch CANARY; '", 'a"b; touch CANARY; "', "a\ntouch CANARY", "a\n#SBATCH --uid=0", "a b", "%j", "é",
    "-x", "${IFS}", "*", "~", "\\", "#", ">CANARY", "\x1b[31m", "\u202e",
]  # fmt: skip


@pytest.mark.parametrize("name", [*HOSTILE, "a/b", "../a", "a\n", ""])
def test_case_41_a_sweep_is_not_called_what_a_shell_would_read(name: str) -> None:
    with pytest.raises(ConfigError, match="`name` is required"):
        load({**SWEEP, "name": name})


def test_case_41_no_text_of_a_sweep_or_of_its_data_reaches_a_script() -> None:
    """The same plan with every name replaced by something hostile gives the same scripts."""
    tame = {**SWEEP, "matrix": {"arm": ["one", "two"], "data.source": ["a.jsonl", "b.jsonl"]}}
    tame["arms"] = {"one": {"extends": "padding"}, "two": {"extends": "greedy"}}
    tame["model"] = {"name": "some/model"}
    expected = [written(order) for order in submitted(a800(), plan=made(tame))]
    for text in HOSTILE:
        names = [text, f"{text}2"]
        hostile = {**tame, "matrix": {"arm": names, "data.source": [f"{name}.jsonl" for name in names]}}
        hostile["arms"] = dict(zip(names, tame["arms"].values(), strict=True))
        hostile["model"] = {"name": f"some/{text}", "tokenizer": text}
        assert [written(order) for order in submitted(a800(), plan=made(hostile))] == expected


class Machine:
    """A node that runs scripts, with our own `srun`, `squeue`, `scontrol`; its Python notes what it is asked."""

    def __init__(self, directory: Path) -> None:
        self.slurm = FakeSlurm(directory / "slurm")
        self.job = self.slurm.add("packcli:0a1b2c3d.0") + "_0"
        self.slurm.set(self.job.partition("_")[0], "RUNNING", nodes="node0")
        self.cwd, self.python = directory / "cwd", self.slurm.bin / "python"
        self.cwd.mkdir()
        self._log = directory / "log"
        self._program("sleep", "exit 0")
        self._program(
            "python",
            f"printf '%s\\037' \"$@\" >> {self._log}; printf '\\036' >> {self._log}\n"
            'case "$4" in\n'
            '  begin) exit "${BEGIN:-0}";;\n'
            f'  run) [ -z "$SLOW_S" ] || /bin/sleep "$SLOW_S"; exit "${{RUN:-0}}";;\n'
            '  *) exit "${AFTER:-$6}";;\n'
            "esac",
        )

    def _program(self, name: str, text: str) -> None:
        path = self.slurm.bin / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def order(self, runs: Path = RUNS, job: str = "train", **keys: Any) -> Submitted:
        asked = Profile.model_validate({"name": "site", "python": str(self.python), **keys})
        return next(order for order in submitted(asked, runs) if order.array.job == job)

    def start(self, order: Submitted, **environment: object) -> subprocess.Popen[str]:
        path = self.cwd.parent / "script.sh"
        path.write_text(script.text(order, None))
        # As SLURM does for the last element of an array, whose other id it is.
        array, _, element = self.job.partition("_")
        ids = {"SLURM_JOB_ID": array, "SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": element}
        given = {**os.environ, **self.slurm.env, **ids}
        return subprocess.Popen(
            ["bash", str(path)],
            cwd=self.cwd,
            env={**given, **{name: str(value) for name, value in environment.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, order: Submitted, **environment: object) -> int:
        process = self.start(order, **environment)
        said, _ = process.communicate(timeout=60)
        assert "rror" not in said, said
        return process.returncode

    def asked(self) -> list[list[str]]:
        """What Python was called with: [begin|run|after, directory, ...]."""
        if not self._log.exists():
            return []
        calls = [call.split("\x1f")[:-1] for call in self._log.read_text().split("\x1e")[:-1]]
        assert all(call[:3] == ["-u", "-m", "packcli.launch.job"] for call in calls)
        return [call[3:] for call in calls]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


REFUSED = ["a\ntouch CANARY", "a\n#SBATCH --uid=0", "%j", "\\", "\x1b[31m", "\u202e"]


@pytest.mark.parametrize("name", [text for text in HOSTILE if text not in REFUSED])
def test_case_41_a_run_directory_is_one_argument_whatever_it_is_called(machine: Machine, name: str) -> None:
    order = machine.order(Path("/shared") / name / "runs")
    assert machine.run(order) == 0
    directory = f"/shared/{name}/runs/slurm/0a1b2c3d/array-{order.array.number}"
    assert machine.asked() == [["begin", directory], ["run", directory], ["after", directory, "0", "RUNNING"]]
    assert list(machine.cwd.iterdir()) == []
    output = f"{directory}/%A_%a_0_log.out"
    assert options(script.text(order, None))["output"] == output
    # srun counts its tasks by %t itself.
    [words] = machine.slurm.calls("srun")
    assert words[words.index("--output") + 1] == output.replace("_0_log", "_%t_log")


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_directory_that_slurm_would_read_otherwise_is_refused(machine: Machine, name: str) -> None:
    with pytest.raises(ConfigError, match="SLURM cannot write its logs"):
        script.text(machine.order(Path("/shared") / name), None)


def let_through(path: Path, place: Any) -> list[str]:
    """Hostile texts that a profile may hold at `place`."""
    found = []
    for text in HOSTILE:
        path.write_text(yaml.safe_dump(placed(place, text), allow_unicode=True))
        with contextlib.suppress(ConfigError):
            profile.load(path)
            found.append(text)
    return found


def test_case_41_no_value_of_a_profile_runs_as_a_command(machine: Machine, tmp_path: Path) -> None:
    """Most are refused; what is let through is run, all at once."""
    merged: dict[str, Any] = {}
    for place in [place for place in PLACES if not place.keys() & {"sbatch", "environment", "stages"}]:
        for text in let_through(tmp_path / "site.yaml", place):
            for key, value in placed(place, text).items():
                merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    assert {"partition", "account", "constraint", "container"} <= merged.keys()
    parameters = {
        f"x{chr(ord('a') + number)}": text
        for number, text in enumerate(let_through(tmp_path / "site.yaml", {"sbatch": {"xa": "{}"}}))
    }
    assert "x; touch CANARY" in parameters.values()
    order = machine.order(**merged, sbatch=parameters)
    assert machine.run(order) == 0
    assert list(machine.cwd.iterdir()) == []
    assert parameters.items() <= options(script.text(order, None)).items()


def test_environment_values_arrive_as_they_are_written(machine: Machine, tmp_path: Path) -> None:
    values = let_through(tmp_path / "site.yaml", {"environment": {"NOTE": "{}"}})
    assert "a'b; touch CANARY; '" in values
    names = [f"NOTE{number}" for number in range(len(values))]
    heard = " ".join(f'"${name}"' for name in names)
    machine._program("python", f"[ \"$4\" != run ] || printf '%s\\n' {heard} > {machine.cwd}/heard; exit 0")
    assert machine.run(machine.order(environment=dict(zip(names, values, strict=True)))) == 0
    assert [path.name for path in machine.cwd.iterdir()] == ["heard"]
    assert (machine.cwd / "heard").read_text().splitlines() == values


# What becomes of a job ---------------------------------------------------------------------------------


def requeued(machine: Machine) -> list[list[str]]:
    return machine.slurm.calls("scontrol")


def test_a_quarantined_stage_takes_no_node_time(machine: Machine) -> None:
    assert machine.run(machine.order(), BEGIN=7) == 7
    assert [what for what, *_ in machine.asked()] == ["begin"]
    assert machine.slurm.calls("srun") == []
    assert requeued(machine) == []


@pytest.mark.parametrize("code", [0, 1, 2, 7, 137, 143])
def test_a_job_ends_with_the_code_of_what_it_did(machine: Machine, code: int) -> None:
    assert machine.run(machine.order(), RUN=code) == code
    assert machine.asked()[-1][-2:] == [str(code), "RUNNING"]
    assert requeued(machine) == []


def test_a_stopped_job_is_queued_again(machine: Machine) -> None:
    assert machine.run(machine.order(), RUN=75) == 75
    assert requeued(machine) == [["requeue", machine.job]]


@pytest.mark.parametrize("command", ["squeue", "scontrol"])
def test_a_busy_controller_is_asked_again_for_another_attempt(machine: Machine, command: str) -> None:
    machine.slurm.fault(command, "Unable to contact slurm controller", at=1)
    process = machine.start(machine.order(), RUN=75)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert requeued(machine) == [["requeue", machine.job]] * (2 if command == "scontrol" else 1)


def test_what_was_lost_is_queued_again_though_no_process_asked_for_it(machine: Machine) -> None:
    assert machine.run(machine.order(), RUN=137, AFTER=75) == 75
    assert requeued(machine) == [["requeue", machine.job]]


def test_a_job_that_is_out_of_attempts_is_not_queued_again(machine: Machine) -> None:
    assert machine.run(machine.order(), RUN=75, AFTER=7) == 7
    assert requeued(machine) == []


@pytest.mark.parametrize("state", ["PENDING", "COMPLETING", "CANCELLED"])
def test_a_job_that_slurm_took_away_is_not_queued_twice(machine: Machine, state: str) -> None:
    """Preempted: SLURM has queued it again already. Cancelled: a user wants it gone."""
    machine.slurm.set(machine.job.partition("_")[0], state)
    assert machine.run(machine.order(), RUN=75) == 75
    assert requeued(machine) == []


def test_a_preempted_script_lives_until_its_checkpoint_is_noted(machine: Machine) -> None:
    process = machine.start(machine.order(), RUN=75, SLOW_S=2)
    deadline = time.monotonic() + 30
    while [what for what, *_ in machine.asked()] != ["begin", "run"]:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert [what for what, *_ in machine.asked()] == ["begin", "run", "after"]
    assert (process.returncode, machine.asked()[-1][-2]) == (75, "75")
    assert requeued(machine) == [["requeue", machine.job]]


def test_setup_that_fails_does_not_end_a_script_half_way(machine: Machine) -> None:
    """`set -e` in `setup` must not keep a failed training from being noted."""
    assert machine.run(machine.order(setup=["set -eu", "true"]), RUN=75) == 75
    assert [what for what, *_ in machine.asked()] == ["begin", "run", "after"]


def test_in_a_container_all_of_a_job_runs_in_it(machine: Machine) -> None:
    assert machine.run(machine.order(**CONTAINER)) == 0
    assert [what for what, *_ in machine.asked()] == ["begin", "run", "after"]
    calls = machine.slurm.calls("srun")
    assert len(calls) == 3
    for words in calls:
        assert "--container-image=registry/packcli:1" in words
        assert "--container-mounts=/shared:/shared,/data:/data:ro" in words
        assert "--container-workdir=/shared" in words
    assert [words[:2] == ["--nodes=1", "--ntasks=1"] for words in calls] == [True, False, True]


def test_the_numbers_of_elements_are_those_that_their_array_waits_for(machine: Machine) -> None:
    order = machine.order()
    elements = tuple(
        element.model_copy(update={"index": index})
        for element, index in zip(order.array.elements * 2, [0, 1, 2, 5, 7], strict=False)
    )
    array: Array = order.array.model_copy(update={"elements": elements})
    sparse = order.model_copy(update={"array": array})
    assert options(script.text(sparse, None))["array"] == "0-2,5,7%5"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: python {Path(__file__).name} --write")
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for path in GOLDEN.glob("*.sh"):
        path.unlink()
    for name, text in goldens().items():
        (GOLDEN / name).write_text(text)
    print(f"{GOLDEN}: {len(goldens())} scripts")
