"""`packcli fetch`: everything a sweep reads, brought to this machine for others that have no internet.

And what its tasks need of a machine beside files: whether this one has it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packcli import download, log
from packcli.config import SourceSpec
from packcli.data import hub, sources
from packcli.download import Found, Need
from packcli.errors import MissingError, PackcliError
from packcli.eval import protocol, scorers, scoring
from packcli.eval.checkpoint import first_line
from packcli.eval.judge import wildbench
from packcli.plan import EvalOrder, Plan

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["fetched", "was there", "local", "works", "failed"]


@dataclass(frozen=True, slots=True)
class Item:
    """One line of what is printed. `revision`: as the sweep gives it; `commit`: what that named."""

    what: str
    name: str
    state: State
    where: str = ""
    revision: str | None = None
    commit: str | None = None
    bytes: int | None = None
    error: PackcliError | None = None


def fetch(plan: Plan) -> list[Item]:
    """All that the plan's stages read, downloaded where it is not here; a failure leaves the others alone.

    Where Hugging Face does not answer, what is in its cache "was there" and all else failed.

    Raises:
        MissingError: the disk has no room for all of it; nothing was downloaded.
    """
    here, needs = local(plan), remote(plan)
    done: dict[Need, Item] = {}
    found: dict[Need, Found] = {}
    with download.quiet():
        for need in needs:
            try:
                answer = download.look(need)
            except PackcliError as error:
                done[need] = _failed(need, error)
                continue
            if answer is None:
                log.logger.warning("warning: Hugging Face does not answer; looking into its cache alone")
                return [*here, *map(_cached, needs), *machine(plan, online=False)]
            found[need] = answer
        download.check_room(found.values())
        with log.progress() as display:
            for number, (need, one) in enumerate(found.items(), 1):
                title = f"{number}/{len(found)} {need.what} {need.name}, MB"
                bar = display.add_task(title, total=one.bytes // 10**6, note="")

                def note(num_bytes: int, bar: Any = bar) -> None:
                    display.update(bar, completed=num_bytes // 10**6)

                try:
                    state: State = "was there" if one.there else "fetched"
                    done[need] = _item(need, download.download(need, one, note), state)
                except PackcliError as error:
                    done[need] = _failed(need, error, one.commit)
    return [*here, *(done[need] for need in needs), *machine(plan)]


def _cached(need: Need) -> Item:
    try:
        return _item(need, download.cached(need), "was there")
    except PackcliError as error:
        return _failed(need, error)


def _item(need: Need, found: Found, state: State) -> Item:
    return Item(
        what=need.what,
        name=_name(need),
        state=state,
        where=str(found.where),
        revision=need.revision or "main",
        commit=found.commit or None,
        bytes=found.bytes,
    )


def _failed(need: Need, error: PackcliError, commit: str | None = None) -> Item:
    return Item(
        what=need.what,
        name=_name(need),
        state="failed",
        revision=need.revision or "main",
        commit=commit,
        error=download.safe(error),
    )


def _name(need: Need) -> str:
    if need.source is None:
        return need.name
    subset = f"{need.source.subset}:" if need.source.subset else ""
    return f"{need.name}[{subset}{need.source.split}]"


def remote(plan: Plan) -> tuple[Need, ...]:
    """What comes from the Hub, each once: models with their tokenizers, tokenizers apart, data, benchmarks."""
    needs: dict[Need, None] = {}
    for train in plan.trains.values():
        name = train.model.name
        if train.model.config is None and name and not Path(name).is_dir():
            needs[Need("model", name, train.model.revision)] = None
    for tokens in plan.tokens.values():
        name, revision = tokens.tokenizer.name, tokens.tokenizer.revision
        if name and not Path(name).is_dir() and Need("model", name, revision) not in needs:
            needs[Need("tokenizer", name, revision)] = None
        for source in tokens.sources:
            if not sources.is_builtin(source) and hub.is_dataset(source.source):
                needs[_dataset("data", source)] = None
    for order in plan.evals.values():
        probed = order.eval.probes.source if order.task == protocol.PROBES else None
        if probed and hub.is_dataset(probed):
            needs[_dataset("data", SourceSpec(source=probed))] = None
        if order.task == "wildbench" and order.eval.judge is not None and order.eval.bench_data is None:
            questions = SourceSpec(source=wildbench.HUB_ID, subset=wildbench.HUB_CONFIG, split=wildbench.HUB_SPLIT)
            needs[_dataset("benchmark", questions)] = None
    for task, bench_data in _benchmarks(plan):
        if task.from_hub(bench_data):
            for subset in protocol.hub_configs(task):
                source = SourceSpec(
                    source=task.config["dataset_path"],
                    subset=subset,
                    split=next(iter(task.facts.files)),
                    revision=task.config["dataset_kwargs"].get("revision"),
                )
                needs[_dataset("benchmark", source)] = None
    return tuple(needs)


def _benchmarks(plan: Plan) -> Iterator[tuple[protocol.Task, str | None]]:
    """Tasks that lm-eval scores, and where their files are."""
    for order in plan.evals.values():
        if protocol.kind(order.task) == "benchmark":
            yield protocol.load(order.task), order.eval.bench_data


def _dataset(what: Literal["data", "benchmark"], source: SourceSpec) -> Need:
    """Offline, a streamed dataset is read from Arrow files as any other; weight and mapping change no record."""
    name = hub.PAPER_SETS.get(source.source, source.source)
    keys = source.model_dump(include={"subset", "split", "revision"})
    return Need(what, name, source.revision, SourceSpec(source=name, **keys))


def local(plan: Plan) -> list[Item]:
    """What needs no download: directories, data files, what packcli brings along, benchmark files."""
    items: dict[tuple[str, str], Item] = {}

    def add(what: str, name: str, files: Collection[Path], where: str = "") -> None:
        num_bytes = sum(file.stat().st_size for file in files) if files else None
        items[what, name] = Item(what, name, "local", where or (name if files else "in packcli"), bytes=num_bytes)

    for train in plan.trains.values():
        name = train.model.name
        if train.model.config is None and name and Path(name).is_dir():
            add("model", name, _files_in(name))
    for tokens in plan.tokens.values():
        name = tokens.tokenizer.name
        if name and Path(name).is_dir() and ("model", name) not in items:
            add("tokenizer", name, _files_in(name))
        if tokens.template is not None:
            file = Path(tokens.template)
            add("template", tokens.template, [file] if file.is_file() else [])
        for source in tokens.sources:
            if sources.is_builtin(source) or not hub.is_dataset(source.source):
                add("data", source.source, () if sources.is_builtin(source) else sources.files(source))
    for order in plan.evals.values():
        item = _scored_files(order)
        if item is not None:
            items[item.what, item.name] = item
    return list(items.values())


def _scored_files(order: EvalOrder) -> Item | None:
    """The files of a task, or why they will not do; None for what is not here, or needs none."""
    task, directory = order.task, order.eval.bench_data
    if protocol.kind(task) == "judged" and order.eval.judge is None:
        return None  # it will not run, and `sweep` says so
    try:
        scoring.check_files(task, order.eval)
    except PackcliError as error:
        return Item("benchmark", task, "failed", error=error)
    match protocol.kind(task):
        case "judged" if directory is not None:
            return Item("benchmark", task, "local", directory)
        case "benchmark" if not protocol.load(task).needs_data:
            return Item("benchmark", task, "local", "in packcli")
        case "benchmark" if directory is not None and not protocol.load(task).from_hub(directory):
            sizes = [(Path(directory) / file.path).stat().st_size for file in protocol.files(task)]
            return Item("benchmark", task, "local", directory, bytes=sum(sizes))
    return None


def machine(plan: Plan, *, online: bool = True) -> list[Item]:
    """What scoring takes beside data: a splitter of sentences, fetched where it is not there; a sandbox, tried."""
    items: dict[tuple[str, str], Item] = {}
    for task, directory in _benchmarks(plan):
        match task.facts.scorer:
            case "ifeval":
                items["nltk", directory or ""] = _punkt(task, Path(directory) if directory else None, online)
            case "humaneval":
                items["sandbox", ""] = _sandbox()
    return list(items.values())


def _punkt(task: protocol.Task, bench_data: Path | None, online: bool) -> Item:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # lm-eval reports a download that it did not make
            scorers.require(task)
        state: State = "was there"
        if not scorers.splits_sentences(bench_data):
            state = "fetched"
            _fetch_punkt(scorers.nltk_data(bench_data).expanduser(), online)
            if not scorers.splits_sentences(bench_data):
                raise MissingError(
                    f"NLTK's `{scorers.PUNKT}` was fetched and cannot be used", "delete it and try again"
                )
    except PackcliError as error:
        return Item("nltk", scorers.PUNKT, "failed", error=download.safe(error))
    import nltk

    return Item("nltk", scorers.PUNKT, state, str(nltk.data.find(f"tokenizers/{scorers.PUNKT}")))


def _fetch_punkt(directory: Path, online: bool) -> None:
    """By NLTK's own downloader, which checks what it gets against its index."""
    from huggingface_hub import constants
    from nltk.downloader import Downloader

    why = "no internet"
    if online and not constants.HF_HUB_OFFLINE:
        try:
            options = {"quiet": True, "raise_on_error": True, "print_error_to": io.StringIO()}
            Downloader().download(scorers.PUNKT, str(directory), **options)
            return
        except (OSError, ValueError) as error:
            why = log.plain(first_line(error))
    raise MissingError(
        f"task `ifeval` checks some answers with NLTK's `{scorers.PUNKT}`, which is not there ({why})",
        f"where there is internet: python -m nltk.downloader -d {directory} {scorers.PUNKT}",
    )


