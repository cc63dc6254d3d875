"""The boundary experiment: what marks the border between two documents, and what each mark does to a loss.

A factorial: every combination of eos, bos, system header and document mask, each with the same documents in the
same order, so that all differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any, Literal

import numpy as np

from packcli.errors import DataError
from packcli.eval.probe.layouts import Document, Estimate, Frozen, Layout, Row, attending, fitting, losses, room
from packcli.eval.stats import mean_stderr
from packcli.seeds import rng

Factor = Literal["eos", "bos", "header", "mask"]


@dataclass(frozen=True, slots=True)
class Marks:
    """Token ids that mark a document's border; none: the tokenizer or its template has no such thing.

    `opening`: what the template itself writes before the first turn; `closing`: what it ends a document with, if
    that is `eos`. Both are taken off a document before marks are put on. `missing`: why there is none.
    """

    eos: tuple[int, ...] = ()
    bos: tuple[int, ...] = ()
    header: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    missing: Mapping[Factor, str] = field(default_factory=dict)

    def bare(self, document: Document) -> Document:
        """A document without its marks."""
        ids = tuple(document.input_ids.tolist())
        start = len(self.opening) if ids[: len(self.opening)] == self.opening else 0
        ends = self.closing and ids[-len(self.closing) :] == self.closing
        return document.part(start, len(ids) - len(self.closing) if ends else len(ids))

    def around(self, document: Document, present: Mapping[Factor, bool]) -> Document:
        """A bare document between those of its marks that are present; none of them is scored."""
        before = (*(self.bos if present.get("bos") else ()), *(self.header if present.get("header") else ()))
        after = self.eos if present.get("eos") else ()
        mask = [np.zeros(len(before), bool), document.supervised, np.zeros(len(after), bool)]
        ids = [np.array(before, np.int64), document.input_ids, np.array(after, np.int64)]
        if len(document):
            mask[1] = document.supervised.copy()
            mask[1][0] = False  # a label in some cells only
        return Document(np.concatenate(ids), np.concatenate(mask), document.group)


class Cell(Frozen):
    """One combination: the factors present, and the scored documents' losses in nats per supervised token."""

    present: tuple[Factor, ...]
    mean: float
    stderr: float | None
    losses: tuple[float, ...]


class Effect(Frozen):
    """One factor: mean loss with it - without it, over all combinations of the others. Two: the effect of the
    first where the second is present - where it is absent. Nats per supervised token, paired by document."""

    factors: tuple[Factor, ...]
    difference: Estimate


class Boundary(Frozen):
    """documents   scored, each the last of its row; `left_out`: of those given, too long or without a label
    factors     crossed; `missing`: those that this tokenizer does not have, and why
    behind_mask largest |difference in loss| that an eos before the border makes under the document mask, in nats:
                it cannot be seen there, and moves only positions. None without an eos
    """

    documents: int
    left_out: int
    positions: Literal["reset", "continue"]
    factors: tuple[Factor, ...]
    missing: dict[Factor, str]
    behind_mask: float | None
    cells: tuple[Cell, ...]
    effects: tuple[Effect, ...]


