"""Rows that leave for other trainers, and rows that come from them."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcli.config import ARMS, ArmSpec
from packcli.data import chat, export, index, tokenized
from packcli.data.index import Index
from packcli.data.tokenized import Document
from packcli.errors import ConfigError
from packcli.packing import Rows
from packcli.plan import IndexOrder

WHOLE = ("padding", "padding_free", "greedy", "best_fit")
SEVERAL = ("best_fit", "random", "greedy")


@dataclass(frozen=True)
class Store:
    """A token store in memory."""

    documents: list[Document]
    held_out: frozenset[int] = frozenset()

    def ids(self, document: int) -> Any:
        return self.documents[document].ids

    def supervised(self, document: int) -> Any:
        return self.documents[document].spans

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> Any:
        return np.array([len(document.ids) for document in self.documents], dtype=np.int64)

    @property
    def content(self) -> Any:
        return np.array([0 if n in self.held_out else 2**63 for n in range(len(self.documents))], np.uint64)

    @property
    def spans(self) -> Any:
        flat = [(n, *span) for n, document in enumerate(self.documents) for span in document.spans.tolist()]
        return tuple(np.array(flat, dtype=np.int64).reshape(-1, 3).T)


def document(ids: list[int], *spans: tuple[int, int]) -> Document:
    return Document(np.array(ids, np.int32), np.array(spans, np.int32).reshape(-1, 2))


def random_store(count: int = 40, seed: int = 0, longest: int = 30, vocabulary: int = 90) -> Store:
    generator = np.random.default_rng(seed)
    documents = []
    for length in generator.integers(4, longest, count).tolist():
        middle = int(generator.integers(1, length - 1))
        documents.append(document(generator.integers(0, vocabulary, length).tolist(), (middle, length)))
    return Store(documents, frozenset(range(0, count, 7)))


def prepared(store: Store, arm: str, max_length: int = 32, **changes: Any) -> export.Prepared:
    spec = ArmSpec.model_validate(ARMS[arm])
    order = IndexOrder(
        id="i0",
        tokens="t0",
        max_length=max_length,
        validation=0.1,
        seed=0,
        layout=spec.rows,
        batching=None,
        epochs=1,
    )
    built, held_out, ledger = index.build(order, store, store.num_documents, 0)
    cell = export.Prepared(store, built, held_out, order, spec, pad_id=0, ledger=ledger, tokenizer=None)
    return replace(cell, **changes)


def write(cell: export.Prepared, directory: Path) -> dict[str, Any]:
    return export.export(cell, directory, lambda done, total, remark: None)


def loaded(directory: Path, split: str = "train") -> Any:
    import datasets

    return datasets.load_from_disk(str(directory))[split]


# What is written ---------------------------------------------------------------------------------------


def by_hand(cell: export.Prepared, table: Index, row: int) -> dict[str, list[int]]:
    """One row of an export, token by token."""
    found: dict[str, list[int]] = {name: [] for name in export.COLUMNS}
    previous = -1
    for piece in range(table.rows.offsets[row], table.rows.offsets[row + 1]):
        number, start, stop = (
            int(column[piece]) for column in (table.rows.document, table.rows.start, table.rows.stop)
        )
        if number != previous:
            found["document_lengths"].append(0)
        for place in range(start, stop):
            first = number != previous
            previous = number
            trained = not first and any(a <= place < b for a, b in cell.tokens.supervised(number).tolist())
            token = int(cell.tokens.ids(number)[place])
            found["position_ids"].append(
                found["document_lengths"][-1] if cell.arm.positions == "reset" else len(found["input_ids"])
            )
            found["input_ids"].append(token)
            found["labels"].append(token if trained else -100)
            found["document_lengths"][-1] += 1
    isolated = cell.arm.attention == "document"
    found["seq_lengths"] = found["document_lengths"] if isolated else [len(found["input_ids"])]
    return found


@pytest.mark.parametrize("arm", ["padding", "padding_free", "random", "greedy", "best_fit"])
def test_no_token_label_or_position_differs_from_the_rows_that_packcli_trains_on(arm: str, tmp_path: Path) -> None:
    cell = prepared(random_store(), arm, max_length=24)
    write(cell, tmp_path / "out")
    assert cell.validation is not None
    for split, table in (("train", cell.index), ("validation", cell.validation)):
        assert loaded(tmp_path / "out", split).to_list() == [
            by_hand(cell, table, row) for row in range(table.rows.num_rows)
        ]


def test_as_many_labels_are_written_as_the_ledger_counts(tmp_path: Path) -> None:
    for arm in WHOLE:
        cell = prepared(random_store(), arm, max_length=16)
        about = write(cell, tmp_path / arm)
        labels = np.concatenate(loaded(tmp_path / arm)["labels"][:])
        assert int((labels != -100).sum()) == cell.ledger["tokens_supervised"]
        assert about["splits"]["train"]["supervised"] == cell.ledger["tokens_supervised"]
        assert about["splits"]["train"]["documents"] == cell.ledger["documents_kept"]


def test_a_turn_cut_out_of_a_document_does_not_make_two_documents_of_it(tmp_path: Path) -> None:
    store = Store([document(list(range(10, 20)), (2, 4), (6, 10)), document([7, 8, 9], (1, 3))])
    rows = Rows(np.array([0, 0, 1]), np.array([0, 6, 0]), np.array([3, 9, 3]), np.array([0, 3]))
    cell = prepared(store, "best_fit")
    cell = replace(cell, index=index.summarise(rows, index.Labels(store)), validation=None)
    write(cell, tmp_path / "out")
    assert loaded(tmp_path / "out").to_list() == [
        {
            "input_ids": [10, 11, 12, 16, 17, 18, 7, 8, 9],
            "labels": [-100, -100, 12, 16, 17, 18, -100, 8, 9],
            "position_ids": [0, 1, 2, 3, 4, 5, 0, 1, 2],
            "seq_lengths": [6, 3],
            "document_lengths": [6, 3],
        }
    ]


def test_many_shards_hold_what_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = prepared(random_store(), "best_fit")
    write(cell, tmp_path / "one")
    monkeypatch.setattr(export, "_SHARD_TOKENS", 100)
    monkeypatch.setattr(export, "_BATCH_TOKENS", 50)
    notes: list[tuple[int, int, str]] = []
    export.export(cell, tmp_path / "many", lambda *note: notes.append(note))
    assert len(list((tmp_path / "many" / "train").glob("data-*.arrow"))) > 3
    for split in ("train", "validation"):
        assert loaded(tmp_path / "many", split).to_list() == loaded(tmp_path / "one", split).to_list()
    assert notes[-1][0] == notes[-1][1] == cell.index.tokens.sum() + cell.validation.tokens.sum()  # type: ignore[union-attr]
    assert len(notes) > len(list((tmp_path / "many").rglob("data-*.arrow")))


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 20))
def test_no_row_is_in_two_shards_or_in_none(sizes: list[int], most: int) -> None:
    bounds = export.runs(np.array(sizes, np.int64), most)
    assert bounds == sorted(set(bounds))
    assert bounds[0] == 0
    assert bounds[-1] == len(sizes)
    assert all(sum(sizes[a:b]) < most + max(sizes) for a, b in pairwise(bounds))


def test_the_directory_is_a_dataset_for_both_ways_of_opening_one(tmp_path: Path) -> None:
    import datasets

    write(prepared(random_store(), "best_fit"), tmp_path / "out")
    saved = datasets.load_from_disk(str(tmp_path / "out"))
    read = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert set(saved) == set(read) == {"train", "validation"}
    for split in saved:
        assert saved[split].features == datasets.Features(
            {name: datasets.List(datasets.Value("int32")) for name in export.COLUMNS}
        )
        assert saved[split].to_list() == read[split].to_list()


def test_nothing_held_out_makes_no_empty_split(tmp_path: Path) -> None:
    import datasets

    write(prepared(random_store(), "best_fit", validation=None), tmp_path / "out")
    assert set(datasets.load_from_disk(str(tmp_path / "out"))) == {"train"}
    assert "validation" not in (tmp_path / "out" / "README.md").read_text()


def test_equal_cells_give_equal_bytes_and_the_checksums_are_theirs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    cell = prepared(random_store(), "best_fit", tokenizer=tmp_path / "tokenizer")
    about = write(cell, tmp_path / "a")
    write(cell, tmp_path / "b")
    there = {path.relative_to(tmp_path / "a"): path for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert set(about["files"]) == {path.as_posix() for path in there} - {"packcli.json"}
    assert "tokenizer/tokenizer.json" in about["files"]
    for name, path in there.items():
        assert path.read_bytes() == (tmp_path / "b" / name).read_bytes()
    for name, said in about["files"].items():
        assert hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest() == said["sha256"]
    assert json.loads((tmp_path / "a" / "packcli.json").read_text()) == about


def test_a_new_export_is_never_taken_for_a_cached_old_one(tmp_path: Path) -> None:
    cell = prepared(random_store(), "best_fit")
    others = (
        cell,
        replace(cell, order=cell.order.model_copy(update={"id": "i1"})),
        replace(cell, arm=ArmSpec.model_validate(ARMS["greedy"])),
    )
    fingerprints = set()
    for other in others:
        write(other, tmp_path / "out")
        fingerprints |= {loaded(tmp_path / "out", split)._fingerprint for split in ("train", "validation")}
    assert len(fingerprints) == 2 * len(others)


def test_files_that_are_no_export_are_never_deleted(tmp_path: Path) -> None:
    cell = prepared(random_store(), "best_fit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not an export"):
        write(cell, tmp_path / "mine")
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(ConfigError, match="is a file"):
        write(cell, tmp_path / "file")
    write(cell, tmp_path / "out")
    (tmp_path / "out" / "train" / "cache-1.arrow").write_text("of datasets")
    write(cell, tmp_path / "out")
    (tmp_path / "out" / "checkpoint.txt").write_text("keep me")
    with pytest.raises(ConfigError, match=r"checkpoint\.txt"):
        write(cell, tmp_path / "out")
    assert (tmp_path / "mine" / "notes.txt").read_text() == (tmp_path / "out" / "checkpoint.txt").read_text()


def test_an_interrupted_export_leaves_the_earlier_one_whole(tmp_path: Path) -> None:
    cell = prepared(random_store(), "best_fit")
    before = write(cell, tmp_path / "out")

    def stop(done: int, total: int, remark: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.export(prepared(random_store(seed=1), "best_fit"), tmp_path / "out", stop)
    assert json.loads((tmp_path / "out" / "packcli.json").read_text()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_exporting_loads_neither_torch_nor_datasets(tmp_path: Path) -> None:
    heavy = {"torch", "datasets", "transformers"}
    code = f"import sys; from packcli.data import export, tokenized; print(*{heavy!r} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# What others make of it --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny Llama with random weights; its attention is chosen by each test."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def our_loss(cell: export.Prepared, rows: list[int], model: Any) -> float:
    """Loss per supervised token of these rows, as packcli computes it."""
    import torch

    from packcli.model import attention
    from packcli.model.collate import collate
    from packcli.model.trainee import Trainee

    model.set_attn_implementation(attention.NAME)
    backend = attention.choose("auto", torch.device("cpu"), torch.float32)
    batch = collate(cell.tokens, cell.index, rows, cell.arm, cell.order.max_length, cell.pad_id)  # type: ignore[arg-type]
    with torch.no_grad():
        return float(Trainee(model, backend)(batch)) / len(batch.labels)


def readme_collator(directory: Path) -> Any:
    """The collator that the export's README tells users of transformers to take."""
    [code] = re.findall(r"```python\n(import torch.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["flatten"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arm", ["padding", "padding_free", "random", "greedy", "best_fit"])
