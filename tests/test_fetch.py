"""`packcli fetch`: nodes without internet that miss a file, find another revision, or wait for what never comes.

The real clients talk to a Hub on this machine (`hubserver.py`); what is left out is huggingface.co itself.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MODEL, Done, chat_records
from hubserver import HubServer, Repository

from packcli import download, fetch, stages, sweepfile
from packcli.config import SweepSpec
from packcli.data import hub
from packcli.errors import ConfigError, MissingError, PackcliError
from packcli.eval import protocol, scorers
from packcli.store import Store

FIRST, SECOND = "0123456789abcdef0123456789abcdef01234567", "fedcba98" * 5
CARD = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/train-*}\n---\n"
SWEEP = """
name: fetched
model: {name: o/m}
data: {source: [o/n, tiny], template: chatml, max_length: 64, max_documents: 40}
train: {steps: 1, lr: 0.001, global_batch: 2, threads: 1}
matrix: {arm: [padding], seed: [0]}
"""


def parquet(count: int, first: int = 0) -> bytes:
    output = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(chat_records(count, first=first)), output)
    return output.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small model's repository, with copies of its weights that nothing here loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("checkpoint")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["a question, an answer"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>").save_pretrained(directory)
    config = {key: value for key, value in MODEL["config"].items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**config, vocab_size=300)).save_pretrained(directory)
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    copies = ("pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth", "fp32/model.safetensors")
    return {**files, **dict.fromkeys(copies, b"weights"), "original/params.json": b"{}", "README.md": b"#"}


@pytest.fixture
def server(checkpoint: dict[str, bytes]) -> Iterator[HubServer]:
    data = {"README.md": CARD, "data/train-0.parquet": parquet(30), "other/x.parquet": parquet(3)}
    branches = {"main": FIRST, "v1": FIRST, "later": SECOND}
    models = {"o/m": Repository(dict(checkpoint), dict(branches))}
    with HubServer(models, {"o/n": Repository(data, dict(branches))}).running() as hub:
        yield hub


@pytest.fixture
def run(tmp_path: Path, run_cli: Callable[..., Done], server: HubServer) -> Callable[..., Done]:
    """`run("fetch", "--json")` on the login node; with `offline=True` on a node without internet."""
    (tmp_path / "sweep.yaml").write_text(SWEEP)

    def command(name: str, *options: object, offline: bool = False, **environment: str) -> Done:
        env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": str(int(offline))}
        env["HF_ENDPOINT"] = "http://127.0.0.1:9" if offline else server.endpoint
        return run_cli(name, "sweep.yaml", *options, cwd=tmp_path, env=env | environment)

    return command


def states(done: Done) -> dict[str, str]:
    return {item["name"]: item["state"] for item in done.json()["items"]}


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_node_without_internet_runs_what_was_fetched_at_the_revision_fetched(
    run: Callable[..., Done], server: HubServer, tmp_path: Path, streaming: str
) -> None:
    sets = ("--set", "model.revision=v1", "--set")
    sets += (f"data.source=[{{source: o/n, revision: v1, streaming: {streaming}}}, tiny]",)
    planned = run("status", *sets, "--json").json()
    before = run("prepare", *sets, "--runs", "nothing", offline=True)
    assert before.code != 0, "nothing is in the cache before it is fetched"
    fetched = run("fetch", *sets, "--json")
    assert fetched.code == 0, fetched.stderr
    assert states(fetched) == {"chatml": "local", "tiny": "local", "o/m": "fetched", "o/n[train]": "fetched"}
    for item in fetched.json()["items"][2:]:
        assert (item["revision"], item["commit"]) == ("v1", FIRST)
        assert Path(item["where"]).is_dir()
        assert item["where"].endswith(FIRST)
    assert run("status", *sets, "--json", offline=True).json() == planned
    for command in ("prepare", "train") if streaming == "false" else ("prepare",):
        done = run(command, *sets, "--json", offline=True)
        assert done.code == 0, done.stderr
    [manifest] = (tmp_path / "runs" / "store" / "tokens").glob("*/manifest.json")
    assert json.loads(manifest.read_bytes())["results"]["conversations"] == 40


@pytest.mark.slow
def test_only_the_files_that_loading_takes_are_downloaded_and_only_once(
    run: Callable[..., Done], server: HubServer, checkpoint: dict[str, bytes]
) -> None:
    first = run("fetch", "--json")
    assert first.code == 0, first.stderr
    loaded = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert server.downloads() == ["README.md", *loaded[:1], "data/train-0.parquet", *loaded[1:]]
    model = next(item for item in first.json()["items"] if item["what"] == "model")
    assert model["bytes"] == sum(len(checkpoint[file]) for file in loaded)
    server.requests.clear()
    second = run("fetch", "--json")
    assert (second.code, server.downloads()) == (0, [])
    assert states(second) == {"chatml": "local", "tiny": "local", "o/m": "was there", "o/n[train]": "was there"}
    assert second.json()["bytes"] == first.json()["bytes"] == run("fetch", "--json", offline=True).json()["bytes"]


@pytest.mark.slow
def test_of_sharded_weights_the_shards_of_the_index_are_downloaded(
    run: Callable[..., Done], server: HubServer
) -> None:
    files = server.models["o/m"].files
    del files["model.safetensors"]
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    files |= {name: name.encode() for name in (*shards.values(), "model-00001-of-00009.safetensors")}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": shards}).encode()
    assert run("fetch").code == 0
    asked = [file for file in server.downloads() if file.endswith(".safetensors")]
    assert asked == list(shards.values())
    del files[shards["b"]]
    server.models["o/m"].branches["main"] = SECOND
    done = run("fetch")
    assert (done.code, f"lacks `{shards['b']}`" in done.stderr) == (2, True)
    del files["model.safetensors.index.json"]
    server.models["o/m"].branches = {"main": "0" * 40}
    done = run("fetch")
    assert (done.code, "no weights in safetensors" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_download_that_was_cut_goes_on_with_the_files_that_are_missing(
    run: Callable[..., Done], server: HubServer, tmp_path: Path
) -> None:
    repository = server.models["o/m"]
    content = os.urandom(24 << 20)
    repository.files["model.safetensors"] = content
    repository.stalls["model.safetensors"] = 21 << 20
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.endpoint}
    command = [sys.executable, "-m", "packcli", "fetch", "sweep.yaml"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        small = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
        while not (
            any(file.stat().st_size > 1 << 20 for file in tmp_path.rglob("*.incomplete"))
            and all(any(tmp_path.rglob(name)) for name in small)
        ):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    half = run("fetch", "--json", offline=True)
    assert (half.code, states(half)["o/m"]) == (6, "failed"), "half a model is none"
    repository.stalls.clear()
    server.requests.clear()
    done = run("fetch", "--json")
    assert (done.code, states(done)["o/m"]) == (0, "fetched"), done.stderr
    assert server.downloads() == ["data/train-0.parquet", "model.safetensors"]
    assert (Path(done.json()["items"][2]["where"]) / "model.safetensors").read_bytes() == content


def test_one_failure_leaves_the_others_alone_and_each_says_its_fix(
    run: Callable[..., Done], server: HubServer
) -> None:
    server.models["o/m"].status = 403
    server.datasets["o/private"] = Repository({}, {"main": FIRST}, status=401, metadata_too=True)
    server.datasets["o/busy"] = Repository({}, {"main": FIRST}, status=503, metadata_too=True)
    others = "{source: o/n, revision: v9}, {source: o/n, split: dev}, {source: o/n, subset: big}"
    sources = f"[o/n, o/absent, o/private, o/busy, {others}]"
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    done = run("fetch", "--set", f"data.source={sources}", "--json", HF_TOKEN=secret)
    assert done.code == 2, "6 only where nothing else failed"
    assert [item["state"] for item in done.json()["items"]] == ["local", "failed", "fetched", *["failed"] * 6]
    causes = {item["cause"]: item["fix"] for item in done.json()["items"] if item["cause"]}
    for cause, fix in (
        (
            "`o/m` on Hugging Face is gated",
            "accept its terms at https://huggingface.co/o/m, then run `hf auth login`",
        ),
        ("`o/absent` is no path here and no dataset on Hugging Face", "check the name"),
        ("`o/private` is no path here and no dataset on Hugging Face, or a private one", "hf auth login"),
        ("Hugging Face answered 503 when asked for `o/busy`", "try again later"),
        ("`o/n` on Hugging Face has no revision `v9`", "check `revision`"),
        ("`o/n` has no split `dev`; it has: train", "set `split`"),
        ("`o/n` has no subset `big`", "set `subset`"),
    ):
        [found] = [said for said in causes if said.startswith(cause)]
        assert fix in causes[found]
        assert f"error: {found}\n\nhint: {causes[found]}\n" in done.stderr
    assert secret not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_is_too_small_is_found_before_anything_large_is_downloaded(
    run: Callable[..., Done], server: HubServer
) -> None:
    server.models["o/m"].promised["model.safetensors"] = 10**18
    done = run("fetch")
    assert done.code == 6
    assert done.stderr.startswith("error: fetching takes 1,000,000,0")
    assert "set HF_HOME to a directory on a larger disk" in done.stderr
    assert server.downloads() == ["README.md", "config.json"]


@pytest.mark.slow
def test_a_machine_without_internet_says_in_seconds_what_it_lacks(run: Callable[..., Done]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        port = silent.getsockname()[1]
        for endpoint in ("http://127.0.0.1:9", f"http://127.0.0.1:{port}"):
            start = time.monotonic()
            done = run("fetch", "--json", HF_ENDPOINT=endpoint)
            assert time.monotonic() - start < 60, "a retry or two would take longer; alone it takes 2 to 10 s"
            assert done.code == 6
            assert states(done) == {"chatml": "local", "tiny": "local", "o/m": "failed", "o/n[train]": "failed"}
            assert "no connection to Hugging Face, and not all of model `o/m`" in done.stderr
            assert "no copy of `o/n@main[train]`" in done.stderr


@pytest.mark.slow
def test_a_branch_that_moves_takes_the_offline_nodes_along_there_and_back(
    run: Callable[..., Done], server: HubServer
) -> None:
    sets = ("--set", "data.source=[{source: o/n, revision: v1}]", "--set", "model.revision=v1")
    for commit, state in ((FIRST, "fetched"), (SECOND, "fetched"), (FIRST, "was there")):
        for repository in (server.models["o/m"], server.datasets["o/n"]):
            repository.branches["v1"] = commit
        for offline in (False, True) if commit == FIRST else (False,):
            done = run("fetch", *sets, "--json", offline=offline)
            assert done.code == 0, done.stderr
            items = done.json()["items"][1:]
            assert [(item["commit"], item["where"].rpartition("/")[2]) for item in items] == [(commit, commit)] * 2
            assert {item["state"] for item in items} == {"was there" if offline else state}


@pytest.mark.slow
def test_benchmarks_and_a_tokenizer_named_apart_are_fetched_too(
    run: Callable[..., Done], server: HubServer, tmp_path: Path
) -> None:
    config = protocol.load("gsm8k").config
    commit = config["dataset_kwargs"]["revision"]
    card = b"---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train-*}\n"
    card += b"  - {split: test, path: main/test-*}\n---\n"
    files = {"README.md": card, "main/train-0.parquet": parquet(9), "main/test-0.parquet": parquet(4, 9)}
    server.datasets[config["dataset_path"]] = Repository(files, {"main": commit})
    server.models["o/t"] = server.models["o/m"]
    text = SWEEP.replace("{name: o/m}", json.dumps({"config": MODEL["config"], "tokenizer": "o/t"}))
    (tmp_path / "sweep.yaml").write_text(text + "eval: {tasks: [gsm8k, tiny]}\n")
    done = run("fetch", "--json")
    assert done.code == 0, done.stderr
    found = {(item["what"], item["state"], item["name"]) for item in done.json()["items"]}
    assert ("tokenizer", "fetched", "o/t") in found
    assert ("benchmark", "fetched", "openai/gsm8k[main:train]") in found
    assert ("benchmark", "local", "tiny_copy") in found
    assert "model.safetensors" not in server.downloads()
    code = (
        "import sys, datasets\n"
        "rows = datasets.load_dataset(sys.argv[1], 'main', revision=sys.argv[2])\n"
        "print(len(rows['train']), len(rows['test']))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, config["dataset_path"], commit]
    read = subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert read.stdout.split() == ["9", "4"]


def test_what_is_local_is_listed_and_its_benchmark_files_are_checked(
    load_text: Callable[..., SweepSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(b"{ }")
    (tmp_path / "chats.jsonl").write_bytes(b"{}\n{}\n")
    text = SWEEP.replace("o/m", "./model").replace("o/n", "chats.jsonl")
    plan = stages.make_plan(load_text(text + "eval: {tasks: [gsm8k], bench_data: ./bench}\n"), Store(tmp_path))
    items = {item.name: item for item in fetch.fetch(plan)}
    assert {name: (item.what, item.state, item.bytes) for name, item in items.items()} == {
        "./model": ("model", "local", 3),
        "chatml": ("template", "local", None),
        "chats.jsonl": ("data", "local", 6),
        "tiny": ("data", "local", None),
        "gsm8k": ("benchmark", "failed", None),
    }
    error = items["gsm8k"].error
    assert isinstance(error, MissingError)
    assert "bench/gsm8k/train.jsonl`, which is not there" in error.cause


def test_each_thing_is_fetched_once_however_many_cells_share_it(load_text: Callable[..., SweepSpec]) -> None:
    text = SWEEP.replace("seed: [0]", "seed: [0, 1], data.max_length: [32, 64]").replace(
        "[o/n, tiny]", "[{source: tulu, weight: 0.5}, {source: tulu, streaming: true}]"
    )
    spec = load_text(text)
    plan = stages.make_plan(spec, Store(Path("runs")))
    assert [(need.what, need.name) for need in fetch.remote(plan)] == [
        ("model", "o/m"),
        ("data", "Super-shuhe/packing-tulu"),
    ]


def test_the_shipped_sweeps_say_what_they_take(tmp_path: Path) -> None:
    sweep = Path(__file__).resolve().parents[1] / "sweeps" / "llama3_8b.yaml"
    plan = stages.make_plan(sweepfile.load(sweep, (), ()), Store(tmp_path))
    needs = [(need.what, need.name) for need in fetch.remote(plan)]
    assert needs[0] == ("model", "meta-llama/Meta-Llama-3-8B")
    benchmarks = {name for what, name in needs if what == "benchmark"}
    assert [what for what, _ in needs[1:5]] == ["data"] * 4
    assert {"openai/gsm8k", "cais/mmlu"} <= benchmarks
    assert not any("WildBench" in name for name in benchmarks)  # there is no judge to score it


def test_what_a_judge_is_shown_is_fetched_where_there_is_a_judge(tmp_path: Path) -> None:
    sweep = Path(__file__).resolve().parents[1] / "sweeps" / "llama3_8b.yaml"
    plan = stages.make_plan(sweepfile.load(sweep, ("eval.judge={model: m}",), ()), Store(tmp_path))
    assert "allenai/WildBench" in {need.name for need in fetch.remote(plan)}
    template, missing = fetch.local(plan)
    assert (template.what, missing.what, missing.name) == ("template", "benchmark", "wildbench")
    assert missing.error is not None
    assert "eval_template.score.v2.md" in missing.error.fix


def test_case_45_no_token_or_password_is_ever_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-shape")
    texts = ("hf_abcdefghijklmnop", "a-token-of-another-shape", "https://user:pass@proxy.example/x")
    for text in texts:
        shown = download.safe(MissingError(f"no answer: {text}", text))
        assert type(shown) is MissingError
        assert "***" in shown.cause
        for secret in ("hf_abc", "another-shape", "pass"):
            assert secret not in shown.cause + shown.fix


@pytest.mark.parametrize(
    ("error", "code", "cause"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 6, "the disk was full before all of `o/m` was here"),
        (PermissionError(errno.EACCES, "Permission denied"), 6, "`o/m` could not be fetched: "),
        (ConnectionError("reset"), 6, "no connection to Hugging Face, and not all of model `o/m`"),
        (json.JSONDecodeError("bad\nline", "{", 0), 2, "`o/m` on Hugging Face has a config or an index"),
    ],
)
def test_what_goes_wrong_in_a_download_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, code: int, cause: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    found = download.Found(FIRST, ("model.safetensors",), tmp_path, 1, 1, there=False)
    with pytest.raises(PackcliError) as caught:
        download.download(download.Need("model", "o/m", None), found, lambda _: None)
    assert caught.value.exit_code == code
    assert caught.value.cause.startswith(cause)
    assert caught.value.fix
    assert "\n" not in caught.value.cause + caught.value.fix


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "{"),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", "{}"),
        ("model.safetensors.index.json", '{"weight_map": []}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}'),
    ],
)
def test_a_model_whose_files_have_another_shape_is_one_failure_and_no_bug(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    need = download.Need("model", "o/m", None)
    snapshot = download._snapshot(need, FIRST)
    snapshot.mkdir(parents=True)
    (snapshot / "a.safetensors").touch()
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    hub.remember("model", "o/m", None, FIRST)
    files = download.cached(need).files
    assert files == ("a.safetensors", "config.json", "model.safetensors.index.json")
    (snapshot / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"`{name}` of `o/m` on Hugging Face"):
        download._wanted(need, FIRST, files)
    with pytest.raises(MissingError, match="not all of model `o/m`"):
        download.cached(need)


def test_weights_that_did_not_all_arrive_are_not_called_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The client hands out a directory with what there is when it loses the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    found = download.Found(FIRST, ("model.safetensors",), tmp_path, 1, 1, there=False)
    with pytest.raises(MissingError, match="no connection"):
        download.download(download.Need("model", "o/m", None), found, lambda _: None)
    assert not any(tmp_path.rglob("refs/*")), "the branch must not name what is not there"


def answered(**items: Any) -> dict[str, Any]:
    blank = dict.fromkeys(("revision", "commit", "bytes", "where", "cause", "fix"))
    return {"sweep": "s", "items": [{**blank, "what": "model", "name": "o/m", **items}], "bytes": 0}


def test_the_table_shows_the_commit_behind_a_branch_and_no_cause_that_is_said_again_below() -> None:
    from rich.console import Console

    def shown(document: dict[str, Any]) -> str:
        console = Console(width=160, file=io.StringIO(), color_system=None)
        with console.capture() as captured:
            console.print(fetch.table(document))
        return captured.get()

    branch = shown(answered(revision="main", commit=FIRST, bytes=1234567, state="fetched", where="/cache/[x]"))
    assert "main = 0123456789ab " in branch
    assert "1,234,567" in branch
    assert "/cache/[x]" in branch
    pinned = shown(answered(revision=FIRST, commit=FIRST, state="was there", where="/cache"))
    assert " 0123456789ab " in pinned
    assert "=" not in pinned
    failed = shown(answered(revision="main", state="failed", cause="it is gated"))
    assert "failed" in failed
    assert "gated" not in failed, "the command ends with it"


# What scoring takes beside data ---------------------------------------------------------------------------

EVALS = ("--set", "eval.tasks=[ifeval, humaneval]")


@pytest.mark.slow
def test_what_a_machine_without_internet_lacks_is_said_twice(
    run: Callable[..., Done], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bare = {"PATH": str(tmp_path), "HOME": str(tmp_path_factory.mktemp("home")), "NLTK_DATA": ""}
    done = run("fetch", *EVALS, offline=True, **bare)
    assert done.code == 6
    for cause in (
        "no connection to Hugging Face, and not all of model `o/m`",
        "no copy of `o/n@main[train]`",
        "no copy of `google/IFEval",
        "no copy of `openai/openai_humaneval",
        "checks some answers with NLTK's `punkt_tab`, which is not there (no internet)",
        "bubblewrap (`bwrap`) is not installed",
    ):
        assert (done.stdout + done.stderr).count(cause) == 1, done.stdout + done.stderr
        assert cause in done.stderr
    assert "python -m nltk.downloader -d" in done.stderr
    assert "apt install bubblewrap" in done.stderr
    assert "Traceback" not in done.stderr
    failed = [line for line in done.stdout.splitlines() if line.rstrip().endswith("failed")]
    assert len(failed) == 6
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 6


def test_no_task_needs_them_and_they_fail_the_command(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("fetch", "--json", "--set", "eval.tasks=[tiny_copy]", PATH=str(tmp_path), HOME=str(tmp_path))
    assert done.code == 0, done.stderr
    assert not {"punkt_tab", "sandbox"} & {item["what"] for item in done.json()["items"]}


def punkt_zip() -> bytes:
    """Sentence data in NLTK's form, made up: a splitter that has learned nothing."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
            file.writestr(f"punkt_tab/english/{name}", "")
    return archive.getvalue()


