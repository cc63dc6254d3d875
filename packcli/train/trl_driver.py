"""TRL's SFTTrainer on rows that packcli made: `python -I trl_driver.py SETTING.json`, in an environment with TRL.

It imports nothing of packcli. SETTING holds `rows` (a `datasets` directory), `order` (a JSON list of row numbers:
the whole run, step by step), `model`, `tokenizer`, `scratch`, `log` (a JSON line each step), `trained` (where the
weights go), `result`, `threads`, `parent` (a process id), `padding_free`, and `arguments` of SFTConfig.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Trainer(SFTTrainer):  # type: ignore[misc]
    """Keeps what is logged only rounded, and counts slots; both of the step that is being done."""

    loss, slots = 0.0, 0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.slots += inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.loss += float(loss)
        return loss


class Steps(TrainerCallback):  # type: ignore[misc]
    """One JSON line a step. Its time runs from the end of the one before: all that TRL does in it."""

    trainer: Trainer

    def __init__(self, log: Path) -> None:
        self.log, self.record = log, dict[str, Any]()
        self.ended, self.cpu = 0.0, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ended, self.cpu = time.perf_counter(), time.process_time()

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.record["lr"] = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        gpu, trainer = torch.cuda.is_available(), self.trainer
        if gpu:
            torch.cuda.synchronize()
        now, cpu = time.perf_counter(), time.process_time()
        self.record |= {"step": state.global_step, "loss": trainer.loss, "slots": trainer.slots}
        self.record |= {"step_s": now - self.ended, "cpu_s": cpu - self.cpu}
        self.record["peak_bytes"] = torch.cuda.max_memory_allocated() if gpu else None
        self.ended, self.cpu, trainer.loss, trainer.slots = now, cpu, 0.0, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "grad_norm" not in logs:  # the summary at the end
            return
        found = {**self.record, "grad_norm": float(logs["grad_norm"])}
        if not (math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])):
            control.should_training_stop = True
        # JSON has no infinity, and no NaN.
        numbers = {
            name: None if value is None or not math.isfinite(value) else value for name, value in found.items()
        }
        with self.log.open("a") as file:
            file.write(json.dumps(numbers) + "\n")


def main() -> None:
    setting = json.loads(Path(sys.argv[1]).read_text())
    die_with(setting["parent"])
    if setting["threads"]:
        torch.set_num_threads(setting["threads"])
    gpu = torch.cuda.is_available()
    attention = "flash_attention_2" if gpu and importlib.util.find_spec("flash_attn") else "sdpa"
    order = json.loads(Path(setting["order"]).read_text())
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(setting["model"], dtype=torch.float32, attn_implementation=attention),
        args=SFTConfig(
            output_dir=setting["scratch"],
            packing=False,  # the rows are made
            padding_free=setting["padding_free"],
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
            num_train_epochs=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not gpu,
            **setting["arguments"],
        ),
        train_dataset=load_from_disk(setting["rows"])["train"].select(order),
        processing_class=AutoTokenizer.from_pretrained(setting["tokenizer"]),
        callbacks=[steps := Steps(Path(setting["log"]))],
    )
    steps.trainer = trainer
    trainer.train()
    trainer.model.save_pretrained(setting["trained"])
    result = {
        "versions": {name: version(name) for name in ("trl", "transformers", "torch", "datasets", "accelerate")},
        "python": sys.version.split()[0],
        "attention": attention,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "threads": None if gpu else torch.get_num_threads(),
    }
    Path(setting["result"]).write_text(json.dumps(result))


def die_with(parent: int) -> None:
    """End when the process that started this one does, whatever ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the process that started this one is gone")


if __name__ == "__main__":
    main()
