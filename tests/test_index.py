"""The row index and the ledger: what would be trained on if packing or accounting went wrong unnoticed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcli import released
from packcli.config import ARMS, LENGTHS_ALONE, ArmSpec
from packcli.data import index
from packcli.errors import DataError, IntegrityError
from packcli.plan import Batching, IndexOrder

RELEASED = [name for name in LENGTHS_ALONE if name.endswith("_released")]
CLEAN = [name for name in LENGTHS_ALONE if name not in RELEASED]


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
        id="i",
        tokens="t",
        max_length=max_length,
        validation=validation,
        seed=seed,
        layout=arm_spec.rows,
        batching=Batching(global_batch=4, batch_unit="rows", micro_batch=2, ranks=1),
        epochs=1,
    )


@given(_documents(), st.integers(2, 40), st.sampled_from(CLEAN), st.integers(0, 3), st.integers(0, 3))
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
    if arm == "sorted":  # what it saves over padding depends on the company; it never computes more
        assert tokens_kept <= ledger["slots"] <= slots
        slots = ledger["slots"]
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
    if ARMS[arm]["layout"] != "pack":
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


@given(_documents(), st.integers(2, 40), st.sampled_from(RELEASED), st.integers(0, 3), st.sampled_from([0.0, 0.3]))
def test_the_ledger_accounts_for_every_token_of_the_released_code(
    fake: FakeTokens, max_length: int, arm: str, seed: int, validation: float
) -> None:
    order = index_order(arm, max_length, validation, seed)
    layout = order.layout.model_copy(update={"workers": 1 + seed, "window": order.layout.window and 3})
    order = order.model_copy(update={"layout": layout})
    try:
        built, held_out, ledger = index.build(order, fake, fake.num_documents + 1, 1)
    except DataError:
        return
    index.check(ledger)
    times: Counter[tuple[int, int]] = Counter()
    for one in (built, held_out):
        for document, start, stop in zip(one.rows.document, one.rows.start, one.rows.stop, strict=True):
            times.update((int(document), position) for position in range(start, stop))
        assert (one.tokens <= max_length).all()
    assert set(times.values()) <= {1}, "a token was packed twice"
    assert ledger["tokens_kept"] + int(held_out.tokens.sum()) == len(times)
    present = {document for document, _ in times}
    assert ledger["documents_dropped"] == fake.num_documents - len(present)
    gone = sum(fake.documents[n][0] for n in set(range(fake.num_documents)) - present)
    if arm == "random_released":
        assert ledger["tokens_truncated"] == 0
        assert ledger["tokens_dropped"] == sum(length for length, _, _ in fake.documents) - len(times)
        assert (built.tokens == max_length).all()
        assert built.supervised.all()
    else:
        assert ledger["tokens_dropped"] == gone


@pytest.mark.parametrize("pad_to", ["longest", "max_length"])
@pytest.mark.parametrize("after", [False, True])
def test_a_packer_that_drops_every_row_says_so(pad_to: Any, after: bool) -> None:
    """Too few documents for 64 workers: each drops the rest of its window, which is all it has."""
    fake = FakeTokens([(10, [(4, 10)], n << 55) for n in range(500)])
    order = index_order("random_released", 4096, 0.1)
    changes = {"pad_to": pad_to, "validation_after_packing": after}
    order = order.model_copy(update={"layout": order.layout.model_copy(update=changes)})
    with pytest.raises(DataError, match="no row is left to train on of"):
        index.build(order, fake, 500, 0)


def test_a_turn_cut_short_keeps_its_place_and_its_first_label() -> None:
    """The released code cuts a turn's source and its answer; the answer then follows on the cut source."""
    fake = FakeTokens([(40, [(20, 40)], 0), (10, [(4, 10)], 0)])
    built, _, ledger = index.build(index_order("padding_released", 20, 0.0), fake, 2, 0)
    kept = released.truncate_per_turn([20], [20], 20)
    assert kept == [(10, 10)]
    rows = [
        list(zip(built.rows.start[a:b].tolist(), built.rows.stop[a:b].tolist(), strict=True))
        for a, b in pairwise(built.rows.offsets)
    ]
    by_document = dict(zip(built.rows.document[built.rows.offsets[:-1]].tolist(), rows, strict=True))
    assert by_document == {0: [(0, 10), (20, 30)], 1: [(0, 10)]}
    assert sorted(built.supervised.tolist()) == [6, 10]
    assert (ledger["tokens_truncated"], ledger["documents_cut"]) == (20, 0)


def test_over_long_documents_are_lost_as_the_released_code_loses_them() -> None:
    lengths = [150, 130, 60, 50, 40, 30, 20, 10]
    fake = FakeTokens([(length, [(1, length)], 0) for length in lengths])
    order = index_order("greedy_released", 100, 0.0)
    order = order.model_copy(update={"layout": order.layout.model_copy(update={"workers": 1})})
    built, _, ledger = index.build(order, fake, 8, 0)
    rows = {tuple(sorted(lengths[d] for d in built.rows.document[a:b])) for a, b in pairwise(built.rows.offsets)}
    assert rows == {(40, 60), (20, 30, 50), (10,)}
    assert (ledger["documents_dropped"], ledger["tokens_dropped"], ledger["tokens_truncated"]) == (2, 280, 0)


def test_dropping_over_long_documents_is_counted_as_dropped() -> None:
    fake = FakeTokens([(40, [(1, 40)], 0), (10, [(4, 10)], 0)])
    order = index_order("best_fit", 20, 0.0)
    order = order.model_copy(update={"layout": order.layout.model_copy(update={"overlong": "drop"})})
    _, _, ledger = index.build(order, fake, 2, 0)
    assert (ledger["documents_dropped"], ledger["tokens_dropped"], ledger["tokens_truncated"]) == (1, 40, 0)
