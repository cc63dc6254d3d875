"""Hugging Face datasets: the wrong revision, split or rows, or a wait without end, where nobody would notice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import chat_records, write_lines
from huggingface_hub import HfApi
from huggingface_hub import errors as client
from test_tokens import byte_tokenizer, order_for

from packcli import stages
from packcli.config import SourceSpec
from packcli.data import conversations, hub, render, sources, tokenize
from packcli.errors import ConfigError, DataError, IntegrityError, MissingError, PackcliError
from packcli.plan import TokenizerOrder, TokensOrder
from packcli.store import Store


def spec(source: Path | str, **keys: Any) -> SourceSpec:
    return SourceSpec(source=str(source), **keys)


def records_of(spec: SourceSpec, most: int | None = None) -> list[sources.Record]:
    return [record for piece in sources.pieces((spec,), most) for record in sources.read(piece)]


def test_what_is_a_hub_id_and_what_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("allenai/tulu-3", "a/b.c_d", *hub.PAPER_SETS):
        assert hub.is_dataset(source), source
    paths = (
        "./a/b ../a ~/a /a/b a/b/c a/*.x a/b[1] a/b? a/b.jsonl a/b.parquet a/b.txt a/b.jsonl.gz a b.c a/ /b a/b\n"
    )
    for source in paths.split(" "):
        assert not hub.is_dataset(source), source
        with pytest.raises(ConfigError, match="no data at"):
            sources.names((spec(source),))
    for directory in ("allenai/tulu-3", "tulu"):
        write_lines(tmp_path / directory / "x.jsonl", chat_records(1))
        assert sources.names((spec(directory),)) == (f"{directory}/x.jsonl",)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test*}
- config_name: small
  data_files:
  - {split: train, path: small*}
---
"""


