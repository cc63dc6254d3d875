"""The token store: what would be trained on if rendering, tokenizing or resuming went wrong unnoticed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import chat_records, write_lines
from test_index import index_order
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from packcli import stages
from packcli.config import ARMS, LENGTHS_ALONE, SourceSpec
from packcli.data import chat, conversations, index, render, sources, tokens
from packcli.data import tokenizer as tokenizers
from packcli.errors import ConfigError, DataError
from packcli.files import read_jsonl
from packcli.plan import TokenizerOrder, TokensOrder
from packcli.store import Store, normalized, verify

ONE_TURN = [{"role": "user", "content": "Was ist das?"}, {"role": "assistant", "content": "Ein Gruß."}]


def read_back(path: Path, most: int | None = None) -> list[Any]:
    return [found for _, found in conversations.everything((SourceSpec(source=str(path)),), most)]


def small_pieces(monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    """Have sources cut into pieces of so many bytes, so that a small file makes several shards."""
    original = sources.pieces
    monkeypatch.setattr(sources, "pieces", lambda of, most: original(of, most, piece_bytes))


def order_for(*paths: Path | str, id_: str = "t0", **changes: Any) -> TokensOrder:
    names = tuple(SourceSpec(source=str(path)) for path in paths)
    recipe = TokenizerOrder(sources=names, template="chatml", vocab_size=300, validation=0.25)
    fields = {
        "id": id_,
        "sources": names,
        "processes": 1,
        "fingerprints": (),
        "max_documents": None,
        "on_error": "fail",
        "max_errors": 100,
        "train_on": "assistant",
        "template": "chatml",
        "tokenizer": recipe,
    }
    return TokensOrder(**{**fields, **changes})


def open_store(order: TokensOrder, root: Path) -> tuple[tokens.Tokens, Any, Any]:
    """(documents, tokenizer, results) of a token store that is built first where it is missing."""
    store = Store(root)
    manifest = stages.prepare_tokens(order, store)
    return (
        stages.open_tokens(store, manifest),
        tokenizers.load_directory(store.tokenizer(order.id)),
        manifest.results,
    )


def assert_supervised(opened: tokens.Tokens, tokenizer: Any, expected: list[list[str]]) -> None:
    """The supervised spans decode to exactly these texts, document by document."""
    found = [
        [tokenizer.decode(opened.ids(document)[start:stop]) for start, stop in opened.supervised(document)]
        for document in range(opened.num_documents)
    ]
    assert found == expected


def test_supervised_spans_are_exactly_what_the_assistant_said_and_its_stop(tmp_path: Path) -> None:
    said = ["Grüße 🙂🙃!", " leading and trailing ", "a\n\nb", "<|im_start|> named in the text", "語"]
    records = [
        {
            "messages": [
                {"role": "system", "content": "Ünïcode\n"},
                *({"role": role, "content": text} for text in texts for role in ("user", "assistant")),
            ]
        }
        for texts in ([said[0]], said[1:3], said)
    ]
    path = write_lines(tmp_path / "x.jsonl", records)
    opened, tokenizer, results = open_store(order_for(path), tmp_path / "runs")
    assert_supervised(
        opened, tokenizer, [[text + "<|im_end|>" for text in texts] for texts in ([said[0]], said[1:3], said)]
    )
    assert results["stop_token_ids"] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    for document, record in enumerate(records):
        rendered = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        assert tokenizer.decode(opened.ids(document)) == rendered
        assert opened.origin(document) == f"{path}:{document + 1}"


@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "taskmaster4_multiturn.jsonl", "sharegpt_dummy.json"])
def test_supervised_spans_hold_on_real_conversations(shared_data: Path, tmp_path: Path, name: str) -> None:
    path = shared_data / "sft" / name
    order = order_for(path, max_documents=120)
    order = order.model_copy(update={"tokenizer": order.tokenizer.model_copy(update={"max_documents": 120})})
    opened, tokenizer, results = open_store(order, tmp_path / "runs")
    messages = [m for m in read_back(path, 120) if not isinstance(m, chat.Rejected)]
    assert results["documents"] == len(messages) > 100
    assert_supervised(
        opened,
        tokenizer,
        [[turn["content"] + "<|im_end|>" for turn in m if turn["role"] == "assistant"] for m in messages],
    )


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["hello hello"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    template = tmp_path / "last_only.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    )
    path = write_lines(tmp_path / "x.jsonl", chat_records(3, turns=2))
    recipe = TokenizerOrder(sources=(SourceSpec(source=str(path)),), template=str(template), vocab_size=300)
    with pytest.raises(DataError, match="changes earlier turns") as caught:
        open_store(order_for(path, template=str(template), tokenizer=recipe), tmp_path / "runs")
    assert "chatml" in caught.value.fix


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}",
    ],
)
def test_a_template_that_never_ends_a_turn_is_refused(tmp_path: Path, source: str) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text(source)
    path = write_lines(tmp_path / "x.jsonl", chat_records(3))
    recipe = TokenizerOrder(sources=(SourceSpec(source=str(path)),), template=str(template), vocab_size=300)
    with pytest.raises(DataError, match="without a special token") as caught:
        open_store(order_for(path, template=str(template), tokenizer=recipe), tmp_path / "runs")
    assert "chatml" in caught.value.fix


def test_rejected_conversations_are_counted_and_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    records: list[Any] = chat_records(6)
    records[1], records[4] = {"messages": []}, {"messages": [{"role": "user", "content": "only asked"}]}
    path = write_lines(tmp_path / "x.jsonl", records)
    opened, _, results = open_store(order_for(path), tmp_path / "runs")
    assert (results["conversations"], results["documents"], results["rejected"]) == (6, 4, 2)
    assert read_jsonl(Store(tmp_path / "runs").rejected("t0")) == [
        {"file": str(path), "record": 2, "reason": "`messages` is empty"},
        {"file": str(path), "record": 5, "reason": "no assistant turn"},
    ]
    assert [opened.origin(document) for document in range(4)] == [f"{path}:{n}" for n in (1, 3, 4, 6)]


def test_a_rejected_record_is_counted_once_and_nothing_of_it_is_kept(tmp_path: Path) -> None:
    """Whatever of it is found wrong, and however late: a field to keep, or a token of its second document."""
    deep: Any = "x"
    for _ in range(300):
        deep = [deep]
    tagged = [record | {"tags": ["a"]} for record in chat_records(3)]
    tagged[1]["tags"] = deep
    packed = [{"input_ids": [5, 6, 7, 8, 9, 10], "seq_lengths": [2, 2, 2]} for _ in range(3)]
    packed[1]["input_ids"][3] = 10**6
    tokenizer = byte_tokenizer(render.template_text("plain"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    named = {"tokenizer": TokenizerOrder(name=str(tmp_path / "tokenizer")), "template": "plain"}
    for records, documents, reason, options in (
        (tagged, 2, "nested too deeply", {"fields": ("tags",), **named}),
        (packed, 6, "is not one of the tokenizer's", named),
    ):
        path = write_lines(tmp_path / "x.jsonl", records)
        _, _, results = open_store(order_for(path, id_=reason[:6], **options), tmp_path / "runs")
        assert (results["documents"], results["rejected"]) == (documents, 1)
        assert results["conversations"] == documents + 1
        [rejected] = read_jsonl(Store(tmp_path / "runs").rejected(reason[:6]))
        assert (rejected["record"], reason in rejected["reason"]) == (2, True)


def test_a_conversation_of_which_the_template_writes_nothing_is_rejected(tmp_path: Path) -> None:
    template = tmp_path / "some.jinja"
    chatml = render.template_text("chatml")
    template.write_text("{% if messages|length > 2 %}" + chatml + "{% else %}\n{% endif %}")
    path = write_lines(tmp_path / "x.jsonl", [*chat_records(2, turns=2), *chat_records(1)])
    recipe = TokenizerOrder(sources=(SourceSpec(source=str(path)),), template=str(template), vocab_size=300)
    order = order_for(path, template=str(template), tokenizer=recipe)
    opened, _, results = open_store(order, tmp_path / "runs")
    assert (results["documents"], results["rejected"], len(opened.ends[1])) == (2, 1, 2)
    [rejected] = read_jsonl(Store(tmp_path / "runs").rejected("t0"))
    assert rejected["reason"] == "the chat template writes nothing for it"


@pytest.mark.parametrize("most", [0, 1])
def test_too_many_bad_lines_name_a_bad_line_and_no_other_record(tmp_path: Path, most: int) -> None:
    """Those of one file, or of two together."""
    for name in ("a", "b"):
        path = write_lines(tmp_path / "data" / f"{name}.jsonl", [*chat_records(1), {"messages": []}])
        path.write_text(path.read_text() + "no JSON\n" + '{"messages": []}\n')
    order = order_for(tmp_path / "data", on_error="skip", max_errors=most)
    with pytest.raises(DataError, match=f"{most + 1} lines could not be parsed") as caught:
        open_store(order, tmp_path / "runs")
    assert "a.jsonl:3: not valid JSON" in caught.value.fix


def test_a_shard_of_only_rejected_conversations_still_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch, 40)
    path = write_lines(tmp_path / "x.jsonl", [{"messages": []}, {"messages": []}, *chat_records(3)])
    opened, tokenizer, _ = open_store(order_for(path), tmp_path / "runs")
    assert opened.num_documents == len(opened.lengths) == len(opened.content) == 3
    answers = [[record["messages"][1]["content"] + "<|im_end|>"] for record in chat_records(3)]
    assert_supervised(opened, tokenizer, answers)
    assert opened.origin(2) == f"{path}:5"


def test_case_09_every_conversation_rejected_is_bad_data(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"messages": []}, {"messages": [{"role": "user", "content": "x"}]}])
    named = TokenizerOrder(name=str(tmp_path / "tokenizer"))
    byte_tokenizer(render.template_text("plain")).save_pretrained(tmp_path / "tokenizer")
    for recipe in ({}, {"tokenizer": named, "template": "plain"}):
        with pytest.raises(DataError) as caught:
            open_store(order_for(path, **recipe), tmp_path / "runs")
        assert caught.value.fix
    assert "`messages` is empty, no assistant turn" in caught.value.cause
    assert Store(tmp_path / "runs").state("tokens", "t0") == "failed"


def test_max_documents_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_lines(path, chat_records(3))
    path.write_text(path.read_text() + "not json\n")
    order = order_for(path, max_documents=2)
    recipe = order.tokenizer.model_copy(update={"max_documents": 2})
    opened, _, results = open_store(order.model_copy(update={"tokenizer": recipe}), tmp_path / "runs")
    assert opened.num_documents == results["conversations"] == 2


def test_datasets_opens_a_shard_as_it_is(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", chat_records(5, turns=2))
    opened, _, _ = open_store(order_for(path), tmp_path / "runs")
    shard = datasets.Dataset.from_file(str(Store(tmp_path / "runs").shard("t0", 0)))
    assert shard.column_names == ["input_ids", "supervised", "content", "file", "record"]
    for document, row in enumerate(shard):
        assert row["input_ids"] == opened.ids(document).tolist()
        assert row["supervised"] == opened.supervised(document).reshape(-1).tolist()


def test_an_interrupted_build_resumes_and_ends_byte_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 400)
    records: list[Any] = chat_records(11)
    records[9] = {"messages": []}
    order = order_for(write_lines(tmp_path / "x.jsonl", records))
    open_store(order, tmp_path / "runs")
    store = Store(tmp_path / "runs")
    directory = store.directory("tokens", order.id)
    shutil.copytree(directory, tmp_path / "whole")
    finished = store.shard(order.id, 0).stat().st_mtime_ns

    store.manifest_file("tokens", order.id).unlink()
    store.shard_record(order.id, 2).unlink()
    store.shard(order.id, 2).write_bytes(b"torn")
    (directory / f".{store.shard(order.id, 2).name}.tmp-0123abcd").write_bytes(b"of a killed writer")
    monkeypatch.setattr(sys.modules["packcli.store"], "machine", lambda: {})
    stages.prepare_tokens(order, store)

    assert store.shard(order.id, 0).stat().st_mtime_ns == finished, "a finished shard was written again"
    for file in (tmp_path / "whole").rglob("*"):
        if file.is_file() and file.name not in ("manifest.json", ".lock"):
            assert (directory / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes(), file.name
    before, after = (json.loads((path / "manifest.json").read_bytes()) for path in (tmp_path / "whole", directory))
    assert normalized(before) == normalized(after)
    assert verify(directory) > 5


def test_a_resumed_build_reads_each_file_where_it_lies_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id says what a file holds and not its name: another may have that by now."""
    small_pieces(monkeypatch, 400)
    source = write_lines(tmp_path / "a.jsonl", chat_records(11))
    store, order = Store(tmp_path / "runs"), order_for(source)
    stages.prepare_tokens(order, store)
    made = store.shard(order.id, 2).read_bytes()
    store.manifest_file("tokens", order.id).unlink()
    store.shard_record(order.id, 2).unlink()

    moved = source.rename(tmp_path / "b.jsonl")
    write_lines(source, chat_records(11, first=500))
    stages.prepare_tokens(order_for(moved), store)
    assert store.shard(order.id, 2).read_bytes() == made


