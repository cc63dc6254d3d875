"""A sweep on a cluster: what of it is there already, what is submitted, what is cancelled.

The truth about a job is SLURM's, about a stage the disk's. Nothing else is kept: an array's comment leads to its
directory, and that says which stages its elements do, so all is found again after a crash at any moment.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from packcli import stages
from packcli.errors import ConfigError, MissingError, PackcliError, RunError
from packcli.files import atomic_write, locked, read_sealed, write_sealed
from packcli.launch import graph, life, script, slurm
from packcli.launch.graph import Array, Known, Stage
from packcli.launch.profile import Profile, StageName
from packcli.launch.script import Submitted
from packcli.launch.slurm import PartitionSize, Seen
from packcli.plan import Plan
from packcli.store import Store


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a stage, or a submission, was not done. `exit_code` as in `errors.py`."""

    cause: str
    fix: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Sent:
    """An array that SLURM accepted as `job`."""

    job: str
    array: Array


@dataclass(slots=True)
class Outcome:
    """What a submission came to. `live`: jobs there before; `otherwise`: of these, by another profile than now.

    `skipped`: stages that would only fail again.
    """

    sent: list[Sent] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    skipped: list[Stage] = field(default_factory=list)
    live: int = 0
    otherwise: int = 0


class View:
    """Jobs of a run directory as SLURM has them. Made before the disk is read: what has ended is done there.

    `patient`: as `slurm.live` has it.
    """

    def __init__(self, store: Store, *, patient: bool = True) -> None:
        self._store = store
        self._orders: dict[str, Submitted | None] = {}
        self._reported: dict[str, frozenset[str]] = {}
        self.live = [seen for seen in slurm.live(patient=patient) if self.order(seen.array) is not None]

    def order(self, id_: str) -> Submitted | None:
        """What an array is to do; None: it is of another run directory."""
        if id_ not in self._orders:
            submission, _, number = id_.partition(".")
            try:
                read = read_sealed(self._store.array_order(submission, int(number)))
                order = Submitted.model_validate(read)
                # A copy of a run directory has the orders too, but the jobs work for the one they were given.
                is_ours = Path(order.runs).samefile(self._store.root)
                self._orders[id_] = order if is_ours else None
            except (OSError, ValueError):  # one that is damaged is raised: its jobs are no stranger's
                self._orders[id_] = None
        return self._orders[id_]

    def stages(self, seen: Seen) -> tuple[Stage, ...]:
        """What an element does; of a part, nothing: its stage is done by the job that waits for all parts."""
        order = self.order(seen.array)
        assert order is not None
        element = order.array.at(seen.element)
        return () if element.part else element.stages

    def of(self, plan: Plan) -> list[tuple[Seen, Submitted]]:
        """Elements that do stages of a plan, parts of them, or a table of its cells, with their array's orders."""
        wanted, cells, found = set(plan.stages()), {cell.id for cell in plan.cells}, []
        for seen in self.live:
            order = self.order(seen.array)
            assert order is not None
            reported = self.reported(order)
            if wanted.intersection(order.array.at(seen.element).stages) or (
                reported and order.sweep == plan.name and reported <= cells
            ):
                found.append((seen, order))
        return found

    def log(self, seen: Seen) -> Path | None:
        """What an element wrote; None: it never started."""
        order = self.order(seen.array)
        assert order is not None
        path = self._store.job_log(order.submission, order.array.number, seen.job)
        return path if path.exists() else None

    def waits_for(self, seen: Seen) -> set[str]:
        """Live elements that must end well before a queued one can start."""
        order, found = self.order(seen.array), set()
        assert order is not None
        for need in order.array.needs if seen.state == "queued" else ():
            if need.kind == "afterany":
                continue
            before = self.order(f"{order.submission}.{need.array}") if need.array is not None else None
            array = need.job if before is None else self._job(before)
            element = seen.element if need.kind == "aftercorr" else need.element
            found |= {
                other.job
                for other in self.live
                if other.job.partition("_")[0] == array and element in (None, other.element)
            }
        return found

    def has_report(self, plan: Plan) -> bool:
        """Whether a table of all the plan's cells is to be made when its jobs have ended."""
        cells = {cell.id for cell in plan.cells}
        orders = [self.order(seen.array) for seen in self.live]
        return any(order and order.sweep == plan.name and cells <= self.reported(order) for order in orders)

    def reported(self, order: Submitted) -> frozenset[str]:
        """Ids of the cells whose table a report job makes: of all that were submitted with it; else none."""
        if order.array.job != "report":
            return frozenset()
        if order.submission not in self._reported:
            submitted = read_sealed(self._store.submitted_plan(order.submission))
            self._reported[order.submission] = frozenset(cell["id"] for cell in submitted["cells"])
        return self._reported[order.submission]

    @cached_property
    def by_stage(self) -> dict[Stage, Seen]:
        return {stage: seen for seen in self.live for stage in self.stages(seen)}

    def lost(self, stages: Iterable[Stage]) -> dict[Stage, Seen]:
        """How the newest jobs of stages ended that are neither done nor live."""
        wanted = set(stages) - set(self.by_stage)
        if not wanted:
            return {}
        last: dict[Stage, tuple[Submitted, str]] = {}
        orders = [self.order(f"{submission}.{number}") for submission, number in self._store.arrays()]
        sent = [(job, order) for order in orders if order and (job := self._job(order)) is not None]
        for job, order in sorted(sent, key=lambda pair: int(pair[0])):  # SLURM counts: clocks may jump
            for element in order.array.elements:
                if element.part is None:
                    name = f"{job}_{element.index}"
                    last.update({stage: (order, name) for stage in element.stages if stage in wanted})
        how = slurm.ended({job.partition("_")[0] for _, job in last.values()})
        return {
            stage: Seen(order.id, job, "ended", how.get(job, slurm.NO_RESULT), "")
            for stage, (order, job) in last.items()
        }

    def _job(self, order: Submitted) -> str | None:
        try:
            return str(read_sealed(self._store.array_job(order.submission, order.array.number))["job"])
        except OSError:
            return None  # killed before it was written, or never accepted


