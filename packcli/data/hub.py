"""Hugging Face datasets by id, read through `datasets`: as Arrow files in its cache, or as a stream of rows.

Every load first asks the Hub, once and with a short timeout, which commit the revision names: `datasets` alone
would try an unreachable Hub for half a minute, and take a cached copy of another revision without a word. Code
that a dataset brings along is never run.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packcli.config import SourceSpec
from packcli.data import formats
from packcli.errors import ConfigError, DataError, MissingError, PackcliError
from packcli.files import atomic_directory, atomic_write, digest

# The sets of "Packing Analysis" (arXiv 2410.08081) as its authors published them, in the ShareGPT schema.
PAPER_SETS = {
    "wildchat_gpt4": "Super-shuhe/packing-wildchat-gpt-4",
    "tulu": "Super-shuhe/packing-tulu",
    "wildchat": "Super-shuhe/packing-wildchat",
    "open_source_1m": "Super-shuhe/open-source-1M",
}
TIMEOUT_S = 5.0
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WHOLE_SPLIT = re.compile(r"\w+(\.\w+)*")
_FILE_ENDINGS = (*formats.SUFFIXES, *formats.COMPRESSED, ".txt", ".tsv")


def is_dataset(source: str) -> bool:
    """Whether a source names a Hugging Face dataset: a paper set or `owner/name`; a path that exists is a path."""
    if os.path.exists(source):  # noqa: PTH110 - Path.exists raises over what may not be looked at
        return False
    return source in PAPER_SETS or bool(_ID.fullmatch(source) and not source.endswith(_FILE_ENDINGS))


def name(spec: SourceSpec) -> str:
    """What messages call a dataset: `id@revision[split]`."""
    split = f"{spec.subset}:{spec.split}" if spec.subset else spec.split
    return f"{_id(spec)}@{spec.revision or 'main'}[{split}]"


def identity(spec: SourceSpec) -> str:
    """`id@revision[:subset]:split`, as far as a dataset is known without asking the Hub."""
    return ":".join(
        [f"{_id(spec)}@{spec.revision or 'main'}", *([spec.subset] if spec.subset else []), spec.split]
    )


def resolved(spec: SourceSpec) -> str | None:
    """The commit that a dataset's revision names now; None where the Hub cannot be reached.

    Raises:
        ConfigError: no such dataset or revision.
        MissingError: it is there, but not for everyone.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        sha = HfApi().dataset_info(_id(spec), revision=spec.revision, timeout=TIMEOUT_S).sha
    except HFValidationError as error:
        raise _explained(spec, error) from error
    except HfHubHTTPError as error:
        if error.response.status_code == 429 or error.response.status_code >= 500:
            return None
        raise _explained(spec, error) from error
    except Exception:  # whatever the HTTP library of this version raises: no answer came
        return None
    return str(sha) if sha else None


def cached_commit(kind: Literal["model", "dataset"], repository: str, revision: str | None) -> str | None:
    """The commit that a revision named when `remember` was last told, or when the Hub's client was last asked."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    with contextlib.suppress(OSError):
        text = _ref(kind, repository, revision).read_text().strip()
        return text if _COMMIT.fullmatch(text) else None
    return None


def remember(kind: Literal["model", "dataset"], repository: str, revision: str | None, commit: str) -> None:
    """Note in the Hub's cache, where its client looks when offline, which commit a branch or tag names."""
    if cached_commit(kind, repository, revision) != commit:
        with atomic_write(_ref(kind, repository, revision)) as file:
            file.write(commit.encode())


