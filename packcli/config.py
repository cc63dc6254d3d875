"""Every key a sweep file may hold, and what it means when left out.

`SweepSpec` is the file; `CellSpec` is one point of its matrix with every value written out. What the
study varies has no hidden default: an arm states all its fields. `sweepfile.py` reads YAML into these.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"

BatchUnit = Literal["rows", "documents", "tokens"]
Loss = Literal["token", "document", "row", "micro_batch"]
GROUPINGS = ("none", "similarity", "adversarial", "near_duplicates")
"""The words of `group_by`; any other is the name of a field."""
Packer = Literal["none", "concat", "next_fit_decreasing", "first_fit_decreasing", "shuffled_first_fit", "best_fit"]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


HOLDS_SECRET: Literal["holds_secret"] = "holds_secret"
"""The type of an error whose input must not be shown."""


def _without_secrets(url: str) -> str:
    """An address that may stand in every manifest: what a sweep says is written down."""
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise PydanticCustomError(HOLDS_SECRET, "it holds a password or a token; export OPENAI_BASE_URL instead")
    return url


Url = Annotated[str, AfterValidator(_without_secrets)]


class Spec(BaseModel):
    """Base of everything that crosses a file boundary: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class LayoutSpec(Spec):
    """How an arm makes rows: all that a row index depends on of it. The words are explained in `ArmSpec`."""

    layout: Literal["pad", "padding_free", "pack"]
    pad_to: Literal["max_length", "longest", "none"]
    packer: Packer
    overlong: Literal["truncate", "drop", "none", "lost"]
    truncation: Literal["plain", "per_turn"]
    window: PositiveInt | None
    workers: PositiveInt
    remainder: Literal["keep", "drop"]
    order: Literal["shuffled", "sorted"]
    repack_each_epoch: bool
    validation_after_packing: bool
    boundary: Literal["none", "eos", "bos_eos"] = "none"  # as in stores that were made before there was a choice
    group_by: Annotated[str, Field(pattern=NAME_PATTERN)] = "none"


