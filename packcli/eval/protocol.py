"""What a task is, which files it needs, and what its protocol hashes to. Loads no model and no lm-eval.

A task is a packaged lm-eval YAML in `tasks/`, complete in itself, with packcli's own facts under `metadata:`.
One file, `tiny.yaml`, stands for all embedded tasks: those of `packcli/data/corpus.py` on its test split
(`tiny_copy`) and, to choose settings without looking at the test items, on its tuning split
(`tiny_copy_tuning`). Running a task is `harness.py`.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from packcli.data import corpus
from packcli.errors import ConfigError, IntegrityError, MissingError
from packcli.files import digest, sha256_file

VERSION = 1
"""Raised by hand when `harness.py` or `prompts.py` change a score: the YAML does not hold all of a protocol."""

GROUPS: tuple[str, ...] = ("tiny", "tiny_tuning")

_EMBEDDED = "tiny"
_TUNING = "_tuning"
_TASKS = resources.files("packcli.eval") / "tasks"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BenchmarkFile(_Frozen):
    """One file of benchmark data, which packcli does not ship. `path` is relative to `--bench-data`."""

    path: str
    rows: int
    sha256: str


class Facts(_Frozen):
    """The `metadata:` block: `version` of the task, its headline score, and where its data is.

    `metric` and `filter` name one of lm-eval's scores of the task. `files` maps a split to its file.
    """

    version: int
    metric: str
    filter: str
    files: dict[str, BenchmarkFile] = {}
    embedded: bool = False


class Task(_Frozen):
    """A task as packaged: `config` is lm-eval's, with `facts` taken out of it.

    Embedded tasks name their items by `corpus_task` and `corpus_split`; others have both None.
    """

    name: str
    config: dict[str, Any]
    facts: Facts
    corpus_task: str | None = None
    corpus_split: Literal["test", "tuning"] | None = None


def names() -> tuple[str, ...]:
    """All tasks: the embedded ones, their tuning variants, then the benchmarks by name."""
    files = sorted(entry.name for entry in _TASKS.iterdir() if entry.name.endswith(".yaml"))
    benchmarks = tuple(name.removesuffix(".yaml") for name in files if name != f"{_EMBEDDED}.yaml")
    return (*_group("tiny"), *_group("tiny_tuning"), *benchmarks)


def expand(tasks: Iterable[str]) -> tuple[str, ...]:
    """`tasks` with groups replaced by their tasks, in the order given, each once.

    Raises:
        ConfigError: a name is neither a task nor a group.
    """
    known = names()
    found: dict[str, None] = {}
    for name in tasks:
        if name not in known and name not in GROUPS:
            raise _unknown(name, known)
        found.update(dict.fromkeys(_group(name) if name in GROUPS else (name,)))
    return tuple(found)


@functools.cache
def load(name: str) -> Task:
    """The packaged task `name`; not a group.

    Raises:
        ConfigError: no such task.
    """
    if name not in (known := names()):
        raise _unknown(name, known)
    corpus_task = name.removesuffix(_TUNING)
    embedded = corpus_task in corpus.TASKS
    text = (_TASKS / f"{_EMBEDDED if embedded else name}.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    facts = Facts.model_validate(config.pop("metadata"))
    if not embedded:
        return Task(name=name, config=config, facts=facts)
    return Task(
        name=name,
        config=config | {"task": name},
        facts=facts,
        corpus_task=corpus_task,
        corpus_split="test" if corpus_task == name else "tuning",
    )


def files(task: str) -> tuple[BenchmarkFile, ...]:
    """The benchmark files `task` reads below `--bench-data`; none for an embedded task."""
    return tuple(load(task).facts.files.values())


def check_files(task: str, bench_data: Path | None) -> None:
    """Make sure every file of `task` below `bench_data` is the one its score is defined on.

    Without `bench_data` there is nothing to check here: the rows come from the hub.

    Raises:
        MissingError: a file is not there.
        IntegrityError: a file has other rows or another sha256 than the task names.
    """
    if bench_data is None:
        return
    for file in files(task):
        path = bench_data / file.path
        try:
            status = path.stat()
        except OSError:
            raise MissingError(
                f"task `{task}` needs the benchmark file `{path}`, which is not there",
                f"point `--bench-data` (in a sweep `eval.bench_data`) at the directory that holds `{file.path}`",
            ) from None
        rows, sha256 = _content(path, status.st_size, status.st_mtime_ns, status.st_ino)
        if (rows, sha256) != (file.rows, file.sha256):
            raise IntegrityError(
                f"benchmark file `{path}` is not the one task `{task}` scores: "
                f"{rows} rows, sha256 {sha256[:12]}; expected {file.rows} rows, sha256 {file.sha256[:12]}",
                "fetch it again from the source named in the task's YAML",
            )


def fingerprint(task: str, *, limit: int | None, chat_template: bool, bench_data: Path | None) -> str:
    """16 hex digits over everything the score of `task` depends on, except the checkpoint.

    No benchmark file is read: the task's YAML names the sha256 of each, and `check_files` lets no other
    file be scored. Whether rows come from those files or from the hub does count.

    Raises:
        ConfigError: no such task.
    """
    packaged = load(task)
    source = "hub" if bench_data is None else "files"
    if packaged.facts.embedded:
        source = f"corpus {corpus.VERSION}"
    return digest(
        {
            "version": VERSION,
            "task": packaged.model_dump(mode="json"),
            "source": source,
            "limit": limit,
            "chat_template": chat_template,
            "lm_eval": _lm_eval_version(),
        }
    )


def _group(name: str) -> tuple[str, ...]:
    return corpus.TASKS if name == "tiny" else tuple(f"{task}{_TUNING}" for task in corpus.TASKS)


def _unknown(name: str, known: tuple[str, ...]) -> ConfigError:
    close = difflib.get_close_matches(name, (*GROUPS, *known), n=1)
    listed = ", ".join((*GROUPS, *known))
    fix = f"did you mean `{close[0]}`?" if close else f"choose from: {listed}"
    return ConfigError(f"unknown evaluation task `{name}`", fix)


def _lm_eval_version() -> str:
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        # Planning works without the eval extra; scoring does not, so no result carries this word.
        return "not installed"


@functools.lru_cache(maxsize=256)
def _content(path: Path, _size: int, _mtime_ns: int, _inode: int) -> tuple[int, str]:
    """Rows and sha256 of a file; the last three arguments make a changed file a new cache entry."""
    with path.open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    return rows, sha256_file(path)
