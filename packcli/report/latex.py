"""The sheets of a report as LaTeX, to be read in with `\\input`: tables as booktabs has them, then the notes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from packcli.report.sheets import Cell, Sheet

HEAD = r"""% Written by `packcli report --format latex`. In the preamble: \usepackage{booktabs,graphicx}
% Labels in other than Latin letters need xelatex or lualatex."""
_FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
_SIGNS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    # After the end of a row both would be read as its options.
    "[": "{[}",
    "*": "{*}",
}
_SIGNS |= {sign: f"\\{sign}" for sign in "{}$&#_%"}


def text(sheets: Iterable[Sheet], notes: Iterable[str], verdict: str) -> str:
    """Tables, notes and verdict; `notes` and the lines of `verdict` become paragraphs."""
    parts = [HEAD, *map(_table, sheets)]
    parts += [rf"\par{{\footnotesize {escaped(note)}}}" for note in notes]
    parts += [rf"\par {escaped(line)}" for line in verdict.split("\n")]
    return "\n\n".join(parts) + "\n"


def escaped(plain: str) -> str:
    """Text that LaTeX prints as it is, what stands between backticks in type of one width."""
    signs = "".join(_SIGNS.get(sign, sign) for sign in plain)
    return re.sub(r"`([^`]*)`", r"\\texttt{\1}", signs).replace("`", r"\textasciigrave{}")


def _table(sheet: Sheet) -> str:
    body = list(_lines([name.split("\n") for name in sheet.header]))
    for setting, rows in sheet.blocks:
        body.append(r"\midrule")
        if setting:
            body.append(rf"\multicolumn{{{len(sheet.header)}}}{{l}}{{\textit{{{escaped(setting)}}}}} \\")
        for row in rows:
            body += _lines([_cell(cell) for cell in row], already=True)
    columns = "l" + "r" * (len(sheet.header) - 1)
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption{{{escaped(sheet.title)}}}",
            _FITTED,
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
        ]
    )


def _lines(cells: Sequence[Sequence[str]], *, already: bool = False) -> Iterable[str]:
    """A row of the table for each line of its cells. `already`: they are LaTeX."""
    for line in zip_longest(*cells, fillvalue=""):
        yield " & ".join(part if already else escaped(part) for part in line) + r" \\"


def _cell(cell: Cell) -> list[str]:
    own = [_number(line) for line in cell.text.split("\n") if line]
    change = [_number(line) for line in cell.change.split("\n") if line]
    return [*own, *(rf"\textbf{{{line}}}" if cell.shown else line for line in change)]


def _number(line: str) -> str:
    """With the sign of a negative number as long as that of a positive one."""
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped(line))