def test_a_plain_transformers_model_has_the_same_loss_on_an_export(
    arm: str, attention: str, model: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import DataCollatorWithFlattening

    cell = prepared(random_store(), arm)
    write(cell, tmp_path / "out")
    data, collator = loaded(tmp_path / "out"), readme_collator(tmp_path / "out")
    assert arm not in SEVERAL or max(map(len, data["document_lengths"])) > 1
    # One row at a time and, where positions alone tell rows apart, several.
    for rows in ([0], [3, 0, 5]):
        ours = our_loss(cell, rows, model)
        model.set_attn_implementation(attention)
        with torch.no_grad():
            theirs = float(model(**collator([data[row] for row in rows]), use_cache=False).loss)
            # What the README says of transformers' own collator: right, unless documents of a row are kept apart.
            named = [{name: data[row][name] for name in ("input_ids", "labels")} for row in rows]
            flattened = float(model(**DataCollatorWithFlattening()(named), use_cache=False).loss)
        assert theirs == pytest.approx(ours, rel=1e-5)
        if arm != "best_fit":
            assert flattened == pytest.approx(ours, rel=1e-5)


def test_what_the_readme_warns_of_does_change_the_loss(model: Any, tmp_path: Path) -> None:
    import torch
    from transformers import DataCollatorWithFlattening

    cell = prepared(random_store(), "best_fit")
    write(cell, tmp_path / "out")
    assert "Do not use `DataCollatorWithFlattening`" in (tmp_path / "out" / "README.md").read_text()
    row = {name: loaded(tmp_path / "out")[0][name] for name in ("input_ids", "labels")}
    ours = our_loss(cell, [0], model)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        theirs = float(model(**DataCollatorWithFlattening()([row]), use_cache=False).loss)
    assert abs(theirs - ours) > 1e-4 * ours


@pytest.mark.parametrize(("attention", "positions"), [("document", "continue"), ("causal", "reset")])
def test_an_arm_that_others_train_as_its_opposite_is_handed_on_without_a_recipe(
    attention: str, positions: str, model: Any, tmp_path: Path
) -> None:
    import torch

    write(prepared(random_store(), "best_fit"), tmp_path / "plain")
    arm = ArmSpec.model_validate({**ARMS["best_fit"], "attention": attention, "positions": positions})
    cell = replace(prepared(random_store(), "best_fit"), arm=arm)
    write(cell, tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "None of the three trains this arm" in readme
    assert "```" not in readme
    assert max(map(len, readme.splitlines())) < 130
    row = loaded(tmp_path / "out")[0]
    assert len(row["document_lengths"]) > 1
    ours = our_loss(cell, [0], model)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        theirs = float(model(**readme_collator(tmp_path / "plain")([row]), use_cache=False).loss)
    assert abs(theirs - ours) > 1e-4 * ours


@pytest.mark.parametrize("arm", list(ARMS))
def test_the_readme_of_every_arm_can_be_written(arm: str) -> None:
    from packcli.data import export_readme

    about = export._about(
        prepared(random_store(), "best_fit"), {"train": prepared(random_store(), "best_fit").index}
    )
    spec = ArmSpec.model_validate(ARMS[arm])
    text = export_readme.text(about, spec, True)
    assert not re.search(r"[{]\w+[}]", text)
    assert ("padding_free=True," in text) == (spec.attention == "document" and spec.layout != "pad")
    assert max(map(len, text.splitlines())) < 130


# What comes back ---------------------------------------------------------------------------------------


@st.composite
def stores(draw: st.DrawFn) -> Store:
    """Documents with a label each: others never leave."""
    documents = []
    for _ in range(draw(st.integers(1, 10))):
        length = draw(st.integers(2, 20))
        ids = draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
        cuts = sorted({1, *draw(st.sets(st.integers(2, length), min_size=1, max_size=5))})
        documents.append(document(ids, *zip(cuts[::2], cuts[1::2], strict=False)))
    return Store(documents)


def plain(documents: list[Document]) -> list[tuple[list[int], list[list[int]]]]:
    return [(each.ids.tolist(), each.spans.tolist()) for each in documents]


def exported(cell: export.Prepared) -> list[dict[str, Any]]:
    """The records of an export, without the files."""
    records: list[dict[str, Any]] = export.batch(
        cell.tokens, cell.index, cell.arm, 0, cell.index.rows.num_rows
    ).to_pylist()
    return records


@given(stores(), st.sampled_from(WHOLE))
def test_a_round_trip_gives_back_every_document_and_span(store: Store, arm: str) -> None:
    cell = prepared(store, arm, max_length=20)
    back = [each for record in exported(cell) for each in tokenized.documents(record)]
    assert sorted(plain(back)) == sorted(plain(store.documents))


@given(stores(), st.integers(2, 12))
def test_cut_documents_come_back_as_their_pieces(store: Store, max_length: int) -> None:
    cell = prepared(store, "random", max_length=max_length)
    rows = cell.index.rows
    expected = []
    for piece in range(len(rows.document)):
        start, stop = int(rows.start[piece]), int(rows.stop[piece])
        spans = np.clip(store.supervised(int(rows.document[piece])) - start, 1, max(1, stop - start))
        ids = store.ids(int(rows.document[piece]))[start:stop]
        expected.append((ids.tolist(), spans[spans[:, 0] < spans[:, 1]].tolist()))
    back = []
    for number, record in enumerate(exported(cell)):
        if cell.index.supervised[number]:
            back += plain(tokenized.documents(record))
        else:
            with pytest.raises(chat.Rejected, match="no supervised token"):
                tokenized.documents(record)
            back += expected[rows.offsets[number] : rows.offsets[number + 1]]
    assert back == expected


ONE = [([5, 6, 7], [[1, 3]])]
TWO = [([5, 6], [[1, 2]]), ([7, 8, 9], [[2, 3]])]
ROW = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, -100, 9]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"input_ids": [5, 6, 7]}, ONE),
        ({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, ONE),
        ({"input_ids": np.array([5, 6, 7]), "labels": np.array([-100, 6, 7])}, ONE),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": None}, ONE),
        ({"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1]}, ONE),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 1]}, ONE),
        ({"input_ids": [5, 6, 7], "completion_mask": [False, True, False]}, [([5, 6, 7], [[1, 2]])]),
        # Padding: right, left, labelled by a careless collator, without a mask, and one that is no padding.
        ({"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}, ONE),
        ({"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]}, ONE),
        ({"input_ids": [5, 6, 7, 0], "labels": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]}, ONE),
        ({"input_ids": [5, 6, 7, 7, 7], "labels": [-100, 6, 7, -100, -100]}, ONE),
        ({"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100]}, [([5, 6, 7, 0], [[1, 3]])]),
        # Packed rows.
        ({**ROW, "seq_lengths": [2, 3]}, TWO),
        ({**ROW, "seq_lengths": [5], "document_lengths": [2, 0, 3]}, TWO),
        ({**ROW, "position_ids": [0, 1, 0, 1, 2]}, TWO),
        ({**ROW, "position_ids": [0, 1, 7, 8, 9]}, TWO),
        ({**ROW, "attention_mask": [1, 1, 2, 2, 2]}, TWO),
        (
            {
                "input_ids": [*ROW["input_ids"], 0, 0],
                "labels": [*ROW["labels"], -100, -100],
                "seq_lengths": [2, 3],
            },
            TWO,
        ),
        (
            {
                "input_ids": [*ROW["input_ids"], 0, 0],
                "labels": [*ROW["labels"], -100, -100],
                "seq_lengths": [2, 5],
                "attention_mask": [1, 1, 1, 1, 1, 0, 0],
            },
            TWO,
        ),
        (
            {
                "input_ids": [*ROW["input_ids"], 0, 0],
                "labels": [*ROW["labels"], -100, -100],
                "position_ids": [0, 1, 0, 1, 2, 0, 0],
            },
            TWO,
        ),
        # The first token of the second document is labelled: nothing predicts it.
        ({"input_ids": [5, 6, 7, 8], "seq_lengths": [2, 2]}, [([5, 6], [[1, 2]]), ([7, 8], [[1, 2]])]),
    ],
)
def test_padding_and_packing_of_others_are_undone(record: dict[str, Any], expected: Any) -> None:
    assert plain(tokenized.documents(record)) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"input_ids": []}, "is empty"),
        ({"input_ids": None}, "is missing"),
        ({"input_ids": "5 6"}, "not a list of whole numbers"),
        ({"input_ids": [5.0, 6.0]}, "not a list of whole numbers"),
        ({"input_ids": [[5, 6]]}, "not a list of whole numbers"),
        ({"input_ids": [[5], [6, 7]]}, "not a list of whole numbers"),
        ({"input_ids": [5, None]}, "not a list of whole numbers"),
        ({"input_ids": [5, -1]}, "holds -1"),
        ({"input_ids": [5, 2**31]}, "no token id"),
        ({"input_ids": [5, 6], "labels": [-100]}, "`labels` has 1 values, `input_ids` has 2"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, r"`labels\[0\]` is 6, `input_ids\[0\]` 5"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "no supervised token"),
        ({"input_ids": [5, 6], "labels": [5, -100]}, "no supervised token"),
        ({"input_ids": [5]}, "no supervised token"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "nothing but padding"),
        ({"input_ids": [5, 6], "seq_lengths": [3]}, "documents of 3 tokens in a row of 2"),
        ({"input_ids": [5, 6, 7], "seq_lengths": [2]}, "documents of 2 tokens in a row of 3"),
        ({"input_ids": [5, 6, 7], "seq_lengths": [4, -1]}, "negative"),
    ],
)
def test_a_row_that_cannot_be_trained_on_says_why(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(chat.Rejected, match=reason):
        tokenized.documents(record)


def test_the_same_tokens_are_held_out_together_whatever_is_supervised() -> None:
    one, other = document([1, 2, 3], (1, 2)), document([1, 2, 3], (2, 3))
    assert tokenized.content_hash(one) == tokenized.content_hash(other)
    assert tokenized.content_hash(one) != tokenized.content_hash(document([1, 2, 4], (1, 2)))
    assert 0 <= tokenized.content_hash(one) < 2**64


def test_documents_become_a_store_without_a_shift() -> None:
    given_ = [document([5, 6, 7], (1, 3)), document([8]), document([9, 9], (1, 2))]
    flat = tokenized.encoded(given_)
    assert flat.ids.tolist() == [5, 6, 7, 8, 9, 9]
    assert flat.offsets.tolist() == [0, 3, 4, 6]
    assert flat.spans.tolist() == [[1, 3], [1, 2]]
    assert flat.span_offsets.tolist() == [0, 1, 1, 2]
    assert tokenized.encoded([]).offsets.tolist() == [0]