def _sandbox() -> Item:
    from packcli.eval.sandbox import sandbox

    try:
        box = sandbox.find()
    except PackcliError as error:
        return Item("sandbox", "for code that a model writes", "failed", error=error)
    return Item("sandbox", box.name, "works", "tried on this machine; others may refuse it")


def _files_in(directory: str) -> list[Path]:
    return [file for file in Path(directory).iterdir() if file.is_file()]


# What is printed ---------------------------------------------------------------------------------------


def document(plan: Plan, items: list[Item]) -> dict[str, Any]:
    """As JSON: `bytes` of an item is None where they are part of packcli, or where it failed."""
    return {
        "sweep": plan.name,
        "items": [
            {
                "what": item.what,
                "name": item.name,
                "revision": item.revision,
                "commit": item.commit,
                "bytes": item.bytes,
                "state": item.state,
                "where": item.where or None,
                "cause": item.error.cause if item.error else None,
                "fix": item.error.fix if item.error else None,
            }
            for item in items
        ],
        "bytes": sum(item.bytes or 0 for item in items),
    }


def table(document: dict[str, Any]) -> Table:
    """One line an item; why one failed is said below."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, title=escape(document["sweep"]), title_justify="left")
    for header in ("what", "kind", "revision", "bytes", "state", "where"):
        shown.add_column(header, justify="right" if header == "bytes" else "left", overflow="fold")
    for item in document["items"]:
        shown.add_row(
            escape(item["name"]),
            item["what"],
            escape(_revision(item["revision"] or "", item["commit"] or "")),
            f"{item['bytes']:,}" if item["bytes"] is not None else "",
            item["state"],
            escape(item["where"] or ""),
        )
    return shown


def _revision(asked: str, commit: str) -> str:
    short = commit[:12]
    return short if asked == commit else f"{asked} = {short}" if commit else asked
