"""benchmarks/train_gpu.py: it runs where there is no GPU, says so, and survives what a GPU does to it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from packcli.config import LENGTHS_ALONE

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{Path(name).stem}", BENCHMARKS / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("train_gpu.py")


@pytest.fixture(scope="module")
def documents() -> ModuleType:
    return script("gpu/documents.py")


@pytest.mark.slow
def test_the_script_does_not_run_without_a_gpu(tmp_path: Path) -> None:
    """Every arm of the 8B part on a tiny shape; tables from what was measured, and no GPU figure among them."""
    command = [sys.executable, str(BENCHMARKS / "train_gpu.py"), "--device", "cpu", "--shape", "tiny"]
    done = subprocess.run(
        [*command, "--only", "8B steps", "--out", str(tmp_path)], capture_output=True, text=True, check=True
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["label"] == "CPU, tiny shape: a check of the script, no result"
    assert done.stdout.startswith(f"**{results['label']}**")
    runs = {each["name"]: each for each in results["records"] if each["kind"] == "run"}
    failed = {name for name, each in runs.items() if "failed" in each}
    assert failed == {"best_fit, head: liger"}, results
    for name in runs.keys() - failed:
        assert all(0 < step["loss"] < 10 and step["slots"] <= 4 * 512 for step in runs[name]["records"]), name
    packed, padded = (runs[name]["records"][0] for name in ("best_fit", "padding"))
    assert packed["slots"] == padded["slots"] >= packed["tokens"] > padded["tokens"]
    assert "peak_bytes" not in runs["best_fit"]
    assert results["attempts"] == []


def test_a_micro_batch_is_larger_than_the_memory_was_counted_for(documents: ModuleType) -> None:
    shape = documents.shape("8B", tiny=True)
    drawn = documents.Documents(2048, 512)
    for arm in LENGTHS_ALONE:
        found = documents.work(arm, shape, drawn, {})
        micro_batches = [rows for step in range(len(found.steps)) for rows in found.micro_batches(step)]
        assert all(found.rows.tokens[rows].sum() <= shape.slots for rows in micro_batches), arm
        assert {len(step) for step in found.steps} == {4 * found.order.train.micro_batch}, arm


def test_the_drawn_lengths_are_not_those_that_were_measured(documents: ModuleType) -> None:
    measured = json.loads(documents.TABLE.read_text())["provenance"]
    drawn = documents.Documents(4096, 512)
    assert drawn.lengths.mean() == pytest.approx(measured["mean"], rel=0.01)
    _, start, stop = drawn.spans
    assert (stop - start).sum() / drawn.lengths.sum() == pytest.approx(measured["supervised_share"], abs=0.01)
    assert (start >= 1).all()  # a document's first token has nothing to be predicted from
    assert len(drawn.ids(7)) == drawn.lengths[7]
    assert np.unique(np.concatenate([drawn.ids(n) for n in range(64)])).max() < 512


def test_a_card_too_small_for_8b_gets_no_smaller_model(documents: ModuleType) -> None:
    whole = documents.shape("8B")
    assert documents.fitting(whole, 139.7 * 2**30).counted.layers == 32
    cut = documents.fitting(whole, 79.1 * 2**30)
    assert 8 < cut.counted.layers < 32
    ways = documents.settings(cut, 79.1 * 2**30)
    assert documents.estimated_bytes(cut, ways[0]) <= 0.96 * 79.1 * 2**30


def session(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str, seconds: float):
    (tmp_path / "worker.py").write_text(worker)
    monkeypatch.setattr(bench, "WORKERS", tmp_path)
    results = {"began": time.time(), "records": [], "attempts": []}
    return bench.Session(tmp_path, time.time() + seconds, "cpu", results, tmp_path, [])


RUNS_OUT = """
import json, sys
asked = json.load(open(sys.argv[1]))
print("a library's chatter")
for run in asked["runs"]:
    if run["name"] == "second" and asked["train"] == "light":
        sys.exit("torch.OutOfMemoryError: CUDA out of memory")
    print(json.dumps({"kind": "run", "shape": "8B", "name": run["name"], "train": asked["train"]}), flush=True)
"""


def test_running_out_of_memory_loses_what_was_measured_or_what_comes_next(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = session(bench, tmp_path, monkeypatch, RUNS_OUT, 60)
    runs = [{"name": name} for name in ("first", "second", "third")]
    ways = [{"shape": "8B", "train": train, "runs": runs} for train in ("light", "heavy")]
    found.run(bench.Part("8B steps", "worker.py", ways, 30))
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [(each["name"], each["train"]) for each in saved["records"]] == [
        ("first", "light"), ("second", "heavy"), ("third", "heavy"),
    ]  # fmt: skip
    assert saved["attempts"] == ["8B steps, way 1 of 2: torch.OutOfMemoryError: CUDA out of memory"]


HANGS = """
import json, time
print(json.dumps({"kind": "run", "shape": "8B", "name": "first"}), flush=True)
time.sleep(600)
"""


def test_a_worker_that_hangs_takes_the_whole_budget_and_its_results(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "PRECIOUS_S", 1)
    found = session(bench, tmp_path, monkeypatch, HANGS, 3)
    part = bench.Part("8B steps", "worker.py", [{"shape": "8B"}], 30)
    started = time.time()
    found.run(part)
    assert time.time() - started < 30
    found.run(part)
    assert [each["name"] for each in found.results["records"]] == ["first"]
    assert [remark.partition(":")[2] for remark in found.results["attempts"]] == [
        " stopped: out of time", " not begun, 0 s were left",
    ]  # fmt: skip


def test_rates_are_those_of_padding_or_of_one_hiccup() -> None:
    tables = script("gpu/tables.py")
    step = {"slots": 1000, "tokens": 800, "documents": 4, "flops": 8e14, "flops_full_square": 9e14}
    done = [{**step, "s": seconds} for seconds in (2.0, 2.0, 9.0)]
    found = tables.summary({"records": done})
    assert (found["tokens_per_s"], found["slots_per_s"], found["filled"]) == (400, 500, 0.8)
    assert found["flops_per_s"] == 4e14
    uneven = tables.summary({"records": [*done[:2], {**step, "slots": 2000, "s": 4.0}]})
    assert uneven["slots_per_s"] == 4000 / 8
