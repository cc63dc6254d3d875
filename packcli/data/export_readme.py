"""The README of an export: what it holds, and how each trainer keeps or changes what it means. Pure text.

Every statement about a trainer was read in its published code, at the versions in `_READ`, or seen in a run
(benchmarks/export_trl.py for TRL, tests/test_export.py for transformers).
"""

from __future__ import annotations

from typing import Any

from packcli.config import ArmSpec

_READ = (
    "Said of TRL 1.16.0 and transformers 5.23.0 (their code read; run with `sdpa` and `eager`)\n"
    "and of axolotl 0.19.0 (its code read, not run). Other versions may differ.\n"
)

# The header is for `datasets.load_dataset`: which files are which split.
_HEADER = """\
---
configs:
- config_name: default
  data_files:
{files}
---
"""

_FILES = """\
  - split: {split}
    path: {split}/*.arrow
"""

_COLUMNS = """\
| column | holds |
|---|---|
| `input_ids` | the tokens of a row, at most {max_length:,}; rows are never padded here |
| `labels` | the token itself where it is trained on, else -100; always -100 on the first token of a document |
| `position_ids` | {positions} |
| `seq_lengths` | runs of tokens within which attention is causal: {runs} |
| `document_lengths` | tokens of each document (or piece of one) in the row |
"""

_TRL = """\
```python
from datasets import load_from_disk
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

data = load_from_disk(DIR)
{tokenizer}args = SFTConfig(
    packing=False,  # the rows are made: packing again would cut them
    padding_free={padding_free},  # {why}
    max_length=None,  # the default, 1024, cuts rows
    dataset_kwargs={{"skip_prepare_dataset": True}},{pad_to}
    ...
)
trainer = SFTTrainer(model, args=args, train_dataset=data["train"], processing_class=tokenizer)
```

- TRL reads `input_ids`, `labels` and `seq_lengths`; where it needs positions it makes them of `seq_lengths`.
{attention}- Its loss: the sum over supervised tokens divided by their count in the whole step, over all
  micro-batches and processes (`average_tokens_across_devices`, on by default). {loss}
"""

_TRANSFORMERS = """\
```python
import torch

def flatten(rows):
    names = "input_ids", "labels", "position_ids"
    return {name: torch.tensor([[value for row in rows for value in row[name]]]) for name in names}
```

Give that to `Trainer` as `data_collator`. It lays rows end to end and passes no `attention_mask`: then, and only
then, transformers keeps apart what `position_ids` that begin again at 0 tell apart. It does so with
`attn_implementation` `sdpa` and `eager` (through a mask of tokens x tokens), `flex_attention` and
`flash_attention_2`. """

_AXOLOTL = """\
```yaml
datasets: [{path: DIR, split: train, type: completion}]  # `type` is not used
skip_prepare_dataset: true
remove_unused_columns: true  # the line above makes it false, and the collator cannot read lengths
sample_packing: false  # true writes `position_ids` anew, as if a row were one document
micro_batch_size: 1
```

Its collator passes `position_ids` on and no mask, so transformers keeps documents apart as above. With more rows
a micro-batch that holds for `sdpa`, but flash attention then takes each row for one document. As read, it divides
each micro-batch's loss by the supervised tokens of that micro-batch: packcli's `loss: micro_batch`.
"""

_CONTINUED = """\
**None of the three trains this arm as it is**: its documents do not see each other, and its positions go on
through the row. transformers and axolotl know documents by positions that begin again at 0, so with these
`position_ids` documents of a row attend to each other. TRL with `padding_free=True` keeps them apart by
`seq_lengths`, but makes positions of its own, from 0 in each. What trains it: `position_ids` as they are, and with
them a mask (or lengths, for flash attention) made of `seq_lengths`.
"""

_RESET = """\
**None of the three trains this arm as it is**: a token sees all of its row before it, and positions begin again in
each document. transformers and axolotl take such positions for documents to keep apart, so with these
`position_ids` no document sees another. TRL makes positions of its own, which go on through the row. What trains
it: `position_ids` as they are, and with them a causal mask of the whole row.
"""


def text(about: dict[str, Any], arm: ArmSpec, with_tokenizer: bool) -> str:
    """The README. `about`: what `packcli.json` says; its keys are those of `export._about`."""
    files = "".join(_FILES.format(split=split) for split in about["splits"]).rstrip()
    counts = "\n".join(
        f"| {name} | {split['rows']:,} | {split['documents']:,} | {split['tokens']:,} | {split['supervised']:,} |"
        for name, split in about["splits"].items()
    )
    return "\n".join(
        [
            _HEADER.format(files=files),
            f"# Rows that packcli {about['packcli']} prepared\n",
            _layout(arm),
            f"Token store `{about['tokens']}`, row index `{about['index']}`, seed {about['seed']}.",
            "Open it with `datasets.load_from_disk(DIR)`. `packcli.json` has the arm, the ledger and checksums.\n",
            f"| split | rows | documents | tokens | supervised |\n|---|---:|---:|---:|---:|\n{counts}\n",
            _columns(about["max_length"], arm),
            *_tokenizer(about["pad_id"], with_tokenizer),
            "## Training on it elsewhere\n",
            _READ,
            *_elsewhere(arm),
            *_recipes(arm, about["max_length"], with_tokenizer),
        ]
    )


