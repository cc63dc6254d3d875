"""Bytes per GPU of a training run, by part and with the arithmetic in words. Pure.

What is counted is what FSDP2 and AdamW allocate as `train/distributed.py` sets them up. Every tensor that a layer
keeps is named below; tests count them in transformers' own layer, and whole steps with torch's memory tracker.
Not counted: fragmentation, for which `SPARE` is kept free; activations of models `flops.Shape` does not describe.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from packcli import flops
from packcli.config import ClusterSpec, Gpu, LoraSpec, Spec, TrainSpec
from packcli.flops import Shape

Dtype = Literal["float32", "bfloat16"]
Sharding = Literal["auto", "full", "hybrid"]

GIB = 1 << 30
SPARE = 0.1
"""Share of a card's memory to leave free: the caching allocator never fills it to the last byte."""
LOGITS_CHUNK_BYTES = 1 << 30
"""fp32 logits the head has alive at once on a GPU (`model/head.py`)."""
_OUTSIDE_BYTES = 3 << 29  # CUDA context and NCCL's buffers, which torch does not count
_MAX_MICRO_BATCH = 64

CARDS: dict[Gpu, tuple[str, float]] = {  # torch's name (its beginning), GiB that CUDA reports as total
    "A40": ("NVIDIA A40", 44.4),
    "A100-40GB": ("NVIDIA A100", 39.4),
    "A100-80GB": ("NVIDIA A100", 79.1),
    "A800-80GB": ("NVIDIA A800", 79.1),
    "L40S": ("NVIDIA L40S", 44.4),
    "RTX4090": ("NVIDIA GeForce RTX 4090", 23.5),
    "H20": ("NVIDIA H20", 95.0),
    "H100-80GB": ("NVIDIA H100", 79.1),
    "H800-80GB": ("NVIDIA H800", 79.1),
    "H200": ("NVIDIA H200", 139.7),
    "B200": ("NVIDIA B200", 178.3),
}


class Part(Spec):
    """`arithmetic`: how `bytes` come about, in words."""

    name: str
    bytes: float
    arithmetic: str


