"""A small sweep that passes every kind of commit point, done once without interruption, and its tree to compare.

Tokens of two shards, row indexes, a base model, two arms trained from it with checkpoints, a task whose given
answers are compared, one whose generated answers a judge on this machine rates. Weights are random, data and judge
made up.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from conftest import chat_records, write_lines
from forked import Ended, Forked
from judge_server import Answer, Asked, completion
from test_judge import wild

from packcli.files import sha256_file
from packcli.store import normalized

MODEL = {
    "config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    },
    "tokenizer": "train",
    "vocab_size": 300,
}
SCORE = "<|history|>{$history}<|query|>{$user_query}<|checklist|>{$checklist}<|answer|>{$model_output}"
PAIR = "{$history}{$user_query}{$checklist}<|A|>{$candidate_A}<|B|>{$candidate_B}"
SETUP = """
import hashlib
from pathlib import Path
from packcli.eval.engines import responses
from packcli.eval.judge import templates, wildbench
def public(path):
    text = Path({data!r}, path).read_bytes()
    return templates.PublicFile(path, hashlib.sha256(text).hexdigest(), "https://example.org")
wildbench.SCORE_TEMPLATE, wildbench.PAIR_TEMPLATE = public("wildbench/score.md"), public("wildbench/pair.md")
responses._COMPARED_AT_ONCE = 2
"""


def rating(asked: Asked) -> Answer:
    """The same of the same text."""
    value = 1 + int(hashlib.sha256(asked.prompt.encode()).hexdigest(), 16) % 10
    return completion(json.dumps({"strengths": "", "weaknesses": "", "score": str(value)}))


def sweep(root: Path) -> Path:
    """Writes data, benchmark and sweep file below `root`."""
    write_lines(root / "data" / "a.jsonl", [*chat_records(24), {"messages": []}])
    write_lines(root / "data" / "b.jsonl", chat_records(16, first=24))
    bench = root / "bench"
    for name, text in (("score", SCORE), ("pair", PAIR)):
        (bench / "wildbench").mkdir(parents=True, exist_ok=True)
        (bench / "wildbench" / f"{name}.md").write_text(text)
    from packcli.eval.judge import wildbench

    write_lines(bench / wildbench.QUESTIONS, [wild(number) for number in range(1024)])
    data = {"source": str(root / "data" / "*.jsonl"), "max_length": 96, "validation": 0.1, "processes": 1}
    train = {"steps": 2, "lr": 1e-3, "global_batch": 4, "micro_batch": 4, "threads": 1, "save_every": 1}
    judge = {"model": "judge", "max_answer_tokens": 3, "max_tokens": 100, "max_retries": 0, "attempts": 1}
    document = {
        "name": "whole",
        "model": {**MODEL, "base": {"data": data, "arm": "padding_free", "train": train}},
        "data": data,
        "train": {**train, "steps": 3},
        "eval": {
            "tasks": ["tiny_copy", "wildbench"],
            "limit": 4,
            "bench_data": str(bench),
            "batch_size": 2,
            "judge": {**judge, "workers": 1},
        },
        "matrix": {"arm": ["padding", "best_fit"], "seed": [0]},
    }
    path = root / "sweep.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@dataclass(frozen=True)
class Point:
    """A commit point of the whole run: the `nth` passing of `name` since its stage began, counted from 1.

    `stage`: the number of the stage it lies in, in the order in which they were begun; None: before the first.
    `replies`: how many the judge had given before that stage.
    """

    name: str
    nth: int
    stage: int | None
    replies: int


class WholeRun:
    """The uninterrupted run in `root`/whole; `points`: all it passed; `stages`: directories in order."""

    def __init__(self, root: Path, judge: str, key: str) -> None:
        self.root, self.sweep = root, sweep(root)
        self.env = {"OPENAI_BASE_URL": judge, "OPENAI_API_KEY": key, "HF_HUB_OFFLINE": "1", "NO_PROXY": "*"}
        (root / "forked").mkdir()
        self.packcli = Forked(root / "forked", SETUP.format(data=str(root / "bench")))
        self.runs = root / "whole" / "runs"
        done, passed = self.logged(self.runs.parent)
        assert done.code == 0, done.stderr
        self.report = normalized(done.json())
        self.tree = tree(self.runs)
        self.stages = [name.removesuffix("/.lock:after") for name in passed if name.endswith("/.lock:after")]
        self.points = points(passed)

    def command(self, cwd: Path, *, family: bool = False, **env: str) -> Ended:
        """The sweep, in the run directory `cwd`/runs."""
        cwd.mkdir(exist_ok=True)
        return self.packcli.run("sweep", self.sweep, "--json", cwd=cwd, env={**self.env, **env}, family=family)

    def logged(self, cwd: Path, fault: str = "", *, family: bool = False) -> tuple[Ended, list[str]]:
        """The same, and the names of the commit points it passed."""
        log = Path(f"{cwd}.points")
        log.unlink(missing_ok=True)
        done = self.command(cwd, family=family, PACKCLI_FAULT_LOG=str(log), PACKCLI_FAULT=fault)
        return done, log.read_text().splitlines()

    def before(self, point: Point, cwd: Path) -> None:
        """`cwd`/runs as it was when the stage of a point began: a copy of the whole run without what came after.

        That is the same, because one worker does one stage after another, in the same order each time, and each
        writes only to its own directory and appends to the judge's replies.
        """
        cwd.mkdir()
        if point.stage is None:
            return
        shutil.copytree(self.runs, cwd / "runs")
        for stage in self.stages[point.stage :]:
            shutil.rmtree(cwd / stage)
        for replies in (cwd / "runs" / "store" / "judge").glob("*.jsonl"):
            lines = replies.read_bytes().splitlines(keepends=True)[: point.replies]
            replies.write_bytes(b"".join(lines))
            if not lines:
                shutil.rmtree(replies.parent)


def points(passed: list[str]) -> list[Point]:
    """Every passing as a point."""
    found, stage, replies, begun = list[Point](), None, 0, 0
    seen = Counter[str]()
    for name in passed:
        if name.endswith("/.lock:after"):
            stage, begun = (0 if stage is None else stage + 1), replies
            seen.clear()
        seen[name] += 1
        found.append(Point(name, seen[name], stage, begun))
        replies += "/judge/" in name and name.endswith(":after")
    return found


def tree(runs: Path) -> dict[str, Any]:
    """Every file but locks and the workers' logs, without what varies from run to run."""
    found: dict[str, Any] = {}
    for path in sorted(runs.rglob("*")):
        name = path.relative_to(runs).as_posix()
        if path.is_dir() or path.name == ".lock" or path.name.startswith("worker-"):
            continue
        if path.suffix == ".json":
            found[name] = normalized(json.loads(path.read_bytes()))
        elif path.name == "metrics.jsonl":
            found[name] = [normalized(json.loads(line)) for line in path.read_bytes().splitlines()]
        elif "/judge/" in f"/{name}":  # which of several calls is answered first is the server's affair
            lines = [normalized(json.loads(line)) for line in path.read_bytes().splitlines()]
            found[name] = sorted(lines, key=lambda line: str(line["key"]))
        else:
            found[name] = sha256_file(path)
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of files that are not the same in both."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def is_root() -> bool:
    return os.geteuid() == 0
