"""A checkpoint to be scored: its model, ready for greedy decoding, and its tokenizer. Loads no lm-eval.

Nothing in a checkpoint is run or unpickled: weights are safetensors, and model code from a hub is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packcli.errors import ConfigError
from packcli.eval import prompts

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read(checkpoint: Path | str, *, chat_template: bool) -> tuple[Any, Any]:
    """Model (on the CPU, in the precision it was saved in) and tokenizer of a directory or a Hugging Face id.

    Raises:
        ConfigError: no such checkpoint, no tokenizer in it, none with a chat template where one is asked for, or
            weights that do not match its config.
    """
    source, tokenizer, stops = read_tokenizer(checkpoint, chat_template=chat_template)
    from packcli.model.load import pretrained

    model = pretrained(source, dtype="auto").eval()
    num_tokens, num_rows = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    if num_tokens > num_rows:
        raise ConfigError(
            f"checkpoint `{source}`: the tokenizer has {num_tokens} tokens, the model only {num_rows}",
            "save the tokenizer the model was trained with",
        )
    _decode_greedily(model, tokenizer, stops)
    return model, tokenizer


def read_tokenizer(checkpoint: Path | str, *, chat_template: bool) -> tuple[str, Any, list[int]]:
    """Where the checkpoint is, its tokenizer, and the token that ends a turn of its chat template (if any).

    For engines that load the weights themselves.

    Raises:
        ConfigError: no such checkpoint, no tokenizer in it, none with a chat template where one is asked for.
    """
    source = _source(checkpoint)
    tokenizer = _read_tokenizer(source)
    stops: list[int] = []
    if chat_template:
        stops = tokenizer.encode(prompts.end_of_turn(tokenizer), add_special_tokens=False)[-1:]
    return source, tokenizer, stops


def first_line(error: BaseException) -> str:
    """The first line of what a library says about a failure; its name if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _source(checkpoint: Path | str) -> str:
    """A local directory that looks like a checkpoint, or a hub id."""
    path = Path(checkpoint)
    if not path.is_dir():
        if isinstance(checkpoint, Path) or path.exists() or not _HUB_ID.fullmatch(checkpoint):
            raise ConfigError(f"no checkpoint directory `{checkpoint}`", "give a directory or a Hugging Face id")
        return checkpoint
    if not (path / "config.json").is_file():
        raise ConfigError(f"`{path}` is no checkpoint: it has no `config.json`", "give the directory that has it")
    # transformers would make up an empty tokenizer from the model type.
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"checkpoint `{path}` has no tokenizer", "save the tokenizer into the same directory")
    return str(path)


def _read_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # what two libraries raise over a file of any content is no closed set
        raise ConfigError(
            f"cannot load the tokenizer of checkpoint `{source}`: {first_line(error)}",
            "give a directory with config, safetensors weights and tokenizer, or a reachable Hugging Face id",
        ) from error


def _decode_greedily(model: Any, tokenizer: Any, stops: Sequence[int]) -> None:
    """Make generation plain greedy decoding that ends where the checkpoint or its template ends a turn.

    A checkpoint's own generation settings may hold a repetition penalty, which greedy decoding would obey.
    """
    from transformers import GenerationConfig

    saved = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *stops, *(saved if isinstance(saved, list) else [saved])} - {None}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), do_sample=False)
