"""Worker: optimizer steps of one model, laid out once, under several arms and switches.

`steps.py SETTING.json`, with device, tiny, shape, layers, train (checkpointing, optimizer_state, compile), runs,
documents, deadline (seconds since the epoch). A run: name, arm, warmup, steps, least (steps that make a result);
and what it switches: head, deterministic, optimizer_state, lengths, probe.

A step is what `packcli train` does in one: collate, forward and backward of each micro-batch, clip, AdamW.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from documents import Documents, Shape, Work, shape, work
from roofline import HALF, random_model
from timing import device_of, emit, recorded, setting, synchronize

from packcli import flops
from packcli.config import TrainSpec
from packcli.data import index as indexes
from packcli.model import attention, head, probe
from packcli.model.trainee import Trainee
from packcli.train import distributed, loss, optim
from packcli.train import step as step_
from packcli.train.step import Objective

# On Hopper this is the workspace torch takes by itself, so it costs the runs that are not deterministic nothing.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(slots=True)
class Bench:
    """A model on its device. `spec`: how it was laid out."""

    shape: Shape
    spec: TrainSpec
    trainee: Trainee
    processes: distributed.Processes
    optimizer: torch.optim.Optimizer
    state: str


def make(shape: Shape, train: dict[str, Any], device: torch.device) -> Bench:
    spec = TrainSpec(steps=1, lr=1e-5, global_batch=1, schedule="constant", **train)
    processes = distributed.start(group=True)
    model = random_model(shape.config, device)
    backend = attention.choose(spec.attention_backend, device, HALF, config=model.config)
    trainee = Trainee(model, backend, spec.head)
    del model
    distributed.lay_out(trainee, spec, "bfloat16", shape.max_length, processes)
    gc.collect()
    optimizer = optim.optimizer(trainee, spec, fused=True)
    trainee.train()
    return Bench(shape, spec, trainee, processes, optimizer, spec.optimizer_state)


@contextlib.contextmanager
def switched(bench: Bench, run: dict[str, Any], found: Work) -> Iterator[None]:
    """The model with what this run switches, and back."""
    device, weighted = bench.processes.device, found.order.arm.loss in ("document", "row")
    kind, deterministic = run.get("head", "own"), bool(run.get("deterministic"))
    head.check(bench.trainee.model, kind, weighted=weighted, device=device)
    if (state := run.get("optimizer_state", bench.spec.optimizer_state)) != bench.state:
        bench.optimizer = optim.optimizer(
            bench.trainee, bench.spec.model_copy(update={"optimizer_state": state}), fused=True
        )
        bench.state = state
    before = bench.trainee.backend
    bench.trainee.kind = kind
    bench.trainee.backend = attention.choose(
        bench.spec.attention_backend, device, HALF, deterministic=deterministic, config=bench.trainee.model.config
    )
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        bench.trainee.kind, bench.trainee.backend = "own", before
        bench.trainee.zero_grad(set_to_none=True)


def objective(bench: Bench, found: Work) -> Objective:
    weighting = loss.weighting(found.order.arm.loss, found.rows, indexes.Labels(found.documents))
    costs = step_.costs(found.order, found.rows, bench.shape.counted)
    return Objective(found.order, found.documents, found.rows, weighting, costs, 0, bench.processes)


def one_step(bench: Bench, minimised: Objective, chosen: Any) -> dict[str, Any]:
    """Its parts, each to its end on the device. (Backward and clipping end with a number on the host anyway.)"""
    device = bench.processes.device
    started = time.perf_counter()
    mean, slots = minimised.backward(bench.trainee, chosen)
    differentiated = time.perf_counter()
    float(torch.nn.utils.clip_grad_norm_(bench.trainee.parameters(), 1.0).full_tensor())
    clipped = time.perf_counter()
    bench.optimizer.step()
    bench.optimizer.zero_grad(set_to_none=True)
    synchronize(device)
    ended = time.perf_counter()
    return {
        "s": ended - started,
        "gradient_s": differentiated - started,
        "clip_s": clipped - differentiated,
        "update_s": ended - clipped,
        "slots": slots,
        "loss": mean,
    }


def measure(bench: Bench, run: dict[str, Any], found: Work, deadline: float) -> dict[str, Any]:
    device, minimised = bench.processes.device, objective(bench, found)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if run.get("probe"):
        started = time.perf_counter()
        isolation = probe.check(bench.trainee, found.order.arm, bench.shape.config["vocab_size"])
        fields = isolation.record() | {"arm": run["arm"], "took_s": time.perf_counter() - started}
        emit("probe", shape=f"{bench.shape.name}, whole", **fields)
    records, began = [], time.time()
    graphs = 0
    for number, chosen in enumerate(found.steps[: run["warmup"] + run["steps"]]):
        if number == run["warmup"]:
            began, graphs = time.time(), compiled_graphs()
        record = one_step(bench, minimised, chosen)
        if number >= run["warmup"]:
            records.append(record | counted(bench, found, chosen))
        ahead = time.time() + 1.5 * record["s"]
        if ahead > deadline and len(records) >= run["least"]:
            break
    peaks = {}
    if device.type == "cuda":
        peaks = {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return {
        "records": records,
        "from": began,
        "to": time.time(),
        "compiled_while_timed": compiled_graphs() - graphs,
        "micro_batch": found.order.train.micro_batch,
        **peaks,
    }


def counted(bench: Bench, found: Work, chosen: Any) -> dict[str, Any]:
    """Useful tokens of a step and their model FLOPs, strictly and in torchtitan's convention."""
    tokens, supervised = (int(each[chosen].sum()) for each in (found.rows.tokens, found.rows.supervised))
    # Pieces of documents also under causal attention: what documents see of each other is not useful work.
    squares = int(found.rows.squares("document")[chosen].sum())
    model = bench.shape.counted
    return {
        "tokens": tokens,
        "supervised": supervised,
        "documents": int(found.rows.documents[chosen].sum()),
        "flops": flops.training(model, tokens=tokens, squares=squares, supervised=supervised),
        "flops_full_square": flops.full_square(model, tokens=tokens, max_length=bench.shape.max_length),
    }


def compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def main() -> None:
    asked = setting()
    device = device_of(asked["device"])
    started = time.perf_counter()
    bench = make(shape(asked["shape"], tiny=asked["tiny"], layers=asked["layers"]), asked["train"], device)
    synchronize(device)
    layers = bench.shape.counted.layers
    fields = {"backend": bench.trainee.backend.name, "config": bench.shape.config, "train": asked["train"]}
    emit("model", shape=bench.shape.name, layers=layers, took_s=time.perf_counter() - started, **fields)
    if not any(run.get("probe") for run in asked["runs"]):
        # Several arms in one process have more shapes than a run; past its limit dynamo stops compiling.
        torch._dynamo.config.recompile_limit = 64
    drawn = {}
    for run in asked["runs"]:
        fields = {"shape": bench.shape.name, "layers": layers, "train": asked["train"], **run}
        if time.time() > asked["deadline"]:
            emit("run", **fields, skipped="out of time")
            continue
        with recorded("run", **fields):
            lengths = run.get("lengths", "real")
            if lengths not in drawn:
                count = asked["documents"] // (1 if lengths == "real" else 8)  # longer ones, so fewer
                drawn[lengths] = Documents(count, bench.shape.config["vocab_size"], lengths)
            found = work(run["arm"], bench.shape, drawn[lengths], {})
            with switched(bench, run, found):
                emit("run", **fields, **measure(bench, run, found, asked["deadline"]))
    distributed.finish()


if __name__ == "__main__":
    main()
