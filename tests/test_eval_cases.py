"""Named cases of evaluation that goes wrong, by the command line: what is not run says so, and stops nothing else.

Case 52, a judge that fails, is in `test_judge.py`; reports of partial runs are in `test_report.py`; each escape by
itself is in `test_sandbox.py`. The models here have random weights, or write what a test wants.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import MODEL, Done
from fake_slurm import FakeSlurm
from test_eval import BENCHMARKS, build_tokenizer, save_llama
from transformers import LlamaConfig, LlamaForCausalLM

from packcli import cli, stages
from packcli.eval import protocol, scorers
from packcli.eval.engines import engine
from packcli.eval.engines.responses import Answer
from packcli.files import read_sealed, sha256_file
from packcli.launch import job, local, worker
from packcli.launch.script import Submitted
from packcli.plan import EvalOrder, Plan
from packcli.store import Manifest, Store

Run = Callable[..., Done]
needs_data = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmark data is not part of the package")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape with other random weights."""
    found = tuple(tmp_path_factory.mktemp(name) for name in ("one", "other"))
    for seed, path in enumerate(found):
        save_llama(path, build_tokenizer(), seed)
    return found[0], found[1]


@pytest.fixture
def packcli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process, so that a test can change what it meets; `runs/` is in `tmp_path`."""

    def run(*words: object) -> Done:
        capsys.readouterr()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["packcli", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert isinstance(left.value.code, int)
        return Done(left.value.code, *capsys.readouterr())

    return run


def saying(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], str]) -> None:
    """Checkpoints write what `answer` gives for a prompt; what they find likely is their own."""
    load = engine.load

    def patched(*words: Any, **settings: Any) -> Any:
        lm = load(*words, **settings)
        lm.answers = lambda requests: iter(
            [[(n, Answer(answer(prompt))) for n, (prompt, _) in enumerate(requests)]]
        )
        return lm

    monkeypatch.setattr(engine, "load", patched)


def entries(runs: Path) -> dict[str, Path]:
    """Directories of evaluations by id."""
    return {path.name: path for path in sorted((runs / "store" / "eval").iterdir())}


def written(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in ("results.json", "samples.jsonl", "items.json")}


# 48: benchmark files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("damage", "code"), [("missing", 6), ("changed", 4)])
def test_case_48_a_file_that_is_missing_or_changed_scores_0_or_stops_the_tasks_after_it(
    damage: str, code: int, checkpoints: tuple[Path, Path], packcli: Run, tmp_path: Path
) -> None:
    if damage == "changed":
        (tmp_path / "data" / "gsm8k").mkdir(parents=True)
        for split in ("train", "test"):
            (tmp_path / "data" / "gsm8k" / f"{split}.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n')
    tasks = ("--tasks", "tiny_copy,gsm8k,tiny_swap", "--limit", 2, "--bench-data", tmp_path / "data")
    done = packcli("eval", "--ckpt", checkpoints[0], *tasks, "--json")
    assert done.code == code
    assert [result["task"] for result in done.json()["results"]] == ["tiny_copy", "tiny_swap"]
    ((cause, fix),) = done.json()["not_run"].items()
    assert cause.startswith("gsm8k: ")
    assert str(tmp_path / "data" / "gsm8k") in cause
    lines = "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith("tiny_"))
    assert lines == f"error: {cause}\n\nhint: {fix}\n"
    again = packcli("eval", "--ckpt", checkpoints[0], *tasks)
    assert again.code == code
    assert "gsm8k" not in again.stdout
    (failed,) = [path for path in entries(tmp_path / "runs").values() if (path / "failure.json").exists()]
    assert not list(failed.glob("*results*")) + list(failed.glob("manifest*"))


# 49: partial runs ------------------------------------------------------------------------------------------


def test_case_49_a_limited_run_is_taken_for_the_full_one_that_comes_later(
    checkpoints: tuple[Path, Path], packcli: Run, tmp_path: Path
) -> None:
    command = ("eval", "--ckpt", checkpoints[0], "--tasks", "tiny_copy")
    assert "3 (partial)   100" in packcli(*command, "--limit", 3).stdout
    (limited,) = entries(tmp_path / "runs")
    full = packcli(*command)
    assert (full.code, "partial" in full.stdout) == (0, False)
    assert len(entries(tmp_path / "runs").keys() - {limited}) == 1
    (result,) = packcli(*command, "--limit", 3, "--json").json()["results"]
    assert (result["n"], result["n_total"]) == (3, 100)
    assert len(entries(tmp_path / "runs")) == 2


# 50: two checkpoints ---------------------------------------------------------------------------------------

TWO = ("--tasks", "tiny_copy,tiny_swap", "--limit", 4)


def test_case_50_the_second_checkpoint_gets_what_the_first_one_scored(
    checkpoints: tuple[Path, Path], packcli: Run, tmp_path: Path
) -> None:
    """In one run directory, in a copy of it, and at the path where the first one lay."""
    one, other = checkpoints
    place = tmp_path / "checkpoint"
    shutil.copytree(one, place)
    assert packcli("eval", "--ckpt", place, *TWO).code == 0
    first = entries(tmp_path / "runs")
    shutil.copytree(tmp_path / "runs", tmp_path / "copy")
    shutil.rmtree(place)
    shutil.copytree(other, place)
    for runs in ("alone", "runs", "copy"):
        assert packcli("eval", "--ckpt", place, *TWO, "--runs", runs).code == 0
    alone = entries(tmp_path / "alone")
    assert len(first) == len(alone) == 2
    assert not first.keys() & alone.keys()
    for runs in ("runs", "copy"):
        found = entries(tmp_path / runs)
        assert found.keys() == first.keys() | alone.keys()
        assert all(written(found[id_]) == written(path) for id_, path in alone.items())
    said = {written(path)["samples.jsonl"] for path in (*first.values(), *alone.values())}
    assert len(said) == 4, "these checkpoints would not be told apart"


@pytest.mark.parametrize("what", ["answers", "a finished evaluation"])
def test_case_50_what_lies_in_the_place_of_another_evaluation_is_used(
    what: str, checkpoints: tuple[Path, Path], packcli: Run, tmp_path: Path
) -> None:
    for number, path in enumerate(checkpoints):
        runs = tmp_path / f"runs{number}"
        assert packcli("eval", "--ckpt", path, "--tasks", "tiny_copy", "--limit", 4, "--runs", runs).code == 0
    ((first, finished),) = entries(tmp_path / "runs0").items()
    ((second, place),) = entries(tmp_path / "runs1").items()
    shutil.rmtree(place)
    if what == "answers":
        place.mkdir()
        (place / "responses.jsonl").write_text(json.dumps({"eval": first}) + "\n")
    else:
        shutil.copytree(finished, place)
    done = packcli("eval", "--ckpt", checkpoints[1], "--tasks", "tiny_copy", "--limit", 4, "--runs", "runs1")
    assert done.code == 4
    assert str(Path("runs1", "store", "eval", second)) in done.stderr
    assert first in done.stderr
    assert "hint: delete" in done.stderr


# 51: what the machine lacks --------------------------------------------------------------------------------


def test_case_51_without_a_sandbox_code_runs_or_the_other_tasks_do_not(
    checkpoints: tuple[Path, Path], packcli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = packcli("eval", "--ckpt", checkpoints[0], "--tasks", "humaneval,tiny_copy", "--limit", 2, "--json")
    assert done.code == 6
    assert [result["task"] for result in done.json()["results"]] == ["tiny_copy"]
    ((cause, fix),) = done.json()["not_run"].items()
    assert cause.startswith("humaneval: ")
    assert "bubblewrap (`bwrap`) is not installed" in cause
    assert fix.startswith("apt install bubblewrap; or `--unsafe-no-sandbox`")


@pytest.fixture
def no_punkt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import nltk

    scorers._ifeval()  # else importing the next one downloads
    from lm_eval.tasks.ifeval import instructions_util

    monkeypatch.setattr(nltk.data, "path", [])
    instructions_util._get_sentence_tokenizer.cache_clear()
    yield
    instructions_util._get_sentence_tokenizer.cache_clear()


@needs_data
@pytest.mark.slow
@pytest.mark.usefixtures("no_punkt")
def test_case_51_a_score_without_the_rows_that_need_punkt_tab_stays_when_it_is_there(
    checkpoints: tuple[Path, Path], packcli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence data that comes later is made up: a splitter that has learned nothing."""
    saying(monkeypatch, lambda _: "Two words.")
    data = tmp_path / "data"
    data.mkdir()
    (data / "ifeval").symlink_to(BENCHMARKS / "ifeval")
    command = ("eval", "--ckpt", checkpoints[0], "--tasks", "ifeval,tiny_copy", "--bench-data", data, "--json")
    done = packcli(*command)
    assert done.code == 6, done.stderr
    assert [(result["n"], result["n_total"]) for result in done.json()["results"]] == [(477, 541), (100, 100)]
    ((cause, fix),) = done.json()["not_run"].items()
    assert "64 of 541 prompts" in cause
    assert fix == f"python -m nltk.downloader -d {data / 'nltk_data'} punkt_tab"
    there = data / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    there.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (there / name).write_text("")
    done = packcli(*command)
    assert (done.code, done.json()["not_run"]) == (0, {})
    assert {result["task"]: result["n"] for result in done.json()["results"]} == {"ifeval": 541, "tiny_copy": 100}


