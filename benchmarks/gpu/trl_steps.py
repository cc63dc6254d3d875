"""Worker: TRL's SFTTrainer at its best on one GPU, for some steps: `trl_steps.py SETTING.json`.

Packing (bfd), FlashAttention, liger-kernel, fused AdamW, weights and moments in plain bfloat16: less to move than
float32 masters. SETTING: device, tiny, shape, layers, documents, warmup, steps, gradient_checkpointing, deadline,
scratch (a directory).
"""

from __future__ import annotations

import importlib.util
import time
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset
from documents import MICRO_BATCHES, ROWS, Documents, Shape, shape
from timing import device_of, emit, setting, synchronize
from tokenizers import Tokenizer, models
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from packcli import flops
from packcli.model import backends, configs
from packcli.model.backends import Options


class Ends(TrainerCallback):
    """When each step ended; stops the run when its time is up."""

    def __init__(self, device: torch.device, deadline: float, warmup: int) -> None:
        self.device, self.deadline, self.warmup = device, deadline, warmup
        self.seconds: list[float] = []
        self.began = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize(self.device)
        self.seconds.append(time.perf_counter())
        if len(self.seconds) == self.warmup:
            self.began = time.time()
        last = self.seconds[-1] - self.seconds[-2] if len(self.seconds) > 1 else 0.0
        if len(self.seconds) >= self.warmup + 2 and time.time() + 1.5 * last > self.deadline:
            control.should_training_stop = True


class Trainer(SFTTrainer):
    """Keeps what each micro-batch held, to count it afterwards: counting here would wait for the device."""

    held: list[tuple[torch.Tensor, torch.Tensor]]

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.held.append((inputs["cu_seq_lens_q"], inputs["labels"]))
        return super().training_step(model, inputs, *args, **kwargs)


def varlen(
    module: Any, query: Any, key: Any, value: Any, mask: Any, *, cu_seq_lens_q: Any, max_length_q: int,
    scaling: float, **_: Any,
) -> Any:  # fmt: skip
    out = backends.varlen(query, key, value, Options(scaling), bounds=cu_seq_lens_q, longest=max_length_q)
    return out.transpose(1, 2).contiguous(), None


def attention(device: torch.device) -> tuple[str, str]:
    """transformers' own FlashAttention where its package is there; else the same kernels as torch carries them."""
    if device.type == "cpu":
        return "sdpa", "no GPU: a dense mask"
    for name, module in (("flash_attention_3", "flash_attn_interface"), ("flash_attention_2", "flash_attn")):
        if importlib.util.find_spec(module) is not None:
            return name, "transformers' own"
    AttentionInterface.register("varlen", varlen)
    return (
        "varlen",
        "FlashAttention 2 inside torch: flash-attn is not installed, its Hub kernels need the internet",
    )


def dataset(documents: Documents) -> Dataset:
    ids = [documents.ids(number).tolist() for number in range(documents.num_documents)]
    starts = documents.spans[1].tolist()
    labels = [[-100] * start + each[start:] for each, start in zip(ids, starts, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def configuration(asked: dict[str, Any], model: Shape, device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    liger = gpu and importlib.util.find_spec("liger_kernel") is not None
    return {
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": model.max_length,
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "max_steps": asked["warmup"] + asked["steps"],
        "gradient_checkpointing": asked["gradient_checkpointing"],
        "use_liger_kernel": liger,
        "optim": "adamw_torch_fused" if gpu else "adamw_torch",
        "bf16": gpu,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "dataloader_num_workers": 4 if gpu else 0,
        "torch_compile": False,
    }


def main() -> None:
    asked = setting()
    device = device_of(asked["device"])
    chosen = shape(asked["shape"], tiny=asked["tiny"], layers=asked["layers"])
    documents = Documents(asked["documents"], chosen.config["vocab_size"])
    name, why = attention(device)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            configs.build(chosen.config), dtype=torch.bfloat16, attn_implementation=name
        )
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    given = configuration(asked, chosen, device)
    trainer = Trainer(
        model,
        args=SFTConfig(
            output_dir=asked["scratch"],
            use_cpu=device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **given,
        ),
        train_dataset=dataset(documents),
        processing_class=tokenizer,
        callbacks=[ends := Ends(device, asked["deadline"], asked["warmup"])],
    )
    trainer.held = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    versions = {name: version(name) for name in ("trl", "transformers", "torch")}
    if given["use_liger_kernel"]:
        versions["liger-kernel"] = version("liger-kernel")
    peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}
    records = steps(trainer.held, ends.seconds, chosen, asked["warmup"])
    emit("run", program="TRL", name="TRL, packing (bfd)", shape=chosen.name, layers=chosen.counted.layers,
         configuration=given | {"attention": name, "attention_why": why, "weights": "bfloat16"}, versions=versions,
         records=records, to=time.time(), **{"from": ends.began}, **peak)  # fmt: skip


def steps(
    held: list[tuple[torch.Tensor, torch.Tensor]], ends: list[float], chosen: Shape, warmup: int
) -> list[dict[str, Any]]:
    found = []
    for number in range(max(1, warmup), len(ends)):
        own = held[number * MICRO_BATCHES : (number + 1) * MICRO_BATCHES]
        lengths = [length for bounds, _ in own for length in bounds.diff().tolist()]
        tokens, labels = sum(lengths), sum(int((each != -100).sum()) for _, each in own)
        squares = sum(length * length for length in lengths)
        count = flops.training(chosen.counted, tokens=tokens, squares=squares, supervised=labels)
        full = flops.full_square(chosen.counted, tokens=tokens, max_length=chosen.max_length)
        found.append(
            {
                "s": ends[number] - ends[number - 1],
                "slots": sum(each.numel() for _, each in own),
                "tokens": tokens,
                "supervised": labels,
                "flops": count,
                "flops_full_square": full,
            }
        )
    return found


if __name__ == "__main__":
    main()
