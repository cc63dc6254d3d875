"""What a task is, which files it needs, and what its protocol hashes to. Loads no model and no lm-eval.

A task is a packaged lm-eval YAML in `tasks/`, complete in itself, with packcli's own facts under `metadata:`.
One file, `tiny.yaml`, stands for all embedded tasks: those of `data/corpus.py` and `data/topics.py` on their test
split (`tiny_copy`) and, to choose settings without looking at the test items, on its tuning split
(`tiny_copy_tuning`). `long.yaml` stands for those of `long_context.py` (`needle_4k`), `longbench.yaml` for the
subsets of LongBench. Running a task is `harness.py`; what a YAML names by a plain word is in `scorers.py`.
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
from pydantic import BaseModel, ConfigDict, field_validator

from packcli.data import corpus, topics
from packcli.errors import ConfigError, IntegrityError, MissingError
from packcli.eval import long_context
from packcli.files import digest, sha256_file

VERSION = 1
"""Raised by hand when code changes a score: the YAML does not hold all of a protocol."""

GROUPS: tuple[str, ...] = (
    "tiny",
    "tiny_tuning",
    "topics",
    "topics_tuning",
    "paper",
    *(f"long_{size}" for size in long_context.LENGTHS),
    "longbench",
)

PAPER: tuple[str, ...] = ("mmlu", "gsm8k", "math", "bbh", "ifeval", "humaneval", "wildbench")
"""The paper's seven; its average is over the first six."""

Kind = Literal["benchmark", "judged", "probes"]
JUDGED: tuple[str, ...] = ("wildbench", "mt_bench")
PROBES = "probes"

LONGBENCH: tuple[str, ...] = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique",
                              "gov_report", "qmsum", "multi_news", "trec", "triviaqa", "samsum", "passage_count",
                              "passage_retrieval_en", "lcc", "repobench-p")  # fmt: skip
"""The English subsets of LongBench, in its paper's order."""

_EMBEDDED = "tiny"
_LONG = "long"
_LONGBENCH = "longbench"
_TUNING = "_tuning"
_TASKS = resources.files("packcli.eval") / "tasks"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BenchmarkFile(_Frozen):
    """One file of benchmark data, which packcli does not ship. `path` is relative to `--bench-data`.

    `rows` are those it holds of one split; all of them belong to `part`, where one is named. Without `path` and
    `sha256` they are the split's rows on the hub, and there is no file.
    """

    path: str = ""
    rows: int
    sha256: str = ""
    part: str | None = None


class Shots(_Frozen):
    """Few-shot examples that lm-eval packages, and the digest of their text, so that they cannot change unseen."""

    source: Literal["bbh", "minerva_math"]
    digest: str


