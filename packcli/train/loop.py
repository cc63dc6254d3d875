"""One training run, top to bottom. It reads rows and tokens that are ready; it never tokenizes and never packs."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import yaml
from torch.distributed.tensor import DTensor

from packcli import batching, estimate, flops
from packcli.batching import Ints
from packcli.config import TrainSpec
from packcli.data import framed
from packcli.data import index as indexes
from packcli.data.index import Index
from packcli.data.tokenizer import load_directory
from packcli.data.tokens import Tokens
from packcli.errors import DivergedError, PreemptedError
from packcli.estimate import StepArithmetic
from packcli.files import atomic_directory, atomic_write, read_jsonl
from packcli.log import logger
from packcli.model import attention, head, load, probe
from packcli.model.collate import collate
from packcli.model.trainee import Trainee
from packcli.plan import TrainOrder
from packcli.processes import Stop, listening
from packcli.seeds import integer
from packcli.store import Store
from packcli.train import distributed, faults, journal, loss, metrics, optim, trackers, watchdog
from packcli.train import step as step_
from packcli.train.checkpoint import Checkpoints
from packcli.train.distributed import Processes
from packcli.train.loss import Weighting
from packcli.train.metrics import Meter
from packcli.train.step import Objective
from packcli.train.watchdog import Alive

Note = Callable[[int, int, str], None]
"""Called after each step with (step, steps, a short remark)."""
Commit = Callable[[dict[str, Any]], None]
_VALIDATED_AT_ONCE = 16
"""Makes the training done, with these results."""


@dataclass(slots=True)
class Progress:
    """What a checkpoint carries beside the tensors; times add up over interrupted attempts."""

    step: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0


def train(
    order: TrainOrder,
    store: Store,
    commit: Commit,
    *,
    stop_token_ids: list[int],
    files: list[str],
    shards: int,
    note: Note,
    fallback: bool = False,
) -> None:
    """Train, leave `final/` as a Hugging Face checkpoint, and have rank 0 `commit`.

    Checkpoints are deleted only then: one who is killed before goes on from the last. A stop that comes after the
    last step waits for it. `fallback`: go on from an older checkpoint when the newest is damaged.

    Raises:
        ConfigError: model and data do not fit each other.
        IntegrityError: a checkpoint changed on disk.
        RunError: a non-finite loss or gradient; nothing was updated with it.
        PreemptedError: SIGTERM or SIGUSR2 arrived; a checkpoint was written at a step boundary.
    """
    spec, arm, dtype = order.train, order.arm, order.model.dtype
    trackers.check(spec.trackers)
    processes = distributed.start(
        group=distributed.needs_group(dtype), timeout=watchdog.collective_timeout(spec.hang_timeout_s)
    )
    progress, stop = Progress(), Stop(end=lambda: os._exit(PreemptedError.exit_code))
    with (
        settings(spec, processes),
        # A cluster sends SIGUSR2 before the time limit and SIGTERM when it preempts.
        listening(stop, signal.SIGTERM, signal.SIGUSR2),
        faults.memory(lambda: progress.step + 1, spec.micro_batch),
    ):
        # Data -----------------------------------------------------------------------------------------
        tokens = Tokens(store, order.tokens, files=files, shards=shards)
        rows = indexes.read(store.rows(order.index))
        steps = batching.run_steps(rows.sizes, spec, arm.order, order.seed)
        squares = rows.squares(arm.attention)
        tokenizer = load_directory(store.tokenizer(order.tokens))
        marks = framed.marks(arm.boundary, lambda: tokenizer)
        weighting = loss.weighting(arm.loss, rows, indexes.Labels(framed.Framed(tokens, marks)))
        pad_id = tokenizer.pad_token_id or 0
        arithmetic = arithmetic_of(order, store, rows, steps)
        note(0, len(steps), arithmetic.text())

        # Model ----------------------------------------------------------------------------------------
        trainee, sharded_over = _model(order, store, tokenizer, weighting, processes)
        # Before any forward pass: after one, a sharded model shows its root's gathered parameters for a while.
        fused = processes.world == 1 or processes.device.type == "cuda"
        optimizer = optim.optimizer(trainee, spec, fused=fused)
        isolation = probe.check(trainee, arm, len(tokenizer))
        trainee.train()

        # Resume ---------------------------------------------------------------------------------------
        checkpoints = Checkpoints(
            store, order.id, trainee, optimizer, processes, keep=spec.keep_last, background=spec.async_save
        )
        found = checkpoints.restore(fallback=fallback)
        if found is not None:
            progress.step, progress.wall_s, progress.cpu_s = found["step"], found["wall_s"], found["cpu_s"]
        if processes.is_main:
            if found is not None:
                logger.info("goes on from step %s of %s", f"{progress.step:,}", f"{len(steps):,}")
            write_config(order, store)
            journal.truncate(store, order.id, progress.step, (found or {}).get("metrics_sha256"))
        processes.barrier()

        # Loop -----------------------------------------------------------------------------------------
        shape = flops.shape(trainee.model.config.to_dict())
        costs = step_.costs(order, rows, shape)
        objective = Objective(order, framed.reader(tokens, marks), rows, weighting, costs, pad_id, processes)
        meter = _meter(order, trainee, shape, processes)

        def save() -> None:
            epoch, row = batching.position(rows.sizes, sum(map(len, steps[: progress.step])))
            spent = {"wall_s": progress.wall_s, "cpu_s": progress.cpu_s}
            logged = {"metrics_sha256": journal.synced(store, order.id)} if processes.is_main else {}
            checkpoints.save(progress.step, {"epoch": epoch, "row": row, **spent, **logged})

        def stopped() -> PreemptedError:
            checkpoints.wait()
            where = f"stopped at step {progress.step} of {len(steps)}"
            return PreemptedError(where, "run the same command again")

        hung = partial(store.fail, "train", order.id)
        watched = partial(watchdog.watching, spec.hang_timeout_s, processes.rank, hung)
        with (
            checkpoints,
            journal.writing(order, store, progress.step, processes) as write,
            watched("step") as alive,
        ):
            for step in range(progress.step, len(steps)):
                started, cpu_started = time.perf_counter(), time.process_time()
                chosen = steps[step]
                # Seeded by the step, so that a resumed run drops what an uninterrupted one does.
                torch.manual_seed(integer(order.seed, "dropout", step) + processes.rank)
                mean, slots = objective.backward(trainee, chosen)
                norm = _clip(trainee, spec.clip)
                if not (math.isfinite(mean) and math.isfinite(norm)):
                    raise _diverged(step, mean, norm, rows, chosen.tolist(), tokens)
                lr = optim.lr_at(step, len(steps), arithmetic.lr, spec)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                _seed_rounding(order, step, processes.rank % sharded_over)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

                progress.step = step + 1
                peak_bytes = _peak_bytes(processes)  # waits for the update, which is a part of the step
                step_s = time.perf_counter() - started
                progress.wall_s += step_s
                progress.cpu_s += time.process_time() - cpu_started
                record = meter.record(
                    step=step + 1,
                    loss=mean,
                    lr=lr,
                    grad_norm=norm,
                    rows=len(chosen),
                    documents=int(rows.documents[chosen].sum()),
                    tokens=int(rows.tokens[chosen].sum()),
                    supervised=int(rows.supervised[chosen].sum()),
                    slots=slots,
                    squares=int(squares[chosen].sum()),
                    step_s=step_s,
                    peak_bytes=peak_bytes,
                )
                write(record)
                note(
                    step + 1, len(steps), f"loss {mean:.3f}, {record['useful_tokens_per_s']:,.0f} useful tokens/s"
                )
                stopping = processes.any(stop.number is not None) and step + 1 < len(steps)
                if stopping or _is_due(step + 1, len(steps), spec):
                    save()
                if stopping:
                    raise stopped()
                alive()

        # Results --------------------------------------------------------------------------------------
        with watched("validation batch") as alive, checkpoints:

            def between() -> None:
                alive()
                if processes.any(stop.number is not None):
                    save()
                    raise stopped()

            validation = validation_loss(trainee, order, store, tokens, pad_id, processes, between)
        _save(trainee, order, store, tokenizer, stop_token_ids, processes, watched)
        if processes.is_main:
            backend = trainee.backend
            results = {
                **metrics.results(read_jsonl(store.metrics(order.id))),
                "validation_loss": validation,
                "cpu_s": progress.cpu_s,
                "step": arithmetic.model_dump(),
                "isolation": isolation.record(),
                "random_weights": order.random_weights,
                "embedding_rows_added": trainee.model.embedding_rows_added,
                "attention_backend": {"name": backend.name, "version": backend.version, "why": backend.why},
                "processes": processes.world,
                "sharded_over": sharded_over,
                "threads": torch.get_num_threads() if processes.device.type == "cpu" else None,
                "device": _device_name(processes),
                "cores": os.cpu_count(),
            }
            commit(results)
        checkpoints.clear()


def arithmetic_of(order: TrainOrder, store: Store, rows: Index, steps: list[Ints]) -> StepArithmetic:
    """What a step of this run holds."""
    prepared = store.manifest("index", order.index)
    assert prepared is not None  # `stages.train` saw it
    slots = estimate.row_slots(rows.filled, order.arm, order.max_length, prepared.results["ledger"])
    seen = estimate.visits(steps, rows.rows.num_rows)
    return estimate.step_arithmetic(rows.sizes, slots, seen, order.train)


def _model(
    order: TrainOrder, store: Store, tokenizer: Any, weighting: Weighting, processes: Processes
) -> tuple[Trainee, int]:
    """The model on its devices, and how many ranks share each parameter."""
    spec, base = order.train, store.final(order.base) if order.base else None
    empty = not processes.is_main  # the others are sent the weights
    model = load.load(order.model, base, tokenizer, order.max_length, order.seed, lora=spec.lora, empty=empty)
    head.check(model, spec.head, weighted=weighting.pieces is not None, device=processes.device)
    computed = getattr(torch, order.model.dtype)
    backend = attention.choose(
        spec.attention_backend, processes.device, computed, deterministic=spec.deterministic, config=model.config
    )
    trainee = Trainee(model, backend, spec.head)
    return trainee, distributed.lay_out(trainee, spec, order.model.dtype, order.max_length, processes)


def _meter(order: TrainOrder, trainee: Trainee, shape: flops.Shape | None, processes: Processes) -> Meter:
    trained = sum(parameter.numel() for parameter in trainee.parameters() if parameter.requires_grad)
    return Meter(
        shape=shape,
        device=_device_name(processes),
        world=processes.world,
        max_length=order.max_length,
        trainable=None if order.train.lora is None else trained,
    )


def _device_name(processes: Processes) -> str:
    """As torch says it, such as `NVIDIA H200`; `cpu`."""
    return torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else "cpu"


def _peak_bytes(processes: Processes) -> int | None:
    """Most memory allocated on a GPU so far, of all ranks' the highest."""
    if processes.device.type != "cuda":
        return None
    return processes.most(torch.cuda.max_memory_allocated(processes.device))


