"""One training run, top to bottom. It reads rows and tokens that are ready; it never tokenizes and never packs."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from packcli import batching, flops
from packcli.data import index as indexes
from packcli.data.index import Index
from packcli.data.tokenizer import load_directory
from packcli.data.tokens import Tokens
from packcli.errors import PreemptedError, RunError
from packcli.files import atomic_directory, atomic_write, json_line, read_jsonl
from packcli.model import attention, load, probe
from packcli.model.collate import collate
from packcli.model.trainee import Trainee
from packcli.plan import TrainOrder
from packcli.seeds import integer
from packcli.store import Store
from packcli.train import checkpoint, distributed, loss, optim
from packcli.train.distributed import Processes

Note = Callable[[int, int, str], None]
"""Called after each step with (step, steps, a short remark)."""


@dataclass(slots=True)
class Progress:
    """What a checkpoint carries beside the tensors; times add up over interrupted attempts."""

    step: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0


def train(
    order: TrainOrder, store: Store, *, stop_token_ids: list[int], files: list[str], shards: int, note: Note
) -> dict[str, Any]:
    """Train, leave `final/` as a Hugging Face checkpoint, and return the results for the manifest.

    Raises:
        ConfigError: model and data do not fit each other.
        IntegrityError: a checkpoint changed on disk.
        RunError: a non-finite loss or gradient; nothing was updated with it.
        PreemptedError: SIGTERM arrived; a checkpoint was written at a step boundary.
    """
    processes = distributed.start()
    _set_threads(order.train.threads)
    spec, arm = order.train, order.arm

    # Data ---------------------------------------------------------------------------------------------
    tokens = Tokens(store, order.tokens, files=files, shards=shards)
    rows = indexes.read(store.rows(order.index))
    steps = batching.run_steps(rows.sizes, spec, arm.order, order.seed)
    weighting = loss.weighting(arm.loss, rows, indexes.Labels(tokens))
    costs = rows.tokens.astype(float)
    tokenizer = load_directory(store.tokenizer(order.tokens))
    pad_id = tokenizer.pad_token_id or 0

    # Model --------------------------------------------------------------------------------------------
    base = store.final(order.base) if order.base else None
    model = load.load(order.model, base, tokenizer, order.max_length, order.seed)
    backend = attention.choose(spec.attention_backend, processes.device, torch.float32)
    trainee = Trainee(model.to(processes.device), backend, spec.head)
    isolation = probe.isolation(trainee, arm, len(tokenizer)) if arm.layout != "pad" else None
    model = distributed.shard(model, processes)
    adamw = optim.optimizer(model, spec, fused=processes.world == 1)
    model.train()

    # Resume -------------------------------------------------------------------------------------------
    progress = Progress()
    if (found := checkpoint.latest(store, order.id)) is not None:
        progress = Progress(**checkpoint.restore(found, model, adamw, processes))
    if processes.is_main:
        _write_config(order, store)
        _truncate_metrics(store, order.id, progress.step)
    processes.barrier()

    # Loop ---------------------------------------------------------------------------------------------
    autocast = _autocast(order.model.dtype, processes)
    with _metrics(store, order.id, processes) as write, _termination() as terminated:
        for step in range(progress.step, len(steps)):
            started, cpu_started = time.perf_counter(), time.process_time()
            chosen = steps[step]
            # Seeded by the step, so that a resumed run drops what an uninterrupted one does.
            torch.manual_seed(integer(order.seed, "dropout", step) + processes.rank)
            supervised = int(rows.supervised[chosen].sum())
            shares = batching.spread(chosen, costs, processes.world, spec.micro_batch)
            micro_batches = shares[processes.rank]
            divisor = weighting.divisor(chosen, [own for share in shares for own in share], rows.supervised)
            slots, total = 0, torch.zeros((), device=processes.device)
            for number, own in enumerate(micro_batches):
                batch = collate(tokens, rows, own.tolist(), arm, order.max_length, pad_id, weighting.pieces).to(
                    processes.device
                )
                distributed.sync_gradients(model, processes, number == len(micro_batches) - 1)
                with autocast():
                    summed = trainee(batch) * weighting.scale(own, rows.supervised)
                # Divided by what the step holds on all ranks, so micro-batches and ranks only split a sum. FSDP
                # averages gradients over ranks; the factor undoes that.
                torch.autograd.backward(summed * (processes.world / max(1.0, divisor)))
                total += summed.detach()
                slots += batch.num_slots if len(own) else 0
            mean = float(processes.sum(total)) / max(1.0, divisor)
            norm = _clip(model, spec.clip)
            if not (math.isfinite(mean) and math.isfinite(norm)):
                raise _diverged(step, mean, norm, rows, chosen.tolist(), tokens)
            lr = optim.lr_at(step, len(steps), spec)
            for group in adamw.param_groups:
                group["lr"] = lr
            adamw.step()
            adamw.zero_grad(set_to_none=True)

            progress.step = step + 1
            step_s = time.perf_counter() - started
            progress.wall_s += step_s
            progress.cpu_s += time.process_time() - cpu_started
            kept = int(rows.tokens[chosen].sum())
            write(
                {
                    "step": step + 1,
                    "loss": mean,
                    "lr": lr,
                    "grad_norm": norm,
                    "rows": len(chosen),
                    "documents": int(rows.documents[chosen].sum()),
                    "tokens": kept,
                    "supervised": supervised,
                    "slots": _all_slots(slots, processes),
                    "step_s": step_s,
                    "useful_tokens_per_s": kept / step_s,
                }
            )
            note(step + 1, len(steps), f"loss {mean:.3f}, {kept / step_s:,.0f} useful tokens/s")
            stopping = processes.any(terminated())
            if stopping or (spec.save_every and (step + 1) % spec.save_every == 0 and step + 1 < len(steps)):
                state = {"wall_s": progress.wall_s, "cpu_s": progress.cpu_s}
                checkpoint.save(store, order.id, step + 1, model, adamw, state, processes)
                if processes.is_main:
                    checkpoint.prune(store, order.id, spec.keep_last)
            if stopping and step + 1 < len(steps):
                raise PreemptedError(f"stopped at step {step + 1} of {len(steps)}", "run the same command again")

    # Results ------------------------------------------------------------------------------------------
    validation = _validation_loss(trainee, order, store, tokens, pad_id, processes)
    weights = checkpoint.full_weights(model)
    if processes.is_main:
        with atomic_directory(store.final(order.id)) as directory:
            load.save(model, weights, tokenizer, stop_token_ids, order.model.dtype, directory)
        # `final/` holds the weights; the optimizer's state is of no more use.
        checkpoint.prune(store, order.id, keep=0)
    processes.barrier()
    return (
        _results(order, store, model, rows, progress, isolation, validation, processes)
        if processes.is_main
        else {}
    )


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _autocast(dtype: str, processes: Processes) -> Callable[[], AbstractContextManager[Any]]:
    if dtype == "float32":
        return nullcontext
    return lambda: torch.autocast(processes.device.type, dtype=getattr(torch, dtype))


def _clip(model: Any, limit: float | None) -> float:
    """Clip to `limit` (None: only measure); the gradient's 2-norm over all parameters of all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit if limit is not None else float("inf"))
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _diverged(step: int, loss_: float, norm: float, rows: Index, chosen: list[int], tokens: Tokens) -> RunError:
    offsets = rows.rows.offsets
    documents = {int(d) for row in chosen for d in rows.rows.document[offsets[row] : offsets[row + 1]]}
    origins = ", ".join(tokens.origin(document) for document in sorted(documents)[:8])
    more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
    return RunError(
        f"step {step + 1}: loss {loss_}, gradient norm {norm}; no update was made. Documents: {origins}{more}",
        "lower `train.lr`, or look at these documents",
    )


