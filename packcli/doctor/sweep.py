"""What the rest of a sweep takes of a machine: which findings it cannot do without, how much disk and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from packcli import memory, shapes, stages
from packcli.config import TrainSpec
from packcli.data import hub
from packcli.doctor.checks import Check, Finding, State
from packcli.doctor.machine import Card, gpus, memory_bytes, size
from packcli.doctor.storage import disk, there
from packcli.download import Need
from packcli.errors import MissingError, RunError
from packcli.eval import protocol
from packcli.memory import Setup
from packcli.plan import EvalOrder, Kind, Plan, TrainOrder
from packcli.processes import cores
from packcli.store import Store

_FINAL = {"float32": 4, "bfloat16": 2}
_BYTES_OF_TEXT = 1.1
"""Bytes of a token store for one of text: 4.3 a token (docs/scale.md), and a token is four letters or so."""
_FILES_S = 60.0
_GROUPINGS_THAT_LEARN = ("similarity", "adversarial")


@dataclass(frozen=True)
class Sweep:
    """A plan in a run directory.

    `remote`: what it reads from the Hub. `here`: this machine is to train it; else it submits jobs, and what their
    nodes have cannot be seen from here.
    """

    plan: Plan
    store: Store
    remote: Sequence[Need] = ()
    here: bool = True

    @cached_property
    def _todo(self) -> set[tuple[Kind, str]]:
        stages_ = self.plan.stages()
        return set(stages_) - stages.done(self.plan, stages_, self.store)

    @cached_property
    def trains(self) -> list[TrainOrder]:
        return [order for id_, order in self.plan.trains.items() if ("train", id_) in self._todo]

    @cached_property
    def evals(self) -> list[EvalOrder]:
        return [order for id_, order in self.plan.evals.items() if ("eval", id_) in self._todo]

    def bench_data(self) -> list[str]:
        return sorted({order.eval.bench_data for order in self.evals if order.eval.bench_data})

    def servers(self) -> dict[str, str | None]:
        """What asks a server, and where it is; None: where OPENAI_BASE_URL says."""
        found: dict[str, str | None] = {}
        for order in self.evals:
            if protocol.kind(order.task) == "judged" and order.eval.judge is not None:
                found["judge"] = order.eval.judge.base_url
            if order.eval.engine == "openai":
                found["engine openai"] = order.eval.base_url
        return found

    def needs(self) -> dict[str, str]:
        """Findings by name -> what of the sweep cannot do without them being ok."""
        found: dict[str, str] = {}
        on_nodes = [*self._of_training(), *self._of_scoring()] if self.here else []
        for name, what in [*on_nodes, *self._of_data()]:
            found.setdefault(name, what)
        return found

    def _of_training(self) -> Iterator[tuple[str, str]]:
        for order in self.trains:
            spec = order.train
            if spec.backend == "trl":
                continue  # another Python trains
            yield from ((name, "training") for name in ("torch", "attention sdpa", "extra train"))
            if spec.attention_backend != "auto":
                yield f"attention {spec.attention_backend}", f"`train.attention_backend: {spec.attention_backend}`"
            if spec.head == "liger":
                yield "liger", "`train.head: liger`"
            if spec.lora is not None:
                yield "extra lora", "`train.lora`"
            if spec.trackers:
                yield "extra track", "`train.trackers`"
            if order.arm.group_by in _GROUPINGS_THAT_LEARN:
                yield "extra related", f"`group_by: {order.arm.group_by}`"

    def _of_scoring(self) -> Iterator[tuple[str, str]]:
        for order in self.evals:
            task = f"task {order.task}"
            yield from ((name, task) for name in ("torch", "extra eval"))
            if order.eval.engine == "openai":
                yield "engine openai", "`eval.engine: openai`"
            match protocol.kind(order.task):
                case "judged":
                    yield from ((name, task) for name in ("judge", "extra judge"))
                case "benchmark":
                    scorer = protocol.load(order.task).facts.scorer
                    name = {"humaneval": "sandbox", "ifeval": "nltk", "longbench": "extra longbench"}.get(
                        scorer or ""
                    )
                    if name:
                        yield name, task

    def _of_data(self) -> Iterator[tuple[str, str]]:
        if not self._todo:
            return
        if missing := [f"{need.what} {need.name}" for need in self.remote if not _is_cached(need)]:
            yield "hub", f"{', '.join(missing)}: not in the cache here"
        yield "memory for it", "training"
        yield "disk", "what is to be made"
        yield "sweep files", "scoring"
        for need in self.remote:
            if need.kind == "dataset":
                yield "extra data", f"{need.what} {need.name}"

    def disk_bytes(self) -> int | None:
        """What the rest will write at most at a time, about; None: the size of a model is not known here."""
        sizes = stages.source_bytes(self.plan)
        tokens = sum(count for id_, count in sizes.items() if ("tokens", id_) in self._todo)
        finals = states = 0
        for order in self.trains:
            if (count := _parameters(order)) is None:
                return None
            finals += count * _FINAL[order.model.dtype]
            states = max(states, order.train.keep_last * _state_bytes(order, count))
        at_once = min(len(self.trains), 1 if _cards() else cores())
        return int(_BYTES_OF_TEXT * tokens) + finals + at_once * states

    def checks(self) -> list[Check]:
        memory_ = [Check("memory for it", self._memory)] if self.here else []
        return [Check("sweep files", self._files, _FILES_S), *memory_, self._disk()]

    def _files(self) -> Iterator[Finding]:
        """What `sweep` itself looks for before it begins."""
        problems = stages.preflight(self.plan, self.store)
        if not problems:
            found = "what lies here of models, arms and benchmark files is as it asks for"
            yield Finding("sweep files", "ok", found)
        for problem in problems:
            state: State = "missing" if isinstance(problem, MissingError) else "failed"
            yield Finding("sweep files", state, problem.cause, "the rest of the sweep runs", problem.fix)

    def _memory(self) -> Iterator[Finding]:
        cards = _cards()
        taken = [taken for order in self.trains if (taken := _memory_bytes(order, len(cards))) is not None]
        if not taken:
            unknown = "not known: packcli does not know the size of the models left to train"
            yield Finding("memory for it", "ok", unknown if self.trains else "nothing is left to train")
            return
        free = [card.free_bytes for card in cards if card.free_bytes is not None]
        if free:
            room = min(free)
        elif (known := memory_bytes()) is not None:
            room = known[1]
        else:
            yield Finding("memory for it", "ok", "not known: how much is free is asked of Linux only")
            return
        where = f"on each of {len(cards)} GPUs" if free else "on this machine"
        least = "" if cards else "at least "  # activations are not counted on a CPU
        text = f"the largest training takes {least}{size(max(taken))}; {size(room)} are free {where}"
        if max(taken) > room:
            fix = "`packcli sweep SWEEP --dry-run` shows what memory goes to, and which settings would fit"
            yield Finding("memory for it", "missing", text, "it would end out of memory", fix)
        else:
            yield Finding("memory for it", "ok", text)

    def _disk(self) -> Check:
        def look() -> Iterator[Finding]:
            needed = self.disk_bytes()
            found = disk(there(self.store.root), needed or 0)
            yield found if needed is not None else _unknown(found)

        return Check("disk", look)


def _cards() -> tuple[Card, ...]:
    """Those that answer; that others do not is another check's to say."""
    try:
        return gpus()
    except RunError:
        return ()


