"""Every format of one report, as it was last looked at: `sweeps/tiny.yaml --only seed=0`, a task and the probes.

`tests/golden/report/report.json` is what the other files are drawn from. When a change of them is meant:
`python tests/test_report_golden.py [REPORT.json]`, then look at the difference.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from packcli.report import render
from packcli.report.records import Report

GOLDEN = Path(__file__).parent / "golden" / "report"


def terminal(report: Report, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, force_terminal=False)
    console.print(render.table(report))
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"


FORMATS: dict[str, Callable[[Report], str]] = {
    "report.json": lambda report: render.json_text(report) + "\n",
    "report.csv": render.csv_text,
    "report.md": render.markdown,
    "report.tex": render.latex_text,
    "all.md": lambda report: render.markdown(report, everything=True),
    "terminal_80.txt": lambda report: terminal(report, 80),
    "terminal_140.txt": lambda report: terminal(report, 140),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_changes_unseen(name: str) -> None:
    report = Report.model_validate_json((GOLDEN / "report.json").read_bytes())
    assert FORMATS[name](report) == (GOLDEN / name).read_text(encoding="utf-8")


def test_golden_holds_no_file_that_is_gone() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(FORMATS)


@pytest.mark.parametrize("width", [80, 140])
def test_a_line_is_wider_than_the_terminal(width: int) -> None:
    text = (GOLDEN / f"terminal_{width}.txt").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= width


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN / "report.json"
    found = Report.model_validate_json(source.read_bytes())
    for name, text in FORMATS.items():
        (GOLDEN / name).write_text(text(found), encoding="utf-8")
