"""The batch script of an array, as text. Pure: what `--dry-run` shows is what is submitted, byte by byte.

What a script holds: values that the profile's allow-lists let through, paths in quotes, and the profile's own
`setup` lines. No name, label or text from a sweep file or from data gets there except the sweep's name, which is
letters, digits, `.`, `_` and `-`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from packcli.config import Spec
from packcli.errors import ConfigError, MissingError, PreemptedError
from packcli.launch.graph import Array
from packcli.launch.profile import Profile, Resources

_LAST_NODE_S = 300

COMMENT = "packcli:"
"""Begins the comment of every job of ours; the array's id follows, by which a job is found again."""


class Submitted(Spec):
    """All that a job needs to know. `runs` and `directory` (of the array) are absolute paths.

    `fallback`: a training whose newest checkpoint is damaged takes the one before. `unsafe_no_sandbox`: code that
    a model writes runs without one.
    """

    submission: str
    sweep: str
    runs: str
    directory: str
    array: Array
    profile: Profile
    fallback: bool = False
    unsafe_no_sandbox: bool = False

    @property
    def id(self) -> str:
        return f"{self.submission}.{self.array.number}"

    @property
    def comment(self) -> str:
        return COMMENT + self.id

    @property
    def job_name(self) -> str:
        return f"{self.sweep}-{self.array.job}-{self.id}"

    @property
    def resources(self) -> Resources:
        return self.profile.resources(self.array.job)


def check_path(path: str) -> str:
    """A path that may stand in an `#SBATCH` line.

    Raises:
        ConfigError: SLURM replaces `%` there, and no quoting holds control characters.
    """
    if "%" in path or "\\" in path or not path.isprintable():
        raise ConfigError(
            f"`{path}`: SLURM cannot write its logs below a path with `%`, `\\` or control characters",
            "choose another run directory with --runs",
        )
    return path


def text(order: Submitted, dependency: str | None) -> str:
    """The script. `dependency`: as `sbatch --dependency` takes it."""
    executor = _executor(check_path(order.directory))
    executor.update_parameters(**_parameters(order, dependency))
    executor.parameters["map_count"] = len(order.array.elements)
    executor.parameters["additional_parameters"]["array"] = _indices(order)
    written: str = executor._make_submission_file_text(_job(order, "run"), "")
    return written + "\n"


def _executor(directory: str) -> Any:
    try:
        from submitit import SlurmExecutor
    except ModuleNotFoundError:
        raise MissingError("a cluster's scripts are written by submitit", "pip install 'packcli[slurm]'") from None

    class Executor(SlurmExecutor):
        """submitit's writer of scripts, for a command of ours: pickles of functions would be files more, and a
        submission that is killed half-way would leave jobs without theirs."""

        @classmethod
        def affinity(cls) -> int:
            return 2  # also where there is no SLURM: a script can be shown anywhere

    return Executor(directory)


def _parameters(order: Submitted, dependency: str | None) -> dict[str, Any]:
    resources, profile, array = order.resources, order.profile, order.array
    gpus: dict[str, Any] = {}
    if resources.gpus_per_node:
        count = f"{profile.gpu_type}:{resources.gpus_per_node}" if profile.gpu_type else resources.gpus_per_node
        gpus = {"gres": f"gpu:{count}"} if profile.gpus_as == "gres" else {"gpus_per_node": count}
    more = {"mem": resources.mem} if resources.mem else {}
    asked = {
        "job_name": order.job_name,
        "comment": order.comment,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "time": resources.time_min,
        "nodes": array.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": resources.cpus_per_task,
        "exclusive": True if resources.exclusive else None,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
        "dependency": dependency,
        **gpus,
        "signal_delay_s": profile.signal_s,
        "stderr_to_stdout": True,
        "wckey": None,
        # A child of a job that failed ends with it, instead of waiting for ever.
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **more, **resources.sbatch},
        "setup": _before(order),
        "teardown": _after(order),
        "srun_args": _srun_arguments(order),
    }
    return {name: value for name, value in asked.items() if value is not None or name == "wckey"}


def _indices(order: Submitted) -> str:
    """As `sbatch --array` takes it: `0-4,7%3`, of which 3 run at once."""
    spans: list[list[int]] = []
    for index in sorted(element.index for element in order.array.elements):
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    listed = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"{listed}%{min(order.resources.array_cap, len(order.array.elements))}"


def _before(order: Submitted) -> list[str]:
    resources = order.resources
    return [
        "trap : TERM  # preemption: the tasks hear of it too, and what they leave is looked at below",
        *(f"export {name}={shlex.quote(value)}" for name, value in resources.environment.items()),
        *resources.setup,
        "set +e",
        f'{_once(order, "begin")} || exit "$?"',
    ]


def _after(order: Submitted) -> list[str]:
    # Not SLURM_JOB_ID: for the last element of an array that is the id of the whole array. A busy controller is
    # asked again; a job that was cancelled meanwhile is left as it is.
    return [
        "code=$?",
        'job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
        'state=$(squeue --noheader --job "$job" --format %T)',
        f'{_once(order, "after")} "$code" "$state"',
        "code=$?",
        f'if [ "$code" = {PreemptedError.exit_code} ]; then',
        "    for pause in 0 5 15 30; do",
        '        sleep "$pause"',
        '        state=$(squeue --noheader --job "$job" --format %T) || continue',
        '        [ "$state" = RUNNING ] || break',
        '        scontrol requeue "$job" && sleep 60 && break  # SLURM ends this script',
        "    done",
        "fi",
        'exit "$code"',
    ]


def _job(order: Submitted, what: str) -> str:
    python = shlex.quote(order.profile.python or sys.executable)
    return f"{python} -u -m packcli.launch.job {what} {shlex.quote(order.directory)}"


def _once(order: Submitted, what: str) -> str:
    """A command for the first node alone; inside the container, if there is one."""
    if order.profile.container is None:
        return _job(order, what)
    return f"{shlex.join(['srun', '--nodes=1', '--ntasks=1', *_container(order)])} {_job(order, what)}"


def _srun_arguments(order: Submitted) -> list[str]:
    cpus = order.resources.cpus_per_task
    # Since SLURM 22.05 srun no longer takes the processors over from sbatch; nor does it append by itself.
    # Nodes end together, or one is lost and the others wait for it in vain.
    return [
        "--open-mode=append",
        f"--wait={_LAST_NODE_S}",
        *([f"--cpus-per-task={cpus}"] if cpus else []),
        *_container(order),
    ]


def _container(order: Submitted) -> list[str]:
    container = order.profile.container
    if container is None:
        return []
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    workdir = [f"--container-workdir={container.workdir}"] if container.workdir else []
    return [f"--container-image={container.image}", *mounts, *workdir]


def torchrun(order: Submitted, typed: str, labels: Mapping[str, str]) -> str:
    """What trains the cell of these labels by hand on each node: packcli gives ranks the same environment.

    `typed`: sweep file and settings, as on a command line.
    """
    resources = order.resources
    first = '"$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'
    only = " ".join(f"--only {shlex.quote(f'{axis}={value}')}" for axis, value in labels.items())
    words = ["--nnodes", str(order.array.nodes), "--nproc-per-node", str(resources.processes_per_node)]
    return (
        f'torchrun {" ".join(words)} --node-rank "$SLURM_NODEID" --master-addr {first} --master-port 29400 '
        f"-m packcli train {typed} {only} --runs {shlex.quote(order.runs)}"
    )
