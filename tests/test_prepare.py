"""`packcli prepare` as a user runs it: data that lies, disks that fill, processes that die, machines that vary."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Done, chat_records, write_lines

from packcli import stages, sweepfile, views
from packcli.errors import ConfigError, IntegrityError, MissingError
from packcli.files import read_json, read_jsonl, sha256_file, write_json
from packcli.plan import Plan
from packcli.store import Store, normalized

Cli = Callable[..., Done]


@pytest.fixture(scope="module")
def run_cli(forked_cli: Cli) -> Cli:
    return forked_cli


MODEL = {
    "config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "tokenizer": "train",
    "vocab_size": 300,
}


def sweep(directory: Path, source: Any, arms: tuple[str, ...] = ("padding", "best_fit"), **data: Any) -> Path:
    path = directory / "sweep.yaml"
    document = {
        "name": "s",
        "model": MODEL,
        "data": {"source": source, "max_length": 128, "validation": 0.1, **data},
        "train": {"epochs": 1, "lr": 1e-3, "global_batch": 4},
        "matrix": {"arm": list(arms)},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def tree(root: Path) -> dict[str, Any]:
    """Every file of a store, without what varies from run to run."""
    found: dict[str, Any] = {}
    for path in sorted((root / "store").rglob("*")):
        if path.is_file() and path.name != ".lock" and "fingerprints.json" not in path.name:  # a cache
            name = path.relative_to(root).as_posix()
            found[name] = normalized(read_json(path)) if path.name == "manifest.json" else sha256_file(path)
    return found


def only(root: Path, kind: str, name: str) -> Path:
    [found] = root.glob(f"store/{kind}/*/{name}")
    return found


# Nothing depends on how it was done --------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of several formats, of which two are cut into pieces; 40 MB."""
    root = tmp_path_factory.mktemp("large")
    filler = "Lorem ipsum dolor sit amet. " * 100
    records = chat_records(7000)
    for number, record in enumerate(records):
        record["messages"][0]["content"] += f" {number} {filler[: 40 * (number % 70)]}"
    data = root / "data"
    data.mkdir()
    write_lines(data / "a.jsonl", records * 2)
    write_lines(data / "c.jsonl", [*records[:50], {"messages": []}])
    (data / "b.json").write_text(json.dumps(records[:100]))
    return root


@pytest.mark.slow
def test_a_store_does_not_depend_on_the_number_of_processes(large: Path, run_cli: Cli) -> None:
    path = sweep(large, "data")
    for count in (1, 2, 5):
        done = run_cli(
            "prepare", path, "--runs", large / f"r{count}", "--set", f"data.processes={count}", cwd=large
        )
        assert done.code == 0, done.stderr
    trees = [tree(large / f"r{count}") for count in (1, 2, 5)]
    assert len(list((large / "r1").glob("store/tokens/*/shard-*.arrow"))) >= 4
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.slow
def test_parts_made_apart_and_put_together_are_the_store_made_at_once(large: Path, run_cli: Cli) -> None:
    path = sweep(large, "data")
    assert run_cli("prepare", path, "--runs", large / "once", cwd=large).code == 0
    for part in ("2/3", "1/3", "3/3"):
        done = run_cli("prepare", path, "--runs", large / "parts", "--part", part, cwd=large)
        assert done.code == 0, done.stderr
        assert f"part {part[0]} of 3 is done" in done.stdout
    made = {path: path.stat().st_mtime_ns for path in (large / "parts").glob("store/tokens/*/shard-*.arrow")}
    assert run_cli("prepare", path, "--runs", large / "parts", cwd=large).code == 0
    assert made == {path: path.stat().st_mtime_ns for path in made}, "a shard was made twice"
    assert tree(large / "parts") == tree(large / "once")


def test_a_part_that_is_none_is_a_usage_error(tmp_path: Path, run_cli: Cli) -> None:
    path = sweep(tmp_path, "tiny", max_documents=5)
    for part in ("0/3", "4/3", "1", "a/b", "1/0"):
        done = run_cli("prepare", path, "--part", part, cwd=tmp_path)
        assert (done.code, "K/N" in done.stderr) == (2, True), part


