"""The run directory: what must hold when a process is killed, two run at once, or a disk flips a byte."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcli import files, store
from packcli.errors import ConfigError, IntegrityError, LockedError, MissingError, PackcliError, RunError
from packcli.files import atomic_directory, atomic_write, digest, locked, read_jsonl, write_json
from packcli.store import FileRecord, Store, normalized, verify


def finish(runs: Store, id_: str = "0123", *, write: bool = True) -> Path:
    """A finished eval stage with two files."""
    with runs.writing("eval", id_) as directory:
        if write:
            write_json(runs.results(id_), {"score": 1})
            runs.samples(id_).write_bytes(b'{"a":1}\n')
        runs.commit("eval", id_, spec={}, inputs={"train": "x"}, results={"score": 1}, provenance={"wall_s": 2})
    return directory


def test_the_manifest_is_written_last_and_covers_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = store.write_sealed

    def recording(path: Path, value: object) -> None:
        assert not runs.manifest_file("eval", "0123").exists()
        written.append(path)
        write(path, value)

    monkeypatch.setattr(store, "write_sealed", recording)
    runs = Store(tmp_path / "runs")
    directory = finish(runs)
    assert written == [runs.manifest_file("eval", "0123")]
    manifest = runs.manifest("eval", "0123")
    assert manifest is not None
    present = {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}
    assert manifest.outputs.keys() == present - {".lock", "manifest.json"} == {"results.json", "samples.jsonl"}
    assert runs.state("eval", "0123") == "done"
    assert verify(directory) == 2


def test_a_stage_that_was_killed_is_pending_and_one_that_failed_says_why(tmp_path: Path) -> None:
    runs = Store(tmp_path / "runs")
    assert runs.state("eval", "k") == "pending"
    with pytest.raises(KeyboardInterrupt), runs.writing("eval", "k"):  # noqa: PT012
        assert runs.state("eval", "k") == "running"
        runs.samples("k").write_bytes(b"half a li")
        raise KeyboardInterrupt
    assert runs.state("eval", "k") == "pending"
    with pytest.raises(RunError), runs.writing("eval", "k"):
        raise RunError("diverged", "lower the rate")
    assert runs.state("eval", "k") == "failed"
    assert json.loads(runs.failure_file("eval", "k").read_bytes()) == {
        "kind": "failed",
        "cause": "diverged",
        "fix": "lower the rate",
    }
    finish(runs, "k")
    assert runs.state("eval", "k") == "done"
    assert not runs.failure_file("eval", "k").exists()


def test_case_33_a_stage_held_by_another_process_is_refused_and_the_holder_named(tmp_path: Path) -> None:
    runs = Store(tmp_path / "runs")
    code = (
        "import sys; from pathlib import Path; from packcli.store import Store\n"
        "with Store(Path(sys.argv[1])).writing('eval', 'x'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(runs.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert runs.state("eval", "x") == "running"
        with pytest.raises(LockedError) as caught, runs.writing("eval", "x"):
            pass
        held = f"eval x is being written by process {holder.pid} on {platform.node()} since "
        assert re.fullmatch(re.escape(held) + r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", caught.value.cause)
        assert caught.value.exit_code == 5
        # A second attempt must still know the holder: the first must not have emptied the file.
        with pytest.raises(LockedError, match=str(holder.pid)), runs.writing("eval", "x"):
            pass
        holder.kill()
        holder.wait()
    assert runs.state("eval", "x") == "pending", "the lock outlived its holder"
    finish(runs, "x")


def test_case_34_the_lock_of_a_dead_holder_is_taken_over_and_names_its_present_one(tmp_path: Path) -> None:
    """The kernel frees it, whatever killed the holder; nothing has to be unlocked by hand."""
    code = (
        "import os, signal, sys; from pathlib import Path; from packcli.files import locked\n"
        "with locked(Path(sys.argv[1]), 'it'):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    dead = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert dead.returncode == -9
    left = (tmp_path / ".lock").read_text()
    with locked(tmp_path, "it"):
        now = (tmp_path / ".lock").read_text()
        assert now.split()[0] == str(os.getpid()) != left.split()[0]
        assert now.count("\n") == 1


def test_who_only_looks_at_a_lock_is_taken_for_its_holder(tmp_path: Path) -> None:
    """Sixteen who print the state of a sweep may look at a stage for longer than its writer was once patient."""
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open() as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        threading.Timer(0.4, lambda: fcntl.flock(looker, fcntl.LOCK_UN)).start()
        with locked(tmp_path, "it"), pytest.raises(LockedError), locked(tmp_path, "it"):
            pass


def test_a_stage_that_ends_between_two_looks_goes_back_to_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Store(tmp_path / "runs")

    def ends(path: Path) -> bool:
        finish(runs, "x")
        return False

    monkeypatch.setattr(store, "is_locked", ends)
    assert runs.state("eval", "x") == "done"


def test_a_missing_short_or_changed_file_is_found(tmp_path: Path) -> None:
    directory = finish(Store(tmp_path / "runs"))
    file = directory / "samples.jsonl"
    content = file.read_bytes()
    for damaged, message in (
        (content[:-1], "bytes, not"),
        (b"x" + content[1:], "sha256 differs"),
        (None, "missing"),
    ):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=message) as caught:
            verify(directory)
        assert str(file) in caught.value.cause
        assert caught.value.fix
    file.write_bytes(content)
    assert verify(directory) == 2


def test_verify_tells_of_one_damaged_stage_at_a_time(tmp_path: Path) -> None:
    runs = Store(tmp_path / "runs")
    for id_ in ("a", "b", "c"):
        finish(runs, id_)
    runs.samples("a").write_bytes(b"")
    runs.results("c").unlink()
    with pytest.raises(IntegrityError) as caught:
        verify(runs.root / "store")
    one, other = caught.value.cause.split("\n")
    assert str(runs.samples("a")) in one
    assert str(runs.results("c")) in other


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"outputs": []}', b'{"outputs": {"a": 1}}'])
def test_a_broken_manifest_vouches_for_nothing(tmp_path: Path, content: bytes) -> None:
    runs = Store(tmp_path / "runs")
    directory = finish(runs)
    runs.manifest_file("eval", "0123").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"manifest.json: (not a manifest|damaged, or cut short)"):
        verify(directory)
    with pytest.raises(IntegrityError, match=r"manifest.json: (not a manifest|damaged, or cut short)"):
        runs.manifest("eval", "0123")


def test_a_digit_changed_in_the_results_of_a_manifest_is_believed(tmp_path: Path) -> None:
    runs = Store(tmp_path / "runs")
    directory = finish(runs)
    path = runs.manifest_file("eval", "0123")
    written = path.read_bytes()
    path.write_bytes(written.replace(b'"score": 1', b'"score": 9'))
    for read in (lambda: verify(directory), lambda: runs.manifest("eval", "0123")):
        with pytest.raises(IntegrityError, match=r"manifest.json: its bytes changed \(its own checksum differs\)"):
            read()


def test_a_run_directory_of_an_older_version_is_refused(tmp_path: Path) -> None:
    """Its manifests have no checksum of their own: they are read, and that is not checked."""
    runs = Store(tmp_path / "runs")
    directory = finish(runs)
    path = runs.manifest_file("eval", "0123")
    write_json(path, files.read_sealed(path))
    assert b"checksum" not in path.read_bytes()
    assert verify(directory) == 2
    assert runs.manifest("eval", "0123") is not None


def test_a_directory_removed_half_way_by_a_killed_process_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Store(tmp_path / "runs")
    with runs.writing("train", "t"):
        checkpoint = runs.checkpoint("t", 1)
        write_json(checkpoint / "manifest.json", {})
        monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # killed before it began
        runs.remove(checkpoint)
        monkeypatch.undo()
        assert runs.checkpoints("t") == []
    with runs.writing("train", "t") as directory:
        assert [path.name for path in directory.iterdir()] == [".lock"], "the rest of it was not cleared away"


def test_an_unfinished_file_of_a_living_writer_is_taken_from_it(tmp_path: Path) -> None:
    """Parts of a token store are written without its lock, also on other machines."""
    runs = Store(tmp_path / "runs")
    runs.directory("tokens", "t").mkdir(parents=True)
    with atomic_write(runs.shard("tokens", 0).with_name("shard-00000.arrow")) as file:
        file.write(b"x")
    with atomic_write(runs.directory("tokens", "t") / "shard-00001.arrow") as file:
        file.write(b"x")
        elsewhere = runs.directory("tokens", "t") / ".shard-00002.arrow.tmp-another-host-12-0123abcd"
        long_ago = elsewhere.with_name(".shard-00003.arrow.tmp-another-host-12-0123abcd")
        for path in (elsewhere, long_ago):
            path.write_bytes(b"x")
        os.utime(long_ago, (0, 0))
        with runs.writing("tokens", "t"):
            assert (elsewhere.exists(), long_ago.exists()) == (True, False)
    assert (runs.directory("tokens", "t") / "shard-00001.arrow").exists()


def test_a_process_that_ended_and_was_not_asked_after_is_alive() -> None:
    """A container without an init keeps such for ever."""
    dead = subprocess.Popen(["true"])
    while os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT) is None:
        pass
    assert not files.is_alive(dead.pid)
    dead.wait()
    assert files.is_alive(os.getpid())


def test_what_a_killed_deleter_left_is_looked_at_or_stays(tmp_path: Path) -> None:
    runs = Store(tmp_path / "runs")
    finish(runs)
    doomed = runs.directory("eval", "").parent / "eval" / ".x.tmp-another-host-12-0123abcd"
    write_json(doomed / "manifest.json", {})
    assert verify(runs.root / "store") == 2
    os.utime(doomed, (0, 0))
    files.clear_unfinished(runs.directory("eval", ""))
    assert not doomed.exists()


def test_a_lock_on_a_directory_that_was_deleted_in_the_meantime_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, take = tmp_path / "stage", files._take

    def deletes(descriptor: int) -> bool:
        monkeypatch.setattr(files, "_take", take)
        files.remove_directory(directory)
        return take(descriptor)

    monkeypatch.setattr(files, "_take", deletes)
    with locked(directory, "it"):
        assert files.is_locked(directory / ".lock")
        with pytest.raises(LockedError), locked(directory, "it"):
            pass


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (errno.ENOLCK, ConfigError, "its file system has no locks"),
        (errno.EROFS, ConfigError, "Read-only file system"),
        (errno.ENOSPC, MissingError, "the disk is full"),
    ],
)
def test_a_stage_that_cannot_be_locked_is_called_a_bug(
    number: int, error: type[PackcliError], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(error, match=words), Store(tmp_path / "runs").writing("eval", "x"):
        pass


def test_a_manifest_that_cannot_be_read_for_the_moment_is_to_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Store(tmp_path / "runs")
    directory = finish(runs)

    def stale(path: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(store, "read_bytes", stale)
    monkeypatch.setattr(files, "read_bytes", stale)
    manifest = runs.manifest_file("eval", "0123")
    for read in (
        lambda: verify(directory),
        lambda: runs.manifest("eval", "0123"),
        lambda: runs.checked("eval", "0123", "results.json", FileRecord(sha256="", bytes=0)),
    ):
        with pytest.raises(IntegrityError, match="cannot be read: Stale file handle") as caught:
            read()
        assert caught.value.fix.endswith("delete nothing")
    assert manifest.exists()


def test_a_small_file_that_comes_in_pieces_is_taken_for_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "x.json", list(range(50)))
    read = os.read
    monkeypatch.setattr(os, "read", lambda file, count: read(file, min(count, 7)))
    assert files.read_json(tmp_path / "x.json") == list(range(50))


def test_what_a_killed_writer_left_stays_for_ever_or_a_living_ones_is_taken(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from packcli.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1]) / 'plan.json') as file:\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    [left] = tmp_path.iterdir()
    with atomic_write(tmp_path / "plan.json") as file:
        own = [path for path in tmp_path.iterdir() if path != left]
        files.clear_unfinished(tmp_path)
        assert list(tmp_path.iterdir()) == own
        file.write(b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


_SEALED = st.dictionaries(st.text(), st.integers(-(2**63), 2**63 - 1) | st.text(), min_size=1).filter(
    lambda value: "checksum" not in value
)


@given(_SEALED, st.data())
def test_a_bit_flipped_in_a_sealed_document_changes_what_is_read(
    value: dict[str, Any], data: st.DataObject
) -> None:
    document = files.seal(files.json_line(value))
    assert files.unseal(document, "x") == value
    place = data.draw(st.integers(0, 8 * len(document) - 1))
    flipped = bytearray(document)
    flipped[place // 8] ^= 1 << place % 8
    with contextlib.suppress(IntegrityError):
        assert files.unseal(bytes(flipped), "x") == value


def test_a_directory_without_manifest_and_one_of_another_stage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="no manifest"):
        verify(tmp_path)
    runs = Store(tmp_path / "runs")
    finish(runs).rename(runs.directory("eval", "4567"))
    with pytest.raises(IntegrityError, match="belongs to eval 0123"):
        runs.manifest("eval", "4567")


def test_a_log_with_times_has_no_checksum_and_may_change(tmp_path: Path) -> None:
    runs = Store(tmp_path / "runs")
    with runs.writing("train", "t") as directory:
        runs.metrics("t").write_bytes(b'{"step":1,"wall_s":3.5}\n')
        runs.config("t").write_text("a: 1\n")
        runs.commit("train", "t", spec={}, inputs={}, results={}, provenance={})
    runs.metrics("t").write_bytes(b"")
    assert verify(directory) == 1


def test_case_42_deleting_reaches_nothing_outside_the_run_directory(tmp_path: Path) -> None:
    runs = Store(tmp_path / "runs")
    (tmp_path / "mine").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "mine")
    for target in (tmp_path / "mine", tmp_path / "runs" / ".." / "mine", tmp_path / "runs" / "link", tmp_path):
        with pytest.raises(RunError, match="refusing to delete"):
            runs.remove(target)
    assert (tmp_path / "mine").is_dir()


def test_checkpoints_are_ordered_by_step_and_not_by_name(tmp_path: Path) -> None:
    runs = Store(tmp_path / "runs")
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-x", ".checkpoint-7.tmp-1"):
        (runs.directory("train", "t") / name).mkdir(parents=True)
    assert [step for step, _ in runs.checkpoints("t")] == [100, 20, 9]


def test_normalized_takes_out_times_rates_peaks_and_provenance_and_nothing_else() -> None:
    value = {
        "wall_s": 1,
        "cpu_s": 1,
        "useful_tokens_per_s": 1,
        "mfu": 1,
        "peak_memory_bytes": 1,
        "provenance": {"host": "x"},
        "steps": 3,
        "rows": [{"wall_s": 2, "loss": 0.5}, (1, {"peak_x": 1})],
        "mfu_note": "kept",
        "speaks": 1,
        "s": 1,
        "tokens": 5,
        "inner": {"provenance": 1, "seed": 0},
        7: "a key that is no text",
    }
    assert normalized(value) == {
        "steps": 3,
        "rows": [{"loss": 0.5}, [1, {}]],
        "mfu_note": "kept",
        "speaks": 1,
        "s": 1,
        "tokens": 5,
        "inner": {"seed": 0},
        7: "a key that is no text",
    }
    assert "wall_s" in value, "the argument was changed"


def test_two_runs_of_a_stage_leave_equal_manifests_but_for_what_varies(tmp_path: Path) -> None:
    found = []
    for name in "ab":
        runs = Store(tmp_path / name)
        finish(runs)
        found.append(normalized(json.loads(runs.manifest_file("eval", "0123").read_bytes())))
    assert found[0] == found[1]
    assert found[0]["results"] == {"score": 1}


def test_an_exception_leaves_neither_a_half_file_nor_a_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "x" / "file"
    with pytest.raises(ZeroDivisionError), atomic_write(target) as file:  # noqa: PT012
        file.write(b"half")
        1 / 0  # noqa: B018
    assert list((tmp_path / "x").iterdir()) == []
    with atomic_write(target) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(target) as file:
        1 / 0  # noqa: B018
    assert target.read_bytes() == b"old"
    assert list((tmp_path / "x").iterdir()) == [target]


def test_a_directory_appears_whole_or_not_at_all_and_replaces_an_older_one(tmp_path: Path) -> None:
    target = tmp_path / "final"
    with atomic_directory(target) as made:
        (made / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), atomic_directory(target) as made:  # noqa: PT012
        (made / "b").write_text("2")
        1 / 0  # noqa: B018
    assert [file.name for file in target.iterdir()] == ["a"]
    with atomic_directory(target) as made:
        (made / "c").write_text("3")
    assert [file.name for file in target.iterdir()] == ["c"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_of_a_killed_writer_gets_no_checksum(tmp_path: Path) -> None:
    runs = Store(tmp_path / "runs")
    with runs.writing("eval", "x") as directory:
        (directory / ".results.json.tmp-01234567").write_bytes(b"half")
        runs.samples("x").write_bytes(b"")
        manifest = runs.commit("eval", "x", spec={}, inputs={}, results={}, provenance={})
    assert manifest.outputs.keys() == {"samples.jsonl"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b'{"step":1}\n', [1]),
        (b'{"step":1}\n{"step":2}\n{"st', [1, 2]),
        (b'{"step":1}\n{"step":2}', [1]),  # whole by luck, but the writer ends every line: it was cut off
        (b'{"step":1}\n\n{"step":2}\n', [1, 2]),
    ],
)
def test_a_torn_last_line_of_a_log_is_left_out(tmp_path: Path, content: bytes, expected: list[int]) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert [item["step"] for item in read_jsonl(tmp_path / "metrics.jsonl")] == expected


def test_a_torn_line_in_the_middle_of_a_log_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":1}\n{"st\n{"step":3}\n')
    with pytest.raises(ValueError, match=r"unexpected|EOF|control|expected"):
        read_jsonl(tmp_path / "metrics.jsonl")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), _JSON))
def test_a_digest_does_not_depend_on_the_order_of_keys(value: dict[str, Any]) -> None:
    assert digest(value) == digest(dict(reversed(value.items())))
    assert digest(value) == digest(json.loads(json.dumps(value)))
    assert digest([value, 1]) != digest([value, 2])


def test_case_45_no_environment_variable_gets_into_a_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_THING", "sesame-open")
    runs = Store(tmp_path / "runs")
    directory = finish(runs)
    assert b"sesame-open" not in (directory / "manifest.json").read_bytes()
    assert files.read_json(directory / "manifest.json")["provenance"].keys() == {
        "wall_s",
        "finished_at",
        "host",
        "cpu_count",
        "load_average",
        "python",
        "packages",
        "commit",
    }
