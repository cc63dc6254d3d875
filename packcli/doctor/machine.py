"""What this machine is, and which packages are here: facts that need no heavy library."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from packcli import __version__
from packcli.doctor.checks import Check, Finding
from packcli.errors import RunError
from packcli.processes import cores

GIB = 2**30
_SMI_S = 10.0
_SMI = ("name", "driver_version", "compute_cap", "memory.total", "memory.free")
_HELD = 0.9
"""Before a model is loaded, a GPU of which less is free is somebody else's too."""
_SHOWN = ("torch", "transformers", "tokenizers", "datasets", "lm-eval", "submitit")
_NAME = "packcli"
# What an extra is for, as what one cannot do without it. Of `flash` and `liger` other checks speak.
_EXTRAS: Mapping[str, str] = {
    "train": "nothing is trained or scored on this machine",
    "eval": "no benchmark is scored",
    "judge": "no judge is asked: WildBench and MT-bench are not scored",
    "data": "no dataset of the Hugging Face Hub is read; files are",
    "lora": "no `train.lora`",
    "plot": "`report --figures` draws nothing; tables and the HTML page work",
    "related": "no `group_by: similarity` and the like",
    "slurm": "nothing is submitted to a cluster: `--on slurm/PROFILE.yaml`",
    "track": "no curves in TensorBoard or W&B; `metrics.jsonl` has them all",
    "longbench": "LongBench is not scored",
}


def checks() -> list[Check]:
    return [
        Check("installation", _installation),
        Check("versions", _versions),
        Check("extras", _extras),
        Check("cpu", _cpu),
        Check("memory", _memory),
        Check("gpu", _gpu, _SMI_S + 2),
    ]


# Packages -----------------------------------------------------------------------------------------------


def _installation() -> Iterator[Finding]:
    home = Path(__file__).resolve().parents[2]
    how = "installed in" if "site-packages" in home.parts else "runs from"
    python = f"Python {platform.python_version()} ({shown(Path(sys.executable))})"
    yield Finding("installation", "ok", f"packcli {__version__} {how} {shown(home)}; {python}")


def size(num_bytes: float) -> str:
    """`1.5 GiB`, `20.6 MiB`."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:,.1f} MiB"


def shown(path: Path) -> str:
    """A path as a shell takes it, shorter where it lies in the home directory."""
    home = Path.home()
    return str("~" / path.relative_to(home)) if path.is_relative_to(home) else str(path)


def _versions() -> Iterator[Finding]:
    shown = [f"{name} {version}" for name in _SHOWN if (version := _version(name))]
    wrong = list(dict.fromkeys(_wrong()))
    if wrong:
        means = "packcli is not tested with it, and much of it will not work"
        pip = " ".join(f"'{_plain(requirement)}'" for requirement in wrong)
        text = ", ".join(f"{one.name} {_version(one.name) or 'missing'}" for one in wrong)
        yield Finding("versions", "failed", f"not what packcli allows: {text}", means, f"pip install {pip}")
    else:
        yield Finding("versions", "ok", ", ".join(shown), "as packcli allows them")


def _wrong() -> Iterator[Requirement]:
    """What is installed in a version that packcli does not allow, and what it cannot do without."""
    for requirement in _requirements(_NAME, ("", *_known_extras())):
        version = _version(requirement.name)
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        if version is None and optional:
            continue
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield requirement


def _extras() -> Iterator[Finding]:
    lacks = {extra: _lacking(Requirement(f"{_NAME}[{extra}]")) for extra in _EXTRAS if extra in _known_extras()}
    there = [extra for extra, names in lacks.items() if not names]
    yield Finding("extras", "ok", f"installed: {', '.join(there) or 'none'}")
    for extra, names in lacks.items():
        if names:
            found, fix = f"not installed: {', '.join(names)}", f"pip install '{_NAME}[{extra}]'"
            yield Finding(f"extra {extra}", "missing", found, _EXTRAS[extra], fix)


def _lacking(asked: Requirement) -> list[str]:
    """Packages that are not installed, of one and of the extras asked of it; as deep as extras name others."""
    if _version(asked.name) is None:
        return [asked.name]
    own = [name for extra in asked.extras for one in _requirements(asked.name, (extra,)) for name in _lacking(one)]
    return list(dict.fromkeys(own))


def _requirements(name: str, extras: tuple[str, ...]) -> list[Requirement]:
    """Of an installed package, here: those of the extras named ("": those without)."""
    found = [Requirement(text) for text in metadata.requires(name) or ()]
    return [
        one
        for one in found
        if any(_holds(one, extra) for extra in extras) and ("" in extras or not _holds(one, ""))
    ]


def _holds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _known_extras() -> tuple[str, ...]:
    return tuple(metadata.metadata(_NAME).get_all("Provides-Extra") or ())


def _plain(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# Cores and memory ---------------------------------------------------------------------------------------


def _cpu() -> Iterator[Finding]:
    counted, allowed, quota = os.cpu_count() or 1, cores(), _quota()
    found = f"{counted} core{'s' if counted > 1 else ''}, {platform.machine()}"
    least = min(float(allowed), quota or allowed)
    if least < counted:
        found += f", of which {least:g} may be used"
        # What is started here is counted by cores.
        means = f"packcli starts a thread a core: `train.threads: {max(1, int(least))}`, `data.processes` alike"
        yield Finding("cpu", "ok", found, means)
    else:
        yield Finding("cpu", "ok", found)


def _quota() -> float | None:
    """Cores that a container may use, where it is limited."""
    quotas = []
    for text in _cgroup("cpu.max"):
        most, _, period = text.partition(" ")
        quotas += [int(most) / int(period)] if most != "max" else []
    return min(quotas, default=None)


def memory_limit_bytes() -> int | None:
    """What a container, or a job of SLURM, may use of memory; None: all."""
    texts = [*_cgroup("memory.max"), *_cgroup("memory/memory.limit_in_bytes")]
    limits = [int(text) for text in texts if text != "max"]
    return min((limit for limit in limits if limit < 2**60), default=None)  # the older kind's word for none


def _cgroup(name: str) -> Iterator[str]:
    """What a file of control groups says, of our group and of those it lies in."""
    top = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    own = next((line.partition("::")[2] for line in lines if line.startswith("0::")), "/")
    group = top / own.lstrip("/")
    for directory in (group, *group.parents):
        if directory.is_relative_to(top) and (directory / name).is_file():
            yield (directory / name).read_text().strip()


def memory_bytes() -> tuple[int, int] | None:
    """(all, available) of this machine, or of what a container may use of it; None: not Linux, which says it."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    limit = memory_limit_bytes()
    if limit is None or limit >= total:
        return total, available
    used = max((int(text) for text in _cgroup("memory.current")), default=0)
    return limit, min(available, max(0, limit - used))


