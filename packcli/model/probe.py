"""Start-up probe: does this model, with this attention, on this device, do what packing rests on?

Tested on the loaded model itself, because layers leak in their own ways; the result goes into the manifest. Each
row is one or more documents; which slots may see each other is the arm's to say.

1. Isolation: changing one document changes nothing beyond its segment, forward and backward; and, where the arm
   lets documents of a row attend to each other, it does change them.
2. Parity: loss and every gradient of a packed batch are those of its segments one by one.
3. The head's loss is the cross entropy of the logits the model itself makes.
4. A document's hidden states are those transformers' own attention gives: a window off by one, or a score cap lost
   on the way, changes packed and unpacked runs alike.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from packcli.config import ArmSpec
from packcli.errors import RunError
from packcli.model.attention import NAME, Backend
from packcli.model.collate import Batch
from packcli.model.trainee import Trainee

_ROWS = ((7, 1, 13), (6, 71))
"""Documents of the first two rows, some of which SDPA takes together and one alone."""
_TILED = (150, 300)
"""On a GPU also documents of more slots than a kernel takes at a time (128), which begin and end within."""
_LONGEST = 4096
"""Slots of the longest document tried, which should pass the model's sliding window."""

TOLERANCE = 1e-5
"""Of fp32, as max |a - b| / max |b|."""
_HALF = {"head": 1e-2, "attention": 5e-2}
_NOISE = 1e-2
"""A gradient's error is held against at least this share of the largest gradient: some are sums that cancel (that
of a key's bias), and all that is left of them is rounding."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """What was found; a model that fails is refused.

    expected   what the arm asks for. `crosses`: whether one document's tokens move another's outputs
    lengths    of the documents tried; `window`: the model's sliding window
    parity     fp32: largest max |a - b| / max |b| of the loss and any gradient, packed against one by one.
               Half precision: the packed run's error against fp32; `parity_unpacked`: that of one by one.
               None: no fp32 reference could be had, and `note` says why
    attention  ||a - b|| / ||b|| of hidden states against transformers' own attention
    routed     mixture of experts: equality holds with the balance loss off, and up to rounding
    """

    expected: str
    crosses: bool
    backend: str
    version: str
    device: str
    dtype: str
    lengths: tuple[int, ...]
    window: int | None
    parity: float | None
    parity_unpacked: float | None
    attention: float
    routed: bool
    note: str = ""

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "lengths": list(self.lengths)}


def check(trainee: Trainee, arm: ArmSpec, vocab_size: int) -> Isolation:
    """Run all four; every rank calls it, with the same arguments. Leaves no gradient behind.

    Raises:
        RunError: the model or the backend fails one of them.
    """
    config = trainee.model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise _failed(
            arm, "`output_router_logits` adds a balance loss of its own", "set `output_router_logits: false`"
        )
    sample = _Sample.of(trainee, arm, vocab_size)
    training = trainee.training
    trainee.eval()
    try:
        with _uncompiled():
            crosses = _isolation(trainee, arm, sample)
            with torch.no_grad():
                dtype = trainee(sample.batch(), "hidden").dtype
                _head(trainee, arm, sample, half=dtype != torch.float32)
                attention = _attention(trainee, arm, sample, half=dtype != torch.float32)
            parity, unpacked, note = _parity(trainee, arm, sample, dtype)
    finally:
        _clear(trainee)
        trainee.train(training)
    return Isolation(
        expected=arm.attention,
        crosses=crosses,
        backend=trainee.backend.name,
        version=trainee.backend.version,
        device=sample.ids.device.type,
        dtype=str(dtype).removeprefix("torch."),
        lengths=tuple(length for row in sample.rows for length in row),
        window=getattr(config, "sliding_window", None),
        parity=parity,
        parity_unpacked=unpacked,
        attention=attention,
        routed=_routed(trainee),
        note=note,
    )


def _uncompiled() -> AbstractContextManager[Any]:
    """Compiled layers would be compiled anew for shapes that no training has, and dynamo gives up after eight."""
    loaded = "torch._dynamo" in sys.modules  # else nothing is compiled, and loading it takes seconds
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


# The sample --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sample:
    """Rows of documents, flat. ids, positions, document: [N] int64; `segments`: as the arm's batches have them."""

    rows: tuple[tuple[int, ...], ...]
    segments: tuple[int, ...]
    ids: torch.Tensor
    positions: torch.Tensor
    document: torch.Tensor
    vocab_size: int

    @classmethod
    def of(cls, trainee: Trainee, arm: ArmSpec, vocab_size: int) -> _Sample:
        config = trainee.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or 0
        fits = getattr(config, "max_position_embeddings", None) or _LONGEST
        rows: tuple[tuple[int, ...], ...] = (_ROWS[0], (_ROWS[1][0], min(_ROWS[1][1], fits - _ROWS[1][0])))
        device = next(trainee.parameters()).device
        if device.type == "cuda" and sum(_TILED) <= fits:
            rows = (*rows, _TILED)
        if window:
            rows = (*rows, (min(window + 3, _LONGEST, fits),))
        lengths = tuple(length for row in rows for length in row)
        ids = (torch.arange(sum(lengths)) * 7 + 3) % vocab_size
        runs = lengths if arm.positions == "reset" else tuple(sum(row) for row in rows)
        positions = torch.cat([torch.arange(length) for length in runs])
        document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        segments = lengths if arm.attention == "document" else tuple(sum(row) for row in rows)
        return cls(rows, segments, ids.to(device), positions.to(device), document.to(device), vocab_size)

    def batch(
        self, start: int = 0, stop: int | None = None, *, changed: bool = False, only: torch.Tensor | None = None
    ) -> Batch:
        """Slots start to stop, whole segments. `changed`: other tokens in document 0. `only`: labels there."""
        stop = len(self.ids) if stop is None else stop
        ids = torch.where((self.document == 0) & changed, (self.ids + 1) % self.vocab_size, self.ids)[start:stop]
        document = self.document[start:stop]
        labelled = document[1:] == document[:-1]  # never across documents
        if only is not None:
            labelled = labelled & only[start + 1 : stop]
        predict = labelled.nonzero()[:, 0]
        ends = torch.tensor(self.segments).cumsum(0).tolist()
        inside = tuple(b - a for a, b in pairwise([0, *ends]) if start <= a and b <= stop)
        return Batch(ids[None], self.positions[start:stop][None], inside, predict, ids[predict + 1])

    def alone(self) -> Iterator[Batch]:
        """Every segment as a batch of its own."""
        ends = torch.tensor(self.segments).cumsum(0).tolist()
        return (self.batch(start, stop) for start, stop in pairwise([0, *ends]))


