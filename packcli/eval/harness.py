"""Scores checkpoints with lm-eval; the only file that imports it.

lm-eval builds the requests, runs the model, filters and scores. What is ours: which rows it gets (`protocol.py`,
`prompts.py`), how a checkpoint is loaded (`checkpoint.py`), where a prompt ends, and what comes out as a result.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from packcli.errors import ConfigError, IntegrityError, MissingError
from packcli.eval import prompts, protocol
from packcli.eval.checkpoint import first_line, read

_INVALID = "[invalid]"
"""What lm-eval's regex filter returns where it finds nothing."""

Sample = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The headline score of one task on one checkpoint.

    `score` and `stderr` are fractions of 1; `stderr` is NaN for a single item. `n` of the task's `n_total` items
    were scored: fewer means a partial run. `health` says how far the score can be trusted, each a share of the `n`
    items: `truncated` (the prompt did not fit and lost its beginning); for generated answers also `empty` (nothing
    was written), `no_answer` (the headline filter found none), and the score under every other filter by its name.
    """

    task: str
    metric: str
    score: float
    stderr: float
    n: int
    n_total: int
    version: int
    health: dict[str, float]


class Harness:
    """Keeps the parsed tasks between checkpoints: importing and loading cost more than scoring a small model."""

    def __init__(
        self,
        *,
        bench_data: Path | None = None,
        limit: int | None = None,
        chat_template: bool = True,
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        """`limit` scores the first rows only; `device` defaults to `cuda` where there is one, else `cpu`."""
        if limit is not None and limit < 1:
            raise ConfigError(f"cannot score {limit} rows of a task", "give a limit of 1 or more, or none")
        self._bench_data = bench_data
        self._limit = limit
        self._chat_template = chat_template
        self._batch_size = batch_size
        self._device = device
        self._tasks: dict[str, tuple[str, Any]] = {}

    def evaluate(self, checkpoint: Path | str, tasks: Sequence[str]) -> Iterator[tuple[TaskResult, list[Sample]]]:
        """Load `checkpoint` once; give each task's result and samples as soon as it is scored.

        A sample is ready for JSON: `doc_id`, `prompt`, `target`, `response` (None where the answer was compared
        without generating), `loglikelihood` of the target (None where it was generated), `extracted` by filter,
        `correct`, and lm-eval's `doc_hash`, `prompt_hash`, `target_hash`.

        Raises, before anything is scored:
            ConfigError: unknown task; no such checkpoint, no tokenizer or chat template in it, or weights that
                do not match its config.
            MissingError: a benchmark file or the eval extra is not there (`protocol.check_files`).
            IntegrityError: a benchmark file is not the one the task scores.
        """
        names = protocol.expand(tasks)
        for name in names:
            protocol.check_files(name, self._bench_data)
        _require_lm_eval()
        with _quiet():
            lm = self._load(checkpoint)
        return self._scores(lm, names)

    def _scores(self, lm: Any, names: Sequence[str]) -> Iterator[tuple[TaskResult, list[Sample]]]:
        from lm_eval.evaluator import evaluate

        for name in names:
            packaged = protocol.load(name)
            with _quiet():
                task = self._task(packaged, lm)
                _check_room(packaged, lm)
                lm.num_truncated = 0
                scores = evaluate(
                    lm,
                    {"tasks": {name: task}, "groups": {}},
                    limit=self._limit,
                    # The standard error of a mean is computed, not drawn; this only must not be 0.
                    bootstrap_iters=1,
                    # Embedded items come rendered: lm-eval's own chat prompts know no turns before the last.
                    apply_chat_template=self._chat_template and not packaged.facts.embedded,
                    fewshot_as_multiturn=True,
                )
                samples = _samples(packaged, scores["samples"][name])
                truncated = _num_truncated(lm, task) / len(task.instances)
                result = _result(packaged, scores, samples, truncated)
            yield result, samples

    def _load(self, checkpoint: Path | str) -> Any:
        """The checkpoint as an lm-eval model, on the device."""
        import torch

        model, tokenizer = read(checkpoint, chat_template=self._chat_template)
        model.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return _lm_class()(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=self._batch_size,
            # A template writes every special token it wants; a second BOS would be one the model never saw.
            add_bos_token=False if self._chat_template else None,
        )

    def _task(self, packaged: protocol.Task, lm: Any) -> Any:
        """lm-eval's task object, kept while its rows stay the same."""
        key = ""
        if packaged.facts.embedded:
            key = prompts.rendering_key(lm.tokenizer) if self._chat_template else "plain"
        kept = self._tasks.get(packaged.name)
        if kept is None or kept[0] != key:
            rows = self._rows(packaged, lm.tokenizer)
            kept = (key, _build_task(packaged, rows))
            self._tasks[packaged.name] = kept
        return kept[1]

    def _rows(self, packaged: protocol.Task, tokenizer: Any) -> dict[str, Any]:
        """The task's rows as `datasets.Dataset` by split."""
        from datasets import Dataset

        if packaged.facts.embedded:
            documents = prompts.documents(packaged, tokenizer, chat_template=self._chat_template)
            return {packaged.config["test_split"]: Dataset.from_list(documents)}
        if self._bench_data is None:
            return _hub_rows(packaged)
        return {
            split: Dataset.from_list(_json_lines(self._bench_data / file.path))
            for split, file in packaged.facts.files.items()
        }


