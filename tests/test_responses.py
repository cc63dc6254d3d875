"""Answers on disk: what a killed run would lose, ask twice, or hand to the wrong checkpoint."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from lm_eval.api.instance import Instance
from test_eval import build_tokenizer, save_llama

from packcli.errors import IntegrityError
from packcli.eval.engines import engine
from packcli.eval.engines.responses import Answer, Recorded

SETTINGS = {"until": ["\n"], "do_sample": False, "max_gen_toks": 8}


class Model:
    """Says each prompt backwards, two at a time and the last one first; dies after `lives` batches."""

    def __init__(self, lives: int = 1000) -> None:
        self.asked: list[Any] = []
        self.truncated: set[tuple[str, str]] = set()
        self.max_length = 77
        self._lives = lives

    def answers(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[list[tuple[int, Answer]]]:
        numbers = list(range(len(requests)))[::-1]
        for start in range(0, len(numbers), 2):
            if self._lives == 0:
                raise KeyboardInterrupt
            self._lives -= 1
            batch = numbers[start : start + 2]
            self.asked += [requests[number] for number in batch]
            yield [(n, Answer(requests[n][0][::-1], n + 1, "length" if n % 4 == 0 else "stop")) for n in batch]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        if self._lives == 0:
            raise KeyboardInterrupt
        self._lives -= 1
        self.asked += [request.args for request in requests]
        self.truncated |= {request.args for request in requests if len(request.args[0]) > 5}
        return [(-len(request.args[0]) / 3, request.args[1] == "a") for request in requests]


def asks(*prompts: str) -> list[Instance]:
    return [Instance("generate_until", {}, (prompt, SETTINGS), 0) for prompt in prompts]


def compares(*pairs: tuple[str, str]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


def test_killed_run_asks_again_for_what_it_had(tmp_path: Path) -> None:
    prompts = asks("one", "two", "three", "four", "five")
    first = Recorded(Model(lives=2), tmp_path / "r.jsonl", "id")
    with pytest.raises(KeyboardInterrupt):
        first.generate_until(prompts)
    model = Model()
    second = Recorded(model, tmp_path / "r.jsonl", "id")
    assert second.generate_until(prompts) == ["eno", "owt", "eerht", "ruof", "evif"]
    assert [prompt for prompt, _ in model.asked] == ["one"]
    assert second.num_asked == 1
    third = Recorded(Model(lives=0), tmp_path / "r.jsonl", "id")
    assert third.generate_until(prompts) == ["eno", "owt", "eerht", "ruof", "evif"]


def test_facts_of_a_resumed_run_count_the_new_answers_only(tmp_path: Path) -> None:
    prompts = asks("one", "two", "three", "four", "five")
    whole = Recorded(Model(), tmp_path / "whole.jsonl", "id")
    whole.generate_until(prompts)
    assert whole.facts() == {"cut": 2 / 5, "mean_tokens": 3.0}
    with pytest.raises(KeyboardInterrupt):
        Recorded(Model(lives=1), tmp_path / "r.jsonl", "id").generate_until(prompts)
    again = Recorded(Model(), tmp_path / "r.jsonl", "id")
    again.generate_until(prompts)
    assert set(again.facts()) == {"cut", "mean_tokens"}
    rest = Recorded(Model(lives=0), tmp_path / "r.jsonl", "id")
    rest.generate_until(prompts)
    assert rest.facts() == again.facts()


@pytest.mark.parametrize("cut", range(1, 12))
def test_torn_last_line_read_as_an_answer(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Recorded(Model(), path, "id").generate_until(asks("one", "two"))
    path.write_bytes(path.read_bytes()[:-cut])
    model = Model()
    assert Recorded(model, path, "id").generate_until(asks("one", "two")) == ["eno", "owt"]
    assert [prompt for prompt, _ in model.asked] == ["one"]
    assert all(orjson.loads(line) for line in path.read_bytes().splitlines())


def test_killed_before_the_first_line_was_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"eval": "i')
    assert Recorded(Model(), path, "id").generate_until(asks("one")) == ["eno"]
    assert Recorded(Model(lives=0), path, "id").generate_until(asks("one")) == ["eno"]


def test_answers_of_another_evaluation_taken_for_its_own(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Recorded(Model(), path, "one").generate_until(asks("x"))
    with pytest.raises(IntegrityError, match=r"answers of one, not of two"):
        Recorded(Model(), path, "two")


def test_damaged_line_skipped_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Recorded(Model(), path, "id").generate_until(asks("one", "two"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][3:] + lines[2])
    with pytest.raises(IntegrityError, match=r"r\.jsonl:2"):
        Recorded(Model(), path, "id")


def test_same_question_twice_gets_one_answer(tmp_path: Path) -> None:
    """lm-eval asks a request that is repeated by handing it over several times."""
    model = Model()
    recorded = Recorded(model, tmp_path / "r.jsonl", "id")
    assert recorded.generate_until(asks("one", "one", "one")) == ["eno"] * 3
    assert len(model.asked) == 3


def test_other_settings_or_kind_meet_the_same_answer(tmp_path: Path) -> None:
    model = Model()
    recorded = Recorded(model, tmp_path / "r.jsonl", "id")
    recorded.generate_until(asks("one"))
    recorded.generate_until([Instance("generate_until", {}, ("one", SETTINGS | {"max_gen_toks": 9}), 0)])
    recorded.loglikelihood(compares(("one", "a")))
    assert len(model.asked) == 3


def test_log_likelihoods_or_truncation_lost_on_the_way_through_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packcli.eval.engines.responses._COMPARED_AT_ONCE", 2)
    pairs = compares(("short", "a"), ("long prompt", "b"), ("long prompt", "a"), ("", "a"), ("mid", "b"))
    expected = Model().loglikelihood(pairs)
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Recorded(Model(lives=1), path, "id").loglikelihood(pairs)
    model = Model()
    second = Recorded(model, path, "id")
    assert second.loglikelihood(pairs) == expected
    assert len(model.asked) == 3
    assert second.facts() == {}
    third = Recorded(Model(lives=0), path, "id")
    assert third.loglikelihood(pairs) == expected
    assert third.truncated == second.truncated == {("long prompt", "a"), ("long prompt", "b")}


def test_infinite_log_likelihood_becomes_nothing(tmp_path: Path) -> None:
    model = Model()
    model.loglikelihood = lambda requests: [(-math.inf, False), (math.nan, False)]  # type: ignore[method-assign]
    pairs = compares(("x", "a"), ("x", "b"))
    Recorded(model, tmp_path / "r.jsonl", "id").loglikelihood(pairs)
    (low, _), (none, _) = Recorded(Model(lives=0), tmp_path / "r.jsonl", "id").loglikelihood(pairs)
    assert low == -math.inf
    assert math.isnan(none)


def test_what_is_not_recorded_is_the_models_own(tmp_path: Path) -> None:
    assert Recorded(Model(), tmp_path / "r.jsonl", "id").max_length == 77


SCORE = """
import sys, time
from pathlib import Path
import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from packcli.eval import protocol
from packcli.eval.engines import engine
from packcli.eval.engines.responses import Recorded
from packcli.files import write_json

