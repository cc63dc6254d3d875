"""Curves are read back from what the trackers leave on disk; nothing here needs a network or a login."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packcli.config import Tracker
from packcli.errors import ConfigError
from packcli.store import records
from packcli.train import trackers
from packcli.train.metrics import Meter
from packcli.train.trackers import Trackers

METER = Meter(shape=None, device="cpu", world=1, max_length=128)


def line(step: int, loss: float) -> dict[str, Any]:
    """A line of metrics.jsonl as a CPU writes it: MFU and memory are null."""
    return METER.record(
        step=step,
        loss=loss,
        lr=1e-3,
        grad_norm=1.0,
        rows=8,
        documents=20,
        tokens=500,
        supervised=100,
        slots=800,
        squares=10_000,
        step_s=0.5,
        peak_bytes=None,
    )


def attempt(name: Tracker, directory: Path, resume_step: int = 0) -> Trackers:
    return trackers.open_trackers(
        [name], directory, run_id="f00dcafe12", name="demo/best_fit", config={"seed": 1}, resume_step=resume_step
    )


def points(directory: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(directory / "tensorboard"))
    curves.Reload()
    return [(point.step, point.value) for point in curves.Scalars(tag)]


def tags(directory: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return set(EventAccumulator(str(directory / "tensorboard")).Reload().Tags()["scalars"])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "packcli"]


def test_line_of_the_log_is_not_a_point(tmp_path: Path) -> None:
    with attempt("tensorboard", tmp_path) as opened:
        for step in (1, 2, 3):
            opened.log(line(step, 4.0 / step))
    assert points(tmp_path, "loss") == [(1, 4.0), (2, 2.0), (3, pytest.approx(4 / 3))]
    assert points(tmp_path, "efficiency") == [(step, 0.625) for step in (1, 2, 3)]
    shown = {key for key, value in line(1, 4.0).items() if value is not None}
    assert tags(tmp_path) == shown - {"step"}


@pytest.mark.parametrize("saved", [0, 2])
def test_resumed_run_draws_steps_twice(tmp_path: Path, saved: int) -> None:
    """The first attempt is killed after step 4, its last checkpoint was at `saved`."""
    killed = attempt("tensorboard", tmp_path)
    for step in (1, 2, 3, 4):
        killed.log(line(step, 10.0 + step))  # and is never closed
    with attempt("tensorboard", tmp_path, saved) as opened:
        for step in range(saved + 1, 6):
            opened.log(line(step, 20.0 + step))
    expected = [(step, (10.0 if step <= saved else 20.0) + step) for step in range(1, 6)]
    assert points(tmp_path, "loss") == expected


def test_killed_run_loses_points_its_checkpoint_has(tmp_path: Path) -> None:
    killed = attempt("tensorboard", tmp_path)
    killed.log(line(1, 4.0))
    assert points(tmp_path, "loss") == [(1, 4.0)]
    killed.close()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package_is_found_after_training(
    name: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()  # as earlier runs of wandb leave one: no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=name) as error:
        attempt(name, tmp_path)
    assert error.value.fix == "pip install 'packcli[track]'"


def test_tracker_that_fails_stops_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def disk_full(numbers: dict[str, float], step: int) -> None:
        raise OSError("No space left\non device")

    seen: list[int] = []
    opened = Trackers(
        {
            "wandb": (disk_full, lambda: seen.append(-1)),
            "tensorboard": (lambda numbers, step: seen.append(step), lambda: seen.append(0)),
        }
    )
    with caplog.at_level(logging.WARNING, "packcli"), opened:
        opened.log(line(1, 4.0))
        opened.log(line(2, 4.0))
    assert seen == [1, 2, 0]  # the other goes on; the one that failed is never touched again
    (warning,) = warnings(caplog)
    assert "wandb failed" in warning
    assert "No space left on device" in warning


def test_tracker_that_cannot_start_stops_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING, "packcli"), attempt("tensorboard", tmp_path) as opened:
        opened.log(line(1, 4.0))
    assert len(warnings(caplog)) == 1


def test_logs_of_trackers_get_checksums(tmp_path: Path) -> None:
    from packcli.store import Store

    logs = Store(tmp_path).tracker_logs("abc")
    with attempt("tensorboard", logs) as opened:
        opened.log(line(1, 4.0))
    (logs.parent / "kept.txt").write_text("kept")
    assert set(records(logs.parent)) == {"kept.txt"}


# Weights & Biases --------------------------------------------------------------------------------------


@pytest.fixture
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the user's: no key, no settings, no network needed to find that out."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'packcli[track]'")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name))
    yield
    wandb.teardown()  # it reads the environment once a process


def offline_runs(directory: Path, last: bytes) -> list[bytes]:
    """What each attempt left, in order; numbers of a history are JSON texts in it.

    W&B's own process writes them, after a run is closed too: up to half a minute for `last` to be there.
    """
    found: list[bytes] = []
    for _ in range(300):
        files = sorted((directory / "wandb").glob("offline-run-*-f00dcafe12*/run-f00dcafe12.wandb"))
        found = [file.read_bytes() for file in files]
        if found and last in found[-1]:
            break
        time.sleep(0.1)
    return found


@pytest.mark.usefixtures("no_login")
def test_wandb_needs_a_login_or_a_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "packcli"), attempt("wandb", tmp_path) as opened:
        opened.log(line(1, 4.5678))
        opened.log(line(2, 3.4567))
    (run,) = offline_runs(tmp_path, b"3.4567")
    assert b"4.5678" in run
    assert b"3.4567" in run
    assert b"best_fit" in run
    (warning,) = warnings(caplog)
    assert "wandb sync" in warning


@pytest.mark.usefixtures("no_login")
def test_wandb_takes_a_resumed_run_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both attempts have the run's id, by which `wandb sync` joins them."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    with attempt("wandb", tmp_path) as opened:
        opened.log(line(1, 4.5678))
    with attempt("wandb", tmp_path, 1) as opened:
        opened.log(line(2, 3.4567))
    first, second = offline_runs(tmp_path, b"3.4567")
    assert b"4.5678" in first
    assert b"3.4567" in second
    assert b"4.5678" not in second
