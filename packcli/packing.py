"""Document lengths -> rows. Pure: no tokens, no files, no clock; numpy, and scipy on sets that are hard to pack.

    one_per_row           every document is its own row (padding, padding_free)
    concat                the whole set end to end in shuffled order, cut at row ends
    next_fit_decreasing   the paper's "greedy" as its text describes it
    first_fit_decreasing  longest first, into the first row with room
    shuffled_first_fit    in shuffled order, into the first row with room
    best_fit              the best of three ways to fill rows: what we recommend
    lower_bound           no packing of whole documents has fewer rows

Most whole-document packers plan on the histogram of lengths (`patterns`) and only then name documents. What
becomes of an over-long document is decided before; how rows become batches, after. The packers of the paper's
released code are in `released`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from packcli import cutting_stock, patterns
from packcli.patterns import Plan, bounds

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

# Documents that are sorted and gathered at once: they stay in the processor's cache, and need no large arrays.
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows as segments, in CSR form: row r holds the segments `offsets[r]:offsets[r + 1]`.

    Lengths [3, 4, 2] joined in that order and cut at 5: row 0 is document 0 and tokens 0:2 of document 1,
    row 1 the rest of document 1 and document 2:

        document [0, 1, 1, 2]   start [0, 0, 2, 0]   stop [3, 2, 4, 2]   offsets [0, 2, 4]
    """

    document: Ints  # [S] position in the `lengths` given
    start: Ints  # [S] first token of the piece
    stop: Ints  # [S] one past its last token
    offsets: Ints  # [R + 1]

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def tokens(self) -> Ints:
        """Tokens in each row, `[R] int64`."""
        ends = bounds(self.stop - self.start)
        return ends[self.offsets[1:]] - ends[self.offsets[:-1]]


def one_per_row(lengths: Ints) -> Rows:
    """Row i is document i, whole: lengths [2, 7] give the rows (0, 0:2) and (1, 0:7)."""
    num_documents = len(_checked(lengths))
    return Rows(
        document=np.arange(num_documents),
        start=np.zeros(num_documents, np.int64),
        stop=lengths.copy(),
        offsets=np.arange(num_documents + 1),
    )


def concat(lengths: Ints, max_length: int, rng: np.random.Generator) -> Rows:
    """Join all documents in an order drawn from `rng`, cut every `max_length` tokens; a short last row stays.

    The paper's "random packing" as its text describes it (arXiv 2410.08081). Lengths [3, 4] at 5, drawn as
    1, 0: row 0 is document 1 and token 0:1 of document 0, row 1 is tokens 1:3 of document 0.
    """
    assert max_length >= 1, max_length
    order = rng.permutation(len(_checked(lengths)))
    joined = lengths[order]
    ends = np.cumsum(joined)
    total = int(ends[-1]) if len(ends) else 0
    row_ends = np.minimum(np.arange(max_length, total + max_length, max_length), total)

    # A row end inside a document makes one more piece of it; one that falls on a document's end does not.
    cut_in = np.searchsorted(ends, row_ends)
    inside = row_ends < ends[cut_in]
    cut_in, cuts = cut_in[inside], row_ends[inside]
    pieces = 1 + np.bincount(cut_in, minlength=len(order))
    joined_index = np.repeat(np.arange(len(order)), pieces)
    piece_end = ends[joined_index]
    piece_end[cut_in + np.arange(len(cuts))] = cuts  # all pieces of a document but its last end at a cut

    stop = piece_end - (ends - joined)[joined_index]
    start = np.zeros_like(stop)
    start[1:] = np.where(joined_index[1:] == joined_index[:-1], stop[:-1], 0)
    offsets = np.zeros(len(row_ends) + 1, np.int64)
    offsets[1:] = np.searchsorted(piece_end, row_ends) + 1
    return Rows(order[joined_index], start, stop, offsets)


def next_fit_decreasing(lengths: Ints, max_length: int, rng: np.random.Generator) -> Rows:
    """Longest first, one row open at a time: the document that does not fit closes it and opens the next.

    "Greedy packing" as the paper's text describes it; its released code is in `released`. Lengths [6, 3, 5, 4]
    at 10: rows (6), (5, 4), (3); 6 + 4 would fit, but 5 has closed that row. Which of equal documents go where,
    and the order of rows and within rows, is drawn from `rng`.
    """
    return _materialise(patterns.next_fit_decreasing(_histogram(lengths, max_length), max_length), lengths, rng)


