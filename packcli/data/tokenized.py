"""Records that are tokenized already: rows of token ids, padded or packed or neither, back into documents.

What is trained on is said by `labels` (-100: not trained on), else by `assistant_masks` and `completion_mask`
(both, where both are there), else it is every token. Padding is what `attention_mask` says, else what follows
the documents. Where a row holds several documents, the first of these that is there says where each begins:
`document_lengths`, `seq_lengths`, `position_ids` that do not go on by one; and `attention_mask` where it numbers
documents (1, 1, 2, 2, 0). What `packcli.data.export` wrote comes back as it was, but for documents it had to
cut: their pieces come back as documents of their own, since nothing says that they belong together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packcli.data import chat
from packcli.data.encode import Encoded

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_IGNORED = -100
_LARGEST = np.iinfo(np.int32).max
# Part of what "the same document" means: changing it moves documents between training and validation.
_CONTENT_SALT = b"packcli tokenized 1\n"


@dataclass(frozen=True, slots=True)
class Document:
    """`ids` [T] int32; `spans` [P, 2] int32, start and stop of each run of tokens that is trained on, maybe none.

    The first token of a document is in no span: nothing comes before it that could predict it.
    """

    ids: NDArray[np.int32]
    spans: NDArray[np.int32]


def documents(record: Mapping[str, Any]) -> list[Document]:
    """The documents of one row, in order, padding gone. Those without a supervised token are among them.

    Raises:
        chat.Rejected: token ids that are none, columns of different lengths, labels that are not the ids, lengths
            that do not add up, or no supervised token in the whole row.
    """
    if not isinstance(record, Mapping):
        raise chat.Rejected("the record is not an object")
    ids = _column(record, "input_ids")
    if ids is None or not len(ids):
        raise chat.Rejected(f"`input_ids` is {'missing' if ids is None else 'empty'}")
    if ids.min() < 0 or ids.max() > _LARGEST:
        raise chat.Rejected(f"`input_ids` holds {ids.min() if ids.min() < 0 else ids.max()}, which is no token id")
    trained = _trained(record, ids)
    there, owner = _owners(record, ids, trained)
    ids, trained = ids[there], trained[there]
    begin = np.diff(owner, prepend=-1) != 0
    trained &= ~begin
    if not trained.any():
        raise chat.Rejected("no supervised token")
    bounds = [*np.flatnonzero(begin).tolist(), len(ids)]
    return [
        Document(ids[first:last].astype(np.int32), _spans(trained[first:last])) for first, last in pairwise(bounds)
    ]


def _column(record: Mapping[str, Any], name: str, length: int | None = None) -> Ints | None:
    """A field as [T] int64; None where it is missing or null."""
    value = record.get(name)
    if value is None:
        return None
    try:
        found = np.asarray(value)
    except ValueError:  # lists of different lengths
        found = np.zeros((0, 0))
    if found.ndim != 1 or (len(found) and found.dtype.kind not in "iub"):
        raise chat.Rejected(f"`{name}` is not a list of whole numbers")
    if length is not None and len(found) != length:
        raise chat.Rejected(f"`{name}` has {len(found):,} values, `input_ids` has {length:,}")
    if found.dtype.kind == "u" and len(found) and found.max() > np.iinfo(np.int64).max:
        raise chat.Rejected(f"`{name}` holds {found.max()}, which is too large")  # as int64 it would be negative
    return found.astype(np.int64)


def _trained(record: Mapping[str, Any], ids: Ints) -> Bools:
    """[T] bool: which tokens are trained on."""
    labels = _column(record, "labels", len(ids))
    if labels is not None:
        trained: Bools = labels != _IGNORED
        if (wrong := np.flatnonzero(trained & (labels != ids))).size:
            at = int(wrong[0])
            raise chat.Rejected(
                f"`labels[{at}]` is {labels[at]}, `input_ids[{at}]` {ids[at]}: neither -100 nor equal"
            )
        return trained
    everything = np.ones(len(ids), bool)
    for name in ("assistant_masks", "completion_mask"):
        mask = _column(record, name, len(ids))
        if mask is not None:
            everything &= mask != 0
    return everything


def _owners(record: Mapping[str, Any], ids: Ints, trained: Bools) -> tuple[Ints, Ints]:
    """Places of the row that are no padding, and the document each belongs to: both [K] int64, K <= T."""
    mask = _column(record, "attention_mask", len(ids))
    places = np.arange(len(ids)) if mask is None else np.flatnonzero(mask)
    lengths = _column(record, "document_lengths")
    if lengths is None:
        lengths = _column(record, "seq_lengths")
    if lengths is not None:
        places, owner = _by_lengths(lengths, places, trained)
    else:
        if mask is None:
            places = places[: _unpadded(ids, trained)]
        positions = _column(record, "position_ids", len(ids))
        ahead = np.arange(len(ids)) if positions is None else positions
        owner = np.cumsum(np.diff(ahead[places], prepend=-1) != 1)
    if not len(places):
        raise chat.Rejected("nothing but padding")
    if mask is not None:
        # Several documents numbered in the mask, or padding between two: a new one either way.
        owner = owner + np.cumsum((np.diff(mask[places], prepend=1) != 0) | (np.diff(places, prepend=-1) > 1))
    return places, owner


def _by_lengths(lengths: Ints, places: Ints, trained: Bools) -> tuple[Ints, Ints]:
    """Lengths count the whole row, its padding as the last document, or what is no padding of it."""
    if (lengths < 0).any():
        raise chat.Rejected("a document's length is negative")
    if (total := sum(lengths.tolist())) > len(trained):  # before so many places are made
        raise chat.Rejected(f"documents of {total:,} tokens in a row of {len(places):,}")
    owner = np.repeat(np.arange(len(lengths)), lengths)
    if len(owner) == len(trained):
        return places, owner[places]
    if len(owner) > len(places) or trained[places[len(owner) :]].any():
        raise chat.Rejected(f"documents of {len(owner):,} tokens in a row of {len(places):,}")
    return places[: len(owner)], owner


def _unpadded(ids: Ints, trained: Bools) -> int:
    """Tokens before the padding of a row that does not say what is padding.

    Two or more equal tokens at its end that are not trained on. Were they none, no loss would change: nothing
    that is trained on comes after them.
    """
    other = np.flatnonzero((ids != ids[-1]) | trained)
    kept = int(other[-1]) + 1 if len(other) else 0
    return kept if len(ids) - kept > 1 else len(ids)


def _spans(trained: Bools) -> NDArray[np.int32]:
    edges = np.diff(trained.astype(np.int8), prepend=0, append=0)
    return np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)], axis=1).astype(np.int32)


def content_hash(document: Document) -> int:
    """64 bits of a salted sha256 of the ids; decides validation, as `chat.content_hash` does for conversations."""
    return int.from_bytes(hashlib.sha256(_CONTENT_SALT + document.ids.astype("<i4").tobytes()).digest()[:8], "big")


def encoded(given: Sequence[Document]) -> Encoded:
    """Documents in the form that a token store is made of."""
    return Encoded(
        ids=np.concatenate([np.zeros(0, np.int32), *(document.ids for document in given)]),
        offsets=np.cumsum([0, *(len(document.ids) for document in given)], dtype=np.int64),
        spans=np.concatenate([np.zeros((0, 2), np.int32), *(document.spans for document in given)]),
        span_offsets=np.cumsum([0, *(len(document.spans) for document in given)], dtype=np.int64),
    )
