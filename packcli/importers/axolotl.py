"""axolotl's YAML, as axolotl 0.19.0 reads it.

What each key means was read in the published package: axolotl/utils/schemas/, core/builders/,
core/trainers/base.py, utils/samplers/multipack.py, utils/data/utils.py.
"""

from __future__ import annotations

from typing import Any

from packcli.errors import ConfigError
from packcli.importers import data, dialect
from packcli.importers.data import HubKey
from packcli.importers.dialect import Dialect
from packcli.importers.draft import Draft

DIALECT = Dialect(
    title="axolotl 0.19.0",
    per_device="micro_batch_size",
    epochs="num_epochs",
    schedule="lr_scheduler",
    optimizer="optimizer",
    batch="batch_size",
    defaults={
        "learning_rate": 2e-4, "lr_scheduler": "cosine", "num_epochs": 1.0, "bf16": True, "seed": 42,
        "micro_batch_size": 1, "warmup_ratio": 0.03, "sequence_len": 512,
    },
)  # fmt: skip
_OTHER_TRAINERS = ("rl", "pretraining_dataset", "reward_model", "process_reward_model")
_NO_CHATS = ("completion", "input_output", "pretrain")
_TEMPLATE = "template.jinja"
_PATHS = "where axolotl keeps prepared data: packcli has its run directory (--runs)"
_TRACKS = "logging: --set train.trackers=[wandb] sends packcli's metrics there"
_NO_EFFECT = {
    _PATHS: ("dataset_prepared_path", "dataset_processes", "dataset_num_proc", "dataset_keep_in_memory",
             "num_dataset_shards_to_save"),
    _TRACKS: ("wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model", "wandb_mode",
              "wandb_run_id", "use_wandb", "use_tensorboard", "use_mlflow", "mlflow_tracking_uri",
              "mlflow_experiment_name", "mlflow_run_name", "use_comet", "comet_api_key", "comet_project_name"),
    "it stops a run that diverges; packcli stops at a loss that is not finite": (
        "loss_watchdog_threshold", "loss_watchdog_patience"),
    "how axolotl checks the file": ("strict",),
    "how axolotl looks for rows; packcli's row index is made before": (
        "sample_packing_mp_start_method", "sample_packing_eff_est", "total_num_tokens",
        "sample_packing_group_size"),
}  # fmt: skip
_MODEL, _SAVE_MODEL = "packcli takes the model's own config", "save a model directory with it, name that"
_NOT_CARRIED = {
    "plugins": ("packcli has no plugins", "see what each does"),
    "tokens": ("packcli adds no tokens to a tokenizer", "save a tokenizer that has them, name it"),
    "eot_tokens": ("packcli takes what ends a turn from the template", "look at `packcli prepare --show 3`"),
    "default_system_message": ("packcli adds no system message", "put it into the data or the template"),
    "cosine_min_lr_ratio": ("packcli's cosine ends at 0", "compare so"),
    "lora_model_dir": ("packcli's LoRA starts anew", "merge the adapter first, name the merged model"),
    "lora_fan_in_fan_out": ("packcli's LoRA is of linear layers", "nothing, for Llama and its like"),
    "lora_modules_to_save": ("packcli trains adapters only", "leave them out, or train every weight"),
    "unfrozen_parameters": ("packcli trains all weights, or LoRA", "compare so"),
    "dataset_exact_deduplication": ("packcli drops no duplicates", "drop them before"),
    "test_datasets": ("packcli holds out a share of the training data", "set `data.validation`"),
    "sample_packing_bin_size": ("packcli packs any number of documents into a row", "compare so"),
    "sequence_parallel_degree": ("packcli keeps a row on one device", "lower `data.max_length`"),
    "context_parallel_size": ("packcli keeps a row on one device", "lower `data.max_length`"),
    "noisy_embedding_alpha": ("packcli adds no noise to embeddings", "compare without it"),
    "model_config": (_MODEL, _SAVE_MODEL),
    "overrides_of_model_config": (_MODEL, _SAVE_MODEL),
    "model_kwargs": (_MODEL, _SAVE_MODEL),
    "overrides_of_model_kwargs": (_MODEL, _SAVE_MODEL),
    "min_sample_len": ("packcli keeps short documents", "drop them before"),
    "relora": ("packcli's LoRA is the plain one", "compare with plain LoRA"),
}


