"""LongBench: what would make its scores other ones than lm-eval's, or none look like a zero.

All rows here are made up, in the columns of the hub's data set. No real row was ever seen by these tests.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import harness_of
from test_benchmarks import json_data, llama, lm_evals_own, outcomes, packaged, saying, shipped  # noqa: F401
from test_eval import only, prompt

from packcli import fetch
from packcli.config import EvalSpec
from packcli.errors import IntegrityError, MissingError
from packcli.eval import protocol, rows, scorers
from packcli.eval.engines import engine
from packcli.files import write_jsonl
from packcli.plan import EvalOrder
from packcli.store import Manifest

NEEDED = ("jieba", "fuzzywuzzy", "rouge")
needs_packages = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in NEEDED), reason="needs packcli[longbench]"
)
ANSWERS = {
    "qa_f1_score": ["a red fox", "the fox"],
    "rouge_score": ["The council met. It voted for the bridge."],
    "classification_score": ["Date"],
    "count_score": ["7"],
    "retrieval_score": ["Paragraph 12"],
    "code_sim_score": ["    return total + 1"],
}
NUM_ROWS = 6


def made_up(subset: str) -> list[dict[str, Any]]:
    """Rows as the hub has them: `all_classes` is null but for `trec`, and there are more columns than are kept."""
    return [
        {
            "context": f"Text {number} of {subset}.",
            "question": f"What of {number}?",
            "answers": ANSWERS[protocol.load(f"longbench_{subset}").facts.metric],
            "all_classes": ["Date", "City", "Date of birth"] if subset == "trec" else None,
            "answer_prefix": "Answer:",
            "length": number,
        }
        for number in range(NUM_ROWS)
    ]


@pytest.fixture
def hub(tmp_path: Path, packaged: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A hub on which every subset has six rows, read from disk by `datasets`; the protocol expects six."""
    import datasets

    for subset in protocol.LONGBENCH:
        write_jsonl(tmp_path / "hub" / f"{subset}.jsonl", made_up(subset))

    def edit(config: dict[str, Any]) -> None:
        for subset in config["subsets"].values():
            subset["rows"] = NUM_ROWS

    real = datasets.load_dataset

    def load(path: str, name: str | None = None, **settings: Any) -> Any:
        if path != "Xnhyacinth/LongBench":
            return real(path, name, **settings)
        assert len(settings["revision"]) == 40, "a branch moves"
        return datasets.DatasetDict(
            {"test": datasets.Dataset.from_json(str(tmp_path / "hub" / f"{name}.jsonl"), cache_dir=str(tmp_path))}
        )

    packaged("longbench", edit)
    monkeypatch.setattr("datasets.load_dataset", load)
    return tmp_path / "hub"


def packaged_by_lm_eval(subset: str) -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    found: dict[str, Any] = yaml.load(Path(shipped(f"longbench/{subset}.yaml")).read_text("utf-8"), Loader)
    return found


@pytest.mark.parametrize("subset", protocol.LONGBENCH)
def test_prompt_limit_or_metric_differs_from_lm_evals(subset: str) -> None:
    task, theirs = protocol.load(f"longbench_{subset}"), packaged_by_lm_eval(subset)
    for key in ("task", "dataset_path", "dataset_name", "test_split", "doc_to_text", "doc_to_target"):
        assert task.config[key] == theirs[key]
    assert task.config["generation_kwargs"] | {"temperature": 1} == theirs["generation_kwargs"]
    assert task.config["metric_list"] == theirs["metric_list"][1:], "the other one is the same under another name"
    assert theirs["process_results"] == f"metrics.get_{task.facts.metric.removesuffix('_score')}_with_score"


