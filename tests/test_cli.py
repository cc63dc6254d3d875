"""The command line as its users meet it: real processes, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ARMS, REPO, Done, chat_records, listen_to_ctrl_c, write_lines
from typer.main import get_command

from packcli import cli
from packcli.data.index import LEDGER_IDENTITIES

Run = Callable[..., Done]
Sweep = Callable[..., Path]

SELECTING = {"--only", "--set", "--max-cells", "--runs", "--json", "--help"}
OPTIONS = {
    "prepare": SELECTING
    | {"--plan", "--tokenizer", "--template", "--max-length", "--show", "--draw", "--export", "--part"},
    "train": SELECTING
    | {"--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-endpoint", "--grace", "--allow-fallback"},
    "eval": {"--ckpt", "--tasks", "--limit", "--bench-data", "--fewshot", "--engine", "--base-url", "--batch-size"}
    | {"--processes", "--unsafe-no-sandbox", "--runs", "--json", "--help", "--chat-template"}
    | {"--judge", "--judge-url", "--against", "--prices", "--max-cost-usd"}
    | {"--probe-data", "--before", "--figures"},
    "sweep": SELECTING
    | {"--on", "--dry-run", "--wait", "--retry", "--nproc-per-node", "--grace", "--allow-fallback"}
    | {"--unsafe-no-sandbox", "--max-gpu-hours"},
    "cancel": SELECTING,
    "fetch": SELECTING,
    "status": SELECTING,
    "report": SELECTING | {"--format", "--figures", "--against", "--all", "--strict"},
    "verify": {"--help"},
    "doctor": SELECTING | {"--on"},
    "audit": {
        "--trl",
        "--llamafactory",
        "--axolotl",
        "--trainer",
        "--envs",
        "--python",
        "--install",
        "--out",
        "--format",
    }
    | {"--strict", "--json", "--help"},
    "import-config": {"--from", "--out", "--processes", "--try", "--json", "--help"},
}


def commands() -> dict[str, Any]:
    found: dict[str, Any] = get_command(cli.app).commands  # type: ignore[attr-defined]
    return found


def test_a_new_command_or_flag_is_a_decision() -> None:
    """The contract's flags. A new one is added here and in docs; a removed one breaks scripts."""
    found = {}
    for name, command in commands().items():
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
        found[name] = options | {"--help"}
    assert found == OPTIONS


def test_help_of_every_command_is_quick_and_says_what_it_does(run_cli: Run, tmp_path: Path) -> None:
    overview = run_cli("--help", cwd=tmp_path)
    assert overview.code == 0
    assert "pack or pad" in overview.stdout
    for name, command in commands().items():
        done = run_cli(name, "--help", cwd=tmp_path)
        assert (done.code, done.stderr) == (0, ""), name
        assert command.help.split(".")[0].split(":")[0].split(",")[0] in " ".join(done.stdout.split())
        assert name in overview.stdout
    assert list(tmp_path.iterdir()) == []


# One clear error ---------------------------------------------------------------------------------------


def assert_refused(done: Done, code: int, *said: str) -> None:
    """`error: <cause>`, a blank line, `hint: <fix>`, the documented exit code, nothing on stdout."""
    assert "Traceback" not in done.stderr
    assert done.code == code, done.stderr
    assert done.stdout == ""
    # Progress may come before the error; the error is the end.
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.count("error: ") == 1
    cause, _, hint = error.rstrip("\n").rpartition("\n\nhint: ")
    assert cause.removeprefix("error: ")
    assert hint
    assert "\n" not in hint
    for text in said:
        assert text in error


def break_key(sweep: Path) -> None:
    sweep.write_text(sweep.read_text().replace("max_length", "max_lenght"))


def break_task(sweep: Path) -> None:
    document = yaml.safe_load(sweep.read_text())
    sweep.write_text(yaml.safe_dump({**document, "eval": {"tasks": ["tiny_coppy"]}}))


def break_arm(sweep: Path) -> None:
    sweep.write_text(sweep.read_text().replace("- padding", "- paddding"))


def taken_name(name: str) -> Callable[[Path], Any]:
    """A sweep of this name would write among the stages, or among what was submitted."""
    return lambda sweep: sweep.write_text(sweep.read_text().replace("name: tiny_test", f"name: {name}"))


def break_line(sweep: Path) -> None:
    with (sweep.parent / "chats.jsonl").open("a") as file:
        file.write('{"messages": [\n')


