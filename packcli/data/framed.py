"""Documents between boundary tokens. A row index counts places in these, the token store knows nothing of them.

A boundary token is never supervised. What is trained, packed or exported is read through here; validation is not,
so that its loss compares between arms.

marks    which tokens stand around documents
Framed   their lengths and spans, all at once: for the packer, the ledger and the weights of a loss
reader   their tokens, one document at a time: for batches, exports and pictures
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from packcli.errors import ConfigError

Ints = NDArray[np.int64]
Boundary = Literal["none", "eos", "bos_eos"]


@dataclass(frozen=True, slots=True)
class Marks:
    """Token ids put before and after a document; None: nothing."""

    before: int | None = None
    after: int | None = None


NONE = Marks()


def marks(boundary: Boundary, tokenizer: Callable[[], Any]) -> Marks:
    """What stands around documents. `tokenizer` is loaded only if it is asked.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    if boundary == "none":
        return NONE
    loaded = tokenizer()
    wanted = ("bos", "eos") if boundary == "bos_eos" else ("eos",)
    ids = {name: getattr(loaded, f"{name}_token_id") for name in wanted}
    if missing := [name for name, id_ in ids.items() if id_ is None]:
        raise ConfigError(
            f"`boundary: {boundary}` needs a token that this tokenizer lacks: {' and '.join(missing)}",
            "take `boundary: eos` or `none`, or another tokenizer",
        )
    return Marks(ids.get("bos"), ids["eos"])


class Spanned(Protocol):
    """D documents and what is supervised of them."""

    @property
    def num_documents(self) -> int: ...

    @property
    def lengths(self) -> Ints:
        """[D] int64: tokens of each."""

    @property
    def spans(self) -> tuple[Ints, Ints, Ints]:
        """(document, start, stop), each [P] int64: every supervised span, in document order."""


class Documents(Spanned, Protocol):
    """What packing needs to know of D documents; `Tokens` is one."""

    @property
    def content(self) -> NDArray[np.uint64]:
        """[D] uint64: the hash that decides validation."""

    @property
    def ends(self) -> tuple[Ints, Ints]:
        """(first, last), each [D] int64: the token id each begins with and the one it ends with."""


class Framed:
    """D documents with their marks, places and lengths counted with them: what is packed.

    A mark that a document begins or ends with already is not put there again. `bare`: the documents without marks;
    `before`, `after` [D] int64: how many tokens are put there, 0 or 1; `lengths` [D] int64.
    """

    def __init__(self, documents: Documents, marks: Marks) -> None:
        self.bare = documents
        self.before = self.after = np.zeros(documents.num_documents, np.int64)
        if marks != NONE:
            first, last = documents.ends
            self.before = _put(first, marks.before)
            self.after = _put(last, marks.after)
        self.lengths = documents.lengths + self.before + self.after

    @property
    def num_documents(self) -> int:
        return self.bare.num_documents

    @property
    def spans(self) -> tuple[Ints, Ints, Ints]:
        """(document, start, stop), each [P] int64: every supervised span, in document order."""
        document, start, stop = self.bare.spans
        return document, start + self.before[document], stop + self.before[document]

    def tokens(self, document: Ints, start: Ints | int, stop: Ints) -> Ints:
        """[S] int64: how many tokens of the documents themselves lie in these pieces."""
        first, last = self.before[document], self.lengths[document] - self.after[document]
        return np.asarray(np.clip(stop, first, last) - np.clip(start, first, last))


def _put(there: Ints, mark: int | None) -> Ints:
    return (there != mark).astype(np.int64) if mark is not None else np.zeros_like(there)


class Reader(Protocol):
    """One document at a time; `Tokens` is one."""

    def ids(self, document: int) -> NDArray[np.int32]:
        """[T] int32: the tokens of one document."""

    def supervised(self, document: int) -> NDArray[np.int32]:
        """[P, 2] int32: start and stop of each supervised span of one document."""


@dataclass(frozen=True, slots=True)
class _FramedReader:
    bare: Reader
    marks: Marks

    def ids(self, document: int) -> NDArray[np.int32]:
        """[T] int32: the tokens of one document, marks included."""
        ids = self.bare.ids(document)
        return np.concatenate([self._before(ids), ids, self._after(ids)])

    def supervised(self, document: int) -> NDArray[np.int32]:
        """[P, 2] int32: start and stop of each supervised span of one document."""
        spans = self.bare.supervised(document)
        return spans + np.int32(len(self._before(self.bare.ids(document))))

    def _before(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        return _unless(ids[0], self.marks.before)

    def _after(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        return _unless(ids[-1], self.marks.after)


def _unless(there: np.int32, mark: int | None) -> NDArray[np.int32]:
    return np.array([] if mark is None or there == mark else [mark], np.int32)


def reader(documents: Reader, marks: Marks) -> Reader:
    """The documents as an index made with these marks counts them."""
    return documents if marks == NONE else _FramedReader(documents, marks)
