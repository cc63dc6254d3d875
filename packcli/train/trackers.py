"""Curves for TensorBoard and Weights & Biases. They repeat `metrics.jsonl`, which stays the record of a run.

A tracker never costs a run: one that fails is left out from there on, with one warning.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packcli.config import Tracker
from packcli.errors import ConfigError
from packcli.log import logger

Log = Callable[[dict[str, float], int], None]
Close = Callable[[], None]


def check(names: Sequence[Tracker]) -> None:
    """Raise `ConfigError` when the package of a tracker is not installed: before hours of training, not after."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: a mere folder, such as the `wandb/` of other runs
            raise ConfigError(
                f"`train.trackers: [{name}]` needs the package `{name}`", "pip install 'packcli[track]'"
            )


def open_trackers(
    names: Sequence[Tracker],
    directory: Path,
    *,
    run_id: str,
    name: str,
    config: Mapping[str, Any],
    resume_step: int,
) -> Trackers:
    """The trackers in `names`, with their files below `directory`; open them on one process only.

    `run_id`: the same for every attempt at a run, so that they are one curve. `name`: what people see.
    `resume_step`: the step the run goes on from, 0 for a new one; what a stopped attempt logged after it is
    dropped.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    check(names)
    opened: dict[Tracker, tuple[Log, Close]] = {}
    for tracker in names:
        try:
            match tracker:
                case "tensorboard":
                    opened[tracker] = _tensorboard(directory / tracker, name, config, resume_step)
                case "wandb":
                    opened[tracker] = _wandb(directory, run_id, name, config)
        except Exception as error:
            _failed(tracker, error)
    return Trackers(opened)


class Trackers:
    """Open trackers; as a context manager it closes them at the end."""

    def __init__(self, opened: dict[Tracker, tuple[Log, Close]]) -> None:
        self._opened = opened

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`: every number at its `step`; what is null has no point."""
        numbers = {key: value for key, value in record.items() if value is not None and key != "step"}
        self._each(lambda log, _: log(numbers, record["step"]))

    def close(self) -> None:
        """Write what is left. Nothing can be logged afterwards."""
        self._each(lambda _, close: close())
        self._opened = {}

    def _each(self, do: Callable[[Log, Close], None]) -> None:
        for name, (log, close) in list(self._opened.items()):
            try:
                do(log, close)
            # Whatever a foreign library raises, the training is worth more than its curve.
            except Exception as error:
                del self._opened[name]
                _failed(name, error)


def _failed(name: Tracker, error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    logger.warning("%s failed and logs no more of this run (metrics.jsonl does): %s", name, reason)


def _tensorboard(directory: Path, name: str, config: Mapping[str, Any], resume_step: int) -> tuple[Log, Close]:
    from torch.utils.tensorboard import SummaryWriter

    # Points of a stopped attempt from `purge_step` on are hidden. At 0 that is everything an attempt left that
    # stopped before its first checkpoint.
    writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else 0)
    if not resume_step:
        text = json.dumps({"name": name, **config}, indent=2, default=str)
        writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), 0)

    def log(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # else a killed run loses up to two minutes that its checkpoint has

    return log, writer.close


def _wandb(directory: Path, run_id: str, name: str, config: Mapping[str, Any]) -> tuple[Log, Close]:
    import wandb

    def start(**settings: Any) -> Any:
        quiet = wandb.Settings(console="off", disable_git=True, save_code=False, silent=True, **settings)
        return wandb.init(
            id=run_id,
            resume="allow",
            name=name,
            project=os.environ.get("WANDB_PROJECT", "packcli"),
            dir=directory,
            config=dict(config),
            settings=quiet,
        )

    directory.mkdir(parents=True, exist_ok=True)  # else wandb writes to the working directory
    try:
        run = start()  # online, unless WANDB_MODE or `wandb offline` says otherwise
    except wandb.Error as error:  # no login, no network
        reason = str(error).splitlines()[0]
        logger.warning("wandb: %s Logging offline; later: wandb sync %s/wandb/offline-run-*", reason, directory)
        run = start(mode="offline")

    def log(numbers: dict[str, float], step: int) -> None:
        run.log(numbers, step=step)

    def close() -> None:
        run.finish()

    return log, close
