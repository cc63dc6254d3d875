"""Benchmarks: what would make a score mean something else than the paper's set, asked and scored as stated.

The models here have random weights, or are no models at all: they write the reference answer, or a wrong one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import harness_of
from test_eval import BENCHMARKS, CHATML, build_tokenizer, only, prompt, save_llama

from packcli import stages
from packcli.config import EvalSpec
from packcli.errors import ConfigError, IntegrityError, MissingError, PackcliError
from packcli.eval import long_context, protocol, rows, scorers
from packcli.eval.engines import engine
from packcli.files import digest, sha256_file, write_jsonl
from packcli.store import Manifest, Store

SCORED = ("mmlu", "gsm8k", "math", "math500", "bbh", "humaneval")
needs_data = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmark data is not part of the package")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random")
    save_llama(path, build_tokenizer())
    return path


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Changes packaged YAMLs for one test: `packaged("gsm8k", edit)`, where `edit` changes the parsed YAML."""
    directory = tmp_path / "packaged"
    shutil.copytree(Path(str(protocol._TASKS)), directory)

    def change(task: str, edit: Callable[[dict[str, Any]], object]) -> None:
        path = directory / f"{task}.yaml"
        parsed = yaml.safe_load(path.read_text(encoding="utf-8"))
        edit(parsed)
        path.write_text(yaml.safe_dump(parsed, sort_keys=False), encoding="utf-8")
        protocol.load.cache_clear()

    monkeypatch.setattr(protocol, "_TASKS", directory)
    protocol.load.cache_clear()
    yield change
    protocol.load.cache_clear()


@pytest.fixture
def two_parts(tmp_path: Path, packaged: Callable[..., None]) -> Path:
    """Benchmark data with two of BBH's tasks, made up: two items in one, six in the other."""
    targets = {"navigate": ["No", "No"], "snarks": ["(A)"] * 6}
    files = []
    for part, found in targets.items():
        path = tmp_path / "data" / f"{part}.json"
        path.parent.mkdir(exist_ok=True)
        rows_ = [{"input": f"Which? {number}", "target": target} for number, target in enumerate(found)]
        path.write_text(json.dumps({"canary": "made up", "examples": rows_}))
        files.append({"part": part, "path": path.name, "rows": len(rows_), "sha256": sha256_file(path)})
    examples = [rows._bbh(part) for part in sorted(targets)]

    def edit(config: dict[str, Any]) -> None:
        config["metadata"] |= {"hub_configs": list(targets), "files": {"test": files}}
        config["metadata"]["shots"]["digest"] = digest([[shots.description, shots.samples] for shots in examples])

    packaged("bbh", edit)
    return tmp_path / "data"


def short(config: dict[str, Any]) -> None:
    config["generation_kwargs"]["max_gen_toks"] = 12


def reference(task: str, row: dict[str, Any]) -> str:
    """What a model that knows the answer would write, in the form the task's shots have."""
    match task:
        case "gsm8k":
            return f" {row['answer']}"
        case "math" | "math500":
            from lm_eval.tasks.minerva_math import utils

            # One of 5,000 is broken over two lines, which the form of the shots is not.
            boxed = " ".join(utils.remove_boxed(utils.last_boxed_only_string(row["solution"])).split())
            return f" {row['solution']}\nFinal Answer: The final answer is ${boxed}$. I hope it is correct."
        case "bbh":
            return f"There is little to it.\nSo the answer is {row['target']}."
        case _:
            return str(row["canonical_solution"])


def saying(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Any], str], likes: Callable[[Any], bool]) -> None:
    """Checkpoints write what `answer` gives, up to a stop string, and find likely what `likes` does."""
    load = engine.load

    def patched(checkpoint: Path | str, **settings: Any) -> Any:
        lm = load(checkpoint, **settings)
        lm.generate_until = lambda requests: [stopped(answer(request), request.args[1]) for request in requests]
        lm.loglikelihood = lambda requests: [(-1.0 if likes(request) else -2.0, False) for request in requests]
        return lm

    monkeypatch.setattr(engine, "load", patched)


def stopped(text: str, options: dict[str, Any]) -> str:
    for stop in options["until"]:
        text = text.split(stop)[0]
    return text


def knowing(monkeypatch: pytest.MonkeyPatch, task: str, *, right: bool) -> None:
    saying(
        monkeypatch,
        lambda request: reference(task, request.doc) if right else "no idea",
        lambda request: (request.idx == request.doc.get("answer")) == right,
    )


