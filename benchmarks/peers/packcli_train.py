"""packcli's own training for some steps: `packcli_train.py run|prepare SWEEP DIR` prints JSON.

`run` trains the sweep's one cell as `packcli train` does. `prepare` leaves in DIR what another trainer needs to do
the same: `rows`, the arm's rows as a `datasets` directory; `model`, the initial weights; and prints the rows in
the order of the run's steps.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packcli import batching, stages, sweepfile
from packcli.files import read_jsonl
from packcli.store import Store


def main() -> None:
    mode, sweep, directory = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    store = Store(directory / "runs")
    plan = stages.make_plan(sweepfile.load(sweep), store)
    [tokens], [index], [train] = plan.tokens.values(), plan.indexes.values(), plan.trains.values()
    manifest, built = stages.prepare_tokens(tokens, store), stages.prepare_index(index, store)
    if mode == "prepare":
        print(json.dumps(prepare(directory, store, manifest, built, index, train)))
        return
    ends: dict[int, tuple[float, float]] = {}

    def note(step: int, *_: object) -> None:
        ends[step] = time.perf_counter(), time.process_time()

    stages.train(train, store, note)
    records = read_jsonl(store.metrics(train.id))
    result = {
        "versions": {name: version(name) for name in ("packcli", "transformers", "torch")},
        "rows_in_all": built.results["ledger"]["rows"],
        "ends": [ends[record["step"]] for record in records],
        **{
            plural: [record[key] for record in records]
            for plural, key in (("losses", "loss"), ("tokens", "tokens"), ("slots", "slots"))
        },
    }
    print(json.dumps(result))


def prepare(directory: Path, store: Store, manifest: Any, built: Any, order: Any, train: Any) -> dict[str, Any]:
    from packcli.data import export, index
    from packcli.data.tokenizer import load_directory
    from packcli.model import load

    rows = index.read(store.rows(order.id))
    tokenizer = load_directory(store.tokenizer(order.tokens))
    prepared = export.Prepared(
        tokens=stages.open_tokens(store, manifest),
        index=rows,
        validation=None,
        order=order,
        arm=train.arm,
        pad_id=tokenizer.pad_token_id,
        ledger=built.results["ledger"],
        tokenizer=store.tokenizer(order.tokens),
    )
    export.export(prepared, directory / "rows", stages.silent)
    load.load(train.model, None, tokenizer, train.max_length, train.seed).save_pretrained(directory / "model")
    steps = batching.run_steps(rows.sizes, train.train, train.arm.order, train.seed)
    return {"rows": [int(row) for chosen in steps for row in chosen]}


if __name__ == "__main__":
    main()
