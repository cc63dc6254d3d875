"""LLaMA-Factory's SFT on crafted data. Runs in its environment; nothing of packcli is imported (`bundle.py`)."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

PACKAGES = ("llamafactory", "transformers", "torch", "trl", "accelerate")


def drive(configuration: dict[str, Any], run: dict[str, Any], work: Path) -> tuple[list[str], list[float]]:
    """Train as `llamafactory-cli train FILE` would with these keys; the keys that were not carried over."""
    if importlib.util.find_spec("torchaudio") is None:  # imported for sound, which chats have not
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    from llamafactory.train.tuner import run_exp

    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {
        "file_name": str(work / "chats.jsonl"),
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {**tags, "system_tag": "system"},
    }
    (work / "dataset_info.json").write_text(json.dumps({"chats": described}))
    ours = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": str(work / "model"),
        "template": "llama3",
        "dataset": "chats",
        "dataset_dir": str(work),
        "overwrite_cache": True,
        "resume_from_checkpoint": run["resume"],
    }
    run_exp({**configuration, **ours, **run["arguments"]})
    return [], []
