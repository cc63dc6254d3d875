"""Rendered documents as token ids and supervised token spans, by the fastest tokenizer that is exact.

A batch goes through one engine (`engines.py`) in one call, and spans are found for all of it at once: the ids of a
byte-level BPE tell how many bytes each token stands for, so where a token begins is a sum. Documents for which
this is not known to hold, and tokenizers of other kinds, go the slow way: `tokenizers`, with its offsets.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from packcli.data import engines
from packcli.data.engines import ENGINES, Engine
from packcli.data.guard import Guard, Offsets
from packcli.data.render import Rendered, special_tokens
from packcli.errors import ConfigError, DataError
from packcli.log import logger

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Encoded:
    """D documents, T tokens, P supervised spans, in CSR form.

    ids            [T] int32, all documents end to end; offsets [D + 1] int64, where each begins
    spans          [P, 2] int32, start and stop of each supervised span within its document
    span_offsets   [D + 1] int64, where each document's spans begin
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    spans: NDArray[np.int32]
    span_offsets: NDArray[np.int64]


class EngineDiffers(Exception):
    """An engine failed, or gave other ids or spans than `tokenizers`. The encoder has left it: encode again."""


class Encoder:
    """A tokenizer, and what encodes for it.

    engine   gigatoken, tiktoken or tokenizers: what is used now. Changes by itself where one proves inexact.
    """

    engine: Engine

    def __init__(self, tokenizer: Any, engine: Literal["auto", "gigatoken", "tiktoken", "tokenizers"] = "auto"):
        """`engine`: the first to try, with the slower ones to fall back on.

        Raises:
            ConfigError: `engine` names one that is not installed or not known to be exact for this tokenizer.
        """
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        self._reference = engines.reference(self._backend)
        self._guard: Guard | None = None
        size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self._special = np.zeros(size, bool)
        control = map(self._backend.token_to_id, special_tokens(tokenizer))
        self._special[[id_ for id_ in control if id_ is not None]] = True
        self._composes = self._backend.normalizer is not None
        self._start(ENGINES[0] if engine == "auto" else engine)
        if engine not in ("auto", self.engine):
            raise ConfigError(
                f"`{engine}` cannot encode for this tokenizer: {self._reasons[0]}", "let `auto` choose"
            )

    def _start(self, first: Engine) -> None:
        """Use the first engine, from `first` on, that does not refuse the tokenizer."""
        self._reasons: list[str] = []
        self._bytes: NDArray[np.int32] | None = None
        self.engine = "tokenizers"
        try:
            self._bytes = engines.token_bytes(self._backend)
        except engines.Refused as reason:
            self._reasons.append(str(reason))
            return
        for engine in ENGINES[ENGINES.index(first) :]:
            try:
                self._encode, self.engine = engines.start(engine, self._backend), engine
                break
            except engines.Refused as reason:
                self._reasons.append(str(reason))
        logger.debug("tokenizing with %s %s", self.engine, self._reasons or "")

    def __reduce__(self) -> Any:
        return Encoder, (self._tokenizer, self.engine)

    def encode(self, documents: Sequence[Rendered], *, closed: bool = True) -> Encoded:
        """ids as `tokenizers` makes them of each text, no token added; and character spans as token spans.

        A span begins with the first token that begins in it: one that straddles the end of the prompt is the
        template's. It ends with the last special token in it, which only white space may follow; with
        `closed=False`, with its last token. The first token of a document is never in a span: nothing comes
        before it that could predict it. Empty spans are left out.

        Raises:
            DataError: a span without a special token at its end, so that a model would never learn to stop.
            EngineDiffers: the engine failed.
        """
        if self._bytes is None or not documents:
            return self._slow(documents, closed)
        encoded, doubtful = self._fast(documents, closed, self._bytes)
        if not doubtful.any():
            return encoded
        slow = self._slow([documents[n] for n in np.flatnonzero(doubtful).tolist()], closed)
        return _merged(encoded, slow, doubtful)

    def compare(self, documents: Sequence[Rendered], *, closed: bool = True) -> None:
        """Encode both ways.

        Raises:
            DataError: as `encode` does.
            EngineDiffers: ids or spans differ; the next engine is in use now.
        """
        if self._bytes is None:
            return
        expected, found = self._slow(documents, closed), self.encode(documents, closed=closed)
        number = _first_difference(expected, found)
        if number is not None:
            self._leave(f"differs from `tokenizers` on document {number} of {len(documents)} compared")

    def _leave(self, why: str) -> NoReturn:
        left = self.engine
        if left == ENGINES[-1]:
            self._bytes = None  # it is its own measure of ids, so the spans were wrong: take its offsets
        else:
            self._start(ENGINES[ENGINES.index(left) + 1])
        logger.warning("%s %s: tokenizing with %s from here on", left, why, self.engine)
        raise EngineDiffers(left, why)

    def _fast(
        self, documents: Sequence[Rendered], closed: bool, token_bytes: NDArray[np.int32]
    ) -> tuple[Encoded, Bools]:
        """All documents by the engine, and [D] which of them must go the slow way."""
        ids, offsets = self._by_engine([document.text for document in documents])
        edges = np.zeros(len(ids) + 1, np.int64)  # where each token begins and the last one ends, in bytes
        np.cumsum(token_bytes[ids], out=edges[1:])
        base = edges[offsets]
        owner, spans, sizes, doubtful = _in_bytes(documents, composes=self._composes)
        doubtful |= np.diff(base) != sizes
        first, last = (spans + base[owner, None]).T
        start, stop = np.searchsorted(edges[:-1], first), np.searchsorted(edges[:-1], last)
        if closed:
            special = np.concatenate([np.full(1, -1), np.flatnonzero(self._special[ids])])
            stop = special[np.searchsorted(special, stop) - 1] + 1
            found = stop > start
            for n in np.flatnonzero(found & (edges[stop] < last)).tolist():
                rest = slice(edges[stop[n]] - base[owner[n]], last[n] - base[owner[n]])
                found[n] = documents[owner[n]].text.encode()[rest].decode(errors="replace").isspace()
            doubtful[owner[~found]] = True
        start = np.maximum(start, offsets[owner] + 1)
        kept = start < stop
        owner = owner[kept]
        tokens = np.stack([start[kept], stop[kept]], axis=1) - offsets[owner, None]
        counts = np.bincount(owner, minlength=len(documents))
        return Encoded(ids, offsets, tokens.astype(np.int32), _bounds(counts)), doubtful

    def _by_engine(self, texts: list[str]) -> engines.Flat:
        try:
            return self._encode(texts)
        except BaseException as error:
            # A panic of a library written in Rust is no Exception.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                self._leave(f"failed ({type(error).__name__})")
            raise

    def _slow(self, documents: Sequence[Rendered], closed: bool) -> Encoded:
        """All documents by `tokenizers`, spans by its offsets."""
        plain = [document.text for document in documents if not document.guarded]
        encodings = iter(engines.batch_of(self._reference, plain, offsets=True))
        ids, spans = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)]
        for document in documents:
            if document.guarded:
                if self._guard is None:
                    self._guard = Guard(self._backend, special_tokens(self._tokenizer))
                found, offsets, document = self._guard.encode(document)
            else:
                encoding = next(encodings)
                found, offsets = encoding.ids, encoding.offsets
            ids.append(np.asarray(found, np.int32))
            spans.append(_by_offsets(document, offsets, self._special[ids[-1]], closed=closed))
        return Encoded(
            ids=np.concatenate(ids),
            offsets=_bounds(list(map(len, ids[1:]))),
            spans=np.concatenate(spans),
            span_offsets=_bounds(list(map(len, spans[1:]))),
        )


