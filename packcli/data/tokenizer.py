"""A tokenizer by name, or one trained on the data. Boundaries, ids and special tokens are its business alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from packcli.data import chat, sources
from packcli.errors import ConfigError, DataError
from packcli.plan import TokenizerOrder, TokensOrder

END_OF_TEXT = "<|endoftext|>"
# How templates spell control tokens. A trained tokenizer gets one id for each that its template writes.
_CONTROL = re.compile(r"<\|[^|<>\s]+\|>")


def build(order: TokensOrder) -> Any:
    """The `transformers` tokenizer of a token store, carrying the chat template its documents are rendered by.

    Raises:
        ConfigError: it cannot be loaded, is not a fast tokenizer, or has no chat template.
    """
    tokenizer = _load(order.tokenizer) if order.tokenizer.name else _train(order.tokenizer)
    if order.template is not None:
        tokenizer.chat_template = chat.template_text(order.template)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer `{order.tokenizer.name}` has no chat template",
            "set `data.template` to chatml, plain, or a path to a Jinja file",
        )
    return tokenizer


def load_directory(directory: Path) -> Any:
    """A tokenizer saved by `save_pretrained`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _load(order: TokenizerOrder) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(order.name, revision=order.revision or "main")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = "check `model.tokenizer` (or `model.name`): a directory with tokenizer.json, or a hub id"
        raise ConfigError(f"cannot load tokenizer `{order.name}`: {reason}", hint) from None
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer `{order.name}` has no fast version", "packcli needs a tokenizer.json")
    return tokenizer


def _train(order: TokenizerOrder) -> Any:
    """A byte-level BPE of at most `vocab_size` tokens, learned from the training split alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template = chat.template_text(order.template)
    special = [END_OF_TEXT, *dict.fromkeys(_CONTROL.findall(template))]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=order.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for messages in _training_split(order) for message in messages]
    bpe.train_from_iterator([*texts, "system\n", "user\n", "assistant\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=special[1:],
        clean_up_tokenization_spaces=False,
    )


def _training_split(order: TokenizerOrder) -> list[chat.Messages]:
    kept, reasons = [], set()
    for messages in conversations(order.sources, order.mapping, order.max_documents):
        if isinstance(messages, chat.Rejected):
            reasons.add(str(messages))
        elif not chat.in_validation(chat.content_hash(messages), order.validation):
            kept.append(messages)
    if not kept:
        why = ", ".join(sorted(reasons)[:3]) or "the source is empty, or all of it is held out for validation"
        found = ", ".join(sources.names(order.sources))
        raise DataError(f"no usable conversation to train a tokenizer on in {found}: {why}", "see docs/data.md")
    return kept


def conversations(source_names: tuple[str, ...], mapping: dict[str, str] | None, max_documents: int | None) -> Any:
    """Each record as a conversation, or the `Rejected` that says why not; see `located` for where from."""
    return (messages for _, messages in located(source_names, mapping, max_documents))


def located(source_names: tuple[str, ...], mapping: dict[str, str] | None, max_documents: int | None) -> Any:
    """(record, conversation or `Rejected`) for the first `max_documents` records."""
    files = sources.names(source_names)
    schemas: dict[int, chat.Schema] = {}
    for count, record in enumerate(sources.records(source_names)):
        if count == max_documents:
            return
        value = _mapped(record.value, mapping)
        if record.file not in schemas:
            schemas[record.file] = chat.detect(value, f"{files[record.file]}:{record.number}")
        try:
            yield record, chat.conversation(value, schemas[record.file])
        except chat.Rejected as reason:
            yield record, reason


def _mapped(value: Any, mapping: dict[str, str] | None) -> Any:
    """`mapping`: the field packcli knows -> the name it has in the file."""
    if not mapping or not isinstance(value, dict):
        return value
    renamed = {ours: value[theirs] for ours, theirs in mapping.items() if theirs in value}
    return {**{key: inner for key, inner in value.items() if key not in mapping.values()}, **renamed}
