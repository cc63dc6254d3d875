"""What stands below the sheets of a report: cells that are not done, and what the signs in the sheets mean."""

from __future__ import annotations

from packcli.log import plain
from packcli.report import words
from packcli.report.records import SIGNIFICANT, PooledScore, Report


def problems(report: Report) -> list[str]:
    """What a reader must know first: cells that are not done, numbers that cannot be true or be trusted."""
    return [*_cells(report), *unhealthy(report)]


def _cells(report: Report) -> list[str]:
    """One line for each cell that is not done, with the cause where a stage failed; many alike are one."""
    lines: dict[str, list[str]] = {}
    for row in report.rows:
        partial = {f"eval {task}" for task, score in row.eval.items() if score.left_out}
        for failure in row.failures:
            hint = f" ({failure.fix})" if failure.fix else ""
            what = "partial" if failure.stage in partial else "failed"
            lines.setdefault(plain(f"{what}, {failure.stage}: {failure.cause}{hint}"), []).append(
                words.name(row.labels)
            )
        for problem in row.physics:
            lines.setdefault(plain(f"wrong, cannot be true of a training: {problem}"), []).append(
                words.name(row.labels)
            )
        if not row.failures and row.state != "done":
            lines.setdefault(row.state, []).append(words.name(row.labels))
    return [f"{what}: {_few(cells)}" for what, cells in lines.items()]


def _few(cells: list[str], most: int = 3) -> str:
    more = f"; and {len(cells) - most} more" if len(cells) > most else ""
    return "; ".join(cells[:most]) + more


def legend(report: Report) -> list[str]:
    """What the signs in the sheets mean, only those that occur."""
    lines = [
        "rows to efficiency: of one epoch; efficiency = kept tokens / slots. "
        "useful tokens are document tokens, padded tokens all slots; both rates are by wall time, "
        "which grows when other work shares the machine (then it is well above CPU time)."
    ]
    if any(group.speedup for group in report.groups):
        lines.append(
            f"speed-up, fewer slots: {report.baseline} / the arm, over the seeds both have. "
            "Not clearly behind: its range over seeds overlaps the fastest arm's."
        )
        lines.append(
            "speed-up = fewer slots x time a slot, the baseline's over the arm's. Below 1x a slot takes longer: "
            "where a step holds few, as a step costs something whatever it holds (the optimizer), and where "
            "attention looks further."
        )
    if any(group.items for group in report.groups):
        lines.append("below a score: its difference to the baseline's on the same items, without an interval.")
    lines += _about_errors([score for group in report.groups for score in group.eval.values()])
    if any(group.interval for group in report.groups):
        lines.append(
            "difference [low, high]: mean over the seeds both have, paired by seed, and its 95% interval "
            "(Student's t) for this arm alone. p (Holm): corrected for all differences of this report; bold: "
            f"shown, that p is below {SIGNIFICANT}. Not shown does not mean none."
        )
        lines.append(
            "detectable effect: a true difference of that size is found in 80% of such sweeps, so corrected."
        )
    if any(group.average_items and not group.interval for group in report.groups):
        lines.append(
            "difference ([low, high]): 95% over test items, paired item by item, of these very models; it says "
            "nothing about other seeds, and so nothing about the arm."
        )
    if any(group.train and group.train.own_validation for group in report.groups):
        lines.append(
            "validation loss of own rows: of what that arm's packing put into the rows it held out, as the "
            "paper's code did; it compares with no other arm's."
        )
    if any(group.left_out for group in report.groups):
        lines.append("partial n/N: rows that this machine could not score; the score stands in no mean.")
    if any(group.probes for group in report.groups):
        lines.append(
            "attention across: to other documents of a row, of what does not go to the row's first token, mean "
            "over layers; 0 is exactly 0. more behind: what another document before it, seen without a mask, adds "
            "to that loss; nats per supervised token. Pictures: `packcli report --figures DIR`."
        )
    lines += _unlike_protocols(report)
    return [plain(line) for line in lines]


TRUNCATED = 0.01
"""Above this share of prompts that lost their beginning, a score is not what its protocol says."""


def unhealthy(report: Report) -> list[str]:
    """Scores of tasks whose prompts did not fit: what was asked is not what stands in the protocol."""
    found: dict[str, dict[str, float]] = {}
    for row in report.rows:
        for task, score in row.eval.items():
            if (share := score.health.get("truncated", 0.0)) > TRUNCATED:
                own = found.setdefault(task, {})
                arm = row.labels.get("arm", row.cell)
                own[arm] = max(own.get(arm, 0.0), share)
    return [
        plain(
            f"do not trust `{task}`: prompts did not fit into the model and lost their beginning "
            f"({', '.join(f'{arm} {share:.0%}' for arm, share in list(own.items())[:5])})"
        )
        for task, own in found.items()
    ]


def _unlike_protocols(report: Report) -> list[str]:
    """Tasks that some settings score by other rules than others, or some models by another judge."""
    used: dict[str, set[str]] = {}
    for group in report.groups:
        for task, score in group.eval.items():
            used.setdefault(task, set()).update(score.protocols)
    unlike = [task for task, protocols in used.items() if len(protocols) > 1]
    if not unlike:
        return []
    return [f"not all comparable, scored by different protocols or judges: {', '.join(unlike)}."]


def _about_errors(scores: list[PooledScore]) -> list[str]:
    lines = []
    if any(score.stderr is not None for score in scores):
        lines.append("a ± b: mean over seeds and its standard error, always on the same test items.")
    if any(score.stderr is None for score in scores):
        lines.append(
            "a (± b): a single seed; b is the standard error over test items, and says nothing about other seeds."
        )
    if any(score.partial for score in scores):
        lines.append(
            "(n/N): only n of N test items were scored, as `eval.limit` asks; not comparable with a full run."
        )
    return lines
