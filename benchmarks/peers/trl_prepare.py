"""TRL's preparation as `SFTTrainer` runs it when it is made, on a tiny random model. Runs in TRL's environment.

Timed are `load_dataset` and `SFTTrainer._prepare_dataset` (chat template, tokens, assistant masks, labels, packing
in its batches of 1,000), not the imports, the tokenizer, the model or the rest of the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import measure
import numpy as np
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer


def main() -> None:
    given = measure.arguments()
    steps: dict[str, dict[str, float]] = {}
    configuration = {
        "max_length": given.max_length,
        "packing": True,
        "packing_strategy": "bfd",
        "assistant_only_loss": True,
        # None prepares in this process; 1 would add a pool of one.
        "dataset_num_proc": given.workers if given.workers > 1 else None,
    }
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    with measure.step(steps, "read"):
        dataset = load_dataset("json", data_files=str(given.data), split="train")
    _time(steps)
    trainer = SFTTrainer(
        model=_model(len(tokenizer)),
        args=SFTConfig(output_dir=str(given.scratch / "trainer"), use_cpu=True, report_to="none", **configuration),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    if given.documents:
        table = trainer.train_dataset
        measure.save(given.documents, len(table), list(_documents(table)))
    packages = ["trl", "transformers", "tokenizers", "datasets", "torch"]
    measure.finish(packages=packages, configuration=configuration, steps=steps)


def _model(vocab_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )


def _time(steps: dict[str, dict[str, float]]) -> None:
    """Have the trainer's own preparation, and the packing inside it, time themselves."""
    prepare, pack = SFTTrainer._prepare_dataset, sft_trainer.pack_dataset

    def timed_prepare(*args: Any, **kwargs: Any) -> Any:
        with measure.step(steps, "prepare"):
            return prepare(*args, **kwargs)

    def timed_pack(*args: Any, **kwargs: Any) -> Any:
        with measure.step(steps, "of it packing"):
            return pack(*args, **kwargs)

    SFTTrainer._prepare_dataset, sft_trainer.pack_dataset = timed_prepare, timed_pack


def _documents(dataset: Any) -> Iterator[tuple[Any, Any]]:
    for row in dataset.with_format("numpy").iter(batch_size=1):
        ids, labels = row["input_ids"][0], row["labels"][0]
        ends = np.cumsum(row["seq_lengths"][0])
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            yield ids[start:end], labels[start:end] != measure.IGNORED


if __name__ == "__main__":
    main()
