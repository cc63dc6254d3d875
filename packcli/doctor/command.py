"""`packcli doctor`: every check there is, as a document and as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packcli import log
from packcli.doctor import checks, cluster, computing, machine, network, scoring, storage
from packcli.doctor.checks import Check, Finding
from packcli.doctor.sweep import Sweep
from packcli.launch.profile import Profile

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {"ok": "green", "missing": "yellow", "failed": "bold red"}


def examine(runs: Path, sweep: Sweep | None, profile: Profile | None) -> list[Finding]:
    """What every check found, in a fixed order, with progress on stderr."""
    asked = _checks(runs, sweep, profile)
    with log.progress() as display:
        bar = display.add_task("checks", total=len(asked), note="")

        def note(done: int, total: int, waiting: str) -> None:
            display.update(bar, completed=done, total=total, note=waiting)

        found = checks.run(asked, note)
    needs: dict[str, str] = sweep.needs() if sweep else {}
    if profile is not None:
        jobs = f"jobs as {profile.name} asks for them"
        names = [
            one.name for one in found if one.name in ("slurm", "extra slurm") or one.name.startswith("profile")
        ]
        needs = dict.fromkeys(names, jobs) | needs
    return [replace(one, needed_by=needs.get(one.name, "")) for one in found]


def _checks(runs: Path, sweep: Sweep | None, profile: Profile | None) -> list[Check]:
    places = [*storage.checks(runs), *(sweep.checks() if sweep else [])]
    every = [
        *machine.checks(),
        *computing.checks(),
        *scoring.checks(sweep.bench_data() if sweep else ()),
        *cluster.checks(profile),
        *places,
        *network.checks(sweep.servers() if sweep else {}),
    ]
    return list(
        {check.name: check for check in every}.values()
    )  # a sweep's look at the disk replaces the plain one


def is_well(findings: Iterable[Finding]) -> bool:
    """Nothing is broken, and all that was asked for is there."""
    return all(finding.is_well for finding in findings)


def document(findings: list[Finding]) -> dict[str, Any]:
    return {"checks": [asdict(finding) for finding in findings], "ok": is_well(findings)}


def table(findings: list[Finding]) -> Table:
    """One line a finding."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD)
    for header, least in (("check", 8), ("state", 7), ("found", 30), ("what it means", 20)):
        shown.add_column(header, min_width=least, no_wrap=header == "state", overflow="fold")
    for one in findings:
        means = f"{one.means}; needed by {one.needed_by}" if one.needed_by and one.state != "ok" else one.means
        state = Text(one.state, style=_STYLES[one.state])
        shown.add_row(escape(one.name), state, escape(one.found), escape(means.removeprefix("; ")))
    return shown


def lines(findings: list[Finding]) -> list[str]:
    """Below the table: what to type, what is broken or needed first; and how many of each."""
    todo = sorted((one for one in findings if one.fix), key=lambda one: (one.is_well, one.state == "ok"))
    width = max((len(one.name) for one in todo), default=0)
    advice = [f"  {one.name:<{width}}  {one.fix}" for one in todo]
    counts = ", ".join(f"{sum(one.state == state for one in findings)} {state}" for state in _STYLES)
    wanting = ", ".join(dict.fromkeys(one.name for one in findings if not one.is_well))
    return [
        *(["what to type:", *advice, ""] if advice else []),
        counts + (f"; to mend: {wanting}" if wanting else ""),
    ]
