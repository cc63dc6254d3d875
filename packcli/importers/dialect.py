"""What the three trainers have in common: most of their keys are arguments of transformers' Trainer.

Defaults and meanings were read in the published packages that `Dialect.title` names; other versions may differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packcli.errors import ConfigError
from packcli.importers.draft import Assumed, Draft

_RUNS = "how it runs, not what it computes"
_LOGS = "logging: packcli writes every step to metrics.jsonl; --set train.trackers=[wandb] for more"
_SAVES = "checkpoints for resuming: packcli's are `train.save_every`"
_EVALUATES = "evaluation while training: packcli measures validation loss at the end"
_SHARDS = "packcli shards by itself (`train.sharding`)"
_KERNEL = "which kernel: packcli has `train.attention_backend` and `train.head`"

NO_EFFECT: Mapping[str, tuple[str, ...]] = {
    "where it writes: packcli has its run directory (--runs)": (
        "output_dir", "overwrite_output_dir", "run_name", "logging_dir", "cache_dir", "overwrite_cache",
    ),
    _LOGS: (
        "report_to", "logging_steps", "logging_strategy", "logging_first_step", "log_level", "log_level_replica",
        "log_on_each_node", "disable_tqdm", "plot_loss", "logging_nan_inf_filter", "project", "trackio_space_id",
        "include_num_input_tokens_seen", "include_tokens_per_second", "include_tkps", "profiler_steps",
    ),
    _SAVES: (
        "save_steps", "save_strategy", "save_total_limit", "save_only_model", "save_safetensors",
        "saves_per_epoch", "save_first_step", "resume_from_checkpoint", "auto_resume_from_checkpoints",
        "save_on_each_node", "ignore_data_skip",
    ),
    _EVALUATES: (
        "do_eval", "eval_strategy", "evaluation_strategy", "eval_steps", "evals_per_epoch", "eval_on_start",
        "per_device_eval_batch_size", "eval_batch_size", "eval_delay", "eval_accumulation_steps", "bf16_full_eval",
        "prediction_loss_only", "eval_table_size", "eval_max_new_tokens", "eval_sample_packing", "eval_packing",
        "do_predict", "predict_with_generate", "eval_sequence_len", "compute_accuracy", "eval_causal_lm_metrics",
        "do_causal_lm_eval",
    ),
    "the hub: packcli uploads nothing": (
        "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push",
        "hub_revision", "push_dataset_to_hub", "hf_use_auth_token", "hf_hub_token",
    ),
    _SHARDS: (
        "deepspeed", "fsdp", "fsdp_config", "fsdp_version", "ddp", "ddp_timeout", "ddp_backend",
        "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "accelerator_config",
        "fsdp_final_state_dict_type", "dp_shard_size", "dp_replicate_size", "local_rank", "device_map",
        "parallelism_config",
    ),
    _KERNEL: (
        "attn_implementation", "flash_attn", "flash_attention", "sdp_attention", "xformers_attention",
        "flex_attention", "eager_attention", "use_liger_kernel", "enable_liger_kernel", "liger_kernel_config",
        "flash_attn_cross_entropy", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "use_unsloth",
        "use_unsloth_gc",
    ),
    _RUNS: (
        "do_train", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_cpu",
        "gradient_checkpointing_kwargs", "dataloader_num_workers", "dataloader_pin_memory", "low_cpu_mem_usage",
        "dataloader_prefetch_factor", "dataloader_persistent_workers", "use_cache", "activation_offloading",
        "torch_empty_cache_steps", "gc_steps", "use_reentrant_gc", "use_fast_tokenizer", "env", "debug",
        "remove_unused_columns", "average_tokens_across_devices", "use_ray", "ray_num_workers", "ray_run_name",
        "pad_to_multiple_of",
    ),
    "packcli trains SFT models only, and needs no model class": ("model_type", "tokenizer_type", "task_type"),
}  # fmt: skip

NOT_CARRIED: Mapping[str, tuple[str, str]] = {
    "neftune_noise_alpha": ("packcli adds no noise to embeddings", "compare without it"),
    "label_smoothing_factor": ("packcli's loss has no smoothing", "compare without it"),
    "lr_scheduler_kwargs": ("packcli's schedules have no options", "compare without them"),
    "optim_args": ("packcli's AdamW has no further options", "compare without them"),
    "data_seed": ("packcli orders rows by its own seed", "several seeds say more than one order"),
    "group_by_length": ("packcli has it as `order: sorted` of an arm", "write an arm with `extends: sorted`"),
    "load_in_8bit": ("packcli does not quantise weights: they are held in float32", "expect more memory"),
    "load_in_4bit": ("packcli does not quantise weights: they are held in float32", "expect more memory"),
    "quantization_bit": ("packcli does not quantise weights: they are held in float32", "expect more memory"),
    "trust_remote_code": ("packcli runs no code of a hub", "use a model that transformers itself knows"),
    "use_dora": ("packcli's LoRA is the plain one", "compare with plain LoRA"),
    "use_rslora": ("packcli's LoRA is the plain one", "lora.alpha = alpha x sqrt(rank) gives the same scale"),
    "early_stopping_patience": ("packcli trains to the end of its budget", "set `train.epochs` or `train.steps`"),
    "load_best_model_at_end": ("packcli's result is its last step", "set `train.epochs` or `train.steps`"),
    "fp8": ("packcli computes in bfloat16 or float32", "compare in bfloat16"),
    "rope_scaling": ("packcli takes the model's own config", "save a model directory with it, name that"),
    "auto_find_batch_size": ("packcli runs the batch that is written", "set `train.micro_batch`"),
    "full_determinism": ("packcli has it as `train.deterministic`", "--set train.deterministic=true on a GPU"),
    "dataloader_drop_last": ("packcli keeps the last, partial step", "expect one more step"),
    "include_for_metrics": ("packcli computes no metrics while training", "use `eval.tasks`"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One trainer's names for what all have. `defaults`: of keys that a file may leave out.

    batch  a key for a step's rows of one process; only axolotl has it.
    """

    title: str
    per_device: str = "per_device_train_batch_size"
    batch: str = ""
    epochs: str = "num_train_epochs"
    schedule: str = "lr_scheduler_type"
    optimizer: str = "optim"
    defaults: Mapping[str, Any]


