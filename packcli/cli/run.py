"""`packcli train`, `sweep` and `cancel`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packcli import console, log
from packcli.cli.options import (
    DEFAULT_RUNS,
    Fallback,
    Grace,
    Json,
    MaxCells,
    Only,
    Processes,
    Runs,
    Sets,
    SweepFile,
    Unsafe,
    app,
    jobs_there,
    opened,
    typed,
)
from packcli.cli.tables import refuse_damaged, tables
from packcli.errors import ConfigError
from packcli.processes import GRACE_S

if TYPE_CHECKING:
    from packcli.launch.cluster import Outcome
    from packcli.launch.profile import Profile
    from packcli.plan import Plan
    from packcli.store import Store


@app.command()
def train(
    sweep: SweepFile,
    nproc_per_node: Processes = None,
    nnodes: Annotated[int, typer.Option("--nnodes", min=1, help="Machines that run this command together.")] = 1,
    node_rank: Annotated[int, typer.Option("--node-rank", min=0, help="Which of them this is, from 0.")] = 0,
    rdzv_endpoint: Annotated[
        str | None, typer.Option("--rdzv-endpoint", metavar="HOST:PORT", help="Machine 0, and a free port there.")
    ] = None,
    grace: Grace = GRACE_S,
    allow_fallback: Fallback = False,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Train the selected cells here, each with all GPUs.

    Under torchrun (`torchrun --nproc-per-node N -m packcli train SWEEP`) it trains the same, but torchrun exits
    with 1 whatever went wrong.
    """
    from packcli import stages
    from packcli.launch import local, ranks
    from packcli.plan import Kind, closure
    from packcli.processes import die_with_parent

    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())  # torch's agent starts its workers in sessions of their own
    if node_rank >= nnodes or (nnodes > 1 and rdzv_endpoint is None):
        raise ConfigError(
            "several machines need --nnodes, --rdzv-endpoint, and a --node-rank below --nnodes",
            f"on machine K of 0 to {nnodes - 1}: --nnodes {nnodes} --node-rank K --rdzv-endpoint HOST:PORT",
        )
    plan, store = opened(sweep, set_, only, runs, max_cells)
    targets: list[tuple[Kind, str]] = [("train", id_) for id_ in plan.trains]
    stages_ = closure(plan, targets)
    missing = [s for s in stages_ if s[0] in ("tokens", "index") and store.state(*s) != "done"]
    if missing:
        raise ConfigError(
            f"{len(missing)} prepare stages are missing: training never tokenizes and never packs",
            f"run `packcli prepare {sweep}` first (with the same --only, --set and --runs)",
        )
    orders = [plan.trains[id_] for kind, id_ in stages_ if kind == "train"]
    failures: Iterable[Any] = ()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        stages.train_together(orders, store, fallback=allow_fallback)
        node_rank = int(os.environ["RANK"])
    elif nnodes > 1:
        processes, _ = ranks.processes_here(nproc_per_node)
        group = ranks.Group(processes, nnodes, node_rank, rdzv_endpoint, grace)
        failures = ranks.run_each(orders, store, group, ranks.Lines(), fallback=allow_fallback)
    else:
        stages.preflight(plan, store)
        failures = local.run(
            plan, store, targets, processes=nproc_per_node, grace_s=grace, fallback=allow_fallback
        )
    if node_rank == 0:
        tables(plan, store, "json" if json else "table")
    console.finish(failures)


