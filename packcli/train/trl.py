"""A cell trained by TRL: the same weights and rows handed over, the same files made of what comes back.

TRL runs in a Python of its own (`trl_driver.py`), so that its versions and ours need not agree. Rows are given in
the order in which packcli's own steps take them; what a step holds is counted here, from the row index, for both.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

from packcli import batching, flops
from packcli.batching import Ints
from packcli.config import TrainSpec
from packcli.data import export, framed
from packcli.data import index as indexes
from packcli.data.index import Index
from packcli.data.tokenizer import load_directory
from packcli.data.tokens import Tokens
from packcli.errors import ConfigError, DivergedError, OutOfMemoryError, PreemptedError, RunError
from packcli.estimate import StepArithmetic
from packcli.files import atomic_directory, atomic_write, json_line, read_json, read_jsonl, write_json
from packcli.model import attention, load
from packcli.model.trainee import Trainee
from packcli.plan import IndexOrder, TrainOrder
from packcli.processes import Stop, listening
from packcli.store import Store
from packcli.train import distributed, loop, metrics, trl_terms
from packcli.train.loop import Commit, Note
from packcli.train.metrics import Meter

_LAST_LINES = 12
_LINE_BYTES = 1024  # of what the driver writes a step, at most
_TICK_S = 0.2
_NO_LIMIT = 1e30  # of a gradient's norm: TRL measures it only where it clips


@dataclass(frozen=True, slots=True)
class _Run:
    order: TrainOrder
    rows: Index
    steps: list[Ints]
    arithmetic: StepArithmetic
    model: Any


def train(
    order: TrainOrder,
    store: Store,
    commit: Commit,
    *,
    stop_token_ids: list[int],
    files: list[str],
    shards: int,
    note: Note,
) -> None:
    """Train with TRL, leave `final/` and `metrics.jsonl` as packcli's own training does, and `commit`.

    Raises:
        ConfigError: an arm that TRL cannot train; several processes.
        MissingError: no Python with TRL.
        RunError: TRL failed, with the last lines it wrote; a loss that is not finite.
        PreemptedError: SIGTERM or SIGUSR2 arrived while TRL trained, which begins anew.
    """
    trl_terms.check(order)
    if distributed.world_size() > 1:
        raise ConfigError("`train.backend: trl` trains with one process", "--nproc-per-node 1")
    processes = distributed.start(group=distributed.needs_group(order.model.dtype))
    tokens = Tokens(store, order.tokens, files=files, shards=shards)
    rows = indexes.read(store.rows(order.index))
    steps = batching.run_steps(rows.sizes, order.train, order.arm.order, order.seed)
    arithmetic = loop.arithmetic_of(order, store, rows, steps)
    note(0, len(steps), arithmetic.text())
    tokenizer = load_directory(store.tokenizer(order.tokens))
    handed = store.handed_over(order.id).resolve()  # the driver may start elsewhere
    shutil.rmtree(handed, ignore_errors=True)
    handed.mkdir(parents=True)
    loop.write_config(order, store)

    base = store.final(order.base) if order.base else None
    model = load.load(order.model, base, tokenizer, order.max_length, order.seed)
    run = _Run(order, rows, steps, arithmetic, model)
    _attention(model, order, processes)  # before the hours, not after them
    load.save(model, model.state_dict(), tokenizer, stop_token_ids, "float32", handed / "model")
    _export(order, store, tokens, rows, tokenizer, handed / "rows")
    _hand_over(run, handed)
    stop = Stop(end=lambda: os._exit(PreemptedError.exit_code))  # TRL ends with this process
    with listening(stop, signal.SIGTERM, signal.SIGUSR2):
        _drive(run, handed, stop, note)
        found = read_json(handed / "result.json")
        steps_there = read_jsonl(handed / "steps.jsonl")
        _finite(steps_there)
        records = _records(run, steps_there, found["device"])
        with atomic_write(store.metrics(order.id)) as file:
            file.writelines(map(json_line, records))
        trained = load.pretrained(str(handed / "trained"), dtype=torch.float32, attn_implementation=attention.NAME)
        with atomic_directory(store.final(order.id)) as directory:
            load.save(model, trained.state_dict(), tokenizer, stop_token_ids, order.model.dtype, directory)
        pad_id = tokenizer.pad_token_id or 0
        trainee = _trainee(trained, order, processes)
        validation = loop.validation_loss(trainee, order, store, tokens, pad_id, processes)
        shutil.rmtree(handed)
        cpu_s = sum(step["cpu_s"] for step in steps_there)
        results = {**metrics.results(records), "validation_loss": validation, "cpu_s": cpu_s}
        commit({**results, **_about(run, found)})


def _about(run: _Run, found: dict[str, Any]) -> dict[str, Any]:
    """What it was trained with, under the names of packcli's own results; `found`: as the driver left it."""
    versions = found["versions"]
    return {
        "step": run.arithmetic.model_dump(),
        "isolation": None,  # packcli's probe knows its own attention only
        "random_weights": run.order.random_weights,
        "embedding_rows_added": run.model.embedding_rows_added,
        "attention_backend": {
            "name": f"{found['attention']} in TRL {versions['trl']}",
            "version": f"transformers {versions['transformers']}",
            "why": "train.backend: trl",
        },
        "backend": {"name": "trl", "python": found["python"], **versions},
        "processes": 1,
        "sharded_over": 1,
        "threads": found["threads"],
        "device": found["device"],
        "cores": os.cpu_count(),
    }


