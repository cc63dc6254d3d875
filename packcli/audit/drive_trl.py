"""TRL's SFTTrainer on crafted data. Runs in TRL's environment; nothing of packcli is imported (`bundle.py`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

PACKAGES = ("trl", "transformers", "torch", "accelerate")


def drive(configuration: dict[str, Any], run: dict[str, Any], work: Path) -> tuple[list[str], list[float]]:
    """Train as `trl sft --config` would with these keys; the keys that were not carried over."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    known = {one.name for one in dataclasses.fields(SFTConfig)}
    kept = {key: value for key, value in configuration.items() if key in known}
    model = AutoModelForCausalLM.from_pretrained(
        work / "model",
        dtype=torch.float32,
        attn_implementation=configuration.get("attn_implementation", "sdpa"),
    )
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**{**kept, **run["arguments"]}),
        train_dataset=load_dataset(
            "json", data_files=str(work / "chats.jsonl"), split="train", cache_dir=str(work / "cache")
        ),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
    )
    trainer.train(resume_from_checkpoint=run["resume"])
    return sorted(configuration.keys() - known - {"attn_implementation"}), []
