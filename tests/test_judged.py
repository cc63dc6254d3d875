"""Judged tasks and probes as tasks: a score of the wrong answers, money spent twice, a 0 where nothing was judged.

The checkpoints have random weights; the judge is a server on this machine that rates by a rule of its own.
Questions and templates are made up, but for the tests that say otherwise.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Done, chat_records
from judge_server import Answer, Asked, JudgeServer, completion, failure
from test_eval import build_tokenizer, save_llama
from test_judge import wild

from packcli import stages, sweepfile
from packcli.config import EvalSpec, JudgeSpec
from packcli.errors import ConfigError, PackcliError
from packcli.eval import protocol
from packcli.eval.judge import mt_bench, templates, wildbench
from packcli.files import write_jsonl
from packcli.report import scores
from packcli.store import Manifest, Store

pytestmark = pytest.mark.slow

Start = Callable[[Callable[[Asked], Answer]], JudgeServer]
JUDGE = JudgeSpec(
    model="judge", max_answer_tokens=6, max_tokens=100, timeout_s=20, deadline_s=60, max_retries=0, attempts=1
)
SCORE = "<|history|>{$history}<|query|>{$user_query}<|checklist|>{$checklist}<|answer|>{$model_output}"
PAIR = "{$history}{$user_query}{$checklist}<|A|>{$candidate_A}<|B|>{$candidate_B}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random")
    save_llama(path, build_tokenizer())
    return path


def public(directory: Path, path: str, text: str) -> templates.PublicFile:
    (directory / path).parent.mkdir(parents=True, exist_ok=True)
    (directory / path).write_text(text)
    return templates.PublicFile(path, hashlib.sha256(text.encode()).hexdigest(), "https://example.org")


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both benchmarks below a directory: 1,024 questions of WildBench, three of MT-bench."""
    data = tmp_path / "data"
    monkeypatch.setattr(wildbench, "SCORE_TEMPLATE", public(data, "wildbench/score.md", SCORE))
    monkeypatch.setattr(wildbench, "PAIR_TEMPLATE", public(data, "wildbench/pair.md", PAIR))
    write_jsonl(data / wildbench.QUESTIONS, [wild(number) for number in range(1024)])
    questions = [
        {"question_id": number, "category": category, "turns": [f"First {number}", f"Second {number}"]}
        for number, category in enumerate(("writing", "math", "coding"))
    ]
    references = [{"question_id": number, "choices": [{"turns": ["ref 1", "ref 2"]}]} for number in range(3)]
    first, second = "{question}|{answer}", "{question_1}|{answer_1}|{question_2}|{answer_2}"
    prompts = [
        {"name": name, "system_prompt": "rate", "prompt_template": text}
        for name, text in (
            ("single-v1", first),
            ("single-math-v1", first + "|{ref_answer_1}"),
            ("single-v1-multi-turn", second),
            ("single-math-v1-multi-turn", second + "|{ref_answer_1}|{ref_answer_2}"),
        )
    ]
    for name, rows in (("QUESTIONS", questions), ("REFERENCES", references), ("PROMPTS", prompts)):
        path = getattr(mt_bench, name).path
        text = "".join(json.dumps(row) + "\n" for row in rows)
        monkeypatch.setattr(mt_bench, name, public(data, path, text))
    return data


def rating(asked: Asked) -> Answer:
    """What the made-up judge thinks: the same of the same text."""
    value = 1 + int(hashlib.sha256(asked.prompt.encode()).hexdigest(), 16) % 10
    if asked.body["messages"][0]["role"] == "system":
        return completion(f"Well. [[{value}]]")
    if "<|A|>" in asked.prompt:
        return completion(json.dumps({"choice": "A+"}))
    return completion(json.dumps({"strengths": "", "weaknesses": "", "score": str(value)}))


def evaluated(llama: Path, spec: EvalSpec, store: Store) -> dict[str, Manifest | PackcliError]:
    orders = stages.foreign_orders(str(llama), spec, store)
    done = stages.evaluate(orders, store, stages.scorer_for(spec), checkpoint=llama)
    return {order.task: outcome for order, outcome in done}


