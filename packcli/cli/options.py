"""What commands share: the program itself, its options, a sweep file opened, its jobs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packcli import log
from packcli.errors import MissingError

if TYPE_CHECKING:
    from packcli.launch.cluster import View
    from packcli.plan import Plan
    from packcli.store import Store

app = typer.Typer(
    help="Should I pack or pad my fine-tuning data, how, and what does it cost?",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SweepFile = Annotated[
    Path, typer.Argument(metavar="SWEEP", show_default=False, help="A sweep file, such as sweeps/tiny.yaml.")
]
Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="AXIS=VALUE", help="Only matching cells. Repeatable.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a dotted key. Repeatable.")
]
MaxCells = Annotated[
    int | None,
    typer.Option("--max-cells", metavar="N", min=1, help="Refuse a sweep of more cells. [default: 10000]"),
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="The run directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Processes = Annotated[
    int | None,
    typer.Option("--nproc-per-node", metavar="N", min=1, help="Processes of one training. [default: one a GPU]"),
]
Grace = Annotated[
    float, typer.Option("--grace", metavar="S", min=0, help="Seconds a stopped training has for its checkpoint.")
]
Fallback = Annotated[
    bool,
    typer.Option(
        "--allow-fallback", help="If the newest checkpoint is damaged, delete it and take the one before."
    ),
]
Unsafe = Annotated[
    bool, typer.Option("--unsafe-no-sandbox", help="Run code that the model writes without a sandbox.")
]
DEFAULT_RUNS = Path("runs")


def opened(
    sweep: Path, sets: list[str] | None, only: list[str] | None, runs: Path, max_cells: int | None
) -> tuple[Plan, Store]:
    """(plan, store) of a sweep file."""
    from packcli import stages, sweepfile
    from packcli.store import Store

    store = Store(runs)
    store.check(writable=False)
    spec = sweepfile.load(sweep, sets or (), only or (), max_cells or sweepfile.MAX_CELLS)
    return stages.make_plan(spec, store), store


def typed(sweep: Path, sets: list[str] | None, only: list[str] | None, runs: Path) -> str:
    """What chooses these cells on a command line, for the user to copy."""
    words = [str(sweep)]
    for option, values in (("--set", sets), ("--only", only)):
        words += [word for value in values or () for word in (option, value)]
    return shlex.join([*words, *(("--runs", str(runs)) if runs != DEFAULT_RUNS else ())])


def jobs_there(store: Store) -> View | None:
    """This run directory's jobs; None where there never was one, or no SLURM answers: the disk is still there."""
    from packcli.launch import cluster, slurm

    if not store.arrays():
        return None
    try:
        slurm.require()
        return cluster.View(store, patient=False)
    except MissingError as error:
        log.logger.warning("warning: %s; what is shown is what the disk knows", error.cause)
        return None
