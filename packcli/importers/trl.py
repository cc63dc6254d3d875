"""TRL's `trl sft --config FILE`, as TRL 1.16.0 reads it, with the dataset mixtures of the alignment handbook.

What each key means was read in the published package: trl/trainer/sft_config.py, sft_trainer.py, data_utils.py,
scripts/utils.py.
"""

from __future__ import annotations

from typing import Any

from packcli.errors import ConfigError
from packcli.importers import data, dialect
from packcli.importers.data import HubKey
from packcli.importers.dialect import Dialect
from packcli.importers.draft import Draft

DIALECT = Dialect(
    title="TRL 1.16.0",
    defaults={
        "learning_rate": 2e-5, "lr_scheduler_type": "linear", "num_train_epochs": 3.0, "bf16": True, "seed": 42,
        "per_device_train_batch_size": 8, "max_length": 1024, "model_name_or_path": "",
    },
)  # fmt: skip
_OTHER_TRAINERS = ("beta", "num_generations", "reward_funcs", "reward_model_path", "max_completion_length")
_MAP_BATCH = 1000  # documents that `datasets.map(batched=True)` hands to the packer at a time
_TEMPLATE = "template.jinja"


def fill(draft: Draft, processes: int | None) -> None:
    """The sweep of an SFT configuration.

    Raises:
        ConfigError: it is of another trainer of TRL, or names no model.
    """
    source = draft.source
    for key in _OTHER_TRAINERS:
        if source.get(key) is not None:
            raise ConfigError(
                f"{source.at(key)}: `{key}` is no key of SFT", "packcli compares supervised fine-tuning"
            )
    _model(draft)
    _data(draft)
    dialect.training(draft, DIALECT, processes)
    _adapters(draft)
    _arm(draft)


def _model(draft: Draft) -> None:
    if draft.source.get("model_name_or_path") is None:
        raise ConfigError(f"{draft.source.path}: no `model_name_or_path`", "put in what --model_name_or_path said")
    draft.carry("model_name_or_path", "model.name", draft.source.get("model_name_or_path"))
    if draft.source.get("model_revision") is not None:
        draft.carry("model_revision", "model.revision", str(draft.source.get("model_revision")))
    for key in ("dtype", "torch_dtype"):
        why = "weights are kept in float32; `bf16` says what is computed in"
        draft.source.mark(key, "changed", to=("model.dtype",), why=why)


def _data(draft: Draft) -> None:
    source = draft.source
    mixture = "datasets" if source.get("datasets") else "dataset_mixture.datasets"
    if source.get(mixture):
        _mixture(draft, mixture)
        why = f"`{mixture}` is given, and decides"
        draft.ignore("dataset_name", why)
    elif source.get("dataset_name") is not None:
        _one(draft)
        why = "it is off"
    else:
        why = "`dataset_name` is not given"
        draft.assume("data.source", "chats.jsonl", "the file names no data: put in what --dataset_name said")
    for key in ("dataset_config", "dataset_train_split", "dataset_streaming"):
        source.mark(key, "no_effect", why=why, once=False)
    _length(draft)
    dialect.propose_validation(draft)
    for key in ("dataset_test_split", "test_split_size", "dataset_mixture.test_split_size"):
        source.mark(key, "changed", to=("data.validation",), why="packcli holds out a share, by content")
    _trained_on(draft)
    _template(draft)
    for key in ("dataset_num_proc", "dataset_kwargs", "shuffle_dataset", "streaming", "dataset_mixture.seed"):
        draft.ignore(key, "how the data are read; packcli packs the whole set, in an order of its own seed")
    chats = "packcli reads chats (`messages`, `prompt` with `completion`, ...), no plain text"
    draft.drop("dataset_text_field", chats, "make each text the answer of a chat, `data.template: plain`")
    draft.drop(
        "eos_token", "packcli takes what ends a turn from the template", "look at `packcli prepare --show 3`"
    )
    draft.ignore("pad_token", "no label or mask depends on it")


