"""The trainers that can be audited: how each is configured, and where its environment lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from packcli.audit.crafted import MAX_LENGTH

Trainer = Literal["packcli", "trl", "llamafactory", "axolotl"]
TRAINERS: tuple[Trainer, ...] = ("packcli", "trl", "llamafactory", "axolotl")

LR = 1e-30
"""So small that no weight moves: every step's gradient is read at the same weights."""

# name of a row of the table, and the configuration behind it: what each trainer's documentation gives for chats,
# losses on answers only, packed and padded. The keys that every run sets are left out (`arguments`).
REFERENCES: dict[Trainer, dict[str, dict[str, Any]]] = {
    "packcli": {
        "best_fit": {"extends": "best_fit"},
        "padding": {"extends": "padding"},
    },
    "trl": {
        "packing bfd": {"packing": True, "packing_strategy": "bfd", "assistant_only_loss": True},
        "packing bfd_split": {"packing": True, "packing_strategy": "bfd_split", "assistant_only_loss": True},
        "packing wrapped": {"packing": True, "packing_strategy": "wrapped", "assistant_only_loss": True},
        "packing bfd, all tokens": {"packing": True, "packing_strategy": "bfd"},
        "padded": {"assistant_only_loss": True},
        "padding_free": {"padding_free": True, "max_length": None, "assistant_only_loss": True},
    },
    "llamafactory": {
        "neat_packing": {"packing": True, "neat_packing": True},
        "packing": {"packing": True},
        "padded": {},
        "neat_packing, train_on_prompt": {"packing": True, "neat_packing": True, "train_on_prompt": True},
    },
    "axolotl": {
        "sample_packing": {"sample_packing": True},
        "sample_packing, all tokens": {"sample_packing": True, "train_on_inputs": True},
        "padded": {"sample_packing": False},
    },
}

