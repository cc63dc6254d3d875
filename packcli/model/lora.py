"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: put into a model, merged into its weights at the end.

peft's layers replace linear ones in place, without its wrapper around the whole: the model keeps its class and its
other names, so sharding, loss and probe find in it what they always find.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from packcli.config import LoraSpec, ModelSpec
from packcli.errors import ConfigError, MissingError
from packcli.seeds import integer

DIRECTORY = "adapter"
_ADAPTER = "default"  # peft's own name for the only one


def require() -> None:
    """Raise `MissingError` where peft is not installed."""
    if find_spec("peft") is None:
        raise MissingError("`train.lora`: no package peft", "pip install 'packcli[lora]'")


def inject(model: Any, spec: LoraSpec, source: ModelSpec, seed: int, *, train_embeddings: bool) -> None:
    """Add adapters to the model's linear layers and freeze all else, in place; B starts at 0, A is drawn.

    `train_embeddings`: token embedding and head are trained in full beside the adapters, for rows that are new.

    Raises:
        ConfigError: a target names no linear layer between embedding and head.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=_targets(model, spec),
        base_model_name_or_path=source.name,
        revision=source.revision,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(integer(seed, "init", 2))  # 0: the weights of a config, 1: rows of added tokens
    inject_adapter_in_model(config, model)
    if train_embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(True)


def _targets(model: Any, spec: LoraSpec) -> list[str]:
    """Ends of module names, as peft matches them. The head and experts kept as one tensor are left out."""
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    ends = sorted({name.rpartition(".")[2] for name in linear})
    if spec.targets == "all-linear" and ends:
        return ends
    wanted = () if spec.targets == "all-linear" else spec.targets
    for target in wanted:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            near = difflib.get_close_matches(target, ends, n=1)
            raise ConfigError(
                f"`train.lora.targets`: no linear layer between embedding and head is named `{target}`"
                + (f"; did you mean `{near[0]}`?" if near else ""),
                f"this model has {', '.join(ends)}" if ends else "this model has none; train it without LoRA",
            )
    if not wanted:
        raise ConfigError(f"`train.lora`: {model.config.model_type} has no linear layers", "train it without LoRA")
    return list(wanted)


def merged(
    model: Any, state: Iterable[tuple[str, torch.Tensor]], adapter: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The state of a model with adapters as that of one without: W + alpha/r BA, in float32.

    One weight at a time, as they come. What was trained goes into `adapter` (float32), under peft's names.
    """
    config = model.peft_config[_ADAPTER]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    held: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state:
        if name in trained:
            adapter[f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}"] = tensor.detach().cpu().float()
        module, _, rest = name.partition(".lora_")
        part = rest[:1] or "W"
        if part == "W" and not name.endswith(".base_layer.weight"):
            yield name.replace(".base_layer.", "."), tensor
            continue
        module = module.removesuffix(".base_layer.weight")
        parts = held.setdefault(module, {})
        parts[part] = tensor.float()
        if len(parts) == 3:
            del held[module]
            scale = config.lora_alpha / config.r
            yield f"{module}.weight", parts["W"] + scale * (parts["B"] @ parts["A"])
    if held:
        raise RuntimeError(f"the state lacks a part of {', '.join(held)}")


def save(model: Any, adapter: dict[str, torch.Tensor], path: Path) -> None:
    """A directory that `PeftModel.from_pretrained` reads.

    With new rows, it holds the whole embedding and head too: the base model must then first be resized.
    """
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, path / "adapter_model.safetensors")
    fields = {**model.peft_config[_ADAPTER].to_dict(), "inference_mode": True}
    # Sets in an order of their own: equal runs leave equal files.
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    text = json.dumps(fields, indent=2, sort_keys=True)
    (path / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
