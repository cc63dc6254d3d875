"""What of a finished training cannot be true: time, rates, steps and tokens held to each other. Pure.

Each number of a manifest is checked against others that were counted elsewhere: the ledger by the packer, the
plan of steps from the row index before the first one, the totals from what every step recorded. What a manifest
does not hold is not checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from packcli import flops, shapes
from packcli.plan import TrainOrder
from packcli.report import words

ROUNDING = 1e-3
"""What rates and times may be off by, as a share: they are floats of one sum."""

Numbers = Mapping[str, Any]


def check(order: TrainOrder, results: Numbers, ledger: Numbers | None) -> tuple[str, ...]:
    """One sentence for each contradiction.

    `results`: of the training's manifest; `ledger`: of one epoch, None where the row index is gone.
    """
    found = [*_speed(order, results), *_rates(results), *_plan(order, results)]
    if ledger is not None:
        found += [*_ledger(order, ledger), *_epochs(order, results, ledger)]
    return tuple(found)


# Time --------------------------------------------------------------------------------------------------


def _speed(order: TrainOrder, results: Numbers) -> Iterator[str]:
    """No device does more than its peak: recorded MFU, and the least that the tokens can have cost."""
    if (mfu := results.get("mfu")) is not None and mfu > 1:
        yield f"the recorded MFU is {mfu:.2f}, and over 1 no device can be"
    wall, device, processes = (results.get(name) for name in ("wall_s", "device", "processes"))
    peak = flops.peak(device) if device else None
    shape = shapes.shape(order.model) if peak else None
    if shape is not None and peak and wall and processes and results.get("tokens"):
        # A lower bound: neither attention nor the head, whose cost hangs on lengths and labels.
        least = flops.training(
            shape,
            tokens=results["tokens"],
            squares=0,
            supervised=0,
            trainable=None if order.train.lora is None else 0,
        )
        most = wall * processes * peak
        if least > most:
            yield (
                f"{least:.3g} FLOPs at least for {results['tokens']:,} tokens, but in {words.seconds(wall)} s "
                f"{processes} x {device} do {most:.3g} at most: an MFU of {least / most:.2f} or more"
            )
    cpu, cores = results.get("cpu_s"), results.get("cores")
    if cpu is not None and cores and wall is not None and cpu > wall * cores * (1 + ROUNDING) + 1:
        yield f"{words.seconds(cpu)} s of CPU time in {words.seconds(wall)} s on {cores} cores"


def _rates(results: Numbers) -> Iterator[str]:
    """A rate times the time is what was done."""
    wall = results.get("wall_s")
    for name, rate in (
        ("tokens", "useful_tokens_per_s"),
        ("slots", "padded_tokens_per_s"),
        ("supervised", "supervised_tokens_per_s"),
    ):
        total, per_second = results.get(name), results.get(rate)
        if wall is None or total is None or per_second is None:
            continue
        if not _close(done := per_second * wall, total):
            yield f"{rate} x wall_s is {done:,.0f}, but {name} is {total:,}"


# Work --------------------------------------------------------------------------------------------------


def _plan(order: TrainOrder, results: Numbers) -> Iterator[str]:
    """What the steps recorded against what the row index promised before the first one."""
    planned, steps, spec = results.get("step") or {}, results.get("steps"), order.train
    if steps is None:
        return
    if (wanted := planned.get("steps")) is not None and steps != wanted:
        yield f"{steps:,} optimizer steps recorded, but {wanted:,} were planned"
    elif spec.steps is not None and steps != spec.steps:
        yield f"{steps:,} optimizer steps recorded, but `train.steps` is {spec.steps:,}"
    for name in ("rows", "documents", "tokens"):
        mean, total = planned.get(name), results.get(name)
        if wanted is None or mean is None or total is None:
            continue
        if (sum_ := round(mean * wanted)) != total:
            yield f"{name} is {total:,}, but the planned steps hold {sum_:,}"


def _ledger(order: TrainOrder, ledger: Numbers) -> Iterator[str]:
    from packcli.data.index import LEDGER_IDENTITIES

    for whole, parts in LEDGER_IDENTITIES:
        if not {whole, *parts} <= ledger.keys():
            continue
        if ledger[whole] != (total := sum(ledger[part] for part in parts)):
            yield f"the ledger does not close: {whole} is {ledger[whole]:,}, but {' + '.join(parts)} {total:,}"
    efficiency, kept, slots = (ledger.get(word) for word in ("efficiency", "tokens_kept", "slots"))
    if efficiency is not None and kept is not None and slots and not _close(efficiency, kept / slots):
        yield f"efficiency is {efficiency:.3f}, but tokens_kept / slots {kept / slots:.3f}"
    if (rows := ledger.get("rows")) is None:
        return
    if slots is not None and slots > (most := rows * order.max_length):
        yield f"{slots:,} slots, but {rows:,} rows of {order.max_length:,} hold {most:,}"
    if rows < (least := ledger.get("rows_lower_bound", 0)):
        yield f"{rows:,} rows, but nothing holds these documents in fewer than {least:,}"


def _epochs(order: TrainOrder, results: Numbers, ledger: Numbers) -> Iterator[str]:
    """A run over whole epochs takes each of the ledger's numbers as often as it has epochs."""
    spec, arm = order.train, order.arm
    if spec.epochs is None or arm.repack_each_epoch:  # the ledger is of the first epoch's rows
        return
    counted = {"rows": "rows", "tokens": "tokens_kept", "supervised": "tokens_supervised"}
    if arm.pad_to != "longest":  # there, slots follow from a row's company, which changes with the epoch
        counted["slots"] = "slots"
    for name, word in counted.items():
        total, one = results.get(name), ledger.get(word)
        if total is None or one is None:
            continue
        if total != spec.epochs * one:
            yield f"{name} is {total:,}, but {spec.epochs} x {word} of the ledger {spec.epochs * one:,}"
    rows, steps = ledger.get("rows"), results.get("steps")
    if spec.batch_unit != "rows" or steps is None or rows is None:
        return
    if steps != (wanted := -(-spec.epochs * rows // spec.global_batch)):
        each = f"{spec.epochs} x {rows:,} rows, {spec.global_batch:,} a step"
        yield f"{steps:,} optimizer steps, but {each}, make {wanted:,}"


def _close(found: float, expected: float) -> bool:
    return abs(found - expected) <= ROUNDING * abs(expected)
