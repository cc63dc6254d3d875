"""Documents of real lengths with random tokens, the rows and steps arms make of them, and the models' shapes.

    python benchmarks/gpu/documents.py SWEEP RUNS > benchmarks/gpu/lengths.json

measures the lengths anew: 512 quantiles over all documents of the sweep's one token store, and the share of
supervised tokens among the documents around each.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from packcli import batching, flops, memory
from packcli.config import ARMS, ArmSpec, ModelSpec, TrainSpec
from packcli.data import index as indexes
from packcli.data.index import Index
from packcli.plan import Batching, IndexOrder, TrainOrder

TABLE = Path(__file__).parent / "lengths.json"
MICRO_BATCHES = 4  # a step: 32,768 slots at full size, so that the optimizer weighs little
ROWS = 2  # of max_length a micro-batch holds
LABEL = "random weights, random tokens"

_STEPS = 32  # more than any run takes

Lengths = Literal["real", "wildchat"]


@dataclass(frozen=True, slots=True)
class Shape:
    """`config`: of transformers. `max_length`: slots of a row."""

    name: str
    config: dict[str, Any]
    max_length: int

    @property
    def counted(self) -> flops.Shape:
        found = flops.shape(self.config)
        assert found is not None
        return found

    @property
    def slots(self) -> int:
        """Of a micro-batch, at most."""
        return ROWS * self.max_length


_LLAMA = {"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0}
_8B = {  # Llama 3 8B
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
_1B = {  # Llama 3.2 1B
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
_TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def shape(name: str, *, tiny: bool = False, layers: int | None = None) -> Shape:
    """8B or 1B; `tiny`: a stand-in of two layers under the same name. `layers`: fewer than it has."""
    config = {**_LLAMA, **(_8B if name == "8B" else _1B), **(_TINY if tiny else {})}
    if layers is not None:
        config["num_hidden_layers"] = layers
    return Shape(name, config, 256 if tiny else 4096)


class Documents:
    """What `Tokens` is to packing and collating, in memory: one supervised span at the end of each document.

    lengths   real: drawn from the table. wildchat: lognormal with the mean that the paper's WildChat (GPT-4) rows
              imply, 1,518 tokens, sigma 1.03: a model of longer conversations, not a measurement.
    """

    def __init__(self, count: int, vocab: int, lengths: Lengths = "real", longest: int = 4096) -> None:
        table, generator = json.loads(TABLE.read_text()), np.random.default_rng(0)
        # Stratified: the drawn documents hold the table's lengths in its proportions, whatever the seed.
        place = (generator.permutation(count) + 0.5) / count
        if lengths == "real":
            drawn = np.asarray(table["lengths"])[(place * len(table["lengths"])).astype(int)]
            share = np.asarray(table["supervised_share"])[(place * len(table["lengths"])).astype(int)]
        else:
            drawn = np.clip(generator.lognormal(np.log(1518) - 1.03**2 / 2, 1.03, count), 8, longest)
            share = np.full(count, table["provenance"]["supervised_share"])
        self.lengths = drawn.astype(np.int64)
        self._starts = np.maximum(1, self.lengths - np.ceil(self.lengths * share).astype(np.int64))
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        # A power law, as in text: the embedding's gradient meets some tokens often.
        self._ids = (1 + generator.zipf(1.3, int(self._offsets[-1])) % (vocab - 1)).astype(np.int32)
        self.content = np.zeros(count, np.uint64)

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @cached_property
    def spans(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.arange(self.num_documents), self._starts, self.lengths

    def ids(self, document: int) -> np.ndarray:
        return self._ids[self._offsets[document] : self._offsets[document + 1]]

    def supervised(self, document: int) -> np.ndarray:
        return np.array([[self._starts[document], self.lengths[document]]], np.int32)


@dataclass(frozen=True, slots=True)
class Work:
    """What an arm makes of the documents. `steps`: row numbers of each."""

    order: TrainOrder
    documents: Documents
    rows: Index
    steps: list[np.ndarray]

    def micro_batches(self, step: int) -> list[np.ndarray]:
        return batching.cut(self.steps[step], 1, self.order.train.micro_batch)

    def segments(self, rows: np.ndarray) -> tuple[int, ...]:
        """Lengths of the runs within which a micro-batch of full rows attends, padding left out."""
        layout = self.rows.rows
        if self.order.arm.attention == "causal":
            return tuple(int(self.rows.tokens[row]) for row in rows)
        pieces = [slice(layout.offsets[row], layout.offsets[row + 1]) for row in rows]
        return tuple(int(n) for piece in pieces for n in layout.stop[piece] - layout.start[piece])


def work(arm: str, shape: Shape, documents: Documents, train: dict[str, Any]) -> Work:
    """Rows and steps of an arm: every step is four micro-batches, each as full as 2 x max_length slots allow.

    Where rows have no common length, a micro-batch takes the most rows that fit in all of the run's.
    """
    spec = ArmSpec.model_validate(ARMS[arm])
    rows = _rows(spec, shape, documents)
    most = ROWS if spec.pad_to == "max_length" else shape.slots // int(rows.tokens.mean())
    for micro_batch in range(most, 0, -1):
        batch = {"micro_batch": micro_batch, "global_batch": MICRO_BATCHES * micro_batch}
        order = TrainOrder(
            id="bench",
            tokens="bench",
            index="bench",
            base=None,
            model=ModelSpec(config=shape.config, tokenizer="none", dtype="bfloat16"),
            arm=spec,
            train=TrainSpec(lr=1e-5, schedule="constant", epochs=1, **batch, **train),
            max_length=shape.max_length,
            seed=0,
        )
        steps = batching.run_steps(rows.sizes, order.train, spec.order, order.seed)
        whole = [rows for rows in steps if len(rows) == order.train.global_batch]
        found = Work(order, documents, rows, whole[:_STEPS])
        if _fullest(found) <= shape.slots:
            return found
    raise ValueError(f"{arm}: not even one row a micro-batch fits in {shape.slots:,} slots")


def filled(lengths: tuple[int, ...], slots: int) -> tuple[int, ...]:
    """Padding at the end is a segment of its own."""
    rest = slots - sum(lengths)
    return (*lengths, rest) if rest else lengths


def _rows(arm: ArmSpec, shape: Shape, documents: Documents) -> Index:
    order = IndexOrder(
        id="bench",
        tokens="bench",
        max_length=shape.max_length,
        validation=0.0,
        seed=0,
        layout=arm.rows.model_copy(update={"validation_after_packing": False}),  # nothing is held out here
        batching=Batching(global_batch=MICRO_BATCHES * ROWS, batch_unit="rows", micro_batch=ROWS, ranks=1),
        epochs=1,
    )
    rows, _, _ = indexes.build(order, documents, documents.num_documents, 0)
    return rows


def _fullest(found: Work) -> int:
    """Slots of the fullest micro-batch of all steps."""
    tokens, order = found.rows.tokens, found.order
    slots = 0
    for step in range(len(found.steps)):
        for rows in found.micro_batches(step):
            match order.arm.pad_to:
                case "max_length":
                    slots = max(slots, len(rows) * order.max_length)
                case "longest":
                    slots = max(slots, len(rows) * batching.longest(tokens[rows], order.max_length))
                case "none":
                    slots = max(slots, int(tokens[rows].sum()))
    return slots


def settings(shape: Shape, capacity_bytes: float, *, compiled: bool = True) -> list[dict[str, Any]]:
    """Ways to train that should fit by memory.py's count, fastest first; in each, as many layers as fit."""
    found = []
    for checkpointing, state in (("none", "float32"), ("none", "bfloat16"), ("selective", "bfloat16")):
        train = {"checkpointing": checkpointing, "optimizer_state": state, "compile": compiled}
        if estimated_bytes(shape, train) <= _FILLED * capacity_bytes:
            found.append(train)
    return [*found, {"checkpointing": "full", "optimizer_state": "bfloat16", "compile": compiled}]


