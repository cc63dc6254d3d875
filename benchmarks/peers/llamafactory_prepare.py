"""LLaMA-Factory's preparation as `llamafactory-cli train` runs it before the model. Runs in its environment.

Timed is `get_dataset` (read, align, tokenize turn by turn, pack by its greedy knapsack in batches of 1,000), not
the imports, the arguments or the tokenizer.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np

# It imports torchaudio at the top for audio that chat text has not; a package that is not there need not be.
if importlib.util.find_spec("torchaudio") is None:
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

_FORMAT = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}


def main() -> None:
    given = measure.arguments()
    steps: dict[str, dict[str, float]] = {}
    configuration = {
        "template": "llama3",
        "cutoff_len": given.max_length,
        "packing": True,
        "neat_packing": True,
        "preprocessing_num_workers": given.workers,
    }
    model_args, data_args, training_args, _, _ = get_train_args(_arguments(given.scratch, given, configuration))
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    with measure.step(steps, "prepare"):
        prepared = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)
    if given.documents:
        table = prepared["train_dataset"]
        measure.save(given.documents, len(table), list(_documents(table)))
    packages = ["llamafactory", "transformers", "tokenizers", "datasets", "torch"]
    measure.finish(packages=packages, configuration=configuration, steps=steps)


def _arguments(scratch: Path, given: Any, configuration: dict[str, Any]) -> dict[str, Any]:
    scratch.mkdir(parents=True, exist_ok=True)
    described = {"chats": {"file_name": str(given.data.resolve()), **_FORMAT}}
    (scratch / "dataset_info.json").write_text(json.dumps(described))
    return {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": str(given.tokenizer),
        "dataset": "chats",
        "dataset_dir": str(scratch),
        "output_dir": str(scratch / "trainer"),
        "report_to": "none",
        **configuration,
    }


def _documents(dataset: Any) -> Iterator[tuple[Any, Any]]:
    """A row's documents are numbered from 1 in its attention mask; 0 is padding."""
    for row in dataset.select_columns(["input_ids", "labels", "attention_mask"]).with_format("numpy"):
        numbers = row["attention_mask"]
        for number in range(1, int(numbers.max()) + 1):
            own = np.flatnonzero(numbers == number)
            yield row["input_ids"][own], row["labels"][own] != measure.IGNORED


if __name__ == "__main__":
    main()
