"""What the document before does to a document's loss: through attention, and through positions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from packcli.errors import DataError, MissingError, RunError
from packcli.eval.probe.layouts import Document, Estimate, Frozen, Layout, Row, attending, fitting, losses, room
from packcli.eval.stats import mean_stderr
from packcli.seeds import rng

Neighbour = Literal["unrelated", "related", "duplicate"]
Relation = Literal["group", "tf-idf"]

ALONE = Layout("document", "reset")
LAYOUTS = (
    ALONE,
    Layout("document", "continue"),
    Layout("causal", "reset"),
    Layout("causal", "continue"),
)
TOLERANCE = 1e-4
"""Nats. A document whose neighbour is cut off, at its own positions, must have the loss it has alone: what is left
is fp32 rounding, some 1e-6."""


class Condition(Frozen):
    """Losses behind one kind of neighbour in one layout, and how far they lie above those of the documents alone.

    losses   nats per supervised token, one a document, in the order of `CausalEffect.alone`
    """

    neighbour: Neighbour
    attention: Literal["document", "causal"]
    positions: Literal["reset", "continue"]
    losses: tuple[float, ...]
    effect: Estimate


class Contrast(Frozen):
    """One thing changed, the other held. attention: kept - cut, at the same positions. positions: continuing -
    reset, under the same attention. `given`: what was held. Nats per supervised token."""

    neighbour: Neighbour
    changed: Literal["attention", "positions"]
    given: Literal["document", "causal", "reset", "continue"]
    difference: Estimate


class CausalEffect(Frozen):
    """documents      scored; `digest`: of them and their neighbours, equal where losses may be paired
    left_out       documents that were not, and why
    related_by     the documents' own groups, or tf-idf of their tokens
    check          largest |loss behind a neighbour that is cut off, at positions that reset - loss alone|, in nats
    alone          loss of each document alone, nats per supervised token; `mean` and `stderr` over them
    conditions     three neighbours in four layouts; `contrasts`: what attention and positions each do
    """

    documents: int
    digest: str
    left_out: dict[str, int]
    related_by: Relation
    check: float
    alone: tuple[float, ...]
    mean: float
    stderr: float | None
    conditions: tuple[Condition, ...]
    contrasts: tuple[Contrast, ...]


class Change(Frozen):
    """How far one condition's effect lies above what it was in another model, paired by document."""

    neighbour: Neighbour
    attention: Literal["document", "causal"]
    positions: Literal["reset", "continue"]
    difference: Estimate


def causal_effect(
    model: Any,
    documents: Sequence[Document],
    *,
    seed: int = 0,
    max_length: int | None = None,
    note: Callable[[int, int, str], None] = lambda done, total, remark: None,
) -> CausalEffect:
    """Each document alone, and as the last of a row of two, behind three neighbours in four layouts.

    `model` in fp32, for the check. `max_length`: no row may be longer; by default what the model has positions
    for, at most 4,096.

    Raises:
        DataError: fewer than two documents are left.
        MissingError: documents without groups, and scikit-learn is not installed.
        RunError: the check fails: something else than attention carries one document into the next.
        ConfigError: a model whose attention cannot be taken over.
    """
    kept, rows, left_out, related_by = _rows(documents, seed, room(model, max_length))
    with attending(model):
        alone = losses(model, [[document] for document in kept], ALONE)
        found: dict[tuple[Neighbour, Layout], list[float]] = {}
        for neighbour, pairs in rows.items():
            for layout in LAYOUTS:
                note(len(found), len(rows) * len(LAYOUTS), f"behind {neighbour}")
                found[neighbour, layout] = losses(model, pairs, layout)
    check = max(float(np.abs(np.subtract(found[kind, ALONE], alone)).max()) for kind in rows)
    if not check <= TOLERANCE:
        raise RunError(
            f"behind a document that is cut off, at positions that reset, a loss differs by {check:.1e} nats from "
            "that of the document alone: attention is not all that carries one into the next",
            "probe the model in float32; a model with recurrent or convolution layers cannot be probed",
        )
    mean, stderr = mean_stderr(alone)
    return CausalEffect(
        documents=len(kept),
        digest=_digest(row for pairs in rows.values() for row in pairs),
        left_out=left_out,
        related_by=related_by,
        check=check,
        alone=tuple(alone),
        mean=mean,
        stderr=stderr,
        conditions=tuple(
            Condition(
                neighbour=neighbour, **layout._asdict(), losses=tuple(behind), effect=Estimate.of(alone, behind)
            )
            for (neighbour, layout), behind in found.items()
        ),
        contrasts=tuple(contrast for kind in rows for contrast in _contrasts(kind, found)),
    )


