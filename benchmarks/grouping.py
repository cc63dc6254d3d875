"""Time grouping by what documents say, and its memory, on a store of made-up documents. Prints a Markdown table.

    python benchmarks/grouping.py
    python benchmarks/grouping.py --documents 100000

Documents are drawn: lengths lognormal (sigma 1, clipped to 8..4096 tokens), tokens Zipf-distributed over half of
128,000 ids, but for a third of them, which are from the part of the other half that belongs to one of 500 topics;
one document in ten repeats the one before it but for a token. Each grouping runs in a process of its own, from the
store on disk to rows: seconds, the memory that grouping added to what the process held at its most, and the most
it held (the store is mapped, so pages of it that were read count, too).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from packcli import stages
from packcli.config import ARMS, ArmSpec
from packcli.data import alike, index, tokens
from packcli.data.shards import Shard
from packcli.plan import IndexOrder, TokenizerOrder, TokensOrder
from packcli.store import Store

GROUPINGS = ("none", "topic", "similarity", "adversarial", "near_duplicates")
MAX_LENGTH = 4096
VOCABULARY, TOPICS, SHARD = 128_000, 500, 20_000


def order() -> TokensOrder:
    return TokensOrder(
        id="made", processes=1, sources=(), fingerprints=(), max_documents=None, on_error="fail", max_errors=1,
        fields=("topic",), train_on="all", template=None, tokenizer=TokenizerOrder(name="made"),
    )  # fmt: skip


def make(store: Store, documents: int, mean: float) -> None:
    """Write the shards; 4 bytes a token on disk."""
    rng = np.random.default_rng(0)
    for number, first in enumerate(range(0, documents, SHARD)):
        count = min(SHARD, documents - first)
        lengths = np.clip(rng.lognormal(np.log(mean) - 0.5, 1, count), 8, MAX_LENGTH).astype(np.int64)
        lengths[10::10] = lengths[9:-1:10][: len(lengths[10::10])]
        topic = rng.integers(0, TOPICS, count)
        ends = np.cumsum(lengths)
        ids = np.minimum(rng.zipf(1.3, int(ends[-1])), VOCABULARY // 2).astype(np.int32) - 1
        own = rng.random(len(ids)) < 1 / 3
        part = VOCABULARY // 2 // TOPICS
        ids[own] = VOCABULARY // 2 + np.repeat(topic, lengths)[own] * part + rng.integers(0, part, int(own.sum()))
        for copy in range(10, count, 10):
            size, end = int(lengths[copy]), int(ends[copy])
            ids[end - size : end] = ids[end - 2 * size : end - size]
            ids[end - size // 2] = 5
        offsets = np.concatenate([[0], ends])
        shard = Shard(
            ids=ids, offsets=offsets, spans=np.stack([np.ones(count), lengths], 1).astype(np.int32),
            span_offsets=np.arange(count + 1), content=np.full(count, 2**63, np.uint64),
            file=np.zeros(count, np.int32), record=np.arange(count), fields=[(str(one),) for one in topic],
            read=count, conversations=count, not_drawn=0, errors=0, rejected=[], stop_token_ids=[],
        )  # fmt: skip
        tokens.write(shard, store, order(), number, "made")


def measure(store: Store, shards: int, group_by: str) -> None:
    """Print one line of JSON: seconds, MiB beyond the opened store, rows, who shares them."""
    opened = tokens.Tokens(store, "made", files=["made"], shards=shards)
    lengths = opened.lengths
    before = _peak_mib()
    arm = "unrelated" if group_by == "adversarial" else "best_fit"
    layout = ArmSpec.model_validate({**ARMS[arm], "group_by": group_by}).rows
    work = IndexOrder(
        id="", tokens="made", max_length=MAX_LENGTH, validation=0.0, seed=0, layout=layout, batching=None, epochs=1
    )
    began = time.perf_counter()
    groups = alike.groups(work, opened, VOCABULARY, stages.silent)
    grouped = time.perf_counter()
    peak = _peak_mib()
    built, _, ledger = index.build(work, opened, len(lengths), 0, groups=groups)
    packed = time.perf_counter()
    found = index.sharing(built, opened.field("topic")[0])
    print(json.dumps({
        "by": group_by, "documents": len(lengths), "tokens": int(lengths.sum()), "group_s": grouped - began,
        "pack_s": packed - grouped, "group_mib": peak - before, "peak_mib": _peak_mib(),
        "groups": None if groups is None else len(np.unique(groups.of)), "efficiency": ledger["efficiency"],
        "rows": ledger["rows"], "bound": ledger["rows_lower_bound"],
        "same_topic": found["pairs_within"] / found["pairs"],
    }))  # fmt: skip


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--mean", type=float, default=300, help="tokens a document, before clipping")
    parser.add_argument("--measure", nargs=3, metavar=("STORE", "SHARDS", "GROUP_BY"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        return measure(Store(Path(chosen.measure[0])), int(chosen.measure[1]), chosen.measure[2])
    print("| group_by | documents | tokens | groups | grouping, s | packing, s | grouping, MiB | peak, MiB "
          "| rows | over bound | pairs of one topic |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        make(store, chosen.documents, chosen.mean)
        shards = -(-chosen.documents // SHARD)
        for group_by in GROUPINGS:
            command = [sys.executable, __file__, "--measure", scratch, str(shards), group_by]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(f"| {row['by']} | {row['documents']:,} | {row['tokens']:,} | {row['groups'] or ''} "
                  f"| {row['group_s']:.1f} | {row['pack_s']:.1f} | {row['group_mib']:.0f} | {row['peak_mib']:.0f} "
                  f"| {row['rows']:,} | {row['rows'] / row['bound'] - 1:+.2%} | {row['same_topic']:.1%} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
