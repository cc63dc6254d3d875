"""A process that holds the checkpoint for `parallel.py` and answers what it is given, until its parent ends."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from packcli.errors import PackcliError, RunError
from packcli.processes import die_with_parent

if TYPE_CHECKING:
    from packcli.eval.engines.parallel import Setup


def main() -> None:
    """Arguments: the file descriptor of a pipe to the parent, and the parent's process id."""
    descriptor, parent = map(int, sys.argv[1:])
    die_with_parent(parent)  # before the slow imports
    pipe = Connection(descriptor)
    try:
        setup: Setup = pipe.recv()
        _serve(pipe, setup)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # nobody asks any more


def _serve(pipe: Connection, setup: Setup) -> None:
    try:
        lm = _load(setup)
        while True:
            pipe.send(("idle", lm.at_once))
            kind, requests = pipe.recv()
            for said in _answers(lm, requests) if kind == "answers" else _likelihoods(lm, requests):
                pipe.send(("said", said))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except PackcliError as error:
        pipe.send(("failed", error))
    except Exception as error:
        # The parent gets one line; what a report needs stands above it.
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        cause = f"{setup.name} of the evaluation failed: {type(error).__name__}: {lines[0]}"
        pipe.send(("failed", RunError(cause, "its traceback is on stderr; in a sweep, in its worker-*.log")))


def _load(setup: Setup) -> Any:
    import torch

    from packcli.eval.engines import engine, hf

    torch.set_num_threads(setup.threads)
    if setup.device.startswith("cuda"):
        torch.cuda.set_device(setup.device)
    with engine.quiet():
        return hf.load(
            setup.source, chat_template=setup.chat_template, batch_size=setup.batch_size, device=setup.device
        )


def _answers(lm: Any, requests: Sequence[Any]) -> Iterator[Any]:
    from packcli.eval.engines import engine

    with engine.quiet():
        yield from lm.answers(requests)


def _likelihoods(lm: Any, requests: Sequence[tuple[str, str]]) -> Iterator[Any]:
    from packcli.eval.engines import engine

    with engine.quiet():
        said = lm.loglikelihood([SimpleNamespace(args=request) for request in requests], disable_tqdm=True)
    yield [
        (number, (value, greedy, request in lm.truncated))
        for number, (request, (value, greedy)) in enumerate(zip(requests, said, strict=True))
    ]


if __name__ == "__main__":
    main()