def _by_offsets(document: Rendered, offsets: Offsets, special: Bools, *, closed: bool) -> NDArray[np.int32]:
    """[P, 2] int32: the token spans of one document; `special` [T] says which of its tokens are control tokens."""
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    spans = []
    for first, last in document.spans:
        if first == last:
            continue
        start, stop = np.searchsorted(starts, (first, last)).tolist()
        # A token of no characters, or of the prompt's last white space alone, may claim to begin where that ends.
        start = max(start, int(np.searchsorted(ends, first, side="right")))
        if closed:
            while stop > start and not special[stop - 1]:
                stop -= 1
            # Only white space may follow: else it opens the turn, or stands inside it, and ends nothing.
            if stop <= start or document.text[ends[stop - 1] : last].strip():
                raise DataError(
                    "the chat template closes an assistant turn without a special token: no stop would be learned",
                    "set `data.template`, for example to chatml",
                )
        if (start := max(start, 1)) < stop:
            spans.append((start, stop))
    return np.asarray(spans, np.int32).reshape(-1, 2)


def _in_bytes(documents: Sequence[Rendered], *, composes: bool) -> tuple[Ints, Ints, Ints, Bools]:
    """Where things are in the documents' UTF-8.

    Returns the owner of each span that is not empty [P], its start and stop in bytes [P, 2], the bytes of each
    document [D], and which documents are not to be trusted to an engine [D]: guarded ones, those that a normalizer
    would change (`composes`: NFC), and those with characters that not every engine may know.
    """
    texts = [document.text for document in documents]
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    doubtful = np.fromiter((document.guarded for document in documents), bool, len(texts))
    owner = np.repeat(np.arange(len(texts)), [len(document.spans) for document in documents])
    edges = chain.from_iterable(chain.from_iterable(document.spans for document in documents))
    spans = np.fromiter(edges, np.int64, 2 * len(owner)).reshape(-1, 2)
    filled = spans[:, 0] < spans[:, 1]
    owner, spans = owner[filled], spans[filled]
    # A byte is a character in ASCII, so only the others are looked at: all characters of these, end to end.
    wide = np.asarray([number for number, text in enumerate(texts) if not text.isascii()], np.int64)
    if len(wide):
        codes = np.frombuffer("".join([texts[number] for number in wide]).encode("utf-32-le"), "<u4")
        before = np.zeros(len(codes) + 1, np.int64)
        np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF), out=before[1:])
        begin = _bounds(sizes[wide])
        base = np.full(len(texts), -1)
        base[wide] = begin[:-1]
        mine = base[owner] >= 0
        at = base[owner[mine], None]
        spans[mine] = before[at + spans[mine]] - before[at]
        sizes[wide] = np.diff(before[begin])
        doubtful[wide] |= np.logical_or.reduceat(_unassigned(codes), begin[:-1])
        if composes:
            doubtful[wide] |= [not unicodedata.is_normalized("NFC", texts[number]) for number in wide]
    return owner, spans, sizes, doubtful


