"""`packcli doctor`: what would be called well and is not, or called broken and is not; what would stop it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, Done
from fake_slurm import FakeSlurm
from rich.console import Console
from typer.testing import CliRunner

from packcli import stages, sweepfile
from packcli.cli import app
from packcli.doctor import (
    answers,
    checks,
    command,
    computing,
    elsewhere,
    machine,
    network,
    scoring,
    storage,
)
from packcli.doctor import cluster as slurm_checks
from packcli.doctor.checks import Check, Finding
from packcli.doctor.machine import Card
from packcli.doctor.sweep import Sweep
from packcli.errors import MissingError, RunError
from packcli.eval.sandbox import sandbox
from packcli.launch import profile
from packcli.launch.profile import Profile
from packcli.model import backends
from packcli.store import Store

CANARY = "canary-1a2b3c4d5e6f"
H100 = Card("NVIDIA H100 80GB HBM3", "550.54", "9.0", 80 * 2**30, 79 * 2**30)
FACTS: dict[str, Any] = {
    "torch": "2.13.0", "cuda": "12.8", "hip": None, "error": "", "nccl": "2.27.3",
    "gpus": [{"name": H100.name, "capability": [9, 0]}], "kernels": ["sm_80", "sm_90"],
    "refusals": {"flash": "flash-attn is not installed", "varlen": None, "flex": None},
}  # fmt: skip


def silent(done: int, total: int, waiting: str) -> None:
    pass


def only(findings: Any) -> Finding:
    [found] = findings
    assert isinstance(found, Finding)
    return found


def named(findings: Any, name: str) -> Finding:
    return only(one for one in findings if one.name == name)


# The checks together -----------------------------------------------------------------------------------------


def test_a_check_that_never_answers_keeps_the_others_waiting() -> None:
    blocked = threading.Event()

    def hang() -> list[Finding]:
        blocked.wait(30)
        return []

    began = time.monotonic()
    try:
        found = checks.run(
            [Check("stuck", hang, limit_s=0.2), Check("well", lambda: [Finding("well", "ok", "here")])], silent
        )
    finally:
        blocked.set()
    assert time.monotonic() - began < 5
    assert [(one.name, one.state) for one in found] == [("stuck", "failed"), ("well", "ok")]
    assert found[0].found == "no answer in 0.2 s"


def test_an_exception_in_a_check_ends_the_doctor_or_passes_for_well() -> None:
    def broken() -> list[Finding]:
        raise ZeroDivisionError("division by\nzero")

    def lacking() -> list[Finding]:
        raise MissingError("no such thing", "get it")

    found = checks.run([Check("one", broken), Check("two", lacking)], silent)
    assert [(one.state, one.found, one.fix) for one in found] == [
        ("failed", "ZeroDivisionError: division by zero", ""),
        ("missing", "no such thing", "get it"),
    ]


def test_a_secret_that_a_library_quotes_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)

    def quoting() -> list[Finding]:
        raise RuntimeError(f"401 for https://me:{CANARY}@host/v1 with Bearer {CANARY} and hf_abcdefghijkl")

    text = only(checks.run([Check("one", quoting)], silent)).found
    assert CANARY not in text
    assert "hf_abcdefghijkl" not in text
    assert text.endswith("with Bearer *** and ***")


def program(directory: Path, lines: str) -> str:
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


def test_a_kernel_that_crashes_takes_the_doctor_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", program(tmp_path, "kill -SEGV $$"))
    with pytest.raises(RunError, match="killed by SIGSEGV"):
        elsewhere.ask("attention", "sdpa", "own", limit_s=10)


def test_a_process_that_hangs_is_waited_for_or_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    monkeypatch.setattr(sys, "executable", program(tmp_path, f"echo $$ > {pid}; exec sleep 600"))
    with pytest.raises(RunError, match=r"no answer in 0\.5 s"):
        elsewhere.ask("torch", limit_s=0.5)
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


def test_a_process_that_dies_with_words_is_not_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", program(tmp_path, "echo libcudart.so.12: cannot open >&2; exit 1"))
    with pytest.raises(RunError, match=r"ended with: libcudart\.so\.12: cannot open"):
        elsewhere.ask("torch", limit_s=10)


# Packages and the machine ------------------------------------------------------------------------------------


def test_a_version_that_packcli_does_not_allow_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: "4.57.0" if name == "transformers" else real(name))
    found = only(machine._versions())
    assert found.state == "failed"
    assert "transformers 4.57.0" in found.found
    assert found.fix == "pip install 'transformers<6,>=5'"
    monkeypatch.undo()
    assert only(machine._versions()).state == "ok"


def test_an_extra_that_is_not_installed_is_not_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine._version
    gone = {"openai", "peft"}
    monkeypatch.setattr(machine, "_version", lambda name: None if name in gone else real(name))
    found = list(machine._extras())
    judge = named(found, "extra judge")
    assert (judge.state, judge.fix) == ("missing", "pip install 'packcli[judge]'")
    assert named(found, "extra lora").found == "not installed: peft"
    assert "judge" not in found[0].found


def test_memory_beyond_the_limit_of_a_container_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    total, _ = machine.memory_bytes()
    texts = {
        "memory.max": ["max", str(2**30)],
        "memory.current": [str(2**29)],
        "cpu.max": ["150000 100000", "max"],
    }
    monkeypatch.setattr(machine, "_cgroup", lambda name: iter(texts.get(name, [])))
    assert total > 2**30
    assert machine.memory_bytes() == (2**30, 2**29)
    assert "limit" in only(machine._memory()).found
    assert machine._quota() == 1.5
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert "`train.threads: 1`" in only(machine._cpu()).means


def smi(directory: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "bin").mkdir()
    shutil.move(program(directory, lines), directory / "bin" / "nvidia-smi")
    monkeypatch.setenv("PATH", f"{directory / 'bin'}:{os.environ['PATH']}")
    machine.gpus.cache_clear()


@pytest.fixture(autouse=True)
def _forget_gpus() -> Iterator[None]:
    yield
    machine.gpus.cache_clear()


def test_a_card_that_somebody_else_holds_looks_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, "echo 'NVIDIA H100 80GB HBM3, 550.54, 9.0, 81559, 1200'", monkeypatch)
    found = only(machine._gpu())
    assert found.state == "ok"
    assert "1.2 GiB of 79.6 GiB free" in found.found
    assert "another process" in found.means


def test_a_driver_that_does_not_fit_its_kernel_passes_for_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(tmp_path, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", monkeypatch)
    found = only(checks.run([Check("gpu", machine._gpu)], silent))
    assert (found.state, found.found) == (
        "failed", "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cuda": None, "gpus": []}, "built for CPU; of 1 GPU it can use none"),
        ({"gpus": [], "error": "The NVIDIA driver on your system is too old"}, "driver on your system is too old"),
        ({"kernels": ["sm_50", "sm_80"]}, "it has no kernels for NVIDIA H100"),
    ],
)
def test_a_torch_that_cannot_use_the_gpu_is_called_well(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computing, "gpus", lambda: (H100,))
    monkeypatch.setattr(computing, "_facts", lambda: {**FACTS, **changes})
    found = only(computing._torch())
    assert found.state == "failed"
    assert words in found.found


def test_a_torch_that_can_is_called_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    for cards, facts in (((H100,), FACTS), ((), {**FACTS, "gpus": [], "error": "Found no NVIDIA driver"})):
        monkeypatch.setattr(computing, "gpus", lambda cards=cards: cards)
        monkeypatch.setattr(computing, "_facts", lambda facts=facts: facts)
        assert only(computing._torch()).state == "ok"
    card = FACTS["gpus"][0]
    assert computing._has_kernels(card, ["sm_80", "compute_80"])
    assert computing._has_kernels({**card, "capability": [8, 9]}, ["sm_80"])
    assert not computing._has_kernels({**card, "capability": [8, 0]}, ["sm_89"])


# Attention ---------------------------------------------------------------------------------------------------


def test_a_backend_that_leaks_is_called_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backends.sdpa

    def leaking(*args: Any, **options: Any) -> torch.Tensor:
        out = real(*args, **options)
        return out + 1e-3 * out.mean(dim=2, keepdim=True)

    for function, state in ((real, "ok"), (leaking, "failed")):
        monkeypatch.setattr(backends, "sdpa", function)
        monkeypatch.setattr(elsewhere, "ask", lambda *words, limit_s: answers.attend(*words[1:]))
        found = only(computing._attention("sdpa"))
        assert found.state == state
    assert "one document's tokens change another's outputs" in found.found
    assert "refuses" in found.means


def test_a_backend_that_is_not_there_is_called_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing, "_facts", lambda: FACTS)
    found = only(computing._attention("flash"))
    assert (found.state, found.fix) == ("missing", "pip install 'packcli[flash]'")


# Files -------------------------------------------------------------------------------------------------------


def looked(directory: Path) -> list[Finding]:
    return [Finding(**item) for item in storage.look(str(directory))]


def test_a_sound_directory_is_called_broken_or_kept_dirty(tmp_path: Path) -> None:
    found = looked(tmp_path / "runs" / "not there yet")
    assert [one.state for one in found] == ["ok"] * 3, found
    assert str(tmp_path) in found[0].found
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_passes() -> None:
    found = looked(Path("/proc/sys"))  # not even for root
    assert found[-1].state == "failed"
    assert "nothing can be written in /proc/sys" in found[-1].found


def test_a_lock_that_does_not_lock_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    found = named(looked(tmp_path), "locks")
    assert found.state == "failed"
    assert "a second process gets a lock that another holds" in found.found
    assert "-o flock" in found.fix


def test_a_file_in_the_place_of_the_run_directory_is_well(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    (found,) = looked(tmp_path / "runs")
    assert (found.name, found.state) == ("run directory", "failed")
    assert "is a file" in found.found


def test_a_full_disk_is_told_by_the_name_of_a_file_of_the_doctors_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = named(looked(tmp_path), "files")
    assert (found.state, found.found) == ("failed", f"nothing can be written in {tmp_path}: the disk is full")


def test_a_file_system_without_locks_ends_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: Any, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    found = named(looked(tmp_path), "locks")
    assert (found.state, "its file system has no locks" in found.found) == ("failed", True)
    assert "-o flock" in found.fix


def test_a_file_server_passes_for_a_disk_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_text

    def mounts(path: Path, *args: Any, **options: Any) -> str:
        if str(path) != "/proc/self/mounts":
            return real(path, *args, **options)
        return f"/dev/sda / ext4 rw 0 0\nserver:/home {str(tmp_path).replace(' ', chr(92) + '040')} nfs4 rw 0 0\n"

    monkeypatch.setattr(Path, "read_text", mounts)
    assert storage.file_system(tmp_path) == "nfs4"
    assert storage.file_system(Path("/")) == "ext4"
    assert "shared" in storage._kind(tmp_path).means


def test_a_full_disk_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    assert storage.disk(tmp_path).state == "failed"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**33))
    assert storage.disk(tmp_path).state == "ok"
    short = storage.disk(tmp_path, needed_bytes=2**34)
    assert (short.state, short.means) == ("missing", "the sweep takes about 16.0 GiB")


# Servers -----------------------------------------------------------------------------------------------------


@contextmanager
def answering(status: int) -> Iterator[tuple[str, list[str]]]:
    """A server that answers everything with one status; (its URL, the keys it was shown)."""
    shown: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers.get("Authorization", ""))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", shown
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finding]:
    """`hub(endpoint, token=..., offline=...)`: what is found of it."""
    from huggingface_hub import constants

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def look(endpoint: str, *, token: str = "", offline: bool = False) -> Finding:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_TOKEN", token)
        return only(checks.run([Check("hub", network._hub)], silent))

    return look


def test_a_hub_that_does_not_answer_passes(hub: Callable[..., Finding]) -> None:
    found = hub(f"http://127.0.0.1:{elsewhere.free_port()}", token=CANARY)
    assert found.state == "missing"
    assert "does not answer" in found.found
    assert "packcli fetch" in found.fix
    assert CANARY not in repr(found)


def test_a_token_that_is_refused_passes_for_no_network(hub: Callable[..., Finding]) -> None:
    with answering(401) as (url, shown):
        found = hub(url, token=CANARY)
    assert (found.state, found.fix) == ("failed", "hf auth login")
    assert "refuses the token (401)" in found.found
    assert shown == [f"Bearer {CANARY}"]
    assert CANARY not in repr(found)


def test_whether_there_is_a_token_is_not_said(hub: Callable[..., Finding]) -> None:
    with answering(200) as (url, _):
        assert "a token is set" in hub(url, token=CANARY).found
        assert "no token" in hub(url).found
    assert hub(url, offline=True).state == "missing"


def test_a_judge_that_nobody_reaches_or_that_refuses_the_key_passes(
    hub: Callable[..., Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    assert only(network._servers({})).state == "missing"
    closed = f"http://127.0.0.1:{elsewhere.free_port()}/v1"
    assert only(network._servers({"judge": closed})).state == "failed"
    for status, state in ((200, "ok"), (404, "ok"), (401, "failed"), (503, "failed")):
        with answering(status) as (url, _):
            monkeypatch.setenv("OPENAI_BASE_URL", url)
            found = only(network._servers({}))
        assert found.state == state, found
        assert CANARY not in repr(found)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert only(network._servers({"judge": closed})).found.endswith("OPENAI_API_KEY is not set")


# Scoring -----------------------------------------------------------------------------------------------------


def test_a_sandbox_that_lets_something_through_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise MissingError("`bwrap 0.8.0` is refused: a program could read files outside", "")

    monkeypatch.setattr(sandbox, "find", refused)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    found = only(scoring._sandbox())
    assert (found.state, "read files outside" in found.found) == ("failed", True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert only(scoring._sandbox()).state == "missing"


@pytest.mark.slow
def test_sentences_that_cannot_be_split_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    nltk.tokenize._get_punkt_tokenizer.cache_clear()  # a process that split sentences before still could
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(elsewhere, "ask", lambda question, *words, limit_s: scoring.split(*words))
    found = only(scoring._nltk(()))
    assert (found.state, found.fix) == ("missing", "python -m nltk.downloader punkt_tab")
    (tmp_path / "bench" / "nltk_data" / "tokenizers" / "punkt_tab" / "english").mkdir(parents=True)
    found = only(scoring._nltk((str(tmp_path / "bench"),)))
    assert found.state == "failed"
    assert found.fix.startswith("delete ")


# SLURM -------------------------------------------------------------------------------------------------------

CONFIG = """
KillWait                = 30 sec
MaxArraySize            = 1001
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SlurmctldParameters     = preempt_send_user_signal
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    found = FakeSlurm(tmp_path / "slurm")
    found.config(CONFIG)
    monkeypatch.setenv("PATH", found.env["PATH"])
    return found