def _length(draft: Draft) -> None:
    """TRL before 0.20 said `max_seq_length`, which decided where `max_length` stood beside it."""
    source = draft.source
    if source.get("max_seq_length") is None:
        if "max_length" in source.keys and source.get("max_length") is None:
            said = "`max_length` is empty: TRL then cuts nothing, and packcli's rows have an end"
            raise ConfigError(f"{source.at('max_length')}: {said}", "put in a length that no document exceeds")
        dialect.value(draft, DIALECT, "max_length", "data.max_length")
        return
    length = int(dialect.number(draft, "max_seq_length", 0))
    draft.change("max_seq_length", "data.max_length", length, "what TRL called `max_length` before 0.20")
    draft.ignore("max_length", "`max_seq_length` is given, and decides")


def _one(draft: Draft) -> None:
    source = draft.source
    names = data.paths(draft, "dataset_name", source.get("dataset_name"), "data_files")
    block: dict[str, Any] = {}
    given: dict[str, HubKey] = {
        "dataset_config": "subset", "dataset_train_split": "split", "dataset_streaming": "streaming",
    }  # fmt: skip
    for key, part in given.items():
        if source.get(key) not in (None, False):
            block |= data.of_hub(draft, key, part, source.get(key), names[0])
    found = [{"source": name, **block} if block else name for name in names]
    draft.carry("dataset_name", "data.source", found if len(found) > 1 else found[0])


def _mixture(draft: Draft, where: str) -> None:
    """TRL's (`path`, `name`, `fraction`) and the handbook's (`id`, `config`, `weight`)."""
    listed = draft.source.get(where)
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise ConfigError(
            f"{draft.source.at(where)}: `{where}` is no list of blocks", "see TRL's dataset mixtures"
        )
    draft.values["data.source"] = [
        block for number in range(len(listed)) for block in _part(draft, f"{where}.{number}")
    ]
    draft.origins["data.source"] = f"{draft.source.at(where)} {where}"


def _part(draft: Draft, where: str) -> list[dict[str, Any]]:
    """One of a mixture, as sources of packcli: one, or as many as it names files."""
    of_hub: dict[str, HubKey] = {"name": "subset", "config": "subset", "split": "split"}
    block: dict[str, Any] = {}
    found = draft.source.words(where)
    named = next((key for key in ("path", "id") if found.get(key)), None)
    if named is None:
        raise ConfigError(f"{draft.source.at(where)}: a data set without `path`", "put in where the data are")
    files = data.paths(draft, f"{where}.{named}", found[named], f"{where}.data_files")
    for key, value in found.items():
        place = f"{where}.{key}"
        if draft.source.dealt_with(place):
            continue
        if key == named:
            draft.source.mark(place, "carried", to=("data.source",))
        elif key in of_hub and value is not None:
            block |= data.of_hub(draft, place, of_hub[key], value, files[0])
        elif key in ("fraction", "weight") and value is not None:
            block["weight"] = value
            draft.source.mark(place, "carried", to=("data.source",))
        elif key == "columns":
            draft.ignore(place, "packcli reads the fields of a chat and no others")
        else:
            do = "save the data where they can be named by `source`"
            draft.drop(place, "packcli names a data set by id, subset and split, or by path", do)
    return [{"source": file, **block} for file in files]


def _trained_on(draft: Draft) -> None:
    source = draft.source
    if source.get("assistant_only_loss"):
        draft.carry("assistant_only_loss", "data.train_on", "assistant")
        draft.ignore("completion_only_loss", "`assistant_only_loss` decides")
    elif source.get("completion_only_loss"):
        draft.carry("completion_only_loss", "data.train_on", "last_assistant")
        draft.ignore("assistant_only_loss", "it is off")
    else:
        why = "TRL trains on every token of a chat, on the completion only of `prompt` with `completion`"
        for key in ("assistant_only_loss", "completion_only_loss"):
            source.mark(key, "changed", to=("data.train_on",), why=why)
        draft.assume("data.train_on", "all", f"{why}: for such data set `last_assistant`")


def _template(draft: Draft) -> None:
    source = draft.source
    path = source.get("chat_template_path")
    if path is not None:
        draft.ignore("chat_template", "`chat_template_path` is given, and decides")
    elif (text := source.get("chat_template")) is not None:
        draft.files[_TEMPLATE] = str(text)
        draft.change("chat_template", "data.template", _TEMPLATE, "in a file of its own")
    if str(path).endswith((".jinja", ".j2", ".txt")):
        draft.carry("chat_template_path", "data.template", path)
    else:
        do = "save its chat template as a file, name that in `data.template`"
        draft.drop("chat_template_path", "packcli takes a template from a file or the model's tokenizer", do)


