"""Copies on a node's own disk: when a copier is killed, a disk is full or flips a bit, a directory is planted."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from packcli import log, stages
from packcli.errors import ConfigError, IntegrityError
from packcli.files import read_jsonl, read_sealed, sha256_file
from packcli.launch import ranks, scratch
from packcli.plan import TrainOrder
from packcli.store import Store, verify

if TYPE_CHECKING:
    from training import Data

COPIER = """
import os, sys, time, shutil
from pathlib import Path
from packcli import log
from packcli.launch import scratch
from packcli.plan import TrainOrder
from packcli.store import Store

runs, local, order, how = sys.argv[1:]
copy = shutil.copyfile

def say(word):  # a whole line, whichever threads speak
    os.write(1, word.encode() + b"\\n")

def half(source, target):  # and then it takes for ever
    Path(target).write_bytes(Path(source).read_bytes()[:100])
    say("half")
    time.sleep(600)

def gated(source, target):
    say("copying")
    while not Path(runs, "go").exists():
        time.sleep(0.02)
    copy(source, target)

def note(done, total, remark):
    if remark.startswith("waits") and remark not in said:
        said.append(remark)
        say("waits")

log.setup()
shutil.copyfile = {"half": half, "gated": gated, "well": copy}[how]
said = []
scratch.stage(Store(Path(runs)), TrainOrder.model_validate_json(order), Path(local), note)
say("staged")
sys.stdin.read()
"""


def silent(done: int, total: int, remark: str) -> None:
    pass


class Node:
    """A run directory of its own, and a directory on the node's disk."""

    def __init__(self, data: Data, path: Path) -> None:
        shutil.copytree(data.store.root, path / "runs")
        self.store, self.directory = Store(path / "runs"), path / "local"
        self.directory.mkdir()
        self.order = data.train_order("best_fit", "a", steps=4)
        shutil.copytree(data.store.root, path / "runs", dirs_exist_ok=True)  # with the rows of that order

    @property
    def home(self) -> Path:
        return self.directory / f"packcli-{os.geteuid()}"

    @property
    def copy(self) -> Path:
        """Of the tokens."""
        return Store(self.home).directory("tokens", "tokens")

    @property
    def shard(self) -> Path:
        return self.copy / self.store.shard("tokens", 0).name

    def stage(self, order: TrainOrder | None = None, note: ranks.Note = silent) -> Store:
        return scratch.stage(self.store, order or self.order, self.directory, note)

    @contextmanager
    def copier(self, how: str) -> Iterator[subprocess.Popen[str]]:
        arguments = [str(self.store.root), str(self.directory), self.order.model_dump_json(), how]
        command = [sys.executable, "-c", COPIER, *arguments]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def assert_whole(self) -> None:
        for kind, id_ in (("tokens", self.order.tokens), ("index", self.order.index)):
            copy = Store(self.home).directory(kind, id_)  # type: ignore[arg-type]
            assert verify(copy) > 1
            for file in filter(Path.is_file, copy.rglob("*")):
                if file.name != "manifest.json":
                    original = self.store.directory(kind, id_) / file.relative_to(copy)  # type: ignore[arg-type]
                    assert file.read_bytes() == original.read_bytes()


@pytest.fixture
def node(tiny: Data, tmp_path: Path) -> Iterator[Node]:
    yield Node(tiny, tmp_path)
    release()


def release() -> None:
    """What the end of this process would do."""
    while scratch._held:
        scratch._held.pop().close()


def until(copier: subprocess.Popen[str], said: str) -> None:
    assert copier.stdout is not None
    assert copier.stdout.readline() == f"{said}\n"


def size(node: Node) -> int:
    """Bytes of the files of the tokens' copy, its manifest left out."""
    found = Store(node.home).manifest("tokens", "tokens")
    assert found is not None
    return sum(record.bytes for record in found.outputs.values())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# Training ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_train_bitwise_the_same_from_copies_and_never_read_the_shared_shards(node: Node) -> None:
    ranks.run(node.order, node.store, ranks.Group(processes=2), silent)
    near = node.stage()
    hidden = [
        *node.store.directory("tokens", "tokens").glob("*.arrow"),
        *node.store.directory("index", node.order.index).glob("*.arrow"),
    ]
    assert len(hidden) >= 3
    for path in (*hidden, node.store.tokenizer("tokens")):
        path.rename(path.with_name(f"hidden-{path.name}"))
    other = node.order.model_copy(update={"id": "b"})
    with pytest.raises(IntegrityError, match="missing"):
        stages.train(other, node.store)  # the moved files are those a training needs
    ranks.run(other, near, ranks.Group(processes=2), silent)

    losses = [[record["loss"] for record in read_jsonl(node.store.metrics(id_))] for id_ in ("a", "b")]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    first, second = (
        {path.name: sha256_file(path) for path in node.store.final(id_).iterdir() if path.is_file()}
        for id_ in ("a", "b")
    )
    assert first == second
    validation = [node.store.manifest("train", id_).results["validation_loss"] for id_ in ("a", "b")]  # type: ignore[union-attr]
    assert validation[0] == validation[1] is not None


