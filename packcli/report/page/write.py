"""A report as one HTML file: no request leaves it, and without a script it shows all but sorting and folding."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from typing import Any

import orjson

from packcli import __version__
from packcli.log import plain
from packcli.plan import Plan
from packcli.report import notes, words
from packcli.report.page import drawings, gather, tables
from packcli.report.page.drawings import Figure
from packcli.report.records import Report
from packcli.store import Store

CELLS = 1_000
"""Single cells a page holds; groups are always all there."""
SETTINGS = 24
"""Settings whose charts a page holds."""
SETS = 12
"""Token stores and row lengths whose lengths and ledgers a page holds."""
EARLY = 'document.documentElement.classList.add("scripted");'
"""Runs before the body is laid out: what is folded is not laid out first."""
OPEN = 3
"""Settings and data sets that lie open when the page does; the others one opens oneself."""


@dataclass(frozen=True, slots=True)
class Chapter:
    """Charts under one heading that folds."""

    title: str
    figures: list[Figure]
    open: bool


def document(plan: Plan, store: Store, report: Report) -> str:
    """The page as text. Equal runs and reports give equal bytes.

    Labels, causes of failures and all other text may hold anything: the template escapes it, and the page's own
    policy lets a browser run no script but ours.
    """
    members = gather.Members(report.rows)
    single = tables.select(report, members, CELLS)
    origin = gather.provenance(plan, single.rows, store)
    style, script = _asset("page.css"), _asset("page.js")
    sets, left = gather.data(plan, report, store, SETS)
    page: str = _template().render(
        report=report,
        version=__version__,
        style=_raw(style),
        early=_raw(EARLY),
        script=_raw(script),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
        f"script-src {_hash(EARLY)} {_hash(script)}",
        data=_raw(_data(report, single)),
        note=" · ".join(gather.origin(plan, report)),
        counts=_counts(report),
        verdict=words.plain_lines(report.verdict).split("\n"),
        not_done=notes.not_done(report),
        legend=notes.legend(report),
        comparison=tables.comparison(report, single),
        single=len(single.rows),
        settings=_settings(report, members, store),
        sets=[Chapter(one.name, drawings.of_data(one), number < OPEN) for number, one in enumerate(sets)],
        left_out=_left_out(report, len(single.rows), left),
        provenance=[tables.stages(origin), tables.ids(single)],
        software=origin.software,
    )
    return page


def _settings(report: Report, members: gather.Members, store: Store) -> list[Chapter]:
    found, bounds = [], drawings.bounds_of(report)
    for number, (setting, groups) in enumerate(report.settings()[:SETTINGS]):
        title = words.name(setting) or "all arms"
        figures = drawings.of_setting(report, groups, members, store, bounds)
        found.append(Chapter(title, figures, number < OPEN))
    return [chapter for chapter in found if chapter.figures]


def _left_out(report: Report, single: int, sets: int) -> list[str]:
    """What a page of this sweep does not hold, and where it is."""
    found, settings = [], len(report.settings())
    if single < len(report.rows):
        found.append(
            f"Single cells: {single:,} of {len(report.rows):,}, those of the first groups. All are in "
            "`packcli report --format csv`."
        )
    if len(report.groups) > CELLS:
        found.append("Numbers that can be saved here: the groups are too many. `packcli report --format json`.")
    if settings > SETTINGS:
        found.append(
            f"Charts: of the first {SETTINGS} of {settings:,} settings. Use `--only axis=value` for others."
        )
    if sets:
        found.append(f"Lengths and ledgers: {sets:,} more data sets or row lengths are not drawn.")
    return found


def _counts(report: Report) -> str:
    states = Counter(row.state for row in report.rows)
    number = len(report.rows)
    return f"{number:,} cell{'' if number == 1 else 's'}: " + ", ".join(
        f"{count:,} {state}" for state, count in states.items()
    )


def _data(report: Report, single: tables.Shown) -> str:
    """The report's JSON as far as the page shows it; as text that closes no script element."""
    groups = report.groups if len(report.groups) <= CELLS else ()
    held = report.model_copy(update={"rows": tuple(single.rows), "groups": groups})
    return orjson.dumps(held.model_dump(mode="json")).decode().replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (resources.files("packcli.report.page") / name).read_text(encoding="utf-8")


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"plain": plain, "coded": _coded}
    return environment.from_string(_asset("page.html.jinja"))


def _coded(text: str) -> Any:
    """What our sentences set in backticks, set as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _raw(text: str) -> Any:
    """Text of ours that is markup already."""
    from markupsafe import Markup

    return Markup(text)


def _hash(text: str) -> str:
    """What a browser's policy calls a text by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
