"""Boundary tokens: what would be trained on, counted or lost if a mark between documents were taken for data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_index import CLEAN, index_order
from training import BACKEND, LLAMA, Data, assert_close, gradients

from packcli.config import ARMS, ArmSpec, ModelSpec
from packcli.data import framed, index
from packcli.data.framed import Framed, Marks
from packcli.data.index import Index
from packcli.errors import ConfigError, DataError
from packcli.files import read_jsonl
from packcli.model import load
from packcli.model.collate import Batch, collate
from packcli.model.trainee import Trainee

BOS, EOS = 1, 2
MARKS = {"none": framed.NONE, "eos": Marks(None, EOS), "bos_eos": Marks(BOS, EOS)}
OFFERED, HELD_OUT = 2**63, 0

Ids = list[int]


class Listed:
    """A token store of a list of (ids, spans, content)."""

    def __init__(self, documents: list[tuple[Ids, list[tuple[int, int]], int]]) -> None:
        self.documents = documents
        flat = [(n, *span) for n, (_, spans, _) in enumerate(documents) for span in spans]
        self.num_documents = len(documents)
        self.lengths = np.array([len(ids) for ids, _, _ in documents], np.int64)
        self.content = np.array([content for *_, content in documents], np.uint64)
        self.spans: Any = tuple(np.array(flat, np.int64).reshape(-1, 3).T)
        self.ends: Any = tuple(np.array([ids[end] for ids, _, _ in documents], np.int64) for end in (0, -1))

    def ids(self, document: int) -> Any:
        return np.array(self.documents[document][0], np.int32)

    def supervised(self, document: int) -> Any:
        return np.array(self.documents[document][1], np.int32).reshape(-1, 2)

    def framed(self, document: int, boundary: str) -> list[tuple[int, bool, bool]]:
        """(id, supervised, belongs to the document), token by token, as the words of `ArmSpec` have it."""
        ids, spans, _ = self.documents[document]
        tokens = [(id_, any(a <= n < b for a, b in spans), True) for n, id_ in enumerate(ids)]
        before = [(BOS, False, False)] if boundary == "bos_eos" and ids[0] != BOS else []
        return before + tokens + ([(EOS, False, False)] if boundary != "none" and ids[-1] != EOS else [])


@st.composite
def stores(draw: st.DrawFn) -> Listed:
    documents = []
    for _ in range(draw(st.integers(1, 10))):
        ids = draw(st.lists(st.integers(BOS, 9), min_size=1, max_size=25))
        edges = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=4)))
        spans = list(zip(edges[::2], edges[1::2], strict=False))
        documents.append((ids, spans, draw(st.sampled_from([OFFERED, OFFERED, HELD_OUT]))))
    return Listed(documents)


@given(stores(), st.integers(2, 40), st.sampled_from(CLEAN), st.sampled_from(["eos", "bos_eos"]))
def test_marks_are_in_the_rows_and_in_no_count_of_tokens_or_labels(
    store: Listed, max_length: int, arm: str, boundary: Any
) -> None:
    order = index_order(arm, max_length)
    order = order.model_copy(update={"layout": order.layout.model_copy(update={"boundary": boundary})})
    try:
        built, held, ledger = index.build(order, store, store.num_documents, 0, MARKS[boundary])
    except DataError:
        return
    rows = [_tokens(store, built, row, boundary) for row in range(built.rows.num_rows)]
    assert all(0 < len(row) <= max_length for row in rows)
    assert ledger["tokens_kept"] == sum(own for row in rows for _, _, own, _ in row)
    assert ledger["tokens_boundary"] == sum(not own for row in rows for _, _, own, _ in row)
    assert ledger["tokens_supervised"] == sum(label and not first for row in rows for _, label, _, first in row)
    assert built.tokens.tolist() == [sum(own for _, _, own, _ in row) for row in rows]
    assert built.filled.tolist() == [len(row) for row in rows]
    assert ledger["rows"] >= ledger["rows_lower_bound"]
    whole = ARMS[arm]["overlong"] == "none"
    kept = [n for n in range(store.num_documents) if n in built.rows.document]
    assert ledger["tokens_truncated"] == sum(
        sum(own for _, _, own in store.framed(n, boundary)[max_length:]) for n in kept if not whole
    )
    # What the packer was given lies in the rows, mark by mark and token by token.
    assert sorted(token[:3] for row in rows for token in row) == sorted(
        token for n in kept for token in store.framed(n, boundary)[: None if whole else max_length]
    )
    # Held-out documents stand as they are, so that losses compare between arms.
    assert held.boundary.sum() == 0
    plain = index.build(index_order(arm, max_length), store, store.num_documents, 0)[1]
    assert (held.rows.document.tolist(), held.rows.stop.tolist()) == (
        plain.rows.document.tolist(),
        plain.rows.stop.tolist(),
    )


def _tokens(store: Listed, built: Index, row: int, boundary: str) -> list[tuple[int, bool, bool, bool]]:
    """(id, supervised, of a document, first of its document in the row) of each slot that is no padding."""
    found: list[tuple[int, bool, bool, bool]] = []
    for piece in range(built.rows.offsets[row], built.rows.offsets[row + 1]):
        document = int(built.rows.document[piece])
        start, stop = int(built.rows.start[piece]), int(built.rows.stop[piece])
        for place, token in enumerate(store.framed(document, boundary)[start:stop]):
            found.append((*token, place == 0))
    return found


@given(stores(), st.integers(2, 40), st.sampled_from(CLEAN))
def test_documents_that_have_their_marks_get_no_second_ones(store: Listed, max_length: int, arm: str) -> None:
    marked = Listed([([BOS, *ids, EOS], spans, content) for ids, spans, content in store.documents])
    try:
        plain = index.build(index_order(arm, max_length), marked, marked.num_documents, 0)
    except DataError:
        return
    again = index.build(index_order(arm, max_length), marked, marked.num_documents, 0, MARKS["bos_eos"])
    assert plain[2] == again[2]
    assert plain[0].rows.document.tolist() == again[0].rows.document.tolist()
    assert plain[0].rows.stop.tolist() == again[0].rows.stop.tolist()


@given(stores(), st.sampled_from(list(MARKS)))
def test_what_is_read_is_what_was_counted(store: Listed, boundary: str) -> None:
    counted, read = Framed(store, MARKS[boundary]), framed.reader(store, MARKS[boundary])
    document, start, stop = counted.spans
    for number in range(store.num_documents):
        expected = store.framed(number, boundary)
        assert read.ids(number).tolist() == [id_ for id_, _, _ in expected]
        assert counted.lengths[number] == len(expected)
        spans = [list(span) for span in zip(start[document == number], stop[document == number], strict=True)]
        assert read.supervised(number).tolist() == spans
        assert {p for a, b in spans for p in range(a, b)} == {n for n, (_, on, _) in enumerate(expected) if on}


def test_an_index_with_boundary_tokens_is_read_back_and_others_stay_as_they_were(tmp_path: Path) -> None:
    store = Listed([([5, 6, 7], [(1, 3)], OFFERED), ([8, EOS], [(1, 2)], OFFERED)])
    for boundary, expected in (("none", [0]), ("eos", [1])):
        built, _, _ = index.build(index_order("best_fit", 8, 0.0), store, 2, 0, MARKS[boundary])
        index.write(tmp_path / boundary, built)
        assert index.read(tmp_path / boundary).boundary.tolist() == built.boundary.tolist() == expected
    assert b"boundary" not in (tmp_path / "none").read_bytes()


# Training ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("framed"), "tiny", 40)


def _batch(data: Data, name: str, marks: Marks, **changes: object) -> tuple[Batch, Index]:
    arm = ArmSpec.model_validate(ARMS[name] | changes)
    order = index_order(name, 192).model_copy(update={"layout": arm.rows})
    built, _, _ = index.build(order, data.tokens, 40, 0, marks)
    read = framed.reader(data.tokens, marks)
    return collate(read, built, range(built.rows.num_rows), arm, 192, 0), built


def test_packed_equals_unpacked_with_marks_around_documents(data: Data) -> None:
    marks = Marks(data.tokenizer.pad_token_id, data.tokenizer.convert_tokens_to_ids("<|im_start|>"))
    spec = ModelSpec(config=LLAMA, tokenizer="train", vocab_size=600)
    model = Trainee(load.load(spec, None, data.tokenizer, 192, 0), BACKEND)
    packed, rows = _batch(data, "best_fit", marks)
    apart, alone = _batch(data, "padding", marks)
    assert int(rows.boundary.sum()) == int(alone.boundary.sum()) == 2 * int(rows.documents.sum())
    assert_close(gradients(model, [packed]), gradients(model, [apart]))
    bare = gradients(model, [_batch(data, "padding", framed.NONE)[0]])
    assert bare[0] != pytest.approx(gradients(model, [apart])[0], rel=1e-4)  # the marks are seen


def test_a_mark_is_never_a_label_and_ends_the_loss_of_no_document(data: Data) -> None:
    mark = data.tokenizer.pad_token_id
    for name in ("best_fit", "random", "padding_free"):
        plain, _ = _batch(data, name, framed.NONE)
        marked, built = _batch(data, name, Marks(None, mark))
        assert not (marked.labels == mark).any()
        assert int((marked.input_ids == mark).sum()) >= int(built.boundary.sum()) > 0
        if name != "random":  # it cuts documents, and the first token of a piece is no label
            assert torch.equal(marked.labels.sort().values, plain.labels.sort().values)


# As a user types it ------------------------------------------------------------------------------------


def test_a_tokenizer_without_the_token_is_refused_by_name() -> None:
    class Eos:
        eos_token_id = EOS
        bos_token_id = None

    assert framed.marks("eos", Eos) == Marks(None, EOS)
    with pytest.raises(ConfigError, match=r"bos_eos.*lacks: bos"):
        framed.marks("bos_eos", Eos)


@pytest.mark.parametrize("name", [name for name in ARMS if name.endswith("_released")])
def test_the_released_code_puts_nothing_between_documents(name: str) -> None:
    with pytest.raises(ValueError, match="boundary"):
        ArmSpec.model_validate(ARMS[name] | {"boundary": "eos"})


@pytest.mark.slow
def test_a_sweep_over_boundary_tokens_counts_trains_and_exports_them(
    tmp_path: Path, run_cli: Callable[..., Any], tiny_sweep: Callable[..., Path]
) -> None:
    import datasets

    sweep = tiny_sweep(arms=["best_fit", "marked"], data={"template": "chatml", "max_length": 256})
    sweep.write_text(f"{sweep.read_text()}arms:\n  marked: {{extends: best_fit, boundary: eos}}\n")
    done = run_cli("prepare", sweep, "--json", "--export", "out", "--show", 3, cwd=tmp_path)
    assert done.code == 0, done.stderr
    plain, marked = (cell["ledger"] for cell in done.json()["cells"])
    assert plain["tokens_boundary"] == 0
    assert marked["tokens_boundary"] == marked["documents_kept"] == plain["documents_kept"]
    assert marked["slots"] == marked["tokens_kept"] + marked["tokens_padding"] + marked["tokens_boundary"]

    held, rows = (datasets.load_from_disk(str(path)) for path in sorted((tmp_path / "out").iterdir()))
    assert sum(map(len, rows["train"]["input_ids"])) == marked["tokens_kept"] + marked["tokens_boundary"]
    assert list(rows["validation"]["input_ids"]) == list(held["validation"]["input_ids"])

    done = run_cli("sweep", sweep, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    trained = {row["labels"]["arm"]: row["train"] for row in done.json()["rows"]}
    assert trained["marked"]["final_loss"] != trained["best_fit"]["final_loss"]
    spent = [read_jsonl(path) for path in (tmp_path / "runs" / "store" / "train").glob("*/metrics.jsonl")]
    assert {(sum(step["tokens"] for step in steps), sum(step["slots"] for step in steps)) for steps in spent} == {
        (ledger["tokens_kept"], ledger["slots"]) for ledger in (plain, marked)
    }
    planned = run_cli("prepare", sweep, "--plan", "--json", cwd=tmp_path)
    assert planned.code == 0, planned.stderr

    sweep.write_text(sweep.read_text().replace("boundary: eos", "boundary: bos_eos"))
    refused = run_cli("prepare", sweep, cwd=tmp_path)
    assert refused.code == 2, refused.stderr
    assert "lacks: bos" in refused.stderr