def test_case_51_a_sweep_that_left_rows_out_ends_as_if_all_were_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so each time, with 6, and tries again: by then the machine may have what it lacked."""
    left_out = {"rows": ["7"], "reason": "1 of 9 prompts needs a splitter", "fix": "fetch it"}
    order = EvalOrder.model_validate({"id": "x", "train": "t", "task": "ifeval", "protocol": "p", "eval": {}})
    store = Store(tmp_path)
    nothing: dict[str, Any] = {"tokens": {}, "indexes": {}, "trains": {}}
    plan = Plan(name="s", baseline=None, axes={}, cells=(), shared=(), evals={"x": order}, **nothing)
    for found, done in ((left_out, False), (None, True)):
        with store.writing("eval", "x"):
            manifest = store.commit("eval", "x", spec={}, inputs={}, results={"left_out": found}, provenance={})
        assert (("eval", "x") in stages.done(plan, [("eval", "x")], store)) == done
        monkeypatch.setattr(stages, "scorer_for", lambda *_, **__: None)
        monkeypatch.setattr(stages, "evaluate", lambda *_, manifest=manifest: iter([(order, manifest)]))
        asked = {"kind": "eval", "ids": ["x"], "orders": [order.model_dump()], "unsafe_no_sandbox": False}
        failures = worker.Worker(store, answers=-1, threads=1)._evaluate(asked)
        assert [(failure["id"], failure["exit_code"]) for failure in failures] == ([] if done else [("x", 6)])


# 53: a model that writes escapes ---------------------------------------------------------------------------

RIGHT = "    return x + 1\n"


def escapes(directory: Path, port: int) -> dict[str, str]:
    """Bodies of a function that do harm, one a row of the escape set, and the reason why they do not pass."""
    everything = "open(path, errors='replace').read() for path in __import__('glob').glob('/proc/[0-9]*/environ')"
    lines = {
        "network": f"__import__('socket').create_connection(('127.0.0.1', {port}), 2)",
        "outside write": f"open({str(directory / 'new')!r}, 'w')",
        "secret in a file": f"open({str(directory / 'secret')!r}).read()",
        "secret of the parent": f"assert 'canary-key' in ''.join({everything})",
        "fork bomb": "\n    while True:\n        try: __import__('os').fork()\n        except OSError: pass",
        "10 GB": "bytearray(10 * 2**30)",
        "endless loop": "\n    while True: pass",
        "1 GB of output": "\n    for _ in range(2**10): print('x' * 2**20)",
        "killing the parent": "__import__('os').kill(__import__('os').getppid(), 9)\n    raise ValueError",
        "forged success": "print('passed', flush=True)\n    __import__('os')._exit(0)",
    }
    return {name: f"    {line}\n    return x + 1\n" for name, line in lines.items()}


WHY = {"fork bomb": "timeout", "endless loop": "timeout", "1 GB of output": "output"}


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """Benchmark data with so many functions to complete, made up, all of them `x + 1`."""

    def make(count: int) -> Path:
        tasks = tmp_path / "packaged"
        shutil.copytree(Path(str(protocol._TASKS)), tasks)
        rows = [
            {
                "task_id": f"Made/{number}",
                "prompt": f"def add_{number}(x):\n",
                "canonical_solution": RIGHT,
                "test": "def check(candidate):\n    assert candidate(1) == 2\n",
                "entry_point": f"add_{number}",
            }
            for number in range(count)
        ]
        path = tmp_path / "data" / "code.jsonl.gz"
        path.parent.mkdir()
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        config = yaml.safe_load((tasks / "humaneval.yaml").read_text(encoding="utf-8"))
        config["metadata"]["files"] = {
            "test": {"path": path.name, "rows": count, "sha256": sha256_file(path)},
        }
        (tasks / "humaneval.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        monkeypatch.setattr(protocol, "_TASKS", tasks)
        protocol.load.cache_clear()
        return path.parent

    yield make
    protocol.load.cache_clear()


@pytest.mark.slow
@pytest.mark.sandbox
def test_case_53_an_escape_gets_out_or_keeps_the_next_item_from_being_scored(
    checkpoints: tuple[Path, Path],
    code: Callable[[int], Path],
    packcli: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every second item is an answer that is right; the others are the escapes, one row of the set each."""
    monkeypatch.setenv("OPENAI_API_KEY", "canary-key")
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as server:
        directory = Path(name)
        directory.chmod(0o777)  # only the sandbox stands in the way
        (directory / "secret").write_text("canary-file")
        server.setblocking(False)
        bad = escapes(directory, server.getsockname()[1])
        data = code(2 * len(bad))
        answers = [answer for body in bad.values() for answer in (body, RIGHT)]
        saying(monkeypatch, lambda prompt: answers[int(re.findall(r"add_(\d+)", prompt)[0])])
        words = ("--ckpt", checkpoints[0], "--tasks", "humaneval,tiny_copy", "--bench-data", data, "--json")
        done = packcli("eval", *words, "--no-chat-template")
        assert done.code == 0, done.stderr
        assert [path.name for path in directory.iterdir()] == ["secret"]
        with pytest.raises(BlockingIOError):
            server.accept()
    code_result, other = done.json()["results"]
    assert (code_result["score"], code_result["n"], other["task"]) == (0.5, 2 * len(bad), "tiny_copy")
    assert code_result["protocol"]["sandbox"].startswith("bwrap")
    marks = [path / "items.json" for path in entries(tmp_path / "runs").values()]
    earned = [found for path in marks if len(found := json.loads(path.read_bytes())) == 2 * len(bad)]
    assert earned == [[0.0, 1.0] * len(bad)]
    samples = "".join(path.with_name("samples.jsonl").read_text() for path in marks)
    assert "canary-file" not in samples
    for name, why in WHY.items():
        assert f"{why}: " in samples, name


