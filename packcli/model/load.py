"""A transformers model from a checkpoint, or from a config with random weights. No code from a hub is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from packcli.config import ModelSpec
from packcli.errors import ConfigError
from packcli.model import attention
from packcli.seeds import integer

# Our own progress says what goes on; transformers' bars would tear through it.
transformers_logging.disable_progress_bar()


def load(model: ModelSpec, base: Path | None, tokenizer: Any, max_length: int, seed: int) -> Any:
    """The model in fp32 (bf16 is computed under autocast, so the optimizer's master weights stay exact).

    Raises:
        ConfigError: no such checkpoint, weights that do not match their config, a vocabulary or context
            that is too small for the data.
    """
    if base is None and model.config is not None:
        loaded = _from_config(model.config, tokenizer, seed)
    else:
        loaded = _from_checkpoint(str(base) if base else str(model.name), None if base else model.revision)
    if (rows := loaded.get_input_embeddings().weight.shape[0]) < len(tokenizer):
        raise ConfigError(
            f"the model embeds {rows:,} tokens, the tokenizer has {len(tokenizer):,}",
            "use the tokenizer that belongs to the model",
        )
    context = getattr(loaded.config, "max_position_embeddings", None)
    if context is not None and context < max_length:
        raise ConfigError(
            f"the model has positions for {context:,} tokens, `data.max_length` is {max_length:,}",
            f"set `data.max_length` to at most {context}",
        )
    return loaded


def _from_config(config: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    fields = {key: value for key, value in config.items() if key != "model_type"}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        parsed = AutoConfig.for_model(
            config["model_type"], **{**tokens, "bos_token_id": tokenizer.bos_token_id, **fields}
        )
        parsed.vocab_size = len(tokenizer)
        torch.manual_seed(integer(seed, "init"))
        return AutoModelForCausalLM.from_config(parsed, dtype=torch.float32, attn_implementation=attention.NAME)
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"`model.config` makes no causal model: {reason}", "see docs/sweep_file.md") from None


def _from_checkpoint(name: str, revision: str | None) -> Any:
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision or "main",
            dtype=torch.float32,
            attn_implementation=attention.NAME,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"cannot load model `{name}`: {reason}", "check `model.name`: a checkpoint directory or a hub id"
        ) from None
    wrong = [
        key for part in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info.get(part) or ()
    ]
    if wrong:
        listed = ", ".join(str(key) for key in wrong[:4])
        raise ConfigError(
            f"the weights in `{name}` do not match their config: {len(wrong)} keys differ ({listed})",
            "use the config the weights were saved with",
        )
    return loaded


def save(model: Any, state: dict[str, Any], tokenizer: Any, stops: list[int], dtype: str, path: Path) -> None:
    """A Hugging Face checkpoint directory with tokenizer and template, as `from_pretrained` reads it.

    `stops`: tokens that end an assistant turn under the data's template; generation stops at them.
    """
    target = getattr(torch, dtype)
    model.generation_config.eos_token_id = sorted({*stops, tokenizer.eos_token_id} - {None})
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.dtype = target
    model.save_pretrained(path, state_dict={name: tensor.to(target) for name, tensor in state.items()})
    tokenizer.save_pretrained(path)