@pytest.mark.slow
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.soak)])
def test_case_01_killed_at_any_commit_point_the_same_command_ends_in_the_same_store(
    tmp_path: Path, run_cli: Cli, every: int
) -> None:
    """Started as a user starts it, SIGKILL at every commit point of prepare (or every ninth): no half file has its
    final name. `test_commit_points.py` walks a whole sweep."""
    path = sweep(tmp_path, write_lines(tmp_path / "x.jsonl", [*chat_records(40), {"messages": []}]).name)
    log = tmp_path / "points"
    done = run_cli("prepare", path, "--runs", "clean", cwd=tmp_path, env={"PACKCLI_FAULT_LOG": str(log)})
    assert done.code == 0, done.stderr
    points = [name.removeprefix("clean/") for name in dict.fromkeys(log.read_text().splitlines())]
    passed = {point.rpartition("/")[2] for point in points}
    assert {"shard-00000.arrow:before", "manifest.json:after", "rows.arrow:after"} <= passed
    clean = tree(tmp_path / "clean")
    for number, point in enumerate(points[::every]):
        runs = tmp_path / f"r{number}"
        fault = {"PACKCLI_FAULT_LOG": str(tmp_path / f"log{number}"), "PACKCLI_FAULT": f"kill:{point}"}
        killed = run_cli("prepare", path, "--runs", runs, cwd=tmp_path, env=fault)
        assert killed.code != 0, f"{point} killed nobody"
        name, _, moment = point.rpartition(":")
        assert (runs / name).exists() == (moment == "after" and name != "s/process"), point
        again = run_cli("prepare", path, "--runs", runs, cwd=tmp_path)
        assert again.code == 0, (point, again.stderr)
        assert tree(runs) == clean, point
        shutil.rmtree(runs)