@app.command()
def sweep(
    sweep: SweepFile,
    on: Annotated[
        str, typer.Option("--on", metavar="local|PROFILE", help="Where to run: here, or a cluster's profile.")
    ] = "local",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, states and estimate, and a cluster's jobs; do nothing.")
    ] = False,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="On a cluster: follow until all has ended. Ctrl-C leaves the jobs alone."),
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="On a cluster: also what is quarantined, or ran out of memory.")
    ] = False,
    max_gpu_hours: Annotated[
        float | None,
        typer.Option("--max-gpu-hours", metavar="X", min=0, help="Run nothing if trainings are to take more."),
    ] = None,
    nproc_per_node: Processes = None,
    grace: Grace = GRACE_S,
    allow_fallback: Fallback = False,
    unsafe_no_sandbox: Unsafe = False,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Do all that is missing of a sweep, in dependency order, then print the table.

    On a cluster: submit all that is missing, and return; the jobs end with the table.
    """
    from packcli import stages
    from packcli.launch import cluster, local
    from packcli.launch.profile import load as load_profile

    profile = None if on == "local" else load_profile(Path(on))
    if profile is None and (wait or retry):
        raise ConfigError("--wait and --retry are for a cluster", "name its profile: --on slurm/PROFILE.yaml")
    if profile is not None and (nproc_per_node is not None or grace != GRACE_S):
        raise ConfigError(
            "--nproc-per-node and --grace are for this machine",
            f"on a cluster its profile says so: `processes_per_node` and `signal_s` in {on}",
        )
    plan, store = opened(sweep, set_, only, runs, max_cells)
    for problem in stages.preflight(plan, store):
        log.logger.warning("warning: %s; the rest of the sweep runs", problem.cause)
    if repeated := plan.repeated():
        first = " = ".join(" ".join(cell.labels.values()) for cell in repeated[0])
        log.logger.info("%d runs are named by several cells, and done once: %s", len(repeated), first)
    if dry_run:
        _dry_run(plan, store, profile, typed(sweep, set_, None, runs), json, max_gpu_hours)
        return
    if max_gpu_hours is not None:
        from packcli.report import dryrun

        dryrun.check_budget(dryrun.collect(plan, store, _where(profile)), max_gpu_hours)
    if profile is not None:
        sizes = stages.source_bytes(plan)
        outcome = cluster.submit(
            plan,
            store,
            profile,
            sizes,
            retry=retry,
            fallback=allow_fallback,
            unsafe_no_sandbox=unsafe_no_sandbox,
        )
        _submitted(plan, store, outcome, typed(sweep, set_, only, runs), wait=wait, json=json)
        return
    failures = local.run(
        plan,
        store,
        plan.stages(),
        processes=nproc_per_node,
        grace_s=grace,
        fallback=allow_fallback,
        unsafe_no_sandbox=unsafe_no_sandbox,
    )
    collected = tables(plan, store, "json" if json else "table")
    console.finish(failures)
    refuse_damaged(collected)  # what cannot be read is not done


def _dry_run(
    plan: Plan, store: Store, profile: Profile | None, typed: str, json: bool, most: float | None
) -> None:
    from packcli.report import dryrun

    document, jobs = dryrun.collect(plan, store, _where(profile)), None
    if profile is not None:
        from packcli import stages
        from packcli.launch import cluster, graph, show

        view = jobs_there(store)
        known = cluster.known(plan, store, profile, view, stages.source_bytes(plan))
        jobs = show.planned(plan, store, profile, graph.graph(plan, profile, known), typed)
    if json:
        console.print_json({**document, "jobs": jobs} if jobs else document)
    else:
        for part in dryrun.shown(document):
            console.show(part)
    if jobs is not None and not json:
        if not jobs["arrays"]:
            console.say("nothing to submit: all is done, has its job, or would only fail again (--retry)")
        else:
            console.show(show.graph_table(jobs))
            for line in show.scripts(jobs):
                console.say(line)
    if most is not None:
        dryrun.check_budget(document, most)


def _where(profile: Profile | None) -> tuple[int, int] | None:
    """Nodes of a training on a cluster, and the GPUs of each."""
    if profile is None:
        return None
    asked = profile.resources("train")
    return asked.nodes, asked.gpus_per_node


def _submitted(plan: Plan, store: Store, outcome: Outcome, typed: str, *, wait: bool, json: bool) -> None:
    from packcli.launch import cluster, show

    document = show.outcome(outcome)
    if json and not wait:
        console.print_json(document)
    for line in () if json else show.outcome_lines(document, typed):
        console.say(line, err=wait)
    if wait:
        from packcli.launch import follow

        follow.follow(plan, store)
        tables(plan, store, "json" if json else "table")
        console.finish(cluster.problems(plan, store, cluster.View(store)))
    console.finish(outcome.failures)


@app.command()
def cancel(
    sweep: SweepFile,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Stop what runs of a sweep, here or on a cluster: only its own processes and jobs."""
    from packcli.launch import cluster, local

    plan, store = opened(sweep, set_, only, runs, max_cells)
    processes = local.cancel(plan.name, store)
    for process in processes:
        log.logger.info("process %d: asked to write its checkpoints and stop", process)
    jobs = cluster.cancel(plan, store) if store.arrays() else []
    if json:
        console.print_json({"processes": processes, "jobs": jobs})
    else:
        console.say(f"{len(processes):,} processes of this machine asked to stop, {len(jobs):,} jobs cancelled")
