"""A plan from linear programming, for sets on which the plans of `patterns` stay well above the bound.

Rows are the sheets of a cutting-stock problem (Gilmore and Gomory 1961): how many rows of each pattern hold all
documents? With fractions of rows allowed that is a linear programme. It starts from the patterns that the other
plans use; its prices tell which further patterns would help, a few hundred at a time. Rounding costs a few rows.
Deterministic: the same counts and the same scipy give the same plan.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from packcli import patterns
from packcli.patterns import Ints, Pattern, Plan, Waiting

Floats = NDArray[np.float64]

# Chosen on the sets of benchmarks/packing.py: up to 0.5 s there. Time grows faster than the number of classes; and
# with fewer documents to a class, most patterns are worth less than a row, and rounding costs more than it gains.
_CLASSES = 400
_DOCUMENTS_A_CLASS = 4
_UNITS_A_ROW = 4096
_ROUNDS = 10
_PATTERNS_A_ROUND = 300
_CLOSE = 2e-4  # of the bound: where the rounds end
_FRACTION = 0.3  # of a row: from where it is tried as a row


@dataclass(frozen=True, slots=True)
class Relaxation:
    """How many rows of each pattern hold all documents, if a fraction of a row were a row."""

    sizes: Ints  # [M] lengths that occur, ascending
    patterns: Floats  # [P, M] documents of each size in one row
    rows: Floats  # [P]
    bound: float  # no packing has fewer rows, not even of fractions of rows


def fill(counts: Ints, max_length: int) -> Plan:
    """Rows as the linear programme has them, rounded; best-fit decreasing places the documents left over.

    100 documents of 6, 100 of 5 and 200 of 2 tokens at 10 make 100 rows (6, 2, 2) and 50 rows (5, 5). Many
    different lengths are rounded up to classes first. A pattern then takes the longest documents of each of its
    classes, and wastes half a class width a document.
    """
    width, lengths = _class_width(counts, max_length), np.flatnonzero(counts)
    # The last class holds what is longer than all whole classes, too: a document of it has its row to itself.
    tops = np.append(np.arange(max_length // width) * width, max_length).tolist()
    of_class = np.minimum(-(-lengths // width), len(tops) - 1)
    coarse = np.bincount(of_class, weights=counts[lengths], minlength=len(tops)).astype(np.int64)
    plan, waiting = Plan(), Waiting.all_of(counts)
    for pattern, rows, fraction in _rounded(relax(coarse, len(tops) - 1, _ROUNDS)):
        while rows and (row := _longest_of(waiting, pattern, tops)):
            if fraction and sum(row.values()) < sum(pattern.values()):
                break
            rows -= waiting.fill_rows(plan, row, at_most=rows)
    return patterns.best_fit_decreasing(waiting.counts(max_length), max_length, plan)


def _class_width(counts: Ints, max_length: int) -> int:
    """The smallest in tokens that leaves few enough classes, of those that occur and in a row."""
    lengths, width = np.flatnonzero(counts), -(-max_length // _UNITS_A_ROW)
    most = min(_CLASSES, max(64, int(counts.sum()) // _DOCUMENTS_A_CLASS))
    while len(lengths) > most and np.count_nonzero(np.diff(-(-lengths // width))) >= most:
        width += 1
    return width


def _rounded(relaxation: Relaxation) -> Iterator[tuple[Pattern, int, bool]]:
    """(documents of each size, rows, is it a fraction): all whole rows, then large fractions as one row each.

    Patterns may offer room for more documents than there are (at a price of zero): whole rows go without them.
    A fraction is worth a row only where documents are left for all of it.
    """
    whole = np.floor(relaxation.rows + 1e-6)
    fraction = relaxation.rows - whole
    order = np.argsort(-fraction, kind="stable")
    large = order[fraction[order] > _FRACTION]
    for index, rows, is_fraction in (
        *((index, int(whole[index]), False) for index in np.flatnonzero(whole)),
        *((index, 1, True) for index in large),
    ):
        held = np.flatnonzero(relaxation.patterns[index])[::-1]
        times = relaxation.patterns[index, held].astype(np.int64)
        yield dict(zip(relaxation.sizes[held].tolist(), times.tolist(), strict=True)), rows, is_fraction


def _longest_of(waiting: Waiting, pattern: Pattern, tops: list[int]) -> Pattern:
    """A row of the longest documents left in the pattern's classes, fewer where a class runs out."""
    row: Pattern = {}
    for of_class, times in pattern.items():
        index = bisect_right(waiting.present, tops[of_class])
        while times and index and waiting.present[index - 1] > tops[of_class - 1]:
            index -= 1
            length = waiting.present[index]
            row[length] = min(times, waiting.left[length])
            times -= row[length]
    return row


