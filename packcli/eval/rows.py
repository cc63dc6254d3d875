"""Where the rows of a task come from: the files of `--bench-data`, the hub, or packcli's own corpus.

A row is the same dictionary from either source: the columns the task's YAML names, in its order.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import orjson
import yaml

from packcli.errors import IntegrityError, MissingError
from packcli.eval import prompts
from packcli.eval.checkpoint import first_line
from packcli.eval.protocol import Shots, Task, hub_configs, lm_eval_version
from packcli.files import digest

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Found:
    """Rows by split; in each row, `facts.part` of the task names the part it belongs to."""

    splits: dict[str, list[Row]]
    source: str

    def parts(self, column: str | None) -> dict[str, dict[str, list[Row]]]:
        """Rows by part and split, in the order in which parts first appear; one part `""` without a column."""
        if column is None:
            return {"": self.splits}
        found: dict[str, dict[str, list[Row]]] = {}
        for split, rows in self.splits.items():
            for row in rows:
                found.setdefault(row[column], {name: [] for name in self.splits})[split].append(row)
        return found


@dataclass(frozen=True, slots=True)
class FewShot:
    """Examples that do not come from a split, and what stands before them; "" where nothing does."""

    description: str
    samples: list[Row]


def of_task(task: Task, tokenizer: Any, *, bench_data: Path | None, chat_template: bool) -> Found:
    """All rows of a task.

    Raises:
        MissingError: the hub does not give them.
        IntegrityError: there are more or fewer than the task has, or a column is missing.
    """
    if task.facts.embedded:
        documents = prompts.documents(task, tokenizer, chat_template=chat_template)
        return Found({task.config["test_split"]: [dict(document) for document in documents]}, "packcli")
    if task.family is not None:
        found = prompts.long_texts(task, tokenizer, chat_template=chat_template)
        return Found({task.config["test_split"]: found}, "packcli")
    if bench_data is None or task.from_hub(bench_data):
        source = f"{task.config['dataset_path']}@{task.config['dataset_kwargs']['revision']}"
        splits = _from_hub(task)
    else:
        source = "files"
        splits = _from_files(task, bench_data)
    return Found({split: _checked(task, split, rows, source) for split, rows in splits.items()}, source)


def few_shot(shots: Shots, parts: Iterable[str]) -> dict[str, FewShot]:
    """The examples lm-eval packages, by part.

    Raises:
        IntegrityError: this version of lm-eval has others than the task was made with.
    """
    match shots.source:
        case "bbh":
            found = {part: _bbh(part) for part in parts}
        case "minerva_math":
            from lm_eval.tasks.minerva_math import utils

            found = {part: FewShot("", utils.list_fewshot_samples()) for part in parts}
    texts = [[example.description, example.samples] for _, example in sorted(found.items())]
    # Minerva's are the same for every part, so one copy: `math500` has the digest of `math`.
    if digest(texts if shots.source == "bbh" else texts[0]) != shots.digest:
        raise IntegrityError(
            f"lm-eval {lm_eval_version()} has other few-shot examples of {shots.source} than this task",
            "pip install 'lm-eval==0.4.13'",
        )
    return found


def _bbh(part: str) -> FewShot:
    path = resources.files("lm_eval") / "tasks" / "bbh" / "cot_fewshot" / f"{part}.yaml"
    packaged = yaml.safe_load(path.read_text(encoding="utf-8"))
    return FewShot(packaged["description"], packaged["fewshot_config"]["samples"])


def _from_files(task: Task, bench_data: Path) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {split: [] for split in task.facts.files}
    for split, files in task.facts.files.items():
        for file in files:
            splits[split].extend(_in_part(task, row, file.part) for row in _read(bench_data / file.path, split))
    return splits


def _from_hub(task: Task) -> dict[str, list[Row]]:
    """The splits a task scores, from the hub or its local cache."""
    import datasets

    config = task.config
    splits: dict[str, list[Row]] = {split: [] for split in task.facts.files}
    for name in hub_configs(task):
        try:
            loaded = datasets.load_dataset(config["dataset_path"], name, **config["dataset_kwargs"])
            for split, rows in splits.items():
                rows.extend(_in_part(task, row, name) for row in loaded[split])
        except Exception as error:  # What a hub client raises is no closed set; nothing is scored in here.
            raise MissingError(
                f"task `{task.name}`: cannot load `{config['dataset_path']}` from the hub: {first_line(error)}",
                f"{_instead(task)}run where the hub or its cache can be reached",
            ) from error
    return splits


def _instead(task: Task) -> str:
    """What helps where the hub does not: files, if the task can take any."""
    return "give the files named in the task's YAML with `--bench-data DIR`, or " if task.has_files else ""


def _in_part(task: Task, row: Row, part: str | None) -> Row:
    """A row with its part in it, where only its file or its configuration on the hub says which that is."""
    column = task.facts.part
    return row if column is None or column in row else row | {column: part}


def _checked(task: Task, split: str, rows: list[Row], source: str) -> list[Row]:
    """`rows` with the task's columns only, as many of each part as its files have."""
    columns = task.facts.columns
    part = task.facts.part
    wanted = (*columns, part) if part is not None and part not in columns else columns
    for file in task.facts.files[split]:
        count = sum(file.part is None or row[str(part)] == file.part for row in rows)
        if count != file.rows:
            where = f"{split}, {file.part}" if file.part else split
            raise IntegrityError(
                f"task `{task.name}`: {source} has {count} rows ({where}), expected {file.rows}",
                f"{_instead(task)}leave this task out",
            )
    try:
        return [{column: _without_nulls(row[column]) for column in wanted} for row in rows]
    except KeyError as error:
        raise IntegrityError(
            f"task `{task.name}`: {source} has no column {error}",
            f"{_instead(task)}leave this task out",
        ) from error


def _without_nulls(value: Any) -> Any:
    """A value as it is in the files: on the hub, records in a list have every key any of them has."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    return value


def _read(path: Path, split: str) -> Iterator[Row]:
    """The rows of one benchmark file, whose sha256 was checked before."""
    match path.suffix:
        case ".zip":
            yield from _mmlu_csv(path, split)
        case ".json":
            yield from orjson.loads(path.read_bytes())["examples"]
        case suffix:
            data = gzip.decompress(path.read_bytes()) if suffix == ".gz" else path.read_bytes()
            yield from (orjson.loads(line) for line in data.splitlines() if line.strip())


def _mmlu_csv(path: Path, split: str) -> Iterator[Row]:
    """The CSV files of hendrycks/test. No reader that guesses types: twelve rows have a choice `None` or `NA`."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if found := re.fullmatch(rf"data/{split}/(\w+)_{split}\.csv", name):
                with archive.open(name) as member:
                    for row in csv.reader(io.TextIOWrapper(member, encoding="utf-8", newline="")):
                        answer = "ABCD".index(row[5])
                        yield {"subject": found[1], "question": row[0], "choices": row[1:5], "answer": answer}
