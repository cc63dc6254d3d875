"""Does an export train elsewhere as it does here? The loss of one step in TRL and in transformers, and ours.

    python benchmarks/export_trl.py --peer-python PEER/bin/python

PEER is a virtual environment with trl, transformers, datasets and torch; packcli need not be in it. The data are
packcli's own synthetic chats, the model a tiny Llama with random weights, on a CPU in fp32. A step has 8 rows in 2
micro-batches of 4, and only those rows are given, so that whatever shuffles them makes the same step. Prints a
Markdown table; exits with 1 if a loss that should be ours is not, to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS, MICRO_BATCH, STEPS = 8, 4, 3
TOLERANCE = 1e-5
SWEEP = """\
name: export
model:
  config:
    {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
     num_key_value_heads: 2, max_position_embeddings: 512}
  tokenizer: train
  vocab_size: 512
data: {source: tiny, max_documents: 400, max_length: 256, validation: 0.1}
train: {steps: 1, lr: 1e-3, global_batch: 8, micro_batch: 4}
matrix: {arm: [padding, best_fit, random], seed: [0]}
"""
# arm, trainer, padding_free, whether the loss must be ours
RUNS = [
    ("padding", "trl", False, True),
    ("padding", "trl", True, True),
    ("padding", "transformers", True, True),
    ("best_fit", "trl", True, True),
    ("best_fit", "transformers", True, True),
    ("best_fit", "trl", False, False),  # what the export's README warns of: documents of a row meet
    ("random", "trl", False, True),
    ("random", "trl", True, True),
    ("random", "transformers", True, True),
]


def ours(directory: Path) -> dict[str, float]:
    """Prepare every arm, export it to `directory`/arm, save the model; the loss of the first rows of each."""
    import torch
    from transformers import AutoTokenizer

    from packcli import stages, sweepfile
    from packcli.data import export, index
    from packcli.model import load
    from packcli.model.collate import collate
    from packcli.store import Store
    from packcli.train.loss import token_sum

    (directory / "sweep.yaml").write_text(SWEEP)
    store = Store(directory / "runs")
    plan = stages.make_plan(sweepfile.load(directory / "sweep.yaml"), store)
    losses: dict[str, float] = {}
    for cell in plan.cells:
        order, rows = plan.trains[cell.train], plan.indexes[cell.index]
        manifest = stages.prepare_tokens(plan.tokens[cell.tokens], store)
        ledger = stages.prepare_index(rows, store).results["ledger"]
        tokenizer = AutoTokenizer.from_pretrained(store.tokenizer(cell.tokens))
        prepared = export.Prepared(
            tokens=(tokens := stages.open_tokens(store, manifest)),
            index=(built := index.read(store.rows(rows.id))),
            validation=index.read(store.validation(rows.id)),
            order=rows,
            arm=order.arm,
            pad_id=tokenizer.pad_token_id,
            ledger=ledger,
            tokenizer=store.tokenizer(cell.tokens),
        )
        export.export(prepared, directory / cell.labels["arm"], stages.silent)
        model = load.load(order.model, None, tokenizer, rows.max_length, order.seed).eval()
        model.save_pretrained(directory / "model")
        batch = collate(tokens, built, range(ROWS), order.arm, rows.max_length, prepared.pad_id)
        with torch.no_grad():
            losses[cell.labels["arm"]] = float(token_sum(model, batch)) / len(batch.labels)
    return losses


def peer(directory: Path, arm: str, trainer: str, padding_free: bool) -> dict[str, Any]:
    """Train a few steps on the export, in the peer's environment; the loss of each step."""
    import torch
    import transformers
    import trl
    from datasets import load_from_disk

    torch.set_num_threads(1)
    rows = load_from_disk(str(directory / arm))["train"].select(range(ROWS))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / arm / "tokenizer")
    common: dict[str, Any] = {
        "output_dir": str(directory / "out"),
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": ROWS // MICRO_BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    losses: list[float] = []

    def recorded(parent: Any) -> Any:
        class Recorded(parent):  # what is logged is rounded
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                losses.append(float(loss := super().training_step(*args, **kwargs)))
                return loss

        return Recorded

    if trainer == "trl":
        args = trl.SFTConfig(
            **common,
            packing=False,
            padding_free=padding_free,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False,
        )
        run = recorded(trl.SFTTrainer)(model, args=args, train_dataset=rows, processing_class=tokenizer)
    else:
        names: dict[str, Any] = {}
        readme = (directory / arm / "README.md").read_text()
        exec("import torch" + readme.split("```python\nimport torch")[1].split("```")[0], names)
        args = transformers.TrainingArguments(**common)
        run = recorded(transformers.Trainer)(model, args=args, train_dataset=rows, data_collator=names["flatten"])
    run.train()
    each = ROWS // MICRO_BATCH
    return {
        "losses": [sum(losses[step * each : (step + 1) * each]) for step in range(STEPS)],
        "version": {"trl": trl.__version__, "transformers": transformers.__version__}[trainer],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="python of the environment that has trl")
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        directory, arm, trainer, padding_free = given.peer
        print(json.dumps(peer(Path(directory), arm, trainer, padding_free == "True")))
        return
    if not given.peer_python:
        parser.error("--peer-python is missing")
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        expected = ours(Path(temporary))
        print(
            "| arm | trainer | padding_free | our loss | its first loss | relative difference | its later losses |"
        )
        print("|---|---|---|---:|---:|---:|---|")
        for arm, trainer, padding_free, equal in RUNS:
            command = [given.peer_python, __file__, "--peer", temporary, arm, trainer, str(padding_free)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            first, *later = found["losses"]
            difference = first / expected[arm] - 1
            failed |= (abs(difference) < TOLERANCE) != equal
            print(
                f"| {arm} | {trainer} {found['version']} | {padding_free} | {expected[arm]:.7f} | {first:.7f} "
                f"| {difference:+.1e} | {', '.join(f'{loss:.4f}' for loss in later)} |"
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
