"""A packaged task as lm-eval's own task objects: one for each part, its rows in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packcli.eval import rows, scorers
from packcli.eval.protocol import Task
from packcli.eval.rows import FewShot, Row
from packcli.files import digest

if TYPE_CHECKING:
    from packcli.eval.sandbox.sandbox import Sandbox


@dataclass(frozen=True, slots=True)
class Built:
    """`parts`: lm-eval's task by the name of the part, "" where there are none; `groups` joins them.

    `n_total` counts the rows to be scored and those in `left_out`. `data` says where they came from, with a digest
    of all that is scored, so that two results can be seen to be on the same rows.
    """

    parts: dict[str, Any]
    groups: dict[str, Any]
    n_total: int
    left_out: scorers.LeftOut | None
    data: dict[str, str]


def build(
    task: Task,
    tokenizer: Any,
    *,
    bench_data: Path | None,
    chat_template: bool,
    sandbox: Sandbox | None,
    note: Callable[[int, int, str], None],
) -> Built:
    """Find the task's rows and make lm-eval's tasks of them; `sandbox` runs what a model wrote, if it writes code.

    Raises:
        MissingError, IntegrityError: as `rows.of_task` and `rows.few_shot`.
    """
    found = rows.of_task(task, tokenizer, bench_data=bench_data, chat_template=chat_template)
    test = task.config["test_split"]
    scored, left_out = scorers.rows(task, found.splits[test], bench_data)
    n_total = len(found.splits[test])
    parts = rows.Found(found.splits | {test: scored}, found.source).parts(task.facts.part)
    shots = rows.few_shot(task.facts.shots, parts) if task.facts.shots else {}
    own = scorers.settings(task, sandbox, note)
    made = {part: _lm_task(task, part, splits, shots.get(part), own) for part, splits in parts.items()}
    return Built(
        parts=made,
        groups={} if "" in made else {task.name: _group(task, made.values())},
        n_total=n_total,
        left_out=left_out,
        data={"source": found.source, "rows": digest(scored)},
    )


def _lm_task(
    task: Task,
    part: str,
    splits: dict[str, list[Row]],
    shots: FewShot | None,
    own: dict[str, Any],
) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = task.model_copy(deep=True).config
    for key in ("dataset_path", "dataset_name", "dataset_kwargs"):
        config.pop(key, None)
    config |= own
    if shots is not None:
        config["fewshot_config"] |= {"samples": shots.samples}
        config["description"] = shots.description
    loaded = {split: Dataset.from_list(found) for split, found in splits.items()}
    config |= {
        "task": f"{task.name}_{part}" if part else task.name,
        "custom_dataset": lambda **_: loaded,
        "metadata": {"version": task.facts.version},
    }
    if "{{" in str(config["doc_to_text"]):
        config["doc_to_text"] = _compiled(config["doc_to_text"])
    return ConfigurableTask(config=config)


def _group(task: Task, parts: Iterable[Any]) -> Any:
    """What makes lm-eval report the mean over the items of all parts."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    metrics = [AggMetricConfig(metric=metric["metric"]) for metric in task.config["metric_list"]]
    group = Group(task.name, aggregate_metric_list=metrics, metadata={"version": task.facts.version})
    for part in parts:
        group.add(part)
    return group


def _compiled(template: str) -> Callable[[Row], str]:
    """lm-eval compiles a template again for every row and shot: most of the time MMLU's prompts take."""
    from lm_eval.utils import env

    render = env.from_string(template).render
    return lambda row: str(render(**row))