def fill(draft: Draft, processes: int | None) -> None:
    """The sweep of an SFT configuration.

    Raises:
        ConfigError: it is no supervised fine-tuning, or names no model or data.
    """
    source = draft.source
    for key in _OTHER_TRAINERS:
        if source.get(key):
            said = f"{source.at(key)}: `{key}: {source.get(key)}` is no supervised fine-tuning on chats"
            raise ConfigError(said, "packcli compares supervised fine-tuning")
    if source.get("base_model") is None:
        raise ConfigError(f"{source.path}: no `base_model`", "name the model there")
    draft.carry("base_model", "model.name", source.get("base_model"))
    for key in ("model_revision", "revision_of_model"):  # its schema has both names
        if source.get(key) is not None:
            draft.carry(key, "model.revision", str(source.get(key)))
    _data(draft)
    dialect.training(draft, DIALECT, processes)
    _adapters(draft)
    _arm(draft)
    dialect.own(draft, _NO_EFFECT, _NOT_CARRIED)


def _data(draft: Draft) -> None:
    source = draft.source
    found = source.get("datasets")
    if found is None:
        raise ConfigError(f"{source.path}: no `datasets`", "packcli needs to know the data: put it in")
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ConfigError(f"{source.path}: `datasets` is no list of blocks", "see axolotl's docs/dataset_loading")
    roles: list[Any] = []
    blocks = [_block(draft, f"datasets.{number}", roles) for number in range(len(found))]
    draft.values["data.source"] = [one for several in blocks for one in several]
    draft.origins["data.source"] = f"{source.at('datasets')} datasets"
    dialect.value(draft, DIALECT, "sequence_len", "data.max_length")
    dialect.share(draft, "val_set_size")
    if source.get("train_on_inputs"):
        draft.carry("train_on_inputs", "data.train_on", "all")
    else:
        draft.ignore("train_on_inputs", "it is off: answers alone are trained on, which is packcli's default")
        draft.assume("data.train_on", "assistant", "axolotl trains on answers unless `train_on_inputs`")
    if any(role not in ("assistant", "gpt") for role in roles):
        draft.differences.append("roles_to_train: packcli trains on the assistant's turns, or on every token")
    _template(draft)
    for key in ("shuffle_merged_datasets", "shuffle_before_merging_datasets"):
        draft.ignore(key, "packcli shuffles by its own seed")
    draft.drop("curriculum_sampling", "packcli shuffles rows", "compare so")
    for name in source.words("special_tokens"):
        if name == "pad_token":
            draft.ignore("special_tokens.pad_token", "no label or mask depends on it")
        else:
            do = "save a tokenizer that has them, name it"
            draft.drop(f"special_tokens.{name}", "packcli adds no special tokens", do)


