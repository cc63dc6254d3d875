"""Several processes for one checkpoint: other scores than with one; one that hangs the rest, or is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import harness_of, listen_to_ctrl_c
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from test_engine import asks, prompts
from test_eval import build_tokenizer, gsm8k, save_llama  # noqa: F401
from test_processes import alive

from packcli import stages
from packcli.config import EvalSpec
from packcli.errors import ConfigError, KilledError, MissingError, RunError
from packcli.eval.engines import engine, parallel
from packcli.eval.engines.parallel import Parallel, Shares
from packcli.eval.engines.responses import Recorded
from packcli.launch import local
from packcli.store import Store

# Who gets what ------------------------------------------------------------------------------------------


@given(
    groups=st.lists(st.lists(st.integers(1, 5), max_size=60), max_size=4),
    processes=st.integers(1, 9),
    at_once=st.lists(st.integers(1, 64), min_size=1, max_size=9),
)
def test_request_lost_asked_twice_or_torn_from_its_question(
    groups: list[list[int]], processes: int, at_once: list[int]
) -> None:
    numbers = iter(range(10**6))
    units = [[[next(numbers) for _ in range(size)] for size in group] for group in groups]
    shares, taken = Shares(units, processes), list[list[int]]()
    while share := shares.take(at_once[len(taken) % len(at_once)]):
        taken.append(share)
    assert [number for share in taken for number in share] == [
        n for group in units for unit in group for n in unit
    ]
    for share in taken:
        [group] = [group for group in units if set(share) & {n for unit in group for n in unit}]
        cut = [unit for unit in group if set(unit) & set(share)]
        assert sum(map(len, cut)) == len(share)


def test_one_process_gets_all_of_a_small_task_or_ends_with_many_while_the_others_idle() -> None:
    few = Shares([[[n] for n in range(9)]], 2)
    assert [len(few.take(32)), len(few.take(32)), len(few.take(32))] == [5, 4, 0]
    many, sizes = Shares([[[n] for n in range(1000)]], 8), list[int]()
    while share := many.take(64):
        sizes.append(len(share))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64
    assert sizes[-2] == 8


# Where --------------------------------------------------------------------------------------------------


def test_two_processes_share_a_gpu_or_a_gpu_stays_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert parallel.devices(None) == ["cuda:0", "cuda:1", "cuda:2"]
    assert parallel.devices(2) == ["cuda:0", "cuda:1"]
    assert parallel.devices(1) == ["cuda:0"]
    assert parallel.devices(None, "cpu") == ["cpu"]
    with pytest.raises(MissingError, match="4 processes, but 3 GPUs"):
        parallel.devices(4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert parallel.devices(None) == ["cpu"]
    assert parallel.devices(2) == ["cpu", "cpu"]


def test_one_process_starts_another(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    for processes in (None, 1):
        assert not isinstance(engine.load(llama, chat_template=False, processes=processes), Parallel)


def test_number_of_processes_changes_an_id(tmp_path: Path) -> None:
    def of(spec: EvalSpec) -> list[str]:
        return [order.id for order in stages.foreign_orders("a/b", spec, Store(tmp_path))]

    assert of(EvalSpec(tasks=("tiny_copy",))) == of(EvalSpec(tasks=("tiny_copy",), processes=3))


# The same scores ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights."""
    path = tmp_path_factory.mktemp("llama")
    save_llama(path, build_tokenizer())
    return path


@pytest.fixture(scope="module")
def two(llama: Path) -> Iterator[Any]:
    lm = engine.load(llama, chat_template=False, processes=2)
    assert isinstance(lm, Parallel)
    yield lm
    parallel._end(lm._processes)


def one(llama: Path) -> Any:
    return engine.load(llama, chat_template=False, device="cpu")


def many(limit: int = 24) -> list[Instance]:
    """72 prompts, most with the same beginning, in two kinds of settings."""
    texts = [
        f"{text} {n}" for n in range(4) for text in prompts("swap: sun cat pen\n= cat sun pen\n" * 5) + prompts()
    ]
    return asks(texts[::2], ["\n\n", "pen"], limit) + asks(texts[1::2], [], limit // 2)


@pytest.mark.slow
def test_two_processes_write_other_answers_than_one(llama: Path, two: Any) -> None:
    requests = many()
    assert two.generate_until(requests) == one(llama).generate_until(requests)
    sizes = [len(batch) for batch in two.answers([request.args for request in requests])]
    assert sum(sizes) == len(requests)
    assert len(sizes) > 4, "answers were held back"


@pytest.mark.slow
def test_two_processes_compare_given_answers_otherwise_than_one(llama: Path, two: Any, tmp_path: Path) -> None:
    texts = [*prompts(), "", "too long " * 2000]
    pairs = [
        Instance("loglikelihood", {}, (text, choice), 0) for choice in (" A", " B", " cat pen") for text in texts
    ]
    alone = one(llama)
    expected = alone.loglikelihood(pairs, disable_tqdm=True)
    for asked in (two, Recorded(two, tmp_path / "r.jsonl", "id")):
        two.truncated.clear()
        found = asked.loglikelihood(pairs)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-6, rel=1e-6)
        assert two.truncated == alone.truncated
        assert len(two.truncated) == 3


