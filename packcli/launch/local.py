"""Runs what is missing of a plan on this machine: a few long-lived workers, jobs in dependency order."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from packcli import costs, log, stages
from packcli.commit_points import passing
from packcli.config import EstimateSpec
from packcli.errors import PreemptedError
from packcli.files import held, is_alive, is_locked
from packcli.launch import graph, ranks
from packcli.launch.ranks import Group
from packcli.plan import Kind, Plan, closure
from packcli.processes import GRACE_S, Stop, cores
from packcli.store import Store

Stage = tuple[Kind, str]
_QUIET_LINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a stage was not done. `exit_code` as in `errors.py`."""

    stage: Stage
    cause: str
    fix: str
    exit_code: int


@dataclass(slots=True)
class _Job:
    """One request to a worker: a stage, or all missing tasks of one checkpoint."""

    kind: Kind
    ids: list[str]
    needs: set[Stage]
    name: str
    cost: float = 0.0


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    answers: int
    job: _Job | None = None
    pending: bytes = b""
    closed: bool = False
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Run:
    """The state of one `run` call."""

    plan: Plan
    store: Store
    waiting: list[_Job]
    done: set[Stage]
    total: int
    group: Group
    allowed: dict[str, bool]
    logs: Path
    explained: set[str] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)


def run(
    plan: Plan,
    store: Store,
    targets: Iterable[Stage],
    *,
    processes: int | None = None,
    grace_s: float = GRACE_S,
    fallback: bool = False,
    unsafe_no_sandbox: bool = False,
    logs: Path | None = None,
) -> list[Failure]:
    """Do every stage the targets need that is not done; what failed, in the order it did.

    `processes`: of one training; unset, one a GPU. `grace_s`: how long a training may take to write its checkpoint
    when all is to stop. `fallback`, `unsafe_no_sandbox`: as typed. `logs`: for the workers; unset, the sweep's.

    Raises:
        KeyboardInterrupt: Ctrl-C; running trainings were asked to write a checkpoint first.
        PreemptedError: SIGTERM or SIGUSR2, likewise.
        MissingError: more processes than GPUs.
    """
    wanted = closure(plan, targets)
    done = stages.done(plan, wanted, store)
    stages.tidy(done, store)
    jobs = _jobs(plan, [stage for stage in wanted if stage not in done])
    if not jobs:
        return []
    store.check(writable=True)
    if logs is None:  # of a cluster's thousand jobs, none writes what their submission wrote
        store.write_plan(plan)
    started = time.monotonic()
    heavy = any(job.kind in ("train", "eval") for job in jobs)
    each, gpus = ranks.processes_here(processes) if heavy else (1, 0)
    group = Group(processes=each, grace_s=grace_s)
    logs = logs or store.sweep(plan.name)
    allowed = {"fallback": fallback, "unsafe_no_sandbox": unsafe_no_sandbox}
    state = _Run(plan, store, jobs, done, sum(len(job.ids) for job in jobs), group, allowed, logs)
    # Two on one GPU share its memory and spoil each other's times.
    count, threads = (1, cores()) if gpus or each > 1 else _workers(plan, jobs)
    log.logger.info("%d of %d stages to do, %d at a time, on %d cores", state.total, len(wanted), count, cores())
    with _announced(store, plan.name), terminable(), _pool(store, logs, count, threads, grace_s) as workers:
        _schedule(state, workers)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    log.logger.info("%s after %d min %d s", "failed" if state.failures else "finished", minutes, seconds)
    return state.failures


