"""One checkpoint in several processes of this machine, each on a device of its own, that share the requests.

Whoever asks holds tokenizer and config, builds requests and scores. Each process (`worker.py`) holds the whole
checkpoint, takes a share of what is left whenever it is idle, and sends answers as soon as they are written.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from transformers import AutoConfig

from packcli.errors import KilledError, MissingError
from packcli.eval.checkpoint import read_tokenizer
from packcli.eval.engines.hf import HuggingFace
from packcli.eval.engines.responses import Answer, Request, texts

Kind = Literal["answers", "likelihoods"]

_LEAST = 8
"""Requests of a share, or a GPU writes its last answers one by one, in as many passes as for all at once."""
_COMPARED_AT_ONCE = 64
"""Questions of a share whose given answers are compared."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a process is told first: what to load, and where; `threads` of the CPU are its own."""

    source: str
    chat_template: bool
    batch_size: int | None
    device: str
    threads: int
    name: str


@dataclass(slots=True)
class _Process:
    name: str
    process: subprocess.Popen[bytes]
    pipe: Connection
    at_once: int = 0
    """Prompts it writes the answers to at a time."""


def devices(processes: int | None, device: str | None = None) -> list[str]:
    """One device a process: as many as asked for, else every GPU that torch sees, else the CPU once.

    Raises:
        MissingError: more processes than GPUs: two would share one's memory.
    """
    found = 0 if device else torch.cuda.device_count()
    if processes is not None and 0 < found < processes:
        raise MissingError(f"{processes} processes, but {found} GPUs", f"use `--processes {found}` or fewer")
    count = processes or max(1, found)
    if not found:
        return [device or "cpu"] * count
    return [f"cuda:{number}" for number in range(count)]


def load(checkpoint: Path | str, *, chat_template: bool, batch_size: int | None, on: Sequence[str]) -> Parallel:
    """See `engine.load`; `on`: the device of each process."""
    source, tokenizer, _ = read_tokenizer(checkpoint, chat_template=chat_template)
    torch.cuda.empty_cache()  # of a training in this process, on a device that is now another's
    threads = max(1, torch.get_num_threads() // len(on))
    setups = [
        Setup(source, chat_template, batch_size, device, threads, f"process {number} of {len(on)}")
        for number, device in enumerate(on, 1)
    ]
    started = _begin(setups)  # says what is wrong with a checkpoint better than its config alone would
    weightless = SimpleNamespace(
        config=AutoConfig.from_pretrained(source, trust_remote_code=False), device=torch.device("cpu")
    )
    lm = HuggingFace(weightless, tokenizer, chat_template=chat_template, batch_size=batch_size)
    return Parallel(lm, setups, started)


class Parallel:
    """An lm-eval model that has its requests answered elsewhere; what needs no weights is `lm`'s own.

    When a process fails, all are ended, and started again when next asked.
    """

    def __init__(self, lm: HuggingFace, setups: Sequence[Setup], started: list[_Process]) -> None:
        self._lm, self._setups, self._processes = lm, setups, started
        weakref.finalize(self, _end, started)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def answers(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Answer]]]:
        """(number of the request, answer), a batch at a time, as soon as any process has one.

        Raises:
            OutOfMemoryError: not even one prompt fits.
            KilledError, RunError: a process died, or met an error that is not ours.
        """
        groups: dict[str, list[list[int]]] = {}
        for number, (_, settings) in enumerate(requests):
            groups.setdefault(repr(settings), []).append([number])
        for units in groups.values():
            units.sort(key=lambda unit: -len(requests[unit[0]][0]))
        yield from self._ask("answers", requests, Shares(groups.values(), len(self._setups)))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval asks for them: texts in the order of the requests."""
        return texts(self.answers([request.args for request in requests]), len(requests))

    def likelihoods(self, requests: Sequence[Any]) -> Iterator[list[tuple[int, tuple[float, bool]]]]:
        """(number of the request, what `loglikelihood` says), as soon as any process has some.

        Raises: as `answers`.
        """
        asked = [request.args for request in requests]
        questions: dict[str, list[int]] = {}
        for number, (context, _) in enumerate(asked):
            questions.setdefault(context, []).append(number)
        units = sorted(questions.values(), key=lambda unit: -len(asked[unit[0]][0]))
        for said in self._ask("likelihoods", asked, Shares([units], len(self._setups))):
            self.truncated.update(asked[number] for number, (_, _, truncated) in said if truncated)
            yield [(number, (value, greedy)) for number, (value, greedy, _) in said]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval asks: (log likelihood of the continuation in nats, whether greedy decoding writes it)."""
        found = dict(item for batch in self.likelihoods(requests) for item in batch)
        return [found[number] for number in range(len(requests))]

    def _ask(self, kind: Kind, requests: Sequence[Any], shares: Shares) -> Iterator[list[tuple[int, Any]]]:
        try:
            if not self._processes:
                self._processes += _begin(self._setups)
            idle, busy = list(self._processes), dict[Connection, tuple[_Process, list[int]]]()
            while True:
                for process in idle:
                    at_once = process.at_once if kind == "answers" else _COMPARED_AT_ONCE
                    if share := shares.take(at_once):
                        _tell(process, (kind, [requests[number] for number in share]))
                        busy[process.pipe] = process, share
                idle.clear()
                if not busy:
                    return
                for pipe in _ready(busy):
                    process, share = busy[pipe]
                    what, said = _hear(process)
                    if what == "idle":
                        process.at_once = said
                        idle.append(busy.pop(pipe)[0])
                    else:
                        yield [(share[place], answer) for place, answer in said]
        except BaseException:  # also Ctrl-C, or nobody listens any more: what is under way is of no use
            _end(self._processes)
            raise


