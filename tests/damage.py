"""One file of a run directory with bits flipped or its end cut off, and whoever reads it next."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from packcli.data import tokenize, tokens
from packcli.errors import IntegrityError
from packcli.eval.engines import responses
from packcli.eval.judge.replies import Replies
from packcli.files import read_json, read_sealed, sha256_file
from packcli.fingerprints import FileHashes
from packcli.store import Store, listed, verify
from packcli.train import journal

LOGS = {".lock", "metrics.jsonl", "worker-0.log"}
"""Of a finished run: nothing is read from them but to show it."""
ASKED_AGAIN = {"judge", "responses.jsonl", "fingerprints.json"}
"""What these have lost is asked, or hashed, again; what they still say must be what they said."""


def files(runs: Path, *, unfinished: bool) -> Iterator[tuple[str, Path]]:
    """(kind, path) of every file that is not a log; `unfinished`: of stages without a manifest, and no others.

    The kind is the file's name, with `*` for numbers; of a file in a subdirectory of a stage, `SUBDIRECTORY/*`.
    """
    for path in sorted(runs.rglob("*")):
        parts = path.relative_to(runs).parts
        if path.is_dir() or any(".tmp-" in part for part in parts):
            continue
        in_stage = parts[0] == "store" and len(parts) > 3
        done = not in_stage or (runs.joinpath(*parts[:3]) / "manifest.json").exists()
        if done == unfinished or path.name in (LOGS if done else {".lock", "config.yaml"}):
            continue
        inside = parts[3:-1] if in_stage else ()
        name = "judge" if parts[1] == "judge" else f"{inside[0]}/*" if inside else path.name
        yield "".join("*" if char.isdigit() else char for char in name).replace("*" * 5, "*"), path


def unnoticed(kind: str, path: Path, runs: Path, flips: int) -> list[str]:
    """What of the damage nobody noticed, with the file's name, before reading something else than was written."""
    content, read = path.read_bytes(), reader(kind, path, runs)
    whole = read()
    found = []
    for what, damaged in harmed(content, flips, path.name):
        path.write_bytes(damaged)
        try:
            now = read()
        except IntegrityError as error:
            if path.name not in error.cause:
                found.append(f"{path}, {what}: {error.cause}")
        else:
            kept = kind in ASKED_AGAIN and all(whole.get(key) == value for key, value in now.items() if value)
            if not kept and (now is None or now != whole):
                found.append(f"{path}, {what}")
        path.write_bytes(content)
    return found


def harmed(content: bytes, flips: int, seed: str) -> Iterator[tuple[str, bytes]]:
    """Single bits flipped at random places, and one cut at a random place."""
    draw = random.Random(seed)
    for _ in range(flips if content else 0):
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(flipped)
    if content:
        size = draw.randrange(len(content))
        yield f"cut to {size} bytes", content[:size]


def reader(kind: str, path: Path, runs: Path) -> Callable[[], Any]:
    """What reads such a file next, or `verify`; None: it only checks."""
    store, parts = Store(runs), path.relative_to(runs).parts
    if len(parts) < 4:
        match kind:
            case "judge":
                return lambda: dict(Replies(path).by_key)
            case "fingerprints.json":
                return lambda: FileHashes(store)._known
            case _:
                return lambda: read_sealed(path)
    stage: Any = parts[1], parts[2]
    directory = store.directory(*stage)
    if (directory / "manifest.json").exists():
        return (lambda: store.manifest(*stage)) if kind == "manifest.json" else (lambda: _checked(directory))
    match kind:
        case "responses.jsonl":
            return lambda: responses._read(path, stage[1])
        case "tokenizer/*":
            return lambda: tokenize.check_tokenizer(store, stage[1])
        case "pieces.json":
            return lambda: tokenize.pieces_in(path)
        case "shard-*.json":
            return lambda: read_sealed(path)
        case "shard-*.arrow":
            return lambda: tokens.check_shards(store, stage[1], len(store.shard_records(stage[1])))
        case "metrics.jsonl":
            step, checkpoint = next(one for one in store.checkpoints(stage[1]) if store.is_whole(one[1]))
            logged = read_json(store.progress(checkpoint))["metrics_sha256"]
            return lambda: [journal.truncate(store, stage[1], step, logged), sha256_file(path)][1]
        case _ if path.name == "manifest.json":
            return lambda: listed(path, "outputs")
        case _:
            return lambda: _checked(path.parent)


def _checked(directory: Path) -> None:
    verify(directory)