def _workers(plan: Plan, jobs: Sequence[_Job]) -> tuple[int, int]:
    """How many workers, and threads for each: as many side by side as cores hold without sharing one."""
    all_ = cores()
    asked = [plan.trains[id_].train.threads for job in jobs if job.kind == "train" for id_ in job.ids]
    threads = max((count or all_ for count in asked), default=max(1, all_ // 2))
    scoring = [plan.evals[id_].eval for job in jobs if job.kind == "eval" for id_ in job.ids]
    threads = max([threads, *(spec.processes or 1 for spec in scoring)])  # shared by a worker's processes
    # One store is made by processes of its own, and its indexes take milliseconds: no worker waits for those.
    wide = sum(job.kind in ("train", "eval") for job in jobs) or sum(job.kind == "tokens" for job in jobs) or 1
    count = max(1, min(wide, all_ // min(threads, all_)))
    return count, max(1, all_ // count)


def _jobs(plan: Plan, missing: Sequence[Stage]) -> list[_Job]:
    names = graph.names(plan)
    jobs: list[_Job] = []
    scoring: dict[tuple[str, str], _Job] = {}
    for kind, id_ in missing:
        needs = set(plan.inputs(kind, id_))
        if kind != "eval":
            jobs.append(_Job(kind, [id_], needs, names.get((kind, id_), id_)))
            continue
        order = plan.evals[id_]
        key = (order.train, order.eval.model_dump_json(exclude={"tasks"}))
        if key not in scoring:
            scoring[key] = _Job(kind, [], needs, names.get(("train", order.train), order.train))
            jobs.append(scoring[key])
        scoring[key].ids.append(id_)
    return jobs


@contextlib.contextmanager
def _announced(store: Store, sweep: str) -> Iterator[None]:
    """A file, locked while this process does the sweep, by which `cancel` finds it."""
    for left, number in store.processes(sweep):  # of coordinators that were killed
        _clear(left, number)
    path = store.process(sweep, os.getpid())
    with held(path, f"sweep {sweep}"):
        passing(path.with_name("process"), "after")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _clear(left: Path, number: int) -> None:
    """Of a process that was killed; one that lives may be about to lock its own."""
    if not is_alive(number) and not is_locked(left):
        left.unlink(missing_ok=True)


def cancel(sweep: str, store: Store) -> list[int]:
    """Ask every process of this machine that does the sweep to stop, as Ctrl-C does; their ids."""
    asked = []
    for path, number in store.processes(sweep):
        if is_locked(path):  # else it was killed, and its number may be another's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGTERM)
                asked.append(number)
        else:
            _clear(path, number)
    return asked


@contextlib.contextmanager
def _pool(store: Store, logs: Path, count: int, threads: int, grace_s: float) -> Iterator[list[_Worker]]:
    workers = [_start(store, logs, number, threads) for number in range(count)]
    try:
        yield workers
    except BaseException:
        # A session of their own keeps Ctrl-C from reaching the workers: they are asked to stop at a step.
        for worker in workers:
            worker.process.terminate()
            if worker.process.stdin is not None:
                worker.process.stdin.close()  # after its checkpoint it finds no further job, and ends
        deadline = time.monotonic() + grace_s
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            for worker in workers:
                if worker.job is not None and worker.job.kind == "train":
                    worker.process.wait(max(0.0, deadline - time.monotonic()))
        raise
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
            os.close(worker.answers)


def _start(store: Store, logs: Path, number: int, threads: int) -> _Worker:
    receive, send = os.pipe()
    path = store.worker_log(logs, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(store.root), str(send), str(threads), str(os.getpid())]
    with path.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "packcli.launch.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=(send,),
            start_new_session=True,
        )
    os.close(send)
    return _Worker(process, receive)


@contextlib.contextmanager
def terminable(fix: str = "run the same command again: it goes on where it was") -> Iterator[None]:
    """SIGTERM and SIGUSR2 stop a sweep as Ctrl-C does, with the exit code for "run again"; two, at once."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        first = stop.number is None
        stop.ask(number, frame)
        if first or stop.at_once:
            name = signal.Signals(number).name
            raise PreemptedError(f"stopped by {name}", fix)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _schedule(state: _Run, workers: list[_Worker]) -> None:
    selector = selectors.DefaultSelector()
    for number, worker in enumerate(workers):
        selector.register(worker.answers, selectors.EVENT_READ, number)
    finished, last_line = 0, time.monotonic()
    with log.progress() as display:
        bar = display.add_task("stages", total=state.total, note="")
        lines = {id(worker): display.add_task("", total=None, note="", visible=False) for worker in workers}
        while state.waiting or any(worker.job for worker in workers):
            for number, worker in enumerate(workers):
                if worker.job is None and (job := _next(state)) is not None:
                    if worker.closed:
                        _revive(state, workers, number)
                        selector.register(worker.answers, selectors.EVENT_READ, number)
                    _send(state, worker, job)
            for key, _ in selector.select(timeout=1.0):
                number, worker = key.data, workers[key.data]
                ended = worker.job
                for message in _receive(worker):
                    if message["event"] == "note":
                        worker.note = message
                        continue
                    if message["event"] == "say":
                        log.logger.info("%s%s", f"{ended.name}: " if ended else "", message["text"])
                        continue
                    assert ended is not None
                    finished += len(ended.ids)
                    _end(state, ended, message["failures"])
                    worker.job, worker.note = None, {}
                if worker.closed:
                    selector.unregister(worker.answers)
                    finished += _bury(state, number, worker)
            finished += _drop_blocked(state)
            display.update(bar, completed=finished)
            for worker in workers:
                display.update(lines[id(worker)], **_line(worker))
            if display.disable and time.monotonic() - last_line > _QUIET_LINE_S:
                last_line = time.monotonic()
                busy = "; ".join(_in_words(_line(worker)) for worker in workers if worker.job)
                log.logger.info("%d of %d stages done; %s", finished, state.total, busy)


def _line(worker: _Worker) -> dict[str, Any]:
    """What a worker's line of the display shows: its job, how far it is, its last remark."""
    job, note = worker.job, worker.note
    return {
        "visible": job is not None,
        "description": log.plain(f"  {job.kind} {job.name}") if job else "",
        "completed": note.get("done", 0),
        "total": note.get("total") or None,
        "note": log.plain(note.get("remark", "")),
    }


def _in_words(line: dict[str, Any]) -> str:
    """The same for a log, where there is no display."""
    place = f", {line['completed']} of {line['total']}" if line["total"] else ""
    return f"{line['description'].strip()}{place}" + (f", {line['note']}" if line["note"] else "")


def _next(state: _Run) -> _Job | None:
    """The ready job of the earliest kind; among trainings the longest first, so that workers end together."""
    ready = [job for job in state.waiting if job.needs <= state.done]
    if not ready:
        return None
    order = {"tokens": 0, "index": 1, "train": 2, "eval": 3}
    job = min(ready, key=lambda job: (order[job.kind], -_cost(state, job)))
    state.waiting.remove(job)
    return job


def _cost(state: _Run, job: _Job) -> float:
    """Slots one epoch of a training computes on; 0 for the rest."""
    if job.kind != "train":
        return 0.0
    order = state.plan.trains[job.ids[0]]
    manifest = state.store.manifest("index", order.index)
    return float(manifest.results["ledger"]["slots"]) if manifest else 0.0


def _send(state: _Run, worker: _Worker, job: _Job) -> None:
    orders = [state.plan.order(job.kind, id_).model_dump(mode="json") for id_ in job.ids]
    request: dict[str, Any] = {"kind": job.kind, "ids": job.ids, "orders": orders, **state.allowed}
    if job.kind == "train":
        _explain(state, job)
        if state.group.processes > 1:
            request["group"] = asdict(state.group)
    worker.job, worker.note = job, {}
    assert worker.process.stdin is not None
    # A worker that died takes no request; the scheduler sees its pipe close and replaces it.
    with contextlib.suppress(BrokenPipeError):
        worker.process.stdin.write(orjson.dumps(request, option=orjson.OPT_APPEND_NEWLINE))
        worker.process.stdin.flush()


def _explain(state: _Run, job: _Job) -> None:
    """Say what a step of this training holds, and the learning rate that follows: once for all its seeds."""
    order = state.plan.trains[job.ids[0]]
    same = order.model_copy(update={"id": "", "index": "", "seed": 0}).model_dump_json()
    step = costs.of(order, state.plan, state.store, EstimateSpec()).step if same not in state.explained else None
    state.explained.add(same)
    if step is not None:
        log.logger.info("%s: %s", job.name, step.text())


def _receive(worker: _Worker) -> list[dict[str, Any]]:
    chunk = os.read(worker.answers, 1 << 16)
    worker.closed = not chunk  # only its death closes its end of the pipe
    worker.pending += chunk
    *lines, worker.pending = worker.pending.split(b"\n")
    return [orjson.loads(line) for line in lines]


def _end(state: _Run, job: _Job, failures: list[dict[str, Any]]) -> None:
    failed = {item["id"] for item in failures}
    for item in failures:
        failure = Failure((job.kind, item["id"]), item["cause"], item["fix"], item["exit_code"])
        state.failures.append(failure)
    state.done.update((job.kind, id_) for id_ in job.ids if id_ not in failed)


def _bury(state: _Run, number: int, worker: _Worker) -> int:
    """A worker died: its job failed. How many stages that ended. It is started again when there is work for it."""
    job, code = worker.job, worker.process.wait()
    worker.job, worker.pending, worker.note = None, b"", {}
    if job is None:
        return 0
    error = ranks.died(f"{job.kind} {job.name}", code, state.store.failure(job.kind, job.ids[0]))
    # Only a training has a micro-batch and checkpoints.
    fix = error.fix if job.kind == "train" else "run the same command again: what is finished is kept"
    fix = f"{fix}. Its log: {state.store.worker_log(state.logs, number)}"
    for id_ in job.ids:
        state.store.fail(job.kind, id_, error)
    _end(
        state,
        job,
        [{"id": id_, "cause": error.cause, "fix": fix, "exit_code": error.exit_code} for id_ in job.ids],
    )
    return len(job.ids)


def _revive(state: _Run, workers: list[_Worker], number: int) -> None:
    threads = max(1, cores() // len(workers))
    fresh = _start(state.store, state.logs, number, threads)
    os.close(workers[number].answers)
    workers[number].process, workers[number].answers, workers[number].closed = fresh.process, fresh.answers, False


def _drop_blocked(state: _Run) -> int:
    """Jobs whose input failed will never be ready: drop them. How many stages that ended."""
    failed = {failure.stage for failure in state.failures}
    dropped = 0
    while blocked := [job for job in state.waiting if job.needs & failed]:
        for job in blocked:
            state.waiting.remove(job)
            failed.update((job.kind, id_) for id_ in job.ids)
            dropped += len(job.ids)
    return dropped