def results(outcome: Manifest | PackcliError) -> dict[str, Any]:
    assert isinstance(outcome, Manifest), outcome
    return outcome.results


def spec_of(data: Path, *tasks: str, judge: JudgeSpec | None = JUDGE, **more: Any) -> EvalSpec:
    return EvalSpec(**{"tasks": tasks, "bench_data": str(data), "limit": 5, "judge": judge, **more})


def test_a_judged_score_is_that_of_this_checkpoints_answers(
    llama: Path,
    made_up: Path,
    tmp_path: Path,
    start: Start,
) -> None:
    server, store = start(rating), Store(tmp_path / "runs")
    spec = spec_of(made_up, "wildbench", "mt_bench")
    found = evaluated(llama, spec, store)
    wild_, mt = results(found["wildbench"]), results(found["mt_bench"])
    assert (wild_["n"], wild_["n_total"], mt["n"], mt["n_total"]) == (5, 1024, 3, 3)
    order = next(order for order in stages.foreign_orders(str(llama), spec, store) if order.task == "wildbench")
    samples = [orjson.loads(line) for line in store.samples(order.id).read_bytes().splitlines()]
    asked = [one for one in server.asked if "<|answer|>" in one.prompt]
    answers = [one.prompt.partition("<|answer|>")[2] for one in asked]
    assert sorted(answers) == sorted(sample["conversation"][-1]["content"] for sample in samples)
    given = [int(json.loads(rating(one).body)["choices"][0]["message"]["content"].split('"')[-2]) for one in asked]
    assert math.isclose(wild_["score"], sum((value - 5) * 2 for value in given) / len(given) / 10)
    assert wild_["health"]["cut"] == 1.0  # random weights never end by themselves
    assert wild_["health"]["mean_tokens"] == 6
    for key, value in (("judge", "judge"), ("judge_host", "127.0.0.1"), ("max_tokens", 6)):
        assert wild_["protocol"][key] == value
    assert wild_["protocol"]["judge_says_it_is"] == ["judge-2026-01-01"]
    items = json.loads(store.items(order.id).read_text())
    assert items == [(sample["verdicts"][0]["value"] - 5) * 2 / 10 for sample in samples]
    assert math.isclose(wild_["score"], sum(items) / 5)


def test_the_second_turn_of_mt_bench_sees_the_first_answer(
    llama: Path,
    made_up: Path,
    tmp_path: Path,
    start: Start,
) -> None:
    server = start(rating)
    spec = spec_of(made_up, "mt_bench")
    store = Store(tmp_path / "runs")
    evaluated(llama, spec, store)
    [order] = stages.foreign_orders(str(llama), spec, store)
    for line in store.samples(order.id).read_bytes().splitlines():
        sample = orjson.loads(line)
        roles = [message["role"] for message in sample["conversation"]]
        assert roles == ["user", "assistant", "user", "assistant"]
        _, first, _, second = (message["content"] for message in sample["conversation"])
        number = sample["question"]
        start_of = f"First {number}|{first}|Second"
        prompt = next(one.prompt for one in server.asked if one.prompt.startswith(start_of))
        assert f"Second {number}|{second}" in prompt


def test_answers_and_verdicts_are_not_asked_for_twice(
    llama: Path,
    made_up: Path,
    tmp_path: Path,
    start: Start,
) -> None:
    server, store = start(rating), Store(tmp_path / "runs")
    first = results(evaluated(llama, spec_of(made_up, "wildbench"), store)["wildbench"])
    number = len(server.asked)
    again = results(evaluated(llama, spec_of(made_up, "wildbench"), store)["wildbench"])
    assert again == first
    more = results(evaluated(llama, spec_of(made_up, "wildbench", limit=7), store)["wildbench"])
    assert more["n"] == 7
    assert number == 5
    assert len(server.asked) == 7