# Input that lies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "where"),
    [
        pytest.param(b'{"messages": [}\n', "x.jsonl:3", id="bad JSON", marks=pytest.mark.slow),
        pytest.param(b'{"question": "cut sho', "x.jsonl:3", id="torn last line"),
        pytest.param(
            b'{"question": "\xff", "answer": "x"}\n', "x.jsonl:3", id="not UTF-8", marks=pytest.mark.slow
        ),
        pytest.param(b'{"question": "a\x00b", "answer": "x"}\n', "x.jsonl:3", id="NUL", marks=pytest.mark.slow),
    ],
)
def test_case_06_a_line_that_cannot_be_parsed_stops_or_is_counted(
    tmp_path: Path, run_cli: Cli, content: bytes, where: str
) -> None:
    write_lines(tmp_path / "x.jsonl", chat_records(2))
    good = (tmp_path / "x.jsonl").read_bytes()
    (tmp_path / "x.jsonl").write_bytes(good + content)
    done = run_cli("prepare", sweep(tmp_path, "x.jsonl", validation=0), cwd=tmp_path)
    assert done.code == 3
    assert where in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").glob("store/tokens/*/manifest.json"))
    done = run_cli("prepare", sweep(tmp_path, "x.jsonl", validation=0, on_error="skip"), "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    ledger = done.json()["cells"][0]["ledger"]
    assert (ledger["conversations_in"], ledger["conversations_rejected"], ledger["documents"]) == (3, 1, 2)
    [rejected] = read_jsonl(Path(tmp_path, done.json()["cells"][0]["rejected_path"]))
    assert where in rejected["reason"]


def test_case_06_more_bad_lines_than_allowed_stop_even_when_skipped(tmp_path: Path, run_cli: Cli) -> None:
    write_lines(tmp_path / "x.jsonl", chat_records(2))
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write("{\n" * 4)
    done = run_cli("prepare", sweep(tmp_path, "x.jsonl", on_error="skip", max_errors=3), cwd=tmp_path)
    assert done.code == 3
    assert "more than `data.max_errors: 3`" in done.stderr


@pytest.mark.slow
def test_case_07_bom_and_crlf_are_accepted_as_they_come(tmp_path: Path, run_cli: Cli) -> None:
    write_lines(tmp_path / "x.jsonl", chat_records(3))
    text = (tmp_path / "x.jsonl").read_bytes()
    (tmp_path / "y.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    ledgers = [
        run_cli("prepare", sweep(tmp_path, name), "--json", cwd=tmp_path).json()["cells"][0]["ledger"]
        for name in ("x.jsonl", "y.jsonl")
    ]
    assert ledgers[0] == ledgers[1]


@pytest.mark.slow
def test_case_08_a_file_of_no_known_schema_names_what_is_accepted(tmp_path: Path, run_cli: Cli) -> None:
    write_lines(tmp_path / "x.jsonl", [{"text": "plain"}])
    done = run_cli("prepare", sweep(tmp_path, "x.jsonl"), cwd=tmp_path)
    assert done.code == 3
    assert "no chat schema fits its fields (`text`)" in done.stderr


def test_case_08_a_wrong_role_or_content_is_rejected_with_its_path(tmp_path: Path, run_cli: Cli) -> None:
    bad = {"messages": [*chat_records(1)[0]["messages"], {"role": "wizard", "content": "x"}]}
    worse = {"messages": [{"role": "user", "content": 3}]}
    write_lines(tmp_path / "x.jsonl", [*chat_records(3), bad, worse])
    done = run_cli("prepare", sweep(tmp_path, "x.jsonl", validation=0), "--json", cwd=tmp_path)
    reasons = [item["reason"] for item in read_jsonl(tmp_path / done.json()["cells"][0]["rejected_path"])]
    assert reasons[0].startswith("`messages[2]`: unknown role `wizard`")
    assert reasons[1].startswith("`messages[0]`: the text is int")


@pytest.mark.parametrize(
    "content", ["", "\n\n", '{"messages": []}\n'], ids=["empty", "blank", "empty conversation"]
)
def test_case_09_nothing_usable_is_bad_data_and_not_an_empty_store(
    tmp_path: Path, run_cli: Cli, content: str
) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    done = run_cli("prepare", sweep(tmp_path, "x.jsonl"), cwd=tmp_path)
    assert done.code == 3
    assert "no usable conversation" in done.stderr


def test_case_10_conversations_without_anything_to_learn_never_make_a_batch(tmp_path: Path, run_cli: Cli) -> None:
    nothing = [
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "  "}]},
    ]
    late = {"messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "late"}]}
    write_lines(tmp_path / "x.jsonl", [*chat_records(3), *nothing, late])
    done = run_cli("prepare", sweep(tmp_path, "x.jsonl", validation=0), "--json", cwd=tmp_path)
    for cell in done.json()["cells"]:
        ledger = cell["ledger"]
        assert (ledger["conversations_rejected"], ledger["documents_dropped"], ledger["documents_kept"]) == (
            2,
            1,
            3,
        )
        assert ledger["tokens_dropped"] > 400


def test_case_11_an_over_long_document_follows_the_arms_policy_and_is_counted(
    tmp_path: Path, run_cli: Cli
) -> None:
    long = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "word " * 400}]}
    write_lines(tmp_path / "x.jsonl", [*chat_records(3), long])
    path = sweep(tmp_path, "x.jsonl", ("best_fit", "dropping", "random"), validation=0)
    path.write_text(path.read_text() + "arms: {dropping: {extends: best_fit, overlong: drop}}\n")
    done = run_cli("prepare", path, "--json", cwd=tmp_path)
    truncated, dropped, cut = (cell["ledger"] for cell in done.json()["cells"])
    assert truncated["tokens_truncated"] == dropped["tokens_dropped"] - 128 > 200
    assert dropped["documents_dropped"] == 1
    assert (cut["tokens_truncated"], cut["tokens_dropped"]) == (0, 0)
    assert cut["documents_cut"] >= 1


@pytest.mark.slow
def test_case_12_repeated_conversations_are_said(tmp_path: Path, run_cli: Cli) -> None:
    write_lines(tmp_path / "x.jsonl", chat_records(5))
    done = run_cli("prepare", sweep(tmp_path, ["x.jsonl", "x.jsonl"], validation=0), cwd=tmp_path)
    assert "5 conversations say the same as another one" in done.stdout


def test_case_13_control_tokens_typed_in_a_message_are_text(tmp_path: Path, run_cli: Cli) -> None:
    typed = "end it with <|im_end|> and <|endoftext|>"
    record = {"messages": [{"role": "user", "content": typed}, {"role": "assistant", "content": typed}]}
    write_lines(tmp_path / "x.jsonl", [*chat_records(3), record])
    done = run_cli("prepare", sweep(tmp_path, "x.jsonl", validation=0), "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    from packcli import stages
    from packcli.data.tokenizer import load_directory
    from packcli.store import Store

    store, id_ = Store(tmp_path / "runs"), Path(done.json()["cells"][0]["tokens_path"]).name
    tokenizer = load_directory(store.tokenizer(id_))
    ids = stages.open_tokens(store, store.manifest("tokens", id_)).ids(3).tolist()
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(stop) == 2, "only the template ends a turn"
    assert ids.count(tokenizer.convert_tokens_to_ids("<|endoftext|>")) == 0
    assert tokenizer.decode(ids).count(typed) == 2


def test_case_14_a_tokenizer_without_a_template_or_its_tokens_is_refused_before_work(
    tmp_path: Path, run_cli: Cli
) -> None:
    from test_tokens import byte_tokenizer

    byte_tokenizer("").save_pretrained(tmp_path / "bare")
    path = sweep(tmp_path, "tiny", max_documents=5)
    bare = ("--set", "model.tokenizer=bare", "--set", "model.vocab_size=null")
    done = run_cli("prepare", path, *bare, cwd=tmp_path)
    assert done.code == 2
    assert "has no chat template" in done.stderr
    done = run_cli("prepare", path, *bare, "--set", "data.template=chatml", cwd=tmp_path)
    assert done.code == 2
    assert "<|im_start|>" in done.stderr


def test_case_15_a_line_over_the_limit_is_refused_without_reading_it(tmp_path: Path, run_cli: Cli) -> None:
    with (tmp_path / "x.jsonl").open("wb") as file:
        file.write(b'{"question": "')
        file.seek(200 << 20)  # a hole: no disk is used
        file.write(b'", "answer": "x"}\n')
    done = run_cli("prepare", sweep(tmp_path, "x.jsonl"), cwd=tmp_path)
    assert done.code == 3
    assert "x.jsonl:1" in done.stderr


def test_case_16_a_file_that_changes_while_it_is_read_leaves_nothing(tmp_path: Path) -> None:
    from packcli import stages, sweepfile
    from packcli.errors import IntegrityError
    from packcli.store import Store

    data = write_lines(tmp_path / "x.jsonl", chat_records(5))
    store = Store(tmp_path / "runs")
    plan = stages.make_plan(sweepfile.load(sweep(tmp_path, str(data))), store)
    write_lines(data, chat_records(6))
    [order] = plan.tokens.values()
    with pytest.raises(IntegrityError, match="changed while it was read"):
        stages.prepare_tokens(order, store)
    assert not list((tmp_path / "runs").glob("store/tokens/*/shard-*"))
    assert store.state("tokens", order.id) != "done"


