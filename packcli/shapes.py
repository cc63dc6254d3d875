"""The shape of a sweep's model before it is loaded, and without asking the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path

from packcli import flops
from packcli.config import ModelSpec
from packcli.files import read_json
from packcli.yamlfile import parse


def shape(model: ModelSpec, vocab: int | None = None) -> flops.Shape | None:
    """From `model.config`, a checkpoint directory, shapes.yaml, or the Hub's local cache, in this order.

    `vocab`: of the tokenizer, where a random model's embedding follows it. None: no shape is known.
    """
    if model.config is not None:
        return flops.shape(model.config, vocab)
    name = str(model.name)
    if Path(name).is_dir():
        return _read(Path(name) / "config.json")
    if (known := packaged().get(name)) is not None:
        return known
    cached = _cached(name, model.revision)
    return _read(cached) if cached else None


def _read(file: Path) -> flops.Shape | None:
    try:
        return flops.shape(read_json(file))
    except (OSError, ValueError):
        return None


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


@cache
def packaged() -> Mapping[str, flops.Shape]:
    """Those of shapes.yaml, by the models' names."""
    name = "shapes.yaml"
    configs = parse((resources.files("packcli") / name).read_text(encoding="utf-8"), name)[0]
    return {model: shape for model, config in configs.items() if (shape := flops.shape(config)) is not None}
