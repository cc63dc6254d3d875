"""Every key a sweep file may hold, and what it means when left out.

`SweepSpec` is the file; `CellSpec` is one point of its matrix with every value written out. What the
study varies has no hidden default: an arm states all its fields. `sweepfile.py` reads YAML into these.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"

BatchUnit = Literal["rows", "documents", "tokens"]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Spec(BaseModel):
    """Base of everything that crosses a file boundary: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class LayoutSpec(Spec):
    """How an arm makes rows: all that a row index depends on of it. The words are explained in `ArmSpec`."""

    layout: Literal["pad", "padding_free", "pack"]
    pad_to: Literal["max_length", "none"]
    packer: Literal["none", "concat", "next_fit_decreasing", "best_fit"]
    overlong: Literal["truncate", "none"]


class ArmSpec(LayoutSpec):
    """One way of turning documents into rows and rows into a loss.

    layout          pad: one document a row. padding_free: the same rows flattened, no padding. pack: several.
    pad_to          how far a row is filled with padding; `none` only for padding_free.
    packer          concat: the whole set in shuffled order, cut at row ends (paper, section 3.2 "random").
                    next_fit_decreasing: the paper's "greedy" as its text describes it.
                    best_fit: the better of best-fit decreasing and a subset-sum fill.
    overlong        truncate: a document keeps its first max_length tokens. none: the packer cuts it.
    attention       document: no token sees another document. causal: it sees all of its row before it.
    positions       reset at each document, or continue through the row.
    loss            token: sum over supervised tokens / their global count in the step.
    batch_unit      what train.global_batch counts for this arm; unset: what train.batch_unit says.
    """

    attention: Literal["document", "causal"]
    positions: Literal["reset", "continue"]
    loss: Literal["token"]
    batch_unit: BatchUnit | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.layout == "pack") == (self.packer == "none"):
            raise ValueError("`packer` belongs to `layout: pack`, and `layout: pack` needs one")
        if (self.layout == "padding_free") != (self.pad_to == "none"):
            raise ValueError("`pad_to: none` is what `layout: padding_free` means; they go together")
        if (self.packer == "concat") != (self.overlong == "none"):
            raise ValueError("only `packer: concat` cuts documents: it takes `overlong: none`, others `truncate`")
        if self.attention == "causal" and self.layout != "pack":
            raise ValueError("`attention: causal` across documents needs `layout: pack`")
        if self.attention == "causal" and self.positions == "reset":
            raise ValueError("`positions: reset` under `attention: causal` gives two tokens of a row one position")
        return self

    @property
    def one_document_per_row(self) -> bool:
        return self.layout != "pack"

    @property
    def rows(self) -> LayoutSpec:
        """The part that decides rows: arms that share it share their row index."""
        return LayoutSpec(**{key: getattr(self, key) for key in LayoutSpec.model_fields})


_TRUNCATED = {"overlong": "truncate", "attention": "document", "positions": "reset", "loss": "token"}
_CROSSING = {"attention": "causal", "positions": "continue", "loss": "token"}
_PACK: dict[str, Any] = {"layout": "pack", "pad_to": "max_length"}

ARMS: dict[str, dict[str, Any]] = {
    "padding": {"layout": "pad", "pad_to": "max_length", "packer": "none", **_TRUNCATED},
    "padding_free": {"layout": "padding_free", "pad_to": "none", "packer": "none", **_TRUNCATED},
    "random": {**_PACK, "packer": "concat", "overlong": "none", **_CROSSING},
    "greedy": {**_PACK, "packer": "next_fit_decreasing", "overlong": "truncate", **_CROSSING},
    "best_fit": {**_PACK, "packer": "best_fit", **_TRUNCATED},
}


class DataSpec(Spec):
    """`source`: a built-in name, or a path, directory or glob (relative to where packcli runs), or a list."""

    source: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]
    max_length: Annotated[int, Field(ge=2, le=1 << 24)]
    validation: Fraction = 0.0
    train_on: Literal["assistant"] = "assistant"
    template: str | None = None
    mapping: dict[str, str] | None = None
    max_documents: PositiveInt | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)


class TrainSpec(Spec):
    """Exactly one of epochs, steps, tokens says how long. The last block never enters an id."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    lr: PositiveFloat
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.0
    global_batch: PositiveInt
    batch_unit: BatchUnit = "rows"
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip: PositiveFloat | None = 1.0

    micro_batch: PositiveInt = 1
    threads: PositiveInt | None = None
    save_every: PositiveInt | None = 500
    keep_last: PositiveInt = 1

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if sum(budget is not None for budget in (self.epochs, self.steps, self.tokens)) != 1:
            raise ValueError("give exactly one of `epochs`, `steps`, `tokens`")
        return self


TRAIN_EXECUTION_KEYS = frozenset({"micro_batch", "threads", "save_every", "keep_last"})


class BaseSpec(Spec):
    """A base model trained once and shared: the cell's model from scratch on other data."""

    data: DataSpec
    arm: Literal["padding", "padding_free", "random", "greedy", "best_fit"]
    train: TrainSpec
    seed: int = 0


class ModelSpec(Spec):
    """`name`: a checkpoint directory, a hub id, or a packaged block (`tiny`). `config`: random weights."""

    name: str | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    vocab_size: Annotated[int, Field(ge=260)] | None = None
    base: BaseSpec | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _weights_from_one_place(self) -> Self:
        if self.config is None and self.name is None:
            raise ValueError("give `name` (a checkpoint) or `config` (random weights)")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a model made from `config` needs `tokenizer`: a name, a directory, or `train`")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs `model_type`, such as `llama`")
        if self.tokenizer == "train" and self.vocab_size is None:
            raise ValueError("`tokenizer: train` needs `vocab_size`, an upper bound")
        if self.tokenizer == "train" and self.config is None:
            raise ValueError("`tokenizer: train` fits only a model made from `config`")
        return self


class EvalSpec(Spec):
    tasks: tuple[str, ...] = ()
    limit: PositiveInt | None = None
    bench_data: str | None = None
    chat_template: bool = True
    engine: Literal["hf"] = "hf"


class CellSpec(Spec):
    """One point of a sweep, every value written out."""

    model: ModelSpec
    data: DataSpec
    arm: ArmSpec
    train: TrainSpec
    eval: EvalSpec = EvalSpec()
    seed: Annotated[int, Field(ge=0, lt=2**31)]


class SweepSpec(Spec):
    """A sweep after its matrix was multiplied out: `cells` pairs labels (verbatim) with what they mean."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    baseline: str | None
    axes: dict[str, tuple[str, ...]]
    cells: tuple[tuple[dict[str, str], CellSpec], ...]
