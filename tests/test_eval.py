"""Evaluation: what a score would hide if it went wrong."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import harness_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from packcli.data import corpus
from packcli.errors import ConfigError, IntegrityError, MissingError
from packcli.eval import prompts, protocol
from packcli.eval.checkpoint import read
from packcli.eval.engines import engine
from packcli.eval.harness import Harness, TaskResult
from packcli.files import sha256_file, write_jsonl

BENCHMARKS = Path(__file__).resolve().parents[2] / "shared" / "data" / "benchmarks"
NUM_ROWS = 6
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLOSED_BY_EOS = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the corpus's own words, ChatML."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    items = [item for task in corpus.TASKS for item in corpus.items(task, "tuning")]
    texts = [message["content"] for item in items for message in item["messages"]]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_llama(path: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random")
    save_llama(path, build_tokenizer())
    return path


@pytest.fixture(scope="module")
def trained_llama(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knows the first four `tiny_copy` items by heart, from a loss on the answers only, as fine-tuning has it."""
    path = tmp_path_factory.mktemp("trained")
    tokenizer = AutoTokenizer.from_pretrained(random_llama)
    model = AutoModelForCausalLM.from_pretrained(random_llama)
    documents = prompts.documents(protocol.load("tiny_copy"), tokenizer, chat_template=True)[:4]
    batch = tokenizer(
        [document["prompt"] + document["target"] for document in documents],
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, document in zip(labels, documents, strict=True):
        row[: len(tokenizer(document["prompt"])["input_ids"])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def gsm8k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A benchmark directory with six made-up rows a split, and a task that asks for exactly those files."""

    def row(split: str, number: int) -> dict[str, str]:
        total = 3 * (number + 2)
        steps = (
            f"3 boxes with {number + 2} pears each hold 3*{number + 2}=<<3*{number + 2}={total}>>{total} pears."
        )
        question = (
            f"In {split} week {number} Ola fills 3 boxes with {number + 2} pears each. How many pears is that?"
        )
        return {
            "question": question,
            "answer": f"{steps}\n#### {total},000" if number == 5 else f"{steps}\n#### {total}",
        }

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    config = yaml.safe_load((protocol._TASKS / "gsm8k.yaml").read_text(encoding="utf-8"))
    config["generation_kwargs"]["max_gen_toks"] = 16
    for split, file in config["metadata"]["files"].items():
        path = tmp_path / file["path"]
        write_jsonl(path, [row(split, number) for number in range(NUM_ROWS)])
        file |= {"rows": NUM_ROWS, "sha256": sha256_file(path)}
    (tasks / "gsm8k.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.setattr(protocol, "_TASKS", tasks)
    protocol.load.cache_clear()
    yield tmp_path
    protocol.load.cache_clear()


def harness_that_says(
    monkeypatch: pytest.MonkeyPatch, generated: Callable[[Any], str], right: bool, **settings: Any
) -> Harness:
    """A harness whose model writes what `generated` gives for a request, and likes every target or none."""
    load = engine.load

    def patched(checkpoint: Path | str, **settings: Any) -> Any:
        lm = load(checkpoint, **settings)
        lm.generate_until = lambda requests: [generated(request) for request in requests]
        lm.loglikelihood = lambda requests: [(-1.0, right) for _ in requests]
        return lm

    monkeypatch.setattr(engine, "load", patched)
    return harness_of(**settings)


def only(results: Iterator[tuple[TaskResult, list[dict[str, Any]]]]) -> tuple[TaskResult, list[dict[str, Any]]]:
    (result,) = results
    return result


def prompt(sample: dict[str, Any]) -> str:
    return str(sample["arguments"]["gen_args_0"]["arg_0"])


def test_scorer_that_fails_a_right_answer(
    random_llama: Path, gsm8k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = harness_that_says(monkeypatch, lambda request: request.doc["answer"], True, bench_data=gsm8k)
    result, samples = only(harness.evaluate(random_llama, ["gsm8k"]))
    assert (result.score, result.metric, result.n, result.n_total) == (1.0, "exact_match", NUM_ROWS, NUM_ROWS)
    assert result.health == {"truncated": 0.0, "empty": 0.0, "no_answer": 0.0, "flexible-extract": 1.0}
    assert all(sample["exact_match"] == 1 and sample["resps"] == [[sample["target"]]] for sample in samples)
    assert [sample["filter"] for sample in samples] == NUM_ROWS * ["strict-match"] + NUM_ROWS * [
        "flexible-extract"
    ]


def test_scorer_that_passes_a_wrong_answer(
    random_llama: Path, gsm8k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = harness_that_says(monkeypatch, lambda _: "about 7\n#### 7", False, bench_data=gsm8k)
    result, samples = only(harness.evaluate(random_llama, ["gsm8k"]))
    assert (result.score, result.health["flexible-extract"]) == (0.0, 0.0)
    assert (samples[0]["extracted"], samples[0]["exact_match"]) == ("7", 0)


def test_silent_model_that_looks_merely_wrong(
    random_llama: Path, gsm8k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = harness_that_says(monkeypatch, lambda _: "", False, bench_data=gsm8k)
    result, _ = only(harness.evaluate(random_llama, ["gsm8k"]))
    assert (result.health["empty"], result.health["no_answer"]) == (1.0, 1.0)


def test_random_model_breaks_generation(
    random_llama: Path, gsm8k: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result, samples = only(harness_of(bench_data=gsm8k).evaluate(random_llama, ["gsm8k"]))
    assert result.score == 0.0
    assert len(samples) == 2 * NUM_ROWS
    assert capfd.readouterr() == ("", "")  # lm-eval's bars and warnings in the user's terminal


def test_shots_drawn_at_random_or_flattened_into_one_turn(
    random_llama: Path, gsm8k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = harness_that_says(monkeypatch, lambda _: "", False, bench_data=gsm8k, limit=2)
    _, samples = only(harness.evaluate(random_llama, ["gsm8k"]))
    turns = prompt(samples[1]).split("<|im_start|>user\n")[1:]
    assert [turn.split(" Ola")[0] for turn in turns] == [
        *(f"Question: In train week {shot}" for shot in range(4)),
        "Question: In test week 1",
    ]
    assert all("<|im_start|>assistant\n3 boxes" in turn for turn in turns[:4])
    assert turns[4].endswith("\nAnswer:<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("right", [True, False])
def test_embedded_score_inverted(random_llama: Path, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = harness_that_says(monkeypatch, lambda _: "", right)
    result, samples = only(harness.evaluate(random_llama, ["tiny_swap"]))
    assert (result.score, result.n, result.stderr) == (float(right), corpus.ITEMS_PER_SPLIT, 0.0)
    assert {sample["acc"] for sample in samples} == {right}


def test_checkpoints_share_answers_or_white_space_of_the_prompt_counts_as_answer(
    random_llama: Path, trained_llama: Path
) -> None:
    """Trained on answers only, so the newline after `assistant` is nothing it ever learned to write."""
    harness = harness_of(limit=4)
    scores = []
    for checkpoint in (trained_llama, random_llama, trained_llama):
        result, samples = only(harness.evaluate(checkpoint, ["tiny_copy"]))
        scores.append(result.score)
        assert (result.n, result.n_total) == (4, corpus.ITEMS_PER_SPLIT)
    assert scores == [1.0, 0.0, 1.0]
    model, tokenizer = read(trained_llama, chat_template=True)
    for sample in samples:  # one greedy pass over the answer says the same as writing it
        tokens = tokenizer(prompt(sample), return_tensors="pt", add_special_tokens=False)
        written = model.generate(**tokens, max_new_tokens=32)[0, tokens["input_ids"].shape[1] :]
        assert tokenizer.decode(written) == sample["target"]


def test_answer_that_does_not_stop_counts_as_right(random_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_llama)
    for document in prompts.documents(protocol.load("tiny_copy"), tokenizer, chat_template=True):
        assert document["target"].startswith("= ")
        assert document["target"].endswith("<|im_end|>")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (CLOSED_BY_EOS, " <|im_end|>"),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "\n"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "<|im_end|>"),
    ],
    ids=["chatml", "space_before_eos", "plain_text", "nothing"],
)
def test_end_of_turn_of_another_template(template: str, end: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    assert prompts.end_of_turn(tokenizer) == end


def test_history_of_a_multi_turn_item_is_not_real_turns(random_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_llama)
    items = corpus.items("tiny_turns", "test")
    documents = prompts.documents(protocol.load("tiny_turns"), tokenizer, chat_template=True)
    for item, document in zip(items, documents, strict=True):
        assert len(item["messages"]) % 2 == 1
        assert document["prompt"].count("<|im_start|>") == len(item["messages"]) + 1
        assert all(message["content"] + "<|im_end|>" in document["prompt"] for message in item["messages"])


@pytest.mark.parametrize(
    ("chat_template", "written", "expected"),
    [(True, "{{ bos_token }}", 1), (True, "", 0), (False, "", 1)],
    ids=["template_writes_it", "template_leaves_it_out", "plain_text"],
)
def test_begin_of_sequence_token_twice_or_missing(
    chat_template: bool, written: str, expected: int, tmp_path: Path
) -> None:
    """A template decides alone, as in training; without one the tokenizer's own habit counts."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = written + CHATML
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    save_llama(tmp_path, tokenizer)
    lm = engine.load(tmp_path, chat_template=chat_template, batch_size=1, device=None)
    item = prompts.documents(protocol.load("tiny_copy"), lm.tokenizer, chat_template=chat_template)[0]
    start, end = lm._encode_pair(item["prompt"], item["target"])
    assert start.count(tokenizer.bos_token_id) == start[:1].count(tokenizer.bos_token_id) == expected
    assert tokenizer.decode(end) == item["target"]
    batched, _ = lm.tok_batch_encode([item["prompt"]])
    assert batched[0].tolist() == start


def test_template_of_the_first_checkpoint_used_for_the_next(random_llama: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHATML.replace("assistant\\n", "model\\n").replace("assistant\n", "model\n")
    save_llama(tmp_path, tokenizer)
    harness = harness_of(limit=1)
    ends = []
    for checkpoint in (random_llama, tmp_path, random_llama):
        _, samples = only(harness.evaluate(checkpoint, ["tiny_copy"]))
        ends.append(prompt(samples[0]).rsplit("<|im_start|>", 1)[1])
    assert ends == ["assistant\n", "model\n", "assistant\n"]


def test_prompt_cut_to_fit_goes_unnoticed(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = save_llama(tmp_path, tokenizer)
    model.config.max_position_embeddings = 40
    model.config.save_pretrained(tmp_path)
    result, _ = only(harness_of().evaluate(tmp_path, ["tiny_lookup"]))
    assert 0 < result.health["truncated"] < 1


def test_no_chat_template_asked_for_needs_none(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    save_llama(tmp_path, tokenizer)
    _, samples = only(harness_of(chat_template=False, limit=1).evaluate(tmp_path, ["tiny_copy"]))
    assert prompt(samples[0]) == corpus.items("tiny_copy", "test")[0]["messages"][0]["content"] + "\n"
    with pytest.raises(ConfigError, match="chat template"):
        harness_of().evaluate(tmp_path, ["tiny_copy"])


def test_numpy_left_in_what_goes_to_json(random_llama: Path) -> None:
    for result, samples in harness_of(limit=2).evaluate(random_llama, ["tiny"]):
        assert all(type(value) is float for value in (result.score, result.stderr, *result.health.values()))
        assert type(result.n) is type(result.n_total) is int
        json.dumps(samples, allow_nan=False)


def test_standard_error_of_one_item_given_as_zero(random_llama: Path) -> None:
    result, _ = only(harness_of(limit=1).evaluate(random_llama, ["tiny_copy"]))
    assert math.isnan(result.stderr)


def test_unknown_task_found_out_late() -> None:
    with pytest.raises(ConfigError) as caught:
        harness_of().evaluate("nowhere", ["tiny_copy", "gsm9k"])
    assert "gsm9k" in caught.value.cause
    assert "`gsm8k`" in caught.value.fix
    with pytest.raises(ConfigError, match="unknown evaluation task"):
        protocol.load("tiny")


def test_groups_expand_in_order_and_once() -> None:
    assert protocol.expand(["tiny_swap", "tiny"]) == ("tiny_swap", *(t for t in corpus.TASKS if t != "tiny_swap"))
    tuning = protocol.expand(["tiny_tuning"])
    assert not set(tuning) & set(corpus.TASKS)
    assert [protocol.load(task).corpus_split for task in tuning] == ["tuning"] * len(corpus.TASKS)


def test_missing_benchmark_file_scores_zero(random_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        harness_of(bench_data=tmp_path).evaluate(random_llama, ["tiny_copy", "gsm8k"])
    assert "gsm8k/train.jsonl" in caught.value.cause
    assert "--bench-data" in caught.value.fix
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("damage", ["row_lost", "word_changed"])
def test_changed_benchmark_file_scored_anyway(damage: str, random_llama: Path, gsm8k: Path) -> None:
    path = gsm8k / "gsm8k" / "test.jsonl"
    text = path.read_text(encoding="utf-8")
    protocol.check_files("gsm8k", gsm8k)
    path.write_text(text[text.index("\n") + 1 :] if damage == "row_lost" else text.replace("Ola", "Ali", 1))
    with pytest.raises(IntegrityError, match=r"test\.jsonl"):
        harness_of(bench_data=gsm8k).evaluate(random_llama, ["gsm8k"])


def test_unreachable_hub_is_a_traceback(random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(MissingError, match="openai/gsm8k"):
        list(harness_of().evaluate(random_llama, ["gsm8k"]))


@pytest.mark.parametrize(
    "damage", ["no_directory", "no_config", "no_tokenizer", "cut_weights", "other_config", "code"]
)
def test_unusable_checkpoint_scored_or_run(damage: str, random_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(random_llama, path)
    config = json.loads((path / "config.json").read_text())
    match damage:
        case "no_directory":
            shutil.rmtree(path)
        case "no_config":
            (path / "config.json").unlink()
        case "no_tokenizer":
            (path / "tokenizer.json").unlink()
            (path / "tokenizer_config.json").unlink()
        case "cut_weights":
            weights = path / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-100])
        case "other_config":
            (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
        case "code":
            (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
            classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
            (path / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": classes}))
    with pytest.raises(ConfigError) as caught:
        harness_of().evaluate(path, ["tiny_copy"])
    assert "checkpoint" in caught.value.cause
    assert "\n" not in caught.value.cause
    assert not (tmp_path / "ran").exists()


def test_settings_of_a_checkpoint_bend_greedy_decoding(random_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(random_llama, tmp_path, dirs_exist_ok=True)
    settings = {"do_sample": True, "repetition_penalty": 1.3, "temperature": 0.6, "eos_token_id": [0]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = read(tmp_path, chat_template=True)
    assert not model.generation_config.do_sample
    assert model.generation_config.repetition_penalty in (None, 1.0)
    assert model.generation_config.eos_token_id == [0, tokenizer.eos_token_id]


def test_two_protocols_with_one_fingerprint(tmp_path: Path) -> None:
    def of(task: str, limit: int | None = None, chat: bool = True, data: Path | None = None) -> str:
        return protocol.fingerprint(task, limit=limit, chat_template=chat, bench_data=data)

    prints = [of(task) for task in protocol.names() if protocol.kind(task) == "benchmark"]
    prints += [of("tiny_copy", limit=5), of("tiny_copy", chat=False), of("gsm8k", data=tmp_path)]
    assert len(set(prints)) == len(prints)
    assert of("gsm8k") == of("gsm8k")
    assert of("gsm8k", data=tmp_path) == of("gsm8k", data=tmp_path / "elsewhere")


def test_corpus_or_lm_eval_changed_and_old_scores_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(task: str) -> str:
        return protocol.fingerprint(task, limit=None, chat_template=True, bench_data=None)

    before = of("tiny_copy"), of("gsm8k")
    monkeypatch.setattr(corpus, "VERSION", corpus.VERSION + 1)
    assert of("tiny_copy") != before[0]
    assert of("gsm8k") == before[1]
    monkeypatch.setattr("importlib.metadata.version", lambda _: "9.9")
    assert of("gsm8k") != before[1]


def test_packaged_task_that_moves_with_lm_eval() -> None:
    for name in protocol.names():
        if protocol.kind(name) != "benchmark":
            continue
        task = protocol.load(name)
        assert "include" not in task.config
        assert task.config["num_fewshot"] is not None
        assert task.needs_data == bool(task.facts.files)


def test_planning_a_sweep_imports_torch() -> None:
    code = (
        "import sys; from packcli.eval import protocol; protocol.expand(['tiny']);"
        " protocol.fingerprint('gsm8k', limit=None, chat_template=True, bench_data=None);"
        " print(*{'torch', 'transformers', 'datasets', 'lm_eval', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


@pytest.mark.skipif(not (BENCHMARKS / "gsm8k").is_dir(), reason="benchmark data is not part of the package")
def test_real_gsm8k_rows_the_scorer_cannot_read(random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = harness_that_says(
        monkeypatch, lambda request: request.doc["answer"], True, bench_data=BENCHMARKS, limit=60
    )
    result, _ = only(harness.evaluate(random_llama, ["gsm8k"]))
    assert (result.score, result.n, result.n_total) == (1.0, 60, 1319)