def test_a_trained_tokenizer_never_sees_a_validation_document(tmp_path: Path) -> None:
    records = chat_records(60)
    held_out = [
        chat.in_validation(chat.content_hash(chat.conversation(record, "messages")), 0.25) for record in records
    ]
    assert 5 < sum(held_out) < 30
    secret = "zqzq" * 50
    for record, held in zip(records, held_out, strict=True):
        if not held:
            record["messages"][0]["content"] += " common"
    # The hash covers the text, so search for texts that stay, or come, on the validation side.
    marked = []
    for number in range(400):
        candidate = {"messages": [{"role": "user", "content": f"{secret} {number}"}, *ONE_TURN[1:]]}
        if chat.in_validation(chat.content_hash(chat.conversation(candidate, "messages")), 0.25):
            marked.append(candidate)
    assert len(marked) > 50
    clean = order_for(write_lines(tmp_path / "clean.jsonl", records))
    mixed = order_for(write_lines(tmp_path / "mixed.jsonl", [*records, *marked]))
    assert tokenizers.build(mixed).get_vocab() == tokenizers.build(clean).get_vocab()
    everything = mixed.tokenizer.model_copy(update={"validation": 0.0})
    seen = tokenizers.build(mixed.model_copy(update={"tokenizer": everything})).get_vocab()
    assert any("zqzq" in token for token in seen), "the check above could not have failed"


