"""The paper's data sets before anybody has them: lengths fitted to its printed steps, not measured.

Enough to count rows, steps and FLOPs of a plan (`papersteps.yaml`, docs/paper-steps.md); never to train on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcli import papersteps
from packcli.data import framed
from packcli.data import index as indexes
from packcli.data.index import Index
from packcli.packing import Ints
from packcli.plan import IndexOrder, TokensOrder

_WORKERS = 64
"""Of the released code's preprocessing: each packs its own contiguous part of the data."""
_LLAMA3 = SimpleNamespace(bos_token_id=0, eos_token_id=1)
_EOT = 2
_ENOUGH = 8_000
"""Conversations from which rows are told within 1%: more take seconds, and the fit is no better than that."""


@dataclass(frozen=True)
class Drawn:
    """Evenly spaced quantiles of a lognormal, in random order: a part of a data set (`framed.Documents`).

    Every token counts as supervised: which ones are is not printed. Each ends in <|eot_id|>, which is no eos;
    `opened`: it begins with bos, as template `llama3` has it.
    """

    num_documents: int
    dataset: str
    opened: bool = True

    @cached_property
    def lengths(self) -> Ints:
        """[D] int64."""
        found, shortest, longest = papersteps.lengths(self.dataset)
        quantile = NormalDist(math.log(found.median), found.sigma).inv_cdf
        logs = [quantile((rank + 0.5) / self.num_documents) for rank in range(self.num_documents)]
        drawn = np.rint(np.clip(np.exp(logs), shortest, longest)).astype(np.int64)
        return np.random.default_rng(0).permutation(drawn)

    @cached_property
    def content(self) -> NDArray[np.uint64]:
        """[D] uint64, evenly spaced as well."""
        spread = (np.arange(self.num_documents) + 0.5) / self.num_documents
        return np.random.default_rng(1).permutation((spread * 2.0**64).astype(np.uint64))

    @property
    def spans(self) -> tuple[Ints, Ints, Ints]:
        """All of a document but its first token, for which nothing stands before it."""
        return np.arange(self.num_documents), np.ones(self.num_documents, np.int64), self.lengths

    @property
    def ends(self) -> tuple[Ints, Ints]:
        return np.full(self.num_documents, _LLAMA3.bos_token_id if self.opened else _EOT), np.full(
            self.num_documents, _EOT
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows made of a part of the data, and how many times as many the whole would make."""

    index: Index
    ledger: dict[str, Any]
    times: float


def sample(tokens: TokensOrder, order: IndexOrder) -> Sample | None:
    """Rows of one of the paper's sets; None: the order is for other data, or read otherwise than was fitted.

    As many of the 64 workers are simulated as it takes, with the windows they would have in the whole.
    """
    [source, *others] = tokens.sources
    fitted = source.source in papersteps.datasets() and "Llama-3" in (tokens.tokenizer.name or "")
    fitted = fitted and source.turns == "any" and not source.mapping
    if others or not fitted or tokens.template not in (None, "llama3", "llama3_bare"):
        return None
    whole = papersteps.lengths(source.source)[0].documents
    whole = max(1, round(min(whole, tokens.max_documents or whole) * source.weight))
    # A fit has no seed, and no id to look up.
    order = order.model_copy(update={"id": "", "tokens": "", "seed": 0, "epochs": 1})
    return _sample(source.source, whole, order, tokens.template != "llama3_bare")


@lru_cache(maxsize=256)
def _sample(dataset: str, whole: int, order: IndexOrder, opened: bool) -> Sample:
    simulated = min(_WORKERS, math.ceil(_WORKERS * _ENOUGH / whole))
    workers = max(1, round(order.layout.workers * simulated / _WORKERS))
    # Nothing is known here of what documents say; rows by `group_by` are about as many as without.
    layout = order.layout.model_copy(update={"workers": workers, "group_by": "none"})
    small = order.model_copy(update={"layout": layout})
    drawn = Drawn(max(1, whole * simulated // _WORKERS), dataset, opened)
    marks = framed.marks(small.layout.boundary, lambda: _LLAMA3)
    index, _, ledger = indexes.build(small, drawn, drawn.num_documents, 0, marks)
    return Sample(index, ledger, whole / drawn.num_documents)
