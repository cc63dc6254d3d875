"""A report as a terminal table, markdown, LaTeX, CSV or JSON. All hold the same numbers; none adds one."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from packcli.log import plain, plain_json
from packcli.report import fit, latex, notes, sheets, words
from packcli.report.ladder import Ladder
from packcli.report.paper import Against
from packcli.report.records import Report
from packcli.report.sheets import Cell, Sheet

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table
    from rich.text import Text

_GAP = 2  # between columns
_FORMULA = ("=", "+", "-", "@")  # a tab or line break before one of them is shown as `\t`
_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")
_FRACTIONS = frozenset(
    {"score", "stderr", "stderr_items", "average", "delta", "detectable", "efficiency", "mfu"}
    | {"interval_low", "interval_high", "low", "high"}
)


def table(report: Report, against: Against | None = None, *, everything: bool = False) -> RenderableType:
    """What the arms score and what they cost; then legend and verdict. `everything`: more columns."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(words.plain_lines(report.sweep), style="bold"), Text()]
    for sheet in _sheets(report, against, everything):
        parts.append(_Drawn(sheet))
    for lines in _notes(report, against):
        parts += [*(Text(line, style="dim") for line in lines), Text()]
    # Text, never markup: a label may hold `[x]`.
    return Group(*parts, Text(words.plain_lines(report.verdict)))


def drawn(found: Sequence[Sheet], lines: Sequence[str]) -> RenderableType:
    """Any sheets and what stands below them, for a terminal."""
    from rich.console import Group
    from rich.text import Text

    return Group(*map(_Drawn, found), *(Text(line, style="dim") for line in lines))


def _sheets(report: Report, against: Against | None, everything: bool) -> list[Sheet]:
    beside = against.sheet() if against else None
    return [*sheets.sheets(report, everything=everything), *([beside] if beside else [])]


def _notes(report: Report, against: Against | None) -> list[list[str]]:
    found = [notes.problems(report), notes.legend(report), against.legend() if against else []]
    return [lines for lines in found if lines]


class _Drawn:
    """A sheet as wide as the terminal: a number is never cut, further columns go into a further table.

    Settings are lines of their own, so that a long one widens no column.
    """

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        sheet = self.sheet
        rows = [row for _, block in sheet.blocks for row in block]
        columns = [
            (name, ["\n".join(row[number].lines) for row in rows]) for number, name in enumerate(sheet.header)
        ]
        widths = [fit.width(column) for column in columns]
        yield Text(sheet.title, style="bold")
        for chosen in fit.split([width + _GAP for width in widths], options.max_width + _GAP):
            yield _table(sheet.header, [], [0, *chosen], widths, head=True)
            for setting, block in sheet.blocks:
                if setting:
                    yield Text(f" {setting}", style="italic")
                yield _table(sheet.header, block, [0, *chosen], widths, head=False)
            yield Text()