class Facts(_Frozen):
    """The `metadata:` block: `version` of the task, its headline score, and where its data is.

    `metric` and `filter` name one of lm-eval's scores of the task; `extractor` says in words what it takes for an
    answer. `files` maps a split to its files, and `columns` are what a row keeps, from a file or from the hub.
    `part` is the column that divides the items into parts, each scored as a task of lm-eval's own; where the hub
    has a configuration for each part, `hub_configs` lists them. `scorer` and `shots` name what lm-eval has in
    Python. `chat` holds what is different in `config` where a chat template asks.
    """

    version: int
    metric: str
    filter: str
    extractor: str = ""
    files: dict[str, tuple[BenchmarkFile, ...]] = {}
    columns: tuple[str, ...] = ()
    part: str | None = None
    hub_configs: tuple[str, ...] = ()
    scorer: Literal["minerva_math", "ifeval", "humaneval", "long_context", "longbench"] | None = None
    shots: Shots | None = None
    chat: dict[str, Any] = {}
    embedded: bool = False

    @field_validator("files", mode="before")
    @classmethod
    def _one_file_or_several(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {split: [files] if isinstance(files, dict) else files for split, files in value.items()}


class Task(_Frozen):
    """A task as packaged: `config` is lm-eval's, with `facts` taken out of it.

    Embedded tasks name their items by `corpus_task` and `corpus_split`, generated ones by `family` and `length` in
    tokens; others have all four None.
    """

    name: str
    config: dict[str, Any]
    facts: Facts
    corpus_task: str | None = None
    corpus_split: Literal["test", "tuning"] | None = None
    family: long_context.Family | None = None
    length: int | None = None

    @property
    def needs_data(self) -> bool:
        """Whether its items come from files or the hub."""
        return not self.facts.embedded and self.family is None

    @property
    def has_files(self) -> bool:
        """Whether its items can come from files: any are known by their sha256."""
        return any(file.path for split in self.facts.files.values() for file in split)

    def from_hub(self, bench_data: Path | str | None) -> bool:
        """Whether its items come from the hub: where no directory of files is given, or there can be none."""
        return self.needs_data and (bench_data is None or not self.has_files)

    def asked(self, *, chat_template: bool) -> Task:
        """The task as it is asked with or without a chat template."""
        return self.model_copy(update={"config": self.config | self.facts.chat}) if chat_template else self


def kind(task: str) -> Kind:
    """What scores it: lm-eval (`load` knows such tasks only), a judge, or nothing: probes have no score."""
    return "judged" if task in JUDGED else "probes" if task == PROBES else "benchmark"


def may_leave_out(task: str) -> bool:
    """Whether some rows cannot be scored where the machine lacks something: IFEval's, without NLTK's data."""
    return kind(task) == "benchmark" and load(task).facts.scorer == "ifeval"


def averaged(tasks: Iterable[str]) -> tuple[str, ...]:
    """The tasks that an average is over: benchmarks, as in the paper; judged ones where there are no others."""
    found = [task for task in tasks if task != PROBES]
    return tuple(task for task in found if task not in JUDGED) or tuple(found)


@functools.cache
def names() -> tuple[str, ...]:
    """All tasks: embedded ones, their tuning variants, benchmarks, generated ones, LongBench, judged, probes."""
    files = sorted(entry.name.removesuffix(".yaml") for entry in _TASKS.iterdir() if entry.name.endswith(".yaml"))
    benchmarks = tuple(name for name in files if name not in (_EMBEDDED, _LONG, _LONGBENCH))
    generated = (name for size in long_context.LENGTHS for name in _group(f"long_{size}"))
    embedded = (task for group in ("tiny", "tiny_tuning", "topics", "topics_tuning") for task in _group(group))
    tasks = (*embedded, *benchmarks, *generated, *_group("longbench"))
    return (*tasks, *JUDGED, PROBES)


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
    """The packaged task `name`; not a group, and of kind `benchmark`.

    Raises:
        ConfigError: no such task.
    """
    known = tuple(one for one in names() if kind(one) == "benchmark")
    if name not in known:
        raise _unknown(name, known)
    corpus_task, (family, _, size) = name.removesuffix(_TUNING), name.rpartition("_")
    if corpus_task in (*corpus.TASKS, *topics.TASKS):
        split = "test" if corpus_task == name else "tuning"
        return _packaged(name, _EMBEDDED, corpus_task=corpus_task, corpus_split=split)
    if family in long_context.FAMILIES:
        return _packaged(name, _LONG, family=family, length=long_context.LENGTHS[size])
    if name in _group(_LONGBENCH):
        return _subset(name)
    return _packaged(name, name)


def _read(file: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((_TASKS / f"{file}.yaml").read_text(encoding="utf-8"))
    return config


def _subset(name: str) -> Task:
    """A subset of LongBench: what it does not share with the others stands under `subsets`."""
    config, subset = _read(_LONGBENCH), name.removeprefix(f"{_LONGBENCH}_")
    facts, own = config.pop("metadata"), config.pop("subsets")[subset]
    config |= {
        "task": name,
        "dataset_name": subset,
        "doc_to_text": own["doc_to_text"],
        "generation_kwargs": config["generation_kwargs"] | own["generation_kwargs"],
        "metric_list": [{"metric": own["metric"], "aggregation": "mean", "higher_is_better": True}],
    }
    facts |= {
        "metric": own["metric"],
        "files": {config["test_split"]: {"rows": own["rows"]}},
        "columns": [*facts["columns"], *own.get("columns", [])],
    }
    return Task(name=name, config=config, facts=Facts.model_validate(facts))


def _packaged(name: str, file: str, **which: Any) -> Task:
    config = _read(file)
    facts = Facts.model_validate(config.pop("metadata"))
    return Task(name=name, config=config | {"task": name}, facts=facts, **which)


def files(task: str) -> tuple[BenchmarkFile, ...]:
    """The benchmark files `task` reads below `--bench-data`, each once; none where it reads no file."""
    found = {file.path: file for split in load(task).facts.files.values() for file in split if file.path}
    return tuple(found.values())


def hub_configs(task: Task) -> tuple[str | None, ...]:
    """The configurations of `dataset_path` whose rows together are the task's; None is the hub's default."""
    return task.facts.hub_configs or (task.config.get("dataset_name"),)


def check_files(task: str, bench_data: Path | None) -> None:
    """Make sure every file of `task` below `bench_data` is the one its score is defined on.

    Without `bench_data` there is nothing to check here: the rows come from the hub.

    Raises:
        MissingError: a file is not there.
        IntegrityError: a file has another sha256 than the task names.
    """
    if bench_data is None:
        return
    for file in files(task):
        path = bench_data / file.path
        if not path.is_file():
            raise MissingError(
                f"task `{task}` needs the benchmark file `{path}`, which is not there",
                f"point `--bench-data` (in a sweep `eval.bench_data`) at the directory that holds `{file.path}`",
            )
        status = path.stat()
        sha256 = _sha256(path, status.st_size, status.st_mtime_ns, status.st_ino)
        if sha256 != file.sha256:
            raise IntegrityError(
                f"benchmark file `{path}` is not the one task `{task}` scores: sha256 {sha256[:12]}, "
                f"expected {file.sha256[:12]} ({file.rows} rows)",
                "fetch it again from the source named in the task's YAML",
            )


def fingerprint(
    task: str,
    *,
    limit: int | None,
    chat_template: bool,
    bench_data: Path | None,
    fewshot_as_turns: bool = True,
    engine: str = "",
) -> str:
    """16 hex digits over everything the score of `task` depends on, except the checkpoint.

    No benchmark file is read: the task's YAML names the sha256 of each, and `check_files` lets no other
    file be scored. Whether rows come from those files or from the hub does count. `engine` is the name and
    version of what writes the answers.

    Raises:
        ConfigError: no such task.
    """
    packaged = load(task)
    source = "hub" if packaged.from_hub(bench_data) else "files"
    if packaged.facts.embedded:
        source = f"topics {topics.VERSION}" if packaged.corpus_task in topics.TASKS else f"corpus {corpus.VERSION}"
    elif packaged.family is not None:
        source = f"generated {long_context.VERSION}"
    return digest(
        {
            "version": VERSION,
            # What a later version of packcli adds changes the ids of the tasks that state it, no others.
            "task": packaged.model_dump(mode="json", exclude_defaults=True, exclude={"facts": {"extractor"}}),
            "source": source,
            "limit": limit,
            "chat_template": chat_template,
            "fewshot_as_turns": fewshot_as_turns,
            "engine": engine,
            "lm_eval": lm_eval_version(),
        }
    )


def lm_eval_version() -> str:
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        # Planning works without the eval extra; scoring does not, so no result carries this word.
        return "not installed"


def _group(name: str) -> tuple[str, ...]:
    if name == "paper":
        return PAPER
    if name == _LONGBENCH:
        return tuple(f"{name}_{subset}" for subset in LONGBENCH)
    kind, _, size = name.partition("_")
    if kind == _LONG:
        return tuple(f"{family}_{size}" for family in long_context.FAMILIES)
    tasks = corpus.TASKS if kind == _EMBEDDED else topics.TASKS
    return tuple(f"{task}{_TUNING}" for task in tasks) if size else tasks


def _unknown(name: str, known: tuple[str, ...]) -> ConfigError:
    close = difflib.get_close_matches(name, (*GROUPS, *known), n=1)
    listed = ", ".join((*GROUPS, *known))
    fix = f"did you mean `{close[0]}`?" if close else f"choose from: {listed}"
    return ConfigError(f"unknown evaluation task `{name}`", fix)


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    """sha256 of a file; the last three arguments make a changed file a new cache entry."""
    return sha256_file(path)
