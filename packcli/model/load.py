"""A transformers model from a checkpoint, or from a config with random weights. No code from a hub is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from packcli.config import ModelSpec
from packcli.errors import ConfigError
from packcli.model import attention, configs
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
        loaded = pretrained(
            str(base or model.name),
            revision=None if base else model.revision,
            dtype=torch.float32,
            attn_implementation=attention.NAME,
        )
    if (rows := loaded.get_input_embeddings().weight.shape[0]) < len(tokenizer):
        raise ConfigError(
            f"the model embeds {rows:,} tokens, the tokenizer has {len(tokenizer):,}",
            "use the tokenizer that belongs to the model",
        )
    configs.check_context(loaded.config, max_length)
    return loaded


def _from_config(config: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
    parsed = configs.build(config, **{name: getattr(tokenizer, name) for name in tokens})
    parsed.vocab_size = len(tokenizer)
    torch.manual_seed(integer(seed, "init"))
    try:
        return AutoModelForCausalLM.from_config(parsed, dtype=torch.float32, attn_implementation=attention.NAME)
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ConfigError(f"`model.config` makes no causal model: {reason}", "see docs/sweep_file.md") from None


def pretrained(source: str, *, revision: str | None = None, **options: Any) -> Any:
    """A checkpoint directory's or hub id's model, without a key missing, left over or of another shape.

    Safetensors only, and no code of the checkpoint's own. `options` go to `from_pretrained`.

    Raises:
        ConfigError: it cannot be loaded, or its weights do not match its config.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision or "main",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"cannot load the model of checkpoint `{source}`: {lines[0]}",
            "give a directory with config, safetensors weights and tokenizer, or a reachable Hugging Face id",
        ) from error
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := sorted(str(key) for key in loading.get(problem, ())):
            raise ConfigError(
                f"checkpoint `{source}`: weights do not match its config; "
                f"{len(keys)} {problem.replace('_', ' ')}, first `{keys[0]}`",
                "use the weights and the config of the same save",
            )
    return model


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
    for file in path.iterdir():
        file.chmod(0o644)  # safetensors leaves 0600, which shuts out the colleague who is to evaluate it
