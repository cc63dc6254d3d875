"""The tables of a sweep in every format, on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import typer

from packcli import console
from packcli.errors import ConfigError, IntegrityError

if TYPE_CHECKING:
    from packcli.plan import Plan
    from packcli.report.records import Report
    from packcli.store import Store

Format = Literal["table", "md", "csv", "latex", "json", "html", "ladder"]


def tables(
    plan: Plan, store: Store, format_: Format, *, against: Literal["paper"] | None = None, everything: bool = False
) -> Report:
    from packcli.report import ladder, paper, render, rows

    if format_ == "ladder" and not plan.ladders:
        raise ConfigError(f"`{plan.name}` names no ladder", "list arms in order under `ladders:` (docs/ladder.md)")
    collected = rows.collect(plan, store)
    beside = paper.compare(plan, collected) if against else None
    match format_:
        case "table":
            console.show(render.table(collected, beside, everything=everything))
        case "md":
            typer.echo(render.markdown(collected, beside, everything=everything))
        case "csv":
            typer.echo(render.csv_text(collected, beside), nl=False)
        case "latex":
            typer.echo(render.latex_text(collected, beside, everything=everything), nl=False)
        case "json":
            typer.echo(render.json_text(collected, beside, ladder.climb(plan, collected)))
        case "ladder":
            ladders = ladder.climb(plan, collected)
            console.show(render.drawn(ladder.sheets(ladders), ladder.notes(ladders)))
        case "html":
            from packcli.report.page import write

            typer.echo(write.document(plan, store, collected, beside, everything=everything), nl=False)
    return collected


def refuse_damaged(collected: Report) -> None:
    if damaged := collected.damaged():
        raise IntegrityError("\n".join(damaged), "delete what is named and run the sweep again")