# A sweep without a sandbox ---------------------------------------------------------------------------------


LONGER = {"config": {**MODEL["config"], "max_position_embeddings": 2048}}
"""Holds the longest answers of the benchmarks."""


@pytest.mark.slow
def test_a_sweep_without_a_sandbox_stops_or_says_it_of_no_cell(
    tiny_sweep: Callable[..., Path], run_cli: Run, tmp_path: Path
) -> None:
    """gsm8k is to come from the hub, where it cannot be had: another reason, of another task."""
    sweep = tiny_sweep(eval={"tasks": ["humaneval", "gsm8k", "tiny_copy"], "limit": 2}, model=LONGER)
    bare = {"PATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = run_cli("sweep", sweep, "--json", cwd=tmp_path, env=bare)
    assert done.code == 6, done.stderr
    assert done.stderr.count("error: model-written code runs only in a sandbox") == 1
    assert done.stderr.count("error: task `gsm8k`: cannot load `openai/gsm8k`") == 1
    for row in done.json()["rows"]:
        assert row["eval"].keys() == {"tiny_copy"}
        assert row["average"] is None
        assert row["tasks"] == {"humaneval": "failed", "gsm8k": "failed", "tiny_copy": "done"}
        causes = {failure["stage"]: failure["cause"] for failure in row["failures"]}
        assert "bubblewrap (`bwrap`) is not installed" in causes["eval humaneval"]
        assert "gsm8k" in causes["eval gsm8k"]
    table = run_cli("report", sweep, "--format", "md", cwd=tmp_path, env=bare).stdout
    assert "| padding | failed | failed |" in table
    (said,) = [line for line in table.splitlines() if line.startswith("- failed, eval humaneval: ")]
    assert "arm=padding" in said
    assert r"arm=best\_fit" in said


@needs_data
@pytest.mark.slow
def test_a_sweep_told_to_run_code_without_a_sandbox_does_not_or_keeps_it_from_the_results(
    tiny_sweep: Callable[..., Path], run_cli: Run, tmp_path: Path
) -> None:
    sweep = tiny_sweep(
        arms=["padding"], eval={"tasks": ["humaneval"], "limit": 2, "bench_data": str(BENCHMARKS)}, model=LONGER
    )
    bare = {"PATH": str(tmp_path)}
    done = run_cli("sweep", sweep, cwd=tmp_path, env=bare)
    assert done.code == 6, done.stderr
    done = run_cli("sweep", sweep, "--unsafe-no-sandbox", "--json", cwd=tmp_path, env=bare)
    assert done.code == 0, done.stderr
    (row,) = done.json()["rows"]
    assert row["eval"]["humaneval"]["n"] == 2
    (directory,) = entries(tmp_path / "runs").values()
    manifest = json.loads((directory / "manifest.json").read_bytes())
    assert manifest["results"]["protocol"]["sandbox"].startswith("no sandbox")


@pytest.mark.parametrize("key", ["unsafe_no_sandbox", "unsafe-no-sandbox", "sandbox"])
def test_a_sweep_file_switches_the_sandbox_off(key: str, tiny_sweep: Callable[..., Path], packcli: Run) -> None:
    done = packcli("status", tiny_sweep(eval={"tasks": ["humaneval"], key: True}))
    assert done.code == 2
    assert f"unknown key `eval.{key}`" in done.stderr


@pytest.mark.parametrize("unsafe", [True, False])
def test_a_clusters_jobs_forget_that_no_sandbox_was_asked_for_or_take_it_for_granted(
    unsafe: bool,
    tiny_sweep: Callable[..., Path],
    packcli: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = tiny_sweep(arms=["padding"], eval={"tasks": ["humaneval"]})
    (tmp_path / "site.yaml").write_text("partition: gpu\nprepare_parts: 1\n")
    monkeypatch.setenv("PATH", FakeSlurm(tmp_path / "slurm").env["PATH"])
    flag = ("--unsafe-no-sandbox",) * unsafe
    done = packcli("sweep", sweep, "--on", tmp_path / "site.yaml", *flag)
    assert done.code == 0, done.stderr
    arrays = [path.parent for path in (tmp_path / "runs").rglob("array.json")]
    orders = {path: Submitted.model_validate(read_sealed(path / "array.json")) for path in arrays}
    assert {order.unsafe_no_sandbox for order in orders.values()} == {unsafe}
    asked: list[bool] = []
    (directory,) = [path for path, order in orders.items() if order.array.job == "eval"]
    here = job.Place("7_0", 0, 7, 0, 0, ("node0",))
    monkeypatch.setattr(job.Place, "here", classmethod(lambda _: here))
    monkeypatch.setattr(Store, "state", lambda *_: "done")
    monkeypatch.setattr(local, "run", lambda *_, unsafe_no_sandbox, **__: asked.append(unsafe_no_sandbox) or [])
    assert job.Job(directory).run() == 0
    assert asked == [unsafe]


# A kill in the middle --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds 4,096 tokens, so that a task that comes with packcli has it write; random weights."""
    path, tokenizer = tmp_path_factory.mktemp("long"), build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4608,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def evaluating(checkpoint: Path, runs: str, cwd: Path) -> subprocess.Popen[str]:
    words = ["--tasks", "tiny_copy,needle_4k,tiny_swap", "--limit", "6", "--batch-size", "1", "--runs", runs]
    return subprocess.Popen(
        [sys.executable, "-m", "packcli", "eval", "--ckpt", str(checkpoint), *words, "--json"],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answered(runs: Path) -> int:
    """Texts on disk of the one task that has the model write, while it is under way."""
    return sum(file.read_bytes().count(b'"text":') for file in runs.glob("store/eval/*/responses.jsonl"))


@pytest.mark.slow
def test_sigkill_in_the_middle_of_a_task_and_a_rerun_are_told_from_one_run(
    long_checkpoint: Path, tmp_path: Path
) -> None:
    """By results, samples, items and manifests, byte by byte; what was answered is not asked again."""
    whole = evaluating(long_checkpoint, "whole", tmp_path)
    printed, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors

    killed = evaluating(long_checkpoint, "killed", tmp_path)
    deadline = time.monotonic() + 300
    while answered(tmp_path / "killed") < 2:
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    kept = list((tmp_path / "killed").glob("store/eval/*/responses.jsonl"))
    assert 2 <= answered(tmp_path / "killed") < 6
    unfinished = kept[0].parent
    before = kept[0].read_bytes()
    assert [path for path in entries(tmp_path / "killed").values() if not (path / "manifest.json").exists()] == [
        unfinished
    ]
    assert not (unfinished / "results.json").exists()

    again = evaluating(long_checkpoint, "killed", tmp_path)
    while kept[0].exists() and again.poll() is None and kept[0].read_bytes() == before:
        time.sleep(0.01)
    if kept[0].exists():
        assert kept[0].read_bytes().startswith(before), "answers that were there are written anew"
    reprinted, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert json.loads(reprinted.replace("killed/store", "whole/store")) == json.loads(printed)
    first, second = entries(tmp_path / "whole"), entries(tmp_path / "killed")
    assert first.keys() == second.keys()
    for id_, directory in first.items():
        assert written(directory) == written(second[id_])
        one, other = (
            Manifest.model_validate(read_sealed(path / "manifest.json")) for path in (directory, second[id_])
        )
        assert one.model_dump(exclude={"provenance"}) == other.model_dump(exclude={"provenance"})
