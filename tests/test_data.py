"""Conversations: what would be trained on if a schema were misread or a record mistaken for another."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_lines

from packcli.config import SourceSpec
from packcli.data import chat, conversations
from packcli.errors import DataError

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
    "alpaca_history": (
        {"instruction": "c", "history": [["a", "b"]], "system": "s", "output": "d"},
        [
            {"role": role, "content": text}
            for role, text in zip(("system", *("user", "assistant") * 2), "sabcd", strict=True)
        ],
    ),
    "alpaca_no_history": (
        {"instruction": ONE_TURN[0]["content"], "history": [], "output": "x"},
        [ONE_TURN[0], {"role": "assistant", "content": "x"}],
    ),
    **{
        f"{schema}_system": ({schema: TWO_TURNS, "system": "s"}, [{"role": "system", "content": "s"}, *TWO_TURNS])
        for schema in ("messages", "conversations")
    },
    "system_twice": (
        {"conversations": [{"role": "system", "content": "s"}, *TWO_TURNS], "system": "s"},
        [{"role": "system", "content": "s"}, *TWO_TURNS],
    ),
    "system_blank": ({"conversations": TWO_TURNS, "system": " "}, TWO_TURNS),
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
    source = SourceSpec(source=str(path), mapping=mapping)
    return [found for _, found in conversations.everything((source,), None)]


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


@pytest.mark.parametrize("record", [{"text": "a", "label": 1}, {"instruction": "a"}, {}, [1], "text", None])
def test_case_08_a_file_that_no_schema_fits_names_its_fields_and_what_is_accepted(
    tmp_path: Path, record: Any
) -> None:
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
def test_case_08_a_conversation_that_cannot_be_trained_on_says_why(record: Any, reason: str) -> None:
    with pytest.raises(chat.Rejected) as caught:
        chat.conversation(record, "messages")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "beside", "reason"),
    [
        ("conversations", {"system": 3}, "`system` is int, not text"),
        ("conversations", {"system": "other"}, "`system` is another text than its first message"),
        ("instruction", {"system": ["s"]}, "`system` is list, not text"),
        ("instruction", {"history": "a: b"}, "`history` is str, not a list of pairs"),
        ("instruction", {"history": {"a": "b"}}, "`history` is dict, not a list of pairs"),
        ("instruction", {"history": [["a", "b"], ["c"]]}, "`history[1]` is not an instruction and its answer"),
        ("instruction", {"history": [["a", None]]}, "`history[0]` is not an instruction and its answer"),
        ("instruction", {"history": [["a", " "]]}, "an assistant turn is empty"),
    ],
)
def test_what_was_said_before_is_rejected_where_it_cannot_be_read_and_not_lost(
    schema: chat.Schema, beside: dict[str, Any], reason: str
) -> None:
    said = [{"role": "system", "content": "s"}, *ONE_TURN]
    record = {"conversations": said} if schema == "conversations" else {"instruction": "a", "output": "b"}
    with pytest.raises(chat.Rejected) as caught:
        chat.conversation(record | beside, schema)
    assert reason in str(caught.value)


def test_no_document_moves_between_training_and_validation_unnoticed() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ß"}]
    assert chat.content_hash(said) == 6109916162302860884
    assert chat.in_validation(2**62 - 1, 0.25)
    assert not chat.in_validation(2**62, 0.25)
    assert not chat.in_validation(0, 0.0)
