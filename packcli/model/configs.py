"""`model.config` as a transformers config, checked before anything is trained on it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from packcli.errors import ConfigError

# Keys of older configs that transformers still reads.
_EARLIER_NAMES = ("rope_theta", "rope_scaling", "torch_dtype")
_SEE = "see docs/sweep_file.md and the model's documentation in transformers"


def build(config: Mapping[str, Any], **tokens: int | None) -> Any:
    """The config object; `tokens` are ids such as `pad_token_id` for keys the user left out.

    Raises:
        ConfigError: an unknown model type or key, or values transformers refuses.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    name = str(config.get("model_type"))
    if name not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(name, CONFIG_MAPPING_NAMES, n=1)
        raise ConfigError(
            f"`model.config.model_type`: transformers has no `{name}`"
            + (f"; did you mean `{near[0]}`?" if near else ""),
            _SEE,
        )
    fields = {key: value for key, value in config.items() if key != "model_type"}
    try:
        known = AutoConfig.for_model(name)
        keys = {*known.to_dict(), *known.attribute_map, *_EARLIER_NAMES}
        if unknown := [_unknown(key, keys) for key in fields if key not in keys]:
            raise ConfigError(f"{'; '.join(unknown)} (a `{name}` has none)", _SEE)
        config = AutoConfig.for_model(name, **{**tokens, **fields})
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"`model.config` makes no {name} model: {reason}", _SEE) from None
    check_kind(config, "`model.config`")
    _check_heads(config)
    return config


def _unknown(key: str, keys: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    return f"unknown key `model.config.{key}`" + (f", did you mean `{near[0]}`?" if near else "")


def _check_heads(config: Any) -> None:
    """What transformers leaves to the first forward pass of some models."""
    hidden, heads, groups = (
        getattr(config, key, None) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return
    if groups and heads % groups:
        raise ConfigError(
            f"`model.config`: {heads} attention heads cannot share {groups} key-value heads evenly",
            "make `num_attention_heads` a multiple of `num_key_value_heads`",
        )
    if not getattr(config, "head_dim", None) and hidden % heads:
        raise ConfigError(
            f"`model.config`: `hidden_size` {hidden} is no multiple of {heads} attention heads",
            "change one of them, or give `head_dim`",
        )


def check_kind(config: Any, source: str) -> None:
    """Raise `ConfigError` unless `config`, of `source`, is that of a text-only decoder with plain weights."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{source}: `{kind}` is an encoder-decoder", "use a decoder-only model")
    parts = " ".join(getattr(config, "sub_configs", ()))
    text = config.get_text_config(decoder=True)
    if text is not config or any(sense in parts for sense in ("vision", "audio")):
        raise ConfigError(
            f"{source}: `{kind}` is a model of several parts (text with images or sound)",
            f"use its text model alone (`{text.model_type}`)" if text is not config else "use a text-only model",
        )
    if quantization := getattr(config, "quantization_config", None):
        fields = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
        raise ConfigError(
            f"{source}: its weights are quantized ({fields.get('quant_method', 'no method named')})",
            "use the checkpoint it was quantized from",
        )


def check_context(config: Any, max_length: int) -> int | None:
    """Tokens that the model has positions for; None where its config does not say.

    Raises:
        ConfigError: fewer than a row may hold.
    """
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < max_length:
        raise ConfigError(
            f"the model has positions for {context:,} tokens, `data.max_length` is {max_length:,}",
            f"set `data.max_length` to at most {context}",
        )
    return context
