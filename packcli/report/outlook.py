"""What `packcli prepare --plan` prints: a table of arms, the lengths as a picture, and the arm we would take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from packcli.data import outlook
from packcli.data.outlook import Advice, Distribution, Outlook, Outlooks
from packcli.plan import Plan
from packcli.report.fit import Fitted

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 44


def collect(plan: Plan, looked: Outlooks, *, tokenizer: str) -> dict[str, Any]:
    """The JSON document: every number of the table, the histogram of lengths, the advice."""
    arms = {cell.labels["arm"]: plan.trains[cell.train].arm for cell in plan.cells}
    longest = max(found.longest for found in looked.distributions.values())
    advice = outlook.advise(looked.cells, arms, longest)
    return {
        "tokenizer": tokenizer,
        "documents": [item.model_dump() for item in looked.distributions.values()],
        "rejected": sum(looked.rejected.values()),
        "crossing": [name for name, arm in arms.items() if arm.attention == "causal"],
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
        parts += [_table(max_length, own), _picture(own), Text()]
    parts.append(_legend(document))
    if document.get("paper"):
        parts.append(_paper(document["paper"]))
    if document["advice"]:
        parts.append(_advice(Advice.model_validate(document["advice"]), cells))
    return Group(*parts)


def _lengths(found: Distribution) -> Text:
    from rich.text import Text

    most = max(found.counts, default=0)
    bars = "".join(_BARS[-(-count * 8 // most)] if most else " " for count in found.counts)
    text = Text(f"{found.documents:,} conversations, {found.tokens:,} tokens\n")
    text.append(f"tokens per conversation: median {found.median:,.0f}, mean {found.mean:,.0f}, ")
    text.append(f"90% up to {found.p90:,.0f}, 99% up to {found.p99:,.0f}, longest {found.longest:,}\n")
    first, last = (round(found.edges[0]), found.longest) if found.counts else (0, 0)
    text.append(f"{first:,} ").append(bars, style="cyan").append(f" {last:,} tokens (lengths on a log scale)\n")
    return text


def _table(max_length: int, cells: list[Outlook]) -> Fitted:
    def column(header: str, key: Callable[[Outlook], str]) -> tuple[str, list[str]]:
        return header, [key(cell) if cell.ledger else "none" if header == "rows" else "" for cell in cells]

    def counted(header: str, key: str) -> tuple[str, list[str]]:
        return column(header, lambda cell: f"{cell.made[key]:,}")

    return Fitted(
        [
            ("arm", [cell.arm for cell in cells]),
            counted("rows", "rows"),
            counted("fewest\npossible", "rows_lower_bound"),
            column("efficiency", lambda cell: f"{cell.made['efficiency']:.2%}"),
            column("convs\n/ row", lambda cell: f"{cell.conversations_per_row:.2f}"),
            counted("convs\ncut", "documents_cut"),
            counted("tokens\ncut off", "tokens_truncated"),
            counted("tokens\ndropped", "tokens_dropped"),
            column("steps", lambda cell: f"{cell.steps_per_epoch:,}"),
            column("convs\n/ step", lambda cell: f"{cell.documents_per_step:,.0f}"),
            column("sum of\nlength²", lambda cell: f"{cell.sum_squares:.2e}"),
        ],
        title=f"rows of {max_length:,} tokens, one epoch",
    )


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

    text = Text(
        "█ kept tokens  ░ padding  convs: conversations  sum of length²: what attention costs, in tokens²\n"
    )
    batches = dict.fromkeys(f"{cell['global_batch']:,} {cell['batch_unit']}" for cell in document["cells"])
    text.append(f"a step holds {' or '.join(batches)}; the last one of an epoch may be smaller\n")
    text.append("dropped: left without a token to learn, or lost by what the arm does\n")
    held = max((cell["ledger"]["documents_validation"] for cell in document["cells"] if cell["ledger"]), default=0)
    if held:
        text.append(f"held out for validation, and in no row: {held:,} conversations\n")
    for problem in dict.fromkeys(cell["problem"] for cell in document["cells"] if cell["problem"]):
        text.append(f"no row: {problem}\n")
    if document["rejected"]:
        text.append(f"{document['rejected']:,} conversations cannot be used (packcli prepare names them)\n")
    if document["crossing"]:
        text.append(f"attention crosses documents in: {', '.join(document['crossing'])}\n")
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


def _advice(advice: Advice, cells: list[Outlook]) -> Text:
    from rich.text import Text

    own = next(cell for cell in cells if cell.arm == advice.arm and cell.max_length == advice.max_length)
    text = Text().append(f"We would take `{advice.arm}` at {advice.max_length:,} tokens a row", style="bold")
    text.append(":\n" + "".join(f"  - {reason}\n" for reason in advice.reasons))
    if own.batch_unit == "rows" and own.conversations_per_row and own.conversations_per_row > 1:
        each, held = own.conversations_per_row, own.conversations_per_row * own.global_batch
        step = f"a step of {own.global_batch} rows holds {held:,.0f} of them"
        text.append(f"  - 1 row = {each:.1f} conversations: {step}; to compare with padding at equal\n")
        text.append("    conversations a step, set train.batch_unit: documents\n")
    return text