@pytest.fixture
def without_punkt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import nltk

    scorers._ifeval()  # else importing the next one downloads
    from lm_eval.tasks.ifeval import instructions_util

    monkeypatch.setattr(nltk.data, "path", [])
    instructions_util._get_sentence_tokenizer.cache_clear()
    yield
    instructions_util._get_sentence_tokenizer.cache_clear()


@pytest.mark.usefixtures("without_punkt")
@pytest.mark.parametrize("damage", [None, "checksum", "no answer"])
def test_sentence_data_is_fetched_to_where_its_task_does_not_look(
    damage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """NLTK's own downloader, whose connection is replaced: it refuses servers of this machine."""
    content = punkt_zip()
    md5, sha256 = hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest()
    sha256 = "0" * 64 if damage == "checksum" else sha256
    index = (
        '<nltk_data><packages><package id="punkt_tab" name="made up" subdir="tokenizers" unzip="1" '
        f'size="{len(content)}" unzipped_size="0" checksum="{md5}" sha256_checksum="{sha256}" url="https://x.example/punkt_tab.zip"/>'
        "</packages><collections/></nltk_data>"
    ).encode()

    def answer(url: str, timeout: float) -> io.BytesIO:
        if damage == "no answer":
            raise OSError("network is unreachable")
        return io.BytesIO(content if url.endswith(".zip") else index)

    monkeypatch.setattr("nltk.downloader.urlopen", answer)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    task = protocol.load("ifeval")
    item = fetch._punkt(task, tmp_path, online=True)
    if damage is None:
        assert (item.state, item.error) == ("fetched", None)
        assert Path(item.where) == tmp_path / "nltk_data" / "tokenizers" / "punkt_tab"
        assert fetch._punkt(task, tmp_path, online=False).state == "was there"
    else:
        assert (item.state, isinstance(item.error, MissingError)) == ("failed", True)
        assert "\n" not in item.error.cause  # type: ignore[union-attr]
        assert f"-d {tmp_path}/nltk_data punkt_tab" in item.error.fix  # type: ignore[union-attr]
    assert capfd.readouterr() == ("", "")


@pytest.mark.sandbox
def test_a_sandbox_that_works_is_not_told_from_one_that_does_not() -> None:
    item = fetch._sandbox()
    assert (item.state, item.name[:6], item.error) == ("works", "bwrap ", None)
