"""Public files that judging needs and packcli does not ship: found below `--bench-data`, checked, filled in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packcli.errors import IntegrityError, MissingError

_DELIMITER = re.compile(r"<\|[^|\n]{1,60}\|>|\[(?:The (?:Start|End) of|End of) [^\]\n]{1,40}\]")


@dataclass(frozen=True, slots=True)
class PublicFile:
    """A file by its path below `--bench-data`, its sha256, and where it can be fetched."""

    path: str
    sha256: str
    url: str


def read(bench_data: Path | None, file: PublicFile) -> str:
    """The text of `file`.

    Raises:
        MissingError: it is not there.
        IntegrityError: it has another sha256: scores by another template are other scores.
    """
    fix = f"fetch {file.url} to `{file.path}` below the directory of `--bench-data`"
    if bench_data is None:
        raise MissingError(f"judging needs the file `{file.path}`, which packcli does not ship", fix)
    path = bench_data / file.path
    try:
        content = path.read_bytes()
    except OSError:
        raise MissingError(f"judging needs the file `{path}`, which is not there", fix) from None
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise IntegrityError(f"`{path}` has sha256 {found[:12]}, expected {file.sha256[:12]}", fix)
    return content.decode("utf-8")


def fill(template: str, values: Mapping[str, str], opening: str) -> str:
    """`template` with each `{name}` (`{$name}` where `opening` is `{$`) replaced by its value, in one pass.

    What is put in is never looked at again: an answer that holds `{$checklist}` stays as the model wrote it.

    Raises:
        KeyError: the template names a value that is not given.
    """
    return re.sub(re.escape(opening) + r"(\w+)\}", lambda found: shown(values[found[1]]), template)


def shown(text: str) -> str:
    """`text` as it can be sent: lone surrogates, which UTF-8 cannot hold, become `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def breaks_out(template: str, answers: tuple[str, ...]) -> bool:
    """Whether an answer holds one of the marks by which `template` shows the judge where answers start and end."""
    marks = set(_DELIMITER.findall(template))
    return any(mark in answer for mark in marks for answer in answers)
