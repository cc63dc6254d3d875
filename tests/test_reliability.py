"""The 53 cases of faults, bad and hostile input: each has a test of its name, each promise the test it names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from conftest import REPO

CASES = range(1, 54)


def named() -> dict[str, set[str]]:
    """Names of test functions by file."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in sorted((REPO / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[file.name].add(node.name)
    return found


def test_a_case_has_no_test_of_its_name() -> None:
    names = {name for own in named().values() for name in own}
    numbers = {int(found[1]) for name in names if (found := re.match(r"test_case_(\d+)_\w", name))}
    assert sorted(set(CASES) - numbers) == []
    assert numbers <= set(CASES)


def test_a_promise_names_a_test_that_is_not_there() -> None:
    known, missing = named(), list[str]()
    for page in (REPO / "docs" / "reliability.md", REPO / "SECURITY.md"):
        for file, name in re.findall(r"`tests/(test_\w+\.py)::(test_\w+)`", page.read_text(encoding="utf-8")):
            if name not in known.get(Path(file).name, set()):
                missing.append(f"{page.name}: {file}::{name}")
    assert missing == []