def _all_slots(slots: int, processes: Processes) -> int:
    return int(processes.sum(torch.tensor(slots, device=processes.device))) if processes.world > 1 else slots


@contextmanager
def _metrics(store: Store, train_id: str, processes: Processes) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Append one JSON line a step; flushed each time, so a killed run keeps all but a torn last line."""
    if not processes.is_main:
        yield lambda record: None
        return
    with store.metrics(train_id).open("ab") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json_line(record))
            file.flush()

        yield write


@contextmanager
def _termination() -> Iterator[Callable[[], bool]]:
    """SIGTERM only sets a flag; the loop stops at a step boundary."""
    seen: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _truncate_metrics(store: Store, train_id: str, step: int) -> None:
    path = store.metrics(train_id)
    kept = [record for record in read_jsonl(path) if record["step"] <= step] if path.exists() else []
    with atomic_write(path) as file:
        for record in kept:
            file.write(json_line(record))


def _write_config(order: TrainOrder, store: Store) -> None:
    text = yaml.safe_dump(order.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    with atomic_write(store.config(order.id)) as file:
        file.write(b"# What this run resolved to, every value written out.\n" + text.encode())


def _validation_loss(
    model: Trainee, order: TrainOrder, store: Store, tokens: Tokens, pad_id: int, processes: Processes
) -> float | None:
    """Token mean over the held-out documents, each alone and plainly truncated: comparable between all arms.

    None when nothing was held out.
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
    with torch.no_grad():
        for own in batching.spread(every, held.tokens.astype(float), processes.world, 16)[processes.rank]:
            batch = collate(tokens, held, own.tolist(), alone, order.max_length, pad_id).to(processes.device)
            total += model(batch).double()
    model.train()
    return float(processes.sum(total)) / int(held.supervised.sum())


