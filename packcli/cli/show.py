"""`packcli status`, `report` and `verify`: what is there."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from packcli import console, log
from packcli.cli.options import DEFAULT_RUNS, Json, MaxCells, Only, Runs, Sets, SweepFile, app, jobs_there, opened
from packcli.cli.tables import Format, refuse_damaged, tables
from packcli.errors import ConfigError


@app.command()
def status(
    sweep: SweepFile,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Print the state of every cell, from disk and from SLURM, and why what failed did."""
    from packcli.launch import watch
    from packcli.report import status as statuses

    plan, store = opened(sweep, set_, only, runs, max_cells)
    document = statuses.collect(plan, store, watch.jobs(plan, store, jobs_there(store)))
    if json:
        console.print_json(document)
        return
    console.show(statuses.table(document))
    for line in statuses.failure_lines(document):
        console.say(line)


@app.command()
def report(
    sweep: SweepFile,
    format_: Annotated[
        Format | None, typer.Option("--format", help="table (if not given), md, csv, latex, json, html, ladder.")
    ] = None,
    against: Annotated[
        Literal["paper"] | None, typer.Option("--against", help='Beside what "Packing Analysis" printed.')
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Also the health of each score, and every cost.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 4 when a file of the tables is damaged.")] = False,
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures", metavar="DIR", help="Also draw the pictures of the page there, and those of probes."
        ),
    ] = None,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Print the comparison table of what has run so far."""
    if json and format_ not in (None, "json"):
        raise ConfigError(f"`--json` and `--format {format_}` ask for two documents", "give one of them")
    with _no_garbage() as kept:
        plan, store = opened(sweep, set_, only, runs, max_cells)
        kept.append(plan)
        if store.begun().isdisjoint(plan.stages()):
            others = len(store.begun())
            also = (
                f"; {others:,} stages of other settings, data or versions of packcli are there" if others else ""
            )
            log.logger.warning(
                "warning: nothing of `%s` has run in `%s` (see --runs)%s", plan.name, store.root, also
            )
        shown: Format = "json" if json else format_ or "table"
        collected = tables(plan, store, shown, against=against, everything=all_)
        kept.append(collected)
    if figures is not None:
        from packcli.report import figures as drawing
        from packcli.report import ladder, ladder_figure, probe_figures

        drawn = [
            *drawing.draw(plan, collected, store, figures),
            *ladder_figure.draw(ladder.climb(plan, collected), figures),
            *probe_figures.of_cells(collected, store, figures),
        ]
        for path in drawn:
            log.logger.info("%s", path)
    if strict:
        refuse_damaged(collected)


@contextlib.contextmanager
def _no_garbage() -> Iterator[list[object]]:
    """Of ten thousand cells nothing can go before the end, and looking for what could takes half the time.

    What is put into the list is left to the system when the process ends: object by object that takes a second.
    """
    kept: list[object] = []
    kept.append(kept)  # so that nobody lets go of it
    gc.disable()
    try:
        yield kept
    finally:
        gc.freeze()
        gc.enable()


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A stage directory or checkpoint of ours.")],
) -> None:
    """Check every file of a store, a stage directory or a checkpoint against its manifest."""
    from packcli.store import verify as verify_directory

    console.say(f"{directory}: {verify_directory(directory)} files as their manifest says")
