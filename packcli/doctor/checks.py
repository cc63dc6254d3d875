"""Questions to a machine: each has a time limit of its own, and none can end the others or keep them waiting."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from packcli.errors import MissingError, PackcliError
from packcli.log import is_secret

State = Literal["ok", "missing", "failed"]
Note = Callable[[int, int, str], None]
"""Progress: (checks that have ended, all of them, those that are waited for)."""

_LONGEST = 600
_LIKE_A_SECRET = re.compile(r"\b(hf_|sk-)\w{8,}|(?<=://)[^/\s@]+@")
_LEAST = 8  # characters; a shorter value is a word such as `true`, and stands in many texts


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    state      ok; missing: a capability is not there, and nothing is broken; failed: it is there and broken.
    found      facts. `means`: for who uses packcli. `fix`: what to type, or do; "": nothing.
    needed_by  what of the sweep asked about cannot do without it; "": nothing, or no sweep was asked about.
    wall_s     how long its check took.
    """

    name: str
    state: State
    found: str
    means: str = ""
    fix: str = ""
    needed_by: str = ""
    wall_s: float = 0.0

    @property
    def is_well(self) -> bool:
        return self.state == "ok" or (self.state == "missing" and not self.needed_by)


@dataclass(frozen=True, slots=True)
class Check:
    """`look` may raise: a `MissingError` is a `missing`, all else a `failed`. `alone`: after all others, as it
    measures; several such go one after another.
    """

    name: str
    look: Callable[[], Iterable[Finding]]
    limit_s: float = 15.0
    alone: bool = False


def run(checks: Sequence[Check], note: Note) -> list[Finding]:
    """All findings, in the order of the checks, whatever order they end in."""
    done: dict[str, list[Finding]] = {}
    together = [check for check in checks if not check.alone]
    for wave in (together, *([check] for check in checks if check.alone)):
        asked = [_Asked(check) for check in wave]
        while waiting := [one for one in asked if one.check.name not in done]:
            for one in waiting:
                if (answer := one.answer_or_none()) is not None:
                    done[one.check.name] = answer
            names = ", ".join(one.check.name for one in waiting[:3])
            note(len(done), len(checks), names)
            time.sleep(0.02)
    return [finding for check in checks for finding in done[check.name]]


class _Asked:
    """A check under way, on a thread that nobody has to wait for: a look at a dead file server never returns."""

    def __init__(self, check: Check) -> None:
        self.check, self._began = check, time.monotonic()
        self._answer: list[Finding] | None = None
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        name = self.check.name
        try:
            found = list(self.check.look())
        except MissingError as error:
            found = [Finding(name, "missing", error.cause, fix=error.fix)]
        except PackcliError as error:
            found = [Finding(name, "failed", error.cause, fix=error.fix)]
        except Exception as error:  # the doctor outlives whatever is ill
            found = [Finding(name, "failed", f"{type(error).__name__}: {error}")]
        wall_s = time.monotonic() - self._began
        self._answer = [_told(finding, wall_s) for finding in found]

    def answer_or_none(self) -> list[Finding] | None:
        if self._answer is None and time.monotonic() - self._began > self.check.limit_s:
            found = f"no answer in {self.check.limit_s:g} s"
            return [Finding(self.check.name, "failed", found, wall_s=self.check.limit_s)]
        return self._answer


def _told(finding: Finding, wall_s: float) -> Finding:
    found, means, fix = map(clean, (finding.found, finding.means, finding.fix))
    return replace(finding, found=found, means=means, fix=fix, wall_s=wall_s)


def clean(text: str) -> str:
    """On one line, and without a secret: libraries quote addresses and headers in what they raise."""
    found = " ".join(text.split())
    secrets = [value for name, value in os.environ.items() if is_secret(name) and len(value) >= _LEAST]
    for secret in sorted(secrets, key=len, reverse=True):
        found = found.replace(secret, "***")
    found = _LIKE_A_SECRET.sub("***", found)
    return found if len(found) <= _LONGEST else found[:_LONGEST] + " ..."
