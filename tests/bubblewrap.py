"""bubblewrap on this machine, for tests that run a model's code: the fixture `bwrap`, the mark `sandbox`."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest
from apt import program

NOBODY = 65534


@pytest.fixture(autouse=True)
def _bwrap_where_marked(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("sandbox"):
        request.getfixturevalue("bwrap")


@pytest.fixture(scope="session")
def bwrap() -> str:
    """bubblewrap on a kernel that lets an ordinary user have namespaces; without either nothing can be tested."""
    path = program("bwrap", "bubblewrap")
    drop: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    command = [path, "--unshare-user", "--ro-bind", "/", "/", "true"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, **drop)
    if done.returncode != 0:
        pytest.skip(f"this kernel gives an ordinary user no namespaces: {done.stderr.strip()}")
    return path