def test_group_lacks_an_english_subset_or_is_among_the_papers() -> None:
    names = {path.stem for path in Path(shipped("longbench")).glob("[!_]*.yaml") if not path.stem.endswith("_e")}
    chinese = {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
    assert set(protocol.LONGBENCH) == names - chinese
    assert protocol.expand(["longbench"]) == tuple(f"longbench_{subset}" for subset in protocol.LONGBENCH)
    assert not set(protocol.expand(["paper"])) & set(protocol.expand(["longbench"]))


def say(monkeypatch: pytest.MonkeyPatch, *, right: bool) -> None:
    saying(monkeypatch, lambda request: request.doc["answers"][-1] if right else "nobody knows 3", lambda _: False)


@needs_packages
@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("chat_template", [True, False], ids=["chat", "text"])
def test_gold_answer_scores_less_than_one_or_a_wrong_one_more_than_zero(
    chat_template: bool,
    llama: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several answers, the last one: `code_sim_score` measures likeness, which no answer has none of."""
    say(monkeypatch, right=True)
    found = list(harness_of(chat_template=chat_template).evaluate(llama, ["longbench"]))
    assert [result.task for result, _ in found] == list(protocol.expand(["longbench"]))
    for result, samples in found:
        assert result.score == pytest.approx(1.0, abs=1e-6), result.task
        assert (result.n, result.n_total, result.health["truncated"]) == (NUM_ROWS, NUM_ROWS, 0.0)
        assert result.protocol["data"]["source"].startswith("Xnhyacinth/LongBench@")
        assert "Text 0 of" in samples[0]["arguments"]["gen_args_0"]["arg_0"]
    say(monkeypatch, right=False)
    for result, _ in harness_of(chat_template=chat_template).evaluate(llama, ["longbench"]):
        assert result.score < 0.5 if result.metric == "code_sim_score" else result.score == 0.0, result.task


@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize("subset", ["qasper", "samsum", "trec", "passage_retrieval_en", "repobench-p"])
def test_score_differs_from_lm_evals_own(
    subset: str,
    hub: Path,
    llama: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts and scores of each item, where the answers are partly right."""
    answers = ["a fox (red)", "The council voted; 12 or 7", "Date of birth", "# so\n    return total"]
    saying(
        monkeypatch,
        lambda request: answers[int(request.doc["question"].strip("What of?")) % len(answers)],
        lambda _: False,
    )
    name, metric = f"longbench_{subset}", protocol.load(f"longbench_{subset}").facts.metric
    result, samples = only(harness_of(batch_size=1).evaluate(llama, [name]))
    lm = engine.load(llama, chat_template=True, batch_size=1)
    data = json_data(tmp_path, test=made_up(subset))
    own = lm_evals_own(
        tmp_path, {"include": shipped(f"longbench/{subset}.yaml")} | data, lm, apply_chat_template=True
    )
    assert 0 < result.score < 1
    theirs = [(asked[0][0], responses, metrics[metric], metrics["score"]) for asked, responses, _, metrics in own]
    ours = [(prompt(one), one["resps"][0], one[metric], one[metric]) for one in samples]
    assert ours == theirs


def test_row_lost_on_the_hub_goes_unsaid(hub: Path) -> None:
    write_jsonl(hub / "qasper.jsonl", made_up("qasper")[1:])
    with pytest.raises(IntegrityError, match=r"has 5 rows .test., expected 6") as raised:
        rows.of_task(protocol.load("longbench_qasper"), None, bench_data=None, chat_template=True)
    assert "--bench-data" not in raised.value.fix, "there are no files of it"


def test_files_of_other_benchmarks_are_taken_for_its_own(hub: Path, tmp_path: Path) -> None:
    """With `--bench-data` for the others, its rows still come from the hub, and its protocol says so."""
    task = protocol.load("longbench_trec")
    found = rows.of_task(task, None, bench_data=tmp_path, chat_template=True)
    assert found.source.startswith("Xnhyacinth/LongBench@")
    assert found.splits["test"][0].keys() == {"context", "question", "answers", "all_classes"}
    prints = {
        protocol.fingerprint("longbench_trec", limit=None, chat_template=True, bench_data=data)
        for data in (None, tmp_path)
    }
    assert len(prints) == 1


def test_subset_is_not_fetched_where_other_benchmarks_have_files(tmp_path: Path) -> None:
    spec = EvalSpec(tasks=("longbench_lcc",), bench_data=str(tmp_path))
    order = EvalOrder(id="e", train="t", task="longbench_lcc", protocol="p", eval=spec)
    plan: Any = SimpleNamespace(trains={}, tokens={}, evals={"e": order})
    [need] = fetch.remote(plan)
    assert (need.what, need.name, need.revision) == ("benchmark", "Xnhyacinth/LongBench", revision())
    assert need.source is not None
    assert (need.source.subset, need.source.split) == ("lcc", "test")
    assert fetch.local(plan) == []


def revision() -> str:
    return str(protocol.load("longbench_lcc").config["dataset_kwargs"]["revision"])


def test_no_hub_and_no_files_is_a_traceback_or_a_zero(
    llama: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Offline, as in all tests; the packages are not what is missing."""
    monkeypatch.setattr(scorers, "_longbench", dict)
    found = outcomes(("tiny_copy", "longbench_lcc"), tmp_path, llama, tmp_path)
    assert isinstance(found["tiny_copy"], Manifest)
    error = found["longbench_lcc"]
    assert isinstance(error, MissingError)
    assert error.exit_code == 6
    assert "cannot load `Xnhyacinth/LongBench` from the hub" in error.cause
    assert error.fix == "run where the hub or its cache can be reached"
    assert "\n" not in f"{error.cause}{error.fix}"


def test_missing_package_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    scorers._longbench.cache_clear()
    for name in (*NEEDED, "lm_eval.tasks.longbench.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingError, match="longbench_lcc") as raised:
        harness_of().require("longbench_lcc")
    assert raised.value.fix == "pip install 'packcli[longbench]'"


@needs_packages
def test_long_sentence_scores_zero() -> None:
    """rouge recurses once a word; lm-eval's `except` takes that error for a score of 0."""
    one, other = (" ".join(["same", *(f"{which}{number}" for number in range(550))]) for which in "ab")
    score = scorers.settings(protocol.load("longbench_qmsum"), None, lambda *_: None)["process_results"]
    assert score({"answers": [one]}, [other])["rouge_score"] == pytest.approx(1 / 551, abs=1e-6)
