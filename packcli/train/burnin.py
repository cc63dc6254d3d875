"""Before a training over several nodes: is each of them sound? A few seconds that may save hours.

One broken GPU or link slows all the others down, or spoils every gradient, and nothing in a loss says where it is.
So every rank computes the same layer of the model, from the same numbers, and the ranks send each other data.
"""

from __future__ import annotations

import contextlib
import math
import socket
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from packcli.errors import NodeError
from packcli.log import logger
from packcli.plan import TrainOrder
from packcli.train import distributed, loop, rollcall, transfers, watchdog
from packcli.train.distributed import Processes
from packcli.train.layer import layer_step
from packcli.train.rollcall import Board, Nodes
from packcli.train.transfers import Transfers

SLOWER_STEP = 2.0
"""So many times the other nodes' median is broken: sound GPUs of a kind differ by a few percent, and all wait for
the slowest."""
SLOWER_LINK = 4.0
"""Links differ by what lies between two nodes: through a shared switch half the speed is usual."""
NOISE_S = 0.005
"""Less than this is no difference: launches of kernels and threads take as long."""
HELD = 0.9
"""Sound GPUs, before a model is loaded, have free memory within 10% of each other."""
WRONG = {"float32": 1e-4, "bfloat16": 2.0**-6}
"""Results may differ by rounding (sums in another order), relative to a tensor's largest value."""
_NOISE = 1e-2
"""Gradients smaller than this part of the largest are mostly rounding."""

_TOGETHER_S = 1.0


