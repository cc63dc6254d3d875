"""The tables of a page: the sheets of a report, below each arm its single cells; and where numbers come from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from packcli.log import plain
from packcli.report import groups, sheets, words
from packcli.report.gather import Members, Provenance
from packcli.report.paper import Against
from packcli.report.records import Group, Report, Row
from packcli.report.sheets import Cell

T = TypeVar("T")

UNFOLDED = 20
"""Settings that a page shows all at once: a browser takes seconds to lay out thousands of lines."""


@dataclass(frozen=True, slots=True)
class Line:
    """`single`: a cell of the line before; `part`: what that line goes on with."""

    name: str
    cells: list[Cell]
    kind: Literal["", "single", "part"] = ""


@dataclass(frozen=True, slots=True)
class Block:
    """Lines that are compared with each other. `folded`: only the setting is shown at first."""

    setting: str
    lines: list[Line]
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """`header`: a name for each column, the first that of the lines. `code`: ids, counted as in `Line.cells`."""

    id: str
    about: str
    header: list[str]
    blocks: list[Block]
    code: frozenset[int] = field(default_factory=frozenset)

    @property
    def title(self) -> str:
        return re.split("[,:;]", self.about)[0].capitalize()

    @property
    def sortable(self) -> list[bool]:
        """Whether each column can be: by names too, unless lines belong together."""
        lines = [line for block in self.blocks for line in block.lines]
        known = [any(line.cells[n].value is not None for line in lines) for n in range(len(self.header) - 1)]
        return [any(known), *known]


@dataclass(frozen=True, slots=True)
class Shown:
    """Which single cells a page holds: of the first groups, as many as fit in `most`."""

    members: Members
    labels: frozenset[frozenset[tuple[str, str]]]
    rows: list[Row]


def select(report: Report, members: Members, most: int) -> Shown:
    labels, rows = set(), list[Row]()
    for group in report.groups:
        own = members.of(group.labels)
        if len(rows) + len(own) > most:
            break
        labels.add(frozenset(group.labels.items()))
        rows += own
    return Shown(members, frozenset(labels), rows)


def comparison(report: Report, single: Shown, *, everything: bool) -> list[Table]:
    """What `sheets.py` shows of the groups, and the same of single cells."""
    settings = report.settings()
    alone = {row.cell: _alone(row) for row in single.rows}
    found = []
    for table in sheets.tables(report, everything=everything):
        blocks = []
        for setting, members in settings:
            lines = []
            for group in members:
                lines.append(_line(_summary_first(table, table.row(group))))
                if frozenset(group.labels.items()) in single.labels:
                    lines += [_single(table, row, alone[row.cell]) for row in single.members.of(group.labels)]
            blocks.append(Block(words.name(setting), lines, folded=len(settings) > UNFOLDED))
        found.append(Table(table.id, table.title, _summary_first(table, table.header), blocks))
    return found


def _alone(row: Row) -> Group:
    """A cell as a group of one, set against nothing; it keeps its seed."""
    (found,) = groups.pool([row], None, lambda *_: None)
    return found.model_copy(update={"labels": row.labels})


def _single(table: sheets.Table, row: Row, alone: Group) -> Line:
    name = f"seed {plain(row.labels['seed'])}" if "seed" in row.labels else "cell"
    return Line(name, _summary_first(table, table.row(alone))[1:], "single")


def _summary_first(table: sheets.Table, cells: list[T]) -> list[T]:
    """A screen may be narrow: what the columns come to is not where one must scroll to."""
    first = len(cells) - table.summary
    return [cells[0], *cells[first:], *cells[1:first]]


def _line(cells: Sequence[Cell]) -> Line:
    name = cells[0].text
    return Line(name.strip(), list(cells[1:]), "part" if name.startswith(" ") else "")


def beside_paper(against: Against | None) -> Table | None:
    """None where nothing is compared with the paper, or nothing has a counterpart."""
    if against is None or (sheet := against.sheet()) is None:
        return None
    blocks = [Block(setting, [_line(row) for row in rows]) for setting, rows in sheet.blocks]
    return Table("paper", sheet.title, sheet.header, blocks)


# Provenance --------------------------------------------------------------------------------------------


def _text(text: str, value: float | None = None) -> Cell:
    return Cell(plain(text), value=text if value is None else value)


def ids(single: Shown) -> Table:
    """The stages behind each single cell: name and id."""
    names = list(dict.fromkeys(name for row in single.rows for name in row.ids))
    lines = [Line(words.name(row.labels), [_text(row.ids.get(name, "")) for name in names]) for row in single.rows]
    return Table(
        "ids",
        "cells and their stages: the id of each stage of a cell",
        ["cell", *names],
        [Block("", lines)],
        frozenset(range(len(names))),
    )


def stages(found: Provenance) -> Table:
    """When, with what and on what each stage was made."""
    lines = [
        Line(
            stage.id,
            [
                *(_text(text) for text in (stage.kind, stage.what, stage.finished)),
                *(_text(str(number), number) for number in (stage.software, stage.version)),
                _text(stage.ran),
            ],
        )
        for stage in found.stages
    ]
    header = ["id", "stage", "of", "finished (UTC)", "software", "stage version", "ran on"]
    return Table("stages", "stages: when, with what and on what each was made", header, [Block("", lines)])
