"""LLaMA-Factory's YAML (`llamafactory-cli train FILE`), as LLaMA-Factory 0.9.5 reads it.

What each key means was read in the published package: llamafactory/hparams/, data/parser.py,
data/processor/supervised.py, data/collator.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packcli.errors import ConfigError
from packcli.files import read_json
from packcli.importers import data, dialect
from packcli.importers.data import HubKey
from packcli.importers.dialect import Dialect
from packcli.importers.draft import Draft

DIALECT = Dialect(
    title="LLaMA-Factory 0.9.5",
    defaults={
        "learning_rate": 5e-5, "lr_scheduler_type": "linear", "num_train_epochs": 3.0, "bf16": False, "seed": 42,
        "per_device_train_batch_size": 8, "cutoff_len": 2048,
    },
)  # fmt: skip
_INFO = "dataset_info.json"
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
# Where else a data set may lie; each goes before `file_name`, and `hf_hub_url` before all.
_ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_OF_HUB: tuple[HubKey, ...] = ("subset", "split", "revision")
_NO_EFFECT = {
    "how the data are read": ("preprocessing_num_workers", "streaming", "buffer_size", "tokenized_path",
                              "data_shared_file_system", "media_dir"),
    "logging: packcli writes every step to metrics.jsonl": (
        "use_swanlab", "swanlab_project", "swanlab_workspace", "swanlab_run_name", "swanlab_mode",
        "swanlab_api_key", "swanlab_logdir", "include_effective_tokens_per_second", "print_param_status"),
    "generation while evaluating: packcli's tasks say how they generate": (
        "max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample", "eval_num_beams"),
    "packcli checkpoints activations by `gradient_checkpointing`": ("disable_gradient_checkpointing",),
    "padding is never trained on in packcli": ("ignore_pad_token_for_loss",),
}  # fmt: skip
_NOT_CARRIED = {
    "eval_dataset": ("packcli holds out a share of the training data", "set `data.validation`"),
    "mix_strategy": ("packcli puts sources one after another, and shuffles", "give each source a `weight`"),
    "interleave_probs": ("packcli has weights for that", "give each source a `weight`"),
    "tool_format": ("packcli renders no tools", "put them into the text of a message"),
    "default_system": ("packcli adds no system message", "put it into the data or the template"),
    "enable_thinking": ("packcli's template decides", "write it into a template of your own"),
    "adapter_name_or_path": ("packcli's LoRA starts anew", "merge the adapter first, name the merged model"),
    "resize_vocab": ("packcli adds no tokens to a tokenizer", "save a tokenizer that has them, name it"),
    "add_tokens": ("packcli adds no tokens to a tokenizer", "save a tokenizer that has them, name it"),
    "additional_target": ("packcli trains adapters only", "leave them out, or train every weight"),
    "loraplus_lr_ratio": ("packcli's LoRA has one learning rate", "compare with plain LoRA"),
    "pissa_init": ("packcli's LoRA is the plain one", "compare with plain LoRA"),
    "use_galore": ("packcli trains with AdamW", "compare with AdamW"),
    "use_badam": ("packcli trains with AdamW", "compare with AdamW"),
    "use_adam_mini": ("packcli trains with AdamW", "compare with AdamW"),
    "use_muon": ("packcli trains with AdamW", "compare with AdamW"),
    "use_dft_loss": ("packcli's loss is the negative log-likelihood", "compare without it"),
    "shift_attn": ("packcli's attention is full, within a document or a row", "compare without it"),
    "disable_shuffling": ("packcli shuffles rows", "`order: sorted` of an arm is another order"),
    "split_special_tokens": ("packcli never reads special tokens out of a message's text", "nothing"),
}


def fill(draft: Draft, processes: int | None) -> None:
    """The sweep of an SFT configuration.

    Raises:
        ConfigError: it is no supervised fine-tuning, or names no model or data.
    """
    source = draft.source
    stage = source.get("stage", "sft")
    if stage != "sft":
        raise ConfigError(f"{source.at('stage')}: `stage: {stage}`", "packcli compares supervised fine-tuning")
    for key in ("model_name_or_path", "dataset"):
        if source.get(key) is None:
            raise ConfigError(f"{source.path}: no `{key}`", "packcli needs to know it: put it in")
    draft.ignore("stage", "supervised fine-tuning is what packcli does")
    draft.carry("model_name_or_path", "model.name", source.get("model_name_or_path"))
    if source.get("model_revision") is not None:
        draft.carry("model_revision", "model.revision", str(source.get("model_revision")))
    _data(draft)
    dialect.training(draft, DIALECT, processes)
    _adapters(draft)
    _arm(draft)
    dialect.own(draft, _NO_EFFECT, _NOT_CARRIED)


def _data(draft: Draft) -> None:
    source = draft.source
    _sources(draft)
    dialect.value(draft, DIALECT, "cutoff_len", "data.max_length")
    dialect.share(draft, "val_size")
    if source.get("train_on_prompt"):
        draft.carry("train_on_prompt", "data.train_on", "all")
        draft.ignore("mask_history", "`train_on_prompt` decides")
    elif source.get("mask_history"):
        draft.carry("mask_history", "data.train_on", "last_assistant")
        draft.ignore("train_on_prompt", "it is off")
    else:
        draft.assume("data.train_on", "assistant", "LLaMA-Factory trains on every answer")
        draft.ignore("mask_history", "it is off")
        draft.ignore("train_on_prompt", "it is off")
    name = source.get("template")
    if name in ("llama3", "chatml"):
        why = f"packcli's own `{name}`"
        draft.change("template", "data.template", name, why, "look at `packcli prepare --show 3`")
    else:
        do = "look at `packcli prepare --show 3`; name another in `data.template`"
        draft.drop("template", "packcli takes the tokenizer's own chat template", do)


def _sources(draft: Draft) -> None:
    """`dataset` by way of dataset_info.json, where that lies beside."""
    source = draft.source
    names = dialect.names(draft, "dataset")
    if not names:
        raise ConfigError(
            f"{source.at('dataset')}: `dataset` names nothing", "packcli needs to know it: put it in"
        )
    folder = str(source.get("dataset_dir", "data"))
    info = None if folder == "ONLINE" else _info(source.path, folder)
    if info is None:
        blocks: list[Any] = list(names)
        if folder == "ONLINE":
            source.mark("dataset", "carried", to=("data.source",))
        else:
            where = f"{_INFO} lies neither in `{folder}` nor beside {source.path.name}"
            do = "put it there and import again, or write files or Hugging Face ids into `data.source`"
            source.mark(
                "dataset", "not_carried", to=("data.source",), why=f"names that stand for data; {where}", do=do
            )
    else:
        blocks = [_block(draft, name, *info) for name in names]
        source.mark("dataset", "carried", to=("data.source",))
    draft.values["data.source"] = blocks if len(blocks) > 1 else blocks[0]
    draft.origins["data.source"] = f"{source.at('dataset')} dataset"
    draft.ignore("dataset_dir", f"where {_INFO} is looked for")
    limit = source.get("max_samples")
    if limit is not None and len(names) == 1:
        draft.carry("max_samples", "data.max_documents", int(dialect.number(draft, "max_samples", 0)))
    else:
        why = "packcli's `max_documents` counts all sources together"
        draft.drop("max_samples", why, "cut the files, or give each source a `weight`")


def _info(config: Path, folder: str) -> tuple[Path, dict[str, Any]] | None:
    """The folder of dataset_info.json, and what it holds."""
    for directory in (Path(folder), config.parent / folder, config.parent):
        if (file := directory / _INFO).is_file():
            try:
                found = read_json(file)
            except (OSError, ValueError) as error:
                raise ConfigError(f"{file}: not JSON: {error}", "correct it, then import again") from None
            if not isinstance(found, dict):
                raise ConfigError(f"{file}: not a JSON object", "correct it, then import again")
            return directory, found
    return None


def _block(draft: Draft, name: str, directory: Path, info: dict[str, Any]) -> Any:
    """One data set of dataset_info.json as a source of packcli."""
    if name not in info:
        near = ", ".join(list(info)[:8])
        raise ConfigError(f"{draft.source.at('dataset')}: {directory / _INFO} has no `{name}`", f"it has {near}")
    found, columns = info[name], None
    if isinstance(found, dict):
        columns = found.get("columns") or {}
    if not isinstance(columns, dict) or not all(isinstance(field, str | None) for field in columns.values()):
        raise ConfigError(f"{directory / _INFO}: `{name}` is no block of keys", "correct it, then import again")
    block: dict[str, Any] = {"source": _place(name, directory, found)}
    fates = {key: data.hub_fate(key, found[key], block["source"]) for key in _OF_HUB if found.get(key)}
    block |= {key: found[key] for key, fate in fates.items() if fate == "carried"}
    known = {"messages": "messages"} if found.get("formatting") in ("sharegpt", "openai") else _ALPACA
    mapping = {
        known[key]: field for key, field in columns.items() if key in known and field and known[key] != field
    }
    if mapping.get("messages") == "conversations":
        del mapping["messages"]
    if mapping:
        block["mapping"] = mapping
    dealt = {"file_name", "hf_hub_url", "columns", "formatting", *_ELSEWHERE, *_OF_HUB}
    left = [key for key in found if key not in dealt and found[key]]
    left += [f"columns.{key}" for key in columns if key not in known]
    left += [f"{key} of a local file" for key, fate in fates.items() if fate == "not_carried"]
    if left:
        draft.differences.append(f"{_INFO}, {name}: packcli has nothing for {', '.join(left)}")
    return block if len(block) > 1 else block["source"]


def _place(name: str, directory: Path, found: dict[str, Any]) -> str:
    """Where a data set of dataset_info.json is: the id of one of Hugging Face, or a file.

    Raises:
        ConfigError: it is neither.
    """
    if found.get("hf_hub_url"):
        return str(found["hf_hub_url"])
    elsewhere = next((key for key in _ELSEWHERE if found.get(key)), None)
    if elsewhere is None and found.get("file_name"):
        return str(directory / str(found["file_name"]))
    said = f"`{name}` is named by `{elsewhere}`" if elsewhere else f"`{name}` names no data"
    raise ConfigError(
        f"{directory / _INFO}: {said}", "packcli reads `hf_hub_url`, or `file_name` alone: write one of them"
    )


def _adapters(draft: Draft) -> None:
    source = draft.source
    kind = source.get("finetuning_type", "lora")
    keys = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target")
    if kind != "lora":
        for key in keys:
            draft.ignore(key, f"`finetuning_type: {kind}`")
        if kind == "full":
            draft.ignore("finetuning_type", "every weight is trained, which is packcli's default")
        else:
            do = "compare with `full` or `lora`"
            draft.drop("finetuning_type", "packcli trains every weight, or LoRA: here every weight", do)
        return
    listed = dialect.names(draft, "lora_target")
    targets: str | tuple[str, ...] = "all-linear" if listed in ([], ["all"]) else tuple(listed)
    dialect.lora(draft, rank="lora_rank", targets=targets, alpha=None, dropout=0.0, default=8)
    source.mark("finetuning_type", "carried", to=("train.lora",))
    if source.get("finetuning_type") is None:
        why = "LLaMA-Factory trains LoRA unless `finetuning_type` says otherwise"
        draft.assume("train.lora.rank", draft.values["train.lora.rank"], why)
    if source.get("lora_target") is not None:
        draft.carry("lora_target", "train.lora.targets", targets if targets == "all-linear" else list(targets))
    else:
        draft.assume("train.lora.targets", "all-linear", "LLaMA-Factory takes all linear layers")


def _arm(draft: Draft) -> None:
    source = draft.source
    neat = bool(source.get("neat_packing"))
    packed = neat or bool(source.get("packing"))
    cut = {"truncation": "per_turn"}
    if not packed:
        name = "llamafactory_padding"
        draft.arms[name] = {"extends": "padding", "pad_to": "longest", **cut}
        draft.pads(name)
        for key in ("packing", "neat_packing"):
            draft.source.mark(key, "carried", to=("matrix.arm",))
        draft.ignore("preprocessing_batch_size", "nothing is packed")
    else:
        name = "llamafactory_neat_packing" if neat else "llamafactory_packing"
        window = int(dialect.number(draft, "preprocessing_batch_size", 1000))
        crossing = {} if neat else {"attention": "causal"}
        packer = {"packer": "first_fit_decreasing", "window": window}
        draft.arms[name] = {"extends": "best_fit", **packer, **crossing, **cut}
        draft.packs(name)
        seen = "no token sees another document" if neat else "tokens see the documents before theirs in the row"
        why = (
            f"its greedy knapsack fills rows as first-fit decreasing does, {window:,} documents at a time; {seen}"
        )
        for key in ("packing", "neat_packing", "preprocessing_batch_size"):
            source.mark(key, "changed", to=(f"arms.{name}",), why=why)
        draft.differences.append(f"{name}: {why}; positions begin anew at each document in both cases")
        draft.differences.append("a row holds cutoff_len - 1 tokens there when packing, `max_length` here")
    draft.differences += [
        "documents that are too long: LLaMA-Factory cuts question and answer of a turn in proportion, and so "
        f"does `{name}`; packcli's own arms keep the first `max_length` tokens",
        "loss: LLaMA-Factory divides by the supervised tokens of the whole step for text models, and so does "
        "`loss: token`",
    ]
