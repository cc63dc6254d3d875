"""TRL's SFTTrainer for some steps: `trl_train.py SETTING.json` prints JSON. Runs in TRL's environment.

SETTING: data (JSONL of `input_ids`, `labels`) or prepared (a `datasets` directory) with rows (which, in order);
model, tokenizer, scratch: directories; steps, threads, batch, max_length, lr, warmup_steps; packing; and what is
switched away from what TRL does by itself, to see what it costs:

    documents   no dense mask: attention document by document. Without packing also no padding.
    labels      the head at supervised positions only. TRL does so itself where it has Triton, that is on a GPU.

TRL logs entropy and accuracy of every token it scores, and recomputes logits in the backward pass; that stays.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import load_dataset, load_from_disk
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils


class Ends(TrainerCallback):
    """When each step ended, on the clock and in CPU seconds."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append((time.perf_counter(), time.process_time()))


class Trainer(SFTTrainer):
    """Keeps what is logged only rounded: each step's loss; and counts its tokens and slots."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.slots: list[int] = []

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(float(loss))
        self.slots.append(inputs["input_ids"].numel())
        mask = inputs.get("attention_mask")
        self.tokens.append(self.slots[-1] if mask is None else int(mask.sum()))
        return loss


def documents(
    module: Any, query: Any, key: Any, value: Any, mask: Any, *, cu_seq_lens_q: Any, scaling: float, **_: Any
) -> Any:
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    options = {"is_causal": True, "scale": scaling, "enable_gqa": True}
    out = torch.cat([F.scaled_dot_product_attention(*part, **options) for part in parts], dim=2)
    return out.transpose(1, 2).contiguous(), None


def main() -> None:
    setting = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(setting["threads"])
    switched = setting["switched"]
    AttentionInterface.register("documents", documents)
    if "labels" in switched:
        utils._use_triton = lambda device: True
    configuration: dict[str, Any] = {
        "packing": setting["packing"],
        "max_length": setting["max_length"],
        "padding_free": setting["packing"] or "documents" in switched,
        "per_device_train_batch_size": setting["batch"],
        "max_steps": setting["steps"],
        "learning_rate": setting["lr"],
        "lr_scheduler_type": "linear",
        "warmup_steps": setting["warmup_steps"],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "seed": 0,
    }
    if "prepared" in setting:
        rows = load_from_disk(setting["prepared"])["train"].select(setting["rows"])
        configuration |= {
            "packing": False,  # it is packed
            "padding_free": setting["packing"],
            "train_sampling_strategy": "sequential",
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length": None,
        }
    else:
        rows = load_dataset("json", data_files=setting["data"], split="train", cache_dir=setting["scratch"])
    if configuration["padding_free"] and not configuration["packing"] and "prepared" not in setting:
        rows = rows.map(lambda row: {name: ids[: setting["max_length"]] for name, ids in row.items()})
        configuration["max_length"] = None
    attention = "documents" if "documents" in switched else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        setting["model"], dtype=torch.float32, attn_implementation=attention
    )
    trainer = Trainer(
        model,
        args=SFTConfig(
            output_dir=setting["scratch"],
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **configuration,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(setting["tokenizer"]),
        callbacks=[ends := Ends()],
    )
    trainer.train()
    result = {
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
        "configuration": configuration | {"attention": attention},
        "rows_in_all": len(trainer.train_dataset),
        "ends": ends.seconds,
        "losses": trainer.losses,
        "tokens": trainer.tokens,
        "slots": trainer.slots,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
