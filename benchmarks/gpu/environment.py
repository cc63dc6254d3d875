"""What the benchmark ran on, and what had to be brought to it."""

from __future__ import annotations

import ctypes
import importlib.util
import lzma
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from packcli import flops
from packcli.errors import ConfigError
from packcli.model import attention

PACKAGES = ("torch", "triton", "transformers", "flash-attn", "flash-attn-3", "flash-attn-4", "trl", "liger-kernel")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device; the peak is the data sheet's, and None for a device that has none there."""
    found: dict[str, Any] = {
        "device": "CPU",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "attention": backends(device),
        "peak_flops": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "peak_flops": flops.peak(properties.name),
        }
    return found


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def backends(device: torch.device) -> str:
    """What `auto` takes, and why."""
    try:
        chosen = attention.choose("auto", device, torch.bfloat16)
    except ConfigError as error:
        return str(error.args[0])
    return f"{chosen.name} {chosen.version} ({chosen.why})"


def fa3(wheels: str) -> str | None:
    """Let torch's varlen attention run FlashAttention 3, from `fa3_C.so.xz` in `wheels`; else why not.

    That is flash_attn_3/_C.so of the wheel of xformers 0.0.34, compressed. It wants CUDA 12's runtime, which the
    wheel nvidia-cuda-runtime-cu12 brings.
    """
    library = Path(wheels) / "fa3_C.so.xz"
    if not library.exists():
        return f"{library.name} was not brought"
    package = Path(tempfile.mkdtemp()) / "packfa3"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_C.so").write_bytes(lzma.decompress(library.read_bytes()))
    try:
        from torch.nn.attention import _fa3

        for runtime in _libraries("libcudart.so.12"):
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        sys.path.insert(0, str(package.parent))
        _fa3.register_flash_attention_fa3(module_path="packfa3._C")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _libraries(name: str) -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    return [found for root in roots for found in Path(root).glob(f"*/lib/{name}")]


if __name__ == "__main__":
    from timing import device_of, emit, setting

    emit("environment", **environment(device_of(setting()["device"])))