def test_case_50_another_checkpoint_is_judged_by_its_own_answers(
    llama: Path,
    made_up: Path,
    tmp_path: Path,
    start: Start,
) -> None:
    server, store = start(rating), Store(tmp_path / "runs")
    other = tmp_path / "other"
    save_llama(other, build_tokenizer(), seed=1)
    for checkpoint in (llama, other):
        evaluated(checkpoint, spec_of(made_up, "wildbench"), store)
    answers = {one.prompt.partition("<|answer|>")[2] for one in server.asked}
    assert len(server.asked) == 10
    assert len(answers) > 5


def test_case_51_without_a_judge_the_task_is_not_run_and_the_others_are(
    llama: Path, made_up: Path, tmp_path: Path
) -> None:
    found = evaluated(llama, spec_of(made_up, "wildbench", "tiny_copy", judge=None), Store(tmp_path / "runs"))
    missing = found["wildbench"]
    assert isinstance(missing, PackcliError)
    assert missing.exit_code == 6
    assert "--judge" in missing.fix
    assert results(found["tiny_copy"])["n"] == 5


def test_case_52_a_judge_that_fails_gives_no_score_and_the_next_run_asks_for_the_rest(
    llama: Path,
    made_up: Path,
    tmp_path: Path,
    start: Start,
) -> None:
    broken = [True]

    def reply(asked: Asked) -> Answer:
        return failure(500) if broken[0] and "Query 3" in asked.prompt else rating(asked)

    server, store = start(reply), Store(tmp_path / "runs")
    failed = evaluated(llama, spec_of(made_up, "wildbench"), store)["wildbench"]
    assert isinstance(failed, PackcliError)
    assert failed.exit_code == 7
    assert "1 of 5 judgments failed" in str(failed)
    broken[0] = False
    before = len(server.asked)
    assert results(evaluated(llama, spec_of(made_up, "wildbench"), store)["wildbench"])["n"] == 5
    assert len(server.asked) == before + 1


def test_case_52_a_budget_that_is_used_up_keeps_what_is_judged(
    llama: Path,
    made_up: Path,
    tmp_path: Path,
    start: Start,
) -> None:
    server, store = start(rating), Store(tmp_path / "runs")
    prices = tmp_path / "prices.yaml"
    prices.write_text("judge: {input: 1000, output: 1000}\n")  # 1.1 USD a verdict

    def judge(budget: float) -> JudgeSpec:
        return JUDGE.model_copy(update={"prices": str(prices), "max_cost_usd": budget, "workers": 1})

    stopped = evaluated(llama, spec_of(made_up, "wildbench", judge=judge(2.5)), store)["wildbench"]
    assert isinstance(stopped, PackcliError)
    assert "missing (budget 3)" in str(stopped)
    assert len(server.asked) == 2
    done = results(evaluated(llama, spec_of(made_up, "wildbench", judge=judge(9)), store)["wildbench"])
    assert len(server.asked) == 5
    assert math.isclose(done["judged"]["score"]["cost_usd"], 5.5)
    assert any("5.5000 USD" in line for line in scores.notes([done]))


def test_a_reward_is_measured_against_the_answers_that_were_given(
    llama: Path,
    made_up: Path,
    tmp_path: Path,
    start: Start,
) -> None:
    server = start(rating)
    others = tmp_path / "others.json"
    others.write_text(json.dumps([{"session_id": f"s{n}", "output": [f"theirs {n}"]} for n in range(1024)]))
    judge = JUDGE.model_copy(update={"against": str(others)})
    store = Store(tmp_path / "runs")
    found = results(evaluated(llama, spec_of(made_up, "wildbench", judge=judge), store)["wildbench"])
    pairs = [one.prompt for one in server.asked if "<|A|>" in one.prompt]
    assert len(pairs) == 10
    assert all("theirs" in prompt for prompt in pairs)
    # This judge always likes the answer shown first: no reward, and it is found out.
    assert found["judged"]["reward"]["score"] == 0.0
    assert found["judged"]["reward"]["others"]["favours_first"] == 0.5
    assert found["health"]["wb_reward"] == 0.0
    alone = results(evaluated(llama, spec_of(made_up, "wildbench"), store)["wildbench"])
    assert alone["score"] == found["score"]