def test_a_machine_without_slurm_is_called_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_checks.slurm, "is_here", lambda: False)
    [check] = slurm_checks.checks(None)
    assert only(check.look()).state == "missing"


def test_what_slurm_says_of_itself_is_told_wrong(fake: FakeSlurm) -> None:
    found = list(slurm_checks._slurm())
    assert [one.state for one in found] == ["ok"] * 5
    assert found[0].found == "SLURM 22.05.8, arrays of up to 1,000 jobs"
    assert (
        found[1].found
        == "preempted jobs are requeued, told by the signal a job asks for; SIGKILL 30 s after SIGTERM"
    )
    assert found[3].found.startswith(
        "gpu (default): 8 nodes of up to 8 GPUs, up to 1 d; main: 8 nodes of up to 8 GPUs, up to 1 d"
    )
    assert found[4].found == "`squeue` answers; 0 jobs of packcli are there"


def test_preempted_jobs_that_are_cancelled_are_said_to_come_back(fake: FakeSlurm) -> None:
    fake.config(CONFIG.replace("REQUEUE", "CANCEL"))
    assert named(slurm_checks._slurm(), "slurm preemption").state == "missing"
    fake.fault("sacct", "Slurm accounting storage is disabled")
    assert named(slurm_checks._slurm(), "slurm accounting").state == "missing"


