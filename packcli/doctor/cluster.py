"""SLURM as packcli uses it, and whether it would take what a profile asks for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from packcli.doctor.checks import Check, Finding
from packcli.errors import MissingError
from packcli.launch import script, slurm
from packcli.launch.graph import Array, Element
from packcli.launch.profile import STAGES, Profile, Resources, StageName
from packcli.launch.script import Submitted
from packcli.launch.show import duration
from packcli.launch.slurm import Cluster, Partition

_LIMIT_S = 60.0


def checks(profile: Profile | None) -> list[Check]:
    if not slurm.is_here():
        return [Check("slurm", _absent)]
    found = [Check("slurm", _slurm, _LIMIT_S)]
    return [*found, Check("profile", lambda: _profile(profile), _LIMIT_S)] if profile else found


def _absent() -> Iterator[Finding]:
    means = "sweeps run on this machine; --dry-run with a profile shows a cluster's jobs anywhere"
    fix = "on a cluster: run this on its login node. A cluster of this machine: docs/local_cluster.md"
    yield Finding("slurm", "missing", "`sbatch` was not found", means, fix)


def _slurm() -> Iterator[Finding]:
    try:
        found = slurm.cluster()
    except MissingError as error:  # its programs are here, and no controller answers them: one line says it
        yield Finding("slurm", "missing", error.cause, "nothing can be submitted from here", error.fix)
        return
    yield from _cluster(found)
    yield from _partitions()
    yield from _jobs()


def _cluster(found: Cluster) -> Iterator[Finding]:
    arrays = f", arrays of up to {found.max_array - 1:,} jobs" if found.max_array else ""
    yield Finding(
        "slurm", "ok", f"SLURM {found.version}{arrays}", "sweeps can be submitted: --on slurm/PROFILE.yaml"
    )
    yield _preemption(found)
    if found.accounting:
        yield Finding("slurm accounting", "ok", "`sacct` answers", "how a lost job ended is known")
    else:
        means = "of a job that was lost, packcli cannot say how it ended; nothing else depends on it"
        yield Finding("slurm accounting", "missing", "`sacct` does not answer", means)


def _preemption(found: Cluster) -> Finding:
    name, wait = "slurm preemption", f"; SIGKILL {found.kill_wait_s} s after SIGTERM" if found.kill_wait_s else ""
    match found.requeues:
        case None:
            return Finding(
                name, "ok", f"no job is preempted{wait}", "a time limit requeues a training all the same"
            )
        case False:
            means = "a preempted training is not requeued: type the same sweep command again, it goes on"
            return Finding(name, "missing", f"preempted jobs are cancelled{wait}", means)
        case True:
            how = "the signal a job asks for" if found.signals else "SIGTERM"
            means = "a training hears of it, writes a checkpoint, and goes on when requeued"
            return Finding(name, "ok", f"preempted jobs are requeued, told by {how}{wait}", means)


def _partitions() -> Iterator[Finding]:
    found = slurm.limits()
    if not found:
        means = "nothing can be submitted"
        yield Finding("slurm partitions", "failed", "`sinfo` lists none", means, "ask who runs the cluster")
        return
    down = [one.name for one in found if not one.is_up]
    means = f"down: {', '.join(down)}" if down else ""
    yield Finding("slurm partitions", "ok", "; ".join(map(_in_words, found)), means)


def _in_words(one: Partition) -> str:
    gpus = f" of up to {one.gpus} GPUs" if one.gpus else ""
    longest = f"up to {duration(60 * one.time_min)}" if one.time_min else "no time limit"
    return f"{one.name}{' (default)' if one.is_default else ''}: {one.nodes} nodes{gpus}, {longest}"


def _jobs() -> Iterator[Finding]:
    """`squeue`: what `status` and every submission ask first."""
    live = slurm.live(patient=False)
    yield Finding("slurm jobs", "ok", f"`squeue` answers; {len(live)} jobs of packcli are there")


# A profile ----------------------------------------------------------------------------------------------


def _profile(profile: Profile) -> Iterator[Finding]:
    partitions, found = slurm.limits(), slurm.cluster()
    if found.max_array is not None and profile.array_max >= found.max_array:
        text = f"`array_max: {profile.array_max}`, and SLURM numbers elements below {found.max_array}"
        yield Finding("profile", "failed", text, "large sweeps are refused", f"`array_max: {found.max_array - 1}`")
    with tempfile.TemporaryDirectory(prefix="packcli-") as scratch:
        for stage in STAGES:
            yield _stage(profile, stage, partitions, Path(scratch))


def _stage(profile: Profile, stage: StageName, partitions: Sequence[Partition], scratch: Path) -> Finding:
    asked = profile.resources(stage)
    name = f"profile {stage}"
    refused = slurm.check(_script(profile, stage, scratch))
    if refused is not None:
        return Finding(name, "failed", refused.cause, f"`{stage}` jobs cannot be submitted", refused.fix)
    if problem := _never(asked, partitions):
        fix = "mend the profile: docs/slurm_profile.md"
        return Finding(name, "failed", problem, f"`{stage}` jobs would wait for ever", fix)
    gpus = f" x {asked.gpus_per_node} GPUs" if asked.gpus_per_node else ""
    where = f"`{asked.partition}`" if asked.partition else "the default partition"
    text = f"{asked.nodes} nodes{gpus} in {where} for {duration(60 * asked.time_min)}"
    return Finding(name, "ok", text, "SLURM would take it")


def _script(profile: Profile, stage: StageName, scratch: Path) -> Path:
    """As `sweep` writes one, of one element that would do nothing; it is never submitted."""
    array = Array(
        number=0,
        job=stage,
        nodes=profile.resources(stage).nodes,
        elements=(Element(name="doctor", stages=()),),
        needs=(),
    )
    order = Submitted(
        submission="doctor",
        sweep="doctor",
        runs=str(scratch),
        directory=str(scratch),
        array=array,
        profile=profile,
    )
    path = scratch / f"{stage}.sh"
    path.write_text(script.text(order, None))
    return path


def _never(asked: Resources, partitions: Sequence[Partition]) -> str | None:
    """What SLURM may accept, and can never start."""
    named = [one for one in partitions if (one.name == asked.partition if asked.partition else one.is_default)]
    if len(named) != 1:
        return None  # several partitions, or one that is hidden: SLURM was asked, and took it
    there = named[0]
    if not there.is_up:
        return f"partition `{there.name}` is down"
    if there.time_min is not None and asked.time_min > there.time_min:
        return f"{duration(60 * asked.time_min)}, and `{there.name}` allows {duration(60 * there.time_min)}"
    if asked.nodes > there.nodes:
        return f"{asked.nodes} nodes, and `{there.name}` has {there.nodes}"
    if asked.gpus_per_node > there.gpus:
        return f"{asked.gpus_per_node} GPUs a node, and nodes of `{there.name}` have {there.gpus}"
    return None
