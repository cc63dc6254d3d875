"""Where tests kill a process: all that makes something durable passes here, just before and just after.

Nothing happens unless PACKCLI_FAULT_LOG names a file, which only test runs do: a stray PACKCLI_FAULT alone is not
looked at. Each passing appends its name, `PATH:MOMENT`, to that file, which so counts over all processes.
What PACKCLI_FAULT asks for is done at the K-th passing (if not given, the first) of a name that ends in NAME:

    kill:NAME:K           SIGKILL to the process that passes
    enospc:NAME:K         the disk is full
    pause:NAME:SECONDS    it waits so long, each time

A path in a directory that is not finished is named as if it were. MOMENT is `before` or `after`; `gone` where
something was deleted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import time
from pathlib import Path

_UNFINISHED = re.compile(r"\.([^/]+)\.tmp-[^/]+")


def passing(path: Path | str, moment: str) -> None:
    """Pass a commit point.

    Raises:
        OSError: a test asked for a full disk here.
    """
    log = os.environ.get("PACKCLI_FAULT_LOG")
    if log is None:
        return
    name = _UNFINISHED.sub(r"\1", f"{path}:{moment}")
    action, _, rest = os.environ.get("PACKCLI_FAULT", "").partition(":")
    wanted, number = re.fullmatch(r"(.*?)(?::(\d+))?", rest).groups()  # type: ignore[union-attr]  # it matches all

    def is_meant(passed: str) -> bool:
        return bool(wanted) and f"/{passed}".endswith(f"/{wanted}")

    with Path(log).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{name}\n")
        file.flush()
        file.seek(0)
        times = sum(map(is_meant, file.read().splitlines()))
    if not is_meant(name):
        return
    if action == "pause":
        time.sleep(float(number or 0))
    elif times == int(number or 1):
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