# 1: Python's Unicode knows this character, 2: it does not, 0: not looked up yet.
_KNOWN = np.zeros(0x110000, np.uint8)


def _unassigned(codes: NDArray[np.uint32]) -> Bools:
    """Whether each is no character yet, or one newer than Python's Unicode.

    Libraries that follow different versions of Unicode disagree on whether such a one is a letter, a number or
    neither (measured: gigatoken 0.10 against tokenizers 0.23 on the numbers new in Unicode 17).
    """
    for code in np.unique(codes[_KNOWN[codes] == 0]).tolist():
        _KNOWN[code] = 2 if unicodedata.category(chr(code)) == "Cn" else 1
    return np.asarray(_KNOWN[codes] == 2)


def _bounds(counts: Any) -> Ints:
    """[N + 1] int64: where each of N parts begins, end to end, and the end."""
    bounds = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=bounds[1:])
    return bounds


def _merged(fast: Encoded, slow: Encoded, is_slow: Bools) -> Encoded:
    """The documents of `fast`, but in their place those of `slow` where `is_slow` [D]."""

    def merge(a: Any, a_bounds: Ints, b: Any, b_bounds: Ints) -> tuple[Any, Ints]:
        counts = np.diff(a_bounds)
        kept = a[np.repeat(~is_slow, counts)]
        counts[is_slow] = np.diff(b_bounds)
        place = np.repeat(is_slow, counts)
        out = np.empty((len(place), *a.shape[1:]), a.dtype)
        out[~place], out[place] = kept, b
        return out, _bounds(counts)

    ids, offsets = merge(fast.ids, fast.offsets, slow.ids, slow.offsets)
    return Encoded(ids, offsets, *merge(fast.spans, fast.span_offsets, slow.spans, slow.span_offsets))


def _first_difference(a: Encoded, b: Encoded) -> int | None:
    """The first document whose ids or spans are not the same in both."""

    def parts(encoded: Encoded, number: int) -> tuple[list[int], list[list[int]]]:
        ids = encoded.ids[encoded.offsets[number] : encoded.offsets[number + 1]]
        spans = encoded.spans[encoded.span_offsets[number] : encoded.span_offsets[number + 1]]
        return ids.tolist(), spans.tolist()

    count = len(a.offsets) - 1
    return next((number for number in range(count) if parts(a, number) != parts(b, number)), None)
