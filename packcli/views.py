"""What `packcli prepare` shows or hands on besides making stores: plans of data, documents, pictures, exports."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from packcli import log, papersteps, stages, sweepfile
from packcli.config import LENGTHS_ALONE, ArmSpec, DataSpec
from packcli.data import formats, hub, sources
from packcli.errors import ConfigError, DataError
from packcli.files import atomic_write, make_directory
from packcli.plan import Cell, Plan
from packcli.store import Store

if TYPE_CHECKING:
    from packcli.data.index import Index
    from packcli.data.tokens import Tokens

OWN_TOKENIZER = "none named: a BPE of 32,768 tokens learned from this data; name your model's for its true lengths"

SAMPLE = 1000
"""Conversations of a data file that are tokenized to show some: enough to fill rows as the whole set would."""

_BATCH = 128  # rows a step, the paper's
_DRAWN_MICRO_BATCH = 4
_SWEEP_SUFFIXES = (".yaml", ".yml")


def is_data(name: str) -> bool:
    """Whether an argument names data rather than a sweep file."""
    return Path(name).suffix not in _SWEEP_SUFFIXES and (
        os.path.exists(name)  # noqa: PTH110 - Path.exists raises over what may not be looked at
        or Path(name).suffix in formats.SUFFIXES
        or any(character in name for character in "*?[")
        or name in sources.BUILTIN
        or hub.is_dataset(name)
    )


def lengths_around(max_length: int) -> list[int]:
    """The row lengths worth comparing with one: half of it, itself, twice it."""
    return sorted({max(2, max_length // 2), max_length, 2 * max_length})


def data_plan(
    source: str, tokenizer: str | None, template: str | None, max_length: int, sets: Sequence[str] = ()
) -> Plan:
    """Every built-in arm that needs lengths alone, at several row lengths. `sets`: `data.KEY=VALUE`."""
    given: dict[str, Any] = {"source": source, "max_length": max_length, "template": template}
    own = {*given}
    for item in sets:
        key, value = sweepfile.parse_set(item)
        if not key.startswith("data.") or key.count(".") > 1 or key[5:] in own:
            raise ConfigError(
                f"`--set {key}`: of a data file only other keys of `data` can be set", "data.mapping=..."
            )
        given[key[5:]] = value
    try:
        data = DataSpec.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"`data.{where}`: {first['msg']}", "see docs/sweep_file.md") from None
    lengths = lengths_around(max_length)
    return stages.data_plan(data, lengths, tokenizer or "train", arms=LENGTHS_ALONE, batch=_BATCH)


def outlook(plan: Plan, tokenizer: str, store: Store | None) -> dict[str, Any]:
    """What each arm would make of the data, as one JSON document; writes nothing."""
    from packcli.data import outlook as outlooks
    from packcli.report import outlook as reports

    with log.progress() as display:
        bar = display.add_task("tokenize", total=None, note="")

        def note(done: int, total: int, remark: str) -> None:
            display.update(bar, completed=done, total=total or None, note=remark)

        looked = outlooks.look(plan, note, _known(plan, store))
    document = reports.collect(plan, looked, tokenizer=tokenizer)
    return {**document, "paper": _paper(plan, looked)}


def _known(plan: Plan, store: Store | None) -> dict[str, Any]:
    """What a sweep has prepared already."""
    from packcli.data.outlook import Known

    found = {}
    for id_ in plan.tokens if store else ():
        assert store is not None
        if manifest := store.manifest("tokens", id_):
            results = manifest.results
            documents, tokenizer = _tokens(store, id_), store.tokenizer(id_)
            found[id_] = Known(documents, results["conversations"], results["rejected"], tokenizer)
    return found


def _paper(plan: Plan, looked: Any) -> list[dict[str, Any]] | None:
    """Step counts of the paper's runs on one of its sets, beside those it prints; None for other data."""
    orders = plan.tokens.values()
    names = {source.source for order in orders for source in order.sources}
    if len(names) != 1 or not names <= set(papersteps.datasets()):
        return None
    own = [cell for cell in looked.cells if cell.max_length == papersteps.MAX_LENGTH]
    ledgers = {cell.arm: cell.ledger for cell in own if cell.ledger}
    rows = {arm: ledger["rows"] for arm, ledger in ledgers.items() if not ledger["documents_validation"]}
    return [asdict(found) for found in papersteps.check(names.pop(), rows)]


