"""A transformers model from a checkpoint, or from a config with random weights. No code from a hub is run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from packcli.config import LoraSpec, ModelSpec
from packcli.errors import ConfigError, PackcliError
from packcli.log import logger
from packcli.model import attention, configs
from packcli.model import lora as adapters
from packcli.seeds import integer

# Our own progress says what goes on; transformers' bars would tear through it.
transformers_logging.disable_progress_bar()

_SHARD = "5GB"  # of a file of weights, at most


def load(
    model: ModelSpec,
    base: Path | None,
    tokenizer: Any,
    max_length: int,
    seed: int,
    *,
    lora: LoraSpec | None = None,
    empty: bool = False,
) -> Any:
    """The model in fp32: half precision is a matter of computing, the optimizer's master weights stay exact.

    `empty`: the same modules, names, shapes and ties, parameters on the meta device: no weight is read and no
    memory taken. Buffers are there, as they are computed from the config.
    The model's `embedding_rows_added` says how many rows it was given for tokens added to its tokenizer.

    Raises:
        ConfigError: no such checkpoint, weights that do not match their config, a kind of model that cannot be
            trained here, a vocabulary or context that is too small for the data.
        MissingError: `lora` without peft.
    """
    if lora is not None:
        adapters.require()
    placed: AbstractContextManager[None] = _on_meta() if empty else nullcontext()
    with placed:
        if base is None and model.config is not None:
            loaded = _from_config(model.config, tokenizer, seed)
        else:
            loaded = _from_checkpoint(str(base or model.name), None if base else model.revision, empty)
        loaded.embedding_rows_added = _fit_vocabulary(loaded, tokenizer, seed)
        configs.check_context(loaded.config, max_length)
        if lora is not None:
            # New rows of a frozen embedding would all stay at the mean: no model could tell them apart.
            train_embeddings = loaded.embedding_rows_added > 0
            adapters.inject(loaded, lora, model, seed, train_embeddings=train_embeddings)
    if loaded.embedding_rows_added and not empty:
        also = "; embedding and head are trained in full, beside the adapters" if lora else ""
        logger.info(f"{loaded.embedding_rows_added} embedding rows added for the tokenizer's added tokens{also}")
    return loaded


def skeleton(model: ModelSpec) -> Any:
    """The model's modules, to be given other weights: parameters on the meta device, buffers as computed."""
    with _on_meta():
        if model.config is not None:
            return _build(configs.build(model.config))
        return _from_checkpoint(str(model.name), model.revision, empty=True)