def test_a_controller_that_is_down_passes(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_checks", lambda runs, sweep, profile: slurm_checks.checks(profile))
    fake.fault("scontrol", "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)")
    found = only(checks.run(slurm_checks.checks(None), silent))
    assert found.state == "missing"
    assert "Unable to contact" in found.found
    mine = command.examine(Path("runs"), None, Profile(name="mine"))
    assert named(mine, "slurm").needed_by == "jobs as mine asks for them"
    assert not command.is_well(mine)


@pytest.mark.parametrize(
    ("keys", "stage", "words"),
    [
        ({"partition": "nowhere"}, "train", "SLURM refused: Invalid partition name specified"),
        ({"partition": "gpu", "time": "2-00:00:00"}, "train", "2 d, and `gpu` allows 1 d"),
        ({"partition": "gpu", "nodes": 9}, "base", "9 nodes, and `gpu` has 8"),
        ({"gpus_per_node": 9}, "train", "9 GPUs a node, and nodes of `gpu` have 8"),
    ],
)
def test_a_profile_that_asks_for_what_is_not_there_passes(
    fake: FakeSlurm, keys: dict[str, Any], stage: Any, words: str, tmp_path: Path
) -> None:
    found = slurm_checks._stage(Profile(name="mine", **keys), stage, slurm_checks.slurm.limits(), tmp_path)
    assert (found.state, found.found) == ("failed", words)
    assert fake.jobs() == []


def test_a_profile_that_fits_is_called_broken_or_something_is_submitted(fake: FakeSlurm) -> None:
    found = list(slurm_checks._profile(Profile(name="mine", partition="gpu", nodes=4, gpus_per_node=8)))
    assert [one.state for one in found] == ["ok"] * 6, found
    assert named(found, "profile train").found == "4 nodes x 8 GPUs in `gpu` for 1 d"
    assert fake.jobs() == []
    large = next(slurm_checks._profile(Profile(name="mine", array_max=2000)))
    assert (large.state, large.fix) == ("failed", "`array_max: 1000`")


@pytest.mark.slurm
def test_a_real_slurm_says_it_in_other_words(cluster: Any) -> None:
    found = list(slurm_checks._slurm())
    names = ("slurm", "slurm preemption", "slurm accounting", "slurm partitions", "slurm jobs")
    assert {one.name: one.state for one in found} == dict.fromkeys(names, "ok")
    assert "arrays of up to 1,000 jobs" in found[0].found
    assert named(found, "slurm preemption").found.endswith("told by SIGTERM; SIGKILL 5 s after SIGTERM")
    assert "main (default): 4 nodes of up to 8 GPUs" in named(found, "slurm partitions").found
    mine = profile.load(REPO / "slurm" / "local_cluster.yaml")
    assert [one.state for one in slurm_checks._profile(mine)] == ["ok"] * 6
    for keys in ({"partition": "nowhere"}, {"gpus_per_node": 9}, {"nodes": 5}):
        assert "failed" in {one.state for one in slurm_checks._profile(mine.model_copy(update=keys))}, keys


# A sweep -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(
    tiny_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Sweep]:
    def make(**keys: Any) -> Sweep:
        monkeypatch.chdir(tmp_path)
        store = Store(tmp_path / "runs")
        return Sweep(stages.make_plan(sweepfile.load(tiny_sweep(**keys), (), ()), store), store)

    return make