# 1. Isolation ------------------------------------------------------------------------------------------------


def _isolation(trainee: Trainee, arm: ArmSpec, sample: _Sample) -> bool:
    """Whether documents of a row meet, found to be as the arm says; that segments do not, in any case."""
    slots = torch.arange(len(sample.ids), device=sample.ids.device)
    own, outside = sample.document == 0, slots >= sample.segments[0]
    inside = ~own & ~outside  # document 0's neighbours in its segment; none where each has its own
    with torch.no_grad():
        one, other = (trainee(sample.batch(changed=changed), "hidden") for changed in (False, True))
    if not _same(one[outside], other[outside], exact=not _routed(trainee)):
        raise _failed(arm, f"one document's tokens change another's outputs{_carrier(trainee)}")
    if inside.any() and torch.equal(one[inside], other[inside]):
        raise _failed(arm, "packed documents never meet")
    one, other = (_by_inputs(trainee, sample.batch(changed=changed, only=outside)) for changed in (False, True))
    if one[own].any():
        raise _failed(arm, f"one document's loss has a gradient by another's inputs{_carrier(trainee)}")
    settled = sample.ids.device.type == "cpu" or trainee.backend.deterministic
    if not _same(one[outside], other[outside], exact=settled and not _routed(trainee)):
        raise _failed(arm, f"one document's tokens change another's gradients{_carrier(trainee)}")
    if inside.any() and not _by_inputs(trainee, sample.batch(only=inside))[own].any():
        raise _failed(arm, "the loss of packed documents has no gradient by their neighbours' inputs")
    return bool(inside.any())


def _by_inputs(trainee: Trainee, batch: Batch) -> torch.Tensor:
    """[N, D]: the gradient of a batch's loss by its input embeddings."""
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, given: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not embedded.requires_grad:  # frozen, under LoRA
            embedded = embedded.requires_grad_()
        embedded.retain_grad()
        kept.append(embedded)
        return embedded

    hook = trainee.model.get_input_embeddings().register_forward_hook(keep)
    try:
        trainee(batch).backward()
    finally:
        hook.remove()
    gradient = kept[0].grad
    assert gradient is not None
    return gradient[0]


def _same(one: torch.Tensor, other: torch.Tensor, *, exact: bool) -> bool:
    if exact:
        return torch.equal(one, other)
    limit = TOLERANCE if one.dtype == torch.float32 else 2.0**-7
    return float((one - other).abs().max()) <= limit * float(one.abs().max())


def _routed(trainee: Trainee) -> bool:
    """Routed experts batch tokens of all documents: a token's result may round as the others' numbers say."""
    config = trainee.model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def _carrier(trainee: Trainee) -> str:
    """The layers that carry state along a row, if we know any by their convolution."""
    found = {
        type(module).__name__
        for module in trainee.model.modules()
        if any(isinstance(child, torch.nn.Conv1d) for child in module.children())
    }
    return f" ({', '.join(sorted(found))} carries state along the row)" if found else ""


# 2. Parity ---------------------------------------------------------------------------------------------------