def test_a_trained_tokenizer_is_the_same_in_every_process(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", chat_records(200, turns=2))
    order = order_for(path)
    code = (
        "import sys; from pathlib import Path; from packcli.plan import TokensOrder\n"
        "from packcli.data import tokenizer\n"
        "tokenizer.build(TokensOrder.model_validate_json(sys.argv[1])).save_pretrained(sys.argv[2])"
    )
    found = []
    for threads in ("1", "2"):
        target = tmp_path / threads
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        environment["TOKENIZERS_PARALLELISM"] = "true"
        subprocess.run([sys.executable, "-c", code, order.model_dump_json(), target], check=True, env=environment)
        found.append({file.name: file.read_bytes() for file in sorted(target.iterdir())})
    assert found[0] == found[1]
    assert "tokenizer.json" in found[0]


def test_a_tokenizer_is_trained_without_holding_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        """Stands in the messages, which no weak reference can point at."""

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def everything(*_: Any) -> Iterator[tuple[Any, Any]]:
        nonlocal most
        for number in range(3000):
            held = Held()
            alive.add(held)
            most = max(most, len(alive))
            texts = {"user": f"{number}?", "assistant": f"{number}!"}
            yield None, [{"role": role, "content": text, "held": held} for role, text in texts.items()]

    monkeypatch.setattr(conversations, "everything", everything)
    tokenizers.build(order_for(tmp_path / "x.jsonl"))
    assert most < 10


def test_a_trainer_that_reads_is_interrupted_at_once_and_its_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Its own threads would read on to the end of the data, however far that is."""
    texts = iter(f"text {number}" for number in range(10**9))
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background hear none
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, heard))
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    monkeypatch.setattr(tokenizers, "_training_split", lambda order: texts)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        tokenizers.build(order_for(tmp_path / "x.jsonl"))
    assert time.monotonic() - started < 20

    monkeypatch.setattr(tokenizers, "_training_split", lambda order: iter(["\ud800"] * 5000))
    with pytest.raises(UnicodeEncodeError):
        tokenizers.build(order_for(tmp_path / "x.jsonl"))


def test_data_that_no_tokenizer_can_be_trained_on_are_one_error(tmp_path: Path) -> None:
    """Raised while the trainer reads, on whichever thread it does."""
    tokenized_ = write_lines(tmp_path / "x.jsonl", [{"input_ids": [1, 2, 3]}])
    with pytest.raises(ConfigError, match="tokenized already"):
        tokenizers.build(order_for(tokenized_))
    with pytest.raises(DataError, match="no usable conversation to train a tokenizer on"):
        tokenizers.build(order_for(write_lines(tmp_path / "y.jsonl", [{"messages": []}])))


def test_case_14_a_tokenizer_without_a_chat_template_is_refused_with_the_key_to_set(tmp_path: Path) -> None:
    byte_tokenizer("").save_pretrained(tmp_path / "bare")
    order = order_for("tiny", template=None, tokenizer=TokenizerOrder(name=str(tmp_path / "bare")))
    with pytest.raises(ConfigError, match="has no chat template") as caught:
        tokenizers.build(order)
    assert "data.template" in caught.value.fix


def test_duplicates_go_to_one_side_together(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", chat_records(40) * 2)
    opened, _, _ = open_store(order_for(path), tmp_path / "runs")
    held = [chat.in_validation(int(content), 0.3) for content in opened.content]
    assert held[:40] == held[40:]


def test_the_store_holds_the_hash_by_which_the_tokenizer_chose_its_documents(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", chat_records(5))
    opened, _, _ = open_store(order_for(path), tmp_path / "runs")
    assert opened.content.tolist() == [chat.content_hash(messages) for messages in read_back(path)]


@pytest.fixture(scope="module")
def real_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[tokens.Tokens, Any]:
    root = tmp_path_factory.mktemp("real")
    records: list[Any] = [*chat_records(50, turns=2), *chat_records(10, turns=6), {"messages": []}]
    opened, _, results = open_store(order_for(write_lines(root / "x.jsonl", records)), root / "runs")
    return opened, results


@pytest.mark.parametrize("arm", [name for name in LENGTHS_ALONE if not ARMS[name]["validation_after_packing"]])
def test_validation_is_the_same_whatever_the_seed_and_arm(real_store: tuple[tokens.Tokens, Any], arm: str) -> None:
    opened, results = real_store
    counts = (results["conversations"], results["rejected"])
    expected = [n for n in range(opened.num_documents) if chat.in_validation(int(opened.content[n]), 0.3)]
    assert 0 < len(expected) < opened.num_documents
    for seed in (0, 1):
        built, held_out, ledger = index.build(index_order(arm, 100, 0.3, seed), opened, *counts)
        assert held_out.rows.document.tolist() == expected
        assert not set(built.rows.document.tolist()) & set(expected)
        assert ledger["conversations_in"] == 61
        assert ledger["conversations_rejected"] == 1
