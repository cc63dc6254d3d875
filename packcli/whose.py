"""Whose a trainer's configuration file is, told by its keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from packcli.errors import ConfigError

Trainer = Literal["trl", "axolotl", "llamafactory"]

PRODUCTS: dict[Trainer, str] = {"trl": "TRL", "axolotl": "axolotl", "llamafactory": "LLaMA-Factory"}
# Keys that one of the three has and the others do not.
_TELLS: dict[Trainer, frozenset[str]] = {
    "trl": frozenset(
        {"dataset_name", "dataset_config", "dataset_mixture", "dataset_train_split", "dataset_test_split",
         "use_peft", "packing_strategy", "max_length", "max_seq_length", "assistant_only_loss",
         "completion_only_loss", "dataset_text_field", "eval_packing", "padding_free", "torch_dtype",
         "chat_template_path"}
    ),
    "axolotl": frozenset(
        {"base_model", "datasets", "sequence_len", "sample_packing", "micro_batch_size", "num_epochs", "adapter",
         "lr_scheduler", "optimizer", "val_set_size", "dataset_prepared_path", "train_on_inputs"}
    ),
    "llamafactory": frozenset(
        {"stage", "finetuning_type", "cutoff_len", "template", "dataset", "dataset_dir", "neat_packing",
         "lora_rank", "lora_target", "val_size", "max_samples", "preprocessing_num_workers", "mask_history"}
    ),
}  # fmt: skip
_CLEARLY = 2  # tells more than those of the trainer that was named: one may be a key of the user's own script


def recognised(keys: Iterable[str], where: str) -> Trainer:
    """The trainer with most tells among `keys` (of the first level).

    Raises:
        ConfigError: there is none, or two have as many.
    """
    counts = _counts(keys)
    most = max(counts.values())
    best = [trainer for trainer, count in counts.items() if count == most]
    if len(best) == 1:
        return best[0]
    cause = "its keys are those of none" if not most else f"its keys fit {' and '.join(best)}"
    raise ConfigError(f"{where}: whose file is it? {cause}", f"say so: --from {'|'.join(_TELLS)}")


def confirm(named: Trainer, keys: Iterable[str], where: str, option: str) -> None:
    """`option`: how the trainer was named, `--from {}` or `--{}`.

    Raises:
        ConfigError: the file is clearly another trainer's.
    """
    found = frozenset(keys)
    counts = _counts(found)
    other = max(counts, key=lambda trainer: counts[trainer])
    if counts[other] < counts[named] + _CLEARLY:
        return
    seen = ", ".join(f"`{key}`" for key in sorted(found & _TELLS[other])[:4])
    raise ConfigError(
        f"{where} is a file of {PRODUCTS[other]}, not of {PRODUCTS[named]}: it has {seen}",
        f"name it by {option.format(other)}",
    )


def _counts(keys: Iterable[str]) -> dict[Trainer, int]:
    found = frozenset(keys)
    return {trainer: len(found & tells) for trainer, tells in _TELLS.items()}
