"""packcli's own trainer on the same data, recorded the same way; runs in packcli's environment."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

PACKAGES = ("packcli", "transformers", "torch")


def drive(configuration: dict[str, Any], run: dict[str, Any], work: Path) -> tuple[list[str], list[float]]:
    """Prepare and train one cell: `configuration` is an arm, `arguments` are keys of the `train:` block.

    `stop_after`: steps after which this process is asked to stop, as a cluster would; the run is then resumed.
    """
    import yaml

    from packcli import stages, sweepfile
    from packcli.errors import PreemptedError
    from packcli.files import read_jsonl
    from packcli.store import Store

    arguments = dict(run["arguments"])
    directory = Path(arguments.pop("output_dir") if run["resume"] is None else run["resume"])
    max_length, stop_after = arguments.pop("max_length"), arguments.pop("stop_after", None)
    arguments.pop("output_dir", None)
    directory.mkdir(parents=True, exist_ok=True)
    sweep = {
        "name": "audit",
        "model": {"name": str(work / "model")},
        "data": {"source": str(work / "chats.jsonl"), "max_length": max_length, "validation": 0},
        "train": arguments,
        "arms": {"audited": configuration},
        "matrix": {"arm": ["audited"], "seed": [0]},
    }
    file = directory / f"sweep{os.environ.get('RANK', '')}.yaml"
    file.write_text(yaml.safe_dump(sweep))
    store = Store(directory / "runs")
    plan = stages.make_plan(sweepfile.load(file), store)

    def note(step: int, steps: int, remark: str) -> None:
        if step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)  # what a cluster sends; this step is the last

    if int(os.environ.get("RANK", "0")) == 0:
        for tokens in plan.tokens.values():
            stages.prepare_tokens(tokens, store)
        for index in plan.indexes.values():
            stages.prepare_index(index, store)
    while any(store.state("index", id_) != "done" for id_ in plan.indexes):
        time.sleep(0.1)  # another rank makes them
    for order in plan.trains.values():
        try:
            stages.train(order, store, note)
        except PreemptedError:
            if stop_after is None:
                raise
    return [], [record["loss"] for train_id in plan.trains for record in read_jsonl(store.metrics(train_id))]