def boundary(
    model: Any,
    documents: Sequence[Document],
    marks: Marks,
    *,
    positions: Literal["reset", "continue"] = "continue",
    before: Sequence[int] = (1, 2),
    seed: int = 0,
    max_length: int | None = None,
    note: Callable[[int, int, str], None] = lambda done, total, remark: None,
) -> Boundary:
    """The loss of the last document of rows of two and three, in every combination of the factors: 16, if the
    tokenizer has all marks.

    Every document of a row gets the same marks. Positions are counted in one way in all cells, so that `mask` is
    attention alone. `documents` are taken bare (`Marks.bare`); `before`: how many go before the scored one, in
    turn; which is drawn by `seed`.

    Raises:
        DataError: fewer than two documents are left.
        ConfigError: a model whose attention cannot be taken over.
    """
    had: dict[Factor, tuple[int, ...]] = {"eos": marks.eos, "bos": marks.bos, "header": marks.header}
    factors: tuple[Factor, ...] = (*(factor for factor, ids in had.items() if ids), "mask")
    levels = [dict(zip(factors, level, strict=True)) for level in product((False, True), repeat=len(factors))]
    bare = [marks.bare(document) for document in documents]
    rows = _rows([document for document in bare if len(document)], before, seed)
    fullest: list[Row] = [[marks.around(document, levels[-1]) for document in row] for row in rows]
    places = fitting({"": fullest}, room(model, max_length)) if rows else []
    if len(places) < 2:
        raise DataError("fewer than two documents fit behind others in a row", "give more or shorter documents")
    found: dict[tuple[bool, ...], list[float]] = {}
    with attending(model):
        for present in levels:
            note(len(found), len(levels), "boundary")
            layout = Layout("document" if present["mask"] else "causal", positions)
            marked = [[marks.around(document, present) for document in rows[place]] for place in places]
            found[tuple(present.values())] = losses(model, marked, layout)
    return Boundary(
        documents=len(places),
        left_out=len(documents) - len(places),
        positions=positions,
        factors=factors,
        missing={factor: marks.missing.get(factor, "none was given") for factor in had if not had[factor]},
        behind_mask=_behind_mask(factors, found),
        cells=tuple(_cell(factors, level, values) for level, values in found.items()),
        effects=factorial(factors, found),
    )


def factorial(factors: Sequence[Factor], found: Mapping[tuple[bool, ...], Sequence[float]]) -> tuple[Effect, ...]:
    """Main effects and two-way interactions, of losses by which factors are present; each cell [D], paired."""
    levels = np.array(list(found))  # [cells, factors] bool
    table = np.array(list(found.values()))  # [cells, D]

    def step(factor: int, among: Any) -> Any:
        """[D]: what the factor adds, mean over the cells `among` which the others stand."""
        with_, without = among & levels[:, factor], among & ~levels[:, factor]
        return table[with_].mean(axis=0) - table[without].mean(axis=0)

    effects = []
    for number, factor in enumerate(factors):
        added = step(number, np.ones(len(levels), bool))
        effects.append(Effect(factors=(factor,), difference=Estimate.of([0.0] * len(added), added.tolist())))
    for one, other in combinations(range(len(factors)), 2):
        absent, present = step(one, ~levels[:, other]), step(one, levels[:, other])
        difference = Estimate.of(absent.tolist(), present.tolist())
        effects.append(Effect(factors=(factors[one], factors[other]), difference=difference))
    return tuple(effects)


def _rows(documents: Sequence[Document], before: Sequence[int], seed: int) -> list[Row]:
    """Each document that can be scored, behind 1 or 2 others drawn at random."""
    generator = rng(seed, "order")
    rows: list[Row] = []
    for place, document in enumerate(documents):
        count = before[len(rows) % len(before)]
        if not document.labels or len(documents) <= count:
            continue
        others = generator.choice(len(documents) - 1, size=count, replace=False)
        rows.append([*(documents[other + (other >= place)] for other in others.tolist()), document])
    return rows


def _cell(factors: Sequence[Factor], level: Sequence[bool], values: Sequence[float]) -> Cell:
    mean, stderr = mean_stderr(values)
    present = tuple(factor for factor, is_in in zip(factors, level, strict=True) if is_in)
    return Cell(present=present, mean=mean, stderr=stderr, losses=tuple(values))


def _behind_mask(factors: Sequence[Factor], found: Mapping[tuple[bool, ...], Sequence[float]]) -> float | None:
    if "eos" not in factors:
        return None
    eos = factors.index("eos")
    without = [level for level in found if level[-1] and not level[eos]]
    pairs = [(level, (*level[:eos], True, *level[eos + 1 :])) for level in without]
    return max(float(np.abs(np.subtract(found[one], found[two])).max()) for one, two in pairs)