def training(draft: Draft, of: Dialect, processes: int | None) -> None:
    """All of `train` but LoRA, and `model.dtype`."""
    _duration(draft, of)
    _rate(draft, of)
    _warmup(draft, of)
    _batch(draft, of, processes)
    _optimizer(draft, of)
    _precision(draft, of)
    _seeds(draft, of)
    if draft.source.get("gradient_checkpointing") not in (None, False):
        draft.carry("gradient_checkpointing", "train.checkpointing", "full")
    else:
        draft.ignore("gradient_checkpointing", "it is off")


def own(
    draft: Draft, no_effect: Mapping[str, tuple[str, ...]], not_carried: Mapping[str, tuple[str, str]]
) -> None:
    """A trainer's own keys: those of no effect, by why; those that are not carried, with why and what to do."""
    for why, keys in no_effect.items():
        for key in keys:
            draft.ignore(key, why)
    for key, (why, do) in not_carried.items():
        draft.drop(key, why, do)


def remaining(draft: Draft) -> None:
    """What no part of an importer has dealt with, as far as it is known."""
    for why, keys in NO_EFFECT.items():
        for key in keys:
            draft.source.mark(key, "no_effect", why=why, once=False)
    for key, (why, do) in NOT_CARRIED.items():
        if draft.source.off(key):
            draft.source.mark(key, "no_effect", why="it is off", once=False)
        else:
            draft.source.mark(key, "not_carried", why=why, do=do, once=False)