def _block(draft: Draft, first: str, roles: list[Any]) -> list[dict[str, Any] | str]:
    """The data set under a key, as sources of packcli: one, or as many as it names files."""
    found = draft.source.words(first)
    if not found.get("path"):
        raise ConfigError(f"{draft.source.at(first)}: a data set without `path`", "put in where the data are")
    block: dict[str, Any] = {}
    mapping: dict[str, str] = {}
    files = data.paths(draft, f"{first}.path", found["path"], f"{first}.data_files")
    for key, value in found.items():
        place = f"{first}.{key}"
        of_hub: dict[str, HubKey] = {"name": "subset", "split": "split", "revision": "revision"}
        if key == "path":
            draft.source.mark(place, "carried", to=("data.source",))
        elif key == "data_files" and draft.source.dealt_with(place):
            continue
        elif key in of_hub and value is not None:
            block |= data.of_hub(draft, place, of_hub[key], value, files[0])
        elif key == "field_messages":
            if value not in ("messages", "conversations"):
                mapping["messages"] = value
            draft.source.mark(place, "carried", to=("data.source",))
        elif key == "type":
            _type(draft, place, value, mapping)
        elif key in ("roles_to_train", "train_on_eos", "roles"):
            _trained_on(draft, place, key, value, roles)
        elif key.startswith(("message_field_", "message_property_mappings")) and _usual(value):
            draft.ignore(place, "packcli takes `role`/`from` and `content`/`value` by itself")
        elif key in ("ds_type", "preprocess_shards"):
            draft.ignore(place, "how axolotl reads a file; packcli sees by itself what it is")
        elif key in ("shards", "shards_idx"):
            _shards(draft, place, found)
        else:
            do = "name the files by `source`, or fields by `mapping` (docs/data.md)"
            draft.drop(place, "packcli has no such key for a source", do)
    if mapping:
        block["mapping"] = mapping
    return [{"source": file, **block} if block else file for file in files]


def _shards(draft: Draft, place: str, found: dict[str, Any]) -> None:
    if found.get("shards"):
        why = "axolotl trains on one of so many parts of a data set, packcli on all of it"
        draft.source.mark(place, "not_carried", why=why, do="write the part into a file of its own, and name that")
    else:
        draft.ignore(place, "`shards` is off")


def _usual(value: Any) -> bool:
    known = ("role", "from", "content", "value")
    return all(one in known for one in value.values()) if isinstance(value, dict) else value in known


def _type(draft: Draft, place: str, value: Any, mapping: dict[str, str]) -> None:
    if isinstance(value, dict):
        fields = {"field_instruction": "instruction", "field_input": "input", "field_output": "output",
                  "field_system": "system"}  # fmt: skip
        mapping.update({fields[key]: str(name) for key, name in value.items() if key in fields})
        why = "fields are mapped; packcli writes them as turns of the chat template, not by `format`"
        draft.source.mark(place, "changed", to=("data.source",), why=why)
    elif value == "chat_template":
        draft.ignore(place, "chats, rendered by a chat template, are what packcli reads")
    elif value in _NO_CHATS:
        raise ConfigError(
            f"{draft.source.at(place)}: `type: {value}` is plain text, and packcli trains on chats",
            "make each text the answer of a chat, with `data.template: plain` (docs/data.md)",
        )
    elif str(value).startswith(("alpaca", "sharegpt", "chatml")):
        why = f"packcli writes it as turns of the chat template; axolotl has a text of its own for `{value}`"
        draft.source.mark(place, "changed", to=("data.source",), why=why)
    else:
        do = "packcli reads chats; see docs/data.md for their fields"
        draft.drop(place, f"packcli has no `{value}` prompts", do)


def _trained_on(draft: Draft, place: str, key: str, value: Any, roles: list[Any]) -> None:
    if key == "roles_to_train":
        listed = value if isinstance(value, list) else [value]
        roles += listed
        if all(role in ("assistant", "gpt") for role in listed):
            draft.source.mark(place, "carried", to=("data.train_on",))
        else:
            draft.drop(place, "packcli trains on the assistant's turns, or on every token", "set `data.train_on`")
    elif key == "train_on_eos":
        if value in (None, "turn"):
            draft.ignore(place, "the token that ends an assistant turn is trained on in packcli, too")
        else:
            do = "look at `packcli prepare --show 3`"
            draft.drop(place, "packcli trains on the token that ends each assistant turn, no more and no less", do)
    else:
        draft.ignore(place, "packcli knows the usual names of the roles")