def test_only_what_a_training_reads_is_copied(node: Node) -> None:
    node.stage()
    node.assert_whole()
    made = {path.name for path in node.store.directory("tokens", "tokens").iterdir()}
    copied = {path.name for path in node.copy.iterdir()}
    assert copied == {name for name in made if name.endswith(".arrow")} | {"tokenizer", "manifest.json"}
    assert made - copied >= {"pieces.json", "shard-00000.json"}


def test_a_stage_made_anew_is_written_to_the_run_directory_and_not_into_its_copy(node: Node, tiny: Data) -> None:
    near = node.stage()
    assert near.shard("tokens", 0) == node.shard
    before = node.shard.stat().st_mtime_ns
    shutil.rmtree(node.store.directory("tokens", "tokens"))
    stages.prepare_tokens(tiny.order, near)
    assert verify(node.store.directory("tokens", "tokens")) > 1
    assert node.shard.stat().st_mtime_ns == before


def test_a_rank_is_told_of_the_copies_and_a_training_without_any_reads_what_it_read_before(node: Node) -> None:
    assert node.store.shard("tokens", 0) == node.store.directory("tokens", "tokens") / "shard-00000.arrow"
    near = node.stage()
    for path in (near.shard("tokens", 0), near.tokenizer("tokens"), near.rows(node.order.index)):
        assert path.is_relative_to(node.home)
    assert near.validation(node.order.index).is_relative_to(node.home)
    for path in (near.final("a"), near.metrics("a"), near.manifest_file("tokens", "tokens")):
        assert path.is_relative_to(node.store.root)


# Killed, in turn, at once ---------------------------------------------------------------------------------


def test_a_copy_that_was_killed_half_way_is_never_read_and_the_next_finishes_it(node: Node) -> None:
    with node.copier("half") as copier:
        until(copier, "half")
        copier.send_signal(signal.SIGKILL)
    assert copier.returncode == -signal.SIGKILL
    assert list(node.copy.rglob(".*.tmp-*")), "it was not killed half way"
    near = Store(node.store.root, local=node.home)
    assert near.shard("tokens", 0).is_relative_to(node.store.root)
    assert node.stage().shard("tokens", 0) == node.shard
    node.assert_whole()
    assert not list(node.copy.rglob(".*.tmp-*"))


