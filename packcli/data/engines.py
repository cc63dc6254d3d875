"""Texts to token ids by the fastest library that is exact for a tokenizer; `tokenizers` says what exact is.

gigatoken    byte-level BPE with a split it knows by name; 20 to 40 times as fast as `tokenizers`
tiktoken     byte-level BPE with one split and merges in the order of their ids; 3 to 4 times
tokenizers   everything

An engine refuses a tokenizer for which it is not known to be exact. What is left after that is checked on real
documents (`encode.Encoder.compare`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Engine = Literal["gigatoken", "tiktoken", "tokenizers"]
ENGINES: tuple[Engine, ...] = ("gigatoken", "tiktoken", "tokenizers")

Flat = tuple[NDArray[np.int32], NDArray[np.int64]]
"""ids [T] of D texts end to end, and offsets [D + 1], where each text begins."""

# What `ByteLevel` splits by when it splits by itself: GPT-2's.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Refused(Exception):
    """An engine is not installed or not known to be exact for this tokenizer; the text says why."""


def reference(backend: Any) -> Any:
    """A `tokenizers.Tokenizer` with the ids of `backend`, its true offsets, and no truncation or padding.

    No post-processor: BOS is the template's to write, and some of them trim white space off offsets. The model is
    shared, not copied.
    """
    from tokenizers import Tokenizer

    bare = Tokenizer(backend.model)
    if backend.normalizer is not None:
        bare.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        bare.pre_tokenizer = backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        (bare.add_special_tokens if token.special else bare.add_tokens)([token])
    if bare.get_added_tokens_decoder().keys() == added.keys():
        return bare
    # Added tokens with gaps between their ids: only a full copy keeps those.
    whole = Tokenizer.from_str(backend.to_str())
    whole.no_truncation()
    whole.no_padding()
    whole.post_processor = None
    return whole


def batch_of(tokenizer: Any, texts: list[str], *, offsets: bool) -> list[Any]:
    """`tokenizers.Encoding`s of `texts`, in this thread alone: there is one process for each core."""
    with _one_thread():
        encode = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
        return list(encode(texts, add_special_tokens=False))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def token_bytes(backend: Any) -> NDArray[np.int32]:
    """[V] int32: how many bytes of UTF-8 each token stands for, which a byte-level BPE's ids tell.

    Raises:
        Refused: ids do not tell, since this tokenizer is not byte-level or changes the text.
    """
    _require_byte_level(backend)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int32)
    # In the vocabulary every byte is written as one character.
    sizes[list(vocabulary.values())] = list(map(len, vocabulary))
    for id_, token in backend.get_added_tokens_decoder().items():
        sizes[id_] = len(token.content.encode())
    return sizes


def _require_byte_level(backend: Any) -> None:
    from tokenizers import models

    model = backend.model
    if not isinstance(model, models.BPE):
        raise Refused(f"the model is {type(model).__name__}, not BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if getattr(model, name):
            raise Refused(f"the model has `{name}`")
    if any(model.token_to_id(letter) is None for letter in _letters()):
        raise Refused("not every byte has a token")
    if _state(backend.normalizer) not in (None, {"type": "NFC"}):
        raise Refused(f"normalizer {_state(backend.normalizer)}")
    *splits, last = _pre_tokenizers(backend)
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise Refused("the pre-tokenizer is not byte-level, or adds a space")
    if any(split.get("type") not in ("Split", "Digits") or split.get("behavior") == "Removed" for split in splits):
        raise Refused("a pre-tokenizer that does more than split")
    _require_plain_tokens(backend)


def _require_plain_tokens(backend: Any) -> None:
    """Added tokens that every engine finds alike: no flags, and no two that could claim the same character."""
    added = list(backend.get_added_tokens_decoder().values())
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        raise Refused("an added token has lstrip, rstrip or single_word")
    texts = {token.content for token in added}
    if not all(unicodedata.is_normalized("NFC", text) for text in texts):
        raise Refused("an added token is not NFC")
    beginnings = {text[:stop] for text in texts for stop in range(1, len(text) + 1)}
    for text in texts:
        inner = {text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)} - {text}
        if inner & texts or any(text[i:] in beginnings for i in range(1, len(text))):
            raise Refused("one added token overlaps another")


def _pre_tokenizers(backend: Any) -> list[dict[str, Any]]:
    state = _state(backend.pre_tokenizer) or {}
    return (state.get("pretokenizers") or [{}]) if state.get("type") == "Sequence" else [state]


def _state(part: Any) -> Any:
    """A normalizer or pre-tokenizer as in tokenizer.json."""
    return None if part is None else json.loads(part.__getstate__())


def start(engine: Engine, backend: Any) -> Callable[[list[str]], Flat]:
    """What encodes a batch of texts, in this thread alone. `token_bytes` has not refused the tokenizer.

    Raises:
        Refused: this engine is not the one for it.
    """
    match engine:
        case "gigatoken":
            return _gigatoken(backend)
        case "tiktoken":
            return _tiktoken(backend)
        case "tokenizers":
            bare = reference(backend)
            return lambda texts: _flat([one.ids for one in batch_of(bare, texts, offsets=False)])


def _flat(parts: list[Any]) -> Flat:
    bounds = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(part, np.int32) for part in parts)]), bounds


def _gigatoken(backend: Any) -> Callable[[list[str]], Flat]:
    try:
        import gigatoken
    except ImportError:
        raise Refused("gigatoken is not installed") from None
    try:
        tokenizer = gigatoken.Tokenizer.from_json(backend.to_str())
    except Exception as error:  # whatever it says of a tokenizer that it does not know
        raise Refused(f"gigatoken: {(str(error).splitlines() or [type(error).__name__])[0]}") from None

    def encode(texts: list[str]) -> Flat:
        layout = tokenizer.encode_batch(texts, parallel=False).layout
        return np.asarray(layout.content.data).view(np.int32), np.asarray(layout.offsets.data)

    return encode


def _tiktoken(backend: Any) -> Callable[[list[str]], Flat]:
    try:
        import tiktoken
    except ImportError:
        raise Refused("tiktoken is not installed") from None
    special = {token.content: id_ for id_, token in backend.get_added_tokens_decoder().items()}
    encoding = tiktoken.Encoding(
        "packcli", pat_str=_one_split(backend), mergeable_ranks=_ranks(backend, special), special_tokens=special
    )
    pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def one(text: str, written: set[str]) -> NDArray[np.uint32]:
        try:
            ids: NDArray[np.uint32] = encoding.encode_to_numpy(
                text, allowed_special=written, disallowed_special=()
            )
        except ValueError:  # a run too long for its regular expressions; no ids, so the caller sees some missing
            ids = np.zeros(0, np.uint32)
        return ids

    def encode(texts: list[str]) -> Flat:
        # Only those that are there: each call copies the set, and a tokenizer may have hundreds.
        written = set(pattern.findall("".join(texts)))
        return _flat([one(text, written) for text in texts])

    return encode


def _one_split(backend: Any) -> str:
    match _pre_tokenizers(backend):
        case [{"use_regex": True}]:
            return _GPT2
        case [{"pattern": {"Regex": pattern}, "invert": False}, {"use_regex": False}]:
            return str(pattern)
    raise Refused("tiktoken: not exactly one split by a regular expression")


def _ranks(backend: Any, special: dict[str, int]) -> dict[bytes, int]:
    """Token bytes -> id, where ids say all that the merges say.

    tiktoken joins any two neighbours that make a token, the lowest id first; a BPE joins what its merges list, the
    first listed first. Both are the same if ids grow with the list and every token, encoded by itself, becomes
    itself: what is inside a token is then joined in one way only. Tokens that do not become themselves are never
    made from parts, if all the ways to split them are merges, but may be a whole word (`ignore_merges`).
    """
    from tokenizers import Tokenizer, models

    model = json.loads(backend.to_str())["model"]
    vocabulary = {token: id_ for token, id_ in model["vocab"].items() if token not in special}
    merges = [(left, right) for left, right in model["merges"]]
    made = [vocabulary.get(left + right, -1) for left, right in merges]
    if any(before > after for before, after in pairwise(made)):
        raise Refused("tiktoken: merges are not in the order of ids")
    tokens = list(vocabulary)
    alone = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges))
    lost = [
        token
        for token, encoding in zip(tokens, batch_of(alone, tokens, offsets=False), strict=True)
        if encoding.ids != [vocabulary[token]]
    ]
    splits = {
        (t[:i], t[i:]) for t in lost for i in range(1, len(t)) if t[:i] in vocabulary and t[i:] in vocabulary
    }
    if lost and not (model.get("ignore_merges") and splits <= set(merges)):
        raise Refused("tiktoken: tokens that their merges do not make")
    byte = {letter: value for value, letter in enumerate(_letters())}
    if not set().union(*tokens) <= byte.keys():
        raise Refused("tiktoken: a token that stands for no bytes")
    return {bytes(map(byte.__getitem__, token)): id_ for token, id_ in vocabulary.items()}


def _letters() -> list[str]:
    """How byte-level vocabularies write each of the 256 bytes: printable ones as they are (GPT-2's encoder.py)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(value if value in printable else next(others)) for value in range(256)]