class Hub:
    """`o/n` on a Hub that is a local directory in the shape of a dataset repository."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch, suffix: str) -> None:
        self.rows = {"train": chat_records(2500), "test": chat_records(3, first=5000)}
        self.small = chat_records(2, first=7000)
        self.calls: list[dict[str, Any]] = []
        self.answer: str | Exception = COMMIT
        (directory / "data").mkdir(parents=True)
        (directory / "README.md").write_text(CARD)
        train = self.rows["train"]
        for stem, rows in {
            "data/train-0": train[:1500],
            "data/train-1": train[1500:],
            "data/test": self.rows["test"],
            "small": self.small,
        }.items():
            if suffix == "parquet":
                pq.write_table(pa.Table.from_pylist(rows), directory / f"{stem}.parquet")
            else:
                write_lines(directory / f"{stem}.jsonl", rows)
        load, self.cache = datasets.load_dataset, directory.parent / "cache"

        def load_dataset(path: str, **options: Any) -> Any:
            self.calls.append({"path": path, **options, "offline": datasets.config.HF_HUB_OFFLINE})
            del options["revision"]
            return load(str(directory), **options, cache_dir=str(self.cache))

        def dataset_info(_: Any, repo_id: str, **options: Any) -> Any:
            assert options["timeout"] <= 10
            if isinstance(self.answer, Exception):
                raise self.answer
            asked = options["revision"] or ""
            return type("Info", (), {"sha": asked if len(asked) == 40 else self.answer})

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(self.cache))
        patch.setattr(datasets, "load_dataset", load_dataset)
        patch.setattr(HfApi, "dataset_info", dataset_info)


@pytest.fixture
def hub_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Hub:
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    return Hub(tmp_path / "repository", monkeypatch, getattr(request, "param", "parquet"))


@pytest.mark.parametrize("hub_at", ["parquet", "jsonl"], indirect=True)
def test_a_dataset_by_id_is_its_split_in_the_order_of_its_rows(hub_at: Hub) -> None:
    for keys, name, rows in (
        ({}, "o/n@main[train]", hub_at.rows["train"]),
        ({"split": "test"}, "o/n@main[test]", hub_at.rows["test"]),
        ({"subset": "small", "revision": "v1"}, "o/n@v1[small:train]", hub_at.small),
    ):
        assert sources.names((spec("o/n", **keys),)) == (name,)
        found = sources.pieces((spec("tiny"), spec("o/n", **keys)), None, 1000)
        assert {(piece.file, piece.name) for piece in found[1:]} == {(1, name)}
        records = [record for piece in found[1:] for record in sources.read(piece)]
        assert [record.value for record in records] == rows
        assert [record.number for record in records] == list(range(1, len(rows) + 1))
    assert len(sources.pieces((spec("o/n"),), None, 1000)) > 1, "a split of several record batches is cut"
    assert {call["revision"] for call in hub_at.calls} == {COMMIT}, "the branch may move between two loads"
    assert not any("trust_remote_code" in call for call in hub_at.calls)
    assert sources.pieces((spec("tiny"), spec("o/n")), 5)[-1].kind == "builtin"


@pytest.mark.parametrize("shard_bytes", [None, 50_000])
def test_a_dataset_in_several_cache_files_is_numbered_through(
    hub_at: Hub, monkeypatch: pytest.MonkeyPatch, shard_bytes: int | None
) -> None:
    if shard_bytes:
        monkeypatch.setattr(datasets.config, "MAX_SHARD_SIZE", shard_bytes)
    found = sources.pieces((spec("o/n"),), None)
    assert len({piece.path for piece in found}) >= (2 if shard_bytes else 1)
    records = [record for piece in found for record in sources.read(piece)]
    assert [record.value for record in records] == hub_at.rows["train"]
    assert [record.number for record in records] == list(range(1, 2501))


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train[:1000]", slice(0, 1000)),
        ("train[1490:1520]", slice(1490, 1520)),
        ("train[-1%:]", slice(2475, 2500)),
        ("train[2000:]+train[:2000]", None),
    ],
)
def test_a_sliced_split_holds_its_rows_and_no_others(hub_at: Hub, split: str, rows: slice | None) -> None:
    train = hub_at.rows["train"]
    expected = train[2000:] + train[:2000] if rows is None else train[rows]
    records = records_of(spec("o/n", split=split))
    assert [record.value for record in records] == expected
    assert [record.number for record in records] == list(range(1, len(expected) + 1))
    pieces = sources.pieces((spec("o/n", split=split),), None)
    before = Path(pieces[0].path).stat().st_mtime_ns
    assert sources.pieces((spec("o/n", split=split),), None) == pieces
    assert Path(pieces[0].path).stat().st_mtime_ns == before, "written once"
    assert records_of(spec("o/n", split=split), most=7) == records[:7]


def test_a_dataset_in_memory_is_written_once_and_read(hub_at: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 1 << 30)
    assert [record.value for record in records_of(spec("o/n"))] == hub_at.rows["train"]


def test_a_streamed_dataset_goes_on_where_it_stopped(hub_at: Hub) -> None:
    streamed = spec("o/n", streaming=True)
    given_ = (streamed, spec("tiny"))
    assert sources.is_streamed(streamed)
    assert not sources.is_streamed(spec("o/n"))
    assert sources.names(given_) == ("o/n@main[train]", "tiny")
    assert [(piece.source, piece.file) for piece in sources.pieces(given_, None)] == [(1, 1)]
    assert hub_at.calls == [], "no piece of it, so nothing to load"
    for skip in (0, 1, 1600, 2500, 2501):
        found = list(sources.stream(streamed, skip, file=4))
        assert [record.value for record in found] == hub_at.rows["train"][skip:]
        assert [record.number for record in found] == list(range(skip + 1, 2501))
        assert {record.file for record in found} <= {4}
    with pytest.raises(ConfigError, match="cannot be streamed"):
        list(sources.stream(spec("o/n", streaming=True, split="train[:5]"), 0))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_or_subset_that_is_not_there_names_those_that_are(hub_at: Hub, streaming: bool) -> None:
    def read(**keys: Any) -> None:
        one = spec("o/n", streaming=streaming, **keys)
        list(sources.stream(one) if streaming else sources.pieces((one,), None))

    with pytest.raises(ConfigError, match=r"has no split `dev`; it has: train, test$"):
        read(split="dev")
    with pytest.raises(ConfigError, match=r"has no subset `big`; choose from: default, small$"):
        read(subset="big")


def answer(kind: type[client.HfHubHTTPError], status: int) -> client.HfHubHTTPError:
    # Not a real response: which HTTP library makes those differs between versions of the client.
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error.\n\nsecond line", response=response)


@pytest.mark.parametrize(
    ("error", "kind", "cause", "fix"),
    [
        (
            answer(client.RepositoryNotFoundError, 401),
            ConfigError,
            "no dataset on Hugging Face, or a private",
            "login",
        ),
        (
            answer(client.RepositoryNotFoundError, 404),
            ConfigError,
            "is no path here and no dataset",
            "check the name",
        ),
        (answer(client.GatedRepoError, 403), MissingError, "needs permission", "hf auth login"),
        (answer(client.RevisionNotFoundError, 404), ConfigError, "has no revision `v9`", "revision"),
        (answer(client.HfHubHTTPError, 401), MissingError, "needs permission", "hf auth login"),
        (answer(client.HfHubHTTPError, 400), DataError, "cannot be read: 400 Client Error.", "load_dataset"),
        (client.HFValidationError("bad\nid"), ConfigError, "no dataset on Hugging Face", "check the name"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(
    hub_at: Hub, error: Exception, kind: type[PackcliError], cause: str, fix: str
) -> None:
    hub_at.answer = error
    one = spec("o/n", revision="v9")
    for call in (
        lambda: hub.resolved(one),
        lambda: sources.pieces((one,), None),
        lambda: list(sources.stream(one)),
    ):
        assert_one_line(call, kind, cause, fix)
    assert hub_at.calls == []


def assert_one_line(call: Callable[[], Any], kind: type[PackcliError], cause: str, fix: str) -> None:
    with pytest.raises(PackcliError) as caught:
        call()
    assert type(caught.value) is kind
    assert "`o/n" in caught.value.cause
    assert cause in caught.value.cause
    assert fix in caught.value.fix
    assert "\n" not in caught.value.cause + caught.value.fix


@pytest.mark.parametrize(
    ("error", "kind", "cause", "fix"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub."), MissingError,
         "needs permission", "hf auth login"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed."),
         ConfigError, "no dataset on Hugging Face", "check the name"),
        (RuntimeError("Dataset scripts are no longer supported, but n.py"), DataError, "its own code", "convert"),
        (ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\nExample"),
         ConfigError, "has several subsets; choose from: en, de", "subset"),
        (datasets.exceptions.DataFilesNotFoundError("No (supported) data files found in o/n"), DataError,
         "No (supported) data files found", "load_dataset"),
        (OSError(28, "No space left on device"), DataError, "No space left on device", "load_dataset"),
        (ConnectionError("Couldn't reach 'o/n' on the Hub (OfflineModeIsEnabled)"), MissingError,
         "no connection to Hugging Face", "HF_HUB_OFFLINE"),
    ],
)  # fmt: skip
def test_what_datasets_raises_becomes_one_line(
    hub_at: Hub,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[PackcliError],
    cause: str,
    fix: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert_one_line(lambda: sources.pieces((spec("o/n"),), None), kind, cause, fix)
    wrapped = datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")
    wrapped.__cause__, error = ValueError("Expected `{`\nat line 3"), wrapped
    assert_one_line(lambda: sources.pieces((spec("o/n"),), None), DataError, "cannot be read: Expected `{`", "")


def test_without_datasets_the_message_says_what_to_install(hub_at: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert_one_line(lambda: sources.pieces((spec("o/n"),), None), MissingError, "needs the package", "pip install")


def test_without_a_connection_the_cache_is_used_and_nothing_else(hub_at: Hub) -> None:
    for no_answer in (answer(client.HfHubHTTPError, 503), TimeoutError(), client.OfflineModeIsEnabled()):
        hub_at.answer = no_answer
        assert hub.resolved(spec("o/n")) is None
    datasets.config.HF_HUB_OFFLINE = False
    try:
        sources.pieces((spec("o/n"),), None)
        assert not datasets.config.HF_HUB_OFFLINE
    finally:
        datasets.config.HF_HUB_OFFLINE = True
    assert hub_at.calls[-1]["offline"], "or `datasets` would try for half a minute"
    assert_one_line(
        lambda: sources.pieces((spec("o/n", revision="v1"),), None), MissingError, "revision `v1`", "commit"
    )


def test_a_cached_copy_of_another_revision_is_refused(
    hub_at: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sources.pieces((spec("o/n"),), None)
    other = tmp_path / COMMIT.replace("0", "f")
    shutil.copytree(Path(found[0].path).parent, other)
    cached = datasets.Dataset.from_file(str(other / Path(found[0].path).name))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: cached)
    assert_one_line(
        lambda: sources.pieces((spec("o/n"),), None), MissingError, f"the cache is of {other.name}", ""
    )
    hub_at.answer = TimeoutError()
    assert_one_line(
        lambda: sources.pieces((spec("o/n", revision=COMMIT),), None), MissingError, "in the cache", ""
    )
    assert sources.pieces((spec("o/n", revision=other.name),), None)
    assert sources.pieces((spec("o/n"),), None)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_dataset_that_cannot_be_reached_fails_within_seconds(tmp_path: Path, offline: str) -> None:
    code = (
        "import sys, time; from packcli.config import SourceSpec; from packcli.data import sources\n"
        "from packcli.errors import MissingError; import datasets\n"
        "start = time.monotonic()\n"
        "for call in (lambda s: sources.pieces((s,), None), lambda s: list(sources.stream(s))):\n"
        "    try: call(SourceSpec(source='tulu'))\n"
        "    except MissingError as error: print(error)\n"
        "print(time.monotonic() - start)"
    )
    environment = {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    *causes, seconds = done.stdout.splitlines()
    assert len(causes) == 2
    for cause in causes:
        assert cause.startswith(
            "no connection to Hugging Face, and no copy of `Super-shuhe/packing-tulu@main[train]`"
        )
    assert float(seconds) < 10


def test_a_cached_dataset_is_read_offline_at_its_revision(hub_at: Hub, tmp_path: Path) -> None:
    """With the real `load_dataset` on a cache laid out as it lays it out: owner___name/subset/version/commit."""
    built = Path(sources.pieces((spec("o/n"),), None)[0].path)
    directory = tmp_path / "home" / "datasets" / "o___n" / "default" / "0.0.0" / COMMIT
    directory.mkdir(parents=True)
    for file in built.parent.iterdir():
        shutil.copy(file, directory / file.name.replace(built.name.partition("-")[0], "n"))
    code = (
        "import sys; from packcli.config import SourceSpec; from packcli.data import sources\n"
        "from packcli.errors import MissingError\n"
        "def rows(**keys):\n"
        "    one = SourceSpec(source='o/n', **keys)\n"
        "    try: return sum(1 for piece in sources.pieces((one,), None) for _ in sources.read(piece))\n"
        "    except MissingError as error: return error\n"
        "print(rows(), rows(revision=sys.argv[1]), rows(split='train[:7]'), rows(split='test'))\n"
        "print(rows(revision='f' * 40))\n"
        "print(rows(subset='small'))\n"
        "print(sum(1 for _ in sources.stream(SourceSpec(source='o/n', streaming=True), 2000)))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment["HF_HOME"] = str(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", code, COMMIT],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    counts, other, subset, streamed = done.stdout.splitlines()
    assert counts == "2500 2500 7 3"
    assert f"the copy in the cache is of {COMMIT}" in other
    assert "no copy of `o/n@main[small:train]`" in subset
    assert streamed == "500"


# Stores ------------------------------------------------------------------------------------------------


def order_of(directory: Path, *specs: SourceSpec, **changes: Any) -> TokensOrder:
    byte_tokenizer(render.template_text("plain")).save_pretrained(directory / "tokenizer")
    named = {"tokenizer": TokenizerOrder(name=str(directory / "tokenizer")), "template": "plain"}
    return order_for("tiny", **named, **changes).model_copy(update={"sources": specs})


def interrupted(order: TokensOrder, store: Store, number: int) -> list[bytes]:
    """All shards as they were, of which those from `number` on are not done any more."""
    made = [file.read_bytes() for file in sorted(store.directory("tokens", order.id).glob("shard-*.arrow"))]
    store.manifest_file("tokens", order.id).unlink()
    for missing in range(number, len(made)):
        store.shard_record(order.id, missing).unlink()
    return made


@pytest.mark.parametrize("streaming", [False, True])
def test_a_store_is_of_one_commit_however_often_the_branch_moves(
    hub_at: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr(tokenize, "STREAM_CHUNK", 1000)
    original = sources.pieces
    monkeypatch.setattr(sources, "pieces", lambda of, most: original(of, most, 100_000))
    store, order = Store(tmp_path / "runs"), order_of(tmp_path, spec("o/n", streaming=streaming))
    stages.prepare_tokens(order, store)
    assert len(hub_at.calls) == 1, "each more may find another commit"
    made = interrupted(order, store, 1)
    assert len(made) > 1

    hub_at.answer = "f" * 40
    if not streaming:  # nor does it matter where the cache lies by now
        hub_at.cache = hub_at.cache.rename(tmp_path / "moved")
    manifest = stages.prepare_tokens(order, store)
    assert {call["revision"] for call in hub_at.calls} == {COMMIT}
    assert manifest.provenance["revisions"] == [COMMIT]
    assert interrupted(order, store, len(made)) == made


@pytest.mark.parametrize("streaming", [False, True])
def test_a_store_begun_with_a_copy_of_no_known_commit_does_not_go_on_with_another(
    hub_at: Hub, tmp_path: Path, streaming: bool
) -> None:
    hub_at.answer = TimeoutError()
    store, order = Store(tmp_path / "runs"), order_of(tmp_path, spec("o/n", streaming=streaming))
    assert stages.prepare_tokens(order, store).provenance["revisions"] == [None]
    interrupted(order, store, 0)
    stages.prepare_tokens(order, store)
    interrupted(order, store, 0)
    hub_at.answer = COMMIT
    with pytest.raises(IntegrityError, match="begun without the hub") as caught:
        stages.prepare_tokens(order, store)
    assert str(store.directory("tokens", order.id)) in caught.value.fix


def test_a_cache_that_holds_other_files_by_now_is_refused(
    hub_at: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, order = Store(tmp_path / "runs"), order_of(tmp_path, spec("o/n", split="test"))
    stages.prepare_tokens(order, store)
    interrupted(order, store, 0)
    found = sources.File(0, "o/n", (tmp_path / "other.arrow",))
    monkeypatch.setattr(sources, "located", lambda of: iter([found]))
    with pytest.raises(IntegrityError, match="other files of the cache"):
        stages.prepare_tokens(order, store)


@pytest.mark.parametrize("most", [None, 90, 2600])
def test_a_stream_is_in_a_plan_and_in_a_trained_tokenizer(hub_at: Hub, tmp_path: Path, most: int | None) -> None:
    """In the last place, whatever its place among the sources."""
    write_lines(tmp_path / "x.jsonl", chat_records(80, first=9000))
    local, keys = spec(tmp_path / "x.jsonl"), {"max_documents": most}
    streamed = order_of(tmp_path, spec("o/n", streaming=True), local, **keys)
    loaded = order_of(tmp_path, local, spec("o/n"), **keys)
    found, expected = (
        tokenize.measure(order, tmp_path / f"t{number}", lambda *_: None)
        for number, order in enumerate((streamed, loaded))
    )
    assert found.conversations == expected.conversations == min(most or 2580, 2580)
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert found.content.tolist() == expected.content.tolist()

    said, again = (
        [(record.number, read) for record, read in conversations.everything(order.sources, most)]
        for order in (streamed, loaded)
    )
    assert said == again
    assert len(said) == min(most or 2580, 2580)
