"""What inputs hash to: data, templates, tokenizers, models, tasks. A plan is made from these and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from packcli.config import EvalSpec, ProbeSpec, SourceSpec, SweepSpec
from packcli.data import render, sources
from packcli.errors import ConfigError, IntegrityError, PackcliError
from packcli.eval import protocol
from packcli.eval.engines import engine
from packcli.eval.judge import tasks as judged
from packcli.eval.probe import probes
from packcli.files import clear_unfinished, digest, read_sealed, sha256_file, write_sealed
from packcli.plan import needed, source_key, task_key
from packcli.store import Store

# Files of a checkpoint. Of JSON a tokenizer reads a part; one too many here tokenizes again in vain, one that is
# missed passes off old tokens as new. `config.json` may name its class.
_TEXT = (".jinja", ".model", ".txt")
_JSON_OF_TOKENIZERS = re.compile(r"^config\.json$|token|vocab|merges|tekken|chat_template")
_TEMPLATES = "additional_chat_templates/*.jinja"


def fingerprints(spec: SweepSpec, store: Store) -> dict[str, str]:
    """One fingerprint for every key `plan` looks up; the only function that makes them."""
    hashes = FileHashes(store)
    # By identity first: cells share the sections that they have in common.
    sections = {id(cell.eval): cell.eval for _, cell in spec.cells}.values()
    evals = {task_key(task, section): (task, section) for section in sections for task in section.tasks}
    bases = [cell.model.base for _, cell in spec.cells if cell.model.base]
    blocks = {
        id(block): block for block in (*(cell.data for _, cell in spec.cells), *(base.data for base in bases))
    }
    origins = {source_key(source): source for block in blocks.values() for source in block.sources}
    found: dict[str, str] = {}
    for key in needed(spec):
        kind, _, value = key.partition(":")
        match kind:
            case "data":
                found[key] = sources.fingerprint(origins[key], hashes.sha256)
            case "template":
                found[key] = digest(render.template_text(value)) if value else "tokenizer"
            case "tokenizer" | "model":
                found[key] = checkpoint(value, hashes, weights=kind == "model")
            case _:
                found[key] = scoring(*evals[key], hashes)
    hashes.save()
    return found


def checkpoint(name: str, hashes: FileHashes, *, weights: bool) -> str:
    """A local directory by its files, of its tokenizer alone without `weights`; a hub id by its name and revision,
    which is provisional for a branch.
    """
    directory = Path(name)
    if not os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises over what may not be looked at
        if name.startswith((".", "/", "~")):
            raise ConfigError(f"no checkpoint directory `{name}`", "check `model.name` and `model.tokenizer`")
        return name
    try:
        files = sorted(
            file for file in directory.iterdir() if _counts(file, weights=weights) and not file.is_dir()
        )
        if not weights:
            files += sorted(directory.glob(_TEMPLATES))
        return digest([[file.relative_to(directory).as_posix(), hashes.sha256(file)] for file in files])
    except OSError as error:
        cause = f"`{error.filename}` cannot be read: {error.strerror}"
        raise ConfigError(cause, "mend it, or take it out of the directory") from None


def _counts(file: Path, *, weights: bool) -> bool:
    """Whether a file of a checkpoint enters its fingerprint; without `weights`, that of its tokenizer."""
    match file.suffix:
        case ".json":
            return weights or bool(_JSON_OF_TOKENIZERS.search(file.name))
        case ".safetensors":
            return weights
    return file.suffix in _TEXT


def scoring(task: str, spec: EvalSpec, hashes: FileHashes) -> str:
    """A task under one protocol."""
    match protocol.kind(task):
        case "benchmark":
            return protocol.fingerprint(
                task,
                limit=spec.limit,
                chat_template=spec.chat_template,
                bench_data=Path(spec.bench_data) if spec.bench_data else None,
                fewshot_as_turns=spec.fewshot == "turns",
                engine=engine.identity(spec.engine),
            )
        case "judged":
            return judged.fingerprint(task, spec, hashes.sha256)
        case "probes":
            return _probing(spec.probes, hashes)


def _probing(spec: ProbeSpec, hashes: FileHashes) -> str:
    """What is looked at by default, the cell's own data and what it started from, follows from its checkpoint."""
    given = sources.fingerprint(SourceSpec(source=spec.source), hashes.sha256) if spec.source else None
    before = checkpoint(spec.before, hashes, weights=True) if spec.before else None
    chosen = spec.model_dump(mode="json", exclude={"source", "before"})
    return digest({"version": probes.VERSION, "chosen": chosen, "source": given, "before": before})


class FileHashes:
    """sha256 of files, remembered by size, times of modification and change, and inode."""

    def __init__(self, store: Store) -> None:
        self._path = store.fingerprints_file()
        try:
            known = read_sealed(self._path)
        except (OSError, IntegrityError):
            known = None  # a cache: what is lost is hashed again
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}
        self._changed = False

    def sha256(self, file: Path) -> str:
        stat = file.stat()
        # `rsync --inplace -t` and `cp -p` set the time of modification back, and no program that of change.
        name, key = str(file.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = self._known.get(name)
        if not isinstance(entry, dict) or entry.get("key") != key or not isinstance(entry.get("sha256"), str):
            entry = self._known[name] = {"key": key, "sha256": sha256_file(file)}
            self._changed = True
        return str(entry["sha256"])

    def save(self) -> None:
        if self._changed:
            # Only a cache: a finished run directory that cannot be written, or a full one, is still read.
            with contextlib.suppress(OSError, PackcliError):
                clear_unfinished(self._path.parent)
                write_sealed(self._path, self._known)