def _template(draft: Draft) -> None:
    source = draft.source
    name, text = source.get("chat_template"), source.get("chat_template_jinja")
    if text is not None:
        if str(text).endswith((".jinja", ".jinja2", ".j2")):
            draft.carry("chat_template_jinja", "data.template", text)
        else:
            draft.files[_TEMPLATE] = str(text)
            draft.change("chat_template_jinja", "data.template", _TEMPLATE, "in a file of its own")
        draft.ignore("chat_template", "`chat_template_jinja` decides")
    elif name in ("chatml", "llama3"):
        why = f"packcli's own `{name}`, not axolotl's file of that name"
        draft.change("chat_template", "data.template", name, why, "look at `packcli prepare --show 3`")
    elif name in (None, "tokenizer_default"):
        draft.ignore("chat_template", "the tokenizer's own, as in packcli")
    else:
        do = "name its Jinja file in `data.template`"
        draft.drop("chat_template", "packcli takes the tokenizer's own template", do)


def _adapters(draft: Draft) -> None:
    source, adapter = draft.source, draft.source.get("adapter")
    keys = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear")
    if adapter is None:
        for key in ("adapter", *keys):
            draft.ignore(key, "no `adapter`: every weight is trained")
        return
    found = source.get("lora_target_modules")
    all_linear = bool(source.get("lora_target_linear")) or found in (None, "all-linear")
    targets: str | tuple[str, ...] = (
        "all-linear" if all_linear else tuple(dialect.names(draft, "lora_target_modules"))
    )
    dialect.lora(draft, rank="lora_r", targets=targets, alpha=16, dropout=0.0, default=8)
    draft.origins["train.lora.targets"] = "lora_target_linear, lora_target_modules"
    for key in ("lora_target_modules", "lora_target_linear"):
        if source.get(key):
            source.mark(key, "carried", to=("train.lora.targets",))
        else:
            draft.ignore(key, "it is off")
    if adapter == "lora":
        source.mark("adapter", "carried", to=("train.lora",))
    else:
        why = f"`{adapter}` as LoRA: packcli does not quantise weights"
        source.mark("adapter", "changed", to=("train.lora",), why=why, do="expect more memory")


def _arm(draft: Draft) -> None:
    source = draft.source
    overlong = str(source.get("excess_length_strategy", "drop"))
    policy = "truncate" if overlong == "truncate" else "drop"
    packed = bool(source.get("sample_packing"))
    name = "axolotl_multipack" if packed else "axolotl_padding"
    fields: dict[str, Any] = {"overlong": policy, "loss": "micro_batch"}
    if not packed:
        to = "max_length" if source.get("pad_to_sequence_len") else "longest"
        draft.arms[name] = {"extends": "padding", "pad_to": to, **fields}
        draft.pads(name)
        source.mark("sample_packing", "carried", to=(f"arms.{name}",))
        draft.ignore("sample_packing_sequentially", "`sample_packing` is off")
    else:
        anew = {"repack_each_epoch": True} if "train.epochs" in draft.values else {}
        draft.arms[name] = {"extends": "best_fit", "packer": "shuffled_first_fit", **anew, **fields}
        draft.packs(name)
        why = (
            "first fit in shuffled order, anew each epoch, as axolotl's multipack; axolotl fills one row of "
            "micro_batch_size x sequence_len, packcli micro_batch_size rows of sequence_len: as many tokens a step"
        )
        source.mark("sample_packing", "changed", to=(f"arms.{name}",), why=why)
        draft.differences.append(f"{name}: {why}")
        do = "write an arm with the packer you want"
        draft.drop("sample_packing_sequentially", "packcli packs in shuffled order", do)
    source.mark("pad_to_sequence_len", "carried", to=(f"arms.{name}",))
    source.mark("excess_length_strategy", "carried", to=(f"arms.{name}.overlong",))
    draft.ignore("multipack_real_batches", "how axolotl lays a batch out")
    draft.ignore("batch_flattening", "padding is left out of computing; the result is the same")
    draft.differences += [
        "loss: axolotl divides each micro-batch's loss by the supervised tokens of that micro-batch, so "
        f"`{name}` has `loss: micro_batch`; packcli's own arms divide by those of the whole step",
        f"documents that are too long: axolotl {'truncates' if policy == 'truncate' else 'drops'} them, and so "
        f"does `{name}`; packcli's own arms truncate them (the ledger counts both)",
    ]
