"""Data: what would be trained on if reading, rendering, tokenizing or accounting went wrong unnoticed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ARMS as ARM_NAMES
from conftest import chat_records, write_lines
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from packcli import stages
from packcli.config import ARMS, ArmSpec
from packcli.data import chat, index, sources, tokens
from packcli.data import tokenizer as tokenizers
from packcli.errors import ConfigError, DataError, IntegrityError
from packcli.files import read_jsonl, sha256_file
from packcli.plan import IndexOrder, TokenizerOrder, TokensOrder
from packcli.store import Store, verify

TWO_TURNS = [
    {"role": "user", "content": "Was ist das? 🙂"},
    {"role": "assistant", "content": 'Ein Gruß,\nmit "Zitat".'},
    {"role": "user", "content": "Und?"},
    {"role": "assistant", "content": "None"},
]
ONE_TURN = TWO_TURNS[:2]

# Schema -> (record, the messages it means). Flat ones also fit in CSV.
FLAT: dict[str, tuple[dict[str, Any], chat.Messages]] = {
    "alpaca_output": ({"instruction": ONE_TURN[0]["content"], "output": ONE_TURN[1]["content"]}, ONE_TURN),
    "alpaca_response": (
        {"instruction": ONE_TURN[0]["content"], "input": "", "response": ONE_TURN[1]["content"]},
        ONE_TURN,
    ),
    "alpaca_input": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}],
    ),
    "prompt_completion": ({"prompt": ONE_TURN[0]["content"], "completion": ONE_TURN[1]["content"]}, ONE_TURN),
    "question_answer": ({"question": ONE_TURN[0]["content"], "answer": ONE_TURN[1]["content"]}, ONE_TURN),
    "literal_none": (
        {"question": "What is `None`?", "answer": "None"},
        [{"role": "user", "content": "What is `None`?"}, {"role": "assistant", "content": "None"}],
    ),
}
NESTED: dict[str, tuple[dict[str, Any], chat.Messages]] = {
    "messages": ({"messages": TWO_TURNS}, TWO_TURNS),
    "sharegpt": (
        {
            "id": "x",
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
                for turn in TWO_TURNS
            ],
        },
        TWO_TURNS,
    ),
    "prompt_messages": ({"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}, TWO_TURNS),
}


def write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def write_arrow(path: Path, records: list[dict[str, Any]], new: Any) -> None:
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path | None]] = {
    "x.json": lambda path, records: path.write_text(json.dumps(records, indent=1), encoding="utf-8") and None,
    "lines.json": lambda path, records: write_lines(path, records),
    "x.jsonl": lambda path, records: write_lines(path, records),
    "x.parquet": lambda path, records: pq.write_table(pa.Table.from_pylist(records), path, row_group_size=1),
    "stream.arrow": lambda path, records: write_arrow(path, records, pa.ipc.new_stream),
    "file.arrow": lambda path, records: write_arrow(path, records, pa.ipc.new_file),
    "saved_to_disk": lambda path, records: datasets.Dataset.from_list(records).save_to_disk(path),
    "x.csv": write_csv,
}


def read_back(path: Path, mapping: dict[str, str] | None = None) -> list[Any]:
    return list(tokenizers.conversations((str(path),), mapping, None))


@pytest.mark.parametrize("file", WRITERS)
def test_every_schema_in_every_format_reads_to_the_same_conversations(tmp_path: Path, file: str) -> None:
    for name, (record, meant) in {**FLAT, **({} if file.endswith(".csv") else NESTED)}.items():
        path = tmp_path / name / file
        path.parent.mkdir()
        WRITERS[file](path, [record, record])
        assert read_back(path) == [meant, meant], name


def test_a_mapping_renames_fields_in_front_of_the_schema(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"q": "?", "completion": "!", "prompt": "elsewhere"}])
    meant = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]]
    assert read_back(path, {"prompt": "q"}) == meant
    assert read_back(path, {"question": "q", "answer": "completion"}) == meant


def test_bom_and_crlf_are_no_part_of_the_data(tmp_path: Path) -> None:
    record, meant = FLAT["question_answer"]
    line = json.dumps(record).encode()
    for name, content in {
        "a.jsonl": b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n",
        "b.json": b"\xef\xbb\xbf[" + line + b",\r\n" + line + b"]\r\n",
        "c.json": b"\xef\xbb\xbf" + line + b"\r\n" + line,
        "d.csv": b"\xef\xbb\xbfquestion,answer\r\n"
        + 2 * ('"Was ist das? 🙂","Ein Gruß,\nmit ""Zitat""."\r\n'.encode()),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert read_back(tmp_path / name) == [meant, meant], name


def test_a_directory_a_glob_and_a_list_read_in_one_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "a/10.jsonl"):
        write_lines(tmp_path / name, [{"question": name, "answer": "x"}])
    (tmp_path / "a" / "README.md").write_text("not data")

    def order(*names: str) -> list[str]:
        found = tokenizers.conversations(tuple(str(tmp_path / name) for name in names), None, None)
        return [messages[0]["content"] for messages in found]

    assert order(".") == order("**/*.jsonl") == ["a/1.jsonl", "a/10.jsonl", "b/2.jsonl"]
    assert order("b", "a") == ["b/2.jsonl", "a/1.jsonl", "a/10.jsonl"]


def test_a_fingerprint_follows_content_and_not_the_path(tmp_path: Path) -> None:
    one, two = (write_lines(tmp_path / name / "x.jsonl", chat_records(2)) for name in "ab")
    assert sources.fingerprint(str(one), sha256_file) == sources.fingerprint(str(two), sha256_file)
    write_lines(two, chat_records(3))
    assert sources.fingerprint(str(one), sha256_file) != sources.fingerprint(str(two), sha256_file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            b'{"question": "a", "answer": "b"}\n\n{"question": "a", "answer"\n',
            "x.jsonl:3: not valid JSON",
        ),
        ("x.jsonl", b'{"question": "\xff", "answer": "b"}\n', "x.jsonl:1: not valid JSON"),
        ("x.json", b'[\n{"question": "a", "answer": "b"},\n{"question" "a"}]', "x.json:3: not valid JSON"),
        ("x.json", b"", "x.json:1: not valid JSON"),
        ("x.json", b"3", "holds a int, not a list"),
        ("x.csv", b'question,answer\na,b\na,"b\n', "x.csv:3: not valid CSV"),
        ("x.csv", b"question,answer\na,b\na,b, and c\n", "x.csv:3: more fields than the header has"),
        ("x.csv", b"question,answer\na,\xff\n", "x.csv:1: not valid CSV"),
        ("x.parquet", b"PAR1 not really PAR1", "not a readable parquet file"),
        ("x.parquet", b"", "not a readable parquet file"),
        ("x.arrow", b"", "not a readable arrow file"),
        ("x.arrow", b"neither stream nor file, but long enough", "not a readable arrow file"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_back(tmp_path / name)
    assert message in caught.value.cause
    assert str(tmp_path / name) in caught.value.cause
    assert "\n" not in caught.value.cause
    assert caught.value.fix


def test_a_damaged_page_of_a_parquet_file_is_bad_data_and_not_a_bug(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"question": [f"q{n}" for n in range(999)], "answer": ["x"] * 999}), path)
    content = bytearray(path.read_bytes())
    content[60:120] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_back(path)


def test_an_arrow_file_cut_short_is_bad_data(tmp_path: Path) -> None:
    write_arrow(tmp_path / "x.arrow", [{"question": "a", "answer": "b"}] * 5, pa.ipc.new_stream)
    content = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "x.arrow").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match="not a readable arrow file"):
        read_back(tmp_path / "x.arrow")


def test_a_source_that_is_nowhere_or_of_no_known_type_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    for source in ("nowhere.jsonl", "*.jsonl", "x.txt"):
        with pytest.raises(ConfigError) as caught:
            sources.files(str(tmp_path / source))
        assert source in caught.value.cause
        assert ".jsonl" in caught.value.fix


@pytest.mark.parametrize("record", [{"text": "a", "label": 1}, {"instruction": "a"}, {}, [1], "text", None])
def test_a_file_that_no_schema_fits_names_its_fields_and_what_is_accepted(tmp_path: Path, record: Any) -> None:
    path = write_lines(tmp_path / "x.jsonl", [record])
    with pytest.raises(DataError) as caught:
        read_back(path)
    assert caught.value.cause.startswith(f"{path}:1: ")
    for field in record if isinstance(record, dict) else ():
        assert f"`{field}`" in caught.value.cause
    assert "`prompt` with `completion`" in caught.value.fix


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": []}, "`messages` is empty"),
        ({"messages": None}, "`messages` is missing"),
        ({"messages": "hi"}, "`messages` is not a list"),
        ({"messages": ["hi"]}, "`messages[0]` is not an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role `tool`"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "the text is list"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " \n"}]}, "is empty"),
        ({"other": 1}, "`messages` is missing"),
        (3, "the record is not an object"),
    ],
)
def test_a_conversation_that_cannot_be_trained_on_says_why(record: Any, reason: str) -> None:
    with pytest.raises(chat.Rejected) as caught:
        chat.conversation(record, "messages")
    assert reason in str(caught.value)


# The token store ---------------------------------------------------------------------------------------


def order_for(*paths: Path | str, id_: str = "t0", **changes: Any) -> TokensOrder:
    names = tuple(map(str, paths))
    recipe = TokenizerOrder(sources=names, template="chatml", vocab_size=300, validation=0.25)
    fields = {
        "id": id_,
        "sources": names,
        "mapping": None,
        "max_documents": None,
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
    messages = [m for m in tokenizers.conversations((str(path),), None, 120) if not isinstance(m, chat.Rejected)]
    assert results["documents"] == len(messages) > 100
    assert_supervised(
        opened,
        tokenizer,
        [[turn["content"] + "<|im_end|>" for turn in m if turn["role"] == "assistant"] for m in messages],
    )


def byte_tokenizer(template: str, *, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["hello hello"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_the_space_that_ends_a_prompt_is_never_supervised(trim_offsets: bool) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A: "
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(template, trim_offsets=trim_offsets)
    answers = ["  🙂 hello", "x"]
    messages = [{"role": role, "content": text} for text in answers for role in ("user", "assistant")]
    rendered = chat.Renderer(tokenizer).render(messages)
    encoding = tokenizer.backend_tokenizer.encode(rendered.text, add_special_tokens=False)
    ids = np.asarray(encoding.ids, dtype=np.int32)
    spans = tokens.supervised_spans(rendered, encoding.offsets, ids, tokens._special_ids(tokenizer))
    assert [tokenizer.decode(ids[start:stop]) for start, stop in spans] == [f"{text}</s>" for text in answers]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    template = tmp_path / "last_only.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    )
    path = write_lines(tmp_path / "x.jsonl", chat_records(3, turns=2))
    recipe = TokenizerOrder(sources=(str(path),), template=str(template), vocab_size=300)
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
    recipe = TokenizerOrder(sources=(str(path),), template=str(template), vocab_size=300)
    with pytest.raises(DataError, match="without a special token") as caught:
        open_store(order_for(path, template=str(template), tokenizer=recipe), tmp_path / "runs")
    assert "chatml" in caught.value.fix


def test_a_template_that_raises_rejects_the_conversation_and_not_the_file() -> None:
    tokenizer = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(chat.Rejected, match="roles must alternate"):
        chat.Renderer(tokenizer).render(ONE_TURN)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        "{% else %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m | tojson }}</s>{% endfor %}",
        "{{ bos_token }}{% if tools is not none %}TOOLS{% endif %}{{ strftime_now('year') }}"
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content }}\n    {% continue %}\n"
        "    {% endif %}\n{{ m.content }}</s>{% endfor %}",
    ],
)
def test_a_template_renders_as_transformers_renders_it(source: str) -> None:
    tokenizer = byte_tokenizer(source)
    renderer = chat.Renderer(tokenizer)
    for number in range(40):  # beyond the first conversations, which are compared as they come
        messages = [*ONE_TURN, {"role": "user", "content": f"<&'\"> {number}"}, TWO_TURNS[3]]
        rendered = renderer.render(messages)
        assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False)
        for (start, stop), turn in zip(rendered.spans, (ONE_TURN[1], TWO_TURNS[3]), strict=True):
            said = rendered.text[start:stop]
            assert turn["content"] in (said if "tojson" not in source else json.loads(said[:-4])["content"])


def test_a_template_that_is_no_jinja_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="not valid Jinja") as caught:
        chat.Renderer(byte_tokenizer("{% for m in messages %}"))
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


def test_a_shard_of_only_rejected_conversations_still_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "SHARD_CONVERSATIONS", 2)
    path = write_lines(tmp_path / "x.jsonl", [{"messages": []}, {"messages": []}, *chat_records(3)])
    opened, tokenizer, _ = open_store(order_for(path), tmp_path / "runs")
    assert opened.num_documents == len(opened.lengths) == len(opened.content) == 3
    answers = [[record["messages"][1]["content"] + "<|im_end|>"] for record in chat_records(3)]
    assert_supervised(opened, tokenizer, answers)
    assert opened.origin(2) == f"{path}:5"


def test_every_conversation_rejected_is_bad_data(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"messages": []}, {"messages": [{"role": "user", "content": "x"}]}])
    named = TokenizerOrder(name=str(tmp_path / "tokenizer"))
    byte_tokenizer(chat.template_text("chatml")).save_pretrained(tmp_path / "tokenizer")
    for recipe in ({}, {"tokenizer": named}):
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
    monkeypatch.setattr(tokens, "SHARD_CONVERSATIONS", 4)
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
        if file.is_file() and file.name != "manifest.json":
            assert (directory / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes(), file.name
    before, after = (json.loads((path / "manifest.json").read_bytes()) for path in (tmp_path / "whole", directory))
    assert {**before, "provenance": {}} == {**after, "provenance": {}}
    assert verify(directory) > 5


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


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_key_to_set(tmp_path: Path) -> None:
    byte_tokenizer("").save_pretrained(tmp_path / "bare")
    order = order_for("tiny", template=None, tokenizer=TokenizerOrder(name=str(tmp_path / "bare")))
    with pytest.raises(ConfigError, match="has no chat template") as caught:
        tokenizers.build(order)
    assert "data.template" in caught.value.fix


# The row index and the ledger --------------------------------------------------------------------------


@dataclass
class FakeTokens:
    """What `index.build` reads of a token store. `documents`: (length, spans, content)."""

    documents: list[tuple[int, list[tuple[int, int]], int]]

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> Any:
        return np.array([length for length, _, _ in self.documents], dtype=np.int64)

    @property
    def content(self) -> Any:
        return np.array([content for _, _, content in self.documents], dtype=np.uint64)

    @property
    def spans(self) -> Any:
        flat = [(n, *span) for n, (_, spans, _) in enumerate(self.documents) for span in spans]
        return tuple(np.array(flat, dtype=np.int64).reshape(-1, 3).T)

    def labels(self, document: int) -> set[int]:
        return {position for start, stop in self.documents[document][1] for position in range(start, stop)}


@st.composite
def _documents(draw: st.DrawFn) -> FakeTokens:
    documents = []
    for _ in range(draw(st.integers(0, 12))):
        length = draw(st.integers(1, 30))
        cuts = sorted(draw(st.sets(st.integers(1, length), max_size=6)))
        spans = list(zip(cuts[::2], cuts[1::2], strict=False))
        documents.append((length, spans, draw(st.sampled_from([0, 2**62, 2**63, 2**64 - 1]))))
    return FakeTokens(documents)


def index_order(arm: str, max_length: int, validation: float = 0.5, seed: int = 0) -> IndexOrder:
    arm_spec = ArmSpec.model_validate(ARMS[arm])
    return IndexOrder(
        id="i", tokens="t", max_length=max_length, validation=validation, seed=seed, layout=arm_spec.rows
    )


@given(_documents(), st.integers(2, 40), st.sampled_from(ARM_NAMES), st.integers(0, 3), st.integers(0, 3))
def test_the_ledger_accounts_for_every_token_under_every_arm(
    fake: FakeTokens, max_length: int, arm: str, seed: int, rejected: int
) -> None:
    order = index_order(arm, max_length, seed=seed)
    cut = ARMS[arm]["overlong"] == "none"
    reach = [length if cut else min(length, max_length) for length, _, _ in fake.documents]
    held = {n for n, (_, _, content) in enumerate(fake.documents) if content < 2**63}
    kept = {
        n
        for n in range(fake.num_documents)
        if n not in held and any(position < reach[n] for position in fake.labels(n))
    }
    if not kept:
        with pytest.raises(DataError, match="no document is left"):
            index.build(order, fake, fake.num_documents + rejected, rejected)
        return
    built, validation, ledger = index.build(order, fake, fake.num_documents + rejected, rejected)
    index.check(ledger)

    rows = [
        list(
            zip(
                built.rows.document[start:stop].tolist(),
                built.rows.start[start:stop].tolist(),
                built.rows.stop[start:stop].tolist(),
                strict=True,
            )
        )
        for start, stop in zip(built.rows.offsets[:-1], built.rows.offsets[1:], strict=True)
    ]
    covered = sorted((document, position) for row in rows for document, a, b in row for position in range(a, b))
    assert covered == [(document, position) for document in sorted(kept) for position in range(reach[document])]
    assert all(sum(b - a for _, a, b in row) <= max_length for row in rows)

    tokens_kept = sum(reach[n] for n in kept)
    dropped = set(range(fake.num_documents)) - held - kept
    in_rows = [document for row in rows for document, _, _ in row]
    slots = tokens_kept if arm == "padding_free" else len(rows) * max_length
    assert ledger["conversations_in"] == fake.num_documents + rejected
    assert ledger["documents_validation"] == len(held)
    assert ledger["documents_dropped"] == len(dropped)
    assert ledger["documents_kept"] == len(kept)
    assert ledger["documents_cut"] == len({n for n in in_rows if in_rows.count(n) > 1})
    assert ledger["tokens_validation"] == sum(fake.documents[n][0] for n in held)
    assert ledger["tokens_dropped"] == sum(fake.documents[n][0] for n in dropped)
    assert ledger["tokens_truncated"] == sum(fake.documents[n][0] - reach[n] for n in kept)
    assert ledger["tokens_kept"] == tokens_kept
    assert ledger["tokens_padding"] == slots - tokens_kept
    assert (ledger["rows"], ledger["slots"], ledger["efficiency"]) == (len(rows), slots, tokens_kept / slots)
    assert ledger["rows"] >= ledger["rows_lower_bound"] >= -(-tokens_kept // max_length)
    if arm in ("padding", "padding_free"):
        assert ledger["rows"] == ledger["rows_lower_bound"] == len(kept)

    # A label reaches the loss unless it is the first token of a piece: nothing there predicts it.
    reached = [sum(a < p < b for document, a, b in row for p in fake.labels(document)) for row in rows]
    assert built.supervised.tolist() == reached
    assert ledger["tokens_supervised"] == sum(reached)
    assert built.tokens.tolist() == [sum(b - a for _, a, b in row) for row in rows]
    assert built.documents.tolist() == [sum(a == 0 for _, a, _ in row) for row in rows]

    trainable = [n for n in sorted(held) if any(p < max_length for p in fake.labels(n))]
    assert validation.rows.document.tolist() == trainable
    assert validation.rows.stop.tolist() == [min(fake.documents[n][0], max_length) for n in trainable]


@given(_documents(), st.data())
def test_labels_are_counted_as_one_by_one(fake: FakeTokens, data: st.DataObject) -> None:
    labels = index.Labels(fake)
    pieces = []
    for document, (length, _, _) in enumerate(fake.documents):
        start = data.draw(st.integers(0, length))
        pieces.append((document, start, data.draw(st.integers(start, length))))
    document, start, stop = np.array(pieces, dtype=np.int64).reshape(-1, 3).T
    naive = [len(fake.labels(n) & set(range(a, b))) for n, a, b in pieces]
    assert labels.count(document, start, stop).tolist() == naive


def test_a_ledger_that_does_not_close_is_refused() -> None:
    fake = FakeTokens([(10, [(2, 5)], 2**63), (40, [(2, 5)], 2**63), (9, [(1, 2)], 0), (9, [], 2**63)])
    _, _, ledger = index.build(index_order("padding", 16), fake, 5, 1)
    for whole, parts in index.LEDGER_IDENTITIES:
        for key in (whole, *parts):
            with pytest.raises(IntegrityError, match="the ledger does not close"):
                index.check({**ledger, key: ledger[key] + 1})


def test_an_index_survives_its_file(tmp_path: Path) -> None:
    fake = FakeTokens([(length, [(1, length)], 2**63) for length in (5, 17, 30, 2, 9)])
    built, held_out, _ = index.build(index_order("random", 8), fake, 5, 0)
    for name, one in {"rows": built, "none": held_out}.items():
        index.write(tmp_path / name, one)
        again = index.read(tmp_path / name)
        for key in ("document", "start", "stop", "offsets"):
            assert np.array_equal(getattr(again.rows, key), getattr(one.rows, key)), key
        for key in ("tokens", "documents", "supervised"):
            assert np.array_equal(getattr(again, key), getattr(one, key)), key
    assert held_out.rows.num_rows == 0


@pytest.fixture(scope="module")
def real_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[tokens.Tokens, Any]:
    root = tmp_path_factory.mktemp("real")
    records: list[Any] = [*chat_records(50, turns=2), *chat_records(10, turns=6), {"messages": []}]
    opened, _, results = open_store(order_for(write_lines(root / "x.jsonl", records)), root / "runs")
    return opened, results


@pytest.mark.parametrize("arm", ARM_NAMES)
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


def test_duplicates_go_to_one_side_together(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", chat_records(40) * 2)
    opened, _, _ = open_store(order_for(path), tmp_path / "runs")
    held = [chat.in_validation(int(content), 0.3) for content in opened.content]
    assert held[:40] == held[40:]


def test_the_store_holds_the_hash_by_which_the_tokenizer_chose_its_documents(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", chat_records(5))
    opened, _, _ = open_store(order_for(path), tmp_path / "runs")
    assert opened.content.tolist() == [chat.content_hash(messages) for messages in read_back(path)]


def test_no_document_moves_between_training_and_validation_unnoticed() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ß"}]
    assert chat.content_hash(said) == 6109916162302860884
    assert chat.in_validation(2**62 - 1, 0.25)
    assert not chat.in_validation(2**62, 0.25)
    assert not chat.in_validation(0, 0.0)


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_packaged_template_is_found_by_name_and_any_other_by_path(name: str, tmp_path: Path) -> None:
    assert "messages" in chat.template_text(name)
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert chat.template_text(str(tmp_path / "own.jinja")) == "{{ messages }}"
    with pytest.raises(ConfigError, match="no chat template `chatlm`"):
        chat.template_text("chatlm")