def test_two_jobs_of_a_node_copy_once_and_both_go_on(node: Node) -> None:
    with node.copier("gated") as first:
        until(first, "copying")
        with node.copier("gated") as second:
            until(second, "waits")
            (node.store.root / "go").touch()
            said = [process.communicate(timeout=60) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert [words[1].count("bytes copied") for words in said] == [2, 0]
    node.assert_whole()


def test_a_job_that_waits_for_another_copy_can_be_stopped(node: Node) -> None:
    class Stopped(Exception):
        pass

    def note(done: int, total: int, remark: str) -> None:
        if "waits" in remark:
            raise Stopped

    with node.copier("half") as copier:
        until(copier, "half")
        with pytest.raises(Stopped):
            node.stage(note=note)


@pytest.mark.slow
def test_a_job_that_is_to_stop_starts_no_further_copy_and_the_next_makes_only_the_rest(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    copied, copy = list[Path](), shutil.copyfile

    def slow(source: Path, target: Path) -> None:
        copied.append(source)
        time.sleep(0.5)
        copy(source, target)

    def note(done: int, total: int, remark: str) -> None:
        if "copies" in remark:
            raise Stopped

    monkeypatch.setattr(shutil, "copyfile", slow)
    monkeypatch.setattr(scratch, "_THREADS", 1)
    with pytest.raises(Stopped):
        node.stage(note=note)
    assert len(copied) == 1
    node.stage()
    assert len(copied) == len(set(copied)) > 3
    node.assert_whole()


def test_whole_copies_are_used_again_and_not_copied(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.stage()
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: pytest.fail("copied again"))
    assert node.stage().shard("tokens", 0) == node.shard


# Space ----------------------------------------------------------------------------------------------------


def test_a_disk_too_small_is_said_and_the_run_directory_read(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1000)
    assert node.stage() is node.store
    [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "1,000 are free" in warning.getMessage()
    assert not node.copy.exists() or not any(node.copy.glob("*.arrow"))


def test_the_margin_is_left_free(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.stage()
    needed = size(node)
    release()
    shutil.rmtree(node.copy)
    monkeypatch.setattr(Store, "free_bytes", lambda self: int(needed * 1.04))
    assert node.stage() is node.store
    monkeypatch.setattr(Store, "free_bytes", lambda self: int(needed * 1.06))
    assert node.stage() is not node.store


def test_a_disk_that_fills_while_it_is_written_to_is_no_failure(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert node.stage() is node.store
    assert "No space left on device" in caplog.text
    assert not list(node.copy.rglob("*.tmp-*"))
    assert not (node.copy / "manifest.json").exists()


def old_copy(node: Node, name: str, age_s: float) -> Path:
    """A finished copy of another store, last used so long ago; it frees 1000 bytes when it goes."""
    copy = node.copy.with_name(name)
    copy.mkdir(parents=True)
    (copy / "shard-00000.arrow").write_bytes(b"x")
    users = copy.with_name(f"{name}.users")
    users.touch()
    os.utime(users, (users.stat().st_mtime - age_s,) * 2)
    return copy


def test_the_copy_unused_for_longest_makes_room_and_one_in_use_or_a_stranger_s_file_never(
    node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node.stage()
    needed = size(node)
    release()
    shutil.rmtree(node.copy)
    used, oldest, older, newer = (
        old_copy(node, name, age) for name, age in zip("abcd", (400, 300, 200, 100), strict=True)
    )
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    link = node.copy.with_name("e")
    link.symlink_to(tmp_path / "precious")
    users = link.with_name("e.users")
    users.touch()
    os.utime(users, (1, 1))
    (older / "inside").symlink_to(tmp_path / "precious")
    stranger = node.directory / "other.bin"
    stranger.write_text("x")
    monkeypatch.setattr(
        Store, "free_bytes", lambda self: 2 * needed if not (oldest.exists() or older.exists()) else 0
    )
    with used.with_name("a.users").open("rb") as user:
        fcntl.flock(user, fcntl.LOCK_SH)
        assert node.stage().shard("tokens", 0) == node.shard
    assert [path.exists() for path in (used, oldest, older, newer)] == [True, False, False, True]
    assert stranger.exists()
    assert (tmp_path / "precious" / "file").exists()


def test_a_copy_is_held_as_long_as_its_user_lives(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    with node.copier("well") as user:
        until(user, "staged")
        monkeypatch.setattr(Store, "free_bytes", lambda self: 0)
        other = old_copy(node, "other", 1)
        scratch._make_room(Store(node.home), 1)
        assert not other.exists()
        assert node.shard.exists()
    scratch._make_room(Store(node.home), 1)
    assert not node.copy.exists()


# Damage ---------------------------------------------------------------------------------------------------


def test_a_bit_that_flipped_in_an_old_copy_is_found_and_only_that_file_copied_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.stage()
    flip(node.shard)
    copied, copy = list[Path](), shutil.copyfile

    def counting(source: Path, target: Path) -> None:
        copied.append(source)
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", counting)
    node.stage()
    assert copied == [node.store.shard("tokens", 0)]
    node.assert_whole()


@pytest.mark.parametrize("times", [1, 1000])
def test_a_bit_that_flips_on_the_way_is_found(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, times: int
) -> None:
    flips, copy = list[Path](), shutil.copyfile

    def flipping(source: Path, target: Path) -> None:
        copy(source, target)
        if source.suffix == ".arrow" and len(flips) < times:
            flips.append(source)
            flip(Path(target))

    monkeypatch.setattr(shutil, "copyfile", flipping)
    near = node.stage()
    assert flips
    if times == 1:
        assert near.shard("tokens", 0) == node.shard
        node.assert_whole()
    else:  # such a disk is of no use, but the run directory is
        assert near is node.store
        assert "bytes change on their way to this disk" in caplog.text
        assert not node.shard.exists()


def test_damage_in_the_run_directory_is_an_error_and_not_copied(node: Node) -> None:
    flip(node.store.shard("tokens", 0))
    with pytest.raises(IntegrityError, match=r"runs/.*shard-00000.arrow: its bytes changed"):
        node.stage()
    assert not node.shard.exists()


def test_a_store_made_anew_under_its_id_replaces_the_copy(node: Node, tiny: Data) -> None:
    node.stage()
    path = node.store.manifest_file("tokens", "tokens")
    manifest = read_sealed(path)
    path.write_bytes(orjson.dumps(manifest | {"provenance": {"host": "another"}}))
    node.stage()
    found = Store(node.home).manifest("tokens", "tokens")
    assert found is not None
    assert found.provenance == {"host": "another"}


# Directories that are not what they seem ------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
@pytest.mark.parametrize("use", ["stage", "environment"])
def test_a_directory_that_someone_else_planted_is_refused(node: Node, use: str) -> None:
    node.home.mkdir(mode=0o777)
    os.chown(node.home, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to you"):
        node.stage() if use == "stage" else scratch.environment(node.directory)
    assert not list(node.home.iterdir())


@pytest.mark.parametrize("plant", ["link", "open", "file"])
def test_a_link_a_file_or_a_directory_that_others_may_write_to_is_refused(
    node: Node, plant: str, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    if plant == "link":
        node.home.symlink_to(tmp_path / "elsewhere")
    elif plant == "file":
        node.home.touch()
    else:
        node.home.mkdir()
        node.home.chmod(0o770)
    with pytest.raises(ConfigError, match="belongs to you"):
        node.stage()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_is_copied_is_private(node: Node) -> None:
    previous = os.umask(0)
    try:
        node.stage()
    finally:
        os.umask(previous)
    assert node.home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("key", ["tokens", "index"])
@pytest.mark.parametrize("id_", ["../../../out", "/out", "..", ".", "", "a/b", "tokens\n"])
def test_an_id_that_is_a_path_is_refused(node: Node, key: str, id_: str) -> None:
    with pytest.raises(ConfigError, match="no id of a stage"):
        node.stage(node.order.model_copy(update={key: id_}))


def test_a_manifest_cannot_name_files_outside_its_stage(node: Node) -> None:
    secret = node.store.root / "secret.arrow"
    secret.write_text("x")
    path = node.store.manifest_file("tokens", "tokens")
    manifest = read_sealed(path)
    for name in ("../../../secret.arrow", str(secret)):
        outputs = {name: {"sha256": sha256_file(secret), "bytes": 1}}
        path.write_bytes(orjson.dumps(manifest | {"outputs": outputs}))
        with pytest.raises(IntegrityError, match="is outside it"):
            node.stage()
    assert not list(node.directory.rglob("secret*"))


def test_a_directory_that_no_node_has_is_a_mistake_and_a_disk_that_breaks_is_not(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="no directory"):
        scratch.stage(node.store, node.order, node.directory / "typo", silent)

    def broken(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", broken)
    assert node.stage() is node.store
    assert scratch.environment(node.directory) == {}
    assert caplog.text.count("Read-only file system") == 2


def test_a_store_that_is_not_made_yet_is_left_to_the_training_to_report(node: Node) -> None:
    missing = node.order.model_copy(update={"index": "none"})
    assert node.stage(missing) is node.store


def test_compilers_keep_what_they_make_on_the_node(node: Node) -> None:
    found = scratch.environment(node.directory)
    assert found.keys() == {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    assert len({*found.values()}) == 2
    assert all(Path(path).parent == node.home for path in found.values())


# The directory as the profile has it ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "environ", "path"),
    [
        ("/local/scratch", {}, "/local/scratch"),
        ("$TMPDIR", {"TMPDIR": "/tmp/job"}, "/tmp/job"),
        ("/scratch/${USER}/$SLURM_JOB_ID", {"USER": "ada", "SLURM_JOB_ID": "17"}, "/scratch/ada/17"),
        ("$SLURM_TMPDIR/x", {"SLURM_TMPDIR": "/local/$HOME"}, "/local/$HOME/x"),  # never filled in twice
    ],
)
def test_variables_are_filled_in(text: str, environ: dict[str, str], path: str) -> None:
    assert scratch.expand(text, environ) == Path(path)


@pytest.mark.parametrize(
    ("text", "environ", "said"),
    [
        ("$TMPDIR/x", {}, r"\$TMPDIR is not set"),
        ("$TMPDIR/x", {"TMPDIR": ""}, r"\$TMPDIR is not set"),
        ("$HOME/x", {"HOME": "/root"}, r"`\$HOME` cannot stand in it"),
        ("/x/$SLURM_JOB_IDX", {"SLURM_JOB_ID": "1"}, r"`\$SLURM_JOB_IDX` cannot"),
        ("/x/$(touch canary)", {}, r"`\$` cannot"),
        ("/x/${USER:-a}", {"USER": "ada"}, r"`\$` cannot"),
        ("scratch", {}, "no plain absolute path"),
        ("~/scratch", {}, "no plain absolute path"),
        ("", {}, "no plain absolute path"),
        ("/scratch/../etc", {}, "no plain absolute path"),
        ("/scratch/$USER", {"USER": "../../etc"}, "no plain absolute path"),
        ("$TMPDIR", {"TMPDIR": "tmp"}, "no plain absolute path"),
        ("/x\ny", {}, "no plain absolute path"),
    ],
)
def test_a_directory_that_is_not_clear_is_refused(text: str, environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        scratch.expand(text, environ)


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.logger, "propagate", True)
    caplog.set_level("INFO", log.logger.name)
