"""Which documents share a row, where that is not left to chance. Pure: groups and lengths -> rows.

together   documents of one group share rows
apart      documents of like groups do not
sharing    how often documents of one group meet in a row
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcli.packing import Rows, first_fit
from packcli.patterns import bounds

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Pack = Callable[[Ints, int, np.random.Generator], Rows]
"""A packer of `packing` that keeps documents whole."""


@dataclass(frozen=True, slots=True)
class Groups:
    """`of` [D] int64: the group of each document, counted from 0. `likeness` [G, G] float32: of any two groups, at
    most 1, and 1 of a group and itself; None: documents of one group are to share rows.
    """

    of: Ints
    likeness: Floats | None = None


def together(lengths: Ints, group: Ints, max_length: int, pack: Pack, rng: np.random.Generator) -> Rows:
    """Rows that hold one group each, as far as groups fill rows; the rests of groups share the rows that remain.

    Each group is packed by itself. Its emptiest row is its rest: a bundle that stays together, and the bundles of
    all groups are packed like documents. So a row is mixed only where whole rests meet, and a group that fits a
    row is never torn apart. Lengths [6, 4, 3 | 5, 5, 4 | 2] at 10: (6, 4), (5, 5) and, of the rests, (3, 4, 2).
    """
    by_group = np.lexsort((rng.random(len(group)), group))
    starts = bounds(np.bincount(group))
    sizes = np.bincount(group, lengths).astype(np.int64)
    documents, counts, bundles = list[Ints](), list[Ints](), list[Ints]()
    for number in np.flatnonzero(sizes > max_length).tolist():
        own = by_group[starts[number] : starts[number + 1]]
        rows = pack(lengths[own], max_length, rng)
        emptiest = int(np.argmin(rows.tokens()))
        kept = np.delete(np.arange(rows.num_rows), emptiest)
        documents.append(own[_pieces(rows, kept)])
        counts.append(np.diff(rows.offsets)[kept])
        bundles.append(own[_pieces(rows, np.array([emptiest]))])
    small = (sizes > 0) & (sizes <= max_length)
    inside = by_group[small[group[by_group]]]  # all groups that fit a row, one after another
    of_bundle = np.concatenate([np.zeros(0, np.int64), *bundles, inside])
    each = np.concatenate([[len(bundle) for bundle in bundles], np.bincount(group)[small]]).astype(np.int64)
    rests = _packed_bundles(lengths, of_bundle, bounds(each), max_length, pack, rng)
    flat = np.concatenate([np.zeros(0, np.int64), *documents, rests.document])
    offsets = bounds(np.concatenate([np.zeros(0, np.int64), *counts, np.diff(rests.offsets)]))
    made = Rows(flat, np.zeros_like(flat), lengths[flat], offsets)
    return _chosen(made, rng.permutation(made.num_rows))


def _packed_bundles(
    lengths: Ints, document: Ints, offsets: Ints, max_length: int, pack: Pack, rng: np.random.Generator
) -> Rows:
    """Rows of bundles; bundle b is `document[offsets[b]:offsets[b + 1]]`."""
    bundles = Rows(document, np.zeros_like(document), lengths[document], offsets)
    rows = pack(bundles.tokens(), max_length, rng)
    ordered = _chosen(bundles, rows.document)
    return Rows(ordered.document, ordered.start, ordered.stop, ordered.offsets[rows.offsets])


def apart(lengths: Ints, group: Ints, likeness: Floats, max_length: int, rng: np.random.Generator) -> Rows:
    """Rows whose documents are little alike: dealt out like cards, then each into the first row that has room.

    Groups are put in an order in which like ones are neighbours (the leaves of a tree, average linkage), and
    documents in that order are dealt to as many hands as there will be rows, one each in turn: so a hand has
    documents from all along the order, and what is most alike lies in different hands. Hand after hand is packed.
    """
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    distance = np.clip(1 - likeness.astype(np.float64), 0, None)
    np.fill_diagonal(distance, 0)
    neighbours = np.arange(len(likeness))
    if len(likeness) > 2:
        tree = hierarchy.linkage(squareform(distance, checks=False), "average")
        neighbours = np.argsort(hierarchy.leaves_list(tree))
    alike = np.lexsort((rng.random(len(group)), neighbours[group]))
    hands = max(1, -(-int(lengths.sum()) // max_length))
    hand = rng.permutation(hands)[np.arange(len(alike)) % hands]
    return first_fit(lengths, alike[np.lexsort((rng.random(len(alike)), hand))], max_length, rng)


def sharing(row: Ints, group: Ints) -> dict[str, Any]:
    """Who meets whom. `row`, `group` [N] int64: of each document that lies in a row (twice, if it lies in two).

    groups          there are
    without         documents of no group (-1), counted as often as they lie in a row: of a kind with nobody
    rows_shared     rows of two documents or more; `rows_pure`: of these, those that hold one group
    pairs           of documents in a row; `pairs_within`: of these, those of one group
    pairs_by_chance share of pairs of one group if the same documents met at random
    """
    nobodys = group < 0
    groups = int(group.max(initial=-1)) + 1
    group = np.where(nobodys, groups + np.cumsum(nobodys), group)
    many, sizes = np.unique(row, return_counts=True), np.bincount(group)
    key, together_ = np.unique(row * (int(group.max(initial=0)) + 1) + group, return_counts=True)
    held = np.bincount(np.searchsorted(many[0], key // (int(group.max(initial=0)) + 1)), minlength=len(many[0]))
    shared = many[1] > 1
    everyone = len(group) * (len(group) - 1)
    return {
        "groups": int((sizes[:groups] > 0).sum()),
        "without": int(nobodys.sum()),
        "rows_shared": int(shared.sum()),
        "rows_pure": int((shared & (held == 1)).sum()),
        "pairs": int((many[1] * (many[1] - 1)).sum() // 2),
        "pairs_within": int((together_ * (together_ - 1)).sum() // 2),
        "pairs_by_chance": float((sizes * (sizes - 1)).sum() / everyone) if everyone else None,
    }


def _pieces(rows: Rows, chosen: Ints) -> Ints:
    """The documents of some rows, in the order given."""
    return rows.document[_places(rows, chosen)]


def _places(rows: Rows, chosen: Ints) -> Ints:
    sizes = np.diff(rows.offsets)[chosen]
    return np.arange(sizes.sum()) + np.repeat(rows.offsets[chosen] - bounds(sizes)[:-1], sizes)


def _chosen(rows: Rows, chosen: Ints) -> Rows:
    """Some rows, in the order given."""
    places = _places(rows, chosen)
    offsets = bounds(np.diff(rows.offsets)[chosen])
    return Rows(rows.document[places], rows.start[places], rows.stop[places], offsets)
