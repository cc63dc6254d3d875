"""Time one packer on given lengths: `packers.py PACKER LENGTHS.npy MAX_LENGTH`. Prints JSON.

Runs in the environment of the program whose packer it is; `../packing.py` calls it. The packer alone is timed, not
the imports, reading the lengths or compiling. A peer's is called as its program calls it, less what that adds
around it: LLaMA-Factory's returns lengths and names no documents, TRL's gets documents without tokens, so that
there are none to move, and no `datasets.map` around it.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Packer = Callable[[Ints, int], int]  # lengths, max_length -> number of rows

WINDOW = 1000  # documents that TRL and LLaMA-Factory pack at a time by default, and the paper's code


def packcli(name: str) -> Packer:
    from packcli import packing, released

    if not name.startswith("released."):
        return lambda lengths, max_length: (
            getattr(packing, name)(lengths, max_length, np.random.default_rng(1)).num_rows
        )
    packer = getattr(released, name.removeprefix("released."))
    return lambda lengths, max_length: (
        packer(lengths, max_length, released.windows(len(lengths), WINDOW, 64)).num_rows
    )


def trl(name: str) -> Packer:
    """`pack_dataset(strategy="bfd")`."""
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    def bfd(lengths: Ints, max_length: int) -> int:
        ends = np.append(0, np.cumsum(lengths))
        small = ends[-1] < 2**31
        kind, offsets = (pa.ListArray, pa.int32()) if small else (pa.LargeListArray, pa.int64())
        documents = kind.from_arrays(pa.array(ends, offsets), pa.nulls(int(ends[-1])))
        return len(_pack_bfd(pa.table({"input_ids": documents}), max_length))

    return bfd if name == "bfd, whole set" else _windowed(bfd)


def llamafactory(name: str) -> Packer:
    """What `packing: true` decides by which documents share a row."""
    processor = _file("llamafactory", "data/processor/processor_utils.py")

    def knapsack(lengths: Ints, max_length: int) -> int:
        return len(processor.greedy_knapsack(lengths.tolist(), max_length))

    return knapsack if name == "greedy_knapsack, whole set" else _windowed(knapsack)


def axolotl(name: str) -> Packer:
    """`MultipackBatchSampler` as its configuration sets it by default: groups of 100,000, 200 a row."""
    for stub, function in (("distributed", "reduce_and_broadcast"), ("logging", "get_logger")):
        sys.modules[f"axolotl.utils.{stub}"] = module = ModuleType(stub)  # imported, and not for packing
        setattr(module, function, logging.getLogger)
    sampler = _file("axolotl", "utils/samplers/multipack.py")

    def parallel(lengths: Ints, max_length: int) -> int:
        rows = sampler.pack_parallel(
            lengths.astype(np.int32), bin_capacity=max_length, group_size=100_000, bin_size=200, num_processes=1
        )
        return len(rows)

    def sequential(lengths: Ints, max_length: int) -> int:
        return len(sampler.allocate_sequentially(lengths.astype(np.int32), 0, max_length, 1)[0])

    return parallel if name == "pack_parallel" else sequential


def _file(program: str, name: str) -> ModuleType:
    """One file of an installed program, without what its packages import."""
    package = find_spec(program)
    assert package is not None
    assert package.submodule_search_locations is not None
    found = spec_from_file_location(Path(name).stem, Path(package.submodule_search_locations[0]) / name)
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    sys.modules[module.__name__] = module
    found.loader.exec_module(module)
    return module


def _windowed(packer: Packer) -> Packer:
    return lambda lengths, max_length: sum(
        packer(lengths[first : first + WINDOW], max_length) for first in range(0, len(lengths), WINDOW)
    )


PROGRAMS = {"packcli": packcli, "trl": trl, "llamafactory": llamafactory, "axolotl": axolotl}


def main() -> None:
    full_name, file, max_length = sys.argv[1:]
    program, name = full_name.split(":")
    lengths = np.load(file)
    packer = PROGRAMS[program](name)
    packer(lengths[:2000], int(max_length))  # compiles
    before = resource.getrusage(resource.RUSAGE_SELF)
    rows = packer(lengths, int(max_length))
    after = resource.getrusage(resource.RUSAGE_SELF)
    user_s, system_s = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    result = {"rows": rows, "cpu_s": user_s + system_s, "user_s": user_s, "peak_mib": after.ru_maxrss / 1024}
    print(json.dumps({"version": version(program), **result}))


if __name__ == "__main__":
    main()
