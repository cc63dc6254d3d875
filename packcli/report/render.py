"""A report as a terminal table, markdown, CSV or JSON. All four hold the same numbers; none adds one."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

import orjson

from packcli.report import sheets, words
from packcli.report.records import Report
from packcli.report.sheets import Sheet

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

NAMES_WIDTH = 33
_FRACTIONS = frozenset(
    {"score", "stderr", "stderr_items", "average", "delta", "detectable", "efficiency", "mfu"}
    | {"interval_low", "interval_high", "low", "high"}
)


def table(report: Report) -> RenderableType:
    """For each setting what the arms cost and what they score; then legend and verdict."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for title, found in sheets.sections(report):
        parts.append(Text(title, style="bold"))
        parts.extend(_table(sheet) for sheet in found)
    for lines in (sheets.not_done(report), sheets.legend(report)):
        if lines:
            parts += [*(Text(line, style="dim") for line in lines), Text()]
    # Text, never markup: a label may hold `[x]`.
    return Group(*parts, Text(words.plain_lines(report.verdict)))


def _table(sheet: Sheet) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = max(len(line[0]) for line in [sheet.header, *sheet.lines])
    shown.add_column(Text(sheet.header[0]), min_width=min(names, NAMES_WIDTH), overflow="fold")
    for arm in sheet.header[1:]:
        shown.add_column(Text(arm), justify="right", overflow="fold")
    for line in sheet.lines:
        shown.add_row(*(Text(value) for value in line))
    return shown


def markdown(report: Report) -> str:
    """The same tables and sentences as GitHub markdown."""
    lines = [f"# {_cell(report.sweep)}", ""]
    for title, found in sheets.sections(report):
        lines += [f"## {_cell(title)}", ""]
        for sheet in found:
            aligned = ["---", *["---:"] * (len(sheet.header) - 1)]
            body = [sheet.header, aligned, *sheet.lines]
            lines += [*(f"| {' | '.join(map(_cell, line))} |" for line in body), ""]
    for notes in (sheets.not_done(report), sheets.legend(report)):
        lines += [*(f"- {_cell(note)}" for note in notes), ""]
    return "\n".join([*lines, *(f"{line}\n" for line in report.verdict.split("\n"))]).rstrip() + "\n"


def _cell(text: str) -> str:
    """Text that no markdown reader takes for a table border, HTML or emphasis."""
    for sign in "\\|<*":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", "<br>")


def csv_text(report: Report) -> str:
    """One line a cell, then one a group, in full precision; columns are the paths of the JSON, with units."""
    records = [{"kind": "cell", **_flat(row.model_dump(mode="json"))} for row in report.rows]
    records += [{"kind": "group", **_flat(group.model_dump(mode="json"))} for group in report.groups]
    columns = list(dict.fromkeys(column for record in records for column in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writerow({column: _with_unit(column) for column in columns})
    writer.writerows(records)
    return text.getvalue()


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; a pair of numbers as `_low` and `_high`; null is left out."""
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else key).items()
        }
    if path == "failures":
        return {path: "; ".join(f"{item['stage']}: {item['cause']}" for item in value)}
    if path.endswith(".protocols"):
        return {path: "; ".join(value)}
    if path == "probes" and isinstance(value, list):  # a group's: its cells have lines of their own
        return {}
    if isinstance(value, list):
        return {f"{path}_low": value[0], f"{path}_high": value[1]}
    return {} if value is None else {path: value}


def _with_unit(column: str) -> str:
    """`average (fraction)`; names that end in `_s` or count something say their unit themselves."""
    name = column.rpartition(".")[2]
    if name in _FRACTIONS or (".health." in column and name != "mean_tokens"):
        return f"{column} (fraction)"
    return f"{column} (nats per token)" if "_loss" in name else column


def json_text(report: Report) -> str:
    """The contract's JSON, indented, keys in the order of the contract."""
    return orjson.dumps(report.model_dump(mode="json"), option=orjson.OPT_INDENT_2).decode()