def break_schema(sweep: Path) -> None:
    write_lines(sweep.parent / "chats.jsonl", [{"text": "a", "label": 1}])


def break_all(sweep: Path) -> None:
    write_lines(sweep.parent / "chats.jsonl", [{"messages": []}] * 3)


@pytest.mark.parametrize(
    ("break_it", "arguments", "code", "said"),
    [
        (break_key, (), 2, ("sweep.yaml:", "unknown key `data.max_lenght`", "did you mean `data.max_length`?")),
        (lambda sweep: sweep.unlink(), (), 2, ("no sweep file", "sweep.yaml")),
        (lambda sweep: (sweep.parent / "chats.jsonl").unlink(), (), 2, ("no data at `chats.jsonl`", ".parquet")),
        (break_line, (), 3, ("chats.jsonl:41: not valid JSON",)),
        (break_schema, (), 3, ("chats.jsonl:1: no chat schema", "`text`, `label`", "data.mapping")),
        (break_all, (), 3, ("no usable conversation", "`messages` is empty")),
        (break_task, (), 2, ("unknown evaluation task `tiny_coppy`", "did you mean `tiny_copy`?")),
        (break_arm, (), 2, ("unknown arm `paddding`; did you mean `padding`?",)),
        (taken_name("store"), (), 2, ("sweep.yaml:1:", "the run directory has its own `store/`")),
        (taken_name("slurm"), (), 2, ("sweep.yaml:1:", "the run directory has its own `slurm/`")),
        (None, ("--only", "sed=0"), 2, ("no axis `sed`", "arm, seed")),
        (None, ("--only", "seed=5"), 2, ("`seed` has no value `5`",)),
        (None, ("--set", "train.lrr=1"), 2, ("did you mean `train.lr`?",)),
        (None, ("--nonsense",), 2, ("--nonsense", "--help")),
        (None, ("--set", "model.tokenizer=./nowhere", "--set", "model.vocab_size=null"), 2, ("`./nowhere`",)),
        (None, ("--set", "data.template=nowhere.jinja"), 2, ("no chat template `nowhere.jinja`",)),
    ],
)
def test_a_mistake_gets_one_clear_error_and_its_exit_code(
    run_cli: Run,
    tiny_sweep: Sweep,
    tmp_path: Path,
    break_it: Callable[[Path], Any] | None,
    arguments: tuple[str, ...],
    code: int,
    said: tuple[str, ...],
) -> None:
    path = tiny_sweep()
    if break_it is not None:
        break_it(path)
    done = run_cli("prepare", path.name, *arguments, cwd=tmp_path)
    assert_refused(done, code, *said)


def test_data_that_cannot_be_read_leaves_one_json_document_with_a_null_ledger(
    run_cli: Run, tiny_sweep: Sweep, tmp_path: Path
) -> None:
    path = tiny_sweep()
    break_line(path)
    done = run_cli("prepare", path, "--json", cwd=tmp_path)
    assert done.code == 3
    assert [cell["ledger"] for cell in done.json()["cells"]] == [None, None]
    assert "Traceback" not in done.stderr
    for log in (tmp_path / "runs").rglob("worker-*.log"):
        assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_a_failure_is_forgotten_when_its_cause_is_mended(run_cli: Run, tiny_sweep: Sweep, tmp_path: Path) -> None:
    path = tiny_sweep(arms=["padding"])
    good = (tmp_path / "chats.jsonl").read_text()
    break_line(path)
    assert run_cli("prepare", path, cwd=tmp_path).code == 3
    (tmp_path / "chats.jsonl").write_text(good)
    assert run_cli("prepare", path, cwd=tmp_path).code == 0


@pytest.mark.parametrize("command", ["train", "prepare", "sweep", "status", "report", "verify"])
def test_a_missing_argument_is_a_usage_error_like_any_other(run_cli: Run, tmp_path: Path, command: str) -> None:
    assert_refused(run_cli(command, cwd=tmp_path), 2, "Missing argument", f"{command} --help")


def test_training_before_preparing_prints_the_command_to_run(
    run_cli: Run, tiny_sweep: Sweep, tmp_path: Path
) -> None:
    path = tiny_sweep()
    assert_refused(run_cli("train", path, cwd=tmp_path), 2, "training never tokenizes", f"packcli prepare {path}")