# Keys of a user's configuration that an audit sets itself, beside those of `arguments`: model, data, devices.
_OWN = (
    "model_name_or_path", "model_revision", "dtype", "torch_dtype", "dataset_name", "dataset_config",
    "datasets", "dataset", "dataset_dir", "dataset_test_split", "dataset_train_split", "template", "val_size",
    "eval_dataset", "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target", "lora_target_modules",
    "lora_rank", "finetuning_type", "quantization_bit", "load_in_4bit", "load_in_8bit", "deepspeed", "fsdp",
    "fsdp_config", "use_liger_kernel", "enable_liger_kernel", "push_to_hub", "hub_model_id", "run_name",
    "eval_strategy", "eval_steps", "max_samples", "plot_loss", "overwrite_output_dir", "output_dir", "tf32",
    "optim", "warmup_ratio", "warmup_steps", "max_steps", "lr_scheduler_type", "resume_from_checkpoint",
    "stage", "do_train", "do_eval", "dataset_num_proc", "preprocessing_num_workers", "dataloader_num_workers",
    "trust_remote_code", "ddp_timeout", "per_device_eval_batch_size", "load_best_model_at_end",
    "save_only_model", "attn_implementation", "flash_attn", "model_init_kwargs", "eos_token",
    "chat_template_path", "report_to", "logging_dir", "save_total_limit", "activation_offloading",
    "torch_compile", "cache_dir", "tokenized_path", "use_flash_attn", "base_model", "base_model_config",
    "model_type", "tokenizer_type", "tokenizer_config", "chat_template", "special_tokens", "tokens", "adapter",
    "lora_model_dir", "lora_target_linear", "dataset_prepared_path", "dataset_processes",
    "test_datasets", "wandb_project", "wandb_entity", "wandb_name", "wandb_watch", "wandb_log_model", "plugins",
    "flash_attention", "sdp_attention", "eager_attention", "xformers_attention", "flex_attention",
    "sage_attention", "evals_per_epoch", "saves_per_epoch", "loss_watchdog_threshold",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """One row of the table: a trainer and a configuration of it.

    replaced   keys of the user's configuration that the audit gives values of its own
    """

    trainer: Trainer
    name: str
    configuration: dict[str, Any]
    replaced: tuple[str, ...] = ()


def references(trainer: Trainer) -> list[Subject]:
    return [Subject(trainer, name, configuration) for name, configuration in REFERENCES[trainer].items()]


def own(trainer: Trainer, name: str, configuration: dict[str, Any]) -> Subject:
    """A user's configuration without what the audit replaces."""
    forced = {*_OWN, "ddp_backend", *_arguments(trainer, 1, 1)}
    # `max_length: null` is a choice (TRL: nothing is cut), a number is scaled to the crafted documents.
    kept = {key: value for key, value in configuration.items() if key not in forced or value is None}
    attention = {key: configuration[key] for key in _ON_CPU if configuration.get(key) in _ON_CPU[key]}
    return Subject(
        trainer, name, {**kept, **attention}, tuple(sorted(configuration.keys() - kept.keys() - attention.keys()))
    )


# Attention that a CPU can compute; any other is a kernel of a GPU, and is replaced by the trainer's default.
_ON_CPU: dict[str, tuple[str, ...]] = {
    "attn_implementation": ("sdpa", "eager"),
    "flash_attn": ("sdpa", "disabled", "auto"),
}


def jobs(subject: Subject) -> tuple[dict[str, Any], dict[str, Any]]:
    """(runs of one process, the run of two ranks): what `perform` is given."""
    shape = {"base": (2, 2), "wide": (4, 1), "narrow": (1, 4), "again": (2, 2)}
    runs = [_run(subject, name, *sizes) for name, sizes in shape.items()]
    if subject.trainer == "packcli":
        runs.append(_run(subject, "stopped", 2, 2, stop_after=2))
        runs.append({**_run(subject, "resumed", 2, 2), "resume": "stopped", "after": 2})
    else:
        # axolotl's packing leaves two steps of the crafted documents.
        after = 1 if subject.trainer == "axolotl" else 2
        resumed = {"resume": f"base/checkpoint-{after}", "after": after}
        runs.append({**_run(subject, "resumed", 2, 2), **resumed})
    gloo = {} if subject.trainer == "packcli" else {"ddp_backend": "gloo"}
    together = [_run(subject, "ranks", 2, 1, **gloo)]
    return {"configuration": subject.configuration, "runs": runs}, {
        "configuration": subject.configuration,
        "runs": together,
    }


def _run(subject: Subject, name: str, batch: int, accumulation: int, **more: Any) -> dict[str, Any]:
    arguments = {**_arguments(subject.trainer, batch, accumulation), **more}
    for key in ("max_length", "cutoff_len"):
        if subject.configuration.get(key, MAX_LENGTH) is None:
            arguments[key] = None
    return {"name": name, "resume": None, "arguments": arguments}


def _arguments(trainer: Trainer, batch: int, accumulation: int) -> dict[str, Any]:
    """What every run sets: batch, length, one epoch, a rate that moves nothing, checkpoints to resume from."""
    if trainer == "packcli":
        step: dict[str, Any] = {
            "epochs": 1,
            "lr": LR,
            "global_batch": 4,
            "micro_batch": batch,
        }
        return {**step, "weight_decay": 0.0, "clip": None, "threads": 1, "max_length": MAX_LENGTH}
    if trainer == "axolotl":
        return {
            "micro_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "num_epochs": 1,
            "sequence_len": MAX_LENGTH,
            "learning_rate": LR,
            "lr_scheduler": "constant",
            "optimizer": "adamw_torch",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 100,
            "val_set_size": 0,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "gradient_checkpointing": False,
            "attn_implementation": "sdpa",
        }
    return {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "learning_rate": LR,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,  # a clipped gradient would hide what a step divides by
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length" if trainer == "trl" else "cutoff_len": MAX_LENGTH,
    }
