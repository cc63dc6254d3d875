"""What `packcli eval` prints: one line a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from packcli.log import plain
from packcli.report import words
from packcli.report.notes import TRUNCATED

if TYPE_CHECKING:
    from rich.table import Table


def table(results: Sequence[dict[str, Any]]) -> Table:
    """Score and standard error in percent, and how many items that counts."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    for header in ("task", "metric", "score, %", "± s.e.", "items", "of", "health"):
        shown.add_column(header, justify="left" if header in ("task", "metric", "health") else "right")
    for result in results:
        health = ", ".join(_health(name, value) for name, value in result["health"].items())
        partial = "" if result["n"] == result["n_total"] else " (partial)"
        shown.add_row(
            escape(result["task"]),
            escape(result["metric"]),
            f"{100 * result['score']:.1f}",
            words.error(result["stderr"]),
            f"{result['n']:,}{partial}",
            f"{result['n_total']:,}",
            escape(health),
        )
    return shown


def line(result: dict[str, Any]) -> str:
    """One task as it ends."""
    if "score" not in result:
        return plain(f"{result['task']}: done")
    return plain(f"{result['task']}: {100 * result['score']:.1f} ({result['n']:,} of {result['n_total']:,} items)")


def notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """Scores not to be trusted; what a judged one rests on: rule, judge, what failed and what it cost."""
    lines = [
        f"do not trust {result['task']}: {share:.0%} of its prompts did not fit into the model and lost their "
        "beginning"
        for result in results
        if (share := result["health"].get("truncated", 0.0)) > TRUNCATED
    ]
    for result in results:
        for name, found in result.get("judged", {}).items():
            stated = result["protocol"]
            called = ", ".join(stated["judge_says_it_is"]) or "it did not say"
            score = "no score" if found["score"] is None else f"{found['score']:.2f}"
            stderr = "" if found["stderr"] is None else f" ± {found['stderr']:.2f}"
            cost = "cost unknown" if found["cost_usd"] is None else f"{found['cost_usd']:.4f} USD"
            failed = "".join(f", {kind} {count}" for kind, count in found["failures"].items())
            lines.append(
                f"{result['task']} {name}: {score}{stderr} ({found['metric']}) from {found['n']:,} of "
                f"{found['n_total']:,} verdicts{failed}; judge {stated['judge']} at {stated['judge_host']} "
                f"(called itself: {called}), {cost}. {found['rule']}. {found['reason']}".rstrip()
            )
    return [plain(line) for line in lines]


def _health(name: str, value: float) -> str:
    """`cut 3%`: a share of the items; but `mean_tokens` is a length."""
    if name == "mean_tokens":
        return f"mean length {value:,.0f} tokens"
    return f"{name} {100 * value:.1f}" if name in _SCORES else f"{name} {value:.0%}"


_SCORES = ("task_macro", "wb_reward")
"""Scores beside the headline: of 100, but no shares."""
