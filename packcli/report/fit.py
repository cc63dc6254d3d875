"""Tables that fit a terminal: a number is never cut, further columns go into a further table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packcli import log

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions


_EDGES = 2  # of a table, left and right
_GAP = 3  # white space on both sides of a column, and between columns


@dataclass(frozen=True, slots=True)
class Fitted:
    """`columns`: (header, cells), the first one repeated in each table; an empty row is one of empty cells."""

    columns: Sequence[tuple[str, Sequence[str]]]
    title: str = ""
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        groups = split([width(column) + _GAP for column in self.columns], options.max_width - _EDGES)
        for number, group in enumerate(groups):
            yield _table(
                [self.columns[column] for column in (0, *group)],
                title=self.title if number == 0 else "",
                caption=self.caption if number == len(groups) - 1 else "",
            )


def split(widths: Sequence[int], available: int) -> list[list[int]]:
    """Columns 1 and up in as few tables of `available` characters as hold them, column 0 in each."""
    groups: list[list[int]] = [[]]
    used = widths[0]
    for column in range(1, len(widths)):
        if groups[-1] and used + widths[column] > available:
            groups.append([])
            used = widths[0]
        groups[-1].append(column)
        used += widths[column]
    return groups


def width(column: tuple[str, Sequence[str]]) -> int:
    header, cells = column
    return max(len(line) for text in (header, *cells) for line in text.split("\n"))


def _table(columns: Sequence[tuple[str, Sequence[str]]], title: str, caption: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", pad_edge=False)
    table.title, table.caption = _text(title), _text(caption)
    for number, (header, _) in enumerate(columns):
        table.add_column(_text(header), justify="right" if number else "left", no_wrap=True)
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*map(_text, row))
    return table


def _text(text: str) -> Any:
    """As it is, control characters shown: labels and paths may come from data."""
    from rich.text import Text

    return Text("\n".join(map(log.plain, text.split("\n")))) if text else None