def _table(
    header: Sequence[str], rows: Sequence[Sequence[Cell]], chosen: list[int], widths: list[int], *, head: bool
) -> Table:
    """The columns `chosen`, as wide as `widths` says. A head alone ends in a line."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        box=box.SIMPLE_HEAD, show_header=head, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0)
    )
    for number in chosen:
        justify: Any = "right" if number else "left"
        shown.add_column(Text(header[number]), justify=justify, no_wrap=True, min_width=widths[number])
    for row in rows:
        shown.add_row(*(_cell(row[number]) for number in chosen))
    return shown


def _cell(cell: Cell) -> Text:
    from rich.text import Text

    style = {"+": "green", "-": "red"}.get(cell.change[:1], "")
    change = Text(cell.change, style=f"bold {style}" if cell.shown else style)
    return Text("\n").join(part for part in (Text(cell.text), change) if part)


def markdown(report: Report, against: Against | None = None, *, everything: bool = False) -> str:
    """The same tables and sentences as GitHub markdown."""
    lines = [f"# {_md(report.sweep)}", ""]
    for sheet in _sheets(report, against, everything):
        lines += [f"## {_md(sheet.title)}", ""]
        aligned = ["---", *["---:"] * (len(sheet.header) - 1)]
        body = [[_md(name.replace("-\n", "").replace("\n", " ")) for name in sheet.header], aligned]
        for setting, block in sheet.blocks:
            if setting:
                body.append([f"*{_md(setting)}*", *[""] * (len(sheet.header) - 1)])
            body += [["<br>".join(_md_lines(cell)) for cell in row] for row in block]
        lines += [*(f"| {' | '.join(line)} |" for line in body), ""]
    for noted in _notes(report, against):
        lines += [*(f"- {_md_prose(note)}" for note in noted), ""]
    verdict = [f"{_md_prose(line)}\n" for line in report.verdict.split("\n")]
    return "\n".join([*lines, *verdict]).rstrip() + "\n"


def _md_lines(cell: Cell) -> list[str]:
    change = [_md(line) for line in cell.change.split("\n")] if cell.change else []
    return [
        *(_md(line) for line in cell.text.split("\n") if line),
        *(f"**{x}**" if cell.shown else x for x in change),
    ]


def _md_prose(text: str) -> str:
    """The same of a sentence, in which `code` needs nothing."""
    parts = text.split("`")
    return "`".join(part if number % 2 else _md(part) for number, part in enumerate(parts))


def _md(text: str) -> str:
    """Text that no markdown reader takes for a table border, HTML or emphasis."""
    for sign in "\\|<*_":
        text = text.replace(sign, f"\\{sign}")
    return text


def latex_text(report: Report, against: Against | None = None, *, everything: bool = False) -> str:
    """The same tables and sentences for a LaTeX document."""
    noted = [note for lines in _notes(report, against) for note in lines]
    return latex.text(_sheets(report, against, everything), noted, words.plain_lines(report.verdict))


def csv_text(report: Report, against: Against | None = None) -> str:
    """One line a cell, then one a group, in full precision; columns are the paths of the JSON, with units.

    Then one for each number of the paper, where it is compared with.
    """
    records = [_flat(row.model_dump(mode="json"), "cell") for row in report.rows]
    records += [_flat(group.model_dump(mode="json"), "group") for group in report.groups]
    records += [_flat(one.model_dump(mode="json"), "paper") for one in against.numbers] if against else []
    columns = list(dict.fromkeys(column for record in records for column in record))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_csv_field(_with_unit(column)) for column in columns)
    writer.writerows([_csv_field(record.get(column, "")) for column in columns] for record in records)
    return text.getvalue()


def _csv_field(value: Any) -> Any:
    """Numbers as they are. Text that a spreadsheet would run as a formula gets a `'` before it, as spreadsheets
    write text themselves; control characters are shown."""
    if not isinstance(value, str):
        return value
    shown = plain(value)
    return f"'{shown}" if shown[:1] in _FORMULA and not _NUMBER.fullmatch(shown) else shown


def _flat(record: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Nested mappings as dotted keys; null and empty lists are left out."""
    found: dict[str, Any] = {"kind": kind}
    _flatten(record, "", found)
    return found


def _flatten(record: Mapping[str, Any], path: str, found: dict[str, Any]) -> None:
    for key, value in record.items():
        if value is None:
            continue
        match value:
            case dict():
                _flatten(value, f"{path}{key}.", found)
            case list():
                found.update(_listed(path + key, value))
            case _:
                found[path + key] = value


def _listed(path: str, values: list[Any]) -> dict[str, Any]:
    """A pair of numbers as `_low` and `_high`; texts and failures in one cell."""
    if path == "failures":
        return {path: "; ".join(f"{item['stage']}: {item['cause']}" for item in values)}
    if not values or path == "probes":  # a group's: its cells have lines of their own
        return {}
    if isinstance(values[0], str):
        return {path: "; ".join(values)}
    return {f"{path}_low": values[0], f"{path}_high": values[1]}


def _with_unit(column: str) -> str:
    """`average (fraction)`; names that end in `_s` or count something say their unit themselves."""
    name = column.rpartition(".")[2]
    if name in _FRACTIONS or (".health." in column and name != "mean_tokens"):
        return f"{column} (fraction)"
    return f"{column} (nats per token)" if "_loss" in name else column


def json_text(
    report: Report, against: Against | None = None, ladders: Sequence[Ladder] = (), *, indent: bool = True
) -> str:
    """The contract's JSON, keys in the order of the contract."""
    document = report.model_dump(mode="json")
    if ladders:
        document["ladders"] = [one.model_dump(mode="json") for one in ladders]
    if against is not None:
        document["against"] = against.model_dump(mode="json")
    return plain_json(orjson.dumps(document, option=orjson.OPT_INDENT_2 if indent else None).decode())
