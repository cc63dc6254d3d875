"""What a cluster is asked to do: the missing stages of a plan as arrays of jobs that wait for each other. Pure.

An element is what one job does. Elements of one kind and shape that wait for the same jobs are one array, so that
a thousand cells are a handful of submissions. A scoring array waits element by element for its training array.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from packcli.config import Spec
from packcli.launch.profile import Profile, StageName
from packcli.plan import Kind, Plan

Stage = tuple[Kind, str]
_Source = tuple[int | None, str | None]
"""What is waited for: an array of the same graph by its number, or one of SLURM's by its id."""


class Element(Spec):
    """What one job does: `stages`, in order, or part `part` (k from 0, n) of the first. `name`: labels.

    `index`: its number in SLURM's array; where an array waits element by element, that of what it waits for.
    """

    index: int = 0
    name: str
    stages: tuple[Stage, ...]
    part: tuple[int, int] | None = None


class Need(Spec):
    """A dependency as SLURM has it, on array `array` of the same graph or on `job`, an array there already.

    `element`: which of the array; None: all, or with `aftercorr` each its own.
    """

    kind: Literal["afterok", "aftercorr", "afterany"]
    array: int | None = None
    element: int | None = None
    job: str | None = None

    @property
    def source(self) -> _Source:
        return self.array, self.job


class Array(Spec):
    """Elements of one kind and shape, submitted at once. `number`: its place in the graph."""

    number: int
    job: StageName
    nodes: int
    elements: tuple[Element, ...]
    needs: tuple[Need, ...]

    def at(self, index: int) -> Element:
        return self._by_index[index]

    @cached_property
    def _by_index(self) -> dict[int, Element]:
        return {element.index: element for element in self.elements}


@dataclass(frozen=True, slots=True)
class Known:
    """What need not be submitted.

    `done`: stages on disk. `live`: stages that a job of SLURM's is to do, and that job, as ARRAY_ELEMENT.
    `blocked`: stages that failed in a way that trying again does not mend. `source_bytes`: size of a token store's
    local sources. `has_report`: a job is to make the table when what is live has ended.
    """

    done: AbstractSet[Stage] = frozenset()
    live: Mapping[Stage, str] = field(default_factory=dict)
    blocked: AbstractSet[Stage] = frozenset()
    source_bytes: Mapping[str, int] = field(default_factory=dict)
    has_report: bool = False


def graph(plan: Plan, profile: Profile, known: Known) -> tuple[Array, ...]:
    """Arrays in an order in which each may be submitted after those it waits for; the report last."""
    building = _Graph(plan, profile, known)
    for tokens in plan.tokens:
        building.prepare(tokens)
    building.flush()
    for shared in (True, False):
        for id_ in plan.trains:
            if (id_ in plan.shared) is shared:
                building.train(id_, "base" if shared else "train")
        building.flush()
    building.score()
    building.flush()
    building.report()
    building.flush()
    return tuple(building.arrays)


_Waiting = tuple[Element, tuple[Need, ...]]
"""An element, and what it waits for: all of an array, or one element of it."""


