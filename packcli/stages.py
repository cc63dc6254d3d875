"""The stages: "manifest there? return it; else do the work, then write it". And what a plan is made from.

Nothing here decides what runs when (`launch/`), nothing prints. Heavy libraries load inside functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packcli import fingerprints
from packcli.commit_points import passing
from packcli.config import (
    ARMS,
    ArmSpec,
    CellSpec,
    DataSpec,
    EvalSpec,
    ModelSpec,
    SourceSpec,
    SweepSpec,
    TrainSpec,
)
from packcli.errors import ConfigError, IntegrityError, LockedError, MissingError, PackcliError
from packcli.eval import protocol, scoring
from packcli.files import digest, write_json, write_jsonl
from packcli.plan import (
    VERSIONS,
    EvalOrder,
    IndexOrder,
    Kind,
    Plan,
    TokensOrder,
    TrainOrder,
    needed,
    plan,
)
from packcli.store import Manifest, Store, verify

if TYPE_CHECKING:
    from packcli.eval.scoring import OnCheckpoint, Outcome, Scorer, Trained

Note = Callable[[int, int, str], None]
"""Progress of one stage: (done, total or 0 when unknown, a short remark)."""


def silent(done: int, total: int, remark: str) -> None:
    """The note of a stage nobody watches."""


# What a plan is made from ------------------------------------------------------------------------------


def make_plan(spec: SweepSpec, store: Store) -> Plan:
    """Expand task groups, fingerprint every input, and plan.

    Raises:
        ConfigError: a task, data file, template or local model that does not exist.
    """
    # Cells share the sections that they have in common; so do these.
    shared = {id(cell.eval): cell.eval for _, cell in spec.cells}
    evals = {key: found.model_copy(update={"tasks": _tasks(found)}) for key, found in shared.items()}
    cells = tuple((labels, cell.model_copy(update={"eval": evals[id(cell.eval)]})) for labels, cell in spec.cells)
    expanded = spec.model_copy(update={"cells": cells})
    return plan(expanded, fingerprints.fingerprints(expanded, store))


def data_plan(data: DataSpec, lengths: Sequence[int], tokenizer: str, *, arms: Sequence[str], batch: int) -> Plan:
    """A plan that asks what every arm makes of some data at several row lengths; nothing of it is ever trained.

    `tokenizer`: a name, a directory, or `train`. Its ids are those of no store: no file is read to make them.
    """
    config = {"model_type": "llama"}
    size = OWN_VOCABULARY if tokenizer == "train" else None
    model = ModelSpec(config=config, tokenizer=tokenizer, vocab_size=size)
    train = TrainSpec(epochs=1, lr=1e-5, global_batch=batch, micro_batch=2)  # as the paper trained 8B
    cells = tuple(
        (
            {"data.max_length": str(length), "arm": name},
            CellSpec(
                model=model,
                data=data.model_copy(update={"max_length": length}),
                arm=ArmSpec.model_validate(ARMS[name]),
                train=train,
                seed=0,
            ),
        )
        for length in lengths
        for name in arms
    )
    axes = {"data.max_length": tuple(map(str, lengths)), "arm": tuple(arms)}
    spec = SweepSpec(name="plan", baseline="padding", axes=axes, cells=cells)
    return plan(spec, dict.fromkeys(needed(spec), "not read"))


OWN_VOCABULARY = 32_768
"""Tokens of the BPE that stands in when no tokenizer is named."""


def _tasks(spec: EvalSpec) -> tuple[str, ...]:
    return protocol.expand(spec.tasks)


# The stages --------------------------------------------------------------------------------------------


def run(kind: Kind, order: TokensOrder | IndexOrder | TrainOrder, store: Store, note: Note = silent) -> Manifest:
    """Do one stage other than eval, unless it is done."""
    match order:
        case TokensOrder():
            return prepare_tokens(order, store, note)
        case IndexOrder():
            return prepare_index(order, store, note)
        case TrainOrder():
            return train(order, store, note)


def prepare_tokens(order: TokensOrder, store: Store, note: Note = silent) -> Manifest:
    """Conversations -> token store."""
    if manifest := store.manifest("tokens", order.id):
        return manifest
    from packcli.data import tokenize

    with store.writing("tokens", order.id):
        if manifest := store.manifest("tokens", order.id):
            return manifest
        counts = tokenize.build(order, store, note)
        _check_unchanged(order, store)
        spec = order.model_dump(mode="json", exclude={"processes", "max_errors"})
        return store.commit(
            "tokens", order.id, spec=spec, inputs={}, results=counts, provenance=tokenize.provenance(order, store)
        )


def prepare_part(order: TokensOrder, store: Store, part: tuple[int, int], note: Note = silent) -> int:
    """Make part k of n of a token store's shards, for a job array; how many there are in all.

    Parts take no lock: each shard appears whole, and whoever makes it makes the same bytes.
    """
    from packcli.data import tokenize

    if store.manifest("tokens", order.id):
        return 0
    return len(tokenize.make(order, store, note, part))


def _check_unchanged(order: TokensOrder, store: Store) -> None:
    """The files must still be those that the id was made from, else nothing is kept. (A sample has no such id.)"""
    from packcli.data import sources

    hashes = fingerprints.FileHashes(store)
    for source, before in zip(order.sources, order.fingerprints, strict=False):
        if sources.fingerprint(source, hashes.sha256) != before:
            store.remove(store.directory("tokens", order.id))
            raise IntegrityError(
                f"`{source.source}` changed while it was read; nothing was kept", "run the same command again"
            )


def prepare_index(order: IndexOrder, store: Store, note: Note = silent) -> Manifest:
    """Token store -> row index and ledger; where documents are grouped, or have fields, who shares rows."""
    if manifest := store.manifest("index", order.id):
        return manifest
    from packcli.data import alike, framed, index, tokens
    from packcli.data.tokenizer import stored

    source = _upstream(store, "tokens", order.tokens)
    tokens.check_shards(store, order.tokens, source.results["shards"])
    counts = source.results["conversations"], source.results["rejected"]
    marks = framed.marks(order.layout.boundary, lambda: stored(store.tokenizer(order.tokens)))
    with store.writing("index", order.id):
        if manifest := store.manifest("index", order.id):
            return manifest
        documents = open_tokens(store, source)
        groups = alike.groups(order, documents, source.results["vocab_size"], note)
        built, held_out, ledger = index.build(order, documents, *counts, marks, groups)
        by = {} if groups is None else {order.layout.group_by: groups.of}
        by |= {name: alike.said(documents, name) for name in source.spec.get("fields", ())}
        shares = {name: index.sharing(built, of) for name, of in by.items()}
        index.write(store.rows(order.id), built)
        index.write(store.validation(order.id), held_out)
        return store.commit(
            "index",
            order.id,
            spec=order.model_dump(mode="json"),
            inputs={"tokens": order.tokens},
            results={"ledger": ledger, **({"sharing": shares} if shares else {})},
            provenance={},
        )


def train(
    order: TrainOrder,
    store: Store,
    note: Note = silent,
    *,
    fallback: bool = False,
    burn_in: bool = False,
    nodes: Sequence[str] | None = None,
) -> Manifest:
    """Row index (and base) -> checkpoint. Under torchrun every rank calls this; rank 0 writes.

    `fallback`: go on from an older checkpoint when the newest is damaged. `burn_in`: where there are several
    nodes (`nodes`: their names), see first whether each is sound.
    """
    if manifest := store.manifest("train", order.id):
        return manifest
    source = _upstream(store, "tokens", order.tokens)
    _upstream(store, "index", order.index)
    if order.base is not None:
        _same_tokenizer(store, source, _upstream(store, "train", order.base))
    if os.environ.get("RANK", "0") == "0":
        _check_bytes(order, store, source)
    from packcli.train import burnin, distributed, faults, loop, trl

    provenance: dict[str, Any] = {}

    def commit(results: dict[str, Any]) -> None:
        tokenizer = store.tokenizer_record(source).sha256
        bases = {"base": order.base} if order.base else {}
        store.commit(
            "train",
            order.id,
            spec=order.model_dump(mode="json"),
            inputs={"tokens": order.tokens, "index": order.index, **bases},
            results={**results, "tokenizer_sha256": tokenizer},
            provenance=provenance,
        )

    def work() -> None:
        with faults.peers(), faults.disk(store.directory("train", order.id)):
            if burn_in and distributed.world_size() > distributed.per_node():
                provenance["burn_in"] = burnin.run(order, nodes)
            prepared = {key: source.results[key] for key in ("stop_token_ids", "files", "shards")}
            match order.train.backend:
                case "packcli":
                    loop.train(order, store, commit, **prepared, note=note, fallback=fallback)
                case "trl":
                    trl.train(order, store, commit, **prepared, note=note)

    if distributed.rank() == 0:
        with store.writing("train", order.id):
            if manifest := store.manifest("train", order.id):
                if distributed.world_size() == 1:
                    return manifest
                cause = f"train {order.id} was finished by another process just now"  # other ranks have begun
                raise LockedError(cause, "run the same command again")
            work()
    else:
        work()
    distributed.wait_for_all()  # no rank looks for this manifest before rank 0 has written it
    return _upstream(store, "train", order.id)


def _check_bytes(order: TrainOrder, store: Store, source: Manifest) -> None:
    """What was made long ago may have changed on disk, and would be trained on: see it before the first step.

    Copies on a node's own disk were checked when they were made, or found.
    """
    from packcli.data import tokens

    if store.source("tokens", order.tokens) == store.directory("tokens", order.tokens):
        tokens.check_shards(store, order.tokens, source.results["shards"])
        verify(store.tokenizer(order.tokens))
    if store.source("index", order.index) == store.directory("index", order.index):
        verify(store.directory("index", order.index))
    if order.base is not None:
        verify(store.final(order.base))


def train_together(orders: Sequence[TrainOrder], store: Store, *, fallback: bool = False) -> None:
    """Train one after another with all processes that torchrun started; every rank calls this."""
    from packcli.train import distributed

    for order in orders:
        train(order, store, fallback=fallback)
    distributed.finish()


def evaluate(
    orders: Sequence[EvalOrder],
    store: Store,
    scorer: Scorer,
    note: Note = silent,
    checkpoint: Path | str | None = None,
) -> Iterator[tuple[EvalOrder, Manifest | PackcliError]]:
    """Score one checkpoint on the tasks that are missing; a task that cannot run leaves the others alone.

    A task that had to leave out some rows is scored again, from the answers it has. `checkpoint` defaults to the
    final one of the run the orders name.
    """
    todo = []
    for order in orders:
        if (made := _scored_before(order, store)) is not None:
            yield order, made
        else:
            todo.append(order)
    if not todo:
        return
    if checkpoint is None:
        trained = _upstream(store, "train", todo[0].train)
        checkpoint = store.final(todo[0].train)
        verify(checkpoint)  # a flipped bit loads silently, and would be scored
        subject = scorer.on(checkpoint, _trained(trained, store))
    else:
        subject = scorer.on(checkpoint)
    for number, order in enumerate(todo):
        note(number, len(todo), order.task)
        try:
            with store.writing("eval", order.id):
                outcome: Manifest | PackcliError | None = _scored_before(order, store)
                if outcome is None:
                    scorer.require(order.task)
                    outcome = _scored(order, store, subject, str(checkpoint))
        except PackcliError as error:
            outcome = error
        yield order, outcome  # after the lock: who listens may take long, or stop listening


def _scored_before(order: EvalOrder, store: Store) -> Manifest | None:
    """Whole, that is."""
    manifest = store.manifest("eval", order.id)
    return None if manifest is None or shortfall(order, manifest) is not None else manifest


def _scored(order: EvalOrder, store: Store, subject: OnCheckpoint, checkpoint: str) -> Manifest:
    kept, in_part = store.responses(order.id), store.manifest_file("eval", order.id)
    outcome: Outcome = subject.score(order.task, kept=(kept, order.id), replies=store.replies)
    if in_part.exists():
        in_part.unlink()  # it would vouch for other bytes than those to come
        passing(in_part, "gone")
    write_jsonl(store.samples(order.id), outcome.samples)
    write_json(store.items(order.id), outcome.items)
    write_json(store.results(order.id), outcome.report | {"packcli": outcome.record})
    return store.commit(
        "eval",
        order.id,
        spec=order.model_dump(mode="json"),
        inputs={"train": order.train},
        results=outcome.record,
        provenance={"checkpoint": checkpoint},
        spent=kept if outcome.record.get("left_out") is None else None,
    )


def shortfall(order: EvalOrder, outcome: Manifest | PackcliError) -> PackcliError | None:
    """Why a task was not scored, or not all of it."""
    if isinstance(outcome, PackcliError):
        return outcome
    if left_out := outcome.results.get("left_out"):
        return MissingError(f"task `{order.task}` is scored in part: {left_out['reason']}", left_out["fix"])
    return None


def done(plan_: Plan, wanted: Sequence[tuple[Kind, str]], store: Store) -> set[tuple[Kind, str]]:
    """The stages of which nothing is left to do: rows that a task had to leave out may be scored by now."""
    states = store.states(wanted)
    return {stage for stage in wanted if states[stage] == "done" and not _in_part(plan_, stage, store)}


def tidy(done_: Iterable[tuple[Kind, str]], store: Store) -> None:
    """Delete the checkpoints of trainings that were killed when they were done, before they deleted them."""
    for kind, id_ in done_:
        if kind == "train":
            store.clear_checkpoints(id_)


def _in_part(plan_: Plan, stage: tuple[Kind, str], store: Store) -> bool:
    if stage[0] != "eval" or not protocol.may_leave_out(plan_.evals[stage[1]].task):
        return False
    manifest = store.manifest(*stage)
    return manifest is not None and bool(manifest.results.get("left_out"))


def _trained(manifest: Manifest, store: Store) -> Trained:
    from packcli.data import corpus
    from packcli.eval.scoring import Trained

    order = TrainOrder.model_validate(manifest.spec)
    read = [SourceSpec.model_validate(one) for one in _upstream(store, "tokens", order.tokens).spec["sources"]]
    before: tuple[Path | str, str] | None = None
    if order.base is not None:
        before = store.final(order.base), f"train {order.base}"
    elif order.model.config is None and order.model.name is not None:
        before = order.model.name, order.model.name
    return Trained(
        name=f"train {order.id}",
        before=before,
        sources=None if all(one.source in corpus.SOURCES for one in read) else tuple(read),
        random_weights=bool(manifest.results.get("random_weights")),
    )


def scorer_for(spec: EvalSpec, *, unsafe_no_sandbox: bool = False, note: Note = silent) -> Scorer:
    """The scorer of one protocol; keep it: it holds the parsed tasks."""
    from packcli.eval.scoring import Scorer

    return Scorer(spec, unsafe_no_sandbox=unsafe_no_sandbox, note=note)


def foreign_orders(checkpoint: str, spec: EvalSpec, store: Store) -> list[EvalOrder]:
    """Orders for a checkpoint that no sweep of ours trained, so that its scores are kept and shared too."""
    hashes = fingerprints.FileHashes(store)
    identity = fingerprints.checkpoint(checkpoint, hashes, weights=True)
    orders = []
    for task in protocol.expand(spec.tasks):
        protocol_ = fingerprints.scoring(task, spec, hashes)
        id_ = digest({"version": VERSIONS["eval"], "train": identity, "task": protocol_})
        orders.append(EvalOrder(id=id_, train=identity, task=task, protocol=protocol_, eval=spec))
    hashes.save()
    return orders


def open_tokens(store: Store, manifest: Manifest) -> Any:
    """The token store of a finished tokens stage, opened for reading."""
    from packcli.data.tokens import Tokens

    return Tokens(store, manifest.id, files=manifest.results["files"], shards=manifest.results["shards"])


def _upstream(store: Store, kind: Kind, id_: str) -> Manifest:
    """A stage that must be done, its files all there in full length.

    Raises:
        ConfigError: it is not done.
        IntegrityError: a file of it is missing or short.
    """
    manifest = store.manifest(kind, id_)
    if manifest is None:
        command = {"tokens": "prepare", "index": "prepare", "train": "train", "eval": "eval"}[kind]
        raise ConfigError(
            f"{kind} {id_} is missing", f"run `packcli {command} SWEEP` first, or `packcli sweep SWEEP`"
        )
    store.check_sizes(manifest)
    return manifest


def _same_tokenizer(store: Store, source: Manifest, base: Manifest) -> None:
    own = store.tokenizer_record(source).sha256
    if own != base.results["tokenizer_sha256"]:
        raise IntegrityError(
            f"base {base.id} was trained with another tokenizer than tokens {source.id}",
            f"delete {store.directory('train', base.id)} and run again",
        )


def preflight(plan_: Plan, store: Store) -> list[PackcliError]:
    """What is known to fail before anything runs: models no config describes, benchmark files not there, answers
    for which a model has no room.

    The first kind is raised, because nothing could be trained; the others returned: the rest can run.

    Raises:
        ConfigError: `model.config` makes no model, or its context is shorter than the rows; an arm that
            `train.backend` cannot train.
        MissingError: `train.lora` without peft, `train.backend: trl` without TRL.
    """
    states = store.states(("train", id_) for id_ in plan_.trains)
    todo = [order for id_, order in plan_.trains.items() if states["train", id_] != "done"]
    # A thousand trainings of one model are one question.
    asked = {
        (digest(config), order.max_length): config for order in todo if (config := order.model.config) is not None
    }
    room: dict[str, int | None] = {}
    if asked:
        from packcli.model import configs

        for (model, max_length), config in asked.items():
            room[model] = configs.check_context(configs.build(config), max_length)
    if any(order.train.lora for order in todo):
        from packcli.model import lora

        lora.require()
    if any(order.train.backend == "trl" for order in todo):
        from packcli.train import trl_terms

        for training in todo:
            trl_terms.check(training)
    missing: dict[str, PackcliError] = {}
    for order in plan_.evals.values():
        try:
            scoring.check_files(order.task, order.eval)
            config = plan_.trains[order.train].model.config if room else None
            if config is not None and (context := room.get(digest(config))) is not None:
                scoring.check_room(order.task, order.eval, context)
        except PackcliError as error:
            missing[order.task] = error
    return list(missing.values())


def source_bytes(plan_: Plan) -> dict[str, int]:
    """Size of the local files of every token store; what is on a hub, or packaged, counts nothing."""
    from packcli.data import sources

    return {id_: sum(map(sources.local_bytes, order.sources)) for id_, order in plan_.tokens.items()}
