"""Which lengths share a row: the histogram of lengths -> a plan such as "1,200 rows of 2000 + 1500 + 596".

A plan names no document, so it costs the same for a hundred thousand of them as for ten million. `counts` is
the number of documents of each length, `[max_length + 1] int64`. Pure.

    next_fit_decreasing    one row open at a time
    first_fit_decreasing   each document into the first row with room
    best_fit_decreasing    each into the fullest row with room
    subset_sum_fill        each row as full as it gets
    lower_bound            no plan has fewer rows

`cutting_stock` makes one more plan, for sets on which these stay well above the bound.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Pattern = dict[int, int]  # length -> how many documents of it a row holds

# Shifts of a bit set that the subset-sum fill may spend before best-fit decreasing places the rest: 0.2 s at
# 4,096 tokens (0.4 us each). A shift of a larger set counts once more for each of these bits.
_FILL_BUDGET = 400_000
_FILL_BITS_PER_SHIFT = 8192

_EMPTY_ROW = -1
_Groups = list[tuple[int, int]]  # (node, rows)


@dataclass(slots=True)
class Plan:
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

    def columns(self) -> tuple[Ints, Ints]:
        """The group and the length of each document of one row of every group, `[C] int64` both, by group."""
        columns = map(np.array, (self.parent, self.length, self.times, self.group_node))
        parent, length, times, node = (column.astype(np.int64) for column in columns)
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


@dataclass(slots=True)
class Waiting:
    """Documents no row holds yet: `left[length]` of each length in `present`, ascending."""

    left: dict[int, int]
    present: list[int]

    @classmethod
    def all_of(cls, counts: Ints) -> Waiting:
        left = dict(longest_first(counts))
        return cls(left, sorted(left))

    def fill_rows(self, plan: Plan, pattern: Pattern, at_most: int | None = None) -> int:
        """Add rows of one pattern, longest documents first, as many as there are documents for; how many."""
        rows = min(self.left[length] // times for length, times in pattern.items())
        rows = rows if at_most is None else min(rows, at_most)
        node = _EMPTY_ROW
        for length, times in pattern.items():
            node = plan.extend(node, length, times)
            self.left[length] -= rows * times
            if not self.left[length]:
                del self.present[bisect_left(self.present, length)]
        plan.close(node, rows)
        return rows

    def counts(self, max_length: int) -> Ints:
        counts = np.zeros(max_length + 1, np.int64)
        counts[self.present] = [self.left[length] for length in self.present]
        return counts


def next_fit_decreasing(counts: Ints, max_length: int) -> Plan:
    """Longest first; the document that does not fit closes the one open row and opens the next."""
    plan = Plan()
    node, space = _EMPTY_ROW, max_length
    for length, left in longest_first(counts):
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
    return plan


def first_fit_decreasing(counts: Ints, max_length: int) -> Plan:
    """Longest first, each document into the first row that has room.

    Row by row it is the same: a row takes the longest document left, and again the longest that still fits.
    The next row is equal as long as there are documents for it.
    """
    plan, waiting = Plan(), Waiting.all_of(counts)
    while waiting.present:
        pattern: Pattern = {}
        space, index = max_length, len(waiting.present)
        while index := bisect_right(waiting.present, space, 0, index):
            index -= 1
            length = waiting.present[index]
            pattern[length] = min(waiting.left[length], space // length)
            space -= length * pattern[length]
        waiting.fill_rows(plan, pattern)
    return plan


def best_fit_decreasing(counts: Ints, max_length: int, plan: Plan | None = None) -> Plan:
    """Longest first, each document into the fullest row that has room; appended to `plan`, if one is given.

    Rows with equal free space are interchangeable, and a row that has just taken a document is the fullest
    that may have room for its equal. So all documents of one length go at once: the fullest rows take as many
    as they hold, then the next. It makes as many rows as going document by document, always.
    """
    plan = plan or Plan()
    spaces: list[int] = []  # free spaces of open rows, ascending
    groups: dict[int, _Groups] = {}  # free space -> rows that have it
    for length, left in longest_first(counts):
        placed: list[tuple[int, int, int]] = []  # (free space, node, rows)
        first = last = bisect_left(spaces, length)
        while left and last < len(spaces):
            space = spaces[last]
            left = _fill_groups(plan, groups[space], space, length, left, placed)
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


def _fill_groups(
    plan: Plan, groups: _Groups, space: int, length: int, left: int, placed: list[tuple[int, int, int]]
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


def subset_sum_fill(counts: Ints, max_length: int) -> Plan:
    """Start a row with the longest document left, fill it as full as it gets, repeat it while documents last.

    Filling a row is a subset sum over the lengths left, cut short once the row is exactly full: early, while
    there is much to choose from. When the budget is spent, best-fit decreasing places the rest.
    """
    plan, waiting, budget = Plan(), Waiting.all_of(counts), _FILL_BUDGET
    while waiting.present and budget > 0:
        longest = waiting.present[-1]
        waiting.left[longest] -= 1
        filling, shifts = _fullest(waiting, max_length - longest)
        waiting.left[longest] += 1
        budget -= shifts
        filling[longest] = filling.get(longest, 0) + 1
        waiting.fill_rows(plan, filling)
    return best_fit_decreasing(waiting.counts(max_length), max_length, plan)


def _fullest(waiting: Waiting, space: int) -> tuple[Pattern, int]:
    """The documents that fill `space` best, and what finding them cost in shifts.

    Bit s of `sums` says that documents seen so far can add up to s. Lengths are seen longest first, and the
    way back takes the earliest stage that reached the sum: long documents go first, short ones stay for rows
    where little else fits. n equal documents are offered as 1, 2, 4, ... and the rest.
    """
    sums, within = 1, (1 << (space + 1)) - 1
    stages: list[tuple[int, int, int]] = []  # (sums before, length, how many)
    index = bisect_left(waiting.present, space + 1)
    while index and not sums >> space:
        index -= 1
        length = waiting.present[index]
        many, times = min(waiting.left[length], space // length), 1
        while many:
            times = min(times, many)
            stages.append((sums, length, times))
            sums |= (sums << length * times) & within
            many, times = many - times, 2 * times
    total = sums.bit_length() - 1
    pattern: Pattern = {}
    for before, length, times in reversed(stages):
        if not before >> total & 1:
            pattern[length] = pattern.get(length, 0) + times
            total -= length * times
    return pattern, 1 + len(stages) * (1 + space // _FILL_BITS_PER_SHIFT)


def lower_bound(counts: Ints, max_length: int) -> int:
    """The largest L2 over all thresholds k in 0..max_length // 2, at once from cumulated counts.

    Documents above half a row never share one; those above max_length - k share with nothing of k or more.
    What the middle (k to half a row) has beyond the room beside the other large ones needs rows of its own.
    """
    num_from = np.append(bounds(counts[::-1])[::-1], 0)  # num_from[n]: documents of n tokens or more
    tokens_from = np.append(bounds((counts * np.arange(len(counts)))[::-1])[::-1], 0)
    half = max_length // 2
    k = np.arange(half + 1)
    over = max_length - k + 1
    room = (num_from[half + 1] - num_from[over]) * max_length - tokens_from[half + 1] + tokens_from[over]
    middle = tokens_from[k] - tokens_from[half + 1]
    return int(num_from[half + 1] + np.max(np.maximum(0, -((room - middle) // max_length))))


def longest_first(counts: Ints) -> list[tuple[int, int]]:
    """(length, number of documents) for the lengths that occur."""
    lengths = np.flatnonzero(counts)[::-1]
    return list(zip(lengths.tolist(), counts[lengths].tolist(), strict=True))


def bounds(sizes: Ints) -> Ints:
    """Where consecutive runs of these sizes begin, and where the last ends: [3, 2] -> [0, 3, 5]."""
    bounds = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=bounds[1:])
    return bounds