def test_two_judges_protocols_or_answers_to_compare_with_share_no_id(made_up: Path, tmp_path: Path) -> None:
    others = tmp_path / "others.json"
    others.write_text("[]")
    changes: list[dict[str, Any]] = [
        {},
        {"model": "other"},
        {"max_answer_tokens": 7},
        {"max_tokens": 101},
        {"temperature": None},
        {"base_url": "http://elsewhere:1/v1"},
        {"against": str(others)},
    ]
    store = Store(tmp_path / "runs")

    def ids(judge: JudgeSpec, **more: Any) -> list[str]:
        spec = spec_of(made_up, *protocol.JUDGED, judge=judge, **more)
        return [order.id for order in stages.foreign_orders("a/b", spec, store)]

    found = [id_ for keys in changes for id_ in ids(JUDGE.model_copy(update=keys))]
    found += ids(JUDGE, limit=6) + ids(JUDGE, chat_template=False)
    assert len(set(found)) == len(found)
    same = JUDGE.model_copy(update={"workers": 3, "max_cost_usd": 1.0, "prices": "p", "timeout_s": 9})
    assert ids(same) == ids(JUDGE)
    rows = (made_up / wildbench.QUESTIONS).read_text()
    before = ids(JUDGE)
    (made_up / wildbench.QUESTIONS).write_text(rows.replace("Query 3", "Query three"))
    assert ids(JUDGE)[0] != before[0]


def test_an_average_is_over_benchmarks_and_never_over_a_judge_or_probes() -> None:
    assert protocol.averaged(("mmlu", "wildbench", "gsm8k", "probes")) == ("mmlu", "gsm8k")
    assert protocol.averaged(("wildbench", "probes")) == ("wildbench",)
    assert protocol.averaged(("probes",)) == ()


def test_the_papers_set_is_its_seven_benchmarks() -> None:
    assert protocol.expand(["paper"]) == ("mmlu", "gsm8k", "math", "bbh", "ifeval", "humaneval", "wildbench")


@pytest.mark.parametrize(
    ("text", "said"),
    [("model: j\ntemprature: 0\n", "judge.yaml:2"), ("temperature: 0\n", "`model`"), ("[1]\n", "judge.yaml")],
)
def test_a_judges_file_that_is_none_is_refused_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    from packcli.eval.judge import spec

    path = tmp_path / "judge.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        spec.named(str(path), {})
    assert said in str(caught.value)


def test_what_is_said_of_a_judge_wins_over_its_file(tmp_path: Path) -> None:
    from packcli.eval.judge import spec

    path = tmp_path / "judge.yaml"
    path.write_text("model: j\ntemperature: null\nmax_cost_usd: 3\n")
    found = spec.named(str(path), {"max_cost_usd": 1.0, "prices": None})
    assert found == JudgeSpec(model="j", temperature=None, max_cost_usd=1.0)
    with pytest.raises(ConfigError, match="no judge"):
        spec.named(None, {"max_cost_usd": 1.0})


SECRETS = ("https://me:s3cret@judge.example/v1", "https://judge.example/v1?token=s3cret")


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize("option", ["--judge-url", "--base-url"])
def test_a_password_in_an_address_is_refused_and_neither_shown_nor_written(
    option: str, url: str, tmp_path: Path, run_cli: Callable[..., Done]
) -> None:
    judge = ("--judge", "j") if option == "--judge-url" else ("--engine", "openai")
    done = run_cli("eval", "--ckpt", "a/b", "--tasks", "mt_bench", *judge, option, url, cwd=tmp_path)
    assert done.code == 2, done.stderr
    assert "OPENAI_BASE_URL" in done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize("keys", ["{judge: {model: j, base_url: URL}}", "{engine: openai, base_url: URL}"])
