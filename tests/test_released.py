"""The paper's released packers: their rows, and their mistakes, exactly."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from packcli.packing import Rows
from packcli.released import concat, first_fit_decreasing, truncate_per_turn, validation_rows, windows

Ints = NDArray[np.int64]
Piece = tuple[int, int, int]  # document, start, stop

thorough = settings(max_examples=300, deadline=None)
lengths_and_bounds = st.lists(st.lists(st.integers(1, 60), max_size=25), max_size=5)


def ints(values: list[int]) -> Ints:
    return np.array(values, np.int64)


def laid_out(windowed: list[list[int]]) -> tuple[Ints, Ints]:
    """All lengths, and the bounds of the windows."""
    return ints([n for window in windowed for n in window]), ints([0, *np.cumsum([len(w) for w in windowed])])


def pieces(rows: Rows) -> list[list[Piece]]:
    assert all(x.dtype == np.int64 for x in (rows.document, rows.start, rows.stop, rows.offsets))
    assert rows.offsets[-1] == len(rows.document) == len(rows.start) == len(rows.stop)
    flat = list(zip(rows.document.tolist(), rows.start.tolist(), rows.stop.tolist(), strict=True))
    return [flat[first:last] for first, last in pairwise(rows.offsets.tolist())]


# Windows


@pytest.mark.parametrize("num_documents", [0, 1, 2, 7, 64, 65, 1000, 1999])
@pytest.mark.parametrize(("window", "workers"), [(1, 1), (3, 2), (10, 64), (1000, 1), (1000, 7)])
def test_windows_are_the_batches_of_datasets_map(num_documents: int, window: int, workers: int) -> None:
    bounds = windows(num_documents, window, workers)
    assert bounds.dtype == np.int64
    dataset = Dataset.from_dict({"n": list(range(num_documents))})
    parts = min(workers, num_documents)
    shards = (dataset.shard(parts, part, contiguous=True) for part in range(parts))
    batches = [batch["n"] for shard in shards for batch in shard.iter(window)]
    assert [list(range(first, last)) for first, last in pairwise(bounds.tolist())] == batches


def test_windows_are_those_that_a_pool_of_workers_saw() -> None:
    seen = Dataset.from_dict({"n": list(range(23))}).map(
        lambda batch: {"first": [batch["n"][0]] * len(batch["n"])}, batched=True, batch_size=4, num_proc=3
    )
    assert sorted(set(seen["first"])) == windows(23, 4, 3)[:-1].tolist()


# "Random"


def slow_concat(windowed: list[list[int]], max_length: int, keep_remainder: bool) -> list[list[Piece]]:
    """Token by token: (document, position) in file order, cut in rows, rows back to pieces."""
    rows, document = [], 0
    for window in windowed:
        stream = []
        for length in window:
            stream += [(document, position) for position in range(length)]
            document += 1
        for first in range(0, len(stream), max_length):
            tokens = stream[first : first + max_length]
            if len(tokens) == max_length or keep_remainder:
                row: list[Piece] = []
                for owner, position in tokens:
                    if row and row[-1][0] == owner:
                        row[-1] = (owner, row[-1][1], position + 1)
                    else:
                        row.append((owner, position, position + 1))
                rows.append(row)
    return rows


@thorough
@given(windowed=lengths_and_bounds, max_length=st.integers(1, 80), keep_remainder=st.booleans())
@example(windowed=[[3, 4, 2], [9]], max_length=5, keep_remainder=False)
@example(windowed=[[3], [], [2, 3]], max_length=5, keep_remainder=False)
@example(windowed=[[5], [5]], max_length=5, keep_remainder=False)
@example(windowed=[], max_length=5, keep_remainder=True)
def test_concat_is_cut_where_token_by_token_would_cut(
    windowed: list[list[int]], max_length: int, keep_remainder: bool
) -> None:
    lengths, bounds = laid_out(windowed)
    rows = concat(lengths, max_length, bounds, keep_remainder=keep_remainder)
    assert pieces(rows) == slow_concat(windowed, max_length, keep_remainder)


def test_many_workers_lose_a_small_set() -> None:
    # 64 windows of 15 or 16 documents: each loses the rest of its last row.
    lengths = np.random.default_rng(0).integers(100, 500, 1000)
    alone, spread = (concat(lengths, 4096, windows(1000, 1000, workers)) for workers in (1, 64))
    assert alone.tokens().sum() > 0.98 * lengths.sum()
    assert 0.5 * lengths.sum() < spread.tokens().sum() < 0.9 * lengths.sum()


# "Greedy"


def slow_first_fit_decreasing(windowed: list[list[int]], max_length: int) -> list[list[Piece]]:
    """Turn by turn over a window's documents, longest first, on a set of those not yet in a row."""
    rows, first = [], 0
    for window in windowed:
        ranked = sorted(range(len(window)), key=lambda place: -window[place])
        unused = set(ranked)
        for turn in ranked:
            if turn not in unused:
                continue
            row: list[Piece] = []
            for place in ranked:
                if place in unused and sum(stop for _, _, stop in row) + window[place] <= max_length:
                    row.append((first + place, 0, window[place]))
                    unused.remove(place)
            rows.append(row or [(first + turn, 0, max_length)])
        first += len(window)
    return rows