def value(draft: Draft, of: Dialect, key: str, to: str) -> Any:
    """Carry a key; where it is not in the file, the trainer's own default, which is put down as assumed."""
    found = draft.source.get(key)
    if found is None:
        found = of.defaults[key]
        draft.source.mark(key, "no_effect", why=f"it has no value: {of.title} takes {found}")
        draft.assume(to, found, f"{of.title} takes {found} for `{key}`")
    else:
        draft.carry(key, to, found)
    return found


def number(draft: Draft, key: str, default: float) -> float:
    """A number of the file.

    Raises:
        ConfigError: it is something else.
    """
    found = draft.source.get(key, default)
    try:
        given = float(found)
    except (TypeError, ValueError):
        given = math.nan
    if not math.isfinite(given):
        where = f"{draft.source.path}:{draft.source.at(key).rpartition(':')[2]}"
        raise ConfigError(f"{where}: `{key}` is no number: `{found}`", "correct it, then import again")
    return given


def names(draft: Draft, key: str) -> list[str]:
    """A list of names, written as one or with commas.

    Raises:
        ConfigError: it is something else.
    """
    found = draft.source.get(key, [])
    if isinstance(found, str):
        return [name.strip() for name in found.split(",")]
    if not isinstance(found, list):
        raise ConfigError(f"{draft.source.at(key)}: `{key}` is no list of names: `{found}`", "correct it there")
    return [str(name) for name in found]


def _duration(draft: Draft, of: Dialect) -> None:
    steps = int(number(draft, "max_steps", -1))
    if steps > 0:
        draft.carry("max_steps", "train.steps", steps)
        draft.ignore(of.epochs, "`max_steps` is given, and decides")
        return
    draft.ignore("max_steps", f"it decides nothing: `{of.epochs}` does")
    epochs = number(draft, of.epochs, of.defaults[of.epochs])
    whole = max(1, math.ceil(epochs))
    if draft.source.get(of.epochs) is None:
        value(draft, of, of.epochs, "train.epochs")
    elif whole == epochs:
        draft.carry(of.epochs, "train.epochs", whole)
    else:
        do = "for a part of an epoch set `train.steps` instead (--dry-run prints the steps)"
        draft.change(of.epochs, "train.epochs", whole, "packcli counts whole epochs", do)
    draft.values["train.epochs"] = whole


def _rate(draft: Draft, of: Dialect) -> None:
    value(draft, of, "learning_rate", "train.lr")
    draft.values["train.lr"] = number(draft, "learning_rate", of.defaults["learning_rate"])
    name = str(draft.source.get(of.schedule, of.defaults[of.schedule]))
    known = {"constant_with_warmup": "constant"}.get(name, name)
    if draft.source.get(of.schedule) is None:
        value(draft, of, of.schedule, "train.schedule")
    elif known in ("cosine", "linear", "constant"):
        draft.carry(of.schedule, "train.schedule", known)
    else:
        why = f"packcli has cosine, linear and constant, not {name}"
        draft.change(of.schedule, "train.schedule", "cosine", why, "compare at cosine, or choose another")


def _warmup(draft: Draft, of: Dialect) -> None:
    steps, ratio = number(draft, "warmup_steps", 0), number(draft, "warmup_ratio", 0)
    if draft.source.get(of.schedule, of.defaults[of.schedule]) == "constant":
        for key in ("warmup_steps", "warmup_ratio"):
            draft.ignore(key, "transformers' `constant` schedule has no warm-up")
    elif steps >= 1:
        draft.carry("warmup_steps", "train.warmup_steps", int(steps))
        draft.ignore("warmup_ratio", "`warmup_steps` is given, and decides")
    elif steps > 0:  # transformers 5: below 1 it is a share
        draft.carry("warmup_steps", "train.warmup_ratio", steps)
        draft.ignore("warmup_ratio", "`warmup_steps` is given, and decides")
    elif "warmup_ratio" in of.defaults and draft.source.get("warmup_steps") is not None:  # axolotl: 0 is none
        draft.carry("warmup_steps", "train.warmup_steps", int(steps))
        draft.ignore("warmup_ratio", "`warmup_steps` is given, and decides")
    elif draft.source.get("warmup_ratio") is not None:
        draft.carry("warmup_ratio", "train.warmup_ratio", ratio)
        draft.ignore("warmup_steps", "it is off")
    elif default := of.defaults.get("warmup_ratio"):
        draft.assume(
            "train.warmup_ratio", default, f"{of.title} warms up over {default} of the steps, at most 100"
        )
        draft.ignore("warmup_steps", "it is off")
    else:
        draft.ignore("warmup_steps", "it is off")