def sampled(plan: Plan, count: int, scratch: Path) -> tuple[Plan, Store]:
    """The plan with its first `count` conversations only, prepared in a store of its own."""
    store = Store(scratch)
    tokens = {}
    for id_, order in plan.tokens.items():
        few = min(count, order.max_documents or count)
        tokens[id_] = order.model_copy(update={"max_documents": few, "fingerprints": ()})
    small = plan.model_copy(update={"tokens": tokens})
    for order in tokens.values():
        stages.prepare_tokens(order, store)
    for index in plan.indexes.values():
        with contextlib.suppress(DataError):  # an arm that makes no row of so few documents is not shown
            stages.prepare_index(index, store)
    return small, store


def show(plan: Plan, store: Store, count: int) -> Any:
    """`count` documents and the rows that hold them, for a terminal."""
    from packcli.data.tokenizer import load_directory
    from packcli.report import preview

    parts = []
    for id_ in dict.fromkeys(cell.tokens for cell in plan.cells):
        own = [cell for cell in plan.cells if cell.tokens == id_]
        max_length = _shown_length(plan, own)
        named: dict[str, str] = {}
        for cell in own:
            fits = plan.indexes[cell.index].max_length == max_length
            if fits and cell.index not in named.values() and store.state("index", cell.index) == "done":
                named.setdefault(cell.labels.get("arm", "rows"), cell.index)
        indexes = {name: (plan.indexes[index].layout, _rows(store, index)) for name, index in named.items()}
        tokens, tokenizer = _tokens(store, id_), load_directory(store.tokenizer(id_))
        parts.append(preview.show(tokens, indexes, tokenizer, count, max_length))
    from rich.console import Group

    return Group(*parts)


