"""Whole sweeps as a user runs them: cut-down tiny, real chat data, killed processes, several ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import listen_to_ctrl_c
from safetensors.torch import load_file

from packcli.files import read_jsonl
from packcli.store import normalized

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
CUT = [
    "sweeps/tiny.yaml",
    *("--set", "data.max_documents=400", "--set", "data.validation=0.1"),
    *("--set", "model.base.data.max_documents=400", "--set", "model.base.train.steps=40"),
    *("--set", "model.base.train.save_every=10", "--set", "train.epochs=2", "--set", "train.save_every=4"),
    *("--set", "eval.limit=10", "--only", "seed=0", "--only", "seed=1"),
    *("--only", "arm=padding", "--only", "arm=random", "--only", "arm=best_fit"),
]
REAL = """
name: real
model:
  config: {model_type: llama, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, intermediate_size: 172, max_position_embeddings: 1024}
  tokenizer: train
  vocab_size: 4096
data: {source: DATA/sft/*, max_length: 512, validation: 0.05}
train: {steps: 5, lr: 1e-3, global_batch: 16, micro_batch: 4, warmup_ratio: 0.2, threads: 1}
eval: {tasks: [gsm8k], limit: 20, bench_data: DATA/benchmarks}
matrix: {arm: [padding, random, best_fit], seed: [0]}
"""


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "packcli", *args]


def packcli(*args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def document(runs: Path) -> dict:
    return json.loads(packcli("report", *CUT, "--runs", str(runs), "--format", "json").stdout)


def numbers(runs: Path) -> dict:
    """All of the table that does not depend on how fast the machine was."""
    return normalized(document(runs))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted")
    packcli("sweep", *CUT, "--runs", str(runs))
    return runs


def test_a_cut_down_tiny_sweep_runs_from_nothing_to_the_table(uninterrupted: Path) -> None:
    report = document(uninterrupted)
    assert len(report["rows"]) == 12
    assert {row["state"] for row in report["rows"]} == {"done"}
    assert report["baseline"] == "padding"
    for row in report["rows"]:
        assert row["train"]["steps"] > 0
        assert row["train"]["validation_loss"] > 0
        assert row["physics"] == []
        assert row["average"] is not None
        assert {score["n"] for score in row["eval"].values()} == {10}
    slots = {row["labels"]["arm"]: row["train"]["efficiency"] for row in report["rows"]}
    assert slots["padding"] < 0.4 < 0.9 < slots["best_fit"] <= slots["random"] <= 1
    paired = [group for group in report["groups"] if group["labels"]["arm"] == "best_fit"]
    assert [(group["n_seeds"], group["n_pairs"]) for group in paired] == [(2, 2), (2, 2)]


def test_a_second_run_does_nothing_but_print_the_same_table(uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (uninterrupted / "store").rglob("*") if path.is_file()}
    one, other = (packcli("sweep", *CUT, "--runs", str(uninterrupted)) for _ in range(2))
    assert one.stdout == other.stdout
    assert "stages to do" not in one.stderr
    after = {path: path.stat().st_mtime_ns for path in (uninterrupted / "store").rglob("*") if path.is_file()}
    assert before == after


def test_every_stage_verifies_against_its_manifest(uninterrupted: Path) -> None:
    stages = [path.parent for path in (uninterrupted / "store").rglob("manifest.json")]
    assert len(stages) > 90
    from packcli.store import verify

    assert all(verify(stage) for stage in stages)


def _tokens_written(runs: Path) -> bool:
    return any((runs / "store" / "tokens").glob("*/shard-00000.arrow"))


def _base_half_trained(runs: Path) -> bool:
    return any((runs / "store" / "train").glob("*/checkpoint-*/manifest.json"))


def _some_scored(runs: Path) -> bool:
    return len(list((runs / "store" / "eval").glob("*/manifest.json"))) > 5


def survivors(runs: Path) -> list[int]:
    """Processes that have the run directory on their command line."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (directory / "cmdline").read_bytes()
        except OSError:
            continue
        if str(runs).encode() in arguments and int(directory.name) != os.getpid():
            found.append(int(directory.name))
    return found


@pytest.mark.parametrize(
    "reached",
    [
        *(pytest.param(reached, marks=pytest.mark.soak) for reached in (_tokens_written, _base_half_trained)),
        _some_scored,
    ],
)
def test_case_35_a_killed_sweep_run_again_gives_the_same_table_and_leaves_no_process(
    uninterrupted: Path, tmp_path: Path, reached: Callable[[Path], bool]
) -> None:
    process = subprocess.Popen(
        command("sweep", *CUT, "--runs", str(tmp_path)),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not reached(tmp_path):
        assert process.poll() is None, "the sweep ended before the point where it was to be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    assert survivors(tmp_path) == []
    packcli("sweep", *CUT, "--runs", str(tmp_path))
    assert numbers(tmp_path) == numbers(uninterrupted)


def test_ctrl_c_exits_130_and_leaves_no_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("sweep", *CUT, "--runs", str(tmp_path)),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=listen_to_ctrl_c,
    )
    while not _base_half_trained(tmp_path):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert survivors(tmp_path) == []


def _training(runs: Path) -> int | None:
    """The process that trains an arm from the finished base, by the lock it holds."""
    for metrics in (runs / "store" / "train").glob("*/metrics.jsonl"):
        run = metrics.parent
        if not (run / "manifest.json").exists() and yaml.safe_load((run / "config.yaml").read_text())["base"]:
            return int((run / ".lock").read_text().split()[0])
    return None


def test_a_worker_that_dies_fails_its_own_run_and_no_other(uninterrupted: Path, tmp_path: Path) -> None:
    """Out of memory, mostly: the sweep finishes the rest, says which run was lost, and takes it up again."""
    process = subprocess.Popen(
        command("sweep", *CUT, "--runs", str(tmp_path)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (holder := _training(tmp_path)):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(holder, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 7
    assert "the process died (signal 9" in stderr
    assert "best_fit" in stdout
    packcli("sweep", *CUT, "--runs", str(tmp_path))
    assert numbers(tmp_path) == numbers(uninterrupted)


@pytest.fixture
def real_sweep(tmp_path: Path) -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real chat data and benchmarks are not beside this checkout")
    path = tmp_path / "real.yaml"
    path.write_text(REAL.replace("DATA", str(SHARED)))
    return path


def test_real_chat_data_of_four_schemas_goes_all_the_way_to_a_gsm8k_score(
    real_sweep: Path, tmp_path: Path
) -> None:
    runs = str(tmp_path / "runs")
    packcli("sweep", str(real_sweep), "--runs", runs)
    prepared = json.loads(packcli("prepare", str(real_sweep), "--runs", runs, "--json").stdout)
    for cell in prepared["cells"]:
        ledger = cell["ledger"]
        assert ledger["conversations_in"] == 16431
        assert ledger["tokens_in"] == sum(
            ledger[f"tokens_{part}"] for part in ("validation", "truncated", "dropped", "kept")
        )
        assert ledger["slots"] == sum(ledger[f"tokens_{part}"] for part in ("kept", "padding", "boundary"))
    report = json.loads(packcli("report", str(real_sweep), "--runs", runs, "--json").stdout)
    for row in report["rows"]:
        assert row["eval"]["gsm8k"]["n"] == 20
        assert 0 <= row["eval"]["gsm8k"]["score"] <= 1


def test_a_missing_benchmark_leaves_the_table_and_exits_6(real_sweep: Path, tmp_path: Path) -> None:
    done = packcli(
        "sweep",
        str(real_sweep),
        *("--runs", str(tmp_path / "runs"), "--set", f"eval.bench_data={tmp_path}", "--only", "arm=best_fit"),
        *("--set", "data.max_documents=100"),
        code=6,
    )
    assert "best_fit" in done.stdout
    assert "needs the benchmark file" in done.stderr
    assert done.stderr.count("error:") == 1


@pytest.mark.soak
def test_two_ranks_train_what_one_does(real_sweep: Path, tmp_path: Path) -> None:
    """FSDP2 over gloo: sharded weights, gradients reduced over ranks, uneven rows, one manifest."""
    common = ("--set", "data.max_documents=300", "--set", "train.global_batch=5", "--only", "arm=best_fit")
    weights = {}
    for world in (1, 2):
        runs = str(tmp_path / f"runs{world}")
        packcli("prepare", str(real_sweep), *common, "--runs", runs)
        train = ["train", str(real_sweep), *common, "--runs", runs]
        if world == 1:
            packcli(*train)
        else:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "packcli"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*launcher, *train],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        [final] = Path(runs).glob("store/train/*/final/model.safetensors")
        weights[world] = (load_file(final), read_jsonl(final.parents[1] / "metrics.jsonl"))
    (one, steps), (two, sharded_steps) = weights[1], weights[2]
    for record, sharded in zip(steps, sharded_steps, strict=True):
        assert sharded["loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert sharded["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-4)
        assert sharded["slots"] == record["slots"]
    assert all(torch.allclose(two[name], one[name], atol=1e-5) for name in one)


def test_models_that_are_only_scored_pass_for_trained_ones(
    tmp_path: Path, run_cli: Callable[..., Any], tiny_sweep: Callable[..., Path]
) -> None:
    sweep = tiny_sweep(seeds=[0, 1])
    document = yaml.safe_load(sweep.read_text())
    document["train"] = {"steps": 0, "threads": 1}
    sweep.write_text(yaml.safe_dump(document))
    done = run_cli("sweep", sweep, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    for row in done.json()["rows"]:
        assert (row["train"]["steps"], row["train"]["final_loss"], row["train"]["mfu"]) == (0, None, None)
        assert row["train"]["validation_loss"] > 1
        assert row["train"]["random_weights"]
        assert not row["physics"]
    assert "Nothing was trained" in done.json()["verdict"]
    for kind in ("table", "md", "csv", "latex", "html"):
        shown = run_cli("report", sweep, "--format", kind, cwd=tmp_path)
        assert shown.code == 0, shown.stderr
    planned = run_cli("sweep", sweep, "--dry-run", cwd=tmp_path)
    assert planned.code == 0, planned.stderr