def known(plan: Plan, store: Store, profile: Profile, view: View | None, sizes: dict[str, int]) -> Known:
    """What need not be submitted."""
    every = plan.stages()
    states = store.states(every)
    done = stages.done(plan, every, store)
    live = {stage: seen.job for stage, seen in _promising(plan, view, done).items()} if view else {}
    blocked = {
        stage
        for stage in every
        if states[stage] == "failed" and stage not in live and _is_hopeless(plan, store, profile, stage)
    }
    return Known(
        done=done,
        live={stage: live[stage] for stage in every if stage in live and stage not in done},
        blocked=blocked,
        source_bytes=sizes,
        has_report=view is not None and view.has_report(plan),
    )


def _stale(plan: Plan, view: View, found: Known) -> set[str]:
    """Jobs of the plan that will never start."""
    live = [stage for stage in plan.stages() if stage in view.by_stage and stage not in found.done]
    return {view.by_stage[stage].job for stage in live if stage not in found.live}


def _promising(plan: Plan, view: View, done: Set[Stage]) -> dict[Stage, Seen]:
    """What is live, less jobs that wait for one that is gone: they never start, though SLURM may not know yet."""
    found = dict(view.by_stage)
    for stage in plan.stages():  # what comes first stands first
        seen = found.get(stage)
        if seen is None or seen.state != "queued":
            continue
        others = set(plan.inputs(*stage)) - set(view.stages(seen))
        if any(upstream not in done and upstream not in found for upstream in others):
            del found[stage]
    return found


def _is_hopeless(plan: Plan, store: Store, profile: Profile, stage: Stage) -> bool:
    failure = store.failure(*stage)
    if failure is None or failure.kind == "quarantined":
        return failure is not None
    if failure.kind not in life.SAME_AGAIN:
        return False
    return life.read(store, stage).settings == life.settings(plan, stage, profile.resources(_job(plan, stage)))


def _job(plan: Plan, stage: Stage) -> StageName:
    match stage[0]:
        case "tokens" | "index":
            return "prepare"
        case "train":
            return "base" if stage[1] in plan.shared else "train"
        case "eval":
            return "eval"


