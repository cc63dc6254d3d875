"""What a report shows, as plain text cells: the terminal and markdown only draw it.

An arm is a column: eight tasks or a dozen costs side by side fit no terminal, and arms go on in a next sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from packcli.eval import protocol
from packcli.log import plain
from packcli.report import words
from packcli.report.records import Group, PooledScore, Report

ARMS_PER_SHEET = 5


@dataclass(frozen=True, slots=True)
class Sheet:
    """An arm a column. `lines`: a name with its unit, then one string an arm."""

    header: list[str]
    lines: list[list[str]]


def sections(report: Report) -> list[tuple[str, list[Sheet]]]:
    """A titled list of sheets for each setting, all in the order of the sweep."""
    found = []
    for setting, groups in report.settings():
        title = ": ".join(part for part in (plain(report.sweep), words.name(setting)) if part)
        chunks = [([plain(group.arm) for group in members], members) for members in _chunks(groups)]
        costs = [
            Sheet(["cost of training, mean over seeds", *arms], _cost(members, report.baseline))
            for arms, members in chunks
        ]
        scores = [
            Sheet(["score, mean over seeds", *arms], _scores(members, report.baseline)) for arms, members in chunks
        ]
        inside = [
            Sheet(["inside the model, mean over seeds", *arms], _probes(members)) for arms, members in chunks
        ]
        found.append((title, [*costs, *(sheet for sheet in (*scores, *inside) if sheet.lines)]))
    return found


def _chunks(groups: list[Group]) -> list[list[Group]]:
    """As few lists as ARMS_PER_SHEET allows, about equally long."""
    number = -(-len(groups) // ARMS_PER_SHEET)
    size = -(-len(groups) // number)
    return [groups[first : first + size] for first in range(0, len(groups), size)]


# What the arms cost ------------------------------------------------------------------------------------


def _cost(groups: list[Group], baseline: str | None) -> list[list[str]]:
    lines: list[tuple[str, Callable[[Group], str]]] = [
        ("rows an epoch", lambda group: _in_ledger(group, "rows")),
        ("documents cut", lambda group: _in_ledger(group, "documents_cut")),
        ("tokens truncated", lambda group: _in_ledger(group, "tokens_truncated")),
        ("efficiency, %", lambda group: words.percent(group.ledger.get("efficiency") if group.ledger else None)),
        ("optimizer steps", lambda group: _trained(group, "steps", words.count)),
        ("slots computed", lambda group: _trained(group, "slots", words.large)),
        ("  of these a step", _slots_a_step),
        ("wall time, s", lambda group: _trained(group, "wall_s", words.seconds)),
        ("CPU time, s", lambda group: _trained(group, "cpu_s", words.seconds)),
        ("useful tokens/s", lambda group: _trained(group, "useful_tokens_per_s", words.rate)),
        ("padded tokens/s", lambda group: _trained(group, "padded_tokens_per_s", words.rate)),
    ]
    if any(group.train and group.train.mfu is not None for group in groups):
        lines.append(("MFU, %", lambda group: _trained(group, "mfu", words.percent)))
    if baseline is not None:
        # Beside an accelerator the CPU only waits: its time says nothing of the arm.
        on_cpu = all(group.train.device == "cpu" for group in groups if group.train)
        if on_cpu:
            lines.append(("speed-up, CPU time", lambda group: _against(group, baseline, _speedup("cpu"))))
        per_slot = _speedup("cpu_per_slot" if on_cpu else "wall_per_slot")
        lines += [
            ("speed-up, wall time", lambda group: _against(group, baseline, _speedup("wall"))),
            ("fewer slots", lambda group: _against(group, baseline, lambda own: own.slot_ratio)),
            (
                f"less {'CPU' if on_cpu else 'wall'} time a slot",
                lambda group: _against(group, baseline, per_slot),
            ),
        ]
    lines.append(("seeds trained", lambda group: f"{group.train.n if group.train else 0} of {group.n_cells}"))
    return [[name, *(shown(group) for group in groups)] for name, shown in lines]


def _in_ledger(group: Group, word: str) -> str:
    return words.count(group.ledger.get(word) if group.ledger else None)


def _trained(group: Group, field: str, shown: Callable[[float | None], str]) -> str:
    """A mean of the group's trainings, or in words why there is none."""
    if group.train is None:
        return words.states(group.train_states, group.n_cells)
    return shown(getattr(group.train, field))


def _against(group: Group, baseline: str, ratio: Callable[[Group], float | None]) -> str:
    return "baseline" if group.arm == baseline else words.times(ratio(group))


def _slots_a_step(group: Group) -> str:
    found = group.train
    return words.large(found.slots / found.steps if found and found.slots and found.steps else None)


def _speedup(field: str) -> Callable[[Group], float | None]:
    return lambda group: getattr(group.speedup, field) if group.speedup else None


# What they score ---------------------------------------------------------------------------------------


def _scores(groups: list[Group], baseline: str | None) -> list[list[str]]:
    tasks = dict.fromkeys(
        task for group in groups for task in group.task_states if protocol.kind(task) != "probes"
    )
    lines = [[_task_name(task, groups), *(_score(group, task) for group in groups)] for task in tasks]
    if tasks:
        limited = any(score.partial for group in groups for score in group.eval.values())
        lines.append([f"average, %{' (partial)' * limited}", *(_average(group) for group in groups)])
        lines.append(["seeds scored", *(f"{group.n_seeds} of {group.n_cells}" for group in groups)])
        if baseline is not None:
            lines.append([f"difference to {plain(baseline)}, points", *(_delta(g, baseline) for g in groups)])
            lines.append(["  detectable effect, points", *(_detectable(group) for group in groups)])
    if any(group.train and group.train.validation_loss is not None for group in groups):
        lines.append(["validation loss, nats/token", *(_validation(group) for group in groups)])
    return lines


