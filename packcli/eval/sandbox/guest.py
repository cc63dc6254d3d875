"""What runs inside the sandbox: one program under limits, then a word that says it came to its end.

`sandbox.py` sends this file as text; it imports nothing of packcli and runs on any Python 3. stdin holds one JSON
document, {program, nonce, cpu_s}. The file whose number is `sys.argv[1]` is told "+" when the program begins, and
the nonce when it has ended without an exception: no exit status and no output can say that.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import sys
import traceback
import types
from collections.abc import Callable

MEMORY_BYTES = 512 * 2**20  # of each process
PROCESSES = 8  # threads count, and the sandbox's own first process
FILE_BYTES = 2**20
OPEN_FILES = 64


def main(channel: int) -> None:
    program, cpu_s, announce = receive(channel)
    limit(cpu_s)
    # A module of its own, as dataclasses and pickle expect; not `__main__`: no benchmark's scorer runs that block.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    random.seed(0)
    os.write(channel, b"+")
    code = 1
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), module.__dict__)
        announce()
        code = 0
    except BaseException:
        sys.stderr = sys.__stderr__  # the program may have put another one there
        traceback.print_exc()
    finally:
        os._exit(code)  # whatever threads and exit handlers the program left


def receive(channel: int) -> tuple[str, int, Callable[[], int]]:
    """The program, its seconds of CPU, and what announces its end. stdin is empty from here on."""
    parts = []
    while part := os.read(0, 2**16):
        parts.append(part)
    order = json.loads(b"".join(parts))
    nonce = order["nonce"].encode()
    # Held by the closure alone: no frame below the program's has it as a name.
    return order["program"], order["cpu_s"], lambda: os.write(channel, nonce)


def limit(cpu_s: int) -> None:
    """Each process started from here on inherits these, and without privileges none can raise them."""
    with contextlib.suppress(OSError):  # where memory ends after all, the kernel takes this and not the evaluation
        os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"1000")
    for kind, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        # Set inside: in a user namespace of its own it counts the sandbox's processes, not all of the user's.
        (resource.RLIMIT_NPROC, PROCESSES),
        # The kernel's word for "no core at all"; 0 would still feed a handler that the system pipes cores to.
        (resource.RLIMIT_CORE, 1),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    main(int(sys.argv[1]))