class ArmSpec(LayoutSpec):
    """One way of turning documents into rows and rows into a loss.

    layout          pad: one document a row. padding_free: the same rows flattened, no padding. pack: several.
    pad_to          how far a row is filled with padding: to max_length; to the longest row of its micro-batch,
                    rounded up to a multiple of 8; `none` only for padding_free.
    packer          concat: the documents end to end, cut at row ends (paper, section 3.2 "random").
                    next_fit_decreasing: the paper's "greedy" as its text describes it.
                    first_fit_decreasing: longest first, into the first row with room.
                    shuffled_first_fit: in shuffled order, into the first row with room.
                    best_fit: the best of best-fit decreasing, a subset-sum fill and cutting-stock patterns.
    overlong        truncate: a document keeps max_length tokens. drop: it is left out. none: the packer cuts it.
                    lost: as the released "greedy" code loses it (`packing.greedy_released`).
    truncation      plain: the first max_length tokens. per_turn: source and answer of the turn that does not fit
                    are both cut, in proportion, and later turns left out (the released code).
    window          pack so many documents at a time, in file order; unset: the whole set, shuffled.
    workers         split the set into so many contiguous parts first, as `datasets.map(num_proc=...)` does.
    remainder       drop: a window's last row is left out unless full; so is a row without a label. keep: not.
    order           shuffled: rows in random order. sorted: batches of like length, in random order.
    repack_each_epoch         pack anew each epoch; unset: rows stay, only their order changes.
    validation_after_packing  hold out rows, not documents; its loss compares to no other arm's.
    boundary        tokens put around each document, never trained on: eos after it; bos before it as well. Where
                    it ends (begins) with that token already, none is added.
    group_by        who shares a row. none: chance. A field of the records that `data.fields` keeps: those that say
                    the same there. similarity: those of one cluster by tf-idf of their tokens. adversarial: the
                    least similar. near_duplicates: those that say nearly the same (MinHash).
    attention       document: no token sees another document. causal: it sees all of its row before it.
    positions       reset at each document, or continue through the row. To reset them under causal attention gives
                    tokens of two documents one position, which nobody would train on but to take effects apart.
    loss            token: sum over supervised tokens / their global count in the step. document: mean over the
                    documents that start in the step of each one's token mean. row: mean over rows of token means.
                    micro_batch: mean of micro-batch means (the released code).
    batch_unit      what train.global_batch counts for this arm; unset: what train.batch_unit says.
    global_batch    how many of them a step of this arm holds; unset: what train.global_batch says.
    """

    attention: Literal["document", "causal"]
    positions: Literal["reset", "continue"]
    loss: Loss
    batch_unit: BatchUnit | None = None
    global_batch: PositiveInt | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.layout == "pack") == (self.packer == "none"):
            raise ValueError("`packer` belongs to `layout: pack`, and `layout: pack` needs one")
        if (self.layout == "padding_free") != (self.pad_to == "none"):
            raise ValueError("`pad_to: none` is what `layout: padding_free` means; they go together")
        if (self.packer == "concat") != (self.overlong == "none"):
            raise ValueError("only `packer: concat` cuts documents: it takes `overlong: none`, others do not")
        if (self.packer, self.overlong) != ("first_fit_decreasing", "lost") and self.overlong == "lost":
            raise ValueError("`overlong: lost` is what the released code does in `packer: first_fit_decreasing`")
        if self.overlong == "lost" and self.window is None:
            raise ValueError("`overlong: lost` needs `window`, as the released code packs (1000)")
        if self.window is not None and self.packer not in ("concat", "first_fit_decreasing"):
            raise ValueError(
                "`window` is for `packer: concat` and `first_fit_decreasing`; others pack the whole set"
            )
        if self.window is None and self.workers > 1:
            raise ValueError("`workers` needs a `window`")
        if self.remainder == "drop" and (self.packer != "concat" or self.window is None):
            raise ValueError("`remainder: drop` is for `packer: concat` in a `window`: others leave no rest")
        if self.order == "sorted" and self.layout == "pack":
            raise ValueError("`order: sorted` is for one document a row: packed rows are all of one length")
        if self.repack_each_epoch and (self.layout != "pack" or self.window is not None):
            raise ValueError("`repack_each_epoch` needs a shuffled `layout: pack`, that is, no `window`")
        if self.truncation == "per_turn" and self.overlong != "truncate":
            raise ValueError("`truncation: per_turn` needs `overlong: truncate`")
        if self.attention == "causal" and self.layout != "pack":
            raise ValueError("`attention: causal` across documents needs `layout: pack`")
        return self

    @model_validator(mode="after")
    def _unmarked(self) -> Self:
        if self.boundary != "none" and (self.validation_after_packing or self.truncation == "per_turn"):
            raise ValueError(
                "`boundary` goes with no `validation_after_packing` and with `truncation: plain` only"
            )
        return self

    @model_validator(mode="after")
    def _grouped(self) -> Self:
        if self.group_by == "none":
            return self
        if self.layout != "pack" or self.window is not None:
            raise ValueError("`group_by` says who shares a row: it needs `layout: pack`, and no `window`")
        if self.packer == "concat":
            raise ValueError("`group_by` needs a packer that keeps documents whole, such as `packer: best_fit`")
        if self.group_by == "adversarial" and self.packer != "shuffled_first_fit":
            raise ValueError("`group_by: adversarial` deals documents out to rows: `packer: shuffled_first_fit`")
        return self

    @property
    def one_document_per_row(self) -> bool:
        return self.layout != "pack"

    @property
    def rows(self) -> LayoutSpec:
        """The part that decides rows: arms that share it share their row index."""
        return LayoutSpec(**{key: getattr(self, key) for key in LayoutSpec.model_fields})


_PLAIN: dict[str, Any] = {
    "truncation": "plain",
    "window": None,
    "workers": 1,
    "remainder": "keep",
    "order": "shuffled",
    "repack_each_epoch": False,
    "validation_after_packing": False,
    "boundary": "none",
    "group_by": "none",
}
_TRUNCATED = {"overlong": "truncate", "attention": "document", "positions": "reset", "loss": "token"}
_CROSSING = {"attention": "causal", "positions": "continue", "loss": "token"}
_PACK: dict[str, Any] = {"layout": "pack", "pad_to": "max_length"}
# The paper's arms as its released code ran them (LLaMA-Factory fork, 64 preprocessing workers).
_RELEASED: dict[str, Any] = {"pad_to": "longest", "loss": "micro_batch", "validation_after_packing": True}
_WINDOWS: dict[str, Any] = {"window": 1000, "workers": 64}

