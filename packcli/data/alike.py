"""Which documents are alike: by a field of their records, by what they are about, by what they say.

All of it works on the token ids of the store, on their first `max_length`, a block at a time: beside the block and
a sample of fixed size, memory holds a label or a few hashes a document. Held-out documents are grouped with the
rest, and lie in no row. What is drawn is drawn by the seed of the run, RNG(seed, "group"): other seeds find other
groups in the same documents. The arithmetic runs on one thread, so the number of cores changes nothing.

    field             the records say the same there; all that say nothing are one group
    similarity        clusters: tf-idf of token ids, latent semantic analysis, k-means, fitted on a sample
                      (scikit-learn's, as its guide on clustering text has it)
    adversarial       the same clusters, and how like they are: the cosine of their centres
    near_duplicates   MinHash over runs of five tokens, in bands (Broder 1997; Leskovec, Rajaraman, Ullman, Mining
                      of Massive Datasets, 3.4): documents that share 90% of their runs meet in a band with
                      probability 0.99, at 80% 0.77, at 50% 0.03. Who meets is a group; whoever meets any of
                      it joins
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from packcli.data.tokens import Tokens
from packcli.errors import DataError, MissingError
from packcli.grouping import Groups
from packcli.plan import IndexOrder
from packcli.seeds import integer, rng

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Note = Callable[[int, int, str], None]

_SAMPLE_DOCUMENTS, _SAMPLE_TOKENS = 1 << 15, 1 << 23
_TOPICS = 64  # dimensions of the latent space
_MOST_CLUSTERS = 1024
# Rows that a cluster fills on average: few enough that they are alike, enough that its documents fill them.
_ROWS_A_CLUSTER = 8
_RUN = 5
_BANDS, _BAND = 8, 8


def groups(order: IndexOrder, tokens: Tokens, vocabulary: int, note: Note) -> Groups | None:
    """The groups of `order.layout.group_by`; None where there are none.

    Raises:
        ConfigError: the store does not keep that field.
        DataError: no record has it.
        MissingError: similarity without scikit-learn.
    """
    match order.layout.group_by:
        case "none":
            return None
        case "similarity":
            return Groups(_clusters(order, tokens, vocabulary, note)[0])
        case "adversarial":
            return Groups(*_clusters(order, tokens, vocabulary, note))
        case "near_duplicates":
            return Groups(_near_duplicates(order, tokens, note))
        case field:
            of, said = tokens.field(field)
            if not any(said):
                raise DataError(f"no record has a field `{field}`", "name one in `group_by` that the data has")
            return Groups(of)


def said(tokens: Tokens, field: str) -> Ints:
    """[D] int64: a number for what each document's record says in a kept field, -1 where it says nothing."""
    of, values = tokens.field(field)
    return np.where(np.array([value is None for value in values], bool)[of], -1, of)