def _adapters(draft: Draft) -> None:
    source = draft.source
    keys = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
    if not source.get("use_peft"):
        for key in ("use_peft", *keys, "lora_modules_to_save", "lora_task_type", "lora_target_parameters"):
            draft.ignore(key, "`use_peft` is off: every weight is trained")
        return
    found = source.get("lora_target_modules")
    targets: str | tuple[str, ...] = "all-linear"
    if found is None:
        targets = ("q_proj", "v_proj")
    elif found != "all-linear" and found != ["all-linear"]:
        targets = tuple(dialect.names(draft, "lora_target_modules"))
    dialect.lora(draft, rank="lora_r", targets=targets, alpha=32, dropout=0.05, default=16)
    source.mark("use_peft", "carried", to=("train.lora",))
    if found is None:
        draft.assume("train.lora.targets", list(targets), "peft's own choice for Llama and its like")
    else:
        draft.carry(
            "lora_target_modules", "train.lora.targets", targets if targets == "all-linear" else list(targets)
        )
    draft.ignore("lora_task_type", "packcli trains causal models")
    draft.drop("lora_modules_to_save", "packcli trains adapters only", "leave them out, or train every weight")
    draft.drop("lora_target_parameters", "packcli's LoRA is of linear layers", "name linear layers as targets")


def _arm(draft: Draft) -> None:
    source = draft.source
    keys = ("packing", "packing_strategy", "padding_free")
    if not source.get("packing"):
        free = bool(source.get("padding_free"))
        name = "padding_free" if free else "trl_padding"
        if not free:
            draft.arms[name] = {"extends": "padding", "pad_to": "longest"}
        draft.pads("padding" if free else name)
        for key in keys:
            source.mark(key, "carried", to=("matrix.arm",))
    else:
        name, fields, why = _packed(draft)
        draft.arms[name] = fields
        draft.packs(name)
        draft.differences.append(f"{name}: {why}")
        for key in keys:
            source.mark(key, "changed", to=(f"arms.{name}",), why=why)
    if source.get("truncation_mode") == "keep_end":
        draft.drop("truncation_mode", "packcli keeps the beginning of a document that is too long", "compare so")
    else:
        draft.ignore("truncation_mode", "the beginning is kept, as in packcli")
    if source.get("loss_type") not in (None, "nll", "chunked_nll"):
        draft.drop("loss_type", "packcli's loss is the negative log-likelihood", "compare at `nll`")
    else:
        draft.ignore("loss_type", "the negative log-likelihood, as in packcli")
    draft.differences.append(
        "loss: TRL divides by the supervised tokens of the whole step, over accumulation and processes, and so "
        "does `loss: token`"
    )


def _packed(draft: Draft) -> tuple[str, dict[str, Any], str]:
    strategy = str(draft.source.get("packing_strategy", "bfd"))
    windows = {"packer": "first_fit_decreasing", "window": _MAP_BATCH}
    match strategy:
        case "wrapped":
            fields = {"extends": "random", "window": _MAP_BATCH}
            why = (
                f"documents of {_MAP_BATCH:,} at a time end to end, cut at row ends; tokens attend across "
                "documents of a row, on purpose"
            )
            return "trl_wrapped", fields, why
        case "bfd_split" | "bfd-requeue":  # its name in earlier versions
            why = (
                f"best-fit decreasing over {_MAP_BATCH:,} documents at a time, here first-fit; TRL splits "
                "documents that are too long, packcli truncates them"
            )
            return "trl_bfd_split", {"extends": "best_fit", **windows}, why
        case "bfd":
            why = (
                f"best-fit decreasing over {_MAP_BATCH:,} documents at a time, here first-fit; documents are kept "
                "apart by their positions, in packcli by a mask that is tested at start-up"
            )
            return "trl_bfd", {"extends": "best_fit", **windows}, why
        case _:
            said = f"{draft.source.at('packing_strategy')}: TRL has no `packing_strategy: {strategy}`"
            raise ConfigError(said, "it has bfd, bfd_split and wrapped")