torch.set_num_threads(1)
checkpoint, out, pause_s = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
lm = engine.load(checkpoint, chat_template=True, batch_size=4, device="cpu")
answers = lm.answers

def slowly(requests):
    for batch in answers(requests):
        yield batch
        time.sleep(pause_s)

lm.answers = slowly
config = protocol.load("gsm8k").model_copy(deep=True).config
for key in ("dataset_path", "dataset_name", "dataset_kwargs"):
    config.pop(key, None)
config["generation_kwargs"]["max_gen_toks"] = 12
rows = [{"question": "How many? " + "pear " * n, "answer": f"#### {n}"} for n in range(24)]
config["custom_dataset"] = lambda **_: {split: Dataset.from_list(rows) for split in ("train", "test")}
task = ConfigurableTask(config=config)
recorded = Recorded(lm, out / "responses.jsonl", "eval-id")
scores = evaluate(recorded, {"tasks": {"gsm8k": task}, "groups": {}}, bootstrap_iters=1, apply_chat_template=True)
said = [sample["resps"][0][0] for sample in scores["samples"]["gsm8k"]]
write_json(out / "results.json", {"scores": scores["results"], "answers": said, "facts": recorded.facts()})
print(recorded.num_asked)
"""


def score(checkpoint: Path, out: Path, pause_s: float) -> subprocess.Popen[str]:
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", SCORE, str(checkpoint), str(out), str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_sigkill_in_the_middle_changes_the_result_or_asks_everything_again(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    save_llama(checkpoint, build_tokenizer())
    whole = score(checkpoint, tmp_path / "whole", 0)
    said, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    assert int(said.splitlines()[-1]) == 24

    killed = score(checkpoint, tmp_path / "killed", 0.5)
    deadline = time.monotonic() + 300
    while num_lines(tmp_path / "killed" / "responses.jsonl") < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    kept = num_lines(tmp_path / "killed" / "responses.jsonl") - 1
    assert 5 <= kept < 24
    assert not (tmp_path / "killed" / "results.json").exists()

    again = score(checkpoint, tmp_path / "killed", 0)
    said, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert int(said.splitlines()[-1]) == 24 - kept
    results = [(tmp_path / name / "results.json").read_bytes() for name in ("whole", "killed")]
    assert results[0] == results[1]


def test_second_checkpoint_gets_the_answers_of_the_first(tmp_path: Path) -> None:
    said = []
    prompts = [Instance("generate_until", {}, (f"Count {n}:", SETTINGS), 0) for n in range(4)]
    for seed in (0, 1):
        checkpoint = tmp_path / f"checkpoint {seed}"
        save_llama(checkpoint, build_tokenizer(), seed)
        lm = engine.load(checkpoint, chat_template=False, batch_size=2, device="cpu")
        alone = lm.generate_until(prompts)
        recorded = Recorded(lm, tmp_path / "responses.jsonl", f"eval {seed}") if seed == 0 else None
        if recorded is None:  # the same file, by mistake
            with pytest.raises(IntegrityError, match="eval 0"):
                Recorded(lm, tmp_path / "responses.jsonl", f"eval {seed}")
            recorded = Recorded(lm, tmp_path / "other.jsonl", f"eval {seed}")
        said.append(recorded.generate_until(prompts))
        assert said[-1] == alone
        assert recorded.num_asked == len(prompts)
    assert said[0] != said[1]
