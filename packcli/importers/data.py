"""Data as the trainers name them (`datasets.load_dataset`'s words), as sources that packcli can read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from packcli.config import SourceSpec
from packcli.data import hub, sources
from packcli.errors import ConfigError
from packcli.importers.draft import Draft
from packcli.importers.source import Fate

_LOADERS = ("json", "csv", "parquet", "arrow", "text", "xml", "webdataset", "imagefolder", "audiofolder")
HubKey = Literal["subset", "split", "revision", "streaming"]


def paths(draft: Draft, key: str, path: Any, files_key: str) -> list[str]:
    """What to read for `path` under `key`: where that is a loader's name, the files under `files_key`.

    Raises:
        ConfigError: a loader without files, which is no data.
    """
    if path not in _LOADERS or Path(path).exists():
        return [str(path)]
    files = draft.source.get(files_key)
    listed = [files] if isinstance(files, str) else files
    if not isinstance(listed, list) or not listed or not all(isinstance(file, str) for file in listed):
        raise ConfigError(
            f"{draft.source.at(key)}: `{path}` names a loader of `datasets`, and no data",
            "name the file itself, such as `chats.jsonl`, then import again",
        )
    draft.source.mark(files_key, "carried", to=("data.source",))
    return listed


def of_hub(draft: Draft, key: str, name: HubKey, value: Any, source: str) -> dict[str, Any]:
    """A key that packcli has for Hugging Face data sets, as part of the source's block; none of a local file."""
    fate = hub_fate(name, value, source)
    if fate == "carried":
        draft.source.mark(key, "carried", to=("data.source",))
        return {name: value}
    if fate == "no_effect":
        draft.ignore(key, "a local file is read as a whole, and never downloaded")
    else:
        do = "write what it chooses into a file of its own, and name that"
        draft.drop(key, f"packcli has `{name}` for Hugging Face data sets: all of a local file is read", do)
    return {}


def hub_fate(name: HubKey, value: Any, source: str) -> Fate:
    """What becomes of a key that packcli has for Hugging Face data sets."""
    has_splits = (Path(source) / "dataset_dict.json").is_file()
    if hub.is_dataset(source) or (name == "split" and has_splits):
        return "carried"
    return "no_effect" if (name, value) in (("split", "train"), ("streaming", True)) else "not_carried"


def problems(found: Any) -> Iterable[str]:
    """What keeps `data.source` from being read here and now, a sentence each; the Hub is not asked."""
    for block in found if isinstance(found, list) else [found]:
        spec = SourceSpec.model_validate({"source": block} if isinstance(block, str) else block)
        if not sources.is_builtin(spec) and not hub.is_dataset(spec.source):
            try:
                sources.files(spec)
            except ConfigError as error:
                yield f"data.source: {error.cause}; relative paths begin where packcli runs"