def _shown_length(plan: Plan, cells: list[Cell]) -> int:
    """Of several row lengths the middle one: for a data file, the one that was asked for."""
    lengths = sorted({plan.indexes[cell.index].max_length for cell in cells})
    return lengths[len(lengths) // 2]


def draw(plan: Plan, store: Store, file: Path) -> None:
    """A dozen documents of the first token store, laid out by every arm of the plan, as one SVG file."""
    from packcli.data import draw as drawing
    from packcli.data import sample

    first = plan.cells[0]
    own = [cell for cell in plan.cells if cell.tokens == first.tokens]
    max_length = _shown_length(plan, own)
    arms: dict[str, ArmSpec] = {}
    for cell in own:
        arm = plan.trains[cell.train].arm
        if plan.indexes[cell.index].max_length == max_length and arm.group_by == "none":
            arms.setdefault(cell.labels.get("arm", "arm"), arm)
    if not arms:
        raise ConfigError("a picture is of lengths, and every arm here has `group_by`", "add an arm without it")
    tokens = _tokens(store, first.tokens)
    documents = sample.documents(tokens, sample.choose(tokens.lengths, max_length))
    panels = sample.panels(documents, arms, max_length, _DRAWN_MICRO_BATCH)
    title = f"{len(documents)} conversations laid out by every arm"
    note = f"Micro-batches of {_DRAWN_MICRO_BATCH} rows; of an arm's preprocessing workers, one."
    with atomic_write(file) as output:
        output.write(drawing.picture(documents, panels, max_length, title, note).encode())


def check_picture(file: Path) -> None:
    """Raise `ConfigError` before the work where no picture could be written after it."""
    _check_writable(file.parent, "the picture")
    if os.path.isdir(file):  # noqa: PTH112 - Path.is_dir raises over what may not be looked at
        raise ConfigError(f"`{file}` is a directory", "name a file, such as --draw rows.svg")


def check_export(plan: Plan, directory: Path) -> None:
    """The same of `export`, which replaces nothing but an earlier one."""
    from packcli.data import export as exporting

    targets = _exports(plan, directory)
    _check_writable(directory.parent if directory in targets else directory, "the export")
    for target in targets:
        exporting.check_replaceable(target)


def _check_writable(directory: Path, what: str) -> None:
    make_directory(directory, what)
    if not os.access(directory, os.W_OK):
        raise ConfigError(
            f"{what} cannot be written to `{directory}`: no permission", "name a directory that can be written"
        )


def export(plan: Plan, store: Store, directory: Path) -> list[Path]:
    """Every cell of the plan as a `datasets` directory: `directory`, or several in it; equal ones once."""
    from packcli.data import export as exporting
    from packcli.data import framed
    from packcli.data.tokenizer import load_directory

    targets = _exports(plan, directory)
    for target, cell in targets.items():
        order, manifest = plan.indexes[cell.index], store.manifest("index", cell.index)
        assert manifest is not None
        tokenizer = store.tokenizer(cell.tokens)
        prepared = exporting.Prepared(
            tokens=_tokens(store, cell.tokens),
            index=_rows(store, cell.index),
            marks=framed.marks(order.layout.boundary, partial(load_directory, tokenizer)),
            validation=_held_out(store, cell.index),
            order=order,
            arm=plan.trains[cell.train].arm,
            pad_id=load_directory(tokenizer).pad_token_id or 0,
            ledger=manifest.results["ledger"],
            tokenizer=tokenizer,
        )
        exporting.export(prepared, target, lambda done, total, remark: None)
    return [*targets]


def _exports(plan: Plan, directory: Path) -> dict[Path, Cell]:
    """Where each export goes. Arms may share an index and yet differ in what their export, or its README, says."""
    distinct: dict[tuple[str, ...], Cell] = {}
    for cell in plan.cells:
        arm = plan.trains[cell.train].arm
        distinct.setdefault((cell.index, arm.attention, arm.positions, arm.loss), cell)
    cells = [*distinct.values()]
    if len(cells) == 1:
        return {directory: cells[0]}
    names = [_file_name(cell.labels) for cell in cells]
    counts = Counter(names)
    return {
        # Labels may differ only in characters that a name does not keep.
        directory / (name if name and counts[name] == 1 else f"{name}-{cell.train}".lstrip("-")): cell
        for cell, name in zip(cells, names, strict=True)
    }


def _file_name(labels: dict[str, str]) -> str:
    """A directory name from labels, of allowed characters only."""
    text = "-".join(labels.values())
    return "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "_" for char in text).lstrip(
        ".-"
    )[:100]


def part_of(text: str) -> tuple[int, int]:
    """`K/N` as (k, n), k from 0."""
    first, slash, last = text.partition("/")
    if not (slash and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"`--part {text}` is not K/N", "for example --part 3/16, the third of sixteen")
    return int(first) - 1, int(last)


def prepare_part(plan: Plan, store: Store, part: tuple[int, int]) -> list[tuple[str, int]]:
    """Make one part of every token store; (id, shards in all) of each."""
    store.check(writable=True)
    made = []
    with log.progress() as display:
        for id_, order in plan.tokens.items():
            bar = display.add_task(f"tokens {id_}", total=None, note="")

            def note(done: int, total: int, remark: str, bar: Any = bar) -> None:
                display.update(bar, completed=done, total=total or None, note=remark)

            made.append((id_, stages.prepare_part(order, store, part, note)))
    return made


def _tokens(store: Store, id_: str) -> Tokens:
    manifest = store.manifest("tokens", id_)
    if manifest is None:
        raise ConfigError(f"tokens {id_} is missing", "run `packcli prepare SWEEP` first")
    found: Tokens = stages.open_tokens(store, manifest)
    return found


def _rows(store: Store, id_: str) -> Index:
    from packcli.data import index

    return index.read(store.rows(id_))


def _held_out(store: Store, id_: str) -> Index:
    from packcli.data import index

    return index.read(store.validation(id_))
