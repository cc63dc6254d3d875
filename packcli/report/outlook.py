"""What `packcli prepare --plan` prints: a table of arms, the lengths as a picture, and the arm we would take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from packcli.config import ARMS, ArmSpec
from packcli.data import outlook
from packcli.data.outlook import Advice, Distribution, Outlook, Outlooks
from packcli.plan import Plan

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 44


def collect(plan: Plan, looked: Outlooks, *, batch: int, tokenizer: str) -> dict[str, Any]:
    """The JSON document: every number of the table, the histogram of lengths, the advice."""
    arms = {cell.labels["arm"]: plan.trains[cell.train].arm for cell in plan.cells}
    advice = outlook.advise(looked.cells, arms)
    return {
        "tokenizer": tokenizer,
        "global_batch": batch,
        "documents": [item.model_dump() for item in looked.distributions.values()],
        "rejected": sum(looked.rejected.values()),
        "cells": [cell.model_dump() for cell in looked.cells],
        "advice": advice.model_dump() if advice else None,
    }


def render(document: dict[str, Any]) -> Group:
    """Everything, for a terminal or a pipe."""
    from rich.console import Group
    from rich.text import Text

    cells = [Outlook.model_validate(cell) for cell in document["cells"]]
    parts: list[Any] = [_lengths(Distribution.model_validate(item)) for item in document["documents"]]
    for max_length in sorted({cell.max_length for cell in cells}):
        own = [cell for cell in cells if cell.max_length == max_length]
        parts += [_table(max_length, own, document["global_batch"]), _picture(own), Text()]
    parts.append(_legend(document))
    if document.get("paper"):
        parts.append(_paper(document["paper"]))
    if document["advice"]:
        parts.append(_advice(Advice.model_validate(document["advice"]), cells, document["global_batch"]))
    return Group(*parts)


def _lengths(found: Distribution) -> Text:
    from rich.text import Text

    most = max(found.counts, default=0)
    bars = "".join(_BARS[-(-count * 8 // most)] if most else " " for count in found.counts)
    text = Text(f"{found.documents:,} conversations, {found.tokens:,} tokens\n")
    text.append(f"tokens per conversation: median {found.median:,.0f}, mean {found.mean:,.0f}, ")
    text.append(f"90% up to {found.p90:,.0f}, 99% up to {found.p99:,.0f}, longest {found.longest:,}\n")
    first, last = (round(found.edges[0]), found.longest) if found.counts else (0, 0)
    text.append(f"{first:,} ").append(bars, style="cyan").append(f" {last:,} tokens (log scale)\n")
    return text


def _table(max_length: int, cells: list[Outlook], batch: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"rows of {max_length:,} tokens, one epoch", title_justify="left")
    table.add_column("arm", no_wrap=True)
    for name in (
        "rows",
        "fewest\npossible",
        "efficiency",
        "convs\n/ row",
        "convs\ncut",
        "tokens lost\ncut",
        "\ndropped",
    ):
        table.add_column(name, justify="right")
    table.add_column(f"steps of\n{batch} rows", justify="right")
    table.add_column("convs\n/ step", justify="right")
    table.add_column("sum of\nlength²", justify="right")
    for cell in cells:
        if cell.ledger is None:
            table.add_row(cell.arm, "none", *[""] * 9)
            continue
        ledger = cell.ledger
        table.add_row(
            cell.arm,
            f"{ledger['rows']:,}",
            f"{ledger['rows_lower_bound']:,}",
            f"{ledger['efficiency']:.2%}",
            f"{cell.conversations_per_row:.2f}",
            f"{ledger['documents_cut']:,}",
            f"{ledger['tokens_truncated']:,}",
            f"{ledger['tokens_dropped']:,}",
            f"{cell.steps_per_epoch:,}",
            f"{cell.documents_per_step:,.0f}",
            f"{cell.sum_squares:.2e}",
        )
    return table


def _picture(cells: list[Outlook]) -> Text:
    """Slots of each arm as a bar to scale: kept tokens, then padding."""
    from rich.text import Text

    made = [cell for cell in cells if cell.ledger]
    most = max((cell.made["slots"] for cell in made), default=1)
    text = Text()
    for cell in made:
        kept = round(_WIDTH * cell.made["tokens_kept"] / most)
        padding = round(_WIDTH * cell.made["slots"] / most) - kept
        text.append(f"  {cell.arm:<18}").append("█" * kept, style="green").append("░" * padding, style="red")
        text.append(f" {cell.made['slots']:,} slots\n")
    return text


def _legend(document: dict[str, Any]) -> Text:
    from rich.text import Text

    shown = {cell["arm"] for cell in document["cells"]}
    crossing = (
        [name for name in shown if ArmSpec.model_validate(ARMS[name]).attention == "causal"]
        if shown <= set(ARMS)
        else []
    )
    text = Text(
        "█ kept tokens  ░ padding  convs: conversations  sum of length²: what attention costs, in tokens²\n"
    )
    for problem in dict.fromkeys(cell["problem"] for cell in document["cells"] if cell["problem"]):
        text.append(f"none: {problem}\n")
    if document["rejected"]:
        text.append(f"{document['rejected']:,} conversations cannot be used (packcli prepare names them)\n")
    if crossing:
        text.append(f"attention crosses documents in: {', '.join(sorted(crossing))}\n")
    text.append(f"tokenizer: {document['tokenizer']}\n")
    return text


def _paper(checks: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title="optimizer steps of the paper's runs: with these rows, and printed",
        title_justify="left",
        caption="Valid for the Llama-3 tokenizer with --template llama3. See docs/paper-steps.md.",
        caption_justify="left",
    )
    for name in ("model", "arm", "from these rows", "printed", ""):
        table.add_column(name, justify="left" if name in ("model", "arm", "") else "right")
    for item in checks:
        passed = "[green]pass[/]" if item["passed"] else "[red]fail[/]"
        table.add_row(item["model"], item["arm"], f"{item['steps']:,}", f"{item['printed']:,}", passed)
    return table


def _advice(advice: Advice, cells: list[Outlook], batch: int) -> Text:
    from rich.text import Text

    own = next(cell for cell in cells if cell.arm == advice.arm and cell.max_length == advice.max_length)
    text = Text().append(f"We would take `{advice.arm}` at {advice.max_length:,} tokens a row", style="bold")
    text.append(":\n" + "".join(f"  - {reason}\n" for reason in advice.reasons))
    if own.conversations_per_row and own.conversations_per_row > 1:
        text.append(
            f"  - 1 row = {own.conversations_per_row:.1f} conversations, so {batch} rows = "
            f"{own.documents_per_step:,.0f} conversations a step; to compare with padding at {batch}, set\n"
            f"    train.batch_unit: documents, train.global_batch: {batch}\n"
        )
    return text