# Every reference answer counts as right, every other one as wrong ---------------------------------------


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("task", [pytest.param("humaneval", marks=pytest.mark.sandbox), *SCORED[:-1]])
def test_real_rows_the_scorer_cannot_tell(
    task: str, right: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knowing(monkeypatch, task, right=right)
    result, samples = only(harness_of(bench_data=BENCHMARKS, limit=20).evaluate(llama, [task]))
    assert (result.score, result.n) == (float(right), 20 * max(1, len(result.parts)))
    if task not in ("mmlu", "humaneval"):
        assert result.health["no_answer"] == float(not right)
    assert {part["score"] for part in result.parts.values()} <= {float(right)}
    json.dumps(samples, allow_nan=False)


@needs_data
@pytest.mark.soak
@pytest.mark.timeout(1500)  # wrong answers to MATH took ten minutes on a busy machine
@pytest.mark.parametrize("chat_template", [True, False], ids=["chat", "text"])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("task", [pytest.param("humaneval", marks=pytest.mark.sandbox), *SCORED[:-1]])
def test_all_real_rows_the_scorer_cannot_tell(
    task: str, right: bool, chat_template: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knowing(monkeypatch, task, right=right)
    result, _ = only(harness_of(bench_data=BENCHMARKS, chat_template=chat_template).evaluate(llama, [task]))
    expected = {"mmlu": 14042, "gsm8k": 1319, "math": 5000, "math500": 500, "bbh": 6511, "humaneval": 164}
    assert (result.score, result.n, result.n_total) == (float(right), expected[task], expected[task])


def test_parts_weighed_alike_whatever_their_size(
    llama: Path, two_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two items of one part are right, the six of the other wrong: 2 / 8, and not 1 / 2."""
    saying(monkeypatch, lambda request: reference("bbh", request.doc) * (len(request.doc["target"]) == 2), bool)
    result, samples = only(harness_of(bench_data=two_parts).evaluate(llama, ["bbh"]))
    assert (result.score, result.n, result.n_total) == (0.25, 8, 8)
    assert result.stderr == pytest.approx((0.25 * 0.75 / 7) ** 0.5)
    assert result.parts == {"navigate": {"score": 1.0, "n": 2}, "snarks": {"score": 0.0, "n": 6}}
    assert [sample["task"] for sample in samples] == ["bbh_navigate"] * 2 + ["bbh_snarks"] * 6
    assert result.health["no_answer"] == 0.75


def test_limit_looks_like_a_complete_run(llama: Path, two_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knowing(monkeypatch, "bbh", right=True)
    result, _ = only(harness_of(bench_data=two_parts, limit=3).evaluate(llama, ["bbh"]))
    assert (result.n, result.n_total) == (5, 8)
    assert {part: found["n"] for part, found in result.parts.items()} == {"navigate": 2, "snarks": 3}


# The same as lm-eval's own, to the last item -------------------------------------------------------------


def lm_evals_own(tmp_path: Path, config: dict[str, Any], lm: Any, **settings: Any) -> list[Any]:
    """The items as lm-eval's own loader and evaluator see and score them."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    directory = tmp_path / "own"
    directory.mkdir()
    config = {"task": "own", "tag": [], "dataset_name": None} | config
    (directory / "own.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    found = simple_evaluate(lm, tasks=["own"], task_manager=manager, bootstrap_iters=0, **settings)
    return items(found["samples"]["own"])


def items(samples: list[dict[str, Any]]) -> list[Any]:
    """(prompts with settings, responses, filter, every metric) of each item and filter.

    Likelihoods are rounded: a batch of other rows has other float noise.
    """
    return [
        (
            sample["arguments"],
            [one[0] if isinstance(one[0], str) else round(one[0][0], 3) for one in sample["resps"]],
            sample["filter"],
            {metric: sample[metric] for metric in sorted(sample["metrics"])},
        )
        for sample in sorted(samples, key=lambda sample: (sample["doc_id"], sample["filter"]))
    ]


def mixed(request: Any) -> str:
    """The reference answer, that less a character, another one, babble or silence, by the prompt's digest."""
    row = request.doc
    if "instruction_id_list" in row:
        right = "a *reply* in lowercase\n\nP.S. so there [name] <<title>>" * 3
    else:
        right = reference("gsm8k" if "question" in row else "math" if "solution" in row else "bbh", row)
    said = (right, right, right[:-1], right.replace("1", "7"), "so the answer is 12", "")
    return said[digits(request.args[0]) % len(said)]


def digits(text: str) -> int:
    return int(digest(text), 16)


def json_data(tmp_path: Path, **splits: list[dict[str, Any]]) -> dict[str, Any]:
    for split, found in splits.items():
        write_jsonl(tmp_path / f"{split}.jsonl", found)
    files = {split: str(tmp_path / f"{split}.jsonl") for split in splits}
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}


def shipped(path: str) -> str:
    import lm_eval

    return str(Path(lm_eval.__file__).parent / "tasks" / path)


def own_config(task: str, part: str, tmp_path: Path) -> dict[str, Any]:
    """lm-eval's built-in task on the same rows; only what the packaged YAML says is different, is."""
    ours = protocol.load(task)
    found = rows.of_task(ours, None, bench_data=BENCHMARKS, chat_template=False).parts(ours.facts.part)[part]
    generation = {"generation_kwargs": ours.config.get("generation_kwargs")}
    if task == "ifeval":
        kept, _ = scorers.rows(ours, found["train"], None)
        return {"include": shipped("ifeval/ifeval.yaml")} | generation | json_data(tmp_path, train=kept)
    match task:
        case "mmlu":
            # lm-eval leaves the number of shots to its command line.
            config = {"include": shipped(f"mmlu/default/mmlu_{part}.yaml"), "num_fewshot": 5}
            return config | json_data(tmp_path, **found)
        case "math500":
            data = json_data(tmp_path, **found) | generation
            return {"include": shipped("minerva_math/minerva_math500.yaml")} | data
        case "bbh":
            filters = {"filter_list": ours.config["filter_list"]}
            data = json_data(tmp_path, **found) | generation
            return {"include": shipped(f"bbh/cot_fewshot/{part}.yaml")} | filters | data
        case _:
            keys = ("fewshot_config", "num_fewshot", "filter_list")
            changed = {key: ours.config[key] for key in keys} | generation
            return {"include": shipped("gsm8k/gsm8k.yaml")} | changed | json_data(tmp_path, **found)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("answers", ["mixed", "model"])
@pytest.mark.parametrize("chat_template", [True, False], ids=["chat", "text"])
@pytest.mark.parametrize(
    ("task", "part"),
    [("mmlu", "anatomy"), ("gsm8k", ""), ("math500", ""), ("bbh", "navigate"), ("ifeval", "")],
    ids=lambda value: value or "all",
)
def test_score_differs_from_lm_evals_own(
    task: str,
    part: str,
    chat_template: bool,
    answers: str,
    llama: Path,
    tmp_path: Path,
    packaged: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts, answers and every metric of each item: of a checkpoint with random weights, of mixed answers."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    limit = 40 if answers == "mixed" else {"mmlu": 2, "bbh": 3}.get(task, 6)
    settings = {"chat_template": chat_template, "batch_size": 4}
    if task != "mmlu":
        packaged(task, short)
    seen: dict[str, list[Any]] = {}
    evaluate = evaluator.evaluate

    def spy(lm: Any, tasks: Any, **settings: Any) -> Any:
        scores = evaluate(lm, tasks, **settings)
        seen.update({name: items(samples) for name, samples in scores["samples"].items()})
        return scores

    if answers == "mixed":
        saying(monkeypatch, mixed, lambda request: digits(request.args[0] + request.args[1]) % 3 == 0)
    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "evaluate", spy)
        result, _ = only(harness_of(bench_data=BENCHMARKS, limit=limit, **settings).evaluate(llama, [task]))  # type: ignore[arg-type]
    if answers == "mixed" or (task == "mmlu" and chat_template):
        # lm-eval's own class moves the newline behind `assistant` into the answer (`engines/split.py`).
        lm = engine.load(llama, **settings)  # type: ignore[arg-type]
    else:
        add_bos_token = False if chat_template else None
        lm = HFLM(pretrained=str(llama), batch_size=4, device="cpu", add_bos_token=add_bos_token)
    config = own_config(task, part, tmp_path)
    chat = {"apply_chat_template": chat_template, "fewshot_as_multiturn": chat_template}
    own = lm_evals_own(tmp_path, config, lm, limit=limit, **chat)
    assert len(own) == limit * (2 if task == "gsm8k" else 1)
    assert result.protocol["shots_as"] == ("turns" if chat_template else "text")
    assert seen[f"{task}_{part}" if part else task] == own
    if answers == "mixed":
        assert 0 < result.score < 1
        assert len({str(metrics) for *_, metrics in own}) > 1


@needs_data
def test_examples_of_bbh_are_not_its_authors(tmp_path: Path) -> None:
    """Prompts without a template are the text of `cot-prompts`, but for a newline that lm-eval has for a space."""
    task = protocol.load("bbh")
    assert task.facts.shots is not None
    parts = task.facts.hub_configs
    for part, shots in rows.few_shot(task.facts.shots, parts).items():
        written = (BENCHMARKS / "bbh" / "cot-prompts" / f"{part}.txt").read_text(encoding="utf-8")
        _, _, theirs = written.partition("-----\n")
        blocks = [f"Q: {shot['input']}\nA: Let's think step by step.\n{shot['target']}" for shot in shots.samples]
        ours = shots.description + "\n\n".join(blocks)
        if part == "sports_understanding":
            assert ours == theirs.replace("step by step. ", "step by step.\n")
        else:
            assert ours == theirs
        assert len(blocks) == 3


def test_examples_that_changed_with_lm_eval_go_unnoticed(packaged: Callable[..., None]) -> None:
    packaged("bbh", lambda config: config["metadata"]["shots"].update(digest="0" * 16))
    shots = protocol.load("bbh").facts.shots
    assert shots is not None
    with pytest.raises(IntegrityError, match="few-shot examples of bbh"):
        rows.few_shot(shots, protocol.load("bbh").facts.hub_configs)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("So the answer is (A).", "(A)"),
        ("So the answer is (A)", "(A)"),
        ("So the answer is valid.  \n\nIs there more? No.", "valid"),
        ("First, the answer is not yet known.\nSo the answer is 8.5.", "8.5"),
        ("so the answer is ] ) >", "] ) >"),
        ("It is (A).", None),
    ],
)
def test_last_character_of_an_answer_lost(response: str, answer: str | None) -> None:
    """What lm-eval's own pattern does to the second of these."""
    from lm_eval.filters import build_filter_ensemble

    task = protocol.load("bbh")
    (named,) = task.config["filter_list"]
    steps = [[step["function"], {k: v for k, v in step.items() if k != "function"}] for step in named["filter"]]
    request = type("Request", (), {"resps": [response], "doc": {}, "filtered_resps": {}})()
    build_filter_ensemble(named["name"], steps).apply([request])
    assert scorers.extracted(task, request.filtered_resps[named["name"]]) == answer


# Rows from the hub are the rows of the files ---------------------------------------------------------------


def lines(file: str) -> list[dict[str, Any]]:
    # Bytes: as text, a line would also end at a character that some questions have in them.
    return [json.loads(line) for line in (BENCHMARKS / file).read_bytes().splitlines()]


def hub_shaped() -> Callable[..., Any]:
    """`datasets.load_dataset` with the columns, types and configurations of the hub, filled from the files."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    text = Value("string")

    def of(found: list[dict[str, Any]], features: dict[str, Any] | None, *columns: str) -> Any:
        kept = [{column: row[column] for column in columns or row} for row in found]
        return Dataset.from_list(kept, features=Features(features) if features else None)

    def load(path: str, config: str | None, *, revision: str) -> Any:
        assert len(revision) == 40
        match path:
            case "cais/mmlu":
                assert config == "all"
                label = ClassLabel(names=["A", "B", "C", "D"])
                features = {"question": text, "subject": text, "choices": List(text), "answer": label}
                splits = {split: lines(f"mmlu/{split}.jsonl") for split in ("dev", "test")}
                return DatasetDict({split: of(found, features, *features) for split, found in splits.items()})
            case "EleutherAI/hendrycks_math":
                found = [row for row in lines("math/math_test_5000.jsonl") if row["subject_dir"] == config]
                return DatasetDict({"test": of(found, None, "problem", "level", "type", "solution")})
            case "HuggingFaceH4/MATH-500":
                return DatasetDict({"test": of(lines("math/math500_test.jsonl"), None)})
            case "lukaemon/bbh":
                found = json.loads((BENCHMARKS / f"bbh/bbh/{config}.json").read_text())["examples"]
                return DatasetDict({"test": of(found, {"input": text, "target": text})})
            case "google/IFEval":
                # Arrow gives every dictionary every key, as on the hub.
                return DatasetDict({"train": of(lines("ifeval/input_data.jsonl"), None)})
            case "openai/openai_humaneval":
                columns = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
                return DatasetDict({"test": of(lines("humaneval/HumanEval.jsonl"), None, *columns)})
            case _:
                return DatasetDict({split: of(lines(f"gsm8k/{split}.jsonl"), None) for split in ("train", "test")})

    return load


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    ["gsm8k", "math", "math500", "bbh", "ifeval", "mmlu", pytest.param("humaneval", marks=pytest.mark.sandbox)],
)
def test_prompts_from_the_hub_differ_from_those_of_the_files(
    task: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saying(monkeypatch, lambda _: "no idea", lambda _: False)
    monkeypatch.setattr("datasets.load_dataset", hub_shaped())
    asked = []
    for data in (BENCHMARKS, None):
        result, samples = only(harness_of(bench_data=data, limit=2).evaluate(llama, [task]))
        by_part = sorted((sample["task"], sample["doc_id"], sample["filter"], sample) for sample in samples)
        asked.append([(sample["arguments"], sample["target"], sample["doc_hash"]) for *_, sample in by_part])
        assert result.protocol["data"]["source"].startswith("files" if data else f"{source(task)}@")
        assert result.n_total == sum(file.rows for file in protocol.load(task).facts.files[split(task)])
    assert asked[0] == asked[1]


def source(task: str) -> str:
    return str(protocol.load(task).config["dataset_path"])


def split(task: str) -> str:
    return str(protocol.load(task).config["test_split"])


@needs_data
def test_rows_of_the_files_as_others_read_them() -> None:
    """The zip's CSV against a conversion made by another program; every row of both splits."""
    found = rows.of_task(protocol.load("mmlu"), None, bench_data=BENCHMARKS, chat_template=True).splits
    assert found == {name: lines(f"mmlu/{name}.jsonl") for name in ("dev", "test")}


@pytest.mark.parametrize("damage", ["row_lost", "column_lost", "part_lost"])
def test_other_rows_on_the_hub_scored_as_the_benchmark(
    damage: str, two_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset, DatasetDict

    def load(path: str, config: str, **_: Any) -> Any:
        found = json.loads((two_parts / f"{config}.json").read_text())["examples"]
        if damage == "row_lost" and config == "snarks":
            found = found[1:]
        if damage == "part_lost" and config == "snarks":
            raise ValueError("BuilderConfig 'snarks' not found")
        if damage == "column_lost":
            found = [{"input": row["input"]} for row in found]
        return DatasetDict({"test": Dataset.from_list(found)})

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises((IntegrityError, MissingError), match="lukaemon/bbh"):
        rows.of_task(protocol.load("bbh"), None, bench_data=None, chat_template=True)


# What is missing is said, and leaves the rest alone --------------------------------------------------------


def outcomes(tasks: tuple[str, ...], data: Path, llama: Path, tmp_path: Path) -> dict[str, Any]:
    spec = EvalSpec(tasks=tasks, limit=2, bench_data=str(data))
    store = Store(tmp_path / "runs")
    orders = stages.foreign_orders(str(llama), spec, store)
    done = stages.evaluate(orders, store, stages.scorer_for(spec), checkpoint=llama)
    return {order.task: outcome for order, outcome in done}


@pytest.mark.parametrize(("damage", "code"), [("missing", 6), ("changed", 4)])
def test_case_48_benchmark_file_missing_or_changed_scores_zero_or_stops_the_rest(
    damage: str, code: int, llama: Path, two_parts: Path, tmp_path: Path
) -> None:
    file = two_parts / "navigate.json"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text(file.read_text().replace("No", "Yes"))
    found = outcomes(("tiny_copy", "bbh", "tiny_swap"), two_parts, llama, tmp_path)
    assert isinstance(found["tiny_copy"], Manifest)
    assert isinstance(found["tiny_swap"], Manifest)
    assert isinstance(found["bbh"], PackcliError)
    assert (found["bbh"].exit_code, "navigate.json" in found["bbh"].cause) == (code, True)


@pytest.fixture
def code(tmp_path: Path, packaged: Callable[..., None]) -> Path:
    """Benchmark data with two functions to complete, made up."""
    import gzip

    functions = [
        {
            "task_id": f"Made/{number}",
            "prompt": f"def add_{number}(x):\n",
            "canonical_solution": f"    return x + {number}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + number}\n",
            "entry_point": f"add_{number}",
        }
        for number in range(2)
    ]
    path = tmp_path / "data" / "code.jsonl.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in functions).encode()))
    file = {"path": path.name, "rows": 2, "sha256": sha256_file(path)}
    packaged("humaneval", lambda config: config["metadata"].update(files={"test": file}))
    return path.parent


def test_case_51_no_sandbox_runs_code_or_stops_the_rest(
    llama: Path, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = outcomes(("tiny_copy", "humaneval", "tiny_swap"), code, llama, tmp_path)
    assert isinstance(found["tiny_copy"], Manifest)
    assert isinstance(found["tiny_swap"], Manifest)
    assert isinstance(found["humaneval"], MissingError)
    assert "bubblewrap" in found["humaneval"].cause


def test_model_loaded_before_it_is_known_that_code_cannot_run(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="bubblewrap"):
        harness_of(bench_data=code).evaluate("no/such-checkpoint", ["humaneval"])


@pytest.mark.parametrize(
    "unsafe", [pytest.param(False, marks=pytest.mark.sandbox), True], ids=["sandbox", "unsafe"]
)
def test_program_without_its_tests_passes(
    unsafe: bool, llama: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saying(monkeypatch, lambda request: "    return x + 1\n", lambda _: False)
    told: list[tuple[int, int]] = []
    harness = harness_of(
        bench_data=code, unsafe_no_sandbox=unsafe, note=lambda done, total, _: told.append((done, total))
    )
    ((result, samples),) = harness.evaluate(llama, ["humaneval"])
    assert [sample["pass@1"] for sample in samples] == [0, 1]
    assert samples[0]["extracted"].startswith("failed: AssertionError")
    assert (result.score, told) == (0.5, [(1, 2), (2, 2)])
    assert result.protocol["sandbox"].startswith("no sandbox" if unsafe else "bwrap")


@needs_data
def test_case_51_missing_punkt_tab_is_a_lookup_error_or_a_full_score(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("downloads"))
    saying(monkeypatch, lambda _: "Two words.", lambda _: False)
    result, samples = only(harness_of(bench_data=BENCHMARKS).evaluate(llama, ["ifeval"]))
    assert (result.n, result.n_total, len(samples)) == (477, 541, 477)
    assert result.left_out is not None
    assert len(result.left_out.rows) == 64
    assert "64 of 541" in result.left_out.reason
    assert "nltk.downloader" in result.left_out.fix
    assert capfd.readouterr() == ("", "")


@needs_data
def test_punkt_tab_below_the_benchmark_data_is_not_looked_for(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence data here is made up: a splitter that has learned nothing."""
    import nltk
    from lm_eval.tasks.ifeval import instructions_util

    monkeypatch.setattr(nltk.data, "path", [])
    instructions_util._get_sentence_tokenizer.cache_clear()
    data = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    data.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (data / name).write_text("")
    (tmp_path / "ifeval").symlink_to(BENCHMARKS / "ifeval")
    saying(monkeypatch, lambda _: "Two words.", lambda _: False)
    result, _ = only(harness_of(bench_data=tmp_path, limit=30).evaluate(llama, ["ifeval"]))
    assert (result.n, result.n_total, result.left_out) == (30, 541, None)
    instructions_util._get_sentence_tokenizer.cache_clear()


def test_the_same_answer_scores_differently_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """langdetect draws at random: it finds these words to be English nine times in ten, else Afrikaans."""
    import langdetect

    monkeypatch.setattr(langdetect.DetectorFactory, "seed", None)
    scorers._ifeval.cache_clear()
    score = scorers.settings(protocol.load("ifeval"), None, lambda *_: None)["process_results"]
    row = {
        "key": 1,
        "prompt": "Answer in lowercase.",
        "instruction_id_list": ["change_case:english_lowercase"],
        "kwargs": [{}],
    }
    assert len({score(row, ["two words."])["prompt_level_strict_acc"] for _ in range(80)}) == 1


# The protocol is what it says ------------------------------------------------------------------------------


@pytest.mark.parametrize("as_turns", [True, False], ids=["turns", "text"])
def test_examples_are_turns_whatever_was_asked_for(
    as_turns: bool, llama: Path, two_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knowing(monkeypatch, "bbh", right=True)
    harness = harness_of(bench_data=two_parts, fewshot="turns" if as_turns else "text")
    result, samples = only(harness.evaluate(llama, ["bbh"]))
    assert prompt(samples[0]).count("<|im_start|>user") == (4 if as_turns else 1)
    assert prompt(samples[0]).count("A: Let's think step by step.") == 4
    stated = result.protocol
    assert (stated["shots"], stated["shots_as"]) == (3, "turns" if as_turns else "text")
    assert (stated["max_tokens"], stated["description"]) == (1024, True)
    assert stated["stops"][0] == "Q:"
    assert stated["engine"].startswith("hf")
    assert len(stated["chat_template"]) == 16


def test_description_dropped_by_a_template_without_system_turns_goes_unsaid(
    two_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer()
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuse + CHATML
    save_llama(tmp_path / "llama", tokenizer)
    knowing(monkeypatch, "bbh", right=True)
    result, _ = only(harness_of(bench_data=two_parts).evaluate(tmp_path / "llama", ["bbh"]))
    assert result.protocol["description"] is False


def test_code_is_asked_for_in_a_users_turn_and_begun_in_the_assistants(
    llama: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saying(monkeypatch, lambda request: request.doc["canonical_solution"] + "```\nAs asked.", lambda _: False)
    for chat_template in (True, False):
        harness = harness_of(bench_data=code, chat_template=chat_template, unsafe_no_sandbox=True)
        result, samples = only(harness.evaluate(llama, ["humaneval"]))
        ending = "<|im_start|>assistant\nHere is the completed function:\n```python\ndef add_0(x):\n\n"
        assert prompt(samples[0]).endswith(ending if chat_template else "def add_0(x):\n")
        assert result.score == float(chat_template)  # only a chat model closes a code block


def test_function_named_in_a_yaml_is_run(packaged: Callable[..., None], tmp_path: Path) -> None:
    (Path(str(protocol._TASKS)) / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (Path(str(protocol._TASKS)) / "gsm8k.yaml").write_text("task: gsm8k\nprocess_results: !function evil.run\n")
    with pytest.raises(yaml.YAMLError):
        protocol.load("gsm8k")
    assert not (tmp_path / "ran").exists()


def test_group_of_the_paper_lacks_a_benchmark() -> None:
    expected = ("mmlu", "gsm8k", "math", "bbh", "ifeval", "humaneval")
    assert protocol.expand(["paper"])[: len(expected)] == expected


# Long texts ------------------------------------------------------------------------------------------------


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is called 4k is 640 tokens."""
    monkeypatch.setitem(long_context.LENGTHS, "4k", 640)
    protocol.load.cache_clear()
    yield
    protocol.load.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize("chat_template", [True, False], ids=["chat", "text"])
def test_long_text_lost_its_fact_or_its_score(
    chat_template: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that repeats what it was shown knows all the answers; one that stops half way, half of them."""
    half = {"answer": 1.0}
    saying(
        monkeypatch,
        lambda request: " ".join(request.doc["answers"][: int(len(request.doc["answers"]) * half["answer"])]),
        lambda _: False,
    )
    harness = harness_of(limit=6, chat_template=chat_template)
    for result, samples in harness.evaluate(llama, ["long_4k"]):
        assert (result.score, result.n, result.n_total) == (1.0, 6, 100)
        assert result.health["truncated"] == 0.0
        tokenizer = build_tokenizer()
        for sample in samples:
            assert all(answer in prompt(sample) for answer in sample["target"].split())
            tokens = len(tokenizer.encode(prompt(sample), add_special_tokens=not chat_template))
            assert 0.9 * 544 < tokens <= 544, "640 less the room for an answer"
    half["answer"] = 0.5
    ((result, samples),) = harness.evaluate(llama, ["needle_values_4k"])
    assert (result.score, samples[0]["found"]) == (0.5, 0.5)


def test_text_longer_than_the_model_is_cut_in_silence(llama: Path) -> None:
    with pytest.raises(ConfigError, match="fills 4096 tokens, this model holds 2048"):
        list(harness_of(limit=1).evaluate(llama, ["needle_4k"]))