@pytest.mark.slow
def test_case_16_a_file_that_grows_under_a_process_that_reads_it_leaves_nothing(
    tmp_path: Path, run_cli: Cli
) -> None:
    data = write_lines(tmp_path / "x.jsonl", chat_records(5))
    path, log = sweep(tmp_path, "x.jsonl"), tmp_path / "points"
    waits = {"PACKCLI_FAULT_LOG": str(log), "PACKCLI_FAULT": "pause:shard-00000.arrow:before:3"}
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run_cli, "prepare", path, cwd=tmp_path, env=waits)
        while not log.exists() or "shard-00000.arrow:before" not in log.read_text():
            assert not done.done(), done.result().stderr
            time.sleep(0.05)
        with data.open("a") as file:
            file.write("{}\n")
        assert done.result().code == 4
    assert "`x.jsonl` changed while it was read; nothing was kept" in done.result().stderr
    assert not list((tmp_path / "runs").glob("store/tokens/*/shard-*"))


@pytest.mark.slow
def test_case_17_another_configuration_never_mixes_with_what_is_there(tmp_path: Path, run_cli: Cli) -> None:
    write_lines(tmp_path / "x.jsonl", chat_records(5))
    path = sweep(tmp_path, "x.jsonl")
    before = run_cli("prepare", path, "--json", cwd=tmp_path).json()["cells"][0]
    kept = tree(tmp_path / "runs")
    after = run_cli("prepare", path, "--set", "data.train_on=all", "--json", cwd=tmp_path).json()["cells"][0]
    assert before["tokens_path"] != after["tokens_path"]
    assert kept.items() <= tree(tmp_path / "runs").items()
    manifest = (
        only(tmp_path / "runs", "tokens", "manifest.json") if False else Path(tmp_path, before["tokens_path"])
    )
    shutil.copy(Path(tmp_path, after["tokens_path"]) / "manifest.json", manifest / "manifest.json")
    done = run_cli("prepare", path, cwd=tmp_path)
    assert done.code == 4
    assert "belongs to tokens" in done.stderr


# Files that are damaged, disks that are full -----------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_case_03_a_damaged_shard_is_noticed_before_anything_is_packed(
    tmp_path: Path, run_cli: Cli, damage: str
) -> None:
    write_lines(tmp_path / "x.jsonl", chat_records(5))
    path = sweep(tmp_path, "x.jsonl")
    assert run_cli("prepare", path, cwd=tmp_path).code == 0
    shard = only(tmp_path / "runs", "tokens", "shard-00000.arrow")
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        content = content[:-100]
    else:
        content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = run_cli("prepare", path, "--set", "data.max_length=64", cwd=tmp_path)
    assert done.code == 4
    assert "shard-00000.arrow" in done.stderr
    done = run_cli("verify", "runs/store", cwd=tmp_path)
    assert done.code == 4
    assert "shard-00000.arrow" in done.stderr