def _results(
    order: TrainOrder,
    store: Store,
    model: Any,
    rows: Index,
    progress: Progress,
    isolation: probe.Isolation | None,
    validation: float | None,
    processes: Processes,
) -> dict[str, Any]:
    records = read_jsonl(store.metrics(order.id))
    tail = records[-max(1, len(records) // 10) :]
    total = {key: sum(record[key] for record in records) for key in ("tokens", "slots", "supervised", "documents")}
    final = sum(r["loss"] * r["supervised"] for r in tail) / max(1, sum(r["supervised"] for r in tail))
    return {
        "steps": len(records),
        **total,
        "final_loss": final,
        "validation_loss": validation,
        "wall_s": progress.wall_s,
        "cpu_s": progress.cpu_s,
        "useful_tokens_per_s": total["tokens"] / progress.wall_s if progress.wall_s else None,
        "padded_tokens_per_s": total["slots"] / progress.wall_s if progress.wall_s else None,
        "mfu": _mfu(model, rows, total, progress.wall_s, processes),
        "isolation": isolation.record() if isolation else None,
        "random_weights": order.random_weights,
        "processes": processes.world,
        "threads": torch.get_num_threads() if processes.device.type == "cpu" else None,
        "device": processes.device.type,
        "cores": os.cpu_count(),
    }


def _mfu(model: Any, rows: Index, total: dict[str, int], wall_s: float, processes: Processes) -> float | None:
    """Model FLOPs of useful tokens over the devices' dense bf16 peak; None where the peak is not known."""
    if processes.device.type != "cuda" or not wall_s:
        return None
    peak, shape = flops.peak(torch.cuda.get_device_name(processes.device)), flops.shape(model.config.to_dict())
    if peak is None or shape is None:
        return None
    # Pieces, not rows, also for causal packs: attention between documents is not useful work. Scaled from one
    # epoch to the run.
    lengths = rows.rows.stop - rows.rows.start
    squares = int((lengths**2).sum() * (total["tokens"] / rows.tokens.sum()))
    count = flops.training(shape, tokens=total["tokens"], squares=squares, supervised=total["supervised"])
    return count / (wall_s * peak * processes.world)