def change(before: CausalEffect, after: CausalEffect) -> tuple[Change, ...]:
    """What training did to each condition's effect (loss behind a neighbour - loss alone), paired by document.

    Raises:
        ValueError: not the same documents behind the same neighbours.
    """
    if before.digest != after.digest:
        raise ValueError("effects of other documents, or behind other neighbours, cannot be paired")

    def effects(result: CausalEffect, condition: Condition) -> list[float]:
        return [behind - own for behind, own in zip(condition.losses, result.alone, strict=True)]

    return tuple(
        Change(
            neighbour=new.neighbour,
            attention=new.attention,
            positions=new.positions,
            difference=Estimate.of(effects(before, old), effects(after, new)),
        )
        for old, new in zip(before.conditions, after.conditions, strict=True)
    )


def neighbours(documents: Sequence[Document], seed: int) -> tuple[list[tuple[int, int] | None], Relation]:
    """For each document the places of an unrelated and of a related one; None where it has not both.

    Related: of the same group, where every document has a group and there are two or more; else the nearest by
    tf-idf of token ids. Unrelated: of another group; else one of the half that is less similar. Chosen at random,
    but for the nearest; documents of equal tokens are no neighbours.
    """
    generator = rng(seed, "pack")
    groups = [document.group for document in documents]
    keys = [document.key for document in documents]
    other = np.array([[one != two for two in keys] for one in keys], bool).reshape(len(keys), len(keys))
    if None not in groups and len(set(groups)) > 1:
        same = np.array([[one == two for two in groups] for one in groups])
        draws = [(np.flatnonzero(~same[n]), np.flatnonzero(same[n] & other[n])) for n in range(len(documents))]
        return [_drawn(unlike, like, generator) for unlike, like in draws], "group"
    similar = np.where(other, _similarity(documents), -1.0)
    chosen: list[tuple[int, int] | None] = []
    for row in similar:
        order = np.argsort(row, kind="stable")
        order = order[row[order] >= 0]  # without copies of itself
        chosen.append(_drawn(order[: len(order) // 2], order[-1:], generator))
    return chosen, "tf-idf"


def _drawn(unlike: Any, like: Any, generator: np.random.Generator) -> tuple[int, int] | None:
    if not len(unlike) or not len(like):
        return None
    return int(generator.choice(unlike)), int(generator.choice(like))


def _similarity(documents: Sequence[Document]) -> Any:
    """[D, D] float64: cosine of tf-idf over token ids."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise MissingError(
            "the nearest documents by tf-idf need the package `scikit-learn`", "pip install 'packcli[eval]'"
        ) from None
    weights = TfidfVectorizer(analyzer=lambda document: document.input_ids.tolist()).fit_transform(documents)
    return (weights @ weights.T).toarray()


def _rows(
    documents: Sequence[Document], seed: int, most: int
) -> tuple[list[Document], dict[Neighbour, list[Row]], dict[str, int], Relation]:
    """The documents that can be scored, and for each the row of two behind each kind of neighbour."""
    left_out: Counter[str] = Counter()
    labelled = [document for document in documents if document.labels]
    left_out["no supervised token"] = len(documents) - len(labelled)
    chosen, related_by = neighbours(labelled, seed)
    pairs = [(document, pair) for document, pair in zip(labelled, chosen, strict=True) if pair]
    left_out["no related or no unrelated document"] = len(labelled) - len(pairs)
    rows: dict[Neighbour, list[Row]] = {kind: [] for kind in get_args(Neighbour)}
    for document, (unlike, like) in pairs:
        rows["unrelated"].append([labelled[unlike], document])
        rows["related"].append([labelled[like], document])
        rows["duplicate"].append([document, document])
    places = fitting(rows, most) if pairs else []
    left_out["its rows are too long"] = len(pairs) - len(places)
    if len(places) < 2:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count) or "none was given"
        raise DataError(f"fewer than two documents can be probed ({why})", "give more documents, or longer rows")
    kept = [pairs[place][0] for place in places]
    fitted: dict[Neighbour, list[Row]] = {kind: [found[place] for place in places] for kind, found in rows.items()}
    return kept, fitted, {reason: count for reason, count in left_out.items() if count}, related_by


def _contrasts(kind: Neighbour, found: Mapping[tuple[Neighbour, Layout], Sequence[float]]) -> list[Contrast]:
    def between(changed: Any, given: Any, a: Layout, b: Layout) -> Contrast:
        difference = Estimate.of(found[kind, a], found[kind, b])
        return Contrast(neighbour=kind, changed=changed, given=given, difference=difference)

    cut_reset, cut_continue, kept_reset, kept_continue = LAYOUTS
    return [
        between("attention", "continue", cut_continue, kept_continue),
        between("attention", "reset", cut_reset, kept_reset),
        between("positions", "document", cut_reset, cut_continue),
        between("positions", "causal", kept_reset, kept_continue),
    ]


def _digest(rows: Any) -> str:
    found = hashlib.sha256()
    for row in rows:
        for document in row:
            found.update(len(document).to_bytes(8, "little") + document.key + document.supervised.tobytes())
    return found.hexdigest()[:16]