def _batch(draft: Draft, of: Dialect, processes: int | None) -> None:
    each = int(number(draft, of.per_device, of.defaults[of.per_device]))
    if each < 1:
        raise ConfigError(f"{draft.source.path}: `{of.per_device}` is {each}", "correct it, then import again")
    accumulation = _accumulation(draft, of, each)
    world = processes or 1
    batch = each * accumulation * world
    product = f"{each} a process x {accumulation} accumulated x {world} process{'es' if world > 1 else ''}"
    why = f"a step's rows: {product}"
    draft.values["train.global_batch"] = batch
    draft.origins["train.global_batch"] = why
    draft.values["train.batch_unit"] = "rows"
    draft.origins["train.batch_unit"] = "trainers count rows, whatever a row holds"
    if draft.source.get(of.per_device) is not None:
        draft.change(of.per_device, "train.micro_batch", each, f"rows of a forward pass; in `global_batch`: {why}")
    else:
        value(draft, of, of.per_device, "train.micro_batch")
    draft.source.mark("gradient_accumulation_steps", "changed", to=("train.global_batch",), why=why)
    if processes is None:
        said = "how many processes train is not in the file: taken as 1; --processes N says otherwise"
        draft.assume("train.ranks", 1, said)
    else:
        draft.assume("train.ranks", world, "--processes")