def _export(order: TrainOrder, store: Store, tokens: Tokens, rows: Index, tokenizer: Any, directory: Path) -> None:
    manifest = store.manifest("index", order.index)
    assert manifest is not None  # `stages.train` saw it
    prepared = export.Prepared(
        tokens=tokens,
        index=rows,
        validation=None,
        order=IndexOrder.model_validate(manifest.spec),
        arm=order.arm,
        pad_id=tokenizer.pad_token_id or 0,
        ledger=manifest.results["ledger"],
        tokenizer=store.tokenizer(order.tokens),
        marks=framed.marks(order.arm.boundary, lambda: tokenizer),
    )
    export.export(prepared, directory, lambda done, total, remark: None)


def _hand_over(run: _Run, handed: Path) -> None:
    order, train_ = run.order, run.order.train
    write_json(handed / "order.json", [int(row) for step in run.steps for row in step])
    write_json(
        handed / "setting.json",
        {
            **{name: str(handed / name) for name in ("rows", "model", "scratch", "trained")},
            "tokenizer": str(handed / "rows" / "tokenizer"),
            "order": str(handed / "order.json"),
            "log": str(handed / "steps.jsonl"),
            "result": str(handed / "result.json"),
            "threads": train_.threads,
            "parent": os.getpid(),
            "padding_free": order.arm.layout == "padding_free"
            or (order.arm.layout == "pack" and order.arm.attention == "document"),
            "arguments": _arguments(run),
        },
    )


def _arguments(run: _Run) -> dict[str, Any]:
    """Of SFTConfig: what packcli's own training does, in transformers' words."""
    train_, arm = run.order.train, run.order.arm
    micro_batch = _divisor(train_)
    warmup = train_.warmup_steps
    if warmup is None:
        warmup = math.ceil(train_.warmup_ratio * len(run.steps))
    multiple = {"max_length": run.order.max_length, "longest": batching.LONGEST_MULTIPLE, "none": None}[arm.pad_to]
    return {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": train_.global_batch // micro_batch,
        "learning_rate": run.arithmetic.lr,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(train_.schedule, train_.schedule),
        "warmup_steps": warmup,
        "optim": "adamw_torch_fused",
        "adam_beta1": train_.betas[0],
        "adam_beta2": train_.betas[1],
        "adam_epsilon": 1e-8,
        "weight_decay": train_.weight_decay,
        "max_grad_norm": train_.clip if train_.clip is not None else _NO_LIMIT,
        "bf16": run.order.model.dtype == "bfloat16",
        "gradient_checkpointing": train_.checkpointing != "none",
        "pad_to_multiple_of": multiple,
        "seed": run.order.seed,
    }


