"""How far a stage is that somebody does right now, from what it leaves on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from packcli import batching
from packcli.plan import TokensOrder, TrainOrder
from packcli.store import Store

_TAIL_BYTES = 1 << 15
_RECENT_STEPS = 50


@dataclass(frozen=True, slots=True)
class Progress:
    """`total`, and what follows, is None where it is not known: never a guess.

    `left_s`: the steps left at the pace of the last ones; what comes after the last step is not in it.
    """

    unit: Literal["steps", "shards", "indexes", "tasks"]
    done: int
    total: int | None
    loss: float | None = None
    useful_tokens_per_s: float | None = None
    left_s: float | None = None

    def __str__(self) -> str:
        return f"{self.done:,} of {self.total:,} {self.unit}" if self.total else f"{self.done:,} {self.unit}"


def training(order: TrainOrder, store: Store, total: int | None, since_s: float = 0.0) -> Progress:
    """Steps done of `total`. `since_s`: when this attempt began; the pace of one before it says nothing."""
    path = store.metrics(order.id)
    records = tail(path)
    if not records:
        return Progress("steps", 0, total)
    last, recent = records[-1], records[-_RECENT_STEPS:]
    done, step_s = int(last["step"]), sum(record["step_s"] for record in recent) / len(recent)
    if path.stat().st_mtime < since_s or not step_s:
        return Progress("steps", done, total)
    return Progress(
        "steps",
        done,
        total,
        loss=last["loss"],
        useful_tokens_per_s=sum(record["tokens"] for record in recent) / len(recent) / step_s,
        left_s=(total - done) * step_s if total else None,
    )


def num_steps(order: TrainOrder, store: Store) -> int | None:
    """Steps of a whole training; None before its rows are there, if it is as long as they are."""
    if order.train.steps is not None:
        return order.train.steps
    if store.state("index", order.index) != "done":
        return None
    from packcli.data import index

    sizes = index.read(store.rows(order.index)).sizes
    return len(batching.run_steps(sizes, order.train, order.arm.order, order.seed))


def shards(order: TokensOrder, store: Store, part: tuple[int, int] = (0, 1)) -> Progress:
    """Shards done of a token store, or of part k of n; how many a streamed source will come to, nobody knows."""
    from packcli.data import sources, tokenize

    there = store.shard_records(order.id)
    try:
        count = len(tokenize.pieces_in(store.pieces(order.id)))
    except FileNotFoundError:
        return Progress("shards", 0, None)
    if any(map(sources.is_streamed, order.sources)):
        return Progress("shards", len(there), None)
    own = {store.shard_record(order.id, number) for number in range(part[0], count, part[1])}
    return Progress("shards", len(own & set(there)), len(own))


def tail(path: Path) -> list[Mapping[str, Any]]:
    """The last lines of a JSON-lines log that is being written, if there is one. A torn line is left out."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")[bool(start) : -1]
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with suppress(orjson.JSONDecodeError):
            found.append(orjson.loads(line))
    return found