class _Graph:
    def __init__(self, plan: Plan, profile: Profile, known: Known) -> None:
        self._plan, self._profile, self._known = plan, profile, known
        self.arrays: list[Array] = []
        self._drafts: dict[tuple[StageName, int, object], list[_Waiting]] = {}
        self._place: dict[Stage, tuple[int, int]] = {}
        self._lost = set(known.blocked)
        self._names = names(plan)
        self._indexes: dict[str, list[Stage]] = {}
        for id_, index in plan.indexes.items():
            self._indexes.setdefault(index.tokens, []).append(("index", id_))
        self._scoring: dict[str, list[Stage]] = {}
        for id_, order in plan.evals.items():
            if self._is_missing(("eval", id_)):
                self._scoring.setdefault(order.train, []).append(("eval", id_))

    # Stages --------------------------------------------------------------------------------------------

    def prepare(self, tokens: str) -> None:
        """A token store and all its row indexes, which take milliseconds each, are one job."""
        store: Stage = ("tokens", tokens)
        indexes = self._indexes.get(tokens, [])
        missing = [stage for stage in (store, *indexes) if self._is_missing(stage)]
        if not missing or not self._can(missing[0]):
            return self._lose(indexes if missing else [])
        needs = list(self._needs(missing[0]))
        parts = self._parts(tokens) if store in missing else 1
        if parts > 1:
            name = self._names.get(store, tokens)
            elements = [Element(name=name, stages=(store,), part=(part, parts)) for part in range(parts)]
            for element in elements:
                self._add("parts", element, tuple(needs), None, tokens)
            first = len(self.arrays)
            self.flush(["parts"])
            needs += [Need(kind="afterok", array=number) for number in range(first, len(self.arrays))]
        name = self._names.get(store) or self._names.get(missing[0], tokens)
        self._add("prepare", Element(name=name, stages=tuple(missing)), tuple(needs))

    def train(self, id_: str, job: StageName) -> None:
        stage: Stage = ("train", id_)
        if not self._is_missing(stage):
            return
        if not self._can(stage):
            return self._lose([stage])
        element = Element(name=self._names.get(stage, id_), stages=(stage,))
        scored = id_ in self._scoring
        self._add(job, element, self._needs(stage), self._plan.trains[id_].train.nodes, scored)

    def score(self) -> None:
        """A training array's scores are one array, too, each element of which waits for its own training."""
        for array in list(self.arrays):
            scored = [self._scoring.pop(element.stages[0][1], None) for element in array.elements]
            if array.job not in ("base", "train") or not any(scored):
                continue
            for element, stages in zip(array.elements, scored, strict=True):
                need = Need(kind="afterok", array=array.number, element=element.index)
                self._add(
                    "eval", Element(name=element.name, stages=tuple(stages or ())), (need,), key=array.number
                )
        for id_, stages in self._scoring.items():
            if all(map(self._can, stages)):
                name = self._names.get(("train", id_), id_)
                self._add("eval", Element(name=name, stages=tuple(stages)), self._needs(stages[0]))

    def report(self) -> None:
        """The table, when everything else has ended, well or not: also what was submitted before."""
        jobs = dict.fromkeys(job.partition("_")[0] for job in self._known.live.values())
        needs = [Need(kind="afterany", job=job) for job in jobs]
        needs += [Need(kind="afterany", array=array.number) for array in self.arrays]
        if self.arrays or (jobs and not self._known.has_report):
            self._add("report", Element(name="report", stages=()), tuple(needs))

    # Arrays --------------------------------------------------------------------------------------------

    def _add(
        self,
        job: StageName,
        element: Element,
        needs: tuple[Need, ...],
        nodes: int | None = None,
        key: object = None,
    ) -> None:
        nodes = nodes or self._profile.resources(job).nodes
        self._drafts.setdefault((job, nodes, key), []).append((element, needs))

    def flush(self, jobs: Sequence[StageName] = ()) -> None:
        """Make arrays of what was added; from here on others can wait for them."""
        for job, nodes, key in list(self._drafts):
            if not jobs or job in jobs:
                for elements, needs in arrange(self._drafts.pop((job, nodes, key)), self._profile.array_max):
                    self._append(job, nodes, elements, needs)

    def _append(self, job: StageName, nodes: int, elements: Sequence[Element], needs: tuple[Need, ...]) -> None:
        number = len(self.arrays)
        self.arrays.append(Array(number=number, job=job, nodes=nodes, elements=tuple(elements), needs=needs))
        if job != "parts":
            self._place.update({stage: (number, item.index) for item in elements for stage in item.stages})

    # What is known -------------------------------------------------------------------------------------

    def _is_missing(self, stage: Stage) -> bool:
        return stage not in self._known.done and stage not in self._known.live and stage not in self._known.blocked

    def _can(self, stage: Stage) -> bool:
        return not any(upstream in self._lost for upstream in self._plan.inputs(*stage))

    def _lose(self, stages: Sequence[Stage]) -> None:
        self._lost.update(stage for stage in stages if self._is_missing(stage))

    def _needs(self, stage: Stage) -> tuple[Need, ...]:
        """What must have ended well before `stage` can start."""
        needs: dict[Need, None] = {}
        for upstream in self._plan.inputs(*stage):
            if (job := self._known.live.get(upstream)) is not None:
                there, _, index = job.partition("_")
                needs[Need(kind="afterok", job=there, element=int(index))] = None
            elif upstream in self._place:
                array, element = self._place[upstream]
                needs[Need(kind="afterok", array=array, element=element)] = None
        return tuple(needs)

    def _parts(self, tokens: str) -> int:
        if self._profile.prepare_parts != "auto":
            return self._profile.prepare_parts
        return max(1, -(-self._known.source_bytes.get(tokens, 0) // self._profile.part_bytes))


_Arranged = tuple[list[Element], tuple[Need, ...]]


def arrange(group: Sequence[_Waiting], most: int) -> list[_Arranged]:
    """Elements of one kind and shape as few arrays of at most `most`, with what each array waits for.

    An array waits for certain elements of others as a whole, or (`aftercorr`) each of its elements for the one of
    the same index in one other array. Where elements wait for different elements of that array, either those that
    wait for the same one are an array, or one each that wait for different ones; whichever makes fewer arrays.
    """
    alike: dict[tuple[_Source, ...], list[_Waiting]] = {}
    for element, needs in group:
        alike.setdefault(tuple(need.source for need in needs), []).append((element, needs))
    return [arranged for members in alike.values() for arranged in _arranged(members, most)]


def _arranged(group: Sequence[_Waiting], most: int) -> list[_Arranged]:
    """The same where all wait for the same arrays."""
    varying = _varying(group)
    alike: dict[tuple[Need, ...], dict[Need | None, list[Element]]] = {}
    for element, needs in group:
        own = next((need for need in needs if need.source == varying), None)
        others = tuple(need for need in needs if need is not own)
        alike.setdefault(others, {}).setdefault(own, []).append(element)
    arrays: list[_Arranged] = []
    for others, by_own in alike.items():
        if len(by_own) <= max(map(len, by_own.values())):
            for own, elements in by_own.items():
                for start in range(0, len(elements), most):
                    waits = others if own is None else (*others, own)
                    arrays.append((_numbered(elements[start : start + most]), waits))
            continue
        array, job = varying or (None, None)
        corresponding = Need(kind="aftercorr", array=array, job=job)
        for layer in range(max(map(len, by_own.values()))):
            found = {
                own.element or 0: elements[layer]
                for own, elements in by_own.items()
                if own is not None and layer < len(elements)
            }
            members = [found[index].model_copy(update={"index": index}) for index in sorted(found)]
            for start in range(0, len(members), most):  # a live array may be longer than a profile now allows
                arrays.append((members[start : start + most], (*others, corresponding)))
    return arrays


def _varying(group: Sequence[_Waiting]) -> _Source | None:
    """The array of which the group waits for the most different elements, if for more than one."""
    found: dict[_Source, set[int]] = {}
    for _, needs in group:
        for need in needs:
            if need.element is not None:
                found.setdefault(need.source, set()).add(need.element)
    widest = max(found, key=lambda source: len(found[source]), default=None)
    return widest if widest is not None and len(found[widest]) > 1 else None


def _numbered(elements: Sequence[Element]) -> list[Element]:
    return [element.model_copy(update={"index": index}) for index, element in enumerate(elements)]


def names(plan: Plan) -> dict[Stage, str]:
    """What to call a stage: the labels of the first cell that uses it."""
    found: dict[Stage, str] = {("train", id_): "shared base model" for id_ in plan.shared}
    for cell in plan.cells:
        label = " ".join(cell.labels.values())
        found.setdefault(("train", cell.train), label)
        found.setdefault(("index", cell.index), label)
        found.setdefault(("tokens", cell.tokens), label)
    return found
