"""What eval writes, in lm-eval's layout: a file its readers cannot read, or that says something else than lm-eval.

The model has random weights, the rows are made up.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_benchmarks import code, json_data, llama, needs_data, packaged, short, two_parts  # noqa: F401
from test_eval import BENCHMARKS, gsm8k  # noqa: F401

from packcli import stages
from packcli.config import EvalSpec
from packcli.eval import protocol, rows
from packcli.files import read_json, read_jsonl
from packcli.store import Manifest, Store

CHANGES = {
    "date",
    "git_hash",
    "model_name",
    "model_name_sanitized",
    "model_source",
    "pretty_env_info",
    "total_evaluation_time_seconds",
    "transformers_version",
    "upper_git_hash",
}
"""What lm-eval says of the moment, the machine and the checkpoint's path, and packcli's files leave out."""


def written(
    checkpoint: Path, task: str, data: Path | None, runs: Path, **settings: Any
) -> tuple[Any, list[Any], Manifest]:
    """results.json, samples.jsonl and the manifest of one task, scored through the stage that writes them."""
    spec = EvalSpec(tasks=(task,), bench_data=str(data) if data else None, batch_size=4, **settings)
    store = Store(runs)
    orders = stages.foreign_orders(str(checkpoint), spec, store)
    scorer = stages.scorer_for(spec, unsafe_no_sandbox=True)
    [(order, outcome)] = stages.evaluate(orders, store, scorer, checkpoint=checkpoint)
    assert isinstance(outcome, Manifest)
    return read_json(store.results(order.id)), read_jsonl(store.samples(order.id)), outcome


def lm_evals(
    directory: Path, checkpoint: Path, name: str, configs: list[dict[str, Any]], out: Path
) -> tuple[Any, Any]:
    """The same task by lm-eval's own loader, evaluator and writer: the two kinds of file it leaves."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    directory.mkdir()
    for number, config in enumerate(configs):
        (directory / f"{number}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    tracker = EvaluationTracker(output_path=str(out / "results.json"))
    found = simple_evaluate(
        "hf",
        model_args={"pretrained": str(checkpoint), "add_bos_token": False},
        tasks=[name],
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        batch_size=4,
        device="cpu",
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        evaluation_tracker=tracker,
    )
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    for task, logged in samples.items():
        tracker.save_results_samples(task_name=task, samples=logged)
    [results] = out.glob("results_*.json")
    return json.loads(results.read_text()), [
        json.loads(line) | {"task": task}
        for task in samples
        for path in out.glob(f"samples_{task}_*.jsonl")
        for line in path.read_text().splitlines()
    ]


def own_gsm8k(data: Path, tmp_path: Path) -> list[dict[str, Any]]:
    task = protocol.load("gsm8k")
    files = {split: str(data / file.path) for split, (file,) in task.facts.files.items()}
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "dataset_name": None}
    return [task.config | source | {"metadata": {"version": 1}}]


def own_bbh(data: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """A group of two tasks, as lm-eval's YAMLs have it."""
    task = protocol.load("bbh")
    assert task.facts.shots is not None
    configs = []
    for part, shots in rows.few_shot(task.facts.shots, task.facts.hub_configs).items():
        kept = [{**row, "task": part} for row in json.loads((data / f"{part}.json").read_text())["examples"]]
        (tmp_path / part).mkdir()
        found = {"task": f"bbh_{part}", "dataset_name": None, "metadata": {"version": 1}}
        found |= {"description": shots.description, **json_data(tmp_path / part, test=kept)}
        found["fewshot_config"] = task.config["fewshot_config"] | {"samples": shots.samples}
        configs.append(task.config | found)
    group = {
        "group": "bbh",
        "task": [config["task"] for config in configs],
        "aggregate_metric_list": [{"metric": "exact_match"}],
        "metadata": {"version": 1},
    }
    return [*configs, group]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "own"), [("gsm8k", own_gsm8k), ("bbh", own_bbh)], ids=["alone", "parts"])
