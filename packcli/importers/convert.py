"""A trainer's YAML as a sweep of packcli, and an account of every key of it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packcli import sweepfile, whose
from packcli.errors import ConfigError
from packcli.files import atomic_write
from packcli.importers import axolotl, data, dialect, llamafactory, trl
from packcli.importers.draft import Assumed, Draft, inline
from packcli.importers.source import DOCS, Entry, Fate, Source
from packcli.whose import Trainer

TITLES: dict[Trainer, str] = {
    "trl": trl.DIALECT.title,
    "axolotl": axolotl.DIALECT.title,
    "llamafactory": llamafactory.DIALECT.title,
}
_TOY = "the toy of --try: random weights, synthetic chats"
_TOY_LENGTH = 192
_FIRST = (
    "first of all the sweep trains the toy's base model (2,600 steps), once for all arms and seeds: "
    "a minute or two on a core of its own"
)


@dataclass(frozen=True, slots=True)
class Imported:
    """`text`: the sweep file. `files`: name -> text of what it needs beside it. `entries`: each key once.

    `warnings`: what keeps the sweep from asking what the file asks, or from running. `toy`: see `convert`.
    """

    source: Path
    trainer: Trainer
    text: str
    files: dict[str, str]
    entries: tuple[Entry, ...]
    assumed: tuple[Assumed, ...]
    differences: tuple[str, ...]
    warnings: tuple[str, ...]
    arms: tuple[str, ...]
    toy: bool

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
            "warnings": list(self.warnings),
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
    if trainer:
        whose.confirm(trainer, source.keys, str(path), "--from {}")
    chosen = trainer or whose.recognised(source.keys, str(path))
    draft = Draft(source)
    match chosen:
        case "trl":
            trl.fill(draft, processes)
        case "axolotl":
            axolotl.fill(draft, processes)
        case "llamafactory":
            llamafactory.fill(draft, processes)
    dialect.remaining(draft)
    product = whose.PRODUCTS[chosen]
    entries = source.entries(f"packcli does not know this key of {product}")
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem).strip("_-")[:50] or "imported"
    made_by = f"Made by `packcli import-config {path.name}` from a file of {product}; see {DOCS}."
    _check(draft, draft.text(name, made_by, entries))
    warnings = _warnings(draft, toy=toy)
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
        warnings=warnings,
        arms=tuple(draft.matrix["arm"]),
        toy=toy,
    )


def _warnings(draft: Draft, *, toy: bool) -> tuple[str, ...]:
    asks = "if that key changes what is trained, the sweep asks another question than the file"
    unknown = [f"{sentence}; {asks}" for sentence in draft.source.unknown]
    return (*unknown, *(() if toy else data.problems(draft.values["data.source"])))


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
        ConfigError: one of them is there, or their directory is not.
    """
    if not out.parent.is_dir():
        raise ConfigError(f"no directory `{out.parent}`", f"make it (`mkdir -p {out.parent}`), or choose another")
    if out.is_dir():
        raise ConfigError(f"`{out}` is a directory", "name a file in it with --out")
    targets = {out: imported.text} | {out.with_name(f"{out.stem}.{name}"): t for name, t in imported.files.items()}
    for path in targets:
        if path.exists():
            raise ConfigError(f"`{path}` is there, and is not overwritten", "choose another name with --out")
    for name in imported.files:
        beside = str(out.with_name(f"{out.stem}.{name}"))
        targets[out] = targets[out].replace(f"template: {name}", f"template: {inline(beside)}")
    for path, text in targets.items():
        try:
            with atomic_write(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise ConfigError(f"cannot write `{path}`: {error.strerror}", "choose another with --out") from None
    return list(targets)


def alone(imported: Imported) -> str:
    """The sweep file as text, for stdout.

    Raises:
        ConfigError: it needs another file beside it.
    """
    if imported.files:
        needed = ", ".join(imported.files)
        raise ConfigError(f"the sweep needs a file beside it: {needed}", "name a file with --out, not `-`")
    return imported.text


def lines(imported: Imported, out: Path, written: Iterable[Path]) -> list[str]:
    """The account as text, every key in it: first what one has to decide about. `written`: none, to stdout."""
    found = [f"{imported.source}: a file of {whose.PRODUCTS[imported.trainer]}"]
    found += [f"warning: {sentence}" for sentence in imported.warnings]
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
    found += _plain_lines(imported)
    found += ["", f"written: {', '.join(map(str, written)) or 'to stdout'}; arms: {', '.join(imported.arms)}"]
    if imported.toy:
        found.append(_FIRST)
    return [*found, f"next: packcli sweep {'SWEEP' if str(out) == '-' else out} --dry-run"]


def _plain_lines(imported: Imported) -> list[str]:
    """Keys about which there is nothing to decide: those as they were, those of no matter by why."""
    found = []
    if carried := imported.of("carried"):
        found += ["", "carried as they are:"]
        found += [f"  {', '.join(entry.key for entry in carried)}"]
    why: dict[str, list[str]] = {}
    for entry in imported.of("no_effect"):
        why.setdefault(entry.why, []).append(entry.key)
    if why:
        found += ["", "without effect on what is trained:"]
        found += [f"  {', '.join(keys)}: {sentence}" for sentence, keys in why.items()]
    return found


def _entry_lines(path: Path, entry: Entry) -> list[str]:
    to = f" -> {', '.join(entry.to)}" if entry.to else ""
    head = f"  {path.name}:{entry.line}  {entry.key}: {entry.value}{to}"
    return [head, f"      {entry.why}" + (f"; {entry.do}" if entry.do else "")]
