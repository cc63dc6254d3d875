"""Scores and samples in the layout that `lm_eval --output_path DIR --log_samples` writes, without what changes.

lm-eval's own writer (`lm_eval.loggers.EvaluationTracker`) puts dates, durations, paths and a description of the
machine into its files. Here they stay out: the same checkpoint and task give the same bytes.
"""

from __future__ import annotations

from typing import Any

import orjson

from packcli.config import EvalSpec
from packcli.eval import scorers
from packcli.eval.lmtasks import Built
from packcli.eval.protocol import Task, lm_eval_version

BOOTSTRAP_ITERS = 100_000
"""lm-eval's default. Its standard error of a mean has a formula and draws nothing."""

_SOURCE = ("dataset_path", "dataset_name", "dataset_kwargs")


def document(packaged: Task, built: Built, scores: dict[str, Any], lm: Any, spec: EvalSpec) -> dict[str, Any]:
    """What lm-eval writes beside the samples, under its own keys, in plain JSON.

    `scores` is what `lm_eval.evaluator.evaluate` returned. `n-samples` counts left-out rows as `original`.
    """
    from lm_eval.loggers.utils import add_tokenizer_info
    from lm_eval.utils import hash_string

    template = lm.tokenizer.chat_template if spec.chat_template else None
    found = {key: value for key, value in scores.items() if key != "samples"} | {
        "configs": {task.config.task: _config(packaged, task) for task in built.parts.values()},
        "config": {"model": spec.engine, "limit": spec.limit, "bootstrap_iters": BOOTSTRAP_ITERS},
        "lm_eval_version": lm_eval_version(),
        "chat_template": template,
        "chat_template_sha": hash_string(template) if template else None,
        "fewshot_as_multiturn": spec.fewshot == "turns",
        "system_instruction": None,
        "system_instruction_sha": None,
        "task_hashes": {name: hash_string(_hashes(logged)) for name, logged in scores["samples"].items()},
    }
    add_tokenizer_info(found, lm)
    plain: dict[str, Any] = _plain(found)
    if built.left_out is not None:
        plain["n-samples"][packaged.name]["original"] = built.n_total
    return plain


def samples(packaged: Task, scores: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each item and filter, in lm-eval's order.

    Two keys are ours: `task`, by lm-eval's name of the part, and for a written answer `extracted`, what was taken
    for the answer in it (None: nothing was found).
    """
    from lm_eval.utils import sanitize_list

    written = packaged.config["output_type"] == "generate_until"
    return [
        _plain(
            entry
            | {
                "task": name,
                "target": str(entry["target"]),
                "arguments": {
                    f"gen_args_{number}": {f"arg_{place}": value for place, value in enumerate(asked)}
                    for number, asked in enumerate(entry["arguments"])
                },
                "resps": sanitize_list(entry["resps"]),
                "filtered_resps": sanitize_list(entry["filtered_resps"]),
                **({"extracted": scorers.extracted(packaged, entry["filtered_resps"][0])} if written else {}),
            }
        )
        for name, logged in scores["samples"].items()
        for entry in logged
    ]


def _config(packaged: Task, task: Any) -> dict[str, Any]:
    """lm-eval's dump, with the words of the YAML where lm-eval was given our rows and compiled templates."""
    dumped: dict[str, Any] = task.dump_config()
    del dumped["custom_dataset"]
    own = packaged.config
    for asked in (dumped, dumped.get("fewshot_config", {})):
        if "doc_to_text" in asked:
            asked["doc_to_text"] = own["doc_to_text"]
    return dumped | {key: own[key] for key in _SOURCE if key in own}


def _hashes(logged: list[dict[str, Any]]) -> str:
    return "".join(entry["doc_hash"] + entry["prompt_hash"] + entry["target_hash"] for entry in logged)


def _plain(value: Any) -> Any:
    """As read back from JSON: NaN is null, a function its name (as text it would have an address)."""
    return orjson.loads(orjson.dumps(value, default=_named, option=orjson.OPT_SERIALIZE_NUMPY))


def _named(value: Any) -> Any:
    from lm_eval.utils import handle_non_serializable

    return f"{value.__module__}.{value.__qualname__}" if callable(value) else handle_non_serializable(value)