def test_what_a_sweep_cannot_do_without_is_not_missed(sweep: Callable[..., Sweep], monkeypatch: Any) -> None:
    plain = sweep().needs()
    assert plain.keys() == {"torch", "attention sdpa", "extra train", "memory for it", "disk", "sweep files"}
    more = sweep(
        train={"attention_backend": "flash", "head": "liger", "trackers": ["wandb"]},
        eval={"tasks": ["humaneval", "ifeval", "wildbench"], "judge": {"model": "j", "base_url": "http://h:1/v1"}},
    )
    assert more.needs().keys() - plain.keys() == {
        "attention flash", "liger", "extra track", "extra eval", "sandbox", "nltk", "judge", "extra judge",
    }  # fmt: skip
    assert more.servers() == {"judge": "http://h:1/v1"}
    findings = [Finding("sandbox", "missing", "no bwrap")]
    monkeypatch.setattr(checks, "run", lambda asked, note: findings)
    assert command.is_well(command.examine(Path("runs"), None, None))
    found = command.examine(Path("runs"), more, None)
    assert not command.is_well(found)
    assert found[0].needed_by == "task humaneval"


def test_room_for_a_sweep_is_guessed_too_small(
    sweep: Callable[..., Sweep], tmp_path: Path, monkeypatch: Any
) -> None:
    asked = sweep(seeds=(0, 1, 2))
    weights = 4 * (2 * 300 * 32 + 32 + 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)  # embedding, head, norms, one layer
    text = (tmp_path / "chats.jsonl").stat().st_size
    expected = asked.disk_bytes()
    assert expected is not None
    assert expected >= text + 6 * weights  # six trainings' final weights
    unknown = sweep(model={"config": {"model_type": "mamba", "hidden_size": 32}})
    assert unknown.disk_bytes() is None
    monkeypatch.setattr("packcli.doctor.sweep.memory_bytes", lambda: (2**20, 2**18))
    assert only(asked._memory()).state == "missing"