class Shares:
    """What is left to ask, by number: in groups that no share mixes, of units that stay together, longest first.

    A share is what a process works on at a time; towards the end it is its part of the rest: all end together.
    """

    def __init__(self, groups: Iterable[Sequence[list[int]]], processes: int) -> None:
        self._groups = deque(deque(units) for units in groups if units)
        self._processes = processes
        self._left = sum(map(len, self._groups))
        self._least = min(_LEAST, self._part())

    def take(self, at_once: int) -> list[int]:
        """The next share, of at most `at_once` units; empty when nothing is left."""
        if not self._groups:
            return []
        units = self._groups[0]
        size = min(at_once, max(self._least, self._part()), len(units))
        self._left -= size
        taken = [number for _ in range(size) for number in units.popleft()]
        if not units:
            self._groups.popleft()
        return taken

    def _part(self) -> int:
        return -(-self._left // self._processes)


def _begin(setups: Sequence[Setup]) -> list[_Process]:
    """Processes that have loaded the checkpoint."""
    processes: list[_Process] = []
    try:
        for setup in setups:
            processes.append(_start(setup))
            _tell(processes[-1], setup)
        loading = {process.pipe: process for process in processes}
        while loading:
            for pipe in _ready(loading):
                process = loading.pop(pipe)
                _, process.at_once = _hear(process)
    except BaseException:
        _end(processes)
        raise
    return processes


def _start(setup: Setup) -> _Process:
    here, there = Pipe()
    arguments = [str(there.fileno()), str(os.getpid())]
    process = subprocess.Popen(
        [sys.executable, "-m", "packcli.eval.engines.worker", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=2,  # stdout is for results
        env={**os.environ, "OMP_NUM_THREADS": str(setup.threads)},
        pass_fds=(there.fileno(),),
        start_new_session=True,  # Ctrl-C is for whoever asks
    )
    there.close()
    return _Process(setup.name, process, here)


def _ready(waited: Iterable[Connection]) -> list[Connection]:
    """Those that say something, or died."""
    return [pipe for pipe in wait(list(waited)) if isinstance(pipe, Connection)]


def _tell(process: _Process, message: object) -> None:
    try:
        process.pipe.send(message)
    except OSError:
        raise _died(process) from None


def _hear(process: _Process) -> tuple[str, Any]:
    try:
        what, said = process.pipe.recv()
    except (EOFError, OSError):
        raise _died(process) from None
    if what == "failed":
        raise said
    return what, said


def _died(process: _Process) -> KilledError:
    code = process.process.wait()
    how = f"exit code {code}"
    if code < 0:
        memory = "; out of memory?" if -code == signal.SIGKILL else ""
        how = f"signal {-code}, {signal.Signals(-code).name}{memory}"
    return KilledError(
        f"{process.name} of the evaluation died ({how})",
        "run the same command again: it goes on with the answers it has; fewer `--processes` take less memory",
    )


def _end(processes: list[_Process]) -> None:
    for process in processes:
        process.process.kill()
    for process in processes:
        process.process.wait()
        process.pipe.close()
    processes.clear()