def cache_directory(kind: Literal["model", "dataset"], repository: str) -> Path:
    """Where the Hub's client keeps the files of a repository: `blobs/`, `snapshots/COMMIT/`, `refs/`."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind)


def _ref(kind: Literal["model", "dataset"], repository: str, revision: str | None) -> Path:
    return cache_directory(kind, repository) / "refs" / (revision or "main")


class Remote(NamedTuple):
    """What loading a dataset takes: the files of its repository, and the directory of Arrow files they become.

    `arrow_bytes` is None where the dataset does not say.
    """

    files: tuple[str, ...]
    directory: Path
    arrow_bytes: int | None


def remote(spec: SourceSpec, commit: str) -> Remote:
    """The files that `arrow_files` downloads (all splits of the subset), without downloading them.

    Raises as `arrow_files` does.
    """
    datasets = _datasets(spec)
    try:
        builder = datasets.load_dataset_builder(_id(spec), name=spec.subset, revision=commit)
    except Exception as error:
        raise _explained(spec, error) from error
    inside = f"hf://datasets/{_id(spec)}@{commit}/"
    urls = [str(url) for split in (builder.config.data_files or {}).values() for url in split]
    files = tuple(url.removeprefix(inside) for url in urls if url.startswith(inside))
    return Remote(files, Path(builder.cache_dir), builder.info.dataset_size)


def arrow_files(spec: SourceSpec, commit: str | None = None) -> tuple[Path, ...]:
    """The Arrow files that hold exactly the rows of a split, in order; downloaded first where they are not cached.

    `commit`: what the revision is known to name; without it the Hub is asked.

    Raises:
        ConfigError: no such dataset, revision, subset or split.
        MissingError: no network and no cached copy, no permission, or `datasets` is not installed.
        DataError: `datasets` cannot read it.
    """
    dataset, commit = _load(spec, commit)
    files = tuple(Path(file["filename"]) for file in dataset.cache_files)
    _check_commit(spec, files, commit)
    if files and _WHOLE_SPLIT.fullmatch(spec.split):
        return files
    return _written(spec, dataset)


def rows(spec: SourceSpec, skip: int) -> Iterator[Any]:
    """The rows of a split after the first `skip`, over the network; raises as `arrow_files` does."""
    if not _WHOLE_SPLIT.fullmatch(spec.split):
        raise ConfigError(
            f"`{_id(spec)}`: `split: {spec.split}` cannot be streamed",
            "name a whole split, with `data.max_documents` for the first records; or leave `streaming` out",
        )
    dataset, _ = _load(spec)
    try:
        yield from dataset.skip(skip)
    except Exception as error:
        raise _explained(spec, error) from error


def _id(spec: SourceSpec) -> str:
    return PAPER_SETS.get(spec.source, spec.source)


def _datasets(spec: SourceSpec) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingError(
            f"reading `{_id(spec)}` needs the package `datasets`", "pip install 'packcli[data]'"
        ) from None
    return datasets


def _load(spec: SourceSpec, commit: str | None = None) -> tuple[Any, str | None]:
    """(the dataset as `datasets` opens it, the commit it must be of or None for the newest copy there is)."""
    datasets = _datasets(spec)
    commit = commit or resolved(spec)
    online = commit is not None
    if not online and spec.revision not in (None, "main"):
        commit = cached_commit("dataset", _id(spec), spec.revision)
        if commit is None:
            raise MissingError(
                f"`{_id(spec)}`: no connection to Hugging Face to look up revision `{spec.revision}`",
                "connect, or give the revision as a commit id of 40 hex digits",
            )
    try:
        with contextlib.nullcontext() if online else _cache_only(datasets.config):
            dataset = datasets.load_dataset(
                _id(spec),
                name=spec.subset,
                split=spec.split,
                revision=commit or spec.revision,
                streaming=spec.streaming,
            )
    except Exception as error:
        raise _explained(spec, error) from error
    return dataset, commit


@contextlib.contextmanager
def _cache_only(config: Any) -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does, after the Hub has not answered: its cache or an error, both at once."""
    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _check_commit(spec: SourceSpec, files: tuple[Path, ...], commit: str | None) -> None:
    """Refuse a cached copy of another revision: `datasets` falls back to one when it cannot get the right one."""
    wanted, found = commit or spec.revision or "", files[0].parent.name if files else ""
    if _COMMIT.fullmatch(wanted) and _COMMIT.fullmatch(found) and found != wanted:
        raise MissingError(
            f"`{_id(spec)}` could not be had at revision {wanted}: the copy in the cache is of {found}",
            "connect, or ask for the cached revision",
        )


def _written(spec: SourceSpec, dataset: Any) -> tuple[Path, ...]:
    """The rows of part of a split in files of their own, written once; those in the cache hold the whole split."""
    import datasets

    # `datasets` makes the fingerprint from the cached dataset (and so its commit) and the split.
    key = digest([identity(spec), dataset._fingerprint])
    directory = Path(datasets.config.HF_DATASETS_CACHE) / "packcli" / key
    if not directory.is_dir():
        with atomic_directory(directory) as temporary:
            dataset.save_to_disk(temporary)
    return tuple(sorted(directory.glob("data-*.arrow")))


def _explained(spec: SourceSpec, error: Exception) -> PackcliError:
    """What one of the many exceptions of `datasets` and its client means, in one line."""
    import huggingface_hub.errors as client

    chain = [error, *_causes(error)]
    text = " ".join(str(error).split())
    listed = ", ".join(re.findall(r"'([^']+)'", text.rpartition("[")[2]))

    def is_a(*types: type[Exception]) -> bool:
        return any(isinstance(one, types) for one in chain)

    id_ = _id(spec)
    no_permission = MissingError(
        f"`{id_}` on Hugging Face needs permission", "ask for it on its page there, then run `hf auth login`"
    )
    if is_a(client.GatedRepoError) or "gated dataset" in text:
        return no_permission
    if is_a(client.RevisionNotFoundError):
        return ConfigError(f"`{id_}` on Hugging Face has no revision `{spec.revision}`", "check `revision`")
    if is_a(client.RepositoryNotFoundError, client.HFValidationError) or "doesn't exist on the Hub" in text:
        return ConfigError(
            f"`{id_}` is no path here and no dataset on Hugging Face, or a private one",
            "check the name; for a private dataset run `hf auth login`",
        )
    if isinstance(error, client.HfHubHTTPError) and error.response.status_code in (401, 403):
        return no_permission
    if "Unknown split" in text or "Bad split" in text:
        return ConfigError(f"`{id_}` has no split `{spec.split}`; it has: {listed}", "set `split` to one of them")
    if "BuilderConfig" in text or "Config name is missing" in text:
        given = f"no subset `{spec.subset}`" if spec.subset else "several subsets"
        return ConfigError(f"`{id_}` has {given}; choose from: {listed}", "set `subset` to one of them")
    if "scripts are no longer supported" in text:
        return DataError(f"`{id_}` can only be read by its own code, which packcli does not run", "convert it")
    if is_a(ConnectionError) or "find cache for" in text:
        return MissingError(
            f"no connection to Hugging Face, and no copy of `{name(spec)}` in its cache here",
            "connect (and unset HF_HUB_OFFLINE), or set HF_HOME to where a copy is",
        )
    root = chain[-1]
    reason = (str(root).strip() or type(root).__name__).splitlines()[0]
    return DataError(f"`{name(spec)}` cannot be read: {reason}", "see that `datasets.load_dataset` can load it")


def _causes(error: BaseException) -> Iterator[BaseException]:
    while error.__cause__ is not None:
        error = error.__cause__
        yield error