def _several(arm: ArmSpec) -> bool:
    return arm.layout == "pack"


def _are_told_apart(arm: ArmSpec) -> bool:
    """Whether positions begin again where attention does: elsewhere they alone keep documents apart."""
    return not _several(arm) or (arm.attention == "document") == (arm.positions == "reset")


def _recipes(arm: ArmSpec, max_length: int, with_tokenizer: bool) -> list[str]:
    if not _are_told_apart(arm):
        return [_CONTINUED if arm.attention == "document" else _RESET]
    return [
        "### TRL\n",
        _trl(arm, max_length, with_tokenizer),
        "### transformers\n",
        _transformers(arm),
        "### axolotl\n",
        _AXOLOTL,
    ]


def _layout(arm: ArmSpec) -> str:
    if not _several(arm):
        return "One document a row."
    if arm.attention == "document":
        return "Several documents a row; no token sees another document."
    return "Several documents a row; a token sees all of its row before it, other documents included."


def _columns(max_length: int, arm: ArmSpec) -> str:
    return _COLUMNS.format(
        max_length=max_length,
        positions="from 0 in each document" if arm.positions == "reset" else "from 0 through the row",
        runs="the documents" if arm.attention == "document" else "the row, whole",
    )


def _tokenizer(pad_id: int, with_tokenizer: bool) -> list[str]:
    there = "The tokenizer is in `tokenizer/`. " if with_tokenizer else ""
    return [f"{there}Padding, where a trainer adds it, is token {pad_id} here; no label or mask depends on it.\n"]


def _elsewhere(arm: ArmSpec) -> list[str]:
    said = [
        "- A trainer's batch size counts rows. packcli's `batch_unit: documents` or `tokens` has no equal there.",
        "- Trainers shuffle rows each epoch, by their own seed: steps hold other rows than packcli's do.",
        "- Never `DataCollatorForLanguageModeling` of transformers: it writes `labels` anew, from all tokens.",
    ]
    if arm.order == "sorted":
        said.append("- Rows of like length are not together here: ask the trainer to group by length.")
    if arm.repack_each_epoch:
        said.append("- packcli packs this arm anew each epoch; here is the first epoch alone.")
    if arm.loss != "token":
        below = ", see below for what a trainer computes instead" if _are_told_apart(arm) else ""
        said.append(f"- This arm's loss is `{arm.loss}`{below}.")
    return ["\n".join(said) + "\n"]


def _trl(arm: ArmSpec, max_length: int, with_tokenizer: bool) -> str:
    apart = _several(arm) and arm.attention == "document"
    if apart:
        why = "else documents of a row attend to each other"
        attention = (
            "- With `padding_free=True` it passes positions and lengths and no mask. `flash_attention_2` and\n"
            "  `_3` use the lengths; with `sdpa` and `eager` transformers makes a mask of the positions.\n"
        )
    elif _several(arm):
        why = "True is right too: `seq_lengths` makes a row one run"
        attention = "- A row is one run for attention, and its positions go on through it.\n"
    else:
        why = "rows end to end" if arm.layout == "padding_free" else "True: the same loss, and no padding computed"
        attention = ""
    multiple = {"max_length": (max_length, "every row padded, as packcli does"), "longest": (8, "as packcli does")}
    padded = multiple.get(arm.pad_to) if not apart else None
    return _TRL.format(
        padding_free=apart or arm.layout == "padding_free",
        why=why,
        pad_to=f"\n    pad_to_multiple_of={padded[0]},  # {padded[1]}" if padded else "",
        tokenizer='tokenizer = AutoTokenizer.from_pretrained(DIR + "/tokenizer")\n' if with_tokenizer else "",
        attention=attention,
        loss="That is this arm's." if arm.loss == "token" else f"This arm's, `{arm.loss}`, is not among its own.",
    )


def _transformers(arm: ArmSpec) -> str:
    apart = _several(arm) and arm.attention == "document"
    flattening = (
        "Do not use `DataCollatorWithFlattening`: it numbers each row from 0 to its end,\n"
        "and the documents of a row then attend to each other."
        if apart
        else "`DataCollatorWithFlattening` does the same for these rows."
    )
    divided = (
        "The loss is divided as in TRL, for models that take `num_items_in_batch` (Llama, Qwen and most others)."
    )
    return f"{_TRANSFORMERS}{flattening}\n\n{divided}\n"
