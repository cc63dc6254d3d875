"""What the measured programs share: arguments, clocks and the form of results. Needs numpy alone."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
"""The label of a token that is not trained on."""


def arguments() -> argparse.Namespace:
    """What `prepare.py` gives a peer. A run with `--documents` is not for timing: it writes what was made."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="JSONL, one `messages` conversation a line")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="an empty directory, for caches and outputs")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--documents", type=Path, help="write the prepared documents to this .npz file")
    return parser.parse_args()


def cpu_s() -> float:
    """CPU seconds, user and system, of this process with all its threads and of the children it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextmanager
def step(steps: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    """Put the CPU and wall seconds of the block into `steps[name]`."""
    cpu, wall = cpu_s(), time.perf_counter()
    yield
    steps[name] = {"cpu_s": cpu_s() - cpu, "wall_s": time.perf_counter() - wall}


def finish(*, packages: list[str], configuration: dict[str, Any], steps: dict[str, dict[str, float]]) -> None:
    """Print the result: the last line of standard output, one JSON object."""
    versions = {package: version(package) for package in packages}
    print(json.dumps({"versions": versions, "configuration": configuration, "steps": steps}))


def save(path: Path, rows: int, documents: list[tuple[NDArray[np.int32], NDArray[np.bool_]]]) -> None:
    """Documents, each (token ids [T] int32, trained on [T] bool), end to end in one .npz file."""
    np.savez(
        path,
        rows=rows,
        lengths=np.asarray([len(ids) for ids, _ in documents], dtype=np.int64),
        ids=np.concatenate([ids for ids, _ in documents]).astype(np.int32),
        trained=np.concatenate([trained for _, trained in documents]).astype(np.bool_),
    )