@thorough
@given(windowed=lengths_and_bounds, max_length=st.integers(1, 80))
@example(windowed=[[150, 130, 60, 50, 40, 30, 20, 10]], max_length=100)
@example(windowed=[[150, 130]], max_length=100)
@example(windowed=[[10, 150, 10, 130, 120]], max_length=100)
@example(windowed=[[5, 5, 5], [], [5, 5]], max_length=10)
@example(windowed=[], max_length=10)
def test_first_fit_decreasing_is_the_turn_by_turn_rule(windowed: list[list[int]], max_length: int) -> None:
    lengths, bounds = laid_out(windowed)
    assert pieces(first_fit_decreasing(lengths, max_length, bounds)) == slow_first_fit_decreasing(
        windowed, max_length
    )


def test_an_over_long_document_is_lost_while_any_other_is_left() -> None:
    rows = first_fit_decreasing(ints([150, 130, 60, 50, 40, 30, 20, 10]), 100, ints([0, 8]))
    assert [[stop for _, _, stop in row] for row in pieces(rows)] == [[60, 40], [50, 30, 20], [10]]
    assert not {0, 1} & set(rows.document.tolist())


def test_an_over_long_document_is_cut_where_it_is_the_last() -> None:
    rows = first_fit_decreasing(ints([7, 150, 130, 90]), 100, ints([0, 1, 4]))
    assert pieces(rows) == [[(0, 0, 7)], [(3, 0, 90)], [(2, 0, 100)]]


def test_equal_documents_go_in_file_order() -> None:
    rows = first_fit_decreasing(ints([5, 5, 5, 5, 5]), 10, ints([0, 5]))
    assert rows.document.tolist() == [0, 1, 2, 3, 4]


# Truncation


def slow_truncation(turns: list[tuple[int, int]], max_length: int) -> list[tuple[int, int]]:
    """On lists of tokens, as slices: what the targets may have first, then the sources the rest."""
    kept, used = [], 0
    for source, target in turns:
        room = max_length - used
        if room <= 0:
            return kept
        for_target = max(1, int(room * (target / (source + target))))
        for_source = room - (for_target if for_target < target else target)
        tokens = [0] * source, [0] * target
        kept.append((len(tokens[0][:for_source]), len(tokens[1][:for_target])))
        used += sum(kept[-1])
    return kept


turns_drawn = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 90)), max_size=8)


@thorough
@given(turns=turns_drawn, max_length=st.integers(1, 300))
@example(turns=[(30, 20), (60, 40)], max_length=100)
@example(turns=[(2, 3)], max_length=5)
@example(turns=[(90, 1), (5, 5)], max_length=10)
@example(turns=[(90, 0)], max_length=10)
def test_turns_are_cut_in_proportion(turns: list[tuple[int, int]], max_length: int) -> None:
    sources, targets = [s for s, _ in turns], [t for _, t in turns]
    kept = truncate_per_turn(sources, targets, max_length)
    assert kept == slow_truncation(turns, max_length)
    assert sum(map(sum, kept)) <= max_length
    if sum(map(sum, turns)) < max_length:
        assert kept == turns


def test_a_short_last_turn_is_not_lost_when_it_fits_exactly() -> None:
    assert truncate_per_turn([30, 1], [20, 1], 52) == [(30, 20), (1, 1)]
    assert truncate_per_turn([30, 1], [20, 1], 50) == [(30, 20)]
    assert truncate_per_turn([], [], 50) == []


def test_a_turn_that_fits_exactly_may_lose_a_token_to_rounding() -> None:
    assert truncate_per_turn([7], [15], 22) == [(7, 14)]
    assert truncate_per_turn([7], [15], 23) == [(7, 15)]
    assert truncate_per_turn([7, 5], [15, 5], 22) == [(7, 14), (0, 1)]


# Validation


@pytest.mark.parametrize("num_rows", [2, 3, 10, 101, 5000])
@pytest.mark.parametrize(("fraction", "seed"), [(0.1, 42), (0.05, 0), (0.333, 7), (0.007, 1)])
def test_rows_are_held_out_as_datasets_draws_them(num_rows: int, fraction: float, seed: int) -> None:
    split = Dataset.from_dict({"row": list(range(num_rows))}).train_test_split(test_size=fraction, seed=seed)
    train, held_out = validation_rows(num_rows, fraction, seed)
    assert train.tolist() == list(split["train"]["row"])
    assert held_out.tolist() == list(split["test"]["row"])


def test_no_fraction_holds_out_no_row() -> None:
    train, held_out = validation_rows(5, 0.0, 42)
    assert train.tolist() == [0, 1, 2, 3, 4]
    assert held_out.tolist() == []
    assert [part.tolist() for part in validation_rows(1, 0.1, 42)] == [[], [0]]