def first_fit_decreasing(lengths: Ints, max_length: int, rng: np.random.Generator) -> Rows:
    """Longest first, each document into the first row that has room, over the whole set.

    Lengths [6, 3, 5, 4] at 10: rows (6, 4), (5, 3). Which of equal documents go where, and the order of rows and
    within rows, is drawn from `rng`.
    """
    return _materialise(patterns.first_fit_decreasing(_histogram(lengths, max_length), max_length), lengths, rng)


def best_fit(lengths: Ints, max_length: int, rng: np.random.Generator) -> Rows:
    """The best of best-fit decreasing, a subset-sum fill and a linear programme, by number of rows.

    Lengths [5, 4, 4, 3, 2, 2] at 10: best-fit decreasing makes (5, 4), (4, 3, 2), (2); the fill (5, 3, 2),
    (4, 4, 2). The second is tried only where the first leaves room for improvement, the third where both do.
    No document is cut. Which of equal documents go where, and the order of rows and within rows, is drawn from
    `rng`.
    """
    counts = _histogram(lengths, max_length)
    bound, plan = patterns.lower_bound(counts, max_length), patterns.best_fit_decreasing(counts, max_length)
    # With a tail of short documents best-fit decreasing is within a thousandth of the bound: leave it there.
    # Without such a tail it was 0.3 to 10% above where tried, the fill mostly below 1%, but 5% where rows hold two
    # or three documents each. There the programme is within 0.3%. It needs enough rows to round fractions of.
    for improved, more_rows, share in ((patterns.subset_sum_fill, 1, 0.001), (cutting_stock.fill, 2, 0.002)):
        above = plan.num_rows - bound
        if above >= more_rows and above > share * bound:
            plan = min(plan, improved(counts, max_length), key=lambda plan: plan.num_rows)
    return _materialise(plan, lengths, rng)


def shuffled_first_fit(lengths: Ints, max_length: int, rng: np.random.Generator) -> Rows:
    """Documents in an order drawn from `rng`, each into the first row opened that has room.

    LongAlign (arXiv 2401.18058) packs in shuffled order, too; its code looks at the last row only. Lengths
    [6, 5, 3, 4] at 10, drawn in this order: rows (6, 3), (5, 4). The order of rows and within rows is drawn from
    `rng`, too.
    """
    return first_fit(lengths, rng.permutation(len(_checked(lengths))), max_length, rng)


def first_fit(lengths: Ints, order: Ints, max_length: int, rng: np.random.Generator) -> Rows:
    """Documents in the order given, a permutation, each into the first row opened that has room.

    The order of rows and within rows is drawn from `rng`.
    """
    if not _histogram(lengths, max_length).any():
        return one_per_row(lengths)
    row, num_rows = _first_fit(lengths[order].tolist(), max_length)
    row_of = np.empty_like(row)
    row_of[order] = rng.permutation(num_rows)[row]
    document = _shuffled_order(row_of, rng)
    return Rows(
        document=document,
        start=np.zeros(len(document), np.int64),
        stop=lengths[document],
        offsets=bounds(np.bincount(row_of)),
    )


def lower_bound(lengths: Ints, max_length: int) -> int:
    """Rows that whole documents need at least: L2 of Martello and Toth (1990); 0 for the empty set.

    Lengths [7, 7, 7, 5] at 10: the 26 tokens would fit in 3 rows, but nothing here fits beside a 7, so 4.
    """
    return patterns.lower_bound(_histogram(lengths, max_length), max_length)