def orders(
    plan: Plan, store: Store, profile: Profile, arrays: Sequence[Array], submission: str
) -> list[Submitted]:
    """What is written for each array of a graph."""
    return [
        Submitted(
            submission=submission,
            sweep=plan.name,
            runs=str(store.root.absolute()),
            directory=str(store.array(submission, array.number).absolute()),
            array=array,
            profile=profile,
        )
        for array in arrays
    ]


def submit(
    plan: Plan,
    store: Store,
    profile: Profile,
    sizes: dict[str, int],
    *,
    retry: bool = False,
    fallback: bool = False,
    unsafe_no_sandbox: bool = False,
) -> Outcome:
    """Hand all that is missing to SLURM, and return.

    `retry`: also what would only fail again. `fallback`, `unsafe_no_sandbox`: as `Submitted` has them.

    Raises:
        ConfigError: SLURM would refuse a script; nothing was submitted.
        LockedError: somebody else submits from this run directory right now.
        MissingError: no SLURM, or it does not answer.
    """
    slurm.require()
    script.check_path(str(store.root.absolute()))
    store.check(writable=True)
    with locked(store.submissions(), "a submission"):
        view = View(store)
        if retry:
            _forget(plan, store, view)
        found = known(plan, store, profile, view, sizes)
        mine = view.of(plan)
        if stale := _stale(plan, view, found):
            slurm.cancel(sorted(stale))
            mine = [(seen, order) for seen, order in mine if seen.job not in stale]
        outcome = Outcome(skipped=sorted(found.blocked), live=len(mine))
        outcome.otherwise = sum(order.profile != profile for _, order in mine)
        outcome.failures += [_blocked(plan, store, stage) for stage in outcome.skipped]
        arrays = graph.graph(plan, profile, found)
        if arrays:
            store.write_plan(plan)
            submission = uuid.uuid4().hex[:8]
            write_sealed(store.submitted_plan(submission), plan.model_dump(mode="json"))
            sent = orders(plan, store, profile, arrays, submission)
            asked = {"fallback": fallback, "unsafe_no_sandbox": unsafe_no_sandbox}
            sent = [order.model_copy(update=asked) for order in sent]
            _Submission(store, sent, outcome).run()
    return outcome


def _forget(plan: Plan, store: Store, view: View) -> None:
    """Failures and attempts of stages that no job does now."""
    for stage in plan.stages():
        if stage not in view.by_stage and store.state(*stage) == "failed":
            store.job(*stage).unlink(missing_ok=True)
            store.failure_file(*stage).unlink(missing_ok=True)


def _blocked(plan: Plan, store: Store, stage: Stage) -> Failure:
    error = store.failure(*stage)
    assert error is not None
    again = "the same settings would meet it again: change them, or pass --retry"
    fix = error.fix if error.kind == "quarantined" else f"{error.fix}; {again}"
    return Failure(f"{_called(plan, graph.names(plan), stage)}: {error.cause}", fix, error.exit_code)