def test_case_04_a_disk_that_is_too_small_is_noticed_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from packcli import stages, sweepfile
    from packcli.errors import MissingError
    from packcli.store import Store

    data = write_lines(tmp_path / "x.jsonl", chat_records(50))
    store = Store(tmp_path / "runs")
    plan = stages.make_plan(sweepfile.load(sweep(tmp_path, str(data))), store)
    monkeypatch.setattr(Store, "free_bytes", lambda self: data.stat().st_size // 2)
    with pytest.raises(MissingError, match="the token store needs about"):
        stages.prepare_tokens(next(iter(plan.tokens.values())), store)
    assert not list(store.root.glob("store/tokens/*/shard-*"))


def test_case_04_a_full_disk_keeps_what_is_finished_and_says_so(tmp_path: Path, run_cli: Cli) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this process may not mount a small file system")
    try:
        data = write_lines(tmp_path / "x.jsonl", chat_records(4000))
        path = sweep(tmp_path, str(data), max_documents=4000)  # so many, and their bytes are not known before
        done = run_cli("prepare", path, "--runs", small / "runs", cwd=tmp_path)
        assert done.code == 6, done.stderr
        assert "bytes free" in done.stderr
        assert "Traceback" not in done.stderr
        assert not [file for file in small.rglob("*") if ".tmp-" in file.name]
        assert not list(small.rglob("manifest.json"))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def _prepared(tmp_path: Path) -> tuple[Plan, Store]:
    data = write_lines(tmp_path / "x.jsonl", chat_records(20))
    write_lines(tmp_path / "y.jsonl", chat_records(20, first=20))
    path = sweep(tmp_path, [str(data), str(tmp_path / "y.jsonl")], ("padding",))
    store = Store(tmp_path / "runs")
    return stages.make_plan(sweepfile.load(path), store), store


def test_case_04_a_disk_that_fills_in_the_second_shard_keeps_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = _prepared(tmp_path)
    [order] = plan.tokens.values()
    order = order.model_copy(update={"processes": 1})
    with monkeypatch.context() as patch:
        patch.setenv("PACKCLI_FAULT_LOG", str(tmp_path / "log"))
        patch.setenv("PACKCLI_FAULT", "enospc:shard-00001.arrow:before")
        with pytest.raises(
            MissingError, match=r"shard-00001.arrow: the disk is full \([\d,]+ bytes free\)"
        ) as full:
            stages.prepare_tokens(order, store)
    assert full.value.exit_code == 6
    first = store.shard(order.id, 0)
    made = first.stat().st_mtime_ns
    assert not [path for path in store.root.rglob("*") if ".tmp-" in path.name]
    assert store.state("tokens", order.id) == "failed"
    assert stages.prepare_tokens(order, store).results["shards"] == 4
    assert first.stat().st_mtime_ns == made, "the first shard was made again"


def test_a_fault_that_is_asked_for_outside_of_a_test_run_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKCLI_FAULT", "enospc:x:before")
    write_json(tmp_path / "x", {})
    assert read_json(tmp_path / "x") == {}
    monkeypatch.setenv("PACKCLI_FAULT_LOG", str(tmp_path / "log"))
    with pytest.raises(MissingError, match="the disk is full"):
        write_json(tmp_path / "x", {})


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shard-00000.arrow", "cut"),
        *((name, "flipped") for name in ("shard-00000.arrow", "tokenizer.json", "rows.arrow")),
    ],
)
def test_case_02_a_file_damaged_after_packing_is_noticed_before_any_step(
    tmp_path: Path, name: str, damage: str
) -> None:
    """A shard cut short is named with both sizes."""
    plan, store = _prepared(tmp_path)
    for stage in plan.stages()[:2]:
        stages.run(stage[0], plan.order(*stage), store)  # type: ignore[arg-type]
    [file] = store.root.rglob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[:-100] if damage == "cut" else content)
    sizes = f"{len(content) - 100:,} bytes, not {len(content):,}"
    said = sizes if damage == "cut" else "its bytes changed"
    [order] = plan.trains.values()
    with pytest.raises(IntegrityError, match=re.escape(f"{name}: {said}")) as damaged:
        stages.train(order, store)
    assert damaged.value.exit_code == 4
    assert not store.metrics(order.id).exists()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """`tmp_path`/runs where nobody may write: for root, a file system mounted so."""
    runs = tmp_path / "runs"
    runs.mkdir(mode=0o500)
    if os.geteuid() != 0:
        yield runs
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(runs)], capture_output=True).returncode:
        pytest.skip("root may write everywhere, and may not mount a read-only file system here")
    yield runs
    subprocess.run(["umount", "-l", str(runs)], check=True)


