"""How fast the ranks of a run send each other data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from packcli.train.distributed import Processes
from packcli.train.rollcall import ANSWER_S

SIZES: Mapping[str, tuple[int, ...]] = {"cuda": (1 << 20, 16 << 20, 256 << 20), "cpu": (64 << 10, 1 << 20)}
"""Bytes of an all-reduce, by kind of device."""
EXCHANGED: Mapping[str, int] = {"cuda": 64 << 20, "cpu": 1 << 20}
"""Bytes that each rank sends to a neighbour."""
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Transfers:
    """One rank's median times. `all_reduce_s`: by size; `within_s`: to its neighbour in the node, 0 where it has
    none; `between_s`: to its counterparts in neighbouring nodes, by number of the link.
    """

    all_reduce_s: tuple[float, ...] = ()
    within_s: float = 0.0
    between_s: Mapping[str, float] = field(default_factory=dict)


def timeout(device: torch.device) -> timedelta:
    """Of a collective. Gloo raises an error then; NCCL ends the process, so we, who say why, must be earlier."""
    return timedelta(seconds=ANSWER_S if device.type == "cpu" else 2 * ANSWER_S)


def links(num_nodes: int) -> list[tuple[int, int]]:
    """The pairs of neighbours in a ring of nodes."""
    if num_nodes == 2:
        return [(0, 1)]
    return [(node, (node + 1) % num_nodes) for node in range(num_nodes)]


def measure(processes: Processes, group: Any) -> Transfers:
    """All ranks call it at the same time.

    Raises:
        RuntimeError: of the backend; or it took too long.
    """
    kind, device = processes.device.type, processes.device
    reduced = []
    for size in SIZES[kind]:
        data = torch.zeros(size // 4, device=device)
        reduced.append(_median(partial(dist.all_reduce, data, group=group), device))
    given = torch.zeros(EXCHANGED[kind] // 4, device=device)
    taken = torch.empty_like(given)

    def exchange(to: int, of: int) -> float:
        def once() -> None:
            operations = [
                dist.P2POp(dist.isend, given, to, group=group),
                dist.P2POp(dist.irecv, taken, of, group=group),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        return _median(once, device)

    per_node = processes.per_node
    node, local = divmod(processes.rank, per_node)
    within_s, between_s = 0.0, {}
    if per_node > 1:
        first = node * per_node
        within_s = exchange(first + (local + 1) % per_node, first + (local - 1) % per_node)
    neighbours = links(processes.world // per_node)
    for turn in range(3):  # a node exchanges with one other at a time, so that a slow link slows no other down
        for number, ends in enumerate(neighbours):
            if _turn(number, len(neighbours)) == turn and node in ends:
                peer = (ends[0] + ends[1] - node) * per_node + local
                between_s[str(number)] = exchange(peer, peer)
    return Transfers(tuple(reduced), within_s, between_s)


def _turn(link: int, count: int) -> int:
    """Even links, odd links, and the last of an odd ring, which both of its neighbours' turns have taken."""
    return 2 if count % 2 and count > 1 and link == count - 1 else link % 2


def _median(once: Callable[[], Any], device: torch.device) -> float:
    """Seconds; the first call, which connects, does not count. As many calls on every rank."""
    return statistics.median([timed(once, device) for _ in range(1 + _REPEATS)][1:])


def timed(once: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has done it.

    Raises:
        RuntimeError: it was not done after `ANSWER_S`: synchronizing would wait for ever.
    """
    started = time.perf_counter()
    once()
    if device.type == "cuda":
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        while not done.query():
            if time.perf_counter() - started > ANSWER_S:
                raise RuntimeError(f"not done after {ANSWER_S:.0f} s")
    return time.perf_counter() - started


def brief(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
