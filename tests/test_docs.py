"""Commands, pictures and tests that README.md and docs/*.md name.

A fenced block marked `bash` is run as it stands, in the order of its page, in a directory that has the sweeps,
the profiles and the chats of docs/own_data.md. One that needs what a test has not says so (`bash cluster`). All
commands are parsed: command, options, files and keys have to be there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import REPO

from packcli import sweepfile
from packcli.cli import app
from packcli.config import LENGTHS_ALONE
from packcli.launch import profile

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
NEEDS = {
    "checkpoint": "a trained model",
    "cluster": "a SLURM",
    "gpu": "GPUs",
    "hub": "the Hugging Face hub",
    "install": "a package index",
    "judge": "a judge's server",
    "minutes": "longer than a test may take",
}
"""What may stand behind `bash`, and what it stands for."""

OTHERS = {"--cap-add", "--log_samples"}
"""Options of Docker and lm-eval that pages name."""

_COMMAND = re.compile(r"\s*(?:packcli|make)\s+\S")
_FILE = re.compile(r"^cat > (\S+) <<'(\w+)'\n(.*?)^\2$", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^```(.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: the words behind ```, its text, and whether a test runs it."""

    words: tuple[str, ...]
    text: str

    @property
    def runs(self) -> bool:
        return self.words == ("bash",)

    def commands(self) -> list[list[str]]:
        """Its packcli and make commands as arguments, without comments and what follows `>`, `|` or `&&`."""
        lines = _FILE.sub("", self.text).replace("\\\n", " ").splitlines()
        return [_arguments(line) for line in lines if _COMMAND.match(line)]


def _arguments(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    end = next((n for n, word in enumerate(words) if word in (">", "|", "&&", ";")), len(words))
    return words[:end]


def split(text: str) -> tuple[list[Block], list[str]]:
    """Fenced blocks of a page, and its lines outside of them."""
    blocks, outside = list[Block](), list[str]()
    words, inside = tuple[str, ...](), None
    for line in text.splitlines():
        fence = _FENCE.match(line)
        if fence and inside is None:
            words, inside = tuple(fence[1].split()), list[str]()
        elif fence and inside is not None:
            blocks.append(Block(words, "\n".join([*inside, ""])))
            inside = None
        else:
            (outside if inside is None else inside).append(line)
    return blocks, outside


def page(path: Path) -> tuple[list[Block], list[str]]:
    return split(path.read_text(encoding="utf-8"))


def unclaimed(blocks: list[Block], outside: list[str]) -> list[str]:
    """Commands that are neither run nor marked with what they need."""
    found = [line for line in outside if line.startswith(("    ", "\t")) and _COMMAND.match(line)]
    for block in blocks:
        known = block.words[:1] == ("bash",) and set(block.words[1:]) <= NEEDS.keys()
        found += [] if known else [shlex.join(words) for words in block.commands()]
    return found


_ROOT: Any = typer.main.get_command(app)


def parsed(words: list[str]) -> dict[str, Any]:
    """The values that a command line gives to the parameters of its command; a usage error otherwise."""
    command = _ROOT.commands[words[1]]
    values: dict[str, Any] = command.make_context(words[1], words[2:]).params
    return values


def _options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }


def _targets() -> set[str]:
    lines = (REPO / "Makefile").read_text(encoding="utf-8").splitlines()
    return {line.partition(":")[0] for line in lines if re.match(r"[a-z-]+:", line)}


def _link(directory: Path) -> Path:
    for name in ("sweeps", "slurm"):
        (directory / name).symlink_to(REPO / name)
    return directory