def _clusters(order: IndexOrder, tokens: Tokens, vocabulary: int, note: Note) -> tuple[Ints, NDArray[np.float32]]:
    """([D] cluster of each document, [G, G] cosine of the clusters' centres)."""
    try:
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfTransformer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer
        from threadpoolctl import threadpool_limits
    except ImportError:
        cause = f"`group_by: {order.layout.group_by}` needs the package `scikit-learn`"
        raise MissingError(cause, "pip install 'packcli[related]'") from None
    sample = _sample(order, tokens, vocabulary)
    rows = int(np.minimum(tokens.lengths, order.max_length).sum()) // order.max_length
    count = min(max(2, rows // _ROWS_A_CLUSTER), _MOST_CLUSTERS, sample.shape[0])
    topics = min(_TOPICS, *(size - 1 for size in sample.shape))
    if count < 2 or topics < 1:
        return np.zeros(tokens.num_documents, np.int64), np.ones((1, 1), np.float32)
    seed = integer(order.seed, "group") % 2**32
    note(0, tokens.num_documents, "finding topics in a sample")
    with threadpool_limits(limits=1):
        space = make_pipeline(
            TfidfTransformer(sublinear_tf=True),
            TruncatedSVD(topics, random_state=seed),
            Normalizer(copy=False),
        )
        sampled = space.fit_transform(sample).astype(np.float32)
        found = MiniBatchKMeans(count, random_state=seed, batch_size=4096, n_init=3).fit(sampled)
        label, done = np.zeros(tokens.num_documents, np.int64), 0
        for ids, offsets in tokens.blocks(order.max_length):
            inside = space.transform(_counts(ids, offsets, vocabulary)).astype(np.float32)
            label[done : done + len(inside)] = found.predict(inside)
            done += len(inside)
            note(done, tokens.num_documents, "by similarity")
    centres = Normalizer().transform(found.cluster_centers_)
    return label, (centres @ centres.T).astype(np.float32)


def _sample(order: IndexOrder, tokens: Tokens, vocabulary: int) -> Any:
    """Token counts of documents drawn by the seed, so many as a fixed number of tokens allows."""
    drawn = rng(order.seed, "group").permutation(tokens.num_documents)[:_SAMPLE_DOCUMENTS]
    ends = np.cumsum(np.minimum(tokens.lengths[drawn], order.max_length))
    drawn = np.sort(drawn[: max(1, int(np.searchsorted(ends, _SAMPLE_TOKENS, side="right")))])
    parts = [tokens.ids(int(number))[: order.max_length] for number in drawn]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return _counts(np.concatenate(parts).astype(np.int64), offsets, vocabulary)


def _counts(ids: Ints, offsets: Ints, vocabulary: int) -> Any:
    """[N, V] sparse float32: how often each document holds each token."""
    found = sparse.csr_matrix((np.ones(len(ids), np.float32), ids, offsets), (len(offsets) - 1, vocabulary))
    found.sum_duplicates()
    return found


def _near_duplicates(order: IndexOrder, tokens: Tokens, note: Note) -> Ints:
    """[D] int64: the group of each document; most are alone."""
    generator = rng(order.seed, "group")
    masks, factors = generator.integers(0, 2**63, (2, _BANDS * _BAND), dtype=np.uint64)
    bands = np.empty((_BANDS, tokens.num_documents), np.uint64)
    done = 0
    for ids, offsets in tokens.blocks(order.max_length):
        runs, starts = _runs(ids, offsets)
        for band in range(_BANDS):
            key = np.zeros(len(offsets) - 1, np.uint64)
            for number in range(band * _BAND, (band + 1) * _BAND):
                hashed = ((runs ^ masks[number]) * (factors[number] | np.uint64(1))) >> np.uint64(32)
                key = _mixed(key + np.minimum.reduceat(hashed, starts))
            bands[band, done : done + len(key)] = key
        done += len(offsets) - 1
        note(done, tokens.num_documents, "by near-duplicates")
    return _connected(bands)


def _runs(ids: Ints, offsets: Ints) -> tuple[Hashes, Ints]:
    """A hash of every run of five tokens, and where those of each document begin; a shorter one is one run."""
    lengths = np.diff(offsets)
    padded = np.maximum(lengths, _RUN)
    begins = np.cumsum(padded) - padded
    flat = np.zeros(int(padded.sum()), np.uint64)
    flat[np.arange(len(ids)) + np.repeat(begins - offsets[:-1], lengths)] = ids.astype(np.uint64) + np.uint64(1)
    hashed = np.zeros(len(flat) - _RUN + 1, np.uint64)
    for place in range(_RUN):
        hashed = _mixed(hashed + flat[place : place + len(hashed)])
    counts = padded - _RUN + 1
    starts = np.cumsum(counts) - counts
    return hashed[np.arange(counts.sum()) + np.repeat(begins - starts, counts)], starts


def _mixed(values: Hashes) -> Hashes:
    """Steele, Lea and Flood's splitmix64 (OOPSLA 2014), its output function."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def _connected(bands: Hashes) -> Ints:
    """[D] int64: documents that agree in a band, and all that are connected through such, have one number."""
    label = np.arange(bands.shape[1])
    for key in bands:
        order = np.argsort(key, kind="stable")
        same = np.flatnonzero(key[order][1:] == key[order][:-1])
        ends = label[order[same]], label[order[same + 1]]
        edges = sparse.coo_matrix((np.ones(len(same), bool), ends), (len(label), len(label)))
        label = csgraph.connected_components(edges, directed=False)[1].astype(np.int64)[label]
    return label
