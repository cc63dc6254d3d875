"""A sweep as work orders with ids. Pure: the same spec and fingerprints give the same plan, byte for byte.

An id hashes all that an output depends on and nothing else, so cells that resolve to equal stages share
them, and a label, a path or a thread count never makes work happen twice. When the meaning of a stage's
code changes, raise its VERSION by hand: `tests/golden/ids.json` turns that into a visible decision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import orjson
from pydantic import Field

from packcli.config import (
    ARMS,
    TRAIN_EXECUTION_KEYS,
    ArmSpec,
    BatchUnit,
    CellSpec,
    DataSpec,
    EstimateSpec,
    EvalSpec,
    LadderSpec,
    LayoutSpec,
    ModelSpec,
    SourceSpec,
    Spec,
    SweepSpec,
    TrainSpec,
)
from packcli.errors import ConfigError
from packcli.files import digest

Kind = Literal["tokens", "index", "train", "eval"]
VERSIONS: dict[Kind, int] = {"tokens": 4, "index": 2, "train": 3, "eval": 2}

_ADDED = ("boundary", "group_by")  # to what a layout has, after the first ids: left out of them where it is "none"

Fingerprints = Mapping[str, str]


class TokenizerOrder(Spec):
    """A tokenizer by name, or the recipe to train one on `sources` (their training split only)."""

    name: str | None = None
    revision: str | None = None
    sources: tuple[SourceSpec, ...] = ()
    max_documents: int | None = None
    validation: float = 0.0
    template: str = ""
    vocab_size: int = 0


class TokensOrder(Spec):
    """`fingerprints`: of each source, to notice one that changes while it is read. `fields`: of records, kept."""

    id: str
    processes: int | None
    sources: tuple[SourceSpec, ...]
    fingerprints: tuple[str, ...]
    max_documents: int | None
    on_error: Literal["fail", "skip"]
    max_errors: int
    fields: tuple[str, ...] = ()
    train_on: Literal["assistant", "last_assistant", "all"]
    template: str | None
    tokenizer: TokenizerOrder


class Batching(Spec):
    """How rows become steps and micro-batches, where the padding of a row depends on its company."""

    global_batch: int
    batch_unit: BatchUnit
    micro_batch: int
    ranks: int


class IndexOrder(Spec):
    """`epochs`: how many are packed, more than one for `repack_each_epoch`. `batching`: for `pad_to: longest`."""

    id: str
    tokens: str
    max_length: int
    validation: float
    seed: int
    layout: LayoutSpec
    batching: Batching | None
    epochs: int


class TrainOrder(Spec):
    """`base`: the train id whose final weights this run starts from; `random_weights`: it starts from none."""

    id: str
    tokens: str
    index: str
    base: str | None
    model: ModelSpec
    arm: ArmSpec
    train: TrainSpec
    max_length: int
    seed: int

    @property
    def random_weights(self) -> bool:
        return self.model.config is not None and self.base is None


class EvalOrder(Spec):
    """`protocol`: the hash of all that a score of the task depends on but the checkpoint."""

    id: str
    train: str
    task: str
    protocol: str
    eval: EvalSpec


class Cell(Spec):
    """One point of the sweep: its labels and the ids of its stages (`evals`: task -> id).

    `estimate` says what a dry run needs and is part of no id.
    """

    id: str
    labels: dict[str, str]
    tokens: str
    index: str
    train: str
    evals: dict[str, str]
    estimate: EstimateSpec = EstimateSpec()


class Plan(Spec):
    """All work of a sweep, each order once. `shared`: train ids of base models."""

    name: str
    baseline: str | None
    ladders: dict[str, LadderSpec] = Field(default_factory=dict)
    axes: dict[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    shared: tuple[str, ...]
    tokens: dict[str, TokensOrder]
    indexes: dict[str, IndexOrder]
    trains: dict[str, TrainOrder]
    evals: dict[str, EvalOrder]

    def order(self, kind: Kind, id_: str) -> TokensOrder | IndexOrder | TrainOrder | EvalOrder:
        """The work order of one stage."""
        match kind:
            case "tokens":
                return self.tokens[id_]
            case "index":
                return self.indexes[id_]
            case "train":
                return self.trains[id_]
            case "eval":
                return self.evals[id_]

    def inputs(self, kind: Kind, id_: str) -> tuple[tuple[Kind, str], ...]:
        """The stages whose output this one reads."""
        match kind:
            case "tokens":
                return ()
            case "index":
                return (("tokens", self.indexes[id_].tokens),)
            case "train":
                order = self.trains[id_]
                base: tuple[tuple[Kind, str], ...] = (("train", order.base),) if order.base else ()
                # An index may be there still when its token store was deleted.
                return (("tokens", order.tokens), ("index", order.index), *base)
            case "eval":
                return (("train", self.evals[id_].train),)

    def repeated(self) -> list[list[Cell]]:
        """Cells that come to the very same stages under several labels: what is done for one is done for all."""
        same: dict[tuple[str, tuple[tuple[str, str], ...]], list[Cell]] = {}
        for cell in self.cells:
            same.setdefault((cell.train, tuple(cell.evals.items())), []).append(cell)
        return [cells for cells in same.values() if len(cells) > 1]

    def stages(self) -> tuple[tuple[Kind, str], ...]:
        """Every stage once, each after its inputs."""
        trains = sorted(self.trains, key=lambda id_: self.trains[id_].base is not None)
        return (
            *(("tokens", id_) for id_ in self.tokens),
            *(("index", id_) for id_ in self.indexes),
            *(("train", id_) for id_ in trains),
            *(("eval", id_) for id_ in self.evals),
        )


def task_key(task: str, spec: EvalSpec) -> str:
    """The fingerprint key of a task under one protocol."""
    protocol = spec.model_dump(mode="json", exclude={"tasks", "batch_size", "processes", "base_url"})
    return f"task:{orjson.dumps([task, protocol]).decode()}"


def source_key(source: SourceSpec) -> str:
    """The fingerprint key of a source: what is read, not what is done with it."""
    where = source.model_dump(include={"source", "subset", "split", "revision"})
    return f"data:{orjson.dumps(where).decode()}"


def needed(spec: SweepSpec) -> tuple[str, ...]:
    """Keys of all fingerprints that `plan` will look up: `kind:value`."""
    keys: dict[str, None] = {}
    seen = set[tuple[int, int, int]]()
    for _, cell in spec.cells:
        if (sections := (id(cell.data), id(cell.model), id(cell.eval))) in seen:
            continue  # cells share the sections that they have in common
        seen.add(sections)
        for data in (cell.data, *([cell.model.base.data] if cell.model.base else [])):
            keys.update(dict.fromkeys(map(source_key, data.sources)))
            keys[f"template:{_template(data, cell.model) or ''}"] = None
        tokenizer = _tokenizer_name(cell.model)
        if tokenizer is not None:
            keys[f"tokenizer:{_at(tokenizer, cell.model.revision)}"] = None
        if cell.model.config is None:
            keys[f"model:{_at(cell.model.name or '', cell.model.revision)}"] = None
        keys.update(dict.fromkeys(task_key(task, cell.eval) for task in cell.eval.tasks))
    return tuple(keys)


def plan(spec: SweepSpec, fingerprints: Fingerprints) -> Plan:
    """Work orders for every cell; `spec.cells[*].eval.tasks` must already be single tasks, not groups."""
    builder = _Builder(fingerprints)
    cells = tuple(builder.cell(labels, cell) for labels, cell in spec.cells)
    return Plan(
        name=spec.name,
        baseline=spec.baseline,
        ladders=spec.ladders,
        axes=spec.axes,
        cells=cells,
        shared=tuple(builder.shared),
        tokens=builder.tokens,
        indexes=builder.indexes,
        trains=builder.trains,
        evals=builder.evals,
    )


def _unsaid(train: TrainSpec) -> set[str]:
    """Keys younger than some stores: at their defaults they are in no id."""
    return {
        key for key in ("warmup_steps", "backend") if getattr(train, key) == TrainSpec.model_fields[key].default
    }


class _Builder:
    """Collects orders by id while cells are resolved."""

    def __init__(self, fingerprints: Fingerprints) -> None:
        self._fingerprints = fingerprints
        self._tokens_of: dict[tuple[int, int, int], TokensOrder] = {}
        self._protocols: dict[tuple[int, str], str] = {}
        self.tokens: dict[str, TokensOrder] = {}
        self.indexes: dict[str, IndexOrder] = {}
        self.trains: dict[str, TrainOrder] = {}
        self.evals: dict[str, EvalOrder] = {}
        self.shared: dict[str, None] = {}

    def cell(self, labels: dict[str, str], spec: CellSpec) -> Cell:
        base = None
        if (block := spec.model.base) is not None:
            arm = ArmSpec.model_validate(ARMS[block.arm])
            base = self._train(spec, block.data, arm, block.train, block.seed, base=None)
            self.shared[base.id] = None
        order = self._train(spec, spec.data, spec.arm, spec.train, spec.seed, base=base)
        evals = {task: self._eval(order.id, task, spec.eval) for task in spec.eval.tasks}
        identity = digest([order.id, sorted(evals.values())])
        return Cell(
            id=identity,
            labels=labels,
            tokens=order.tokens,
            index=order.index,
            train=order.id,
            evals=evals,
            estimate=spec.estimate,
        )

    def _train(
        self,
        spec: CellSpec,
        data: DataSpec,
        arm: ArmSpec,
        train: TrainSpec,
        seed: int,
        *,
        base: TrainOrder | None,
    ) -> TrainOrder:
        unit = arm.batch_unit or train.batch_unit
        if arm.one_document_per_row and unit == "documents":
            unit = "rows"  # the same batches: cells of both labels share one run
        batch = arm.global_batch or train.global_batch
        arm = arm.model_copy(update={"batch_unit": None, "global_batch": None})
        train = train.model_copy(update={"batch_unit": unit, "global_batch": batch})
        # Cells share the sections that they have in common, and the spec keeps them alive.
        if (sections := (id(data), id(spec.data), id(spec.model))) not in self._tokens_of:
            self._tokens_of[sections] = self._tokens(spec, data)
        tokens = self._tokens_of[sections]
        index = self._index(tokens.id, data, arm, train, seed)
        model = spec.model.model_copy(update={"base": None})
        identity = {
            "version": VERSIONS["train"],
            "index": index.id,
            "model": self._weights(model, base),
            "train": train.model_dump(exclude={*TRAIN_EXECUTION_KEYS, *_unsaid(train)}),
            "arm": arm.model_dump(include={"attention", "positions", "loss"}),
            # Only the released code's loss depends on how a step is cut into micro-batches.
            "micro_batches": [train.micro_batch, train.ranks] if arm.loss == "micro_batch" else None,
            "seed": seed,
        }
        order = TrainOrder(
            id=digest(identity),
            tokens=tokens.id,
            index=index.id,
            base=base.id if base else None,
            model=model,
            arm=arm,
            train=train,
            max_length=data.max_length,
            seed=seed,
        )
        return self.trains.setdefault(order.id, order)

    def _weights(self, model: ModelSpec, base: TrainOrder | None) -> dict[str, Any]:
        if base is not None:
            return {"base": base.id, "dtype": model.dtype}
        if model.config is not None:
            return {"config": model.config, "dtype": model.dtype}
        checkpoint = self._fingerprints[f"model:{_at(model.name or '', model.revision)}"]
        return {"checkpoint": checkpoint, "dtype": model.dtype}

    def _tokens(self, spec: CellSpec, data: DataSpec) -> TokensOrder:
        tokenizer, identity_of_tokenizer = self._tokenizer(spec)
        template = _template(data, spec.model)
        identity = {
            "version": VERSIONS["tokens"],
            "sources": self._sources(data),
            "max_documents": data.max_documents,
            "on_error": data.on_error,
            "train_on": data.train_on,
            "template": self._fingerprints[f"template:{template or ''}"],
            "tokenizer": identity_of_tokenizer,
            **({"fields": data.fields} if data.fields else {}),
        }
        order = TokensOrder(
            id=digest(identity),
            processes=data.processes,
            sources=data.sources,
            fingerprints=tuple(self._fingerprints[source_key(source)] for source in data.sources),
            max_documents=data.max_documents,
            on_error=data.on_error,
            max_errors=data.max_errors,
            fields=data.fields,
            train_on=data.train_on,
            template=template,
            tokenizer=tokenizer,
        )
        return self.tokens.setdefault(order.id, order)

    def _tokenizer(self, spec: CellSpec) -> tuple[TokenizerOrder, object]:
        """Always the cell's tokenizer, also for its base: the two share one vocabulary."""
        name = _tokenizer_name(spec.model)
        if name is not None:
            order = TokenizerOrder(name=name, revision=spec.model.revision)
            return order, self._fingerprints[f"tokenizer:{_at(name, spec.model.revision)}"]
        data, template = spec.data, _template(spec.data, spec.model) or ""
        order = TokenizerOrder(
            sources=data.sources,
            max_documents=data.max_documents,
            validation=data.validation,
            template=template,
            vocab_size=spec.model.vocab_size or 0,
        )
        identity = order.model_dump()
        identity["sources"] = self._sources(data)
        identity["template"] = self._fingerprints[f"template:{template}"]
        return order, identity

    def _sources(self, data: DataSpec) -> list[list[Any]]:
        return [
            [
                self._fingerprints[source_key(item)],
                item.mapping,
                item.weight,
                *([item.turns] if item.turns != "any" else []),
            ]
            for item in data.sources
        ]

    def _index(self, tokens: str, data: DataSpec, arm: ArmSpec, train: TrainSpec, seed: int) -> IndexOrder:
        layout = arm.rows
        batching = None
        if layout.pad_to == "longest":
            batching = Batching.model_validate(train.model_dump(include=set(Batching.model_fields)))
        epochs = 1
        if layout.repack_each_epoch:
            if train.epochs is None:
                fix = "give `train.epochs`, not `steps` or `tokens`"
                raise ConfigError("`repack_each_epoch` packs as many times as there are epochs", fix)
            epochs = train.epochs
        identity = {
            "version": VERSIONS["index"],
            "tokens": tokens,
            "max_length": data.max_length,
            "validation": data.validation,
            "seed": seed,
            "layout": layout.model_dump(exclude={key for key in _ADDED if getattr(layout, key) == "none"}),
            "batching": batching.model_dump() if batching else None,
            "epochs": epochs,
        }
        order = IndexOrder(
            id=digest(identity),
            tokens=tokens,
            max_length=data.max_length,
            validation=data.validation,
            seed=seed,
            layout=layout,
            batching=batching,
            epochs=epochs,
        )
        return self.indexes.setdefault(order.id, order)

    def _eval(self, train: str, task: str, spec: EvalSpec) -> str:
        if (key := (id(spec), task)) not in self._protocols:
            self._protocols[key] = self._fingerprints[task_key(task, spec)]
        protocol = self._protocols[key]
        identity = digest({"version": VERSIONS["eval"], "train": train, "task": protocol})
        order = EvalOrder(id=identity, train=train, task=task, protocol=protocol, eval=spec)
        self.evals.setdefault(identity, order)
        return identity


def _tokenizer_name(model: ModelSpec) -> str | None:
    """The tokenizer to load, or None when one is trained."""
    return None if model.tokenizer == "train" else model.tokenizer or model.name


def _template(data: DataSpec, model: ModelSpec) -> str | None:
    """The chat template by name or path; None: the tokenizer's own. A trained tokenizer has none yet."""
    return data.template or ("chatml" if model.tokenizer == "train" else None)


def _at(name: str, revision: str | None) -> str:
    return f"{name}@{revision}" if revision else name


def closure(plan_: Plan, targets: Iterable[tuple[Kind, str]]) -> tuple[tuple[Kind, str], ...]:
    """`targets` and all they depend on, each once and after its inputs."""
    seen: dict[tuple[Kind, str], None] = {}

    def visit(stage: tuple[Kind, str]) -> None:
        if stage not in seen:
            for upstream in plan_.inputs(*stage):
                visit(upstream)
            seen[stage] = None

    for target in targets:
        visit(target)
    return tuple(seen)
