"""Worker processes: none left behind, no result lost or doubled, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from packcli import processes
from packcli.errors import DataError, RunError

HERE = Path(__file__).parent


class Square:
    def __init__(self, fail_at: int = -1, die_at: int = -1) -> None:
        self._fail_at, self._die_at = fail_at, die_at

    def __call__(self, item: int) -> int:
        if item == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if item == self._fail_at:
            raise DataError(f"item {item}", "mend it")
        return item * item


class Sleep:
    """Says its process id, and sleeps."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, item: int) -> None:
        (self._directory / str(os.getpid())).touch()
        time.sleep(60)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_item_comes_back_once_with_its_place(count: int) -> None:
    found = sorted(processes.imap(Square, (), list(range(20)), count))
    assert found == [(place, place * place) for place in range(20)]


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_a_worker_arrives_as_itself(count: int) -> None:
    with pytest.raises(DataError) as caught:
        list(processes.imap(Square, (3,), list(range(6)), count))
    assert (caught.value.cause, caught.value.fix) == ("item 3", "mend it")


def test_a_worker_that_is_killed_ends_the_run_instead_of_hanging_it() -> None:
    with pytest.raises(RunError, match="a worker process died"):
        list(processes.imap(Square, (-1, 3), list(range(6)), 2))


@pytest.mark.parametrize("torch", ["", "import torch; "], ids=["forked", "served"])
def test_workers_die_with_who_started_them(tmp_path: Path, torch: str) -> None:
    code = (
        f"{torch}import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import test_processes; from packcli import processes\n"
        "list(processes.imap(test_processes.Sleep, (Path(sys.argv[2]),), [1, 2], 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(HERE), str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