_ARMS: dict[str, dict[str, Any]] = {
    "padding": {"layout": "pad", "pad_to": "max_length", "packer": "none", **_TRUNCATED},
    "padding_free": {"layout": "padding_free", "pad_to": "none", "packer": "none", **_TRUNCATED},
    "sorted": {"layout": "pad", "pad_to": "longest", "packer": "none", "order": "sorted", **_TRUNCATED},
    "random": {**_PACK, "packer": "concat", "overlong": "none", **_CROSSING},
    "greedy": {**_PACK, "packer": "next_fit_decreasing", "overlong": "truncate", **_CROSSING},
    "best_fit": {**_PACK, "packer": "best_fit", **_TRUNCATED},
    "longalign": {**_PACK, "packer": "shuffled_first_fit", **_TRUNCATED, "loss": "document"},
    "related": {**_PACK, "packer": "best_fit", **_TRUNCATED, "group_by": "similarity"},
    "unrelated": {**_PACK, "packer": "shuffled_first_fit", **_TRUNCATED, "group_by": "adversarial"},
    "near_duplicate": {**_PACK, "packer": "best_fit", **_TRUNCATED, "group_by": "near_duplicates"},
    "padding_released": {"layout": "pad", "packer": "none", **_TRUNCATED, "truncation": "per_turn", **_RELEASED},
    "random_released": {
        **_PACK, "packer": "concat", "overlong": "none", "remainder": "drop", **_CROSSING, **_WINDOWS, **_RELEASED,
    },
    "greedy_released": {
        **_PACK, "packer": "first_fit_decreasing", "overlong": "lost", **_CROSSING, **_WINDOWS, **_RELEASED,
    },
}  # fmt: skip
ARMS = {name: {**_PLAIN, **fields} for name, fields in _ARMS.items()}
LENGTHS_ALONE = tuple(name for name, fields in ARMS.items() if fields["group_by"] == "none")
"""Built-in arms whose rows follow from lengths; the others look at what documents say."""


class SourceSpec(Spec):
    """Where conversations come from, and which share of them.

    source      a built-in name, a paper set, a path (file, directory, glob; relative to where packcli runs) or a
                Hugging Face dataset id.
    subset, split, revision   of a Hugging Face dataset; `split` defaults to `train`.
    streaming   read a Hugging Face dataset over the network without keeping it.
    mapping     the field packcli knows -> the name it has in the data; unset: what `data.mapping` says.
    weight      how often each conversation is used: 0.25 draws a quarter of them, 2 takes each twice. Which are
                drawn is decided by their content.
    turns       single: conversations with one answer alone; multi: those with several. The others are rejected.
    """

    source: Annotated[str, Field(min_length=1)]
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    mapping: dict[str, str] | None = None
    weight: PositiveFloat = 1.0
    turns: Literal["any", "single", "multi"] = "any"


def _blocks(value: Any) -> Any:
    """`source` as a list of blocks, whether it was written as one name, one block or a list of either."""
    listed = value if isinstance(value, list | tuple) else [value]
    return [{"source": item} if isinstance(item, str) else item for item in listed]


class DataSpec(Spec):
    """`source`: one source, or a list of them, each a string or a block as in `SourceSpec`.

    train_on     assistant: every assistant turn. last_assistant: the last one only. all: every token.
    fields       of each record to keep, under the names that `mapping` gives them, for `group_by` of an arm.
    on_error     fail: a line that is no JSON stops. skip: it is rejected and counted, up to `max_errors` of them.
    processes    that read and tokenize; unset: one a core. Changes no result and enters no id.
    """

    source: Annotated[tuple[SourceSpec, ...], BeforeValidator(_blocks), Field(min_length=1)]
    max_length: Annotated[int, Field(ge=2, le=1 << 24)]
    validation: Fraction = 0.0
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    template: str | None = None
    mapping: dict[str, str] | None = None
    max_documents: PositiveInt | None = None
    fields: tuple[Annotated[str, Field(pattern=NAME_PATTERN)], ...] = ()
    on_error: Literal["fail", "skip"] = "fail"
    max_errors: PositiveInt = 100
    processes: PositiveInt | None = None

    @field_validator("fields")
    @classmethod
    def _distinct(cls, fields: tuple[str, ...]) -> tuple[str, ...]:
        if taken := sorted({*GROUPINGS} & {*fields}):
            raise ValueError(f"`{taken[0]}` is a word of `group_by`; rename the field with `data.mapping`")
        if len({*fields}) < len(fields):
            raise ValueError("a field is named twice")
        return fields

    @property
    def sources(self) -> tuple[SourceSpec, ...]:
        """Every source, `mapping` filled in."""
        if self.mapping is None:
            return self.source
        return tuple(
            block.model_copy(update={"mapping": self.mapping}) if block.mapping is None else block
            for block in self.source
        )


class LoraSpec(Spec):
    """Train low-rank additions to the linear layers instead of the weights (peft's LoRA)."""

    rank: PositiveInt
    alpha: PositiveFloat
    dropout: Fraction = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


Tracker = Literal["tensorboard", "wandb"]
Trainer = Literal["packcli", "trl"]