@pytest.mark.slow
def test_two_processes_score_otherwise_than_one_or_hold_memory_when_done(llama: Path, gsm8k: Path) -> None:  # noqa: F811
    before = children()
    scored = [list(harness_of(bench_data=gsm8k, processes=n).evaluate(llama, ["gsm8k"])) for n in (1, 2)]
    assert scored[0] == scored[1]
    gc.collect()
    assert children() == before


# What goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_process_hangs_the_rest_or_leaves_the_next_task_without_an_engine(llama: Path, two: Any) -> None:
    requests = many(60)
    pids = [process.process.pid for process in two._processes]
    batches = two.answers([request.args for request in requests])
    next(batches)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(
        KilledError, match=r"process 2 of 2 of the evaluation died \(signal 9, SIGKILL; out of memory"
    ):
        list(batches)
    assert not any(map(alive, pids))
    assert two.generate_until(requests[:4]) == one(llama).generate_until(requests[:4])


@pytest.mark.slow
def test_error_in_a_process_is_a_traceback_or_hangs(two: Any) -> None:
    requests = asks(prompts(), [], 8)
    for request in requests:
        request.args[1]["until"] = 5
    with pytest.raises(RunError, match=r"^process \d of 2 of the evaluation failed: TypeError: .*'int'") as caught:
        two.generate_until(requests)
    assert "traceback" in caught.value.fix


@pytest.mark.slow
def test_checkpoint_that_does_not_fit_together_is_not_our_error_or_leaves_processes(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    save_llama(tmp_path, tokenizer)
    tokenizer.add_tokens([f"<extra {n}>" for n in range(9)])
    tokenizer.save_pretrained(tmp_path)
    before = children()
    with pytest.raises(ConfigError, match="the tokenizer has"):
        engine.load(tmp_path, chat_template=False, processes=2)
    assert children() == before


def children() -> set[str]:
    tasks = Path("/proc/self/task").iterdir()
    return {child for task in tasks for child in (task / "children").read_text().split()}


ASK = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_engine_parallel import many
from packcli.eval.engines import engine

lm = engine.load(Path(sys.argv[2]), chat_template=False, processes=2)
print(*[process.process.pid for process in lm._processes], flush=True)
for batch in lm.answers([request.args for request in many(1000)]):
    print(len(batch), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_live_on_when_who_asks_is_killed_or_interrupted(number: int, llama: Path) -> None:
    command = [sys.executable, "-c", ASK, str(Path(__file__).parent), str(llama)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen_to_ctrl_c
    ) as asking:
        assert asking.stdout is not None
        pids = [int(pid) for pid in asking.stdout.readline().split()]
        assert len(pids) == 2, asking.communicate()
        asking.stdout.readline()
        assert all(map(alive, pids))
        asking.send_signal(number)
        _, errors = asking.communicate(timeout=60)
    assert asking.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 1)
    assert errors.endswith("KeyboardInterrupt\n") == (number == signal.SIGINT)
    wait_for(lambda: not any(map(alive, pids)))


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("processes", "threads", "expected"), [(None, 1, (8, 1)), (4, 1, (2, 4)), (4, 8, (1, 8)), (16, 1, (1, 8))]
)
def test_workers_of_a_sweep_and_their_processes_take_more_cores_than_there_are(
    processes: int | None, threads: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "cores", lambda: 8)
    train = SimpleNamespace(train=SimpleNamespace(threads=threads))
    scoring = SimpleNamespace(eval=EvalSpec(processes=processes))
    plan: Any = SimpleNamespace(trains={"t": train}, evals={"e": scoring})
    jobs = [local._Job(kind, [kind[0]], set(), "") for kind in ("train", "eval") for _ in range(8)]  # type: ignore[arg-type]
    assert local._workers(plan, jobs) == expected
