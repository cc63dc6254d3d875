"""What torch can do here: its build, attention that keeps documents apart, processes that talk to each other.

Whatever needs torch is asked of `answers.py` and `loopback.py`, in processes of their own.
"""

from __future__ import annotations

import functools
import runpy
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packcli.doctor import elsewhere
from packcli.doctor.checks import Check, Finding
from packcli.doctor.machine import gpus
from packcli.launch.ranks import has_gpu_driver

# Compiling for a GPU takes most of it; a machine without one answers in seconds.
_LIMIT_S = 90.0
_LATE_S = 5.0
NEED_A_GPU = ("flash", "varlen", "flex")
_BEHIND = {
    "flash": "varlen or flex stands in, else SDPA",
    "varlen": "flash-attn or flex stands in, else SDPA",
    "flex": "flash-attn or varlen stands in, else SDPA",
    "sdpa": "document by document: the reference, and what a CPU trains with",
}
_BROKEN = "documents of a row are not kept apart as they must be: packcli refuses to train with it"
_TYPE = {"flash": "pip install 'packcli[flash]'", "flex": "pip install triton"}
_INSTALL = "pip install 'packcli[train]'"
_NO_TORCH = "nothing is trained or scored on this machine; plans, `prepare` and reports work"
_CUDA = "install the torch that pytorch.org names for this driver; from a clone: make setup CONSTRAINTS="


def checks() -> list[Check]:
    if find_spec("torch") is None:
        return [Check("torch", lambda: [Finding("torch", "missing", "not installed", _NO_TORCH, _INSTALL)])]
    most = 2 * _LIMIT_S + _LATE_S  # what torch says of the GPUs is waited for first
    return [
        Check("torch", _torch, most),
        *(Check(f"attention {name}", functools.partial(_attention, name), most) for name in _BEHIND),
        Check("liger", _liger, most),
        Check("gloo", _gloo, _LIMIT_S + _LATE_S, alone=True),
        Check("nccl", _nccl, _LIMIT_S + _LATE_S, alone=True),
    ]


class _Once:
    """The first who asks has it looked up, the others wait for that, an error included."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self._look, self._lock, self._found = look, threading.Lock(), Future[Any]()

    def __call__(self) -> Any:
        with self._lock:
            if not self._found.done():
                try:
                    self._found.set_result(self._look())
                except Exception as error:
                    self._found.set_exception(error)
        return self._found.result()


_facts = _Once(lambda: elsewhere.ask("torch", limit_s=_LIMIT_S) if has_gpu_driver() else _built())


def _built() -> dict[str, Any]:
    """What `facts` says without a GPU; torch is not imported, which takes seconds."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    said = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    built = {"torch": said["__version__"], "cuda": said.get("cuda"), "hip": said.get("hip")}
    refusals = dict.fromkeys(NEED_A_GPU, "no GPU")
    return {**built, "error": "", "gpus": [], "kernels": [], "nccl": None, "refusals": refusals}


def _torch() -> Iterator[Finding]:
    found, cards = _facts(), gpus()
    built = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found["hip"] else "CPU"
    text = f"torch {found['torch']}, built for {built}"
    if found["gpus"]:
        if unknown := [card["name"] for card in found["gpus"] if not _has_kernels(card, found["kernels"])]:
            means = "no kernel of it runs there"
            yield Finding("torch", "failed", f"{text}; it has no kernels for {unknown[0]}", means, _CUDA)
        else:
            yield Finding("torch", "ok", f"{text}; it uses {len(found['gpus'])} GPU{_s(found['gpus'])}")
    elif cards:
        why = found["error"] or "it sees none"
        text += f"; of {len(cards)} GPU{_s(cards)} it can use none: {why}"
        yield Finding("torch", "failed", text, "trainings would run on the CPU", _CUDA)
    else:
        yield Finding("torch", "ok", text, "trainings run on the CPU, in float32 or bfloat16")


def _has_kernels(card: Mapping[str, Any], kernels: list[str]) -> bool:
    """Whether a build has code for a card: of its generation and no later, or what is compiled when used."""
    major, minor = card["capability"]
    for kernel in kernels:
        kind, _, number = kernel.partition("_")
        digits = number.rstrip("af")
        if not digits.isdigit():
            return True  # another vendor's names
        own_major, own_minor = divmod(int(digits), 10)
        if kind == "compute" and (own_major, own_minor) <= (major, minor):
            return True
        if kind == "sm" and own_major == major and own_minor <= minor:
            return True
    return not kernels


def _attention(name: str) -> Iterator[Finding]:
    title, means = f"attention {name}", _BEHIND[name]
    if name != "sdpa":
        reason = _facts()["refusals"].get(name)
        if reason is not None:
            fix = _TYPE.get(name, "") if "not installed" in reason else ""
            yield Finding(title, "missing", reason, means, fix)
            return
    yield _probed(title, means, elsewhere.ask("attention", name, "own", limit_s=_LIMIT_S))


def _probed(title: str, means: str, found: Mapping[str, Any]) -> Finding:
    text = f"{found['version']}, {found['dtype']} on {found['device']}"
    if found["failed"]:
        fix = "set `train.attention_backend` to another"
        return Finding(title, "failed", f"{text}: {found['failed']}", _BROKEN, fix)
    text += ": no document sees another"
    if found["parity"] is not None:
        text += f"; packed gradients are off by {found['parity']:.0e}"
    if found["parity_unpacked"] is not None:
        text += f", one by one by {found['parity_unpacked']:.0e}"
    return Finding(title, "ok", text, means)


def _liger() -> Iterator[Finding]:
    means = "`train.head: own` computes the same loss"
    if find_spec("liger_kernel") is None:
        yield Finding("liger", "missing", "liger-kernel is not installed", means, "pip install 'packcli[liger]'")
    elif not _facts()["gpus"]:
        yield Finding("liger", "missing", "liger-kernel is there, and no GPU for it", means)
    else:
        yield _probed("liger", means, elsewhere.ask("attention", "sdpa", "liger", limit_s=_LIMIT_S))


def _gloo() -> Iterator[Finding]:
    found = _looped_back("gloo", 2)
    yield Finding("gloo", "ok", _speed(found), "trainings of several processes on CPUs; checkpoints of any")


def _nccl() -> Iterator[Finding]:
    found = _facts()
    means = "trainings of several GPUs"
    if not found["gpus"]:
        yield Finding("nccl", "missing", "no GPU", means)
        return
    moved = _looped_back("nccl", min(2, len(found["gpus"])))
    text = f"NCCL {found['nccl']}: {_speed(moved)}"
    yield Finding("nccl", "ok", text, means if moved["ranks"] > 1 else "one GPU: links between GPUs are not tried")


def _looped_back(backend: str, ranks: int) -> dict[str, Any]:
    """Ranks in the environment that `packcli train` gives them; of each, what the first one says."""
    port = str(elsewhere.free_port())
    environments = [
        {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(ranks)
    ]
    asked = elsewhere.ask_several("loop-back", backend, limit_s=_LIMIT_S, environments=environments)
    found: dict[str, Any] = asked[0]
    return found


def _speed(found: Mapping[str, Any]) -> str:
    if found["ranks"] == 1:
        return "one process sums with itself"
    size = found["bytes"] // 2**20
    return f"two processes sum right; all-reduce of {size} MiB at {found['bus_gb_per_s']:.2g} GB/s (bus)"


def _s(items: Any) -> str:
    return "" if len(items) == 1 else "s"
