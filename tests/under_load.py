"""Programs of `test_under_load.py`: who looks on while a sweep runs, and many evaluations at once.

    under_load.py read SWEEP RUNS END OUT      `status` and `report`, again and again until the file END is there
    under_load.py evaluate CKPT RUNS OUT ARGS  JSON: of as many `packcli eval`, all at once, what each adds

Each is one process that has imported what it needs once: a hundred starts of Python would be what is measured.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from packcli import cli

NAMES = "COMMITS"
"""Environment variable: a file to which every process that lies below this directory's path adds each manifest it
puts in place, as `kind id pid`."""

WATCH = """
import os, sys
_commits = os.open(os.environ["COMMITS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
def _hear(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("/manifest.json"):
        parts = str(arguments[1]).split("/")
        os.write(_commits, f"{parts[-3]} {parts[-2]} {os.getpid()}\\n".encode())
sys.addaudithook(_hear)
"""
"""As `sitecustomize.py` first on PYTHONPATH: the interpreter itself says what is renamed."""


def called(*words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command, in this process."""
    out, errors = io.StringIO(), io.StringIO()
    sys.argv = ["packcli", *words]
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    return int(code), out.getvalue(), errors.getvalue()


def read(sweep: str, runs: str, end: str, out: str) -> None:
    """Each line of OUT: what was read, its exit code and document, or what was there instead."""
    with Path(out).open("a") as file:
        last = False
        while not last:
            last = Path(end).exists()  # and once more after it
            for command in (["status", sweep, "--json"], ["report", sweep, "--format", "json"]):
                began = time.monotonic()
                code, stdout, stderr = called(*command, "--runs", runs)
                record: dict[str, Any] = {"command": command[0], "code": code, "s": time.monotonic() - began}
                try:
                    record["states"] = states(command[0], json.loads(stdout))
                except (ValueError, KeyError, TypeError) as error:
                    record["broken"] = f"{error!r}: {stdout[:200]!r} {stderr[-500:]!r}"
                file.write(json.dumps(record) + "\n")
                file.flush()
            time.sleep(0.5)


def states(command: str, document: dict[str, Any]) -> list[list[str]]:
    """Of each cell; of `report`, whether it has been trained and how much of it was scored."""
    if command == "status":
        cells = document["cells"]
        return [[cell["stages"][stage]["state"] for stage in ("prepare", "train", "eval")] for cell in cells]
    return [
        ["pending" if row["train"] is None else "done", str(len(row["eval"] or {}))] for row in document["rows"]
    ]


def evaluate(checkpoint: str, runs: str, out: str, arguments: str) -> None:
    import lm_eval  # noqa: F401
    import torch

    from packcli.eval import harness, scoring  # noqa: F401
    from packcli.eval.engines import hf  # noqa: F401

    torch.set_num_threads(1)
    children = []
    go = Path(out) / "go"
    for number, words in enumerate(json.loads(arguments)):
        child = os.fork()
        if child == 0:
            while not go.exists():
                time.sleep(0.01)
            code, stdout, stderr = called("eval", "--ckpt", checkpoint, "--runs", runs, "--json", *words)
            (Path(out) / f"{number}.json").write_text(json.dumps([code, stdout, stderr, peak_mib()]))
            os._exit(0)
        children.append(child)
    go.touch()
    for child in children:
        os.waitpid(child, 0)


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    {"read": read, "evaluate": evaluate}[sys.argv[1]](*sys.argv[2:])
