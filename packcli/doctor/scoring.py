"""What scoring takes beside packages: a sandbox for code that models write, NLTK's splitter of sentences."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from packcli.doctor import elsewhere
from packcli.doctor.checks import Check, Finding, State
from packcli.doctor.machine import has
from packcli.errors import MissingError

_SANDBOX_S, _NLTK_S = 60.0, 30.0
_PUNKT = "punkt_tab"


def checks(bench_data: Sequence[str]) -> list[Check]:
    """`bench_data`: directories of benchmark files that a sweep names; NLTK's data may lie in one."""
    return [Check("sandbox", _sandbox, _SANDBOX_S), Check("nltk", lambda: _nltk(bench_data), _NLTK_S + 1)]


def _sandbox() -> Iterator[Finding]:
    from packcli.eval.sandbox import sandbox

    try:
        box = sandbox.find()
    except MissingError as error:
        state: State = "missing" if shutil.which("bwrap") is None else "failed"
        yield Finding(
            "sandbox", state, error.cause, "HumanEval is not scored: no code of a model is run", error.fix
        )
        return
    found = f"{box.name}: tried, and a program inside could do nothing it must not"
    yield Finding("sandbox", "ok", found, "HumanEval's programs run in it")


def _nltk(bench_data: Sequence[str]) -> Iterator[Finding]:
    means, fix = "IFEval leaves out the prompts that it checks by sentences", f"python -m nltk.downloader {_PUNKT}"
    if not has("nltk"):
        yield Finding("nltk", "missing", "the package nltk is not installed", means, "pip install 'packcli[eval]'")
        return
    place, why = elsewhere.ask("sentences", *bench_data, limit_s=_NLTK_S)
    if not place:
        yield Finding("nltk", "missing", f"NLTK's {_PUNKT} is in none of its directories", means, fix)
    elif why:
        found = f"NLTK's {_PUNKT} is there and cannot be used: {why}"
        yield Finding("nltk", "failed", found, means, f"delete {place}, then {fix}")
    else:
        yield Finding("nltk", "ok", f"{_PUNKT} splits sentences", "all of IFEval is scored")


def split(*bench_data: str) -> tuple[str, str]:
    """(where NLTK's data is, "" for nowhere; what is wrong with it, "" for nothing). It loads slowly."""
    import nltk

    nltk.data.path.extend(str(Path(directory) / "nltk_data") for directory in bench_data)
    try:
        place = str(nltk.data.find(f"tokenizers/{_PUNKT}"))
    except LookupError:
        return "", ""
    try:
        count = len(nltk.sent_tokenize("It rains. It pours."))
    except Exception as error:  # cut short or in another format: each is an error of another class
        return place, type(error).__name__
    return place, "" if count == 2 else f"two sentences are {count} to it"
