"""One training over several processes of this machine, and of others on which the same command was started.

Ranks get the environment torchrun gives, so `torchrun -m packcli train` trains the same. What torchrun's agent
adds is elasticity, of no use to a run that goes on from its checkpoints; and it exits with 1 whatever its ranks
say, kills ranks that still write a checkpoint, does not pass SIGUSR2 on, and gives the peers of a dead rank half
a minute in a collective that will never end.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from packcli import log
from packcli.errors import (
    ConfigError,
    HangError,
    KilledError,
    MissingError,
    PackcliError,
    PreemptedError,
    RunError,
    of_kind,
)
from packcli.plan import TrainOrder
from packcli.processes import GRACE_S, Stop, cores, listening
from packcli.store import Store

Note = Callable[[int, int, str], None]

_LAST_WORDS_S = 5.0  # from the first rank's failure until the others, which may wait for it in vain, are killed
_LEAVE_S = 30.0
_TICK_S = 0.2
_ASK_S = 300.0
_EFFECTS = ("bug", "peer", "preempted")  # kinds of errors that another rank's end may have caused
_GPU_DRIVERS = ("nvidia[0-9]*", "kfd", "dxg")


@dataclass(frozen=True, slots=True)
class Group:
    """`processes` on each of `nodes` machines, of which this is number `node`.

    `endpoint`: "HOST:PORT" of a free port on machine 0; None where one machine is all. `burn_in`: see whether all
    machines are sound before each training; `names`: what to call them where they are not.
    """

    processes: int = 1
    nodes: int = 1
    node: int = 0
    endpoint: str | None = None
    grace_s: float = GRACE_S
    burn_in: bool = False
    names: tuple[str, ...] = ()

    def address(self, number: int) -> tuple[str, int]:
        """Where rank 0 of the `number`-th training listens: on its own port, as the last may not be free yet."""
        if self.endpoint is None:
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                return "127.0.0.1", int(listener.getsockname()[1])
        host, _, port = self.endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"--rdzv-endpoint `{self.endpoint}` is not HOST:PORT", "such as node0:29400")
        return host, int(port) + number


@dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    answers: int
    pending: bytes = b""
    ended: bool = False
    failure: PackcliError | None = None
    died: int | None = None
    """Its exit code, where it ended without a word."""


def has_gpu_driver() -> bool:
    return any(path for name in _GPU_DRIVERS for path in Path("/dev").glob(name))


def gpus() -> int:
    """How many GPUs torch would use. Its import takes seconds, so it is not asked where there is no driver.

    Raises:
        MissingError: a driver hangs.
    """
    if not has_gpu_driver():
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ASK_S)
    except subprocess.TimeoutExpired:
        cause = f"torch does not say in {_ASK_S:g} s how many GPUs there are"
        raise MissingError(cause, "`packcli doctor` looks at GPU and driver") from None
    return int(asked.stdout.split()[-1]) if asked.returncode == 0 else 0


def processes_here(wanted: int | None) -> tuple[int, int]:
    """(processes a training gets on this machine, GPUs): as asked, else one a GPU.

    Raises:
        MissingError: more processes than GPUs: two never share one.
    """
    found = gpus()
    if wanted is not None and 0 < found < wanted:
        raise MissingError(f"{wanted} processes, but {found} GPUs", f"use --nproc-per-node {found} or fewer")
    return wanted or max(1, found), found


def run_each(
    orders: Sequence[TrainOrder], store: Store, group: Group, note: Note, *, fallback: bool = False
) -> list[PackcliError]:
    """Train one after another, each with ranks of its own; what failed. Every machine of the group calls this.

    Raises:
        KeyboardInterrupt, PreemptedError: asked to stop.
    """
    failures = []
    for number, order in enumerate(orders):
        try:
            run(order, store, group, note, fallback=fallback, number=number)
        except PreemptedError:
            raise
        except PackcliError as error:
            failures.append(error)
    return failures


def run(
    order: TrainOrder, store: Store, group: Group, note: Note, *, fallback: bool = False, number: int = 0
) -> None:
    """Train one order with all of the group; back when every rank of this machine has ended.

    A signal asks all ranks to write a checkpoint, for which they have `group.grace_s`; a second kills them.

    Raises:
        PackcliError: what a rank reported, or `KilledError`; `failure.json` says the same.
        PreemptedError, KeyboardInterrupt: a signal asked to stop.
    """
    if store.manifest("train", order.id) is not None:
        return
    stop, ranks = Stop(), list[_Rank]()
    request = {
        "kind": "train",
        "ids": [order.id],
        "orders": [order.model_dump(mode="json")],
        "fallback": fallback,
        "burn_in": group.burn_in,
        "names": group.names,
    }
    with listening(stop, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        try:
            address = group.address(number)
            for local in range(group.processes):
                ranks.append(_start(store, group, address, local, request))
            _watch(ranks, stop, group.grace_s, note)
        finally:
            _leave(ranks)
    error = _verdict(ranks, stop, order, store)
    if error is None:
        return
    if isinstance(error, PreemptedError) and stop.number == signal.SIGINT:
        raise KeyboardInterrupt
    if isinstance(error, RunError):
        store.fail("train", order.id, error)  # rank 0 leaves its own errors; it does not know those of others
    raise error


def _start(store: Store, group: Group, address: tuple[str, int], local: int, request: dict[str, Any]) -> _Rank:
    number = group.node * group.processes + local
    threads = max(1, cores() // group.processes)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(group.nodes * group.processes),
        "LOCAL_WORLD_SIZE": str(group.processes),
        "MASTER_ADDR": address[0],
        "MASTER_PORT": str(address[1]),
    }
    receive, send = os.pipe()
    arguments = [str(store.root), str(send), str(threads), str(os.getpid())]
    arguments += [str(store.local)] if store.local else []
    process = subprocess.Popen(
        [sys.executable, "-m", "packcli.launch.worker", *arguments],
        stdin=subprocess.PIPE,
        stdout=sys.stderr,  # stdout is for results
        env=environment,
        pass_fds=(send,),
        start_new_session=True,  # Ctrl-C is passed on, not sent to each
    )
    os.close(send)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as requests:
        requests.write(orjson.dumps(request, option=orjson.OPT_APPEND_NEWLINE))
    return _Rank(number, process, receive)


def _watch(ranks: Sequence[_Rank], stop: Stop, grace_s: float, note: Note) -> None:
    """Until all ranks ended, no time is left, or a second signal came."""
    deadline, asked = float("inf"), False
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.answers, selectors.EVENT_READ, rank)
        while not all(rank.ended for rank in ranks):
            for key, _ in selector.select(_TICK_S):
                if not _listen(key.data, note):
                    selector.unregister(key.fileobj)
            if stop.number is not None and not asked:
                asked, deadline = True, min(deadline, stop.at_s + grace_s)
                for rank in ranks:
                    rank.process.send_signal(signal.SIGTERM)
            if any(rank.died is not None or _is_failure(rank.failure) for rank in ranks):
                deadline = min(deadline, time.monotonic() + _LAST_WORDS_S)
            if stop.at_once or time.monotonic() > deadline:
                return


def _is_failure(error: PackcliError | None) -> bool:
    return error is not None and not isinstance(error, PreemptedError)


def _listen(rank: _Rank, note: Note) -> bool:
    """Take what a rank says; whether it can say more."""
    chunk = os.read(rank.answers, 1 << 16)
    if not chunk:  # only its death closes its end of the pipe
        code = rank.process.wait()
        rank.died = None if rank.ended else code
        rank.ended = True
        return False
    *lines, rank.pending = (rank.pending + chunk).split(b"\n")
    for message in map(orjson.loads, lines):
        if message["event"] == "note":
            if rank.number == 0:
                note(message["done"], message["total"], message["remark"])
            continue
        if message["event"] == "say":
            if rank.number == 0:
                log.logger.info("%s", message["text"])
            continue
        rank.ended = True
        for item in message["failures"]:
            rank.failure = of_kind(item["kind"], item["cause"], item["fix"])
    return True


def _leave(ranks: Sequence[_Rank]) -> None:
    """See every rank out: those that are done go by themselves, of the others nothing more is expected."""
    deadline = time.monotonic() + _LEAVE_S
    well = all(rank.ended and rank.failure is None and rank.died is None for rank in ranks)
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(max(0.0, deadline - time.monotonic()) if well else 0)
        rank.process.kill()
        rank.process.wait()
        os.close(rank.answers)


def _verdict(ranks: Sequence[_Rank], stop: Stop, order: TrainOrder, store: Store) -> PackcliError | None:
    """The cause, where there are many effects: a rank that dies takes its peers with it, each in its own way."""
    told = [rank.failure for rank in ranks if rank.failure is not None]
    codes = {rank.number: rank.died for rank in ranks if rank.died is not None}
    if not told and not codes and all(rank.ended for rank in ranks):
        return None
    for error in told:
        if error.kind not in _EFFECTS:
            return error
    if stop.number is not None or PreemptedError.exit_code in codes.values():
        said = (error for error in told if isinstance(error, PreemptedError))
        cause = "stopped before a checkpoint was written: the last one is where it goes on"
        return next(said, PreemptedError(cause, "run the same command again"))
    lost = [(f"rank {number}", code) for number, code in codes.items()]
    for who, code in lost:
        if code < 0 or code == HangError.exit_code:
            return died(who, code, store.failure("train", order.id))
    # What a rank says of its peers, or of itself as a bug, counts where nothing better is known.
    return told[0] if told else died(*lost[0])


def died(who: str, code: int, left: PackcliError | None = None) -> PackcliError:
    """What to say of a process that ended without a word; `code` as `Popen.returncode` has it.

    `left`: what its `failure.json` says; a process that hung leaves one.
    """
    if code == HangError.exit_code and isinstance(left, HangError):
        return left
    if code >= 0:
        return KilledError(f"{who}: the process died (exit code {code})", "what it wrote to stderr says more")
    memory = "; out of memory?" if -code == signal.SIGKILL else ""
    fix = "lower `train.micro_batch`, set `train.checkpointing: full`, or give it more memory. " if memory else ""
    return KilledError(
        f"{who}: the process died (signal {-code}, {signal.Signals(-code).name}{memory})",
        f"{fix}Run the same command again: it goes on from its last checkpoint",
    )


class Lines:
    """A note that writes a line to the log at most every 30 seconds: for runs without a display."""

    def __init__(self, every_s: float = 30.0) -> None:
        self._every_s, self._last_s = every_s, time.monotonic()

    def __call__(self, done: int, total: int, remark: str) -> None:
        if time.monotonic() - self._last_s > self._every_s:
            self._last_s = time.monotonic()
            log.logger.info("%d of %d: %s", done, total, remark)