def run(order: TrainOrder, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Call the roll, join the processes of the run as `loop.train` would, and `check`."""
    timeout, store = watchdog.collective_timeout(order.train.hang_timeout_s), None
    if not dist.is_initialized():
        nodes = Nodes.of(distributed.world_size(), distributed.per_node(), names)
        store = rollcall.join(nodes, timeout)
    processes = distributed.start(group=True, timeout=timeout, store=store)
    with loop.settings(order.train, processes):  # what cuBLAS reads but once must be as for the training
        return check(order, processes, names)


def check(order: TrainOrder, processes: Processes, nodes: Sequence[str] | None) -> dict[str, Any]:
    """What was measured, for the manifest. All ranks call it; it leaves random numbers and memory alone.

    Slowness on CPUs is only warned about: other processes share them. `nodes`: their names; None: host names.

    Raises:
        NodeError: a node that did not answer, failed, computed something else than the others, has a GPU held by
            another process, or is far slower; the same on every rank.
    """
    started = time.perf_counter()
    store = rollcall.apart(dist.distributed_c10d._get_default_store(), f"burn-in/{order.id}")
    world, per_node = processes.world, processes.per_node
    board = Board(store, processes.rank, world, Nodes.of(world, per_node, nodes))
    devices = [Device(**found) for found in board.gather("device", asdict(_device(processes.device)))]
    if nodes is None:
        board = replace(board, nodes=Nodes.of(world, per_node, [found.host for found in devices[::per_node]]))
    _refuse(held(devices, board.nodes))
    group = dist.new_group(timeout=transfers.timeout(processes.device))
    with _unchanged(processes.device):
        steps, results = _steps(order, processes, board)
        moved = _transfers(processes, board, group)
        difference = _compare(order, board, group, results) if results else None
        del results
    dist.destroy_process_group(group)

    slow = slow_steps(steps, board.nodes) + slow_links(moved, board.nodes)
    if processes.device.type == "cuda":
        _refuse(slow)
    record = {
        **_record(steps, moved, devices, board.nodes),
        "largest_difference": difference,
        "warnings": [*_unlike(devices), *slow],
        "wall_s": time.perf_counter() - started,
    }
    if processes.is_main:
        _say(record)
    return record


def _refuse(findings: Sequence[str]) -> None:
    if findings:
        raise NodeError("burn-in: " + "; ".join(findings), rollcall.FIX)


@contextlib.contextmanager
def _unchanged(device: torch.device) -> Iterator[None]:
    """Random generators, and the GPU's memory, as they were before."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        yield
    if gpus:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# Devices -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Device:
    """`free_gib`: of a GPU's memory; None: a CPU."""

    host: str
    name: str
    free_gib: float | None = None


def _device(device: torch.device) -> Device:
    host = socket.gethostname()
    if device.type != "cuda":
        return Device(host, "cpu")
    free, _ = torch.cuda.mem_get_info(device)
    return Device(host, torch.cuda.get_device_name(device), free / 2**30)


def held(devices: Sequence[Device], nodes: Nodes) -> list[str]:
    """GPUs with less free memory than the others."""
    free = [device.free_gib for device in devices]
    usual = statistics.median(gib for gib in free if gib is not None) if any(free) else 0.0
    return [
        f"{nodes.where([number])}: {gib:.1f} GiB of the GPU's memory are free, {usual:.1f} GiB on the others: "
        "another process holds it"
        for number, gib in enumerate(free)
        if gib is not None and gib < HELD * usual
    ]


def _unlike(devices: Sequence[Device]) -> list[str]:
    kinds = sorted({device.name for device in devices})
    return [f"devices of {len(kinds)} kinds: {', '.join(kinds)}"] if len(kinds) > 1 else []


# Computing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's forward and backward pass of one layer. `failed`: with which error."""

    seconds: float = 0.0
    finite: bool = True
    failed: str = ""


def _steps(order: TrainOrder, processes: Processes, board: Board) -> tuple[list[Step], list[list[torch.Tensor]]]:
    """Every rank's, and this one's results; none where they are finite nowhere, which no node explains.

    Raises:
        NodeError: some ranks failed, or computed what is not finite.
    """
    results: list[list[torch.Tensor]] = []
    own, error = Step(), None
    try:
        seconds, results = layer_step(order, processes.device)
        own = Step(seconds, all(bool(part.isfinite().all()) for parts in results for part in parts))
    except RuntimeError as caught:  # what a broken GPU's driver says comes as one
        error, own = caught, Step(failed=transfers.brief(caught))
    steps = [Step(**found) for found in board.gather("step", asdict(own))]
    if error is not None and all(step.failed for step in steps):
        raise error  # the model's own
    _refuse(failed([step.failed for step in steps], board.nodes, "one layer's step"))
    strange = [number for number, step in enumerate(steps) if not step.finite]
    if len(strange) == len(steps):
        return steps, []
    _refuse([f"{board.nodes.where(strange)}: one layer's results are not finite"] if strange else [])
    return steps, results


def _compare(order: TrainOrder, board: Board, group: Any, results: list[list[torch.Tensor]]) -> float:
    """By how much the ranks' results differ at most.

    Raises:
        NodeError: some computed something else than the others.
    """
    largest = max(_error(parts, group) for parts in results)
    found = board.gather("difference", largest)
    differences = [math.inf if one is None else float(one) for one in found]  # JSON knows no infinity
    _refuse(wrong(differences, WRONG[order.model.dtype], board.nodes))
    return max(differences)


def _error(own: Sequence[torch.Tensor], group: Any) -> float:
    """Largest difference to rank 0's tensors, relative to the largest value in each."""
    differences, peaks = [], []
    for tensor in own:
        reference = tensor.contiguous().clone()
        dist.broadcast(reference, src=0, group=group)
        differences.append((tensor.float() - reference.float()).abs().max())
        peaks.append(reference.float().abs().max())
    sizes = torch.stack(peaks)
    relative = torch.stack(differences) / sizes.clamp(min=max(float(sizes.max()) * _NOISE, 1e-30))
    return float(relative.max())


def wrong(differences: Sequence[float], limit: float, nodes: Nodes) -> list[str]:
    """Who computed something else, given each rank's difference to rank 0: the few, against the many."""
    others = [number for number, difference in enumerate(differences) if not difference <= limit]
    if not others:
        return []
    by = f"(by {max(differences):.1e} of the largest value)"
    if 2 * len(others) > len(differences) and len(differences) > 2:
        others = [0]
    if 2 * len(others) >= len(differences):
        return [
            f"rank 0 on {nodes.names[0]} and {nodes.where(others)} compute different results {by}: one is wrong"
        ]
    return [f"{nodes.where(others)} computes other results than the other ranks {by}"]


def failed(errors: Sequence[str], nodes: Nodes, what: str) -> list[str]:
    """Ranks that had an error, and the first one's."""
    numbers = [number for number, error in enumerate(errors) if error]
    return [f"{what} failed on {nodes.where(numbers)}: {errors[numbers[0]]}"] if numbers else []


# Moving data ---------------------------------------------------------------------------------------------


def _transfers(processes: Processes, board: Board, group: Any) -> list[Transfers]:
    board.gather("transfers", None)  # nobody waits in a collective for a node that is not there
    started = time.monotonic()
    try:
        own, error = transfers.measure(processes, group), ""
    except RuntimeError as caught:
        own, error = Transfers(), transfers.brief(caught)
    after_s = time.monotonic() - started
    found = board.gather("transferred", {"error": error, "after_s": after_s, "transfers": asdict(own)})
    # Where one rank fails the others wait for it in vain, and fail later.
    first_s = min((one["after_s"] for one in found if one["error"]), default=0.0)
    causes = [one["error"] if one["after_s"] < first_s + _TOGETHER_S else "" for one in found]
    _refuse(failed(causes, board.nodes, "sending data between the ranks"))
    return [Transfers(**one["transfers"]) for one in found]


def slow_steps(steps: Sequence[Step], nodes: Nodes) -> list[str]:
    """Nodes whose slowest rank computes far slower than the other nodes'."""
    per_node, seconds = nodes.per_node, [step.seconds for step in steps]
    slowest = [max(seconds[n * per_node : (n + 1) * per_node]) for n in range(len(nodes))]
    return [
        nodes.where([seconds.index(own)]) + _against(own, other, "one layer's step")
        for _, own, other in _slower(slowest, SLOWER_STEP)
    ]


def slow_links(moved: Sequence[Transfers], nodes: Nodes) -> list[str]:
    """Nodes inside which, and pairs between which, data moves far slower than in the others."""
    names, per_node = nodes.names, nodes.per_node
    inside = [max(one.within_s for one in moved[n * per_node : (n + 1) * per_node]) for n in range(len(nodes))]
    found = [
        names[node] + _against(own, other, "sending between its ranks")
        for node, own, other in _slower(inside, SLOWER_LINK)
    ]
    links = _between(moved, len(nodes))
    for number, own, other in _slower(list(links.values()), SLOWER_LINK):
        one, two = list(links)[number]
        found.append(f"the link between {names[one]} and {names[two]}" + _against(own, other, "sending"))
    return found


def _between(moved: Sequence[Transfers], num_nodes: int) -> Mapping[tuple[int, int], float]:
    """Each link's slowest rank, in seconds."""
    return {
        ends: max(one.between_s.get(str(link), 0.0) for one in moved)
        for link, ends in enumerate(transfers.links(num_nodes))
    }


def _slower(seconds: Sequence[float], factor: float) -> Iterator[tuple[int, float, float]]:
    """(which, its time, the others' median) of all that take more than `factor` times that median."""
    for number, own in enumerate(seconds):
        others = [*seconds[:number], *seconds[number + 1 :]]
        usual = statistics.median_low(others) if others else own  # low: a bad node spoils two of three links
        if own > factor * usual and own - usual > NOISE_S:
            yield number, own, usual


def _against(own: float, other: float, doing: str) -> str:
    times = f"{own:.3g} s against {other:.3g} s"
    return f" is {own / other:.1f}x slower than the median of the others in {doing} ({times})"


# What is said of it --------------------------------------------------------------------------------------


def _record(
    steps: Sequence[Step], moved: Sequence[Transfers], devices: Sequence[Device], nodes: Nodes
) -> dict[str, Any]:
    kind = "cuda" if devices[0].free_gib is not None else "cpu"
    world, per_node = len(steps), nodes.per_node
    rounds = [max(one.all_reduce_s[number] for one in moved) for number in range(len(transfers.SIZES[kind]))]
    each = []
    for number, name in enumerate(nodes.names):
        own = slice(number * per_node, (number + 1) * per_node)
        within_s = max(one.within_s for one in moved[own])
        each.append(
            {
                "node": name,
                "devices": [device.name for device in devices[own]],
                "free_gib": [device.free_gib for device in devices[own]],
                "layer_step_s": max(step.seconds for step in steps[own]),
                "within_gb_per_s": transfers.EXCHANGED[kind] / within_s / 1e9 if within_s else None,
            }
        )
    return {
        "nodes": each,
        "ranks": world,
        "all_reduce": [
            {"bytes": size, "bus_gb_per_s": 2 * (world - 1) / world * size / seconds / 1e9}
            for size, seconds in zip(transfers.SIZES[kind], rounds, strict=True)
        ],
        "links": [
            {"nodes": [nodes.names[end] for end in ends], "gb_per_s": transfers.EXCHANGED[kind] / seconds / 1e9}
            for ends, seconds in _between(moved, len(nodes)).items()
        ],
    }


def _say(record: Mapping[str, Any]) -> None:
    for warning in record["warnings"]:
        logger.warning("burn-in: %s", warning)
    slowest = max(record["nodes"], key=lambda node: node["layer_step_s"])
    usual = statistics.median(node["layer_step_s"] for node in record["nodes"])
    logger.info(
        "burn-in: %d nodes, all-reduce %.3g GB/s, one layer's step %.3g s (slowest %s %.3g s)",
        len(record["nodes"]),
        record["all_reduce"][-1]["bus_gb_per_s"],
        usual,
        slowest["node"],
        slowest["layer_step_s"],
    )
