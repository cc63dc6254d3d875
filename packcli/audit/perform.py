"""One job: recorded runs of a trainer with one configuration. Runs in its environment (`bundle.py`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packcli.audit.crafted import documents, write
from packcli.audit.trace import Recorder, attach

Drive = Callable[[dict[str, Any], dict[str, Any], Path], tuple[list[str], list[float]]]
"""(configuration, run, work) -> keys that were not carried over, and losses that transformers did not log."""


def perform(job: dict[str, Any], work: Path, drive: Drive, packages: tuple[str, ...]) -> dict[str, Any]:
    """What was recorded of a job, ready for JSON.

    job: `configuration`, and `runs`: name, arguments, resume (a checkpoint, made `after` so many steps).

    A run that the trainer refuses is recorded as `failed`, with its message.
    """
    import torch
    from transformers import LlamaForCausalLM

    work = work.resolve()
    torch.set_num_threads(1)
    made = documents()
    if not (work / "model").exists():
        write(work, made)
    result: dict[str, Any] = {"versions": {name: version(name) for name in packages}, "runs": {}}
    for run in job["runs"]:
        exactly: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        reference = LlamaForCausalLM.from_pretrained(work / "model", **exactly).eval()
        recorder = Recorder(made, reference)
        detach = attach(recorder)
        failed = None
        if run["resume"] is None and int(os.environ.get("RANK", "0")) == 0:
            shutil.rmtree(work / run["name"], ignore_errors=True)
        try:
            result["not_carried"], losses = drive(job["configuration"], located(run, work), work)
            recorder.losses += losses
        except Exception as error:  # whatever a trainer refuses with is what there is to tell
            message = " ".join(str(error).split())
            failed = f"{type(error).__name__}: {message[:300]}"
        finally:
            detach()
        done = {"failed": failed, "steps": recorder.steps, "losses": recorder.losses, "after": run.get("after", 0)}
        result["runs"][run["name"]] = done
    return result


def located(run: dict[str, Any], work: Path) -> dict[str, Any]:
    """The run with its directories in `work`: a job says no place."""
    resume = None if run["resume"] is None else str(work / run["resume"])
    return {**run, "arguments": {**run["arguments"], "output_dir": str(work / run["name"])}, "resume": resume}