def _parity(
    trainee: Trainee, arm: ArmSpec, sample: _Sample, dtype: torch.dtype
) -> tuple[float | None, float | None, str]:
    """(error of the packed run, half precision: of the run one by one, a note)."""
    packed, alone = [sample.batch()], list(sample.alone())
    if dtype == torch.float32:
        error = _error(trainee, packed, trainee, alone)
        if not error <= TOLERANCE:
            found = f"loss or gradients of a packed batch are off by {error:.1e} of those one by one"
            raise _failed(arm, found + _carrier(trainee))
        return error, None, ""
    reference = _reference(trainee)
    if isinstance(reference, str):
        return None, None, reference
    error, base = (_error(trainee, parts, reference, alone) for parts in (packed, alone))
    if not error <= 2 * base:
        raise _failed(
            arm, f"a packed batch errs by {error:.1e} against float32, its segments one by one by {base:.1e}"
        )
    return error, base, ""


def _error(one: Trainee, parts: list[Batch], other: Trainee, others: list[Batch]) -> float:
    """Largest max |a - b| / max |b| of the summed loss and of every parameter's gradient.

    The difference is taken by accumulating into one set of gradients: a second set may not fit.
    """
    _clear(one)
    total = _accumulate(one, parts, 1.0)
    sizes = _peaks(one)
    if other is not one:
        for parameter, twin in zip(one.model.parameters(), other.model.parameters(), strict=True):
            twin.grad = None if parameter.grad is None else _local(parameter.grad)
    wanted = _accumulate(other, others, -1.0)
    differences = _peaks(one)
    if not sizes.isfinite().all():
        return float("inf")
    relative = differences / sizes.clamp(min=float(sizes.max()) * _NOISE)
    return max(float(relative.max()), abs(total - wanted) / abs(wanted))


def _accumulate(trainee: Trainee, parts: list[Batch], sign: float) -> float:
    total = 0.0
    for part in parts:
        loss = trainee(part)
        (sign * loss).backward()
        total += float(loss.detach())
    return total


def _peaks(trainee: Trainee) -> torch.Tensor:
    """[P] float64: the largest absolute value of each parameter's gradient, over all ranks; 0 for none."""
    peaks = []
    for parameter in trainee.parameters():
        local = None if parameter.grad is None else _local(parameter.grad)
        peaks.append(local.abs().max().double() if local is not None and local.numel() else torch.zeros(()))
    device = next(trainee.parameters()).device
    found = torch.stack([peak.double().to(device) for peak in peaks])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found


def _clear(trainee: Trainee) -> None:
    """No gradients; and shards again, for a forward pass without a backward one leaves parameters whole."""
    for module in trainee.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    trainee.zero_grad(set_to_none=True)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _reference(trainee: Trainee) -> Trainee | str:
    """The same model in float32 with per-document SDPA, its weights shared; or why there is none."""
    _clear(trainee)
    model = trainee.model
    if dist.is_initialized() and dist.get_world_size() > 1:
        return "no float32 reference: several processes hold the weights"
    if hasattr(model, "peft_config"):
        return "no float32 reference: adapters"
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return "no float32 reference: the weights are not float32"
    with torch.device("meta"):
        twin = type(model)(model.config)
    made: dict[torch.Tensor, torch.nn.Parameter] = {}  # tied weights stay one
    for part, original in zip(twin.modules(), model.modules(), strict=True):
        part._buffers.update(original._buffers)
        for name, parameter in original._parameters.items():
            if parameter is not None:
                shared = torch.nn.Parameter(_local(parameter.detach()), parameter.requires_grad)
                part._parameters[name] = made.setdefault(parameter, shared)
    return Trainee(twin.eval(), Backend("sdpa", torch.__version__, "reference"))


# 3. and 4. ---------------------------------------------------------------------------------------------------


def _head(trainee: Trainee, arm: ArmSpec, sample: _Sample, *, half: bool) -> None:
    batch = sample.batch(0, sum(map(sum, sample.rows[:2])))  # logits of the longest document may not fit
    logits = trainee(batch, "logits")[batch.predict].float()
    wanted = float(F.cross_entropy(logits, batch.labels, reduction="sum"))
    error = abs(float(trainee(batch)) - wanted) / wanted
    if not error <= (_HALF["head"] if half else TOLERANCE):
        raise _failed(
            arm, f"the loss differs by {error:.1e} from the cross entropy of the model's own logits", "report it"
        )


def _attention(trainee: Trainee, arm: ArmSpec, sample: _Sample, *, half: bool) -> float:
    """Relative difference of the last document's hidden states to those under transformers' eager attention."""
    slots = sample.rows[-1][-1]
    none = torch.zeros(0, dtype=torch.int64, device=sample.ids.device)
    batch = Batch(sample.ids[None, -slots:], sample.positions[None, -slots:], (slots,), none, none)
    ours = trainee(batch, "hidden").double()
    with _eager(trainee.model):
        theirs = trainee(batch, "hidden").double()
    error = float((ours - theirs).norm() / theirs.norm())
    if not error <= (_HALF["attention"] if half else TOLERANCE):
        raise _failed(arm, f"hidden states differ by {error:.1e} from those under transformers' own attention")
    return error


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def _failed(
    arm: ArmSpec, found: str, fix: str = "this model or attention backend cannot run this arm"
) -> RunError:
    return RunError(f"start-up probe: the arm asks for `attention: {arm.attention}`, but {found}", fix)