def relax(counts: Ints, max_length: int, rounds: int) -> Relaxation:
    """Solve for the best fractions of rows, by column generation; `rounds` programmes at most.

    Each round's prices say what a document of each size costs in rows. A pattern worth more than its one row
    helps: the best one around each size is found by dynamic programming, and the next round may use it. The
    worth of the very best also gives a bound (Farley 1990) that holds whether or not the rounds have converged.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csc_array

    sizes = np.flatnonzero(counts)
    needed = counts[sizes].astype(np.float64)
    start = patterns.best_fit_decreasing(counts, max_length)
    known = np.concatenate(
        [_matrix(plan, sizes) for plan in (start, patterns.subset_sum_fill(counts, max_length))]
    )
    rows = np.zeros(len(known))
    rows[: len(start.group_rows)] = start.group_rows
    bound = float(patterns.lower_bound(counts, max_length))
    for _ in range(rounds):
        solved = linprog(np.ones(len(known)), A_ub=csc_array(-known.T), b_ub=-needed, method="highs")
        if not solved.success:  # not seen; what there is will do
            break
        rows, prices = solved.x, np.maximum(-solved.ineqlin.marginals, 0)
        worth, last = _knapsack(prices, sizes, max_length)
        bound = max(bound, float(needed @ prices / worth[max_length]))
        around = prices + worth[max_length - sizes]
        promising = np.argsort(-around, kind="stable")[:_PATTERNS_A_ROUND]
        promising = promising[around[promising] > 1 + 1e-7]
        if not len(promising) or rows.sum() <= bound * (1 + _CLOSE):
            break
        known = np.concatenate([known, _around(promising, last, sizes, max_length)])
        rows = np.append(rows, np.zeros(len(promising)))
    return Relaxation(sizes, known, rows, bound)


def _matrix(plan: Plan, sizes: Ints) -> Floats:
    """[groups, M]: documents of each size in a row of each group of a plan."""
    group, length = plan.columns()
    matrix = np.zeros((len(plan.group_rows), len(sizes)))
    np.add.at(matrix, (group, np.searchsorted(sizes, length)), 1)
    return matrix


def _knapsack(prices: Floats, sizes: Ints, max_length: int) -> tuple[Floats, Ints]:
    """The highest price of documents that fit in n tokens, and the size index of one of them, for n from 0.

    `[max_length + 1]` both. The index is -1 where a token less is worth as much. Any number of each size.
    """
    worth = np.zeros(max_length + 1)
    last = np.full(max_length + 1, -1, np.int64)
    fitting = np.searchsorted(sizes, np.arange(max_length + 1), side="right").tolist()
    for space in range(int(sizes[0]), max_length + 1):
        many = fitting[space]
        options = worth[space - sizes[:many]] + prices[:many]
        best = int(options.argmax())
        if options[best] > worth[space - 1] + 1e-12:
            worth[space], last[space] = options[best], best
        else:
            worth[space] = worth[space - 1]
    return worth, last


def _around(first: Ints, last: Ints, sizes: Ints, max_length: int) -> Floats:
    """[P, M]: the best patterns that hold a document of each size in `first`, read off `_knapsack`'s indices."""
    matrix = np.zeros((len(first), len(sizes)))
    np.add.at(matrix, (np.arange(len(first)), first), 1)
    used = np.maximum.accumulate(np.where(last >= 0, np.arange(len(last)), 0))  # tokens not wasted
    pattern, space = np.arange(len(first)), used[max_length - sizes[first]]
    while len(pattern := pattern[space > 0]):
        space = space[space > 0]
        size = last[space]
        matrix[pattern, size] += 1
        space = used[space - sizes[size]]
    return matrix
