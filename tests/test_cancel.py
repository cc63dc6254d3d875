"""`cancel`: a stranger's process that is signalled, a sweep that is missed, or one that trips over who looks."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import threading
from pathlib import Path

import pytest

from packcli.launch import local
from packcli.store import Store


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: found.append(pid) if number else kill(pid, 0))
    return found


def test_a_process_here_of_the_number_of_one_on_another_machine_is_signalled(
    tmp_path: Path, signalled: list[int]
) -> None:
    """A file system may lock for all its machines: login2 sees that login1's sweep lives."""
    store = Store(tmp_path / "runs")
    own = store.process("s", os.getpid())
    other = own.with_name(own.name.replace(platform.node(), "another-host"))
    other.parent.mkdir(parents=True)
    with other.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert local.cancel("s", store) == signalled == []
        assert other.exists()
    with local._announced(store, "s"):
        assert local.cancel("s", store) == signalled == [os.getpid()]


def test_a_sweep_that_is_about_to_lock_its_file_is_never_found_again(tmp_path: Path, signalled: list[int]) -> None:
    store = Store(tmp_path / "runs")
    path = store.process("s", os.getpid())
    path.parent.mkdir(parents=True)
    path.touch()
    assert local.cancel("s", store) == signalled == []
    assert path.exists()
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = store.process("s", dead.pid)
    left.touch()
    assert local.cancel("s", store) == []
    assert not left.exists()


def test_a_sweep_that_starts_while_cancel_looks_ends_with_a_traceback(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    path = store.process("s", os.getpid())
    path.parent.mkdir(parents=True)
    path.touch()
    with path.open("rb") as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        threading.Timer(0.3, lambda: fcntl.flock(looker, fcntl.LOCK_UN)).start()
        with local._announced(store, "s"):
            assert path.exists()
    assert not path.exists()
