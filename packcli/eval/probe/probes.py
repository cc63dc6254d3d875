"""Probes: what packing does inside a model. The paper, "Packing Analysis" (arXiv 2410.08081), left them out.

    crossing        how much attention a packed row's tokens give to other documents
    causal effect   what the document before does to a document's loss, through attention and through positions
    boundary        what eos, bos, system header and document mask each do to it

They share their documents, and everything is decided by a seed. docs/probes.md says what each number means.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from packcli.config import ARMS, LENGTHS_ALONE, ArmSpec, ProbeSpec, SourceSpec
from packcli.errors import ConfigError
from packcli.eval import checkpoint as checkpoints

VERSION = 1
"""Raised by hand when the meaning of a result changes."""

_TOY = "packcli's toy corpus (synthetic), held-out items"
_TOY_MAX_LENGTH = 192
"""As `sweeps/tiny.yaml` trains on the toy corpus."""


def run(
    checkpoint: Path | str,
    settings: ProbeSpec | None = None,
    *,
    sources: tuple[SourceSpec, ...] | None = None,
    name: str | None = None,
    random_weights: bool | None = None,
    device: str | None = None,
    note: Callable[[int, int, str], None] = lambda done, total, remark: None,
) -> dict[str, Any]:
    """All three probes on one checkpoint, as JSON; in fp32, so 4 bytes a parameter, and deterministic on a CPU.

    settings        what is looked at; with a `before` also its causal effects, and how training changed them
    sources         of the documents, instead of `settings.source`; None and no such source: held-out items of
                    packcli's toy corpus
    name            what the result calls the checkpoint, instead of where it lies
    random_weights  whether training started from none, which pictures then say; None: not known

    Raises:
        ConfigError: no such checkpoint, source or arm; no chat template; a model that cannot be probed.
        DataError: too few usable documents.
        MissingError: documents without a topic, and no scikit-learn.
        RunError: something else than attention carries one document into the next.
    """
    from packcli.eval.probe import layouts, reading
    from packcli.eval.probe.boundary import boundary
    from packcli.eval.probe.effect import causal_effect, change

    chosen = settings or ProbeSpec()
    if sources is None and chosen.source is not None:
        sources = (SourceSpec(source=chosen.source),)
    before = chosen.before
    arms, seed = {name: _arm(name) for name in chosen.arms}, chosen.seed
    model, tokenizer = checkpoints.read(checkpoint, chat_template=True)
    model = _placed(model, device)
    most = layouts.room(model, chosen.max_length or (_TOY_MAX_LENGTH if sources is None else None))
    found = reading.read(sources, tokenizer, count=chosen.count, max_length=most, seed=seed)
    crossings = _crossings(model, found.documents, arms, most, seed, note)
    effect = causal_effect(model, found.documents, seed=seed, max_length=most, note=note)
    marks = reading.marks(tokenizer)
    factorial = boundary(model, found.without_system, marks, seed=seed, max_length=most, note=note)
    del model
    result = {
        "version": VERSION,
        "checkpoint": name or str(checkpoint),
        "random_weights": random_weights,
        "source": ", ".join(one.source for one in sources) if sources else _TOY,
        **chosen.model_dump(mode="json", exclude={"source", "before"}),
        "max_length": most,
        "documents": {
            "n": len(found.documents),
            "tokens": sum(map(len, found.documents)),
            "rejected": found.rejected,
        },
        "crossing": crossings,
        "causal_effect": effect.model_dump(mode="json"),
        "boundary": factorial.model_dump(mode="json"),
    }
    if before is not None:
        earlier = _earlier(before, found.documents, device)
        was = causal_effect(earlier, found.documents, seed=seed, max_length=most, note=note)
        result["before"] = {
            "checkpoint": str(before),
            "causal_effect": was.model_dump(mode="json"),
            "change": [each.model_dump(mode="json") for each in change(was, effect)],
        }
    return result


def _crossings(
    model: Any,
    documents: list[Any],
    arms: dict[str, ArmSpec],
    max_length: int,
    seed: int,
    note: Callable[[int, int, str], None],
) -> dict[str, Any]:
    from packcli.eval.probe.crossing import crossing
    from packcli.eval.probe.layouts import Layout, packed

    found = {}
    for name, arm in arms.items():
        rows = packed(documents, arm, max_length, seed)
        layout = Layout(arm.attention, arm.positions)
        found[name] = crossing(model, rows, layout, note=note).model_dump(mode="json")
    return found


def _arm(name: str) -> ArmSpec:
    packing = [arm for arm in LENGTHS_ALONE if ARMS[arm]["layout"] == "pack"]
    if name not in packing:
        raise ConfigError(f"no built-in packing arm `{name}`", f"choose from: {', '.join(packing)}")
    return ArmSpec.model_validate(ARMS[name])


def _placed(model: Any, device: str | None) -> Any:
    import torch

    return model.float().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _earlier(before: Path | str, documents: list[Any], device: str | None) -> Any:
    """The model before training; its own tokenizer writes nothing, but its ids must be the same."""
    model, _ = checkpoints.read(before, chat_template=False)
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(int(document.input_ids.max()) for document in documents)
    if largest >= rows:
        raise ConfigError(
            f"checkpoint `{before}` embeds {rows:,} tokens; the documents hold token id {largest:,}",
            "name the model that this checkpoint was trained from",
        )
    return _placed(model, device)