class _Submission:
    """Arrays of one graph on their way. One that is refused leaves out those that wait for it, and no others."""

    def __init__(self, store: Store, orders: Sequence[Submitted], outcome: Outcome) -> None:
        self._store, self._orders, self._outcome = store, orders, outcome
        self._jobs: dict[int, str] = {}

    def run(self) -> None:
        self._check()
        for order in self._orders:
            needs = [need.array for need in order.array.needs if need.array is not None]
            is_report = order.array.job == "report"
            if not is_report and any(number not in self._jobs for number in needs):
                continue
            if is_report and needs and not self._jobs:
                continue
            try:
                self._send(order)
            except PackcliError as error:
                self._outcome.failures.append(self._refused(order, error))
                if isinstance(error, MissingError):
                    return  # SLURM is down, or takes no more: it would say the same of the rest

    def _check(self) -> None:
        """Ask SLURM about one script of each kind: a wrong partition is better known before the first job."""
        shapes = {(order.array.job, order.array.nodes): order for order in reversed(self._orders)}
        partitions = slurm.partition_sizes()
        for order in shapes.values():
            error = slurm.check(self._write(order, None))
            error = error or _too_large(order, partitions.get(order.resources.partition))
            if error is not None:
                raise type(error)(f"{order.array.job} jobs: {error.cause}; nothing was submitted", error.fix)

    def _write(self, order: Submitted, dependency: str | None) -> Path:
        write_sealed(self._store.array_order(order.submission, order.array.number), order.model_dump(mode="json"))
        path = self._store.array_script(order.submission, order.array.number)
        with atomic_write(path) as file:
            file.write(script.text(order, dependency).encode())
        return path

    def _send(self, order: Submitted) -> None:
        path = self._write(order, dependency(order.array, self._jobs))
        job = slurm.submit(path, lambda: _find(order.id))
        self._jobs[order.array.number] = job
        record = {"job": job, "submitted_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write_sealed(self._store.array_job(order.submission, order.array.number), record)
        self._outcome.sent.append(Sent(job, order.array))

    def _refused(self, order: Submitted, error: PackcliError) -> Failure:
        count = f"{len(self._jobs)} of {len(self._orders)} arrays are submitted"
        cause = f"{order.array.job} jobs ({len(order.array.elements)}) were not submitted: {error.cause}; {count}"
        return Failure(cause, error.fix, error.exit_code)


def _too_large(order: Submitted, there: PartitionSize | None) -> ConfigError | None:
    """What a partition never has, which SLURM says in the words it has for nodes that are down just now."""
    nodes, gpus = order.array.nodes, order.resources.gpus_per_node
    if there is not None and nodes > there.nodes:
        cause = f"{nodes} nodes a job, but the partition has {there.nodes}"
        return ConfigError(cause, "mend `nodes` in the profile, or `train.nodes` in the sweep file")
    if there is not None and gpus > there.gpus:
        cause = f"{gpus} GPUs a node, but the partition's nodes have {there.gpus or 'none'}"
        return ConfigError(cause, "mend `gpus_per_node` in the profile")
    return None


def dependency(array: Array, jobs: dict[int, str]) -> str | None:
    """As `sbatch --dependency` takes it. `jobs`: SLURM's ids of the arrays submitted so far."""
    words = []
    for need in array.needs:
        job = need.job if need.array is None else jobs.get(need.array)
        if job is not None:
            words.append(f"{need.kind}:{job}" + (f"_{need.element}" if need.element is not None else ""))
    return ",".join(words) or None


def _find(id_: str) -> str | None:
    return next((seen.job.partition("_")[0] for seen in slurm.live() if seen.array == id_), None)


def cancel(plan: Plan, store: Store) -> list[str]:
    """Cancel every job of these cells that this sweep submitted and that has not ended; their ids.

    What other jobs of the run directory wait for, such as a token store that more cells need, goes on.
    """
    slurm.require()
    view = View(store)
    own = {seen.job for seen, order in view.of(plan) if order.sweep == plan.name}
    waiting = [seen for seen in view.live if seen.job not in own]
    while waiting:
        needed = view.waits_for(waiting.pop()) & own
        own -= needed
        waiting += [seen for seen in view.live if seen.job in needed]
    found = [seen.job for seen in view.live if seen.job in own]
    slurm.cancel(found)
    return found


def problems(plan: Plan, store: Store, view: View) -> list[Failure]:
    """What ended without being done, as the disk or SLURM says; not what only waited for something that did."""
    found, silent = [], []
    named = graph.names(plan)
    states = store.states(plan.stages())
    for stage, state in states.items():
        waited = any(states[upstream] != "done" for upstream in plan.inputs(*stage))
        if stage in view.by_stage or state == "done" or waited:
            continue
        error = store.failure(*stage)
        if error is None:
            silent.append(stage)
        else:
            cause = f"{_called(plan, named, stage)}: {error.cause}"
            found.append(Failure(cause, error.fix, error.exit_code))
    for stage, seen in view.lost(silent).items():
        cause = f"{_called(plan, named, stage)}: job {seen.job}: {seen.reason}"
        fix = "run the same command again: it submits what is missing"
        if (log := view.log(seen)) is not None:
            fix = f"see {log}; then {fix}"
        found.append(Failure(cause, fix, RunError.exit_code))
    return found


def _called(plan: Plan, named: Mapping[Stage, str], stage: Stage) -> str:
    """A stage as its user knows it: by the labels of its cell."""
    kind, id_ = stage
    if kind == "eval":
        order = plan.evals[id_]
        return f"{order.task} of {named.get(('train', order.train), order.train)}"
    return f"{kind} {named.get(stage, id_)}"
