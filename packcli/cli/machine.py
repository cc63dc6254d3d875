"""`packcli doctor` and `fetch`: what this machine has, and what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packcli import console
from packcli.cli.options import DEFAULT_RUNS, Json, MaxCells, Only, Runs, Sets, SweepFile, app, opened
from packcli.errors import ConfigError


@app.command()
def doctor(
    sweep: Annotated[
        Path | None,
        typer.Argument(
            metavar="SWEEP", show_default=False, help="Also whether all that this sweep needs is here."
        ),
    ] = None,
    on: Annotated[
        str,
        typer.Option("--on", metavar="local|PROFILE", help="Also whether SLURM takes what a profile asks for."),
    ] = "local",
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Say what this machine can do, what is missing, and what to type. Exits 6 when something is broken."""
    from packcli import fetch
    from packcli.doctor import command
    from packcli.doctor.sweep import Sweep
    from packcli.launch.profile import load as load_profile

    if sweep is None and (only or set_):
        raise ConfigError("--only and --set are for a sweep", "name its file: `packcli doctor SWEEP`")
    profile = None if on == "local" else load_profile(Path(on))
    asked = None
    if sweep is not None:
        plan, store = opened(sweep, set_, only, runs, max_cells)
        asked = Sweep(plan, store, fetch.remote(plan), here=profile is None)
    found = command.examine(runs, asked, profile)
    if json:
        console.print_json(command.document(found))
    else:
        console.show(command.table(found))
        for line in command.lines(found):
            console.say(line)
    if not command.is_well(found):
        raise typer.Exit(6)


@app.command("fetch")
def fetch_(
    sweep: SweepFile,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Download model, data and benchmarks of a sweep, for nodes without internet."""
    from packcli import fetch

    plan, _ = opened(sweep, set_, only, runs, max_cells)
    items = fetch.fetch(plan)
    document = fetch.document(plan, items)
    console.print_json(document) if json else console.show(fetch.table(document))
    console.finish([item.error for item in items if item.error])
