"""Document lengths -> rows. Pure: no tokens, no files, no clock; numpy and the standard library.

    one_per_row           every document is its own row (padding, padding_free)
    concat                the whole set end to end in shuffled order, cut at row ends
    next_fit_decreasing   the paper's "greedy" as its text describes it
    best_fit              the better of best-fit decreasing and a subset-sum fill: what we recommend
    lower_bound           no packing of whole documents has fewer rows

The whole-document packers plan on the histogram of lengths ("1,200 rows of 2000 + 1500 + 596") and only then
name documents: planning costs the same for a hundred thousand of them as for ten million. What becomes of an
over-long document is decided before; how rows become batches, after.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Shifts of a bit set that the subset-sum fill may spend before best-fit decreasing places the rest: 0.2 s at
# 4,096 tokens (0.4 us each). A shift of a larger set counts once more for each of these bits.
_FILL_BUDGET = 400_000
_FILL_BITS_PER_SHIFT = 8192


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
        ends = _bounds(self.stop - self.start)
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

    "Greedy packing" as the paper's text describes it; its released code is first-fit decreasing in windows of
    1,000. Lengths [6, 3, 5, 4] at 10: rows (6), (5, 4), (3); 6 + 4 would fit, but 5 has closed that row.
    Which of equal documents go where, and the order of rows and within rows, is drawn from `rng`.
    """
    plan = _Plan()
    node, space = _EMPTY_ROW, max_length
    for length, left in _longest_first(_histogram(lengths, max_length)):
        taken = min(left, space // length)
        if taken:
            node, space, left = plan.extend(node, length, taken), space - taken * length, left - taken
        if left:
            plan.close(node, 1)
            each = max_length // length
            full = (left - 1) // each  # the last row stays open even when full
            if full:
                plan.close(plan.extend(_EMPTY_ROW, length, each), full)
            taken = left - full * each
            node, space = plan.extend(_EMPTY_ROW, length, taken), max_length - taken * length
    if node != _EMPTY_ROW:
        plan.close(node, 1)
    return _materialise(plan, lengths, rng)


def best_fit(lengths: Ints, max_length: int, rng: np.random.Generator) -> Rows:
    """The better of best-fit decreasing and a subset-sum fill, by number of rows; no document is cut.

    Lengths [5, 4, 4, 3, 2, 2] at 10: best-fit decreasing makes (5, 4), (4, 3, 2), (2); the fill (5, 3, 2),
    (4, 4, 2). Which of equal documents go where, and the order of rows and within rows, is drawn from `rng`.
    """
    counts = _histogram(lengths, max_length)
    bound, plan = _lower_bound(counts, max_length), _best_fit_decreasing(counts, max_length)
    # With a tail of short documents best-fit decreasing is within a thousandth of the bound: leave it there.
    # Without such a tail it was 0.3 to 10% above where tried, the fill mostly below 1%.
    if (plan.num_rows - bound) * 1000 > bound:
        plan = min(plan, _subset_sum_fill(counts, max_length), key=lambda plan: plan.num_rows)
    return _materialise(plan, lengths, rng)


def lower_bound(lengths: Ints, max_length: int) -> int:
    """Rows that whole documents need at least: L2 of Martello and Toth (1990); 0 for the empty set.

    Lengths [7, 7, 7, 5] at 10: the 26 tokens would fit in 3 rows, but nothing here fits beside a 7, so 4.
    """
    return _lower_bound(_histogram(lengths, max_length), max_length)


# Plans: how many rows of which lengths. No documents yet.

_EMPTY_ROW = -1
_Groups = list[tuple[int, int]]  # (node, rows)


@dataclass(slots=True)
class _Plan:
    """Groups of equal rows as a tree: a node is a row so far (its parent) plus `times` documents of `length`.

    So 5,000 equal rows that take one more document each are one more node. Two rows (6, 4) and one (6) are
    the nodes 0 = (empty, 6, 1) and 1 = (0, 4, 1), and the groups (node 1, 2 rows) and (node 0, 1 row).
    """

    parent: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    group_node: list[int] = field(default_factory=list)
    group_rows: list[int] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return sum(self.group_rows)

    def extend(self, node: int, length: int, times: int) -> int:
        self.parent.append(node)
        self.length.append(length)
        self.times.append(times)
        return len(self.parent) - 1

    def close(self, node: int, rows: int) -> None:
        self.group_node.append(node)
        self.group_rows.append(rows)


def _best_fit_decreasing(counts: Ints, max_length: int, plan: _Plan | None = None) -> _Plan:
    """Longest first, each document into the fullest row that has room; appended to `plan`, if one is given.

    Rows with equal free space are interchangeable, and a row that has just taken a document is the fullest
    that may have room for its equal. So all documents of one length go at once: the fullest rows take as many
    as they hold, then the next. It makes as many rows as going document by document, always.
    """
    plan = plan or _Plan()
    spaces: list[int] = []  # free spaces of open rows, ascending
    groups: dict[int, _Groups] = {}  # free space -> rows that have it
    for length, left in _longest_first(counts):
        placed: list[tuple[int, int, int]] = []  # (free space, node, rows)
        first = last = bisect_left(spaces, length)
        while left and last < len(spaces):
            space = spaces[last]
            left = _fill_rows(plan, groups[space], space, length, left, placed)
            if groups[space]:
                break
            del groups[space]
            last += 1
        del spaces[first:last]
        each = max_length // length
        for taken, rows in ((each, left // each), (left % each, 1)):
            if taken and rows:
                placed.append((max_length - taken * length, plan.extend(_EMPTY_ROW, length, taken), rows))
        for space, node, rows in placed:  # only now, lest the loop above meets them
            if space not in groups:
                insort(spaces, space)
                groups[space] = []
            groups[space].append((node, rows))
    for space in spaces:
        for node, rows in groups[space]:
            plan.close(node, rows)
    return plan


def _fill_rows(
    plan: _Plan, groups: _Groups, space: int, length: int, left: int, placed: list[tuple[int, int, int]]
) -> int:
    """Give the rows with `space` free as many of `left` documents as they hold; how many are left over.

    Rows that took some move from `groups` to `placed`.
    """
    each = space // length
    while left and groups:
        node, rows = groups.pop()
        taking = min(rows, -(-left // each))
        full = min(taking, left // each)
        for taken, num in ((each, full), (left - full * each, taking - full)):
            if num:
                placed.append((space - taken * length, plan.extend(node, length, taken), num))
                left -= taken * num
        if taking < rows:
            groups.append((node, rows - taking))
    return left


def _subset_sum_fill(counts: Ints, max_length: int) -> _Plan:
    """Start a row with the longest document left, fill it as full as it gets, repeat it while documents last.

    Filling a row is a subset sum over the lengths left, cut short once the row is exactly full: early, while
    there is much to choose from. When the budget is spent, best-fit decreasing places the rest.
    """
    plan, budget = _Plan(), _FILL_BUDGET
    left = dict(_longest_first(counts))
    present = sorted(left)  # lengths with documents left
    while present and budget > 0:
        longest = present[-1]
        left[longest] -= 1
        pattern, shifts = _fullest(present, left, max_length - longest)
        left[longest] += 1
        budget -= shifts
        pattern[longest] = pattern.get(longest, 0) + 1
        rows = min(left[length] // times for length, times in pattern.items())
        node = _EMPTY_ROW
        for length, times in pattern.items():
            node = plan.extend(node, length, times)
            left[length] -= rows * times
            if not left[length]:
                del present[bisect_left(present, length)]
        plan.close(node, rows)
    rest = np.zeros_like(counts)
    rest[present] = [left[length] for length in present]
    return _best_fit_decreasing(rest, max_length, plan)


def _fullest(present: list[int], left: dict[int, int], space: int) -> tuple[dict[int, int], int]:
    """The documents (length -> how many) that fill `space` best, and what finding them cost in shifts.

    Bit s of `sums` says that documents seen so far can add up to s. Lengths are seen longest first, and the
    way back takes the earliest stage that reached the sum: long documents go first, short ones stay for rows
    where little else fits. n equal documents are offered as 1, 2, 4, ... and the rest.
    """
    sums, within = 1, (1 << (space + 1)) - 1
    stages: list[tuple[int, int, int]] = []  # (sums before, length, how many)
    index = bisect_left(present, space + 1)
    while index and not sums >> space:
        index -= 1
        length = present[index]
        many, times = min(left[length], space // length), 1
        while many:
            times = min(times, many)
            stages.append((sums, length, times))
            sums |= (sums << length * times) & within
            many, times = many - times, 2 * times
    total = sums.bit_length() - 1
    pattern: dict[int, int] = {}
    for before, length, times in reversed(stages):
        if not before >> total & 1:
            pattern[length] = pattern.get(length, 0) + times
            total -= length * times
    return pattern, 1 + len(stages) * (1 + space // _FILL_BITS_PER_SHIFT)


def _lower_bound(counts: Ints, max_length: int) -> int:
    """The largest L2 over all thresholds k in 0..max_length // 2, at once from cumulated counts.

    Documents above half a row never share one; those above max_length - k share with nothing of k or more.
    What the middle (k to half a row) has beyond the room beside the other large ones needs rows of its own.
    """
    num_from = np.append(_bounds(counts[::-1])[::-1], 0)  # num_from[n]: documents of n tokens or more
    tokens_from = np.append(_bounds((counts * np.arange(len(counts)))[::-1])[::-1], 0)
    half = max_length // 2
    k = np.arange(half + 1)
    over = max_length - k + 1
    room = (num_from[half + 1] - num_from[over]) * max_length - tokens_from[half + 1] + tokens_from[over]
    middle = tokens_from[k] - tokens_from[half + 1]
    return int(num_from[half + 1] + np.max(np.maximum(0, -((room - middle) // max_length))))


def _materialise(plan: _Plan, lengths: Ints, rng: np.random.Generator) -> Rows:
    """Name a plan's documents, at random among equal lengths; shuffle the rows, and the documents in each.

    A group of n rows of c documents is a table [n, c]; a column holds n documents of one length, consecutive
    among all documents sorted by length. A segment is a column and a row of its table.
    """
    if not len(lengths):
        return one_per_row(lengths)
    group_rows = np.array(plan.group_rows, np.int64)
    column_group, column_length = _columns(plan)
    by_length = np.argsort(column_length, kind="stable")
    column_place = np.empty_like(column_length)  # where its documents begin among the sorted
    column_place[by_length] = _bounds(group_rows[column_group[by_length]])[:-1]
    group_column = _bounds(np.bincount(column_group))

    shuffled = rng.permutation(plan.num_rows)
    row_group = np.repeat(np.arange(len(group_rows)), group_rows)[shuffled]
    row_in_group = shuffled - _bounds(group_rows)[row_group]
    width = np.diff(group_column)[row_group]
    offsets = _bounds(width)
    row = np.repeat(np.arange(len(width)), width)
    column = np.arange(len(row)) + (group_column[row_group] - offsets[:-1])[row]
    column = _shuffled_within(row, column, rng)
    place = column_place[column] + row_in_group[row]
    return Rows(
        document=_shuffled_within(lengths, np.arange(len(lengths)), rng)[place],
        start=np.zeros(len(column), np.int64),
        stop=column_length[column],
        offsets=offsets,
    )


def _columns(plan: _Plan) -> tuple[Ints, Ints]:
    """The group and the length of each document of one row of every group, `[C] int64` both, by group."""
    parent, length, times, node = map(np.array, (plan.parent, plan.length, plan.times, plan.group_node))
    group = np.arange(len(node))
    groups, lengths = [], []
    while len(node):  # all groups at once, one step towards the root
        groups.append(np.repeat(group, times[node]))
        lengths.append(np.repeat(length[node], times[node]))
        node, above = parent[node], parent[node] != _EMPTY_ROW
        node, group = node[above], group[above]
    column_group, column_length = np.concatenate(groups), np.concatenate(lengths)
    by_group = np.argsort(column_group, kind="stable")
    return column_group[by_group], column_length[by_group]


def _shuffled_within(major: Ints, item: Ints, rng: np.random.Generator) -> Ints:
    """`item` ordered by `major`, in random order where that is equal; `[N] int64`, none negative.

    One sort of the 64-bit keys (major, random bits, item) costs a third of a permutation, a stable sort and
    their gathers, which miss the cache. Items are distinct, so keys are, and every sort gives the same order.
    """
    major_bits, item_bits = (max(1, int(x.max()).bit_length()) for x in (major, item))
    noise_bits = 64 - major_bits - item_bits  # 27 for ten million documents of up to 4,096 tokens
    assert noise_bits >= 0, (major_bits, item_bits)
    key = rng.integers(0, 1 << noise_bits, len(item), dtype=np.uint64)
    key <<= np.uint64(item_bits)
    key |= item.astype(np.uint64)
    key |= major.astype(np.uint64) << np.uint64(64 - major_bits)
    key.sort()
    key &= np.uint64((1 << item_bits) - 1)
    return key.astype(np.int64)


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


def _longest_first(counts: Ints) -> list[tuple[int, int]]:
    """(length, number of documents) for the lengths that occur."""
    lengths = np.flatnonzero(counts)[::-1]
    return list(zip(lengths.tolist(), counts[lengths].tolist(), strict=True))


def _bounds(sizes: Ints) -> Ints:
    """Where consecutive runs of these sizes begin, and where the last ends: [3, 2] -> [0, 3, 5]."""
    bounds = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=bounds[1:])
    return bounds
