"""A tokenizer by name, or one trained on the data. Boundaries, ids and special tokens are its business alone."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

from packcli.data import chat, conversations, hub, render, sources
from packcli.errors import ConfigError, DataError, MissingError
from packcli.files import atomic_directory, read_json
from packcli.plan import TokenizerOrder, TokensOrder

_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"


def build(order: TokensOrder) -> Any:
    """The `transformers` tokenizer of a token store, carrying the chat template its documents are rendered by.

    Raises:
        ConfigError: it cannot be loaded, is not a fast tokenizer, or has no chat template.
    """
    tokenizer = _load(order.tokenizer) if order.tokenizer.name else _train(order.tokenizer)
    if order.template is not None:
        tokenizer.chat_template = render.template_text(order.template)
        if missing := render.missing_tokens(tokenizer.chat_template, tokenizer):
            name = order.tokenizer.name
            raise ConfigError(
                f"template `{order.template}` writes {', '.join(missing)}, which tokenizer `{name}` lacks",
                "set `data.template` to `plain`, or take a tokenizer that has them",
            )
    _check_template(tokenizer, order)
    return tokenizer


def _check_template(tokenizer: Any, order: TokensOrder) -> None:
    """Before any conversation is read: that there is a template, and that it can end a turn."""
    name, hint = order.tokenizer.name, "set `data.template` to chatml, plain, or a path to a Jinja file"
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # none, or several of which none is the default
        template = None
    if not template or not isinstance(template, str):
        raise ConfigError(f"tokenizer `{name}` has no chat template", hint)
    if order.template is None and "eos_token" in render.missing_tokens(template, tokenizer):
        raise ConfigError(
            f"the template of tokenizer `{name}` writes `eos_token`, and the tokenizer has none", hint
        )


def load_directory(directory: Path) -> Any:
    """A tokenizer saved by `save_pretrained`."""
    return _class(directory).from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def stored(directory: Path) -> Any:
    """The same, loaded once in a process: half a second for 128K tokens. Not to be changed by who takes it."""
    if directory not in _stored:
        _stored[directory] = load_directory(directory)
    return _stored[directory]


_stored: dict[Path, Any] = {}


def _class(directory: Path) -> Any:
    """What loads a directory. `AutoTokenizer` imports torch, which takes longer than many a preparation."""
    try:
        plain = read_json(directory / "tokenizer_config.json")["tokenizer_class"] in _PLAIN
    except (OSError, ValueError, KeyError, TypeError):
        plain = False
    if plain and not (directory / "config.json").exists():  # a model may ask for a class of its own
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


def _load(order: TokenizerOrder) -> Any:
    name = order.name or ""
    hint = "name a directory with tokenizer.json, or a hub id such as Qwen/Qwen2.5-0.5B"
    local = Path(name).is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"no tokenizer directory `{name}`", hint)
    online = local or _answers(name, order.revision)
    try:
        loader = _class(Path(name))
        # Said explicitly: unsaid, transformers asks on the terminal whether to run what comes with it.
        revision = order.revision or "main"
        tokenizer = loader.from_pretrained(
            name, revision=revision, local_files_only=not online, trust_remote_code=False
        )
    except Exception as error:  # what two libraries raise over a file of any content is no closed set
        if not online:
            offline = "connect, or name a directory that holds it"
            raise MissingError(
                f"the hub cannot be reached, and tokenizer `{name}` is not in its cache", offline
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"cannot load tokenizer `{name}`: {reason}", hint) from None
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer `{order.name}` has no fast version", "packcli needs a tokenizer.json")
    return tokenizer


def _answers(name: str, revision: str | None) -> bool:
    """Whether the hub answers within seconds; transformers alone would retry for a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().model_info(name, revision=revision, timeout=hub.TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError):
        return True  # what it said comes again when the files are asked for
    except Exception:  # whatever the HTTP library of this version raises: no answer came
        return False
    return True


def _train(order: TokenizerOrder) -> Any:
    """A byte-level BPE of at most `vocab_size` tokens, learned from the training split alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template = render.template_text(order.template)
    special = [END_OF_TEXT, *render.control_tokens(template)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=order.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _train_on(chain(_training_split(order), ("system\n", "user\n", "assistant\n")), bpe, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=special[1:],
        clean_up_tokenization_spaces=False,
    )


def _train_on(texts: Iterator[str], bpe: Any, trainer: Any) -> None:
    """Learn from texts while they are read; here, as the threads of a trainer that reads hear no Ctrl-C."""
    waiting: queue.Queue[list[str] | BaseException | None] = queue.Queue(_BATCHES)

    def given() -> Iterator[list[str]]:
        while isinstance(item := waiting.get(), list):
            yield item
        if item is not None:
            raise item

    def hand(item: list[str] | BaseException | None) -> None:
        while not trained.done():  # it ends early where it fails: nobody takes any more then
            with contextlib.suppress(queue.Full):
                return waiting.put(item, timeout=1)

    with ThreadPoolExecutor(1) as thread:
        trained = thread.submit(bpe.train_from_iterator, given(), trainer)
        try:
            while batch := list(islice(texts, _BATCH)):
                hand(batch)
        except BaseException as error:
            hand(error)
            raise
        hand(None)
        trained.result()


# Texts that wait to be learned from.
_BATCHES, _BATCH = 4, 256


def _training_split(order: TokenizerOrder) -> Iterator[str]:
    """What the messages say, one after another: all of them at once may be more than memory holds."""
    kept, reasons = 0, set()
    for _, found in conversations.everything(order.sources, order.max_documents):
        if isinstance(found, chat.Rejected | DataError):
            reasons.add(str(found))
        elif isinstance(found, conversations.Tokenized):
            fix = "name the tokenizer it was made with: `model.tokenizer`, or --tokenizer"
            raise ConfigError("the data is tokenized already: no tokenizer can be learned from it", fix)
        elif isinstance(found, list) and not chat.in_validation(chat.content_hash(found), order.validation):
            kept += 1
            yield from (message["content"] for message in found)
    if not kept:
        why = ", ".join(sorted(reasons)[:3]) or "the source is empty, or all of it is held out for validation"
        found_in = ", ".join(sources.names(order.sources))
        raise DataError(f"no usable conversation to train a tokenizer on in {found_in}: {why}", "see docs/data.md")


def prepare(order: TokensOrder, directory: Path) -> None:
    """Put the tokenizer of an order into `directory`, unless it is there."""
    if not (directory / _FILE).exists():
        tokenizer = build(order)
        with atomic_directory(directory, replace=False) as unfinished:
            tokenizer.save_pretrained(unfinished)
        if order.tokenizer.name:  # what comes back from disk is the same, half a second later
            _stored[directory] = tokenizer