def test_file_says_something_else_than_lm_evals_own(
    task: str,
    own: Callable[[Path, Path], list[dict[str, Any]]],
    llama: Path,  # noqa: F811
    packaged: Callable[..., None],  # noqa: F811
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Equal in every key both have, but for where the rows and the configuration came from."""
    data = request.getfixturevalue("gsm8k" if task == "gsm8k" else "two_parts")
    if task == "bbh":
        packaged(task, short)
    results, samples, _ = written(llama, task, data, tmp_path / "runs")
    theirs, logged = lm_evals(tmp_path / "own", llama, task, own(data, tmp_path), tmp_path / "out")
    for config in (*results["configs"].values(), *theirs["configs"].values()):
        for key in ("dataset_path", "dataset_name", "dataset_kwargs"):
            config.pop(key, None)
        config["metadata"].pop("config_source", None)
    assert results.keys() - theirs.keys() == {"packcli"}
    assert theirs.keys() - results.keys() == CHANGES
    shared = results.keys() & theirs.keys() - {"config"}
    assert {key: results[key] for key in shared} == {key: theirs[key] for key in shared}
    assert results["config"].items() <= theirs["config"].items()
    assert {one.pop("extracted", None) for one in samples} != set()
    assert samples == logged


@pytest.mark.parametrize("task", ["gsm8k", "bbh"])
def test_lm_evals_readers_stumble_over_a_file_of_ours(
    task: str,
    llama: Path,  # noqa: F811
    packaged: Callable[..., None],  # noqa: F811
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Its table of a results file; its samples are written for `datasets` to load."""
    import datasets
    from lm_eval.utils import make_table

    data = request.getfixturevalue("gsm8k" if task == "gsm8k" else "two_parts")
    if task == "bbh":
        packaged(task, short)
    results, samples, manifest = written(llama, task, data, tmp_path / "runs")
    record = results["packcli"]
    assert record == manifest.results
    headline = f"{record['metric']},{protocol.load(task).facts.filter}"
    assert results["results"][task][headline] == pytest.approx(record["score"])
    table = make_table(results)
    assert all(name in table for name in results["results"])
    if task == "bbh":
        assert "|bbh" in make_table(results, "groups")
        assert results["group_subtasks"] == {"bbh": ["bbh_navigate", "bbh_snarks"]}
    [file] = (tmp_path / "runs" / "store" / "eval").glob("*/samples.jsonl")
    loaded = datasets.Dataset.from_json(str(file), cache_dir=str(tmp_path / "cache"))
    assert loaded["prompt_hash"] == [one["prompt_hash"] for one in samples]


def test_second_run_writes_other_bytes_or_says_where_it_ran(
    llama: Path,  # noqa: F811
    gsm8k: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """One item: its standard error does not exist, which is null here and never NaN."""
    found = []
    for name in ("first", "second"):
        results, _, _ = written(llama, "gsm8k", gsm8k, tmp_path / name, limit=1)
        files = sorted((tmp_path / name / "store" / "eval").glob("*/*.json*"))
        found.append({file.name: file.read_bytes() for file in files if file.name != "manifest.json"})
    assert found[0].keys() == {"results.json", "samples.jsonl", "items.json"}
    assert found[0] == found[1]
    assert results["packcli"]["stderr"] is None
    assert results["results"]["gsm8k"]["exact_match_stderr,strict-match"] == "N/A"
    assert results["n-samples"]["gsm8k"] == {"original": 6, "effective": 1}
    for text in (content.decode() for content in found[0].values()):
        assert str(tmp_path) not in text
        assert str(llama) not in text
        assert " at 0x" not in text


def test_address_of_a_function_is_in_the_file(
    llama: Path,  # noqa: F811
    code: Path,  # noqa: F811
    packaged: Callable[..., None],  # noqa: F811
    tmp_path: Path,
) -> None:
    """What scores programs is a function of ours in lm-eval's configuration: its name is written, and stays."""
    packaged("humaneval", short)
    results, samples, _ = written(llama, "humaneval", code, tmp_path / "runs", chat_template=False)
    assert " at 0x" not in json.dumps(results)
    [step] = results["configs"]["humaneval"]["filter_list"][0]["filter"]
    assert step["filter_fn"].startswith("packcli.eval.scorers.")
    assert [sample["pass@1"] for sample in samples] == [0.0, 0.0]
    assert all(sample["extracted"].startswith("failed: ") for sample in samples), "why stands beside it"


@needs_data
@pytest.mark.slow
def test_rows_left_out_look_like_a_complete_run(
    llama: Path,  # noqa: F811
    packaged: Callable[..., None],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nltk.data.path", [])
    packaged("ifeval", short)
    results, samples, _ = written(llama, "ifeval", BENCHMARKS, tmp_path / "runs", limit=3)
    assert results["n-samples"]["ifeval"] == {"original": 541, "effective": 3}
    assert results["packcli"]["left_out"]["rows"]
    assert [sample["doc_id"] for sample in samples] == [0, 1, 2]