def test_verify_names_the_file_and_exits_4(run_cli: Run, prepared: Path) -> None:
    [directory] = (prepared / "runs" / "store" / "tokens").iterdir()
    assert run_cli("verify", directory, cwd=prepared).code == 0
    copy = prepared / "copy"
    shutil.copytree(directory, copy)
    content = bytearray((copy / "shard-00000.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "shard-00000.arrow").write_bytes(content)
    assert_refused(run_cli("verify", copy, cwd=prepared), 4, "shard-00000.arrow", "sha256 differs")
    shutil.rmtree(copy)
    # A part of a stage, and a store of many, are vouched for too; nothing else is.
    assert run_cli("verify", directory / "tokenizer", cwd=prepared).code == 0
    assert run_cli("verify", "runs/store", cwd=prepared).code == 0
    (prepared / "empty").mkdir()
    assert_refused(run_cli("verify", "empty", cwd=prepared), 4, "no manifest.json")
    assert_refused(run_cli("verify", "nowhere", cwd=prepared), 2, "no directory `nowhere`")


@pytest.mark.parametrize("command", ["prepare", "sweep", "status", "report"])
def test_a_run_directory_that_is_a_file_is_no_traceback(run_cli: Run, prepared: Path, command: str) -> None:
    assert_refused(run_cli(command, "sweep.yaml", "--runs", "sweep.yaml", cwd=prepared), 2, "is a file")


def test_a_report_of_nothing_is_mistaken_for_one_of_a_sweep(run_cli: Run, prepared: Path) -> None:
    done = run_cli("report", "sweep.yaml", "--runs", "rnus", cwd=prepared)
    assert done.code == 0
    assert "warning: nothing of `all_arms` has run in `rnus`" in done.stderr
    assert "warning" not in run_cli("report", "sweep.yaml", cwd=prepared).stderr


def test_one_of_two_formats_is_dropped_in_silence(run_cli: Run, prepared: Path) -> None:
    assert_refused(run_cli("report", "sweep.yaml", "--format", "md", "--json", cwd=prepared), 2, "two documents")
    assert run_cli("report", "sweep.yaml", "--format", "json", "--json", cwd=prepared).json()["rows"]


def test_a_finished_run_directory_that_cannot_be_written_is_still_read(prepared: Path) -> None:
    """As root no directory is read-only, so the store is asked directly."""
    from packcli.errors import ConfigError
    from packcli.store import Store

    Store(prepared / "runs").check(writable=True)
    Store(prepared / "runs").check(writable=False)
    with pytest.raises(ConfigError, match="is a file"):
        Store(prepared / "sweep.yaml" / "runs").check(writable=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.config.hiden_size", "64", "did you mean `hidden_size`?"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("model.config.model_type", "lama", "did you mean `llama`?"),
                ("model.config.num_attention_heads", "5", "not a multiple of the number of attention heads"),
                ("model.config.max_position_embeddings", "16", "positions for 16 tokens"),
            )
        ),
    ],
)
def test_a_mistake_in_a_model_config_is_found_before_anything_runs(
    run_cli: Run, prepared: Path, key: str, value: str, said: str
) -> None:
    for arguments in (("--dry-run",), ()):
        done = run_cli("sweep", "sweep.yaml", *arguments, "--set", f"{key}={value}", cwd=prepared)
        assert_refused(done, 2, said)