@contextlib.contextmanager
def settings(spec: TrainSpec, processes: Processes) -> Iterator[None]:
    """Threads for good; determinism and peak memory while the run lasts: a process may do several."""
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(processes.device)
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    if not spec.deterministic or processes.device.type != "cuda":
        yield
        return
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS makes its handle
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only finds bugs
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        if before is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
        else:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = before


def _is_due(step: int, steps: int, spec: TrainSpec) -> bool:
    return spec.save_every is not None and step % spec.save_every == 0 and step < steps


def _seed_rounding(order: TrainOrder, step: int, shard: int) -> None:
    """Moments in bfloat16 are rounded at random: replicas of a shard alike, or they drift apart for good."""
    if order.train.optimizer_state == "bfloat16":
        torch.manual_seed(integer(order.seed, "rounding", step) + shard)


def _clip(model: Any, limit: float | None) -> float:
    """Clip to `limit` (None: only measure); the gradient's 2-norm over all parameters of all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit if limit is not None else float("inf"))
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _save(
    trainee: Trainee,
    order: TrainOrder,
    store: Store,
    tokenizer: Any,
    stops: list[int],
    processes: Processes,
    watched: Callable[[str], AbstractContextManager[Alive]],
) -> None:
    """`final/`, by rank 0; the others hand their shards over, one tensor at a time, and wait for it no longer."""

    def whole() -> Generator[tuple[str, torch.Tensor]]:
        with watched("tensor of `final/`") as alive:
            for name, tensor in trainee.model.state_dict().items():
                # Adapters are merged in float32; anything else may be rounded before it travels.
                part = tensor if order.train.lora else tensor.to(getattr(torch, order.model.dtype))
                yield name, part.full_tensor() if isinstance(part, DTensor) else part
                alive()

    with contextlib.closing(whole()) as tensors:
        if processes.is_main:
            with atomic_directory(store.final(order.id)) as directory:
                load.save(trainee.model, tensors, tokenizer, stops, order.model.dtype, directory)
        else:
            for _ in tensors:
                pass


def _diverged(
    step: int, loss_: float, norm: float, rows: Index, chosen: list[int], tokens: Tokens
) -> DivergedError:
    offsets = rows.rows.offsets
    documents = {int(d) for row in chosen for d in rows.rows.document[offsets[row] : offsets[row + 1]]}
    origins = ", ".join(tokens.origin(document) for document in sorted(documents)[:8])
    more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
    return DivergedError(
        f"step {step + 1}: loss {loss_}, gradient norm {norm}; no update was made. Documents: {origins}{more}",
        "lower `train.lr`, or look at these documents",
    )


def write_config(order: TrainOrder, store: Store) -> None:
    """`config.yaml`."""
    text = yaml.safe_dump(order.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    with atomic_write(store.config(order.id)) as file:
        file.write(b"# What this run resolved to, every value written out.\n" + text.encode())


def validation_loss(
    model: Trainee,
    order: TrainOrder,
    store: Store,
    tokens: Tokens,
    pad_id: int,
    processes: Processes,
    alive: Alive = lambda: None,
) -> float | None:
    """Token mean over the held-out documents, each alone and plainly truncated: comparable between all arms.

    None when nothing was held out. `alive`: called after each batch.
    """
    held = indexes.read(store.validation(order.index))
    if not held.rows.num_rows:
        return None
    alone = order.arm.model_copy(
        update={"layout": "padding_free", "pad_to": "none", "attention": "document", "positions": "reset"}
    )
    total = torch.zeros((), dtype=torch.float64, device=processes.device)
    model.eval()
    every = torch.arange(held.rows.num_rows).numpy()
    # No more slots at a time than a micro-batch of the training may have: for so many there is room.
    room = order.train.micro_batch * order.max_length // int(held.filled.max())
    at_once = max(1, min(_VALIDATED_AT_ONCE, room))
    with torch.no_grad():
        for own in batching.spread(every, held.tokens.astype(float), processes.world, at_once)[processes.rank]:
            batch = collate(tokens, held, own.tolist(), alone, order.max_length, pad_id).to(processes.device)
            total += model(batch).double()
            alive()
    model.train()
    return float(processes.sum(total)) / int(held.supervised.sum())
