"""`packcli prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packcli import console, log
from packcli.cli.options import DEFAULT_RUNS, Json, MaxCells, Only, Runs, Sets, app, opened
from packcli.errors import ConfigError

if TYPE_CHECKING:
    from packcli.plan import Plan
    from packcli.store import Store


@app.command()
def prepare(
    what: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP|DATA",
            show_default=False,
            help="A sweep file; with --plan also data.",
        ),
    ],
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Read lengths, print what each arm would make of them, write nothing.")
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="NAME_OR_DIR", help="With --plan DATA: the model's tokenizer."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="With --plan DATA: llama3, chatml, plain or a Jinja file."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=2, help="With --plan DATA: tokens in a row. [default: 4096]")
    ] = None,
    show: Annotated[
        int | None,
        typer.Option("--show", metavar="N", min=1, help="Print N documents and the rows that hold them."),
    ] = None,
    draw: Annotated[
        Path | None, typer.Option("--draw", metavar="FILE.svg", help="Draw a few documents laid out by every arm.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="DIR", help="Write rows as a `datasets` directory.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="K/N", help="Tokenize the K-th of N parts only: for a job array."),
    ] = None,
    only: Only = None,
    set_: Sets = None,
    max_cells: MaxCells = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Make the token stores and row indexes of all cells, and print the ledger: where every token went."""
    from packcli import views

    if plan_only and (export or part is not None):
        raise ConfigError("--plan writes nothing: --export and --part do not go with it", "leave --plan out")
    if part is not None and (show or draw or export):
        raise ConfigError(
            "--part makes no rows for --show, --draw or --export", "give them when all parts are done"
        )
    if views.is_data(what):
        if not plan_only:
            raise ConfigError(
                f"`{what}` is data, not a sweep file",
                f"see what packing would do with it: `packcli prepare {what} --plan`; or train on it: "
                f"`packcli sweep SWEEP --set data.source={what}`",
            )
        if only:
            raise ConfigError("--only needs a sweep", "see `packcli prepare --help`")
        asked = views.data_plan(what, tokenizer, template, max_length or 4096, set_ or ())
        _look(asked, None, tokenizer or views.OWN_TOKENIZER, show, draw, json)
        return
    if tokenizer or template or max_length:
        raise ConfigError(
            "--tokenizer, --template and --max-length are for a data file with --plan",
            "with a sweep: --set model.tokenizer=... --set data.template=... --set data.max_length=...",
        )
    plan, store = opened(Path(what), set_, only, runs, max_cells)
    if plan_only:
        _look(plan, store, "that of each cell", show, draw, json)
    elif part is not None:
        _prepared_part(plan, store, views.part_of(part), json)
    else:
        _prepare(plan, store, show, draw, export, json)


def _look(
    plan: Plan, store: Store | None, tokenizer: str, show: int | None, draw: Path | None, json: bool
) -> None:
    import tempfile

    from packcli import views
    from packcli.report import outlook

    if draw:
        views.check_picture(draw)
    document = views.outlook(plan, tokenizer, store)
    console.print_json(document) if json else console.show(outlook.render(document))
    if show or draw:
        with tempfile.TemporaryDirectory(prefix="packcli-") as scratch:
            sample, sampled = views.sampled(plan, max(show or 0, views.SAMPLE), Path(scratch))
            _view(sample, sampled, show, draw, json)


def _prepare(
    plan: Plan, store: Store, show: int | None, draw: Path | None, export: Path | None, json: bool
) -> None:
    from packcli import views
    from packcli.launch import local
    from packcli.report import ledger

    if draw:
        views.check_picture(draw)
    if export:
        views.check_export(plan, export)
    failures = local.run(plan, store, [("index", id_) for id_ in plan.indexes])
    document = ledger.collect(plan, store)
    if json:
        console.print_json(document)
    elif any(cell["ledger"] for cell in document["cells"]):
        console.show(ledger.table(document))
    if not failures:
        _view(plan, store, show, draw, json)
        for path in views.export(plan, store, export) if export else []:
            log.logger.info("exported to %s", path)
    console.finish(failures)


def _view(plan: Plan, store: Store, show: int | None, draw: Path | None, json: bool) -> None:
    from packcli import views

    if show and not json:
        console.show(views.show(plan, store, show))
    if draw:
        views.draw(plan, store, draw)
        log.logger.info("drawn: %s", draw)


def _prepared_part(plan: Plan, store: Store, part: tuple[int, int], json: bool) -> None:
    from packcli import views

    made = views.prepare_part(plan, store, part)
    if json:
        console.print_json(
            {"part": part[0] + 1, "parts": part[1], "tokens": {id_: {"shards": count} for id_, count in made}}
        )
        return
    for id_, count in made:
        own = len(range(part[0], count, part[1]))
        console.say(f"tokens {id_}: part {part[0] + 1} of {part[1]} is done ({own} of {count} shards)")
    console.say("when all parts are done, `packcli prepare` of the same sweep puts them together")
