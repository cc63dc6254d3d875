"""What writes the answers: one of three engines behind lm-eval's interface, and how much of a prompt it reads.

`hf` runs the checkpoint in this process (`hf.py`), or in a process for each GPU (`parallel.py`), `vllm` in vLLM
(`vllm.py`), `openai` asks a server (`server.py`). All cut prompt and continuation at the same token (`split.py`)
and decode greedily.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import importlib.util
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from packcli.errors import ConfigError, MissingError
from packcli.eval.protocol import Task

Engine = Literal["hf", "vllm", "openai"]


def load(
    checkpoint: Path | str,
    *,
    chat_template: bool,
    batch_size: int | None = None,
    device: str | None = None,
    engine: Engine = "hf",
    base_url: str | None = None,
    processes: int | None = None,
) -> Any:
    """The checkpoint as an lm-eval model that also has `answers` (`responses.py`) and `truncated` (`split.py`).

    `batch_size`: prompts at a time; None finds it (`hf`: the fastest, by measuring) or leaves it to the engine.
    Only for `hf`: `processes`, each with the checkpoint on a device of its own; None: one for each GPU, else one.
    `device` defaults to these GPUs, else to `cpu`. Only for `openai`: `base_url` of the server that holds the
    checkpoint; defaults to OPENAI_BASE_URL.

    Raises:
        ConfigError: as `checkpoint.read`; a server that does not know the checkpoint, or none named.
        MissingError: vLLM, or the package `openai`, is not in this environment; the server does not answer;
            more processes than GPUs.
        OutOfMemoryError: the checkpoint does not fit.
        KilledError, RunError: one of several processes died, or met an error that is not ours.
    """
    gc.collect()  # the traceback of a failed task may hold the last checkpoint, and its memory
    match engine:
        case "hf":
            from packcli.eval.engines import hf, parallel

            on = parallel.devices(processes, device)
            if len(on) > 1:
                return parallel.load(checkpoint, chat_template=chat_template, batch_size=batch_size, on=on)
            return hf.load(checkpoint, chat_template=chat_template, batch_size=batch_size, device=on[0])
        case "vllm":
            if importlib.util.find_spec("vllm") is None:
                raise MissingError(
                    "`--engine vllm` needs vLLM, which is not in this environment",
                    "vLLM wants a torch of its own: `python -m venv V`, `V/bin/pip install vllm 'packcli[eval]'`, "
                    "`V/bin/packcli eval --engine vllm ...`",
                )
            from packcli.eval.engines import vllm

            return vllm.load(checkpoint, chat_template=chat_template, batch_size=batch_size)
        case "openai":
            if importlib.util.find_spec("openai") is None:
                raise MissingError("`--engine openai` needs the package `openai`", "pip install 'packcli[judge]'")
            from packcli.eval.engines import server

            return server.load(checkpoint, chat_template=chat_template, batch_size=batch_size, base_url=base_url)


def identity(engine: Engine) -> str:
    """What a score owes to the engine: its name and libraries, e.g. `hf transformers 5.23.0 torch 2.13.0`.

    Loads none of them. The precision is the checkpoint's own. What a server runs is not known from here.
    """
    packages = {"hf": ("transformers", "torch"), "vllm": ("vllm", "torch"), "openai": ()}[engine]
    return " ".join([engine, *(f"{package} {_version(package)}" for package in packages)])


def check_room(packaged: Task, context: int) -> None:
    """Raise ConfigError where a text or answer alone would fill a context of so many tokens; lm-eval asserts it
    mid-run."""
    if packaged.length is not None and packaged.length > context:
        raise ConfigError(
            f"task `{packaged.name}` fills {packaged.length} tokens, this model holds {context}",
            "take a shorter one, or leave it out for this model",
        )
    check_answer_fits(packaged.name, packaged.config.get("generation_kwargs", {}).get("max_gen_toks", 0), context)


def check_answer_fits(task: str, num_tokens: int, context: int) -> None:
    """Raise ConfigError where an answer of so many tokens would fill the model's context."""
    if num_tokens >= context:
        raise ConfigError(
            f"task `{task}` writes up to {num_tokens} tokens, this model holds {context} in all",
            "leave this task out for this model",
        )


def num_truncated(lm: Any, task: Any) -> int:
    """How many of a scored task's requests lost the beginning of their prompt."""
    requests = [instance.args for instance in task.instances]
    if task.OUTPUT_TYPE != "generate_until":
        return sum(request in lm.truncated for request in requests)
    return sum(len(lm.tok_encode(text)) > lm.max_length - options["max_gen_toks"] for text, options in requests)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval, transformers and datasets from writing to the user's terminal; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    silence = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        # Their progress bars take no switch from `evaluate`; they write to whatever stderr is when they start.
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _version(package: str) -> str:
    try:
        # Without the build (`+cpu`): a plan made on one machine is run on another.
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