def test_what_is_done_is_still_asked_for(sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = sweep()
    monkeypatch.setattr(stages, "done", lambda plan, wanted, store: set(wanted))
    assert asked.needs() == {}
    assert asked.disk_bytes() == 0


# The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(findings: list[Finding], *words: str) -> Any:
        monkeypatch.setattr(command, "examine", lambda runs, sweep, profile: findings)
        return CliRunner().invoke(app, ["doctor", *words])

    return run


WELL = Finding("gloo", "ok", "they talk", "several processes")
LACKING = Finding("liger", "missing", "not [installed]", "own head", "pip install 'packcli[liger]'")
BROKEN = Finding("locks", "failed", "they do not lock", "two writers", "--runs")


def test_the_exit_code_says_other_than_the_findings(invoke: Callable[..., Any]) -> None:
    needed = Finding("liger", "missing", "not there", needed_by="`train.head: liger`")
    for findings, code in (([WELL, LACKING], 0), ([WELL, BROKEN], 6), ([WELL, needed], 6)):
        done = invoke(findings, "--json")
        assert done.exit_code == code
        assert json.loads(done.stdout)["ok"] == (code == 0)


def test_a_finding_or_what_to_type_is_lost_in_the_table(invoke: Callable[..., Any]) -> None:
    text = invoke([WELL, LACKING, BROKEN]).stdout
    for finding in (WELL, LACKING, BROKEN):
        for part in (finding.name, finding.state, finding.found, finding.means):
            assert part in text
    assert "  locks  --runs\n  liger  pip install 'packcli[liger]'\n" in text, "what is broken goes first"
    assert text.endswith("1 ok, 1 missing, 1 failed; to mend: locks\n")
    assert "\x1b" not in text
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=80).print(command.table([WELL, LACKING, BROKEN]))
    assert all(state in out.getvalue() for state in ("ok", "missing", "failed")), "colour alone says nothing"


def test_asking_loads_torch_into_the_command_itself() -> None:
    code = "import sys, packcli.doctor.command; print(*{'torch', 'transformers', 'lm_eval'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.slow
def test_this_machine_is_called_ill_or_a_secret_gets_out(run_cli: Callable[..., Done], tmp_path: Path) -> None:
    """All of it as a user runs it; the Hub is a closed port."""
    closed = f"http://127.0.0.1:{elsewhere.free_port()}"
    env = {"HF_TOKEN": CANARY, "HF_ENDPOINT": closed, "HF_HUB_OFFLINE": "0", "OPENAI_API_KEY": CANARY}
    done = run_cli("doctor", "--json", cwd=tmp_path, env=env, timeout=120)
    found = {one["name"]: one for one in done.json()["checks"]}
    for name in ("installation", "versions", "cpu", "memory", "torch", "attention sdpa", "gloo", "locks", "disk"):
        assert found[name]["state"] == "ok", found[name]
    assert [one for one in found.values() if one["state"] == "failed" and one["name"] != "sandbox"] == []
    assert found["hub"]["state"] == "missing"
    assert "GB/s" in found["gloo"]["found"]
    assert done.code == (0 if found["sandbox"]["state"] != "failed" else 6)
    assert CANARY not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