@pytest.mark.slow
def test_case_33_a_stage_held_by_another_process_exits_5_and_is_seen_to_run(
    run_cli: Run, tiny_sweep: Sweep, tmp_path: Path
) -> None:
    path = tiny_sweep(arms=["padding"])
    plan = run_cli("prepare", path, "--json", cwd=tmp_path).json()
    index = tmp_path / plan["cells"][0]["index_path"]
    shutil.rmtree(index)
    code = (
        "import sys; from pathlib import Path; from packcli.files import locked\n"
        "with locked(Path(sys.argv[1]), 'x'):\n    print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code, index], stdin=-1, stdout=-1) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        done = run_cli("prepare", path, cwd=tmp_path)
        assert done.code == 5
        assert f"is being written by process {holder.pid} on {platform.node()} since 20" in done.stderr
        beside = run_cli("status", path, "--json", cwd=tmp_path)
        assert beside.json()["cells"][0]["stages"]["prepare"]["state"] == "running"
        assert run_cli("report", path, cwd=tmp_path).code == 0
        holder.kill()
    assert run_cli("prepare", path, cwd=tmp_path).code == 0


# Results -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, run_cli: Run) -> Path:
    """A directory with `sweep.yaml` over every arm, prepared; `prepare.json` is what it printed. Read only."""
    root = tmp_path_factory.mktemp("prepared")
    write_lines(root / "chats.jsonl", [*chat_records(40), {"messages": []}, *chat_records(20, turns=4, first=50)])
    document = {
        "name": "all_arms",
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
            "tokenizer": "train",
            "vocab_size": 300,
        },
        "data": {"source": "chats.jsonl", "max_length": 160, "validation": 0.2},
        "train": {"epochs": 2, "lr": 0.001, "global_batch": 8, "threads": 1},
        "eval": {"tasks": ["tiny_copy"]},
        "matrix": {"arm": list(ARMS), "seed": [0, 1], "train.lr": [1e-3]},
    }
    (root / "sweep.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    done = run_cli("prepare", "sweep.yaml", "--json", cwd=root)
    assert done.code == 0, done.stderr
    (root / "prepare.json").write_text(done.stdout)
    return root


LEDGER_KEYS = {
    "conversations_in",
    "conversations_rejected",
    "documents",
    "documents_validation",
    "documents_dropped",
    "documents_kept",
    "documents_cut",
    "tokens_in",
    "tokens_validation",
    "tokens_truncated",
    "tokens_dropped",
    "tokens_kept",
    "tokens_supervised",
    "tokens_padding",
    "tokens_boundary",
    "slots",
    "rows",
    "rows_lower_bound",
    "efficiency",
}


def test_prepare_prints_one_json_document_and_its_ledgers_close(prepared: Path) -> None:
    document = json.loads((prepared / "prepare.json").read_text())
    assert document.keys() == {"cells"}
    assert [cell["labels"] for cell in document["cells"]] == [
        {"arm": arm, "seed": seed, "train.lr": "0.001"} for arm in ARMS for seed in "01"
    ]
    for cell in document["cells"]:
        assert cell.keys() == {
            "cell",
            "labels",
            "prepare_id",
            "tokens_path",
            "index_path",
            "rejected_path",
            "ledger",
            "sharing",
            "conversations_repeated",
            "conversations_not_drawn",
        }
        assert (prepared / cell["tokens_path"] / "manifest.json").is_file()
        assert (prepared / cell["index_path"]).name == cell["prepare_id"]
        ledger = cell["ledger"]
        assert ledger.keys() == LEDGER_KEYS
        for whole, parts in LEDGER_IDENTITIES:
            assert ledger[whole] == sum(ledger[part] for part in parts)
        assert (ledger["conversations_in"], ledger["conversations_rejected"]) == (61, 1)
        assert ledger["efficiency"] == ledger["tokens_kept"] / ledger["slots"]
    kept = {cell["ledger"]["tokens_kept"] for cell in document["cells"] if cell["labels"]["arm"] != "random"}
    assert len(kept) == 1, "arms that truncate keep the same tokens"


def test_preparing_again_does_nothing_and_prints_the_same(run_cli: Run, prepared: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (prepared / "runs" / "store").rglob("*")}
    done = run_cli("prepare", "sweep.yaml", "--json", cwd=prepared)
    assert done.code == 0
    assert done.stdout == (prepared / "prepare.json").read_text()
    assert {path: path.stat().st_mtime_ns for path in (prepared / "runs" / "store").rglob("*")} == before


def test_another_run_directory_gets_the_same_ids_and_ledgers(run_cli: Run, prepared: Path) -> None:
    done = run_cli("prepare", "sweep.yaml", "--only", "arm=random", "--runs", "elsewhere", "--json", cwd=prepared)
    first = json.loads((prepared / "prepare.json").read_text())["cells"]
    for cell in done.json()["cells"]:
        [same] = [other for other in first if other["labels"] == cell["labels"]]
        assert (cell["cell"], cell["prepare_id"], cell["ledger"]) == (
            same["cell"],
            same["prepare_id"],
            same["ledger"],
        )
        rows = [prepared / one["index_path"] / "rows.arrow" for one in (cell, same)]
        assert rows[0].read_bytes() == rows[1].read_bytes()


def test_a_dry_run_has_the_keys_of_the_contract_and_does_nothing(run_cli: Run, prepared: Path) -> None:
    before = sorted((prepared / "runs").rglob("*"))
    document = run_cli("sweep", "sweep.yaml", "--dry-run", "--json", cwd=prepared).json()
    assert sorted((prepared / "runs").rglob("*")) == before
    assert {"shared", "cells", "total"} <= document.keys()
    assert len(document["cells"]) == 10
    for cell in document["cells"]:
        assert cell.keys() == {"cell", "labels", "stages", "estimate", "step", "memory", "warnings"}
        assert cell["stages"].keys() == {"prepare", "train", "eval"}
        assert [cell["stages"][stage]["state"] for stage in ("prepare", "train", "eval")] == [
            "done",
            "pending",
            "pending",
        ]
        estimate = cell["estimate"]
        assert estimate.keys() == {"rows", "steps", "flops", "hours", "gpu_hours", "lengths", "rate"}
        assert estimate["rows"] > 0
        assert estimate["steps"] == -(-2 * estimate["rows"] // 8)
        assert estimate["flops"] > 0
        assert estimate["hours"] is None
        assert estimate["gpu_hours"] is None
    total = document["total"]
    assert total["rows"] == sum(cell["estimate"]["rows"] for cell in document["cells"])


def test_status_reads_states_from_disk(run_cli: Run, prepared: Path) -> None:
    document = run_cli("status", "sweep.yaml", "--json", "--only", "arm=padding", cwd=prepared).json()
    assert document["sweep"] == "all_arms"
    assert document["shared"] == []
    assert len(document["cells"]) == 2
    for cell in document["cells"]:
        states = {stage: cell["stages"][stage]["state"] for stage in ("prepare", "train", "eval")}
        assert states == {"prepare": "done", "train": "pending", "eval": "pending"}
        assert cell["stages"]["eval"]["tasks"]["tiny_copy"]["state"] == "pending"
    assert document["total"] == {"done": 3, "pending": 4}


def test_a_dry_run_before_anything_ran_guesses_nothing(run_cli: Run, tiny_sweep: Sweep, tmp_path: Path) -> None:
    done = run_cli("sweep", tiny_sweep(), "--dry-run", "--json", cwd=tmp_path)
    for cell in done.json()["cells"]:
        assert set(cell["estimate"].values()) == {None}
        assert cell["stages"]["prepare"]["state"] == "pending"
    assert done.json()["total"]["rows"] is None


ESCAPE = "\x1b]0;owned\x07"


@pytest.mark.slow
def test_case_47_control_characters_in_data_do_not_reach_the_terminal(
    run_cli: Run, tiny_sweep: Sweep, tmp_path: Path
) -> None:
    path = tiny_sweep(arms=["padding"])
    names = [f"a{ESCAPE}.jsonl", f"b{ESCAPE}.jsonl"]
    write_lines(tmp_path / names[0], chat_records(10))
    write_lines(tmp_path / names[1], [{f"field{ESCAPE}": 1}])
    document = yaml.safe_load(path.read_text())
    document["matrix"]["data.source"] = names
    path.write_text(yaml.safe_dump(document))
    done = run_cli("prepare", path, cwd=tmp_path)
    assert done.code == 3
    assert "no chat schema" in done.stderr
    assert "\x1b" not in done.stderr
    for command in (("prepare",), ("status",), ("sweep", "--dry-run")):
        shown = run_cli(*command, path, cwd=tmp_path)
        assert "\x1b" not in shown.stderr + shown.stdout, command
        assert "\x07" not in shown.stderr + shown.stdout, command
        assert "owned" in shown.stdout
    assert "Traceback" not in done.stderr


def test_a_table_in_a_pipe_is_not_cut(run_cli: Run, prepared: Path) -> None:
    done = run_cli("prepare", "sweep.yaml", cwd=prepared, env={"COLUMNS": "40"})
    assert done.code == 0
    for arm in ARMS:
        assert arm in done.stdout
    assert "…" not in done.stdout


def test_ctrl_c_says_so_exits_130_and_leaves_no_process(tiny_sweep: Sweep, tmp_path: Path) -> None:
    path = tiny_sweep(records=chat_records(4000, turns=20), data={"max_length": 4096})
    command = [sys.executable, "-m", "packcli", "prepare", str(path)]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=listen_to_ctrl_c,
    ) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "runs").glob("store/tokens/*/.lock")):
            assert time.monotonic() < deadline
            assert process.poll() is None, "it ended before it could be interrupted"
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"error: interrupted\n\nhint: run the same command again" in stderr
    assert b"Traceback" not in stderr
    assert children
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)


def test_the_console_script_is_the_module() -> None:
    assert 'packcli = "packcli.cli:main"' in (REPO / "pyproject.toml").read_text()