def _task_name(task: str, groups: list[Group]) -> str:
    scores = [group.eval[task] for group in groups if task in group.eval]
    metric = f" {scores[0].metric}" if scores else ""
    limited = min(((score.n, score.n_total) for score in scores if score.partial), default=None)
    return plain(f"{task}{metric}, %" + (f" ({limited[0]:,}/{limited[1]:,})" if limited else ""))


def _score(group: Group, task: str) -> str:
    if (score := group.eval.get(task)) is None:
        if task in group.left_out:
            return f"partial\n{group.left_out[task]}"
        found = group.task_states.get(task)
        return words.states(found, group.n_cells) if found else words.NONE
    as_expected = score.n_seeds == (group.n_seeds or group.n_cells)
    few = "" if as_expected else f"\n({score.n_seeds} of {group.n_cells})"
    return f"{words.percent(score.score)}{_error(score.stderr, score.stderr_items)}{few}"


def _error(seeds: float | None, items: float | None) -> str:
    if seeds is not None:
        return f" ± {words.percent(seeds)}"
    return f" (± {words.percent(items)})" if items is not None else ""


def _average(group: Group) -> str:
    if group.average is None:
        return "partial" if group.left_out else words.states(group.states, group.n_cells)
    return f"{words.percent(group.average)}{_error(group.stderr, group.stderr_items)}"


def _validation(group: Group) -> str:
    if group.train is None:
        return words.states(group.train_states, group.n_cells)
    stderr = group.train.validation_loss_stderr
    return words.loss(group.train.validation_loss) + (f" ± {words.loss(stderr)}" if stderr is not None else "")


def _delta(group: Group, baseline: str) -> str:
    if group.arm == baseline:
        return "baseline"
    if group.delta is None:
        return words.NONE
    bounds = "no interval"
    if group.interval:
        bounds = words.interval(group.interval)
    elif found := group.average_items:
        bounds = f"({words.interval((found.low, found.high))})"
    return f"{words.points(group.delta)}\n{bounds}"


def _detectable(group: Group) -> str:
    return words.NONE if group.detectable is None else f"{100 * group.detectable:.1f}"


# What the probes found -----------------------------------------------------------------------------------


def _probes(groups: list[Group]) -> list[list[str]]:
    """Nothing where no checkpoint was probed."""
    probed = [one for group in groups for one in group.probes]
    lines = []
    for arm in dict.fromkeys(arm for one in probed for arm in one.crossing):
        shares = [_probe(group, [one.crossing.get(arm) for one in group.probes], words.share) for group in groups]
        lines.append([f"attention across, rows of {plain(arm)}, %", *shares])
        even = [_probe(group, [one.even.get(arm) for one in group.probes], words.share) for group in groups]
        if any(one.even.get(arm) for one in probed):
            lines.append(["  if it were spread evenly", *even])
    if probed:
        losses = [_probe(group, [one.alone for one in group.probes], words.loss) for group in groups]
        lines.append(["loss of a document alone, nats", *losses])
    for other in dict.fromkeys(neighbour for one in probed for neighbour in one.behind):
        added = [_probe(group, [one.behind.get(other) for one in group.probes], words.loss) for group in groups]
        lines.append([f"  more behind {other} text", *added])
    return lines


def _probe(group: Group, values: list[float | None], shown: Callable[[float | None], str]) -> str:
    known = [value for value in values if value is not None]
    if known:
        return shown(math.fsum(known) / len(known))
    states = {} if group.probes else group.task_states.get(protocol.PROBES, {})
    return words.states(states, group.n_cells) if states else words.NONE


# Below the sheets --------------------------------------------------------------------------------------


def not_done(report: Report) -> list[str]:
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
            "speed-up = fewer slots x less time a slot. A slot takes longer where a step holds few, as a step "
            "costs something whatever it holds (the optimizer), and where attention looks further."
        )
    lines += _about_errors([score for group in report.groups for score in group.eval.values()])
    if any(group.interval for group in report.groups):
        lines.append(
            "difference [low, high]: mean over the seeds both have, paired by seed, and its 95% interval "
            "(Student's t); not corrected for the number of arms."
        )
        lines.append("detectable effect: a true difference of that size is found in 80% of such sweeps.")
    if any(group.average_items and not group.interval for group in report.groups):
        lines.append(
            "difference ([low, high]): 95% over test items, paired item by item, of these very models; it says "
            "nothing about other seeds, and so nothing about the arm."
        )
    if any(group.left_out for group in report.groups):
        lines.append("partial n/N: rows that this machine could not score; the score stands in no mean.")
    lines += unhealthy(report)
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
    """Tasks that some settings score by other rules than others: within one setting there is one protocol."""
    used: dict[str, set[str]] = {}
    for group in report.groups:
        for task, score in group.eval.items():
            used.setdefault(task, set()).update(score.protocols)
    unlike = [task for task, protocols in used.items() if len(protocols) > 1]
    if not unlike:
        return []
    return [f"not comparable between the settings above, scored by different protocols: {', '.join(unlike)}."]


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