def _divisor(train_: TrainSpec) -> int:
    """Rows of a forward pass: at most `micro_batch`, and so many that a step is a whole number of them."""
    most = min(train_.micro_batch, train_.global_batch)
    return next(size for size in range(most, 0, -1) if train_.global_batch % size == 0)


def _drive(run: _Run, handed: Path, stop: Stop, note: Note) -> None:
    """Run the driver to its end."""
    command = [
        trl_terms.python(run.order),
        "-I",
        str(Path(__file__).with_name("trl_driver.py")),
        str(handed / "setting.json"),
    ]
    log = handed / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while process.poll() is None and stop.number is None:
                time.sleep(_TICK_S)
                _look(handed / "steps.jsonl", len(run.steps), note)
        finally:
            process.kill()
            code = process.wait()
    if stop.number is not None and code:
        raise PreemptedError("stopped while TRL trained: it begins anew", "run the same command again")
    if code:
        raise _failed(code, log)


def _look(steps: Path, total: int, note: Note) -> None:
    """Say how far TRL is, by the last whole line it wrote."""
    if not steps.exists():
        return
    with steps.open("rb") as file:
        file.seek(max(0, steps.stat().st_size - _LINE_BYTES))
        *_, last, _ = [b"", b"", *file.read().split(b"\n")]
    if last:
        done = orjson.loads(last)
        loss = "not finite" if done["loss"] is None else f"{done['loss']:.3f}"
        note(int(done["step"]), total, f"TRL, loss {loss}")


def _failed(code: int, log: Path) -> RunError:
    lines = log.read_text(errors="replace").rstrip().splitlines()
    last = "\n".join(lines[-_LAST_LINES:]) or "it wrote nothing"
    kind = OutOfMemoryError if "OutOfMemoryError" in last or "out of memory" in last else RunError
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return kind(f"TRL failed ({how}); the last lines it wrote:\n{last}", f"all of them: {log}")


def _records(run: _Run, found: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """`metrics.jsonl`: losses and times as TRL had them, counts from the row index.

    Raises:
        RunError: TRL took another number of steps.
    """
    if len(found) != len(run.steps):
        cause = f"TRL took {len(found):,} steps, not {len(run.steps):,}"
        raise RunError(cause, "this version of TRL counts steps otherwise; see docs/coming_from.md")
    rows, squares = run.rows, run.rows.squares(run.order.arm.attention)
    shape = flops.shape(run.model.config.to_dict())
    meter = Meter(shape=shape, device=device, world=1, max_length=run.order.max_length)
    return [
        meter.record(
            **{name: step[name] for name in ("step", "loss", "lr", "grad_norm", "slots", "step_s", "peak_bytes")},
            rows=len(chosen),
            documents=int(rows.documents[chosen].sum()),
            tokens=int(rows.tokens[chosen].sum()),
            supervised=int(rows.supervised[chosen].sum()),
            squares=int(squares[chosen].sum()),
        )
        for step, chosen in zip(found, run.steps, strict=True)
    ]


def _finite(steps: list[dict[str, Any]]) -> None:
    for step in steps:
        if step["loss"] is None or step["grad_norm"] is None:
            cause = f"step {step['step']}: loss {step['loss'] or 'not finite'}, gradient norm "
            raise DivergedError(f"{cause}{step['grad_norm'] or 'not finite'}, in TRL", "lower `train.lr`")


def _trainee(model: Any, order: TrainOrder, processes: distributed.Processes) -> Trainee:
    """TRL's model under packcli's attention and precision, for a validation loss that compares."""
    trainee = Trainee(model, _attention(model, order, processes))
    spec = order.train.model_copy(update={"compile": False})  # that is TRL's; here a pass or two are made
    distributed.lay_out(trainee, spec, order.model.dtype, order.max_length, processes)
    return trainee


def _attention(model: Any, order: TrainOrder, processes: distributed.Processes) -> attention.Backend:
    dtype = getattr(torch, order.model.dtype)
    return attention.choose(order.train.attention_backend, processes.device, dtype, config=model.config)