def _accumulation(draft: Draft, of: Dialect, each: int) -> int:
    """Forward passes of a step. axolotl's schema fills in 1 before it looks at `batch_size`, unless an empty key
    stands there."""
    source, key = draft.source, "gradient_accumulation_steps"
    if of.batch and key in source.keys and source.get(key) is None:
        why = f"`{key}` is empty, so this divided by `{of.per_device}` takes its place"
        source.mark(of.batch, "changed", to=("train.global_batch",), why=why)
        return max(1, int(number(draft, of.batch, each)) // each)
    if of.batch:
        draft.ignore(of.batch, f"{of.title} goes by `{key}`, which is 1 where it is left out")
    return int(number(draft, key, 1))


def _optimizer(draft: Draft, of: Dialect) -> None:
    source = draft.source
    name = str(source.get(of.optimizer, "adamw_torch"))
    quantised = any(part in name for part in ("8bit", "4bit", "fp8", "paged"))
    if source.get(of.optimizer) is None:
        draft.ignore(of.optimizer, f"it has no value: AdamW, in {of.title} and in packcli")
    elif "adamw" in name and quantised:
        why, do = "AdamW with moments in float32", "`train.optimizer_state: bfloat16` takes half the memory"
        source.mark(of.optimizer, "changed", to=("train.optimizer_state",), why=why, do=do)
    elif name in ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"):
        draft.ignore(of.optimizer, "AdamW is what packcli trains with")
    else:
        draft.drop(of.optimizer, "packcli trains with AdamW only", "look for a learning rate that fits AdamW")
    if source.get("weight_decay") is not None:
        draft.carry("weight_decay", "train.weight_decay", number(draft, "weight_decay", 0.0))
    if source.get("adam_beta1") is not None or source.get("adam_beta2") is not None:
        betas = [number(draft, "adam_beta1", 0.9), number(draft, "adam_beta2", 0.999)]
        key = "adam_beta1" if source.get("adam_beta1") is not None else "adam_beta2"
        draft.carry(key, "train.betas", betas)
        if key == "adam_beta1":
            source.mark("adam_beta2", "carried", to=("train.betas",))
    if number(draft, "adam_epsilon", 1e-8) == 1e-8:
        draft.ignore("adam_epsilon", "1e-8 is packcli's too")
    else:
        draft.drop("adam_epsilon", "packcli's AdamW has 1e-8", "compare with 1e-8")
    if source.get("max_grad_norm") is not None:
        limit = number(draft, "max_grad_norm", 1.0)
        draft.carry("max_grad_norm", "train.clip", limit or None)


def _precision(draft: Draft, of: Dialect) -> None:
    source = draft.source
    on = [key for key in ("bf16", "pure_bf16", "bfloat16") if source.get(key) not in (None, False)]
    half = [key for key in ("fp16", "float16") if source.get(key) not in (None, False)]
    if on and on[0] == "bf16":
        draft.carry("bf16", "model.dtype", "bfloat16")
    elif on:
        draft.change(on[0], "model.dtype", "bfloat16", "computed in bfloat16; weights are kept in float32")
    elif half:
        draft.change(
            half[0], "model.dtype", "bfloat16", "packcli has no float16", "bfloat16 needs no loss scaling"
        )
    elif source.get("bf16") is None and of.defaults["bf16"]:
        draft.assume("model.dtype", "bfloat16", f"{of.title} computes in bfloat16 where it can")
    else:
        draft.assume("model.dtype", "float32", "no half precision is asked for")
    for key in ("bf16", "pure_bf16", "bfloat16", "fp16", "float16"):
        source.mark(key, "no_effect", why="it is off, or another key decides", once=False)


def _seeds(draft: Draft, of: Dialect) -> None:
    first = int(number(draft, "seed", of.defaults["seed"]))
    more = f"three seeds, so that differences get an interval; --only seed={first} for one"
    draft.matrix["seed"] = [first, first + 1, first + 2]
    draft.origins["seed"] = more
    draft.assumed.append(Assumed("matrix.seed", draft.matrix["seed"], more))
    draft.source.mark("seed", "changed", to=("matrix.seed",), why=f"the first of {more}")


def lora(
    draft: Draft, *, rank: str, targets: str | tuple[str, ...], alpha: float | None, dropout: float, default: int
) -> None:
    """`train.lora`; `rank`: the trainer's key. `alpha`: its default, None: twice the rank."""
    value_of = draft.source.get
    size = int(number(draft, rank, default))
    scale = number(draft, "lora_alpha", alpha if alpha is not None else 2 * size)
    for key, to, chosen in (
        (rank, "train.lora.rank", size),
        ("lora_alpha", "train.lora.alpha", scale),
        ("lora_dropout", "train.lora.dropout", number(draft, "lora_dropout", dropout)),
    ):
        if value_of(key) is None:
            draft.ignore(key, "it has no value")
            draft.assume(to, chosen, "the trainer's default")
        else:
            draft.carry(key, to, chosen)
    draft.values["train.lora.targets"] = targets if isinstance(targets, str) else list(targets)


def share(draft: Draft, key: str) -> None:
    """A validation share; a count of documents cannot be one."""
    held = number(draft, key, 0.0)
    if 0 < held < 1:
        draft.carry(key, "data.validation", held)
        return
    if held:
        do = "set `data.validation` to their share"
        draft.drop(key, "a count of examples: packcli holds out a share, decided by content", do)
    else:
        draft.ignore(key, "nothing is held out")
    propose_validation(draft)


def propose_validation(draft: Draft) -> None:
    """Held-out documents, without which arms could be compared by their training loss only."""
    draft.assume("data.validation", 0.05, "held out so that arms can be compared; --set data.validation=0: none")
