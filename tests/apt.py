"""Programs that a test needs, from Debian's packages."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def program(name: str, package: str) -> str:
    """Where a program is; root on Debian has it installed. Two test processes take turns. Skips without it."""
    if shutil.which(name) is None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip(f"{package} is not installed, and only root on Debian can have it installed by a test")
        with (Path(tempfile.gettempdir()) / "packcli-apt.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if shutil.which(name) is None:
                _install(package)
    path = shutil.which(name)
    assert path is not None
    return path


def _install(package: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = f"apt-get update && apt-get install --yes --no-install-recommends {package}"
    done = subprocess.run(
        ["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=550, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"apt-get could not install {package}: {done.stderr.strip()[-200:]}")