def _memory() -> Iterator[Finding]:
    if (known := memory_bytes()) is None:
        yield Finding("memory", "ok", "not known: asked of Linux only")
        return
    total, available = known
    limited = " (a limit of its control group)" if total == memory_limit_bytes() else ""
    yield Finding("memory", "ok", f"{size(total)}{limited}, {size(available)} available")


# GPUs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Card:
    """Memory in bytes; None: the driver does not say."""

    name: str
    driver: str
    capability: str
    total_bytes: int | None
    free_bytes: int | None


@functools.cache
def gpus() -> tuple[Card, ...]:
    """NVIDIA's cards, by their driver's own word; none without `nvidia-smi`.

    Raises:
        RunError: it does not answer, or answers that something is wrong.
    """
    if (smi := shutil.which("nvidia-smi")) is None:
        return ()
    command = [smi, f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S, check=False)
    except subprocess.TimeoutExpired:
        raise RunError(
            f"nvidia-smi does not answer in {_SMI_S:g} s", "look at `dmesg`; restart the machine"
        ) from None
    if done.returncode:
        said = (done.stdout or done.stderr).strip().partition("\n")[0]
        raise RunError(f"nvidia-smi: {said}", "load the driver that is installed: restart the machine")
    return tuple(_card(line) for line in done.stdout.splitlines() if line.count(",") == len(_SMI) - 1)


def _card(line: str) -> Card:
    name, driver, capability, *sizes = (part.strip() for part in line.split(","))
    total, free = (int(size) * 2**20 if size.isdigit() else None for size in sizes)
    return Card(name, driver, capability, total, free)


def _gpu() -> Iterator[Finding]:
    cards = gpus()
    if not cards:
        means = "trainings run on the CPU: toys and rehearsals. Attention is document by document"
        yield Finding("gpu", "missing", "none (no nvidia-smi, or it lists none)", means)
        return
    for number, card in enumerate(cards):
        name = f"gpu {number}" if len(cards) > 1 else "gpu"
        found = f"{card.name}, compute capability {card.capability}, driver {card.driver}"
        means = ""
        if card.total_bytes and card.free_bytes is not None:
            found += f"; {size(card.free_bytes)} of {size(card.total_bytes)} free"
            if card.free_bytes < _HELD * card.total_bytes:
                means = "another process holds some of its memory: `nvidia-smi` says which"
        yield Finding(name, "ok", found, means)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