@contextmanager
def _on_meta() -> Iterator[None]:
    """Parameters made in here hold nothing. (`torch.device("meta")` would empty the buffers too.)"""

    def emptied(module: Any, name: str, parameter: torch.nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:  # the second: tied to one that was made before
            return None
        return torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(emptied)
    try:
        yield
    finally:
        hook.remove()


def _from_config(config: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
    parsed = configs.build(config, **{name: getattr(tokenizer, name) for name in tokens})
    parsed.vocab_size = _num_ids(tokenizer)
    torch.manual_seed(integer(seed, "init"))
    try:
        return _build(parsed)
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ConfigError(f"`model.config` makes no causal model: {reason}", "see docs/sweep_file.md") from None


def _from_checkpoint(source: str, revision: str | None, empty: bool) -> Any:
    with _explained(source):
        config = AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    configs.check_kind(config, f"checkpoint `{source}`")
    _check_attention(config)
    if empty:
        return _build(config)
    model = pretrained(source, revision=revision, dtype=torch.float32, attn_implementation=attention.NAME)
    if (
        untied := model.get_expanded_tied_weights_keys(all_submodels=True).keys()
        - model.all_tied_weights_keys.keys()
    ):
        # transformers goes by the weights then: empty models, which go by the config, would not fit this one.
        raise ConfigError(
            f"checkpoint `{source}`: its config ties `{min(untied)}` to the embedding, but their weights differ",
            "set `tie_word_embeddings` to false in its config.json",
        )
    return model


def _build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    _check_attention(config)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)


def _check_attention(config: Any) -> None:
    """Refuse a model whose layers never ask transformers which attention to use: ours would not be called."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if known is None or not getattr(known, "_supports_attention_backend", False):
        raise ConfigError(
            f"`{config.model_type}` is no causal model with the attention interface common in transformers",
            "documents could not be kept apart in it; use another kind, such as llama, qwen3, mistral or gemma",
        )


def _num_ids(tokenizer: Any) -> int:
    """Rows an embedding needs. Not `len(tokenizer)`: ids may have gaps."""
    return 1 + max(map(int, tokenizer.get_vocab().values()))


def _fit_vocabulary(model: Any, tokenizer: Any, seed: int) -> int:
    """Rows for tokens that were added to the model's own tokenizer; how many.

    Each is the mean of the rows there are, so that it takes next to no probability from them, and noise of 1e-5
    of their variance: John Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021), with
    the diagonal of his covariance. (`mean_resizing` of transformers falls back to the bare mean where the
    covariance is not positive definite in floating point, which differs between machines.)
    """
    rows, needed = int(model.get_input_embeddings().weight.shape[0]), _num_ids(tokenizer)
    if needed <= rows:
        return 0
    if not set(tokenizer.added_tokens_decoder).issuperset(range(rows, needed)):
        raise ConfigError(
            f"the model embeds {rows:,} tokens, the tokenizer has {needed:,}",
            "use the tokenizer that belongs to the model",
        )
    model.resize_token_embeddings(needed, mean_resizing=False)
    torch.manual_seed(integer(seed, "init", 1))
    matrices = [module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    head_bias = getattr(model.get_output_embeddings(), "bias", None)
    with torch.no_grad():
        for matrix in matrices[:1] if matrices[0] is matrices[1] else matrices:
            own = matrix[:rows]
            noise = torch.randn_like(matrix[rows:]) * own.std(dim=0) * 1e-5**0.5
            matrix[rows:] = own.mean(dim=0) + noise
        if head_bias is not None:
            head_bias[rows:] = head_bias[:rows].mean()
    return needed - rows


def pretrained(source: str, *, revision: str | None = None, **options: Any) -> Any:
    """A checkpoint directory's or hub id's model, without a key missing, left over or of another shape.

    Safetensors only, and no code of the checkpoint's own. `options` go to `from_pretrained`.

    Raises:
        ConfigError: it cannot be loaded, or its weights do not match its config.
    """
    with _explained(source):
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision or "main",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := sorted(str(key) for key in loading.get(problem, ())):
            raise ConfigError(
                f"checkpoint `{source}`: weights do not match its config; "
                f"{len(keys)} {problem.replace('_', ' ')}, first `{keys[0]}`",
                "use the weights and the config of the same save",
            )
    return model


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """What transformers says about a checkpoint it cannot load, as one clear line."""
    try:
        yield
    except PackcliError:
        raise
    except Exception as error:  # what several libraries raise over files of any content is no closed set
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"cannot load the model of checkpoint `{source}`: {lines[0]}",
            "give a directory with config, safetensors weights and tokenizer, or a reachable Hugging Face id",
        ) from error


def save(
    model: Any,
    state: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    tokenizer: Any,
    stops: list[int],
    dtype: str,
    path: Path,
) -> None:
    """A Hugging Face checkpoint directory with tokenizer and template, as `from_pretrained` reads it.

    state   (name, whole tensor) under the model's own names, of any dtype and device; taken one by one, so that
            only one need be there in fp32. Memory: the model once, in `dtype`.
    stops   tokens that end an assistant turn under the data's template; generation stops at them.

    Adapters are merged, in float32 before rounding (so hand them over in float32), and kept in `adapter/` too.

    Raises:
        RuntimeError: `state` is not all of the model.
    """
    target, adapter = getattr(torch, dtype), dict[str, torch.Tensor]()
    named: Iterable[tuple[str, torch.Tensor]] = state.items() if isinstance(state, Mapping) else state
    if hasattr(model, "peft_config"):
        named = adapters.merged(model, named, adapter)
    # Saved through a model as transformers makes it: without adapters, shards or compiled parts.
    with _on_meta():
        plain = _build(model.config, target)
    tied = set(plain.all_tied_weights_keys)
    whole = {name: _cast(tensor, target) for name, tensor in named if name not in tied}
    expected = {name: tensor.shape for name, tensor in plain.state_dict().items() if name not in tied}
    if wrong := {name for name, shape in expected.items() ^ {n: t.shape for n, t in whole.items()}.items()}:
        raise RuntimeError(f"the state to save is not the model's: {', '.join(sorted(wrong)[:3])}")
    plain.generation_config = _generation(model.generation_config, tokenizer, stops)
    plain.save_pretrained(path, state_dict=whole, max_shard_size=_SHARD)
    tokenizer.save_pretrained(path)
    if adapter:
        adapters.save(model, adapter, path / adapters.DIRECTORY)
    for file in path.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors leaves 0600, which shuts out the colleague who is to evaluate it


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    tensor = tensor.detach().to("cpu")
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _generation(settings: GenerationConfig, tokenizer: Any, stops: list[int]) -> GenerationConfig:
    """The model's own generation settings with the stops of the template."""
    try:
        settings.validate(strict=True)
    except ValueError:  # some published ones contradict themselves, and transformers refuses to save those
        settings = GenerationConfig(bos_token_id=settings.bos_token_id)
    settings.eos_token_id = sorted({*stops, tokenizer.eos_token_id} - {None})
    settings.pad_token_id = tokenizer.pad_token_id
    return settings
