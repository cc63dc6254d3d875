"""The steps of `packcli prepare`: `packcli_steps.py prepared|stages|parts SWEEP RUNS` prints JSON.

`stages` runs the plan and both stages as they are; `prepared` too, once imports are done and the tokenizer is
loaded, which is what a peer's preparation counts. `parts` runs what is inside the token stage, one step after
another over all conversations at a time; what the stage takes beyond them is writing and checksums.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import measure

Steps = dict[str, dict[str, float]]


def main() -> None:
    from packcli import stages, sweepfile
    from packcli.store import Store

    mode, sweep, runs = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    steps: Steps = {}
    with measure.step(steps, "plan: sweep file, hashes of data"):
        plan = stages.make_plan(sweepfile.load(sweep), store := Store(runs))
    [tokens], [index] = plan.tokens.values(), plan.indexes.values()
    if mode == "prepared":
        for module in ("index", "tokenize"):  # what the stages import
            importlib.import_module(f"packcli.data.{module}")
        from packcli.data import tokenizer

        tokenizer.prepare(tokens, store.tokenizer(tokens.id))
    if mode == "parts":
        steps = _parts(tokens, store.tokenizer(tokens.id))
    else:
        with measure.step(steps, "tokens"):
            stages.prepare_tokens(tokens, store)
        with measure.step(steps, "pack, write rows, ledger"):
            stages.prepare_index(index, store)
    print(json.dumps(steps))


def _parts(order: Any, directory: Path) -> Steps:
    from packcli.data import chat, conversations, sources
    from packcli.data import tokenizer as tokenizers
    from packcli.data.shards import BATCH

    steps: Steps = {}
    with measure.step(steps, "import transformers"):
        import transformers

        assert transformers.PreTrainedTokenizerFast  # it is lazy: this loads what the tokenizer needs
    with measure.step(steps, "tokenizer: load, copy to the store"):
        tokenizers.prepare(order, directory)
    with measure.step(steps, "tokenizer: load the copy, template, engine"):
        from packcli.data.encode import Encoder
        from packcli.data.render import Renderer

        tokenizer = tokenizers.stored(directory)
        renderer, encoder = Renderer(tokenizer, order.train_on), Encoder(tokenizer)
    with measure.step(steps, "read: JSON"):
        pieces = sources.pieces(order.sources, order.max_documents)
        records = [record for piece in pieces for record in sources.read(piece)]
    with measure.step(steps, "schema: records as messages"):
        schema = chat.detect(records[0].value, "")
        found = [messages for _, messages in conversations.parsed(records, order.sources[0], schema)]
    with measure.step(steps, "content hash"):
        for messages in found:
            chat.content_hash(messages)
    with measure.step(steps, "render"):
        documents = [renderer.render(messages) for messages in found]
    with measure.step(steps, "check of 200 conversations against `tokenizers`"):
        encoder.compare(documents[:200])
    with measure.step(steps, f"tokenize ({encoder.engine}), spans"):
        for start in range(0, len(documents), BATCH):
            encoder.encode(documents[start : start + BATCH])
    return steps


if __name__ == "__main__":
    main()
