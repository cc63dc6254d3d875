"""Repositories of the Hugging Face Hub brought into its cache, at one commit and with no file that is not needed.

No code of a repository is run. A branch or tag is looked up once and everything is taken from the commit it names;
the cache then says so, which is what the libraries go by when they are offline.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from packcli.config import SourceSpec
from packcli.data import hub
from packcli.errors import ConfigError, MissingError, PackcliError
from packcli.files import read_json

_TEXT = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_TEMPLATES = "additional_chat_templates/"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SECRETS = re.compile(r"hf_\w{8,}|(?<=://)[^/\s@]+@")


@dataclass(frozen=True, slots=True)
class Need:
    """What is read of one repository, `revision` as the sweep gives it; `source`: of a dataset, and only there."""

    what: Literal["model", "tokenizer", "data", "benchmark"]
    name: str
    revision: str | None
    source: SourceSpec | None = None

    @property
    def kind(self) -> Literal["model", "dataset"]:
        return "dataset" if self.source else "model"


@dataclass(frozen=True, slots=True)
class Found:
    """A need at one commit: the files it takes, where they lie or will lie, and whether all are there.

    bytes          of the files; of a dataset in the cache, of its Arrow files
    missing_bytes  of the files that are not there yet
    arrow_bytes    what `datasets` makes of them beside them: its own word, else as much again
    """

    commit: str
    files: tuple[str, ...]
    where: Path
    bytes: int
    missing_bytes: int = 0
    arrow_bytes: int = 0
    there: bool = True


def look(need: Need) -> Found | None:
    """What a need takes, by the Hub's word; None where no answer comes.

    Raises:
        ConfigError: no such repository, revision, subset or split; a model without safetensors.
        MissingError: no permission, or the Hub refuses to serve now.
    """
    from huggingface_hub import HfApi

    ask: Callable[..., Any] = HfApi().dataset_info if need.source else HfApi().model_info
    try:
        info = ask(need.name, revision=need.revision or "main", timeout=hub.TIMEOUT_S, files_metadata=True)
        commit, sizes = str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or ()}
        return _look_at_dataset(need, commit, sizes) if need.source else _look_at_model(need, commit, sizes)
    except PackcliError:
        raise
    except Exception as error:
        if (explained := _explained(need, error)) is None:
            return None
        raise explained from error


def _look_at_model(need: Need, commit: str, sizes: Mapping[str, int]) -> Found:
    files = _wanted(need, commit, sizes)
    missing = [file for file in files if not _in_cache(need, commit, file)]
    return Found(
        commit,
        files,
        _snapshot(need, commit),
        bytes=sum(sizes[file] for file in files),
        missing_bytes=sum(sizes[file] for file in missing),
        there=not missing,
    )


def _look_at_dataset(need: Need, commit: str, sizes: Mapping[str, int]) -> Found:
    assert need.source is not None
    files, directory, arrow_bytes = hub.remote(need.source, commit)
    if directory.is_dir():
        return Found(commit, files, directory, _size(directory))
    total = sum(sizes.get(file, 0) for file in files)
    missing = sum(sizes.get(file, 0) for file in files if not _in_cache(need, commit, file))
    return Found(commit, files, directory, total, missing, arrow_bytes or total, there=False)


def _wanted(need: Need, commit: str, names: Collection[str]) -> tuple[str, ...]:
    """The files that loading takes: all small ones at the top, and of weights the one save in safetensors.

    Many repositories hold the weights several times over: as .bin, as .pth, consolidated, in directories.
    """
    from huggingface_hub import hf_hub_download

    text = {name for name in names if "/" not in name and name.endswith(_TEXT)}
    text |= {name for name in names if name.startswith(_TEMPLATES)}
    if need.what == "tokenizer":
        if not any(
            name.startswith(("tokenizer.", "vocab.")) or name.endswith((".model", ".tiktoken")) for name in text
        ):
            raise ConfigError(f"`{need.name}` on Hugging Face has no tokenizer", "check `model.tokenizer`")
        return tuple(sorted(text))

    def unreadable(name: str, why: str) -> ConfigError:
        return ConfigError(f"`{name}` of `{need.name}` on Hugging Face {why}", "take another `revision`")

    def read(name: str) -> dict[str, Any]:
        path = Path(hf_hub_download(need.name, name, revision=commit))
        try:
            value = read_json(path)
        except ValueError:
            raise unreadable(name, "is no JSON") from None
        if not isinstance(value, dict):
            raise unreadable(name, "is no JSON object")
        return value

    if "config.json" not in names:
        raise ConfigError(f"`{need.name}` on Hugging Face is no model: no config.json", "check `model.name`")
    named = read("config.json").get("transformers_weights")
    weights = str(named or (_WEIGHTS if _WEIGHTS in names else _INDEX))
    if weights not in names:
        raise ConfigError(
            f"`{need.name}` on Hugging Face has no weights in safetensors, and packcli loads no other",
            "write them with `save_pretrained` of transformers, and name that directory",
        )
    shards = {weights}
    if weights.endswith(".json"):
        by_tensor = read(weights).get("weight_map")
        if not isinstance(by_tensor, dict) or not all(isinstance(file, str) for file in by_tensor.values()):
            raise unreadable(weights, "names no file of each tensor under `weight_map`")
        shards = set(by_tensor.values())
    if absent := shards - set(names):
        raise ConfigError(
            f"`{need.name}` on Hugging Face lacks `{min(absent)}`, which its index of weights names",
            "take another `revision`",
        )
    return tuple(sorted(text | {weights} | shards))


def check_room(found: Collection[Found]) -> None:
    """Raise `MissingError` when a disk of the caches cannot hold what is to be downloaded."""
    from huggingface_hub import constants

    takes = [(Path(constants.HF_HUB_CACHE), sum(one.missing_bytes for one in found))]
    takes += [(one.where, one.arrow_bytes) for one in found if one.arrow_bytes]
    disks: dict[int, tuple[Path, int]] = {}
    for path, num_bytes in takes:
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        disk = there.stat().st_dev
        first, before = disks.get(disk, (there, 0))
        disks[disk] = first, before + num_bytes
    for path, num_bytes in disks.values():
        if num_bytes > (free := shutil.disk_usage(path).free):
            raise MissingError(
                f"fetching takes {num_bytes:,} bytes on the disk of `{path}`, and {free:,} are free",
                "free some space, or set HF_HOME to a directory on a larger disk",
            )


def download(need: Need, found: Found, note: Callable[[int], None]) -> Found:
    """Bring into the cache what is not there; `note` is told now and then how many bytes the repository takes.

    Raises as `look` does, and:
        MissingError: the connection was lost, or the disk is full; the same again goes on where it was.
        DataError: `datasets` cannot read the data.
    """
    from huggingface_hub import snapshot_download

    try:
        with _watched(_repository(need) / "blobs", note):
            if need.source is not None:
                hub.arrow_files(need.source, found.commit)
                found.where.touch()  # of several copies, `datasets` takes the newest when offline
                found = replace(found, bytes=_size(found.where))
            elif not found.there:
                names = [glob.escape(file) for file in found.files]
                snapshot_download(need.name, revision=found.commit, allow_patterns=names)
                if not all(_in_cache(need, found.commit, file) for file in found.files):
                    raise lost(need)  # the client hands out what there is when it loses the connection
        hub.remember(need.kind, need.name, need.revision, found.commit)
    except PackcliError:
        raise
    except Exception as error:
        raise _explained(need, error) or lost(need) from error
    return found


def cached(need: Need) -> Found:
    """What the cache holds of a need, without asking the Hub.

    Raises:
        MissingError: not all of it, as far as that can be known.
    """
    with _offline():
        commit = hub.cached_commit(need.kind, need.name, need.revision)
        if need.source is not None:
            files = hub.arrow_files(need.source)
            return Found(commit or "", (), files[0].parent, _size(files[0].parent))
        if commit is None:
            raise lost(need)
        snapshot = _snapshot(need, commit)
        names = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]
        try:
            wanted = _wanted(need, commit, names)
        except ConfigError:  # the Hub may well have the rest
            raise lost(need) from None
    return Found(commit, wanted, snapshot, sum((snapshot / name).stat().st_size for name in wanted))


def lost(need: Need) -> PackcliError:
    """No connection, where one is needed."""
    return MissingError(
        f"no connection to Hugging Face, and not all of {need.what} `{need.name}` at revision "
        f"`{need.revision or 'main'}` is in its cache here",
        "connect (and unset HF_HUB_OFFLINE), or set HF_HOME to where a copy is",
    )


def safe(error: PackcliError) -> PackcliError:
    """The error without a token or password, which a library may have quoted."""
    from huggingface_hub import get_token

    token = get_token()

    def cleaned(text: str) -> str:
        return _SECRETS.sub("***", text.replace(token, "***") if token else text)

    return type(error)(cleaned(error.cause), cleaned(error.fix))


def _explained(need: Need, error: Exception) -> PackcliError | None:
    """What an exception of the Hub's client means, in one line; None: no answer came."""
    import huggingface_hub.errors as client

    name = f"`{need.name}`"
    page = f"https://huggingface.co/{'datasets/' if need.source else ''}{need.name}"
    match error:
        case client.GatedRepoError():
            fix = f"accept its terms at {page}, then run `hf auth login` here"
            return MissingError(f"{name} on Hugging Face is gated, and this account or machine has no access", fix)
        case client.RevisionNotFoundError():
            return ConfigError(f"{name} on Hugging Face has no revision `{need.revision}`", "check `revision`")
        case client.RepositoryNotFoundError() | client.HFValidationError():
            cause = f"{name} is no path here and no {need.kind} on Hugging Face, or a private one"
            return ConfigError(cause, "check the name; for a private one run `hf auth login`")
        case client.HfHubHTTPError():
            status = error.response.status_code
            if status in (401, 403):
                return MissingError(f"{name} on Hugging Face needs permission", "run `hf auth login`")
            return MissingError(f"Hugging Face answered {status} when asked for {name}", "try again later")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            fix = "free some space, or set HF_HOME to a directory on a larger disk; what is finished is kept"
            return MissingError(f"the disk was full before all of {name} was here", fix)
        case ConnectionError() | TimeoutError() | client.LocalEntryNotFoundError():
            return None
        case OSError():
            return MissingError(f"{name} could not be fetched: {error}", "see that HF_HOME can be written")
        case ValueError() | KeyError():
            cause = f"{name} on Hugging Face has a config or an index of weights that cannot be read: {error}"
            return ConfigError(" ".join(cause.split()), "take another `revision`")
        case TypeError() | AttributeError() | NameError() | AssertionError():
            raise error  # a bug, not the network
    return None  # whatever the HTTP library of this version raises


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own bars and warnings away: packcli has its own."""
    from huggingface_hub import utils

    bars: list[Any] = [utils]
    with contextlib.suppress(ImportError):
        import datasets

        bars.append(datasets.utils)
    shown = [bar for bar in bars if not bar.are_progress_bars_disabled()]
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    for bar in shown:
        bar.disable_progress_bars()
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
        for bar in shown:
            bar.enable_progress_bars()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _watched(directory: Path, note: Callable[[int], None]) -> Iterator[None]:
    """Whatever client downloads, and however it counts: what grows is this directory."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            note(_size(directory))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _size(directory: Path) -> int:
    total = 0
    for file in directory.rglob("*"):
        with contextlib.suppress(OSError):  # renamed in the meantime
            total += file.stat().st_size if file.is_file() else 0
    return total


def _repository(need: Need) -> Path:
    return hub.cache_directory(need.kind, need.name)


def _snapshot(need: Need, commit: str) -> Path:
    return _repository(need) / "snapshots" / commit


def _in_cache(need: Need, commit: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(need.name, file, revision=commit, repo_type=need.kind), str)
