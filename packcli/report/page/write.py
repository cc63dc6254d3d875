"""A report as one HTML file: no request leaves it, and without a script it shows all but sorting and folding."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from typing import Any

from packcli import __version__
from packcli.log import plain
from packcli.plan import Plan
from packcli.report import gather, notes, pictures, words
from packcli.report.charts import Chart
from packcli.report.page import svg, tables
from packcli.report.paper import Against
from packcli.report.records import Report
from packcli.report.render import json_text
from packcli.store import Store

CELLS = 1_000
"""Single cells a page holds; groups are always all there."""
LINES = 8
"""Of the verdict, and of what is wrong or missing, that a page does not fold away."""
EARLY = 'document.documentElement.classList.add("scripted");'
"""Runs before the body is laid out: what is folded is not laid out first."""
OPEN = 3
"""Settings and data sets that lie open when the page does; the others one opens oneself."""


@dataclass(frozen=True, slots=True)
class Chapter:
    """Charts under one heading that folds."""

    title: str
    charts: list[Chart]
    open: bool


def document(
    plan: Plan, store: Store, report: Report, against: Against | None = None, *, everything: bool = False
) -> str:
    """The page as text, with tables and sentences of the other formats. Equal runs and reports give equal bytes.

    Labels, causes of failures and all other text may hold anything: the template escapes it, and the page's own
    policy lets a browser run no script but ours.
    """
    members = gather.Members(report.rows)
    single = tables.select(report, members, CELLS)
    origin = gather.provenance(plan, single.rows, store)
    drawn = pictures.pictures(plan, report, store, members)
    style, script = _asset("page.css"), _asset("page.js")
    beside = tables.beside_paper(against)
    page: str = _template().render(
        report=report,
        version=__version__,
        style=_raw(style),
        early=_raw(EARLY),
        script=_raw(script),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
        f"script-src {_hash(EARLY)} {_hash(script)}",
        data=_raw(_data(report, single, against)),
        note=" · ".join(gather.origin(plan, report)),
        counts=_counts(report),
        broken=any(row.failures or row.physics for row in report.rows) or bool(notes.unhealthy(report)),
        problems=notes.problems(report),
        verdict=words.plain_lines(report.verdict).split("\n"),
        lines=LINES,
        legend=notes.legend(report),
        comparison=[*tables.comparison(report, single, everything=everything), *([beside] if beside else [])],
        about_paper=against.legend() if against else [],
        single=len(single.rows),
        settings=_chapters(drawn.settings),
        sets=_chapters(drawn.sets),
        draw=lambda chart, id_: _raw(svg.draw(chart, id_)),
        left_out=_left_out(report, len(single.rows), drawn),
        provenance=[tables.stages(origin), tables.ids(single)],
        software=origin.software,
    )
    return page


def _chapters(found: list[tuple[str, pictures.Charts]]) -> list[Chapter]:
    return [Chapter(name, list(charts.values()), number < OPEN) for number, (name, charts) in enumerate(found)]


def _left_out(report: Report, single: int, drawn: pictures.Pictures) -> list[str]:
    """What a page of this sweep does not hold, and where it is."""
    found = drawn.left_out()
    if single < len(report.rows):
        found.append(
            f"Single cells: {single:,} of {len(report.rows):,}, those of the first groups. All are in "
            "`packcli report --format csv`."
        )
    if len(report.groups) > CELLS:
        found.append("Numbers that can be saved here: the groups are too many. `packcli report --format json`.")
    return found


def _counts(report: Report) -> str:
    states = Counter(row.state for row in report.rows)
    number = len(report.rows)
    return f"{number:,} cell{'' if number == 1 else 's'}: " + ", ".join(
        f"{count:,} {state}" for state, count in states.items()
    )


def _data(report: Report, single: tables.Shown, against: Against | None) -> str:
    """The report's JSON as far as the page shows it; as text that closes no script element."""
    groups = report.groups if len(report.groups) <= CELLS else ()
    held = report.model_copy(update={"rows": tuple(single.rows), "groups": groups})
    return json_text(held, against, indent=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (resources.files("packcli.report.page") / name).read_text(encoding="utf-8")


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"plain": plain, "coded": _coded, "lines": _lines}
    return environment.from_string(_asset("page.html.jinja"))


def _coded(text: str) -> Any:
    """What our sentences set in backticks, set as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _lines(text: str) -> Any:
    """What stands in several lines of a cell."""
    from markupsafe import Markup, escape

    return Markup("<br>").join(escape(line) for line in text.split("\n") if line)


def _raw(text: str) -> Any:
    """Text of ours that is markup already."""
    from markupsafe import Markup

    return Markup(text)


def _hash(text: str) -> str:
    """What a browser's policy calls a text by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
