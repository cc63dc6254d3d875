"""Run by `test_burnin.py`: one rank of several pretended nodes, in torchrun's environment.

    burnin_ranks.py check  ORDER.json OUT     every fault below in turn, in one process group
    burnin_ranks.py roll   ORDER.json OUT     two of three ranks; the roll call gives up after five seconds
    burnin_ranks.py sound  ORDER.json OUT     once, without a fault
    burnin_ranks.py ended  ORDER.json OUT     rank 1 leaves in the middle

Each rank writes OUT.<rank>: {fault: [kind, cause] or record}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from packcli.errors import NodeError, PackcliError
from packcli.plan import TrainOrder
from packcli.train import burnin, distributed, rollcall, transfers

NAMES = ("node0", "node1", "node2")
_layer_step, _measure, _device = burnin.layer_step, transfers.measure, burnin._device
_missing = rollcall.Board._missing
Result = tuple[float, list[list[torch.Tensor]]]


def bent(which: int, index: int, by: float, result: Result) -> Result:
    result[1][which][index].view(-1)[3] += by
    return result


def broken(result: Result) -> Result:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


# fault: (on which ranks, what becomes of a layer's step)
STEPS: dict[str, tuple[tuple[int, ...], Callable[[Result], Result]]] = {
    "one output is wrong": ((1,), lambda result: bent(0, 0, 1.0, result)),
    "one gradient is wrong": ((2,), lambda result: bent(1, -1, 1e6, result)),
    "rank 0 is wrong": ((0,), lambda result: bent(0, 0, 1.0, result)),
    "not finite": ((1,), lambda result: bent(0, 0, float("nan"), result)),
    "nowhere finite": ((0, 1, 2), lambda result: bent(0, 0, float("inf"), result)),
    "step fails": ((2,), broken),
    "step fails everywhere": ((0, 1, 2), broken),
    "slow": ((1,), lambda result: (result[0] + 9.0, result[1])),
}


def unplugged(*arguments: Any) -> transfers.Transfers:
    raise RuntimeError("gloo/transport: no route to host")


def slow_reader(board: rollcall.Board, what: str, keys: list[str]) -> list[int]:
    """Rank 0, which fails as the others do, must not take the store along before all have read it."""
    missing = _missing(board, what, keys)
    time.sleep(1.0)
    return missing


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except PackcliError as error:
        return [error.kind, error.cause]
    except RuntimeError as error:
        return ["RuntimeError", str(error)]


def check(order: TrainOrder, rank: int) -> dict[str, Any]:
    processes = distributed.start()
    found = {}

    def run(fault: str, of: TrainOrder = order, names: tuple[str, ...] | None = NAMES) -> None:
        renamed = of.model_copy(update={"id": fault})
        found[fault] = outcome(lambda: burnin.check(renamed, processes, names))

    torch.manual_seed(1)
    before = torch.get_rng_state()
    run("none")
    found["random"] = bool(torch.equal(before, torch.get_rng_state()))
    run("no names", names=None)
    half = order.model.model_copy(update={"dtype": "bfloat16"})
    run("bfloat16", order.model_copy(update={"model": half}))
    for fault, (where, change) in STEPS.items():
        if rank in where:
            burnin.layer_step = lambda *given, change=change: change(_layer_step(*given))
        run(fault)
        burnin.layer_step = _layer_step
    transfers.ANSWER_S = 10.0
    if rank == 1:
        rollcall.Board._missing = slow_reader  # type: ignore[method-assign]
    if rank == 2:
        transfers.measure = unplugged
    run("sending fails")
    transfers.measure = _measure
    return found


def roll(order: TrainOrder, out: str, rank: int) -> dict[str, Any]:
    rollcall.ANSWER_S, rollcall.FIRST_S = 5.0, 5.0
    Path(f"{out}.ready.{rank}").touch()
    while len(list(Path(out).parent.glob("*.ready.*"))) < 2:  # both imported torch, however slow the machine
        time.sleep(0.05)
    return {"roll": outcome(lambda: burnin.run(order, NAMES))}


def ended(order: TrainOrder, rank: int) -> dict[str, Any]:
    rollcall.ANSWER_S = 5.0
    processes = distributed.start()

    def leave(*given: Any) -> Any:
        os._exit(9)

    if rank == 1:
        burnin.layer_step = leave
    return {"ended": outcome(lambda: burnin.check(order, processes, NAMES))}


def main() -> None:
    what, order_file, out = sys.argv[1:4]
    torch.set_num_threads(1)
    order, rank = TrainOrder.model_validate_json(Path(order_file).read_bytes()), distributed.rank()
    started = time.monotonic()
    match what:
        case "check":
            found = check(order, rank)
        case "sound":
            processes = distributed.start()
            found = {"sound": outcome(lambda: burnin.check(order, processes, None))}
        case "roll":
            found = roll(order, out, rank)
        case _:
            found = ended(order, rank)
    found["seconds"] = time.monotonic() - started
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    os._exit(NodeError.exit_code)  # peers of a process that is gone cannot leave the group


main()