@functools.cache
def _lm_class() -> Any:
    """lm-eval's Hugging Face model with one change: where a prompt ends and its continuation starts."""
    from lm_eval.models.huggingface import HFLM

    class ExactSplit(HFLM):  # type: ignore[misc]
        num_truncated = 0

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            # lm-eval moves white space at the end of a prompt into the continuation. After a chat template that
            # is the newline behind `assistant`, which no training on answers teaches a model to write: every
            # greedy answer would count as wrong.
            start = self.tok_encode(context)
            whole = self.tok_encode(context + continuation)
            if whole[: len(start)] != start:
                # A token lies across the border; a model that continues the prompt never gets to write it.
                whole = start + self.tok_encode(continuation, add_special_tokens=False)
            # The last token is only predicted, never read; what does not fit is lost at the beginning.
            self.num_truncated += len(whole) > self.max_length + 1
            return start, whole[len(start) :]

    return ExactSplit


def _build_task(packaged: protocol.Task, rows: dict[str, Any]) -> Any:
    from lm_eval.api.task import ConfigurableTask

    config = packaged.model_copy(deep=True).config
    for key in ("dataset_path", "dataset_name", "dataset_kwargs"):
        config.pop(key, None)
    config["custom_dataset"] = lambda **_: rows
    config["metadata"] = {"version": packaged.facts.version}
    return ConfigurableTask(config=config)


def _hub_rows(packaged: protocol.Task) -> dict[str, Any]:
    """The splits a task scores, from the hub or its local cache, as many rows as the task says."""
    import datasets

    config = packaged.config
    try:
        loaded = datasets.load_dataset(config["dataset_path"], config["dataset_name"], **config["dataset_kwargs"])
    except Exception as error:  # What a hub client raises is no closed set; nothing is scored in here.
        raise MissingError(
            f"task `{packaged.name}`: cannot load `{config['dataset_path']}` from the hub: {first_line(error)}",
            "give the files with `--bench-data DIR`, or run where the hub or its cache can be reached",
        ) from error
    for split, file in packaged.facts.files.items():
        if len(loaded[split]) != file.rows:
            raise IntegrityError(
                f"task `{packaged.name}`: `{config['dataset_path']}` has {len(loaded[split])} `{split}` rows, "
                f"expected {file.rows}",
                "give the files with `--bench-data DIR`",
            )
    return {split: loaded[split] for split in packaged.facts.files}


def _json_lines(path: Path) -> list[Any]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def _check_room(packaged: protocol.Task, lm: Any) -> None:
    """Raise ConfigError where an answer alone would fill the model's context; lm-eval asserts it mid-run."""
    room = packaged.config.get("generation_kwargs", {}).get("max_gen_toks", 0)
    if room >= lm.max_length:
        raise ConfigError(
            f"task `{packaged.name}` writes up to {room} tokens, this model holds {lm.max_length} in all",
            "leave this task out for this model",
        )


def _num_truncated(lm: Any, task: Any) -> int:
    """How many requests lost the beginning of their prompt since the count was last set to 0."""
    if task.OUTPUT_TYPE != "generate_until":
        return int(lm.num_truncated)
    requests = [instance.args for instance in task.instances]
    return sum(len(lm.tok_encode(text)) > lm.max_length - options["max_gen_toks"] for text, options in requests)


def _samples(packaged: protocol.Task, logged: list[dict[str, Any]]) -> list[Sample]:
    """lm-eval logs one entry per item and filter; make it one per item, in plain types."""
    facts = packaged.facts
    samples: dict[int, Sample] = {}
    extracted: dict[int, dict[str, Any]] = {}
    for entry in logged:
        number = int(entry["doc_id"])
        response = entry["resps"][0][0]
        generated = isinstance(response, str)
        if generated:
            extracted.setdefault(number, {})[entry["filter"]] = {
                "answer": str(entry["filtered_resps"][0]),
                "correct": bool(entry[facts.metric]),
            }
        if entry["filter"] == facts.filter:
            samples[number] = {
                "doc_id": number,
                "prompt": str(entry["arguments"][0][0]),
                "target": str(entry["target"]),
                "response": response if generated else None,
                "loglikelihood": None if generated else float(response[0]),
                "extracted": extracted.setdefault(number, {}),
                "correct": bool(entry[facts.metric]),
                **{key: str(entry[key]) for key in ("doc_hash", "prompt_hash", "target_hash")},
            }
    return list(samples.values())


def _result(
    packaged: protocol.Task, scores: dict[str, Any], samples: list[Sample], truncated: float
) -> TaskResult:
    facts = packaged.facts
    metrics, counts = scores["results"][packaged.name], scores["n-samples"][packaged.name]
    stderr = metrics[f"{facts.metric}_stderr,{facts.filter}"]
    health = {"truncated": truncated}
    if samples[0]["response"] is not None:
        answers = [sample["extracted"][facts.filter]["answer"] for sample in samples]
        health["empty"] = sum(not sample["response"].strip() for sample in samples) / len(samples)
        health["no_answer"] = answers.count(_INVALID) / len(samples)
        others = [name for name in samples[0]["extracted"] if name != facts.filter]
        health |= {name: float(metrics[f"{facts.metric},{name}"]) for name in others}
    return TaskResult(
        task=packaged.name,
        metric=facts.metric,
        score=float(metrics[f"{facts.metric},{facts.filter}"]),
        stderr=math.nan if stderr == "N/A" else float(stderr),
        n=int(counts["effective"]),
        n_total=int(counts["original"]),
        version=facts.version,
        health=health,
    )


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingError("evaluation needs lm-eval", "pip install 'packcli[eval]'") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval, transformers and datasets from writing to the user's terminal; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    silence = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        # Their progress bars take no switch from `evaluate`; they write to whatever stderr is when they start.
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
