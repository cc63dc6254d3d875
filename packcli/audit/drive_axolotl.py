"""axolotl's SFT on crafted data. Runs in its environment; nothing of packcli is imported (`bundle.py`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

PACKAGES = ("axolotl", "transformers", "torch", "trl", "accelerate")


def drive(configuration: dict[str, Any], run: dict[str, Any], work: Path) -> tuple[list[str], list[float]]:
    """Train as `axolotl train FILE` would with these keys; the keys that were not carried over."""
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig

    chats = {
        "path": str(work / "chats.jsonl"),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
    }
    ours = {
        "base_model": str(work / "model"),
        "datasets": [chats],
        "chat_template": "tokenizer_default",
        "special_tokens": {"pad_token": "<|end_of_text|>"},
        "dataset_prepared_path": str(work / "prepared"),
        "dataset_num_proc": 1,
        "resume_from_checkpoint": run["resume"],
    }
    cfg = load_cfg(DictDefault({**configuration, **ours, **run["arguments"]}))
    train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    fields = AxolotlInputConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values())}
    return sorted(configuration.keys() - known), []
