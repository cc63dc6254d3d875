"""Worker: every attention backend on real document lengths, right and how fast; and what a step cannot beat.

`parity.py SETTING.json`, with device, tiny, shapes, layers of each, deadline (seconds since the epoch), wheels.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, get_args

import torch
from documents import Documents, Shape, filled, shape, work
from environment import fa3
from roofline import forward, inputs, random_model, roofline
from timing import device_of, emit, recorded, setting, spread, synchronize, timed

from packcli.config import ARMS, ArmSpec, TrainSpec
from packcli.errors import ConfigError
from packcli.model import attention, probe
from packcli.model.attention import Backend
from packcli.model.trainee import Trainee
from packcli.train import distributed

Tensors = list[torch.Tensor]
HALF = torch.bfloat16
NAMES = ("out", "dq", "dk", "dv")


# Attention alone ---------------------------------------------------------------------------------------


def both(tensors: Tensors, lengths: tuple[int, ...], backend: Backend) -> Tensors:
    """Output and gradients, each with its slots first: [N, heads, D]."""
    out, leaves = forward(tensors, lengths, backend)
    gradients = torch.autograd.grad(out, leaves, tensors[3])
    return [out.detach()[0], *(gradient[0].transpose(0, 1) for gradient in gradients)]


def one_by_one(tensors: Tensors, lengths: tuple[int, ...], backend: Backend) -> Tensors:
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    parts = [
        both(
            [*(t[:, :, a : a + n] for t in tensors[:3]), tensors[3][:, a : a + n]],
            (n,),
            backend,
        )
        for a, n in zip(starts, lengths, strict=True)
    ]
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def isolation(tensors: Tensors, lengths: tuple[int, ...], backend: Backend, other: Tensors) -> dict[str, bool]:
    """Whether anything of the first document reaches the others, by comparing bits."""
    first = lengths[0]
    changed = [tensor.clone() for tensor in tensors[:3]]
    for tensor, fresh in zip(changed, other[:3], strict=True):
        tensor[:, :, :first] = fresh[:, :, :first]
    gradient = tensors[3].clone()
    gradient[:, :first] = 0  # the loss of the others only
    one, two = (both([*each, gradient], lengths, backend) for each in (tensors[:3], changed))
    return {
        "outputs_kept": torch.equal(one[0][first:], two[0][first:]),
        "no_gradient_across": not any(bool(each[:first].any()) for each in one[1:]),
        "gradients_kept": all(torch.equal(a[first:], b[first:]) for a, b in zip(one[1:], two[1:], strict=True)),
    }


def errors(found: Tensors, reference: Tensors) -> dict[str, float]:
    """max |a - b| / max |b| of each tensor."""
    return {
        name: float((a.float() - b).abs().max() / b.abs().max())
        for name, a, b in zip(NAMES, found, reference, strict=True)
    }


def rule(tensors: Tensors, lengths: tuple[int, ...], backend: Backend) -> dict[str, Any]:
    """Against float32, each document alone: packed may err at most twice as much as one by one."""
    exact = Backend("sdpa", torch.__version__, "reference")
    reference = one_by_one([tensor.float() for tensor in tensors], lengths, exact)
    packed, alone = (errors(way(tensors, lengths, backend), reference) for way in (both, one_by_one))
    return {"packed": packed, "alone": alone, "kept": all(packed[name] <= 2 * alone[name] for name in NAMES)}


def speed(tensors: Tensors, lengths: tuple[int, ...], backend: Backend, shape: Shape) -> dict[str, Any]:
    device, sizes = tensors[0].device, shape.counted
    out, leaves = forward(tensors, lengths, backend)
    backward = timed(lambda: torch.autograd.grad(out, leaves, tensors[3], retain_graph=True), device)
    ahead = timed(lambda: forward(tensors, lengths, backend), device)
    work = 2.0 * sum(n * n for n in lengths) * sizes.heads * sizes.head_dim  # half of 4 n^2: causal
    both_s = (spread(ahead)["ms"] + spread(backward)["ms"]) / 1e3
    return {"forward": spread(ahead), "backward": spread(backward), "model_tflops": 3 * work / both_s / 1e12}


def backend(shape: Shape, lengths: tuple[int, ...], name: str, device: torch.device, label: str) -> None:
    """One backend on one shape: isolation, error rule, time."""
    fields: dict[str, Any] = {"shape": shape.name, "backend": label}
    try:
        chosen, settled = (attention.choose(name, device, HALF, deterministic=on) for on in (False, True))
    except ConfigError as error:
        emit("attention", **fields, refused=str(error.args[0]))
        return
    tensors, other = (inputs(shape, sum(lengths), device, seed) for seed in (0, 1))
    fields |= {"version": chosen.version, "slots": sum(lengths), "documents": len(lengths)}
    with recorded("attention", **fields):
        found = {"isolation": isolation(tensors, lengths, chosen, other), "error": rule(tensors, lengths, chosen)}
        rows = (shape.max_length,) * (sum(lengths) // shape.max_length)
        fields |= found | {"speed": speed(tensors, lengths, chosen, shape)}
        fields |= {"speed_causal_rows": speed(tensors, rows, chosen, shape)}
        try:
            torch.use_deterministic_algorithms(True)
            steady = isolation(tensors, lengths, settled, other)
            fields |= {"deterministic": steady | speed(tensors, lengths, settled, shape)}
        except RuntimeError as error:
            fields["deterministic"] = {"failed": " ".join(str(error).split())[:200]}
        finally:
            torch.use_deterministic_algorithms(False)
        emit("attention", **fields)


# The probe of a training run, on a model of two layers ----------------------------------------------------


def model_probe(shape: Shape, names: list[str], device: torch.device) -> None:
    small = {**shape.config, "num_hidden_layers": 2, "vocab_size": min(8192, shape.config["vocab_size"])}
    processes = distributed.start(group=True)
    chosen = []
    for name in names:
        try:
            chosen.append(attention.choose(name, device, HALF))
        except ConfigError:
            continue  # said above
    trainee = Trainee(random_model(small, device), chosen[0])
    plain = TrainSpec(steps=1, lr=1e-5, global_batch=1)
    distributed.lay_out(trainee, plain, "bfloat16", shape.max_length, processes)
    for each in chosen:
        trainee.backend = each
        for arm in ("best_fit", "random"):
            fields = {"shape": shape.name, "backend": each.name, "arm": arm}
            with recorded("probe", **fields):
                found = probe.check(trainee, ArmSpec.model_validate(ARMS[arm]), small["vocab_size"])
                emit("probe", **fields, **{k: v for k, v in found.record().items() if k not in fields})


# The worker -------------------------------------------------------------------------------------------


def main() -> None:
    asked = setting()
    device = device_of(asked["device"])
    shapes = [shape(name, tiny=asked["tiny"], layers=asked["layers"].get(name)) for name in asked["shapes"]]
    documents = Documents(asked["documents"], shapes[0].config["vocab_size"])
    works = {each.name: work("best_fit", each, documents, {}) for each in shapes}
    lengths = {
        each.name: filled(found.segments(found.micro_batches(0)[0]), each.slots)
        for each, found in zip(shapes, works.values(), strict=True)
    }
    names: list[str] = [name for name in get_args(attention.Name) if name != "flex"]
    parts = [partial(backend, each, lengths[each.name], name, device, name) for each in shapes for name in names]
    parts += [partial(roofline, each, works[each.name], asked["states"][each.name], device) for each in shapes]
    parts += [partial(model_probe, each, names, device) for each in shapes]
    # Compiled, so slow to start: last.
    parts += [partial(backend, each, lengths[each.name], "flex", device, "flex") for each in shapes]
    parts += [partial(model_probe, each, ["flex"], device) for each in shapes[:1] if device.type == "cuda"]
    if asked["wheels"] and device.type == "cuda":
        parts += [partial(with_fa3, asked["wheels"], shapes, lengths, device)]
    for number, part in enumerate(parts):
        if time.time() > asked["deadline"]:
            emit("skipped", part=f"{len(parts) - number} of {len(parts)} parts of the kernels: out of time")
            return
        with recorded("part", name=part.func.__name__):
            part()
        synchronize(device)


def with_fa3(wheels: str, shapes: list[Shape], lengths: dict[str, tuple[int, ...]], device: torch.device) -> None:
    if (problem := fa3(wheels)) is not None:
        emit("attention", shape=shapes[0].name, backend="varlen, FlashAttention 3", refused=problem)
        return
    for each in shapes:
        backend(each, lengths[each.name], "varlen", device, "varlen, FlashAttention 3")


if __name__ == "__main__":
    main()