def _ids(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", PAGES, ids=_ids)
def test_a_command_is_neither_run_nor_marked(path: Path) -> None:
    assert unclaimed(*page(path)) == []


def test_a_command_in_no_block_or_of_unknown_needs_passes() -> None:
    text = (
        "    packcli sweep a.yaml\n```\nmake test\n```\n```bash luck\nmake x\n```\n```bash hub\npackcli y\n```\n"
    )
    assert unclaimed(*split(text)) == ["    packcli sweep a.yaml", "make test", "make x"]


@pytest.mark.parametrize("path", PAGES, ids=_ids)
def test_a_command_or_an_option_is_not_there(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep files have to be there or made by the page; `SWEEP` stands for the reader's own."""
    monkeypatch.chdir(_link(tmp_path))
    blocks, outside = page(path)
    for block in blocks:
        for name, _, text in _FILE.findall(block.text):
            Path(name).write_text(text, encoding="utf-8")
        for words in block.commands():
            _check(words)
    for command in re.findall(r"`((?:packcli|make) [^`]+)`", " ".join(outside)):
        _check_named(command)
    everywhere = set[str]().union(*map(_options, _ROOT.commands.values()))
    if path.stem not in ("benchmarks", "slurm_profile"):  # which name options of scripts and of `sbatch`
        alone = set(re.findall(r"`(--[\w-]+)", " ".join(outside)))
        assert alone <= everywhere | OTHERS


def _check(words: list[str]) -> None:
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= _targets(), words
        return
    values = parsed(words)
    if (on := values.get("on", "local")) != "local":
        profile.load(Path(on))
    sweep = str(values.get("sweep") or values.get("what") or "")
    if sweep.endswith(".yaml"):
        sweepfile.load(Path(sweep), values["set_"] or (), values["only"] or ())


def _check_named(command: str) -> None:
    """A command in running text, which may leave out or stand for anything but its name and its options."""
    name, *words = command.split()
    if name == "make":
        assert words[0] in _targets() or "=" in words[0], command
    elif words[0].startswith("--"):
        assert words[0] in _options(_ROOT), command
    else:
        assert words[0] in _ROOT.commands, command
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= _options(
            _ROOT.commands[words[0]]
        ), command


def test_a_command_that_is_wrong_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_link(tmp_path))
    for line in (
        "make nothing",
        "packcli nothing",
        "packcli sweep sweeps/tiny.yaml --nothing",
        "packcli sweep sweeps/nothing.yaml",
        "packcli sweep sweeps/tiny.yaml --set train.nothing=1",
        "packcli sweep sweeps/tiny.yaml --only arm=nothing",
        "packcli sweep sweeps/tiny.yaml --on slurm/nothing.yaml",
        "packcli report sweeps/tiny.yaml --format nothing",
    ):
        with pytest.raises(Exception, match="nothing"):
            _check(_arguments(line))
    with pytest.raises(AssertionError):
        _check_named("packcli sweep SWEEP --nothing")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader sits: the repository's files, `packcli` and `python` on the path, chats to try it on."""
    directory = _link(tmp_path_factory.mktemp("desk"))
    programs = directory / ".bin"
    programs.mkdir()
    for name, module in (("python", ""), ("packcli", "-m packcli")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        (programs / name).chmod(0o755)
    chats = next(block for block in page(REPO / "docs" / "own_data.md")[0] if block.runs)
    _run(chats, directory)
    assert (directory / "chats.jsonl").exists()
    return directory


def _run(block: Block, desk: Path) -> None:
    path = os.pathsep.join((str(desk / ".bin"), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=desk,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": path, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if any(b.runs for b in page(path)[0])], ids=_ids)
def test_a_command_of_the_docs_fails(path: Path, desk: Path) -> None:
    for block in page(path)[0]:
        if block.runs:
            _run(block, desk)


def test_a_picture_is_not_what_the_arms_do() -> None:
    directory = REPO / "docs" / "pictures"
    spec = importlib.util.spec_from_file_location("make_pictures", directory / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = {name: text.encode() for name, text in module.pictures().items()}
    assert made == {path.name: path.read_bytes() for path in directory.glob("*.svg")}
    assert made.keys() == {f"{arm}.svg" for arm in LENGTHS_ALONE}
    shown = re.findall(r"\(pictures/(\S+\.svg)\)", (REPO / "docs" / "arms.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(made)


def test_a_test_that_the_docs_name_is_not_there() -> None:
    named = {
        found
        for path in PAGES
        for found in re.findall(r"`tests/(test_\w+\.py)::(\w+)`", path.read_text(encoding="utf-8"))
    }
    assert named
    for file, name in sorted(named):
        text = (REPO / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:async )?def {name}\(", text, re.MULTILINE), f"{file}::{name}"


@pytest.mark.parametrize("path", PAGES, ids=_ids)
def test_a_link_leads_nowhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert [page.name for page in PAGES[1:] if path == PAGES[0] and f"docs/{page.name}" not in text] == []
