"""The rules of the layout: each keeps one kind of change in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "packcli"
FILES = sorted(PACKAGE.rglob("*.py"))

# A file imports files of lower rank, or of its own rank in its own folder (`eval/`: with what is below it).
RANKS = {
    "errors": 0,
    "deadline": 0,
    "commit_points": 0,
    "files": 0,
    "log": 0,
    "processes": 0,
    "seeds": 0,
    "yamlfile": 1,
    "whose": 1,
    "config": 1,
    "sweepfile": 2,
    "batching": 2,
    "cutting_stock": 2,
    "packing": 2,
    "patterns": 2,
    "grouping": 2,
    "released": 2,
    "flops": 2,
    "memory": 2,
    "shapes": 2,
    "rates": 3,
    "plan": 3,
    "estimate": 3,
    "papersteps": 3,
    "store": 3,
    "data": 4,
    "costs": 7,
    "download": 5,
    "model": 5,
    "train": 6,
    "eval": 6,
    "fingerprints": 7,
    "stages": 7,
    "audit": 8,
    "report": 8,
    "importers": 8,
    "launch": 9,
    "views": 10,
    "evaluation": 10,
    "doctor": 10,
    "fetch": 10,
    "console": 10,
    "cli": 11,
    "__main__": 12,
}
HEAVY = ("torch", "transformers", "datasets", "submitit", "lm_eval", "matplotlib", "openai")
# What a run directory holds. A whole literal, or the beginning of one: a message may still say "manifest.json".
NAMES = {
    "manifest.json",
    "failure.json",
    "job.json",
    "submitted.json",
    "plan.json",
    "metrics.jsonl",
    "config.yaml",
    "rows.arrow",
    "validation.arrow",
    "results.json",
    "samples.jsonl",
    "rejected.jsonl",
    "fingerprints.json",
    "final",
    "runs/store",
    "array.json",
    "submission.sh",
}
PREFIXES = ("checkpoint-", "shard-", "worker-", "workers-", "array-", "process-")


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def module(file: Path) -> tuple[str, ...]:
    """`packcli/data/chat.py` -> ("data", "chat"); the root package -> ()."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def rank(name: tuple[str, ...]) -> int:
    """The rank of a module; `packcli` itself, which holds only the version, is below all."""
    return RANKS[name[0]] if name else -1


def imported(file: Path) -> Iterator[tuple[tuple[str, ...], int]]:
    """(module of ours, line) of every import, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # The last part may be a module (`from packcli.data import chat`) or a name in one.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *parts = name.split(".")
            if first == "packcli":
                yield existing(tuple(parts)), node.lineno


def existing(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The longest beginning that is a module."""
    while parts:
        path = PACKAGE.joinpath(*parts)
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return parts
        parts = parts[:-1]
    return ()


def strings(file: Path) -> Iterator[tuple[str, int]]:
    """(text, line) of string literals, parts of f-strings included, docstrings left out."""
    parsed = tree(file)
    documentation = {
        id(node.value)
        for node in ast.walk(parsed)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(parsed):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value, node.lineno


def test_every_file_has_a_rank() -> None:
    assert {module(file)[0] for file in FILES if module(file)} <= RANKS.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_no_file_imports_a_layer_above_it(file: Path) -> None:
    own = module(file)
    folder = own if file.name == "__init__.py" else own[:-1]
    upward = [
        f"{file.relative_to(PACKAGE.parent)}:{line}: {'.'.join(other)}"
        for other, line in imported(file)
        if not (rank(other) < rank(own) or (rank(other) == rank(own) and other[:-1][:1] == folder[:1]))
    ]
    assert upward == []


def test_the_walk_above_sees_imports_in_functions_and_under_type_checking(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from packcli.cli import main\n"
        "def f():\n    import packcli.stages\n    from packcli.data import chat\n    from packcli import log\n"
    )
    assert {name for name, _ in imported(sample)} == {("cli",), ("stages",), ("data", "chat"), ("log",)}


def test_train_and_eval_meet_only_on_disk() -> None:
    for file in FILES:
        own = module(file)
        if own and own[0] in ("train", "eval"):
            other = {"train": "eval", "eval": "train"}[own[0]]
            assert other not in {name[0] for name, _ in imported(file) if name}, file


def test_importing_the_command_line_loads_no_heavy_library() -> None:
    code = f"import sys, packcli.cli; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_planning_a_sweep_loads_no_torch_and_no_lm_eval() -> None:
    code = (
        "import sys; from packcli import stages, sweepfile, store\n"
        "from packcli.launch import local; from packcli.report import ledger, status\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_only_the_store_spells_a_path_in_a_run_directory() -> None:
    spelled = [
        f"{file.relative_to(PACKAGE.parent)}:{line}: {text!r}"
        for file in FILES
        if module(file) != ("store",)
        for text, line in strings(file)
        if text in NAMES or text.startswith(PREFIXES)
    ]
    assert spelled == []


def test_only_the_collator_makes_position_ids() -> None:
    made = []
    for file in FILES:
        if module(file) == ("model", "collate"):
            continue
        for node in ast.walk(tree(file)):
            keys: list[ast.expr | None] = []
            if isinstance(node, ast.Dict):
                keys = list(node.keys)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                keys = [t.slice for t in targets if isinstance(t, ast.Subscript)]
                keys += [ast.Constant(t.id) for t in targets if isinstance(t, ast.Name)]
            if any(isinstance(key, ast.Constant) and key.value in ("position_ids", "cu_seqlens") for key in keys):
                made.append(f"{file.relative_to(PACKAGE.parent)}:{node.lineno}")
    assert made == []


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [file for file in FILES if drawers & set(module(file))] == []


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{file.relative_to(PACKAGE.parent)}:{node.lineno}"
        for file in FILES
        if module(file)[:1] != ("cli",)
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_case_43_nothing_read_from_disk_is_unpickled() -> None:
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "cloudpickle", "shelve"}, file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in (("torch", "load"), ("np", "load")), (file, node.lineno)