def _unknown(found: Finding) -> Finding:
    means = found.means or "what the sweep takes is not known: the size of a model is not known here"
    return Finding(found.name, found.state, found.found, means, found.fix)


def _parameters(order: TrainOrder) -> int | None:
    shape = shapes.shape(order.model, order.model.vocab_size)
    return None if shape is None else memory.parameters(shape)


def _state_bytes(order: TrainOrder, count: int) -> int:
    """Of one resumable checkpoint: weights and AdamW's moments; under LoRA those of adapters, which are little."""
    spec: TrainSpec = order.train
    if spec.lora is not None:
        return 0
    return count * (4 + (8 if spec.optimizer_state == "float32" else 4))


def _memory_bytes(order: TrainOrder, num_gpus: int) -> float | None:
    """Of one GPU, all counted; on a CPU weights, gradients and moments."""
    shape = shapes.shape(order.model, order.model.vocab_size)
    if shape is None:
        return None
    if not num_gpus:
        count = memory.parameters(shape)
        trained = 0 if order.train.lora is not None else count
        return 4 * count + 4 * trained + (_state_bytes(order, count) - 4 * trained if trained else 0)
    setup = Setup(
        shape=shape,
        train=order.train,
        dtype=order.model.dtype,
        max_length=order.max_length,
        world=num_gpus,
        degree=num_gpus,
    )
    return memory.total_bytes(setup)


def _is_cached(need: Need) -> bool:
    """Whether the Hub's cache holds something of it; `packcli fetch` knows whether that is all."""
    commit = hub.cached_commit(need.kind, need.name, need.revision)
    directory: Path = hub.cache_directory(need.kind, need.name)
    return commit is not None and (directory / "snapshots" / commit).is_dir()