class TrainSpec(Spec):
    """Exactly one of epochs, steps, tokens says how long. The last block never enters an id.

    steps              0: the model is scored as it comes; nothing else need be said here.
    lr_rule            fixed: `lr` as it is. sqrt, linear: `lr` is meant for steps of `reference_batch`
                       conversations and grows as the root of, or with, the number this run's steps really hold.
    warmup_steps       instead of `warmup_ratio`: so many.
    optimizer_state    bfloat16: AdamW's two moments at half the memory, rounded stochastically.
    backend            who trains: packcli, or TRL on the same rows (docs/coming_from.md).
    backend_python     the Python that has TRL; unset: PACKCLI_TRL_PYTHON, else this one.
    ranks              micro-batches are cut as for so many processes, however many there are. It enters an id only
                       where the cut changes the result: `loss: micro_batch`, `pad_to: longest`.
    nodes              of a cluster that train it together; unset: as the profile says. No node enters an id.
    attention_backend  auto: flash-attn, else torch's varlen, else flex (all three on a GPU), else sdpa.
    head               how the loss at the labels is computed: own, or liger-kernel's.
    checkpointing      activations kept: all (none), all but element-wise ones (selective), layer inputs (full).
    sharding           full: over all processes. hybrid: within a node, replicated between. auto: what fits.
    deterministic      on a GPU, the same bits each time, at a cost.
    hang_timeout_s     a step, or a batch of the validation, that takes longer is taken for hung and the run
                       stopped. Unset: never.
    """

    epochs: PositiveInt | None = None
    steps: NonNegativeInt | None = None
    tokens: PositiveInt | None = None
    lr: PositiveFloat
    lr_rule: Literal["fixed", "sqrt", "linear"] = "fixed"
    reference_batch: PositiveInt | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.0
    warmup_steps: NonNegativeInt | None = None
    global_batch: PositiveInt
    batch_unit: BatchUnit = "rows"
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip: PositiveFloat | None = 1.0
    optimizer_state: Literal["float32", "bfloat16"] = "float32"
    lora: LoraSpec | None = None
    backend: Trainer = "packcli"

    backend_python: str | None = None
    micro_batch: PositiveInt = 1
    ranks: PositiveInt = 1
    nodes: PositiveInt | None = None
    threads: PositiveInt | None = None
    save_every: PositiveInt | None = 500
    keep_last: PositiveInt = 1
    async_save: bool = False
    attention_backend: Literal["auto", "flash", "varlen", "flex", "sdpa"] = "auto"
    head: Literal["own", "liger"] = "own"
    compile: bool = False
    checkpointing: Literal["none", "selective", "full"] = "none"
    sharding: Literal["auto", "full", "hybrid"] = "auto"
    deterministic: bool = False
    hang_timeout_s: PositiveFloat | None = None
    trackers: tuple[Tracker, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _nothing_to_say(cls, values: Any) -> Any:
        """Where nothing is trained, how is not asked."""
        untrained = isinstance(values, dict) and values.get("steps") == 0
        return {"lr": 1.0, "global_batch": 1, **values} if untrained else values

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if sum(budget is not None for budget in (self.epochs, self.steps, self.tokens)) != 1:
            raise ValueError("give exactly one of `epochs`, `steps`, `tokens`")
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError("give `warmup_steps` or `warmup_ratio`, not both")
        if (self.lr_rule == "fixed") != (self.reference_batch is None):
            raise ValueError(
                "`lr_rule: sqrt` and `linear` need `reference_batch` (conversations a step), `fixed` has none"
            )
        return self


TRAIN_EXECUTION_KEYS = frozenset(
    {
        "backend_python",
        "micro_batch",
        "ranks",
        "nodes",
        "threads",
        "save_every",
        "keep_last",
        "async_save",
        "attention_backend",
        "head",
        "compile",
        "checkpointing",
        "sharding",
        "deterministic",
        "hang_timeout_s",
        "trackers",
    }
)


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


class JudgeSpec(Spec):
    """The model that judges answers (WildBench, MT-bench), how it writes, and what it may cost; docs/judge.md.

    model              as its server knows it.
    base_url           of that server; by default OPENAI_BASE_URL, else OpenAI's own.
    against            a file of another model's WildBench answers: beside the score, WB-Reward against them.
    length_margin      WB-Reward's K, in characters: a slight win longer by more is a tie; None: no such rule.
    max_answer_tokens  of one answer of the checkpoint; by default the benchmark's own.
    max_tokens         of one reply of the judge; `token_limit`: the name by which its server knows that bound.
    temperature, json_mode   null and false leave the key out, for servers that refuse it.
    prices             a YAML file, USD per million tokens.
    max_cost_usd       for one task of one checkpoint, whatever earlier runs spent on the same judgments included.
    deadline_s         of one judgment with all its retries; `timeout_s`: the silence on one connection.
    max_retries        of one call, for what server or connection did wrong; `attempts`: replies asked for until
                       one is a verdict; `workers`: judgments asked for at a time.
    """

    model: Annotated[str, Field(min_length=1)]
    base_url: Url | None = None
    against: str | None = None
    length_margin: NonNegativeInt | None = None
    max_answer_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = 0.0
    max_tokens: PositiveInt = 2048
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    json_mode: bool = True
    prices: str | None = None
    max_cost_usd: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    workers: Annotated[int, Field(ge=1, le=256)] = 8
    deadline_s: PositiveFloat = 300.0
    timeout_s: PositiveFloat = 60.0
    max_retries: NonNegativeInt = 5
    attempts: PositiveInt = 2


class ProbeSpec(Spec):
    """What the task `probes` looks at; docs/probes.md.

    source      conversations; by default the cell's own data, for a checkpoint by itself packcli's toy corpus.
    before      the checkpoint before training; by default what the cell started from.
    arms        packing arms by whose rows, attention and positions crossing attention is measured.
    count       of documents, drawn by `seed`.
    max_length  of a row; by default what the model has positions for, at most 4,096 (the toy corpus: 192).
    """

    source: str | None = None
    before: str | None = None
    arms: tuple[str, ...] = ("random", "greedy", "best_fit")
    count: Annotated[int, Field(ge=2)] = 128
    max_length: Annotated[int, Field(ge=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class EvalSpec(Spec):
    """`fewshot`: with a chat template, examples are turns of their own, or text in the user's one turn.

    `batch_size` (None: found), `processes` (None: one a GPU) and `base_url` (of the server that `engine: openai`
    asks) change no score.
    """

    tasks: tuple[str, ...] = ()
    limit: PositiveInt | None = None
    bench_data: str | None = None
    chat_template: bool = True
    fewshot: Literal["turns", "text"] = "turns"
    engine: Literal["hf", "vllm", "openai"] = "hf"
    batch_size: PositiveInt | None = None
    processes: PositiveInt | None = None
    base_url: Url | None = None
    judge: JudgeSpec | None = None
    probes: ProbeSpec = ProbeSpec()


Gpu = Literal[
    "A40", "A100-40GB", "A100-80GB", "A800-80GB", "L40S", "RTX4090",
    "H20", "H100-80GB", "H800-80GB", "H200", "B200",
]  # fmt: skip


class ClusterSpec(Spec):
    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt = 8
    gpu: Gpu

    @property
    def gpus(self) -> int:
        """In all."""
        return self.nodes * self.gpus_per_node


class EstimateSpec(Spec):
    """What `--dry-run` needs to say what a run takes; it changes nothing and enters no id.

    cluster     where it is to run; without it no memory is counted.
    slot_mfu    model FLOPs of all slots, padding included, over the peak, as measured there; without it no hours.
    """

    cluster: ClusterSpec | None = None
    slot_mfu: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None


class CellSpec(Spec):
    """One point of a sweep, every value written out."""

    model: ModelSpec
    data: DataSpec
    arm: ArmSpec
    train: TrainSpec
    eval: EvalSpec = EvalSpec()
    estimate: EstimateSpec = EstimateSpec()
    seed: Annotated[int, Field(ge=0, lt=2**31)]

    @model_validator(mode="after")
    def _fields_are_kept(self) -> Self:
        wanted, kept = self.arm.group_by, self.data.fields
        if wanted not in (*GROUPINGS, *kept):
            line = f"data: {{fields: [{', '.join([*kept, wanted])}]}}"
            words = ", ".join(GROUPINGS)
            raise ValueError(f"`group_by: {wanted}` is none of {words}, so it is a field to keep: add `{line}`")
        return self


class LadderSpec(Spec):
    """`arms` in the order in which their differences are told (`report --format ladder`).

    `best`: an axis of the matrix, over which each arm stands at the value with its lowest validation loss.
    """

    arms: tuple[str, ...]
    best: str | None = None


class SweepSpec(Spec):
    """A sweep after its matrix was multiplied out: `cells` pairs labels (verbatim) with what they mean."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    baseline: str | None
    ladders: dict[str, LadderSpec] = {}
    axes: dict[str, tuple[str, ...]]
    cells: tuple[tuple[dict[str, str], CellSpec], ...]
