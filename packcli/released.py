"""How the code released with the paper (arXiv 2410.08081) makes rows, its mistakes included. Pure.

    windows               what `datasets.map` hands to one call: a packer sees nothing beyond
    concat                "random": documents in file order, cut every `max_length`, the tail lost
    first_fit_decreasing  "greedy": longest first, and over-long documents lost
    truncate_per_turn     what is left of a too long conversation where the code truncates it
    validation_rows       which rows it holds out, after packing

Source: github.com/ShuheWang1998/Packing-Analysis, src/llmtuner/data, a fork of LLaMA-Factory. Nothing here is
random but the split.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from packcli.packing import Ints, Rows


def windows(num_documents: int, window: int, workers: int) -> Ints:
    """Bounds of the batches that `datasets.map(batched=True, batch_size=window, num_proc=workers)` makes.

    `[W + 1] int64`, from 0 to `num_documents`. Each worker has a contiguous part, the first ones larger by one
    document, and cuts it into batches: 7 documents, 2 workers and windows of 3 give 0:3, 3:4 and 4:7, so
    [0, 3, 4, 7]. There are never more workers than documents.
    """
    assert window >= 1, window
    assert workers >= 1, workers
    workers = max(1, min(workers, num_documents))
    each, larger = divmod(num_documents, workers)
    parts = [worker * each + min(worker, larger) for worker in range(workers + 1)]
    return np.concatenate([*(np.arange(first, last, window) for first, last in pairwise(parts)), [num_documents]])


def concat(lengths: Ints, max_length: int, bounds: Ints, *, keep_remainder: bool = False) -> Rows:
    """Join the documents of a window in file order, cut every `max_length` tokens, lose the short rest.

    A window with fewer tokens than `max_length` vanishes. Lengths [3, 4, 2, 9] at 5 with bounds [0, 3, 4]: the
    first window's row is document 0 and tokens 0:2 of document 1, its other 4 tokens are lost; the second's is
    tokens 0:5 of document 3. (The code leaves out a row without a label too: that is for the caller.)

    `keep_remainder`: a window's short rest becomes its last row, which the released code never does.
    """
    ends = _bounds(lengths)
    window_start, window_end = ends[bounds[:-1]], ends[bounds[1:]]
    rows = (window_end - window_start + (max_length - 1 if keep_remainder else 0)) // max_length
    row_in_window = np.arange(rows.sum()) - np.repeat(_bounds(rows)[:-1], rows)
    row_start = np.repeat(window_start, rows) + row_in_window * max_length
    row_end = np.minimum(row_start + max_length, np.repeat(window_end, rows))

    cuts = np.sort(np.concatenate([ends, row_start, row_end]))
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]  # np.unique takes ten times as long
    start, stop = cuts[:-1], cuts[1:]
    row = np.searchsorted(row_start, start, side="right") - 1
    inside = start < np.append(row_end, 0)[row]  # row -1, before the first one, ends at 0
    start, stop, row = start[inside], stop[inside], row[inside]
    document = np.searchsorted(ends, start, side="right") - 1
    return Rows(
        document=document,
        start=start - ends[document],
        stop=stop - ends[document],
        offsets=_bounds(np.bincount(row, minlength=len(row_start))),
    )


def first_fit_decreasing(lengths: Ints, max_length: int, bounds: Ints) -> Rows:
    """Each document of a window, longest first, opens a row that takes whatever still fits, longest first.

    An over-long document opens a row too, but does not fit in it: the others fill it, and the document's turn is
    over, so it is lost. Only where no other is left does it get the row, cut to `max_length` tokens (the code
    cuts as `truncate_per_turn` does). Lengths [150, 130, 60, 50, 40, 30, 20, 10] at 100: rows (60, 40),
    (50, 30, 20) and (10). Of equal documents the first in the file goes first; a row lists its longest first.
    """
    documents: list[int] = []
    offsets = [0]
    for first, last in pairwise(bounds.tolist()):
        # Shortest first, and of equal ones the last in the file first: the next to go is always at the end.
        waiting = (last - 1 - np.argsort(lengths[first:last][::-1], kind="stable")).tolist()
        sizes = lengths[waiting].tolist()
        while sizes:
            opener, over_long = waiting[-1], sizes[-1] > max_length
            if over_long:
                del waiting[-1], sizes[-1]
            space, fitting = max_length, bisect_right(sizes, max_length)
            while fitting:
                documents.append(waiting.pop(fitting - 1))
                space -= sizes.pop(fitting - 1)
                fitting = bisect_right(sizes, space, 0, fitting - 1)
            if len(documents) == offsets[-1]:
                documents.append(opener)
            offsets.append(len(documents))
    document = np.array(documents, np.int64)
    return Rows(
        document=document,
        start=np.zeros(len(document), np.int64),
        stop=np.minimum(lengths[document], max_length),
        offsets=np.array(offsets, np.int64),
    )


def truncate_per_turn(
    source_lengths: Sequence[int], target_lengths: Sequence[int], max_length: int
) -> list[tuple[int, int]]:
    """Tokens kept of (source, target) in each turn, from their beginnings; turns after the last are left out.

    While there is room for all, all is kept. The turn that no longer fits gives both sides a share of what is
    left in proportion to their lengths, the target at least one token; and where a target is shorter than its
    share, its source gets the rest. So turns (30, 20), (60, 40) at 100 keep (30, 20), (30, 20): the second source
    loses the header that announces the answer, the second target its end-of-turn token.

    Both sides of a turn may not be empty. The share is computed in double precision and cut to a whole number, as
    the code does: a turn (7, 15) that fits in 22 tokens exactly keeps (7, 14), since 22 * (15 / 22) is below 15.
    """
    kept: list[tuple[int, int]] = []
    left = max_length
    for source, target in zip(source_lengths, target_lengths, strict=True):
        if left <= 0:
            break
        share = max(int(left * (target / (source + target))), 1)
        turn = min(source, left - min(share, target)), min(target, share)
        left -= sum(turn)
        kept.append(turn)
    return kept


def validation_rows(num_rows: int, fraction: float, seed: int) -> tuple[Ints, Ints]:
    """Rows to train on and rows held out, as `Dataset.train_test_split(test_size=fraction, seed=seed)` draws them.

    Both int64, in the order in which `datasets` puts them; ceil(fraction * num_rows) are held out. A fraction of
    0 holds out none. `datasets` refuses to leave no row to train on; here the first array is empty then.
    """
    assert 0 <= fraction < 1, fraction
    if not fraction:
        return np.arange(num_rows), np.zeros(0, np.int64)
    drawn = np.random.default_rng(seed).permutation(num_rows)
    num_held_out = math.ceil(fraction * num_rows)
    return drawn[num_held_out:], drawn[:num_held_out]


def _bounds(sizes: Ints) -> Ints:
    """Where consecutive runs of these sizes begin, and where the last ends: [3, 2] -> [0, 3, 5]."""
    return np.concatenate([[0], np.cumsum(sizes)])