def test_case_05_a_directory_that_cannot_be_written_is_a_usage_error_before_work(
    tmp_path: Path, run_cli: Cli, read_only: Path
) -> None:
    done = run_cli("prepare", sweep(tmp_path, "tiny", max_documents=5), cwd=tmp_path)
    assert done.code == 2, done.stderr
    assert "no permission to write in `runs`" in done.stderr
    assert not list(read_only.iterdir())


@pytest.mark.slow
def test_case_05_a_run_directory_that_cannot_be_written_is_still_read(
    tmp_path: Path, run_cli: Cli, read_only: Path
) -> None:
    path = sweep(tmp_path, "tiny", max_documents=5)
    for command in ("status", "report"):
        done = run_cli(command, path, cwd=tmp_path)
        assert (done.code, "Traceback" in done.stderr) == (0, False), done.stderr


# What it would do, without doing it --------------------------------------------------------------------


def test_a_plan_of_a_data_file_writes_nothing_and_tells_every_number(tmp_path: Path, run_cli: Cli) -> None:
    write_lines(tmp_path / "chats.jsonl", [*chat_records(60, turns=2), {"messages": []}])
    before = sorted(tmp_path.rglob("*"))
    done = run_cli("prepare", "chats.jsonl", "--plan", "--max-length", 256, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    document = done.json()
    from packcli.config import LENGTHS_ALONE

    assert {cell["arm"] for cell in document["cells"]} == set(LENGTHS_ALONE)
    assert {cell["max_length"] for cell in document["cells"]} == {128, 256, 512}
    made = [cell for cell in document["cells"] if cell["ledger"]]
    for cell in document["cells"]:
        assert (cell["ledger"] is None) == (cell["problem"] is not None)
    assert {cell["arm"] for cell in made} >= set(LENGTHS_ALONE) - {"random_released"}, (
        "60 documents in 60 windows: no row"
    )
    for cell in made:
        ledger = cell["ledger"]
        assert ledger["conversations_in"] == 61
        assert ledger["conversations_rejected"] == 1
        assert cell["steps_per_epoch"] >= 1
        assert cell["sum_squares"] > 0
    assert document["advice"]["arm"] in LENGTHS_ALONE
    assert "learned from this data" in document["tokenizer"]


def test_a_plan_of_a_papers_set_holds_its_step_counts_against_the_printed_ones() -> None:
    from packcli import papersteps, views
    from packcli.data.outlook import Outlook, Outlooks

    plan = views.data_plan("tulu", "some/tokenizer", "llama3", 4096)
    assert [order.sources[0].source for order in plan.tokens.values()] == ["tulu"]
    first, _ = papersteps.allowed_rows("tulu", "llama3_8b", "greedy_released") or (0, 0)
    rows = {"greedy_released": first, "random_released": 10}
    cells = [
        Outlook(
            labels={},
            arm=arm,
            max_length=4096,
            global_batch=128,
            batch_unit="rows",
            ledger={"rows": count, "documents_validation": 0},
        )
        for arm, count in rows.items()
    ]
    found = views._paper(plan, Outlooks(distributions={}, rejected={}, cells=cells))
    passed = {(item["arm"], item["model"]): item["passed"] for item in found or []}
    assert passed["greedy_released", "llama3_8b"]
    assert not passed["random_released", "llama3_8b"]


@pytest.mark.slow
def test_a_plan_is_what_prepare_then_makes(tmp_path: Path, run_cli: Cli) -> None:
    write_lines(tmp_path / "x.jsonl", chat_records(60, turns=2))
    path = sweep(tmp_path, "x.jsonl", ("padding", "sorted", "random", "best_fit", "greedy_released"))
    planned = run_cli("prepare", path, "--plan", "--json", cwd=tmp_path).json()
    assert not (tmp_path / "runs" / "store" / "tokens").exists()
    made = run_cli("prepare", path, "--json", cwd=tmp_path).json()
    assert [cell["ledger"] for cell in planned["cells"]] == [cell["ledger"] for cell in made["cells"]]


def test_the_plan_says_in_words_and_a_picture_what_the_numbers_say(tmp_path: Path, run_cli: Cli) -> None:
    write_lines(tmp_path / "chats.jsonl", chat_records(60, turns=2))
    done = run_cli(
        "prepare", "chats.jsonl", "--plan", "--max-length", 256, "--show", 2, "--draw", "rows.svg", cwd=tmp_path
    )
    assert done.code == 0, done.stderr
    for words in ("We would take", "rows of 256 tokens", "padding_free", "░", "⟦", "conversations"):
        assert words in done.stdout, words
    assert (tmp_path / "rows.svg").read_text().startswith("<svg")


def test_a_data_file_without_plan_says_what_to_type(tmp_path: Path, run_cli: Cli) -> None:
    write_lines(tmp_path / "chats.jsonl", chat_records(3))
    done = run_cli("prepare", "chats.jsonl", cwd=tmp_path)
    assert done.code == 2
    assert "`packcli prepare chats.jsonl --plan`" in done.stderr


# Mixtures ----------------------------------------------------------------------------------------------


def test_weights_draw_and_repeat_conversations_and_the_ledger_says_so(tmp_path: Path, run_cli: Cli) -> None:
    write_lines(tmp_path / "a.jsonl", chat_records(400))
    write_lines(tmp_path / "b.jsonl", [{"question": f"{n}?", "answer": f"{n}!"} for n in range(50)])
    source = [{"source": "a.jsonl", "weight": 0.25}, {"source": "b.jsonl", "weight": 2}]
    done = run_cli("prepare", sweep(tmp_path, source, validation=0), "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    cell = done.json()["cells"][0]
    drawn = cell["ledger"]["documents"] - 100
    assert 60 < drawn < 140
    assert cell["conversations_not_drawn"] == 400 - drawn
    assert cell["conversations_repeated"] == 50


@pytest.mark.slow
def test_conversations_left_out_by_their_number_of_answers_are_counted_and_named(
    tmp_path: Path, run_cli: Cli
) -> None:
    write_lines(tmp_path / "a.jsonl", [*chat_records(20), *chat_records(7, turns=3)])
    counts = {}
    for turns in ("any", "single", "multi"):
        source = [{"source": "a.jsonl", "turns": turns}]
        done = run_cli("prepare", sweep(tmp_path, source, validation=0), "--json", cwd=tmp_path)
        assert done.code == 0, done.stderr
        [cell, *_] = done.json()["cells"]
        counts[turns] = cell["ledger"]["documents"], cell["ledger"]["conversations_rejected"]
        if turns == "single":
            reasons = {item["reason"] for item in read_jsonl(tmp_path / cell["rejected_path"])}
            assert reasons == {"3 answers, and its source has `turns: single`"}
    assert counts == {"any": (27, 0), "single": (20, 7), "multi": (7, 20)}


def test_single_turn_data_do_not_share_the_store_of_all_and_all_keep_the_id_they_had(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", chat_records(3))
    source = {"source": str(tmp_path / "a.jsonl")}
    ids = {}
    for turns in (None, "any", "single"):
        block = source if turns is None else source | {"turns": turns}
        plan = stages.make_plan(sweepfile.load(sweep(tmp_path, [block])), Store(tmp_path / "runs"))
        ids[turns] = plan.cells[0].tokens
    assert ids[None] == ids["any"] != ids["single"]


@pytest.mark.slow
def test_an_export_opens_and_holds_the_rows(tmp_path: Path, run_cli: Cli) -> None:
    import datasets

    write_lines(tmp_path / "x.jsonl", chat_records(30))
    path = sweep(tmp_path, "x.jsonl")
    done = run_cli("prepare", path, "--only", "arm=best_fit", "--export", "out", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    opened = datasets.load_from_disk(str(tmp_path / "out"))
    ledger = done.json()["cells"][0]["ledger"]
    assert opened["train"].num_rows == ledger["rows"]
    assert sum(map(len, opened["train"]["input_ids"])) == ledger["tokens_kept"]
    again = run_cli("prepare", path, "--export", "both", cwd=tmp_path)
    assert again.code == 0, again.stderr
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["best_fit", "padding"]


def test_a_plan_of_data_takes_the_keys_that_its_hints_name(tmp_path: Path, run_cli: Cli) -> None:
    (tmp_path / "x.jsonl").write_text('{"q": "hi", "a": "there"}\n{bad\n')
    keys = ("--set", "data.mapping={question: q, answer: a}", "--set", "data.on_error=skip")
    done = run_cli("prepare", "*.jsonl", "--plan", "--json", *keys, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert (done.json()["documents"][0]["documents"], done.json()["rejected"]) == (1, 1)
    done = run_cli("prepare", "x.jsonl", "--plan", "--set", "data.mappin=3", cwd=tmp_path)
    assert (done.code, "data.mappin" in done.stderr) == (2, True)
    plan = views.data_plan(
        "tiny", "some/tokenizer", "llama3", 64, ["data.max_documents=3", "data.max_documents=5"]
    )
    assert {order.max_documents for order in plan.tokens.values()} == {5}, "the last one, as of a sweep"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("data.max_documents", "is not key=value"),
        ("data.on_error=skip\nmore: 3", "more than one value"),
        ("data.source=tiny_base", "only other keys of `data`"),
        ("train.lr=1", "only other keys of `data`"),
    ],
)
def test_a_set_of_a_data_file_is_read_as_that_of_a_sweep(item: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        views.data_plan("tiny", "some/tokenizer", "llama3", 64, [item])
    assert message in caught.value.cause


# What would fail after the work, or be left out without a word -----------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--draw", "pictures"), "`pictures` is a directory"),
        (("--draw", "."), "`.` is a directory"),
        (("--draw", "file/x.svg"), "the picture cannot be written to `file`: it is a file"),
        (("--export", "file"), "the export cannot be written to `file`: it is a file"),
        (("--export", "file/rows"), "the export cannot be written to `file"),
    ],
)
def test_a_picture_or_export_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, run_cli: Cli, options: tuple[str, ...], said: str
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "file").touch()
    path = sweep(tmp_path, "tiny", max_documents=5)
    for more in ((), ("--plan",)) if "--draw" in options else ((),):
        done = run_cli("prepare", path, *options, *more, cwd=tmp_path)
        assert (done.code, said in done.stderr, done.stdout) == (2, True, ""), done.stderr
    assert not (tmp_path / "runs" / "store" / "tokens").exists()


def test_a_picture_where_nobody_may_write_says_nothing_of_the_run_directory(
    tmp_path: Path, run_cli: Cli, read_only: Path
) -> None:
    path = sweep(tmp_path, "tiny", max_documents=5)
    for option in (("--draw", read_only / "x.svg"), ("--export", read_only / "rows")):
        done = run_cli("prepare", path, "--runs", "other", *option, cwd=tmp_path)
        assert (done.code, "cannot be written to" in done.stderr, "--runs" in done.stderr) == (2, True, False), (
            done.stderr
        )


@pytest.mark.parametrize(
    "options",
    [
        ("--plan", "--export", "out"),
        ("--plan", "--part", "1/4"),
        ("--part", "1/4", "--show", 3),
        ("--part", "1/4", "--draw", "x.svg"),
        ("--part", "1/4", "--export", "out"),
        ("--part", ""),
    ],
)
def test_an_option_that_would_do_nothing_beside_another_is_refused(
    tmp_path: Path, run_cli: Cli, options: tuple[object, ...]
) -> None:
    path = sweep(tmp_path, "tiny", max_documents=5)
    done = run_cli("prepare", path, *options, cwd=tmp_path)
    assert (done.code, "--part" in done.stderr or "--export" in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_path_that_the_system_will_not_look_at_is_a_usage_error(tmp_path: Path, run_cli: Cli) -> None:
    """As of another user's file; a name that is too long is refused by the same call, even to root."""
    name = "a" * 300
    done = run_cli("prepare", f"{name}.jsonl", "--plan", cwd=tmp_path)
    assert (done.code, "File name too long" in done.stderr, "Traceback" in done.stderr) == (2, True, False)
    path = sweep(tmp_path, "tiny", max_documents=5)
    done = run_cli("prepare", path, "--set", f"model.tokenizer=./{name}", cwd=tmp_path)
    assert (done.code, "no checkpoint directory" in done.stderr) == (2, True), done.stderr


def test_rows_are_shown_of_no_more_conversations_than_the_sweep_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "prepare_tokens", lambda *_: None)
    monkeypatch.setattr(stages, "prepare_index", lambda *_: None)
    for own, shown in ((10, 10), (5000, 1000), (None, 1000)):
        path = sweep(tmp_path, "tiny", max_documents=own)
        plan = stages.make_plan(sweepfile.load(path), Store(tmp_path / "runs"))
        small, _ = views.sampled(plan, 1000, tmp_path / "scratch")
        assert {order.max_documents for order in small.tokens.values()} == {shown}


def test_an_arm_that_shares_its_rows_with_another_is_exported_too(tmp_path: Path) -> None:
    own = {
        "crossing": {"extends": "best_fit", "attention": "causal", "positions": "continue"},
        "by document": {"extends": "best_fit", "loss": "document"},
        "by_document": {"extends": "crossing", "loss": "document"},
        "same": {"extends": "best_fit"},
    }
    path = sweep(tmp_path, "tiny", ("best_fit", *own))
    path.write_text(path.read_text() + yaml.safe_dump({"arms": own}, sort_keys=False))
    plan = stages.make_plan(sweepfile.load(path), Store(tmp_path / "runs"))
    assert len(plan.indexes) == 1
    found = views._exports(plan, tmp_path / "out")
    assert [cell.labels["arm"] for cell in found.values()] == [
        "best_fit",
        "crossing",
        "by document",
        "by_document",
    ]
    assert [target.name.partition("-")[0] for target in found] == ["best_fit", "crossing", *["by_document"] * 2]
