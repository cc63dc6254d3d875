"""What TRL can train of packcli's arms, and which Python has TRL. Loads no heavy library.

Which arms: as benchmarks/export_trl.py found, where a step's loss in TRL 1.16.0 is ours to 1e-5.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

from packcli.errors import ConfigError, MissingError
from packcli.plan import TrainOrder

PYTHON = "PACKCLI_TRL_PYTHON"
_INSTALL = (
    "python -m venv trl-env && trl-env/bin/pip install trl datasets transformers torch, then "
    f"export {PYTHON}=$PWD/trl-env/bin/python, or --set train.backend_python=trl-env/bin/python"
)
_LOOK_S = 60.0
_ASK = "import importlib.metadata as m; [m.version(n) for n in ('torch', 'datasets')]; print(m.version('trl'))"


def check(order: TrainOrder) -> None:
    """Refuse what TRL would train otherwise than the order says; nothing is said of packcli's own trainings.

    Raises:
        ConfigError: by name, all that TRL cannot do of it.
        MissingError: TRL is not there.
    """
    if order.train.backend != "trl":
        return
    if reasons := list(_reasons(order)):
        raise ConfigError(
            f"`train.backend: trl` cannot train this arm: {'; '.join(reasons)}",
            "leave it to `packcli` (with `exclude`, for one cell of a matrix), or choose another arm",
        )
    _version(python(order))


def python(order: TrainOrder) -> str:
    """The Python that has TRL.

    Raises:
        MissingError: none is named, and this one has none.
    """
    named = order.train.backend_python or os.environ.get(PYTHON)
    if named:
        return named
    if importlib.util.find_spec("trl") is None:
        raise MissingError(f"`train.backend: trl`: no package trl here, and no `{PYTHON}`", _INSTALL)
    return sys.executable


@cache
def _version(python_: str) -> str:
    """TRL's version, as installed in that Python."""
    try:
        done = subprocess.run(
            [python_, "-I", "-c", _ASK], capture_output=True, text=True, timeout=_LOOK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingError(f"`train.backend: trl`: cannot run `{python_}`: {error}", _INSTALL) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise MissingError(f"`train.backend: trl`: `{python_}` lacks a package: {last}", _INSTALL)
    return done.stdout.strip()


def _reasons(order: TrainOrder) -> Iterator[str]:
    arm, train = order.arm, order.train
    if train.steps == 0:
        yield "`train.steps: 0` trains nothing"
    if arm.loss != "token":
        yield f"`loss: {arm.loss}`: TRL divides by the supervised tokens of the step, as `loss: token`"
    if train.batch_unit != "rows":
        yield f"`batch_unit: {train.batch_unit}`: a step of TRL holds as many rows each time"
    if arm.layout == "pack" and (arm.attention == "document") != (arm.positions == "reset"):
        yield (
            f"`attention: {arm.attention}` with `positions: {arm.positions}`: TRL makes both of the same lengths "
            "(`reset` with `document`, `continue` with `causal`)"
        )
    if arm.repack_each_epoch:
        yield "`repack_each_epoch`: TRL is handed the rows of one epoch"
    if train.lora is not None:
        yield "`train.lora`: adapters would not start from the same weights"
    if train.optimizer_state != "float32":
        yield f"`optimizer_state: {train.optimizer_state}`: its AdamW keeps moments in float32"