class Memory(Spec):
    """One GPU at its fullest.

    sharded_over   GPUs that share each parameter.
    moment         when it is fullest; `parts` are those alive then and sum to `total_bytes`.
    micro_batch    the largest that fits with `SPARE` left; 0: none. `limit`: whether memory ends it, or the rows a
                   GPU has in a step, or our patience.
    remedies       settings that would fit, where these do not.
    """

    gpu: str
    gpus: int
    sharded_over: int
    moment: str
    parts: tuple[Part, ...]
    total_bytes: float
    capacity_bytes: float
    micro_batch: int
    limit: Literal["memory", "step", "not tried"]
    remedies: tuple[str, ...]

    @property
    def fits(self) -> Literal["yes", "barely", "no"]:
        if self.total_bytes > self.capacity_bytes:
            return "no"
        return "yes" if self.total_bytes <= (1 - SPARE) * self.capacity_bytes else "barely"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """All that memory depends on. `world`: GPUs; `degree`: those that share each parameter."""

    shape: Shape
    train: TrainSpec
    dtype: Dtype
    max_length: int
    world: int
    degree: int

    @property
    def element(self) -> int:
        """Bytes of a number the model computes with."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def unsharded(self) -> bool:
        """One float32 process trains the plain model, without FSDP."""
        return self.world == 1 and self.dtype == "float32"

    @property
    def rows(self) -> int:
        """Rows of a micro-batch on one GPU: a step may hold fewer than `micro_batch` for each."""
        return min(self.train.micro_batch, _most_rows(self.train, self.world))

    @property
    def slots(self) -> int:
        return self.rows * self.max_length


def estimate(shape: Shape, train: TrainSpec, dtype: Dtype, max_length: int, cluster: ClusterSpec) -> Memory:
    """Memory of a run on a cluster."""
    capacity = CARDS[cluster.gpu][1] * GIB
    setup = _choose(shape, train, dtype, max_length, cluster)
    moment, parts = fullest(setup)
    total = sum(part.bytes for part in parts)
    return Memory(
        gpu=cluster.gpu,
        gpus=cluster.gpus,
        sharded_over=setup.degree,
        moment=moment,
        parts=tuple(parts),
        total_bytes=total,
        capacity_bytes=capacity,
        micro_batch=(largest := _largest_micro_batch(setup, capacity)),
        limit=_limit(setup, largest),
        remedies=() if total <= (1 - SPARE) * capacity else tuple(_remedies(setup, cluster)),
    )


def sharding(
    wanted: Sharding,
    shape: Shape | None,
    train: TrainSpec,
    *,
    world: int,
    per_node: int,
    capacity_bytes: float | None,
    dtype: Dtype = "bfloat16",
    max_length: int | None = None,
) -> int:
    """Over how many GPUs each parameter is sharded: all, or those of a node (less traffic between nodes).

    `auto`: those of a node where that leaves `SPARE` of a GPU free; all where shape or capacity are not known.
    Without `max_length` activations are not known: half a GPU is left for them.
    """
    if world <= per_node or world % per_node or wanted == "full":
        return world
    if wanted == "hybrid":
        return per_node
    if shape is None or capacity_bytes is None:
        return world
    setup = Setup(shape=shape, train=train, dtype=dtype, max_length=max_length or 0, world=world, degree=per_node)
    free = SPARE if max_length is not None else 0.5
    return per_node if total_bytes(setup) <= (1 - free) * capacity_bytes else world


def total_bytes(setup: Setup) -> float:
    """Of one GPU at its fullest."""
    return sum(part.bytes for part in fullest(setup)[1])


# Parameters --------------------------------------------------------------------------------------------


def layer_parameters(shape: Shape) -> int:
    """Matrices and the two norms of one decoder layer (biases, where a model has any, are left out)."""
    return shape.layer + 2 * shape.hidden


def root_parameters(shape: Shape) -> int:
    """Embedding, head and last norm: the group FSDP keeps gathered from the forward to the end of the backward."""
    return (1 if shape.tied else 2) * shape.vocab * shape.hidden + shape.hidden


def parameters(shape: Shape) -> int:
    return shape.layers * layer_parameters(shape) + root_parameters(shape)


def adapter_parameters(shape: Shape, lora: LoraSpec) -> int:
    """What LoRA adds to one layer: rank x (inputs + outputs) of each matrix it targets."""
    hidden, attention, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = {
        "q_proj": hidden + attention,
        "k_proj": hidden + kv,
        "v_proj": hidden + kv,
        "o_proj": attention + hidden,
        "gate_proj": hidden + shape.intermediate,
        "up_proj": hidden + shape.intermediate,
        "down_proj": shape.intermediate + hidden,
    }
    chosen = sides if lora.targets == "all-linear" else [name for name in sides if name in lora.targets]
    return lora.rank * sum(sides[name] for name in chosen)


# Activations -------------------------------------------------------------------------------------------


def kept_bytes(setup: Setup, checkpointing: Literal["none", "selective", "full"]) -> int:
    """Bytes a decoder layer keeps for each slot until its backward pass.

    d, a, k, f: widths of the stream, the queries, the keys, the feed-forward block; e: bytes of an element.
    """
    shape, e = setup.shape, setup.element
    d, f = shape.hidden, shape.intermediate
    a, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    statistics = 4 * shape.heads  # attention's log-sum-exp, fp32
    match checkpointing:
        case "full":
            return e * d  # the layer's input
        case "selective":
            # Input; q, k, v; attention's output; products of its projection, of gate and up, of down.
            return e * (d + (a + 2 * k) + a + d + 2 * f + d) + statistics
        case "none" if setup.train.compile:
            # Fused: input, first norm's output; q, k, v; attention's output; sum, second norm's output; gate, up,
            # their product; both norms' scales.
            return e * (2 * d + (a + 2 * k) + a + 2 * d + 3 * f) + statistics + 8
        case _:
            # transformers' modules one by one: a norm keeps its input in fp32, the input scaled, and its output;
            # the gate keeps itself and its SiLU.
            return 2 * (4 + 2 * e) * d + e * ((a + 2 * k) + a + 4 * f) + statistics + 8


def _activations(setup: Setup, *, recomputed: bool) -> Part:
    layers, how = setup.shape.layers, setup.train.checkpointing
    kept = kept_bytes(setup, how)
    last = (4 + 3 * setup.element) * setup.shape.hidden  # last norm, and the gradient the head hands back
    total, text = (layers * kept + last) * setup.slots, f"{layers} layers x {kept / 1000:,.1f} kB"
    if recomputed and how != "none":
        again = kept_bytes(setup, "none") - (kept if how == "selective" else 0)
        total += again * setup.slots
        text += f" + {again / 1000:,.1f} kB of the one computed again"
    return Part(
        name="activations",
        bytes=total,
        arithmetic=f"({text} + {last / 1000:,.1f} kB) x {setup.rows} x {setup.max_length:,} slots",
    )


# Moments -----------------------------------------------------------------------------------------------


def fullest(setup: Setup) -> tuple[str, list[Part]]:
    """The moment a GPU is fullest, and what it then holds."""
    moments = {
        "in the loss": [
            *_gathered(setup, layers=1), _activations(setup, recomputed=False), _head(setup),
        ],
        "in a layer's backward pass": [
            *_gathered(setup, layers=2), _activations(setup, recomputed=True), *_leaving(setup, root=False),
        ],
        "when the gradients of embedding and head are reduced": _leaving(setup, root=True),
    }  # fmt: skip
    name = max(moments, key=lambda moment: sum(part.bytes for part in moments[moment]))
    return name, [*_lasting(setup), *moments[name]]


def _lasting(setup: Setup) -> list[Part]:
    """What is there all the time."""
    every, trained = parameters(setup.shape), _trained(setup)
    state = 8 if setup.train.optimizer_state == "float32" else 4
    share = f" / {setup.degree} GPUs" if setup.degree > 1 else ""

    def part(name: str, count: int, size: int, remark: str) -> Part:
        arithmetic = f"{_billions(count)} parameters x {size} B{share}: {remark}"
        return Part(name=name, bytes=count * size / setup.degree, arithmetic=arithmetic)

    return [
        part("weights", every, 4, "float32 masters"),
        part("gradients", trained, 4, "float32"),
        part("optimizer states", trained, state, f"AdamW's two moments in {setup.train.optimizer_state}"),
        Part(name="outside torch", bytes=_OUTSIDE_BYTES, arithmetic="CUDA context and NCCL's buffers, typically"),
    ]


def _gathered(setup: Setup, *, layers: int) -> list[Part]:
    """Whole weights: the root group, and of the layers the one at work and the next, which is on its way."""
    if setup.unsharded:
        return []
    root, layer = root_parameters(setup.shape), layer_parameters(setup.shape)
    text = (
        f"({_billions(root)} of embedding and head + {layers} x {_billions(layer)} of a layer) x {setup.element} B"
    )
    return [Part(name="gathered weights", bytes=(root + layers * layer) * setup.element, arithmetic=text)]


def _head(setup: Setup) -> Part:
    """Logits and their log-softmax, a chunk at a time, and the gradient of the head's weight, summed in fp32.

    Of several chunks, the gradient of one is still there when the next is computed.
    """
    weight = 0 if setup.train.lora is not None else setup.shape.vocab * setup.shape.hidden
    every = 4 * setup.slots * setup.shape.vocab
    chunk = min(LOGITS_CHUNK_BYTES, every)
    cast = setup.element * weight  # in the backward pass, when no logits are left
    several = f"gradient of {_billions(weight)} weights x 4 B + " if weight else ""
    if every > chunk and (logits := (2 + setup.element / 4) * chunk) > cast:
        text = f"{several}{2 + setup.element / 4:g} x {_gib(chunk)} of logits"
        return Part(name="head", bytes=4 * weight + logits, arithmetic=text)
    if 2 * chunk > 4 * weight + cast:
        return Part(name="head", bytes=2 * chunk, arithmetic=f"2 x {_gib(chunk)} of logits")
    text = f"gradient of {_billions(weight)} weights x ({setup.element} + 4) B"
    return Part(name="head", bytes=4 * weight + cast, arithmetic=text)


def _leaving(setup: Setup, *, root: bool) -> list[Part]:
    """Whole gradients of one FSDP group, and their fp32 copy on its way to the shards."""
    if setup.train.lora is not None:
        count = 0 if root else adapter_parameters(setup.shape, setup.train.lora)
    else:
        count = root_parameters(setup.shape) if root else layer_parameters(setup.shape)
    head = 0 if root or setup.train.lora is not None else setup.shape.vocab * setup.shape.hidden
    if setup.unsharded:
        return []  # each gradient goes straight to where it stays
    size = count * (setup.element + 4) + head * setup.element
    text = f"{_billions(count)} of {'embedding and head' if root else 'a layer'} x ({setup.element} + 4) B"
    waiting = f" + {_billions(head)} of the head, waiting, x {setup.element} B" if head else ""
    return [Part(name="gradients being reduced", bytes=size, arithmetic=text + waiting)]


def _trained(setup: Setup) -> int:
    lora = setup.train.lora
    return parameters(setup.shape) if lora is None else setup.shape.layers * adapter_parameters(setup.shape, lora)


# What would fit ----------------------------------------------------------------------------------------


def _choose(shape: Shape, train: TrainSpec, dtype: Dtype, max_length: int, cluster: ClusterSpec) -> Setup:
    degree = sharding(
        train.sharding,
        shape,
        train,
        world=cluster.gpus,
        per_node=cluster.gpus_per_node,
        capacity_bytes=CARDS[cluster.gpu][1] * GIB,
        dtype=dtype,
        max_length=max_length,
    )
    return Setup(shape=shape, train=train, dtype=dtype, max_length=max_length, world=cluster.gpus, degree=degree)


def _most_rows(train: TrainSpec, world: int) -> int:
    """Rows a GPU has to itself in a step, as far as the batch's unit says."""
    return math.ceil(train.global_batch / world) if train.batch_unit == "rows" else _MAX_MICRO_BATCH


