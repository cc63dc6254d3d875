"""A trainer's YAML as a sweep of packcli, and an account of every key of it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packcli import sweepfile
from packcli.errors import ConfigError
from packcli.files import atomic_write
from packcli.importers import axolotl, dialect, llamafactory, trl
from packcli.importers.draft import Assumed, Draft
from packcli.importers.source import DOCS, Entry, Fate, Source

Trainer = Literal["trl", "axolotl", "llamafactory"]

TITLES: dict[Trainer, str] = {
    "trl": trl.DIALECT.title,
    "axolotl": axolotl.DIALECT.title,
    "llamafactory": llamafactory.DIALECT.title,
}
# Keys by which a file is recognised: those that one of the three has and the others do not.
_TELLS: dict[Trainer, frozenset[str]] = {
    "trl": frozenset(
        {"dataset_name", "dataset_config", "dataset_mixture", "dataset_train_split", "dataset_test_split",
         "use_peft", "lora_r", "packing_strategy", "max_length", "assistant_only_loss", "completion_only_loss",
         "dataset_text_field", "eval_packing", "padding_free", "torch_dtype", "dtype", "chat_template_path"}
    ),
    "axolotl": frozenset(
        {"base_model", "datasets", "sequence_len", "sample_packing", "micro_batch_size", "num_epochs", "adapter",
         "lr_scheduler", "optimizer", "val_set_size", "dataset_prepared_path", "train_on_inputs"}
    ),
    "llamafactory": frozenset(
        {"stage", "finetuning_type", "cutoff_len", "template", "dataset", "dataset_dir", "neat_packing",
         "lora_rank", "lora_target", "val_size", "max_samples", "preprocessing_num_workers", "mask_history"}
    ),
}  # fmt: skip
_TOY = "the toy of --try: random weights, synthetic chats"
_TOY_LENGTH = 192


@dataclass(frozen=True, slots=True)
class Imported:
    """`text`: the sweep file. `files`: name -> text of what it needs beside it. `entries`: each key once."""

    source: Path
    trainer: Trainer
    text: str
    files: dict[str, str]
    entries: tuple[Entry, ...]
    assumed: tuple[Assumed, ...]
    differences: tuple[str, ...]
    arms: tuple[str, ...]

    def of(self, fate: Fate) -> list[Entry]:
        return [entry for entry in self.entries if entry.fate == fate]

    def document(self, out: Path) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "file": str(self.source),
            "trainer": self.trainer,
            "version": TITLES[self.trainer],
            "sweep": str(out),
            "arms": list(self.arms),
            "keys": [asdict(entry) for entry in self.entries],
            "assumed": [asdict(item) for item in self.assumed],
            "differences": list(self.differences),
        }


def convert(path: Path, trainer: Trainer | None, processes: int | None, *, toy: bool = False) -> Imported:
    """`trainer`: None, and the file is recognised by its keys. `toy`: model and data replaced by packcli's toy.

    Raises:
        ConfigError: no such file, not recognised, no supervised fine-tuning.
    """
    source = Source(path)
    chosen = trainer or _recognised(source)
    draft = Draft(source)
    match chosen:
        case "trl":
            trl.fill(draft, processes)
        case "axolotl":
            axolotl.fill(draft, processes)
        case "llamafactory":
            llamafactory.fill(draft, processes)
    dialect.remaining(draft)
    product = TITLES[chosen].split()[0]
    entries = source.entries(f"packcli does not know this key of {product}")
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem).strip("_-")[:50] or "imported"
    made_by = f"Made by `packcli import-config {path.name}` from a file of {product}; see {DOCS}."
    _check(draft, draft.text(name, made_by, entries))
    if toy:
        _replace_by_toy(draft)
        name = f"{name}_try"
    return Imported(
        source=path,
        trainer=chosen,
        text=draft.text(name, made_by, entries),
        files=draft.files,
        entries=tuple(entries),
        assumed=tuple(draft.assumed),
        differences=tuple(draft.differences),
        arms=tuple(draft.matrix["arm"]),
    )


def _recognised(source: Source) -> Trainer:
    counts = {trainer: len(source.keys & tells) for trainer, tells in _TELLS.items()}
    most = max(counts.values())
    best = [trainer for trainer, count in counts.items() if count == most]
    if len(best) == 1:
        return best[0]
    cause = "its keys are those of none" if not most else f"its keys fit {' and '.join(best)}"
    raise ConfigError(f"{source.path}: whose file is it? {cause}", f"say so: --from {'|'.join(_TELLS)}")


def _check(draft: Draft, text: str) -> None:
    """Read the sweep back: a value that packcli cannot take is named where it stands in the trainer's file.

    Raises:
        ConfigError: there is one.
    """
    with tempfile.TemporaryDirectory(prefix="packcli-") as directory:
        written = Path(directory) / "sweep.yaml"
        written.write_text(text, encoding="utf-8")
        try:
            sweepfile.load(written)
        except ConfigError as error:
            first = error.cause.splitlines()[0].removeprefix(str(written))
            key = next(iter(re.findall(r"`([\w.]+)`", first)), "")
            while key and key not in draft.origins:
                key = key.rpartition(".")[0]
            _, _, said = first.partition(": ")
            origin = draft.origins.get(key, draft.source.path.name)
            raise ConfigError(f"{origin}: {said}", "correct it there, then import again") from None


def _replace_by_toy(draft: Draft) -> None:
    """What makes the sweep run on a laptop in minutes, leaving what is compared as it is."""
    length = min(int(draft.values["data.max_length"]), _TOY_LENGTH)
    for section in ("model", "data.source", "data.template", "data.max_documents"):
        draft.remove(section)
    draft.files.clear()
    rest = dict(draft.values)
    draft.values.clear()
    draft.replace("model.name", "tiny", _TOY)
    draft.replace("data.source", "tiny", _TOY)
    draft.values.update({key: value for key, value in rest.items() if key not in draft.values})
    draft.replace("data.max_length", length, _TOY)
    draft.replace("train.lr", 3e-3, f"{_TOY}, which needs a larger one")
    draft.replace("train.threads", 1, f"{_TOY}: runs go side by side")
    draft.replace("eval.tasks", ["tiny"], _TOY)


def write(imported: Imported, out: Path) -> list[Path]:
    """The sweep file, and what it needs beside it; nothing that is there is overwritten.

    Raises:
        ConfigError: one of them is there.
    """
    targets = {out: imported.text} | {out.with_name(f"{out.stem}.{name}"): t for name, t in imported.files.items()}
    for path in targets:
        if path.exists():
            raise ConfigError(f"`{path}` is there, and is not overwritten", "choose another name with --out")
    for name in imported.files:
        targets[out] = targets[out].replace(
            f"template: {name}", f"template: {out.with_name(f'{out.stem}.{name}')}"
        )
    for path, text in targets.items():
        with atomic_write(path) as file:
            file.write(text.encode())
    return list(targets)


def lines(imported: Imported, out: Path, written: Iterable[Path]) -> list[str]:
    """The account as text: what was not carried first, for it is what one has to decide about."""
    found = [f"{imported.source}: a file of {TITLES[imported.trainer].split()[0]}"]
    for fate, heading in (
        ("not_carried", "not carried, though it changes what is trained"),
        ("changed", "carried with a change"),
    ):
        entries = imported.of(fate)  # type: ignore[arg-type]
        if entries:
            found += ["", f"{heading}:"]
            found += [line for entry in entries for line in _entry_lines(imported.source, entry)]
    if imported.assumed:
        found += ["", "not in the file, assumed:"]
        found += [f"  {item.key} = {item.value}: {item.why}" for item in imported.assumed]
    if imported.differences:
        found += ["", "done otherwise in packcli, or kept so in an arm of its own:"]
        found += [f"  {sentence}" for sentence in imported.differences]
    plain = len(imported.of("carried")), len(imported.of("no_effect"))
    found += [
        "",
        f"{plain[0]} keys carried as they are, {plain[1]} without effect on what is trained (--json lists them)",
    ]
    found += [f"written: {', '.join(map(str, written))}; arms: {', '.join(imported.arms)}"]
    return [*found, f"next: packcli sweep {out} --dry-run"]


def _entry_lines(path: Path, entry: Entry) -> list[str]:
    to = f" -> {', '.join(entry.to)}" if entry.to else ""
    head = f"  {path.name}:{entry.line}  {entry.key}: {entry.value}{to}"
    return [head, f"      {entry.why}" + (f"; {entry.do}" if entry.do else "")]