def _first_fit(lengths: list[int], max_length: int) -> tuple[Ints, int]:
    """The row of each document, `[N] int64`, rows counted as they are opened; and how many rows.

    The free spaces of the rows are the leaves of a binary tree, and a node has the larger of its two: on the way
    down, left is taken where there is room. No two rows hold `max_length` or less between them, so there are
    fewer than 2 * tokens / max_length + 1 of them.
    """
    leaves = 1 << min(len(lengths), 2 * sum(lengths) // max_length + 1).bit_length()
    space = [max_length] * (2 * leaves)
    rows: list[int] = []
    for length in lengths:
        node = 1
        while node < leaves:
            node += node
            if space[node] < length:
                node += 1
        rows.append(node - leaves)
        left = space[node] - length
        while node and space[node] != left:
            space[node] = left
            left = max(left, space[node ^ 1])
            node >>= 1
    return np.array(rows, np.int64), max(rows) + 1


def _materialise(plan: Plan, lengths: Ints, rng: np.random.Generator) -> Rows:
    """Name a plan's documents, at random among equal lengths; shuffle the rows, and the documents in each.

    A group of n rows of c documents is a table [n, c]; a column holds n documents of one length, consecutive
    among all documents sorted by length. A segment is a column and a row of its table.
    """
    if not len(lengths):
        return one_per_row(lengths)
    group_rows = np.array(plan.group_rows, np.int64)
    column_group, column_length = plan.columns()
    by_length = np.argsort(column_length, kind="stable")
    column_place = np.empty_like(column_length)  # where its documents begin among the sorted
    column_place[by_length] = bounds(group_rows[column_group[by_length]])[:-1]
    group_column = bounds(np.bincount(column_group))

    shuffled = rng.permutation(plan.num_rows)
    row_group = np.repeat(np.arange(len(group_rows)), group_rows)[shuffled]
    row_in_group = shuffled - bounds(group_rows)[row_group]
    offsets = bounds(np.diff(group_column)[row_group])

    document = np.empty(len(lengths), np.int64)  # at first, the column of each segment
    for first, last in _blocks(offsets):
        width = np.diff(offsets[first : last + 1])
        segment, row = np.arange(offsets[first], offsets[last]), np.repeat(np.arange(first, last), width)
        column = segment + np.repeat(group_column[row_group[first:last]] - offsets[first:last], width)
        key = _keys(row, column, (len(offsets) - 2, len(column_length) - 1), rng)
        document[offsets[first] : offsets[last]] = _sorted_items(key, len(column_length) - 1)

    # Large arrays are used twice: memory touched for the first time costs as much as a sort.
    stop = _shuffled_order(lengths, rng)
    named = stop.astype(np.int32)
    for first, last in _blocks(offsets):
        at = slice(offsets[first], offsets[last])
        column = document[at]
        place = column_place[column] + np.repeat(row_in_group[first:last], np.diff(offsets[first : last + 1]))
        stop[at] = column_length[column]
        document[at] = named[place]
    return Rows(document, np.zeros(len(lengths), np.int64), stop, offsets)


def _blocks(offsets: Ints) -> Iterator[tuple[int, int]]:
    """Rows first:last, again and again, that hold `_BLOCK` segments or a little more."""
    ends = np.searchsorted(offsets, np.arange(_BLOCK, offsets[-1] + _BLOCK, _BLOCK))
    return pairwise(np.unique(np.minimum(np.append(0, ends), len(offsets) - 1)).tolist())


def _shuffled_order(major: Ints, rng: np.random.Generator) -> Ints:
    """What sorts `major` (none negative), in random order where it is equal, `[N] int64`.

    One sort of 64-bit keys costs a third of a permutation, a stable sort and their gathers, which miss the cache.
    """
    top, last = int(major.max()), len(major) - 1
    key = np.empty(len(major), np.uint64)
    for first in range(0, len(major), _BLOCK):
        part = slice(first, min(first + _BLOCK, len(major)))
        key[part] = _keys(major[part], np.arange(part.start, part.stop), (top, last), rng)
    return _sorted_items(key, last)


def _keys(major: Ints, item: Ints, tops: tuple[int, int], rng: np.random.Generator) -> Keys:
    """(major, random bits, item) as one number each; `tops` are the largest of all. Distinct, as items are."""
    major_bits, item_bits = (max(1, top.bit_length()) for top in tops)
    noise_bits = 64 - major_bits - item_bits  # 27 for ten million documents of up to 4,096 tokens
    assert noise_bits >= 0, tops
    key = rng.integers(0, 1 << noise_bits, len(item), dtype=np.uint64)
    key <<= np.uint64(item_bits)
    key |= item.view(np.uint64)
    key |= major.view(np.uint64) << np.uint64(64 - major_bits)
    return key


def _sorted_items(key: Keys, top: int) -> Ints:
    """The items of `_keys` in the order of the keys, which are overwritten."""
    key.sort()
    key &= np.uint64((1 << max(1, top.bit_length())) - 1)
    return key.view(np.int64)


def _checked(lengths: Ints) -> Ints:
    assert lengths.ndim == 1, lengths.shape
    assert lengths.dtype == np.int64, lengths.dtype
    assert not len(lengths) or lengths.min() >= 1, "a document without tokens"
    return lengths


def _histogram(lengths: Ints, max_length: int) -> Ints:
    """Number of documents of each length, `[max_length + 1] int64`."""
    counts = np.bincount(_checked(lengths), minlength=max_length + 1)
    assert len(counts) == max_length + 1, f"{len(counts) - 1} tokens: the over-long policy runs first"
    return counts