def test_a_password_in_a_sweeps_address_is_refused_by_its_line(
    keys: str, url: str, tiny_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    sweep = tiny_sweep()
    sweep.write_text(f"{sweep.read_text()}eval: {keys.replace('URL', repr(url))}\n")
    with pytest.raises(ConfigError) as caught:
        sweepfile.load(sweep, (), ())
    assert "sweep.yaml:" in str(caught.value)
    assert "s3cret" not in f"{caught.value} {caught.value.fix}"


# As a user types it --------------------------------------------------------------------------------------------


def test_the_command_asks_the_judge_and_prints_rule_judge_and_cost(
    llama: Path,
    shared_data: Path,
    tmp_path: Path,
    start: Start,
    run_cli: Callable[..., Done],
) -> None:
    start(rating)
    (tmp_path / "judge.yaml").write_text("model: judge\nmax_answer_tokens: 4\n")
    command = ("eval", "--ckpt", llama, "--tasks", "mt_bench,wildbench", "--judge", "judge.yaml", "--limit", 3)
    done = run_cli(*command, "--bench-data", shared_data / "benchmarks", cwd=tmp_path)
    # The real questions of MT-bench; WildBench's are on the hub only.
    assert done.code == 6, done.stderr
    assert "wildbench: WildBench needs the file" in done.stderr
    assert "mt_bench score: " in done.stdout
    assert "judge judge at 127.0.0.1 (called itself: judge-2026-01-01), cost unknown" in done.stdout
    assert "mean of the ratings 1 to 10 over both turns" in " ".join(done.stdout.split())
    assert "3 (partial)" in done.stdout


def test_the_command_probes_a_checkpoint_and_draws_what_it_finds(
    llama: Path, tmp_path: Path, run_cli: Callable[..., Done]
) -> None:
    command = ("eval", "--ckpt", llama, "--tasks", "probes", "--before", llama)
    done = run_cli(*command, "--figures", "pictures", cwd=tmp_path)
    assert done.code == 0, done.stderr
    seen = ("with a document mask", "without a mask")
    lines = [line.split() for line in done.stdout.splitlines() if any(words in line for words in seen)]
    assert {line[0] for line in lines} == {"random", "greedy", "best_fit"}
    masked = next(line for line in lines if line[0] == "best_fit")
    assert masked[-3:] == ["0", "0,", "0"] or masked[-2:] == ["0", "0"]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        f"{name}.{ending}" for name in ("crossing", "causal_effect", "boundary") for ending in ("svg", "png")
    }
    again = run_cli(*command, "--json", cwd=tmp_path)
    assert again.code == 0, again.stderr
    [found] = again.json()["results"]
    masked = found["probes"]["crossing"]["best_fit"]["layers"]
    assert [layer["share"] for layer in masked] == [0.0] * len(masked)
    assert all(layer["share"] > 0 for layer in found["probes"]["crossing"]["random"]["layers"])
    assert found["probes"]["source"] == "packcli's toy corpus (synthetic), held-out items"
    changes = [one["difference"]["mean"] for one in found["probes"]["before"]["change"]]
    assert changes == [0.0] * len(changes)  # before and after are the same model here


def test_a_sweep_probes_what_it_trained_on_against_what_it_started_from(
    tiny_sweep: Callable[..., Path], tmp_path: Path, run_cli: Callable[..., Done]
) -> None:
    sweep = tiny_sweep(
        arms=["random", "best_fit"],
        train={"steps": 3},
        records=chat_records(60),
        eval={"tasks": ["probes"], "probes": {"count": 16, "arms": ["random", "best_fit"]}},
    )
    done = run_cli("sweep", sweep, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    report = done.json()
    for row in report["rows"]:
        assert row["state"] == "done"
        assert row["average"] is None
        assert row["eval"] == {}
        assert row["probes"]["crossing"]["best_fit"] == 0
        assert row["probes"]["crossing"]["random"] > 0
        stored = json.loads((tmp_path / f"runs/store/eval/{row['ids']['eval probes']}/results.json").read_text())
        assert stored["packcli"]["probes"]["source"] == "chats.jsonl"
        assert str(tmp_path) not in json.dumps(stored)
    shown = run_cli("report", sweep, "--format", "md", "--figures", "pictures", cwd=tmp_path)
    assert shown.code == 0, shown.stderr
    assert r"attention across, rows of best\_fit, %" in shown.stdout
    assert len(list((tmp_path / "pictures").glob("probes-*/crossing.svg"))) == 2