def _limit(setup: Setup, largest: int) -> Literal["memory", "step", "not tried"]:
    if largest < _most_rows(setup.train, setup.world):
        return "memory"
    return "step" if setup.train.batch_unit == "rows" else "not tried"


def _largest_micro_batch(setup: Setup, capacity: float) -> int:
    for count in range(_most_rows(setup.train, setup.world), 0, -1):
        train = setup.train.model_copy(update={"micro_batch": count})
        if total_bytes(dataclasses.replace(setup, train=train)) <= (1 - SPARE) * capacity:
            return count
    return 0


def _remedies(setup: Setup, cluster: ClusterSpec) -> Iterator[str]:
    """Each single setting that would make it fit; else all together, and none, on more nodes."""
    changes: dict[str, object] = {}
    if setup.rows > 1:
        changes["micro_batch"] = 1
    if setup.train.optimizer_state == "float32":
        changes["optimizer_state"] = "bfloat16"
    lighter = {"none": ("selective", "full"), "selective": ("full",), "full": ()}[setup.train.checkpointing]

    def fits(changed: dict[str, object], nodes: int) -> str | None:
        train, larger = setup.train.model_copy(update=changed), cluster.model_copy(update={"nodes": nodes})
        tried = _choose(setup.shape, train, setup.dtype, setup.max_length, larger)
        if (total := total_bytes(tried)) > (1 - SPARE) * CARDS[cluster.gpu][1] * GIB:
            return None
        words = [f"train.{key}: {value}" for key, value in changed.items()]
        words += [f"{larger.gpus} GPUs"] if nodes != cluster.nodes else []
        return f"{', '.join(words)} ({_gib(total)})"

    single = [{key: value} for key, value in changes.items()] + [{"checkpointing": how} for how in lighter]
    found = [text for change in single if (text := fits(change, cluster.nodes))]
    if not found:
        together = changes | ({"checkpointing": lighter[-1]} if lighter else {})
        for change in (together, {}) if together else ({},):
            sizes = (fits(change, cluster.nodes * factor) for factor in (1, 2, 4, 8, 16, 32))
            found += [text for text in sizes if text][:1]
    yield from found


def peak_flops(gpu: Gpu) -> float | None:
    """Dense bf16 FLOP/s of a card."""
    return flops.peak(CARDS[gpu][0])


def _billions(count: float) -> str:
    return f"{count / 1e9:,.4g} B" if count >= 1e9 else f"{count / 1e9:.3f} B" if count >= 1e7 else f"{count:,.0f}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"
