"""A process that does stages one after another, so that heavy imports are paid once.

Jobs come as JSON lines on stdin and are answered on a pipe of their own: whatever a library prints goes to the
worker's log. It dies with its parent, whatever kills that. Each rank of a training is such a process, too.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from packcli import log, stages
from packcli.errors import PackcliError
from packcli.launch import ranks
from packcli.plan import EvalOrder, IndexOrder, TokensOrder, TrainOrder
from packcli.processes import die_with_parent
from packcli.store import Store

_ORDERS: dict[str, type[TokensOrder | IndexOrder | TrainOrder]] = {
    "tokens": TokensOrder,
    "index": IndexOrder,
    "train": TrainOrder,
}
_NOTE_EVERY_S = 0.2


class Worker:
    """Answers jobs; keeps one scorer per protocol."""

    def __init__(self, store: Store, answers: int, threads: int) -> None:
        self._store, self._answers, self._threads = store, answers, threads
        self._scorers: dict[str, Any] = {}
        self._last_note = 0.0

    def serve(self) -> None:
        log.logger.addHandler(_Saying(self._send))
        log.logger.setLevel(logging.INFO)
        for line in sys.stdin.buffer:
            self._do(orjson.loads(line))

    def _do(self, job: dict[str, Any]) -> None:
        try:
            failures = self._evaluate(job) if job["kind"] == "eval" else self._stage(job)
        except PackcliError as error:
            failures = [_failure(id_, error) for id_ in job["ids"]]
        except Exception as error:
            # The last line of defence of a long-lived process: the job is reported failed as a bug, with
            # its traceback in the log; the sweep's other jobs go on.
            traceback.print_exc()
            fix = "the traceback is in the sweep's worker-*.log; please report it"
            failures = [_failure(id_, PackcliError(_brief(error), fix)) for id_ in job["ids"]]
        self._send({"event": "end", "failures": failures})

    def _stage(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        order = _ORDERS[job["kind"]].model_validate(job["orders"][0])
        if not isinstance(order, TrainOrder):
            stages.run(job["kind"], order, self._store, self._note)
        elif group := job.get("group"):
            ranks.run(order, self._store, ranks.Group(**group), self._note, fallback=job["fallback"])
        else:
            burn_in, names = job.get("burn_in", False), job.get("names")
            stages.train(
                order, self._store, self._note, fallback=job["fallback"], burn_in=burn_in, nodes=names or None
            )
        return []

    def _evaluate(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        import torch

        torch.set_num_threads(self._threads)
        orders = [EvalOrder.model_validate(order) for order in job["orders"]]
        protocol = orders[0].eval
        key = protocol.model_dump_json()
        if key not in self._scorers:
            unsafe = job.get("unsafe_no_sandbox", False)
            self._scorers[key] = stages.scorer_for(protocol, unsafe_no_sandbox=unsafe, note=self._note)
        outcomes = stages.evaluate(orders, self._store, self._scorers[key], self._note)
        found = [(order.id, stages.shortfall(order, outcome)) for order, outcome in outcomes]
        return [_failure(id_, error) for id_, error in found if error is not None]

    def _note(self, done: int, total: int, remark: str) -> None:
        now = time.monotonic()
        if now - self._last_note >= _NOTE_EVERY_S or done == total:
            self._last_note = now
            self._send({"event": "note", "done": done, "total": total, "remark": remark})

    def _send(self, message: dict[str, Any]) -> None:
        os.write(self._answers, orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE))


class _Saying(logging.Handler):
    """Hands packcli's messages to whoever started this."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send({"event": "say", "text": record.getMessage()})


def _failure(id_: str, error: PackcliError) -> dict[str, Any]:
    return {"id": id_, "kind": error.kind, "cause": error.cause, "fix": error.fix, "exit_code": error.exit_code}


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"bug: {type(error).__name__}: {lines[0]}"


def main() -> None:
    runs, answers, threads, parent, *local = sys.argv[1:6]
    die_with_parent(int(parent))
    log.mask_output()
    Worker(Store(Path(runs), *map(Path, local)), int(answers), int(threads)).serve()
    if "RANK" in os.environ:
        from packcli.train import distributed

        distributed.finish()


if __name__ == "__main__":
    main()
