"""Documents as probes need them, rows of them in any layout, and the loss of one document in its row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from packcli.config import ARMS, ArmSpec
from packcli.data import index, sample
from packcli.errors import ConfigError
from packcli.eval.stats import paired_difference
from packcli.model import attention, collate, configs
from packcli.packing import Rows

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SLOTS = 4096
"""Slots of one forward pass of several rows; a longer row goes alone."""
_LOGITS = 1 << 26
"""Logits of one forward pass of several rows, 256 MiB in fp32."""
_ANY = ArmSpec.model_validate(ARMS["padding_free"])  # a row as long as its documents; the layout comes per call


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """input_ids [T] int64; supervised [T] bool, the tokens trained on; `group`: its topic or task, if known."""

    input_ids: Ints
    supervised: Bools
    group: str | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> int:
        """Supervised tokens that reach a loss: the first token has nothing of its document before it."""
        return int(self.supervised[1:].sum())

    @property
    def key(self) -> bytes:
        """Equal for documents of equal tokens."""
        return self.input_ids.tobytes()

    def part(self, start: int, stop: int) -> Document:
        return replace(self, input_ids=self.input_ids[start:stop], supervised=self.supervised[start:stop])

    def unscored(self) -> Document:
        return replace(self, supervised=np.zeros(len(self), bool))


Row = Sequence[Document]


class Layout(NamedTuple):
    """What tokens of a row see (`causal`: all before them), and how positions are counted."""

    attention: Literal["document", "causal"]
    positions: Literal["reset", "continue"]


class Frozen(BaseModel):
    """What becomes JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(Frozen):
    """A paired mean difference with its 95% interval; the fields of `stats.Difference`."""

    mean: float
    low: float | None
    high: float | None
    n: int
    detectable: float | None

    @classmethod
    def of(cls, a: Sequence[float], b: Sequence[float]) -> Estimate:
        """How far `b` lies above `a`, pair by pair."""
        found = paired_difference(a, b)
        return cls(mean=found.mean, low=found.low, high=found.high, n=found.n, detectable=found.detectable)


@contextmanager
def attending(model: Any, implementation: str = attention.NAME) -> Iterator[None]:
    """`model` as packcli's attention runs it, in eval mode and without gradients; afterwards as it was.

    Raises:
        ConfigError: a kind of model whose attention cannot be taken over.
    """
    configs.check_kind(model.config, "this checkpoint")
    if not getattr(type(model), "_supports_attention_backend", False):
        raise ConfigError(
            f"`{model.config.model_type}` has not the attention interface common in transformers: "
            "nothing can be probed in it",
            "probe another kind of model, such as llama, qwen3, mistral or gemma",
        )
    attention.windows(model.config)  # refuses layers that attend in chunks
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation(implementation)
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


def packed(documents: Sequence[Document], arm: ArmSpec, max_length: int, seed: int) -> list[list[Document]]:
    """The rows `packcli prepare` would make of these documents alone under an arm, none held out.

    A document that the packer cuts gives pieces, each a document of its row, as in training.
    """
    about = [sample.Document(len(document), _spans(document.supervised)) for document in documents]
    (panel,) = sample.panels(about, {"": arm}, max_length, micro_batch=1, seed=seed)
    rows = panel.rows
    pieces = [
        documents[number].part(start, stop)
        for number, start, stop in zip(
            rows.document.tolist(), rows.start.tolist(), rows.stop.tolist(), strict=True
        )
    ]
    return [pieces[first:last] for first, last in pairwise(rows.offsets.tolist())]


def batch(rows: Sequence[Row], layout: Layout) -> collate.Batch:
    """Rows end to end, each as long as its documents. Under `causal` attention a row is one segment."""
    few = _Few([document for row in rows for document in row])
    numbers = np.arange(few.num_documents)
    offsets = np.cumsum([0, *map(len, rows)])
    laid = Rows(numbers, np.zeros_like(numbers), few.lengths, offsets.astype(np.int64))
    arm = _ANY.model_copy(update=layout._asdict())
    return collate.collate(few, index.summarise(laid, index.Labels(few)), range(len(rows)), arm, 0, 0)


def losses(model: Any, rows: Sequence[Row], layout: Layout) -> list[float]:
    """[R] nats: the mean loss of each row's last document over its supervised tokens. Call it in `attending`.

    By the logits the model itself makes. Memory beside the model: `SLOTS` slots, or one longer row.
    """
    found: list[float] = []
    backend = attention.choose("sdpa", model.device, model.dtype)
    windows = attention.windows(model.config)
    for together in _batches(rows, model.config.get_text_config().vocab_size):
        scored = [[*(document.unscored() for document in row[:-1]), row[-1]] for row in together]
        inputs = batch(scored, layout).to(model.device)
        segments = attention.Segments(inputs.segments, backend, model.device, windows)
        logits = model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            segments=segments,
            use_cache=False,
            logits_to_keep=inputs.predict,
        ).logits[0]
        if len(logits) != len(inputs.labels):  # a model that knows no `logits_to_keep`
            logits = logits[inputs.predict]
        each = F.cross_entropy(logits.float(), inputs.labels, reduction="none").double().cpu()
        ends = np.cumsum([0, *(row[-1].labels for row in together)])
        found += [float(each[first:last].mean()) for first, last in pairwise(ends.tolist())]
    return found


def room(model: Any, max_length: int | None) -> int:
    """Tokens a row may hold: what is asked for, at most what the model has positions for."""
    context = getattr(model.config, "max_position_embeddings", None) or max_length or SLOTS
    return min(context, max_length or SLOTS)


def fitting(rows: Mapping[Any, Sequence[Row]], most: int) -> list[int]:
    """The places at which the rows of every kind hold at most so many tokens."""
    longest = np.max([[sum(map(len, row)) for row in kind] for kind in rows.values()], axis=0)
    return np.flatnonzero(longest <= most).tolist()


def _batches(rows: Sequence[Row], vocab_size: int) -> Iterator[list[Row]]:
    together: list[Row] = []
    slots = labels = 0
    for row in rows:
        slots += sum(map(len, row))
        labels += row[-1].labels
        if together and (slots > SLOTS or labels * vocab_size > _LOGITS):
            yield together
            together, slots, labels = [], sum(map(len, row)), row[-1].labels
        together.append(row)
    if together:
        yield together


def _spans(supervised: Bools) -> tuple[tuple[int, int], ...]:
    edges = np.diff(supervised.astype(np.int8), prepend=0, append=0)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


class _Few:
    """A token store of a list: `framed.Spanned` and `framed.Reader`."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self._spans = [_spans(document.supervised) for document in documents]
        flat = np.array([(n, *span) for n, spans in enumerate(self._spans) for span in spans], np.int64)
        document, start, stop = flat.reshape(-1, 3).T
        self.num_documents = len(documents)
        self.lengths = np.array([len(document) for document in documents], np.int64)
        self.content = np.zeros(len(documents), np.uint64)
        self.spans = (document, start, stop)

    def ids(self, document: int) -> NDArray[np.int32]:
        return self._documents[document].input_ids.astype(np.int32)

    def supervised(self, document: int) -> NDArray[np.int32]:
        return np.array(self._spans[document], np.int32).reshape(-1, 2)