_FILLED = 0.96
"""Share of the card a count may take. Above, an attempt would most likely be lost time."""


def fitting(shape: Shape, capacity_bytes: float) -> Shape:
    """The shape with as many layers as a card can train with selective checkpointing; on an H200 8B has all."""
    train = {"checkpointing": "selective", "optimizer_state": "bfloat16", "compile": True}
    layers = int(shape.config["num_hidden_layers"])
    while layers > 1 and estimated_bytes(shape, train) > _FILLED * capacity_bytes:
        layers -= 1
        shape = Shape(shape.name, {**shape.config, "num_hidden_layers": layers}, shape.max_length)
    return shape


def estimated_bytes(shape: Shape, train: dict[str, Any]) -> float:
    """memory.py's count for one GPU."""
    spec = TrainSpec(steps=1, lr=1e-5, global_batch=MICRO_BATCHES * ROWS, micro_batch=ROWS, **train)
    setup = memory.Setup(
        shape=shape.counted, train=spec, dtype="bfloat16", max_length=shape.max_length, world=1, degree=1
    )
    return memory.total_bytes(setup)


# Measuring the table -----------------------------------------------------------------------------------


def measure(sweep: Path, runs: Path) -> dict[str, Any]:
    from packcli import stages, sweepfile
    from packcli.store import Store

    store = Store(runs)
    plan = stages.make_plan(sweepfile.load(sweep), store)
    [order] = plan.tokens.values()
    tokens = stages.open_tokens(store, stages.prepare_tokens(order, store))
    document, start, stop = tokens.spans
    labels = np.bincount(document, stop - start, minlength=tokens.num_documents)
    by_length = np.argsort(tokens.lengths, kind="stable")
    parts = np.array_split(by_length, 512)
    return {
        "provenance": {
            "sources": [Path(source.source).name for source in order.sources],
            "tokenizer": "Llama 3's, as benchmarks/peers/llama3.py builds it, with its chat template",
            "supervised": "assistant turns",
            "documents": tokens.num_documents,
            "mean": round(float(tokens.lengths.mean()), 1),
            "longest": int(tokens.lengths.max()),
            "supervised_share": round(float(labels.sum() / tokens.lengths.sum()), 3),
            "quantiles": "the median length of each 512th of the documents, shortest first",
        },
        "lengths": [int(np.median(tokens.lengths[part])) for part in parts],
        "supervised_share": [round(float(labels[part].sum() / tokens.lengths[part].sum()), 2) for part in parts],
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), Path(sys.argv[2]))))
