"""`train.backend: trl`: what is refused, what is handed over, what is made of what comes back.

A script stands in for the Python that has TRL; the last test takes a real one, named by PACKCLI_TRL_PYTHON.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packcli import batching, stages, sweepfile
from packcli.data import index as indexes
from packcli.errors import ConfigError, MissingError, PackcliError, RunError
from packcli.files import read_json, read_jsonl
from packcli.plan import Plan, TrainOrder
from packcli.store import Store, verify
from packcli.train import trl_terms

_PRETEND = """\
#!{python}
import json, pathlib, shutil, sys
if sys.argv[2] == "-c":
    print("9.9")
    sys.exit({without_trl})
setting = json.loads(pathlib.Path(sys.argv[3]).read_text())
pathlib.Path({seen!r}).write_text(json.dumps([setting, json.loads(pathlib.Path(setting["order"]).read_text())]))
if {fails}:
    print("Traceback (most recent call last):\\nValueError: the trainer's own words", file=sys.stderr)
    sys.exit(1)
arguments = setting["arguments"]
each = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
steps = -(-len(json.loads(pathlib.Path(setting["order"]).read_text())) // each) + {more}
record = dict(loss={loss}, lr=1e-3, grad_norm=1.5, slots=100, step_s=0.5, cpu_s=0.25, peak_bytes=None)
lines = [json.dumps(dict(record, step=step + 1)) for step in range(steps)]
pathlib.Path(setting["log"]).write_text("\\n".join(lines) + "\\n")
shutil.copytree(setting["model"], setting["trained"])
result = dict(versions=dict(trl="9.9", transformers="8", torch="7"), python="3", attention="sdpa", device="cpu",
              threads=1)
pathlib.Path(setting["result"]).write_text(json.dumps(result))
"""


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A Python that seems to have TRL, and does what it is asked to; the path of what it was given."""

    def install(*, without_trl: int = 0, fails: bool = False, more: int = 0, loss: str = "2.0") -> Path:
        seen, script = tmp_path / "seen.json", tmp_path / "pretend"
        text = _PRETEND.format(
            python=sys.executable, seen=str(seen), without_trl=without_trl, fails=fails, more=more, loss=loss
        )
        script.write_text(text)
        script.chmod(0o755)
        trl_terms._version.cache_clear()
        monkeypatch.setenv(trl_terms.PYTHON, str(script))
        monkeypatch.chdir(tmp_path)
        return seen

    return install


def prepared(sweep: Path, store: Store, only: str) -> tuple[Plan, TrainOrder]:
    """The plan, and the training of one arm with its rows made."""
    plan = stages.make_plan(sweepfile.load(sweep, only=[f"arm={only}"]), store)
    order = plan.trains[plan.cells[0].train]
    stages.prepare_tokens(plan.tokens[order.tokens], store)
    stages.prepare_index(plan.indexes[order.index], store)
    return plan, order


def test_a_sweep_that_names_no_backend_keeps_its_ids(tiny_sweep: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "runs")

    def ids(train: dict[str, Any]) -> set[str]:
        path = tiny_sweep(arms=["padding"], train=train)
        return {cell.train for cell in stages.make_plan(sweepfile.load(path), store).cells}

    plain = ids({})
    assert ids({"backend": "packcli", "backend_python": "anywhere"}) == plain
    assert ids({"backend": "trl"}) != plain
    assert ids({"backend": "trl", "backend_python": "anywhere"}) == ids({"backend": "trl"})
    assert ids({"warmup_steps": 3}) != plain


@pytest.mark.parametrize(
    ("arm", "train", "named"),
    [
        ({"extends": "best_fit", "loss": "document"}, {}, "`loss: document`"),
        ({"extends": "best_fit", "loss": "row"}, {}, "`loss: row`"),
        ({"extends": "best_fit"}, {"batch_unit": "documents"}, "`batch_unit: documents`"),
        ({"extends": "best_fit"}, {"batch_unit": "tokens"}, "`batch_unit: tokens`"),
        ({"extends": "best_fit", "attention": "causal"}, {}, "`attention: causal` with `positions: reset`"),
        ({"extends": "best_fit", "repack_each_epoch": True}, {}, "`repack_each_epoch`"),
        ({"extends": "best_fit"}, {"optimizer_state": "bfloat16"}, "`optimizer_state: bfloat16`"),
        ({"extends": "best_fit"}, {"lora": {"rank": 2, "alpha": 2}}, "`train.lora`"),
    ],
)
def test_what_trl_cannot_do_of_an_arm_is_refused_by_name_before_anything_runs(
    arm: dict[str, Any], train: dict[str, Any], named: str, tiny_sweep: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tiny_sweep(arms=["mine"], train={"backend": "trl", **train})
    path.write_text(path.read_text() + f"arms: {{mine: {json.dumps(arm)}}}\n")
    store = Store(tmp_path / "runs")
    plan = stages.make_plan(sweepfile.load(path), store)
    monkeypatch.setenv(trl_terms.PYTHON, "/nowhere/python")  # an arm is refused whether there is a TRL or not
    with pytest.raises(ConfigError) as error:
        stages.preflight(plan, store)
    assert named in error.value.cause
    assert not (tmp_path / "runs" / "store" / "train").exists()


def test_a_missing_trl_is_exit_code_6_and_says_what_to_type(
    tiny_sweep: Any, tmp_path: Path, pretend: Callable[..., Path], monkeypatch: Any
) -> None:
    pretend(without_trl=1)
    store = Store(tmp_path / "runs")
    plan = stages.make_plan(sweepfile.load(tiny_sweep(train={"backend": "trl"})), store)
    for python in (os.environ[trl_terms.PYTHON], "/nowhere/python"):
        monkeypatch.setenv(trl_terms.PYTHON, python)
        with pytest.raises(MissingError, match=r"`train.backend: trl`") as error:
            stages.preflight(plan, store)
        assert error.value.exit_code == 6
        assert "pip install trl" in error.value.fix


def test_a_failing_trl_is_exit_code_7_with_its_last_words(
    tiny_sweep: Any, tmp_path: Path, pretend: Callable[..., Path]
) -> None:
    pretend(fails=True)
    store = Store(tmp_path / "runs")
    _, order = prepared(tiny_sweep(train={"backend": "trl"}), store, "best_fit")
    with pytest.raises(RunError, match="the trainer's own words") as error:
        stages.train(order, store)
    assert error.value.exit_code == 7
    assert Path(error.value.fix.partition(": ")[2]).is_file()
    left = store.failure("train", order.id)
    assert isinstance(left, PackcliError)
    assert "the trainer's own words" in left.cause


def test_a_stop_that_comes_while_a_run_of_trl_commits_kills_it(
    tiny_sweep: Any, tmp_path: Path, pretend: Callable[..., Path], monkeypatch: Any
) -> None:
    pretend()
    store = Store(tmp_path / "runs")
    _, order = prepared(tiny_sweep(train={"backend": "trl"}), store, "best_fit")
    commit = store.commit

    def stopped(*arguments: Any, **options: Any) -> Any:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        return commit(*arguments, **options)

    monkeypatch.setattr(store, "commit", stopped)
    assert stages.train(order, store).results["backend"]["name"] == "trl"


@pytest.mark.parametrize(("wrong", "said"), [({"more": 1}, "steps, not"), ({"loss": "None"}, "loss not finite")])
def test_what_comes_back_is_looked_at_before_it_is_kept(
    wrong: dict[str, Any], said: str, tiny_sweep: Any, tmp_path: Path, pretend: Callable[..., Path]
) -> None:
    pretend(**wrong)
    store = Store(tmp_path / "runs")
    _, order = prepared(tiny_sweep(train={"backend": "trl"}), store, "best_fit")
    with pytest.raises(RunError, match=said):
        stages.train(order, store)
    assert store.manifest("train", order.id) is None


def test_rows_go_over_in_our_order_and_come_back_as_a_run_of_ours(
    tiny_sweep: Any, tmp_path: Path, pretend: Callable[..., Path]
) -> None:
    seen = pretend()
    store = Store(tmp_path / "runs")
    sweep = tiny_sweep(
        train={
            "backend": "trl",
            "epochs": 2,
            "global_batch": 6,
            "micro_batch": 4,
            "warmup_ratio": 0.5,
            "clip": None,
        }
    )
    _, order = prepared(sweep, store, "best_fit")
    manifest = stages.train(order, store)
    rows = indexes.read(store.rows(order.index))
    steps = batching.run_steps(rows.sizes, order.train, order.arm.order, order.seed)
    setting, handed = read_json(seen)
    assert handed == np.concatenate(steps).tolist()
    arguments = setting["arguments"]
    assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == 6
    assert arguments["per_device_train_batch_size"] <= 4
    assert arguments["warmup_steps"] == -(-len(steps) // 2)
    assert arguments["max_grad_norm"] > 1e9
    assert setting["padding_free"] is True

    records = read_jsonl(store.metrics(order.id))
    assert [record["tokens"] for record in records] == [int(rows.tokens[step].sum()) for step in steps]
    assert all(record["loss"] == 2.0 and record["useful_tokens_per_s"] > 0 for record in records)
    assert manifest.results["backend"] == {
        "name": "trl", "python": "3", "trl": "9.9", "transformers": "8", "torch": "7",
    }  # fmt: skip
    assert manifest.results["validation_loss"] > 0
    assert not store.handed_over(order.id).exists()
    assert verify(store.directory("train", order.id)) > 0
    from packcli.model import load

    load.pretrained(str(store.final(order.id)))


def test_the_driver_runs_where_there_is_no_packcli() -> None:
    text = (Path(trl_terms.__file__).with_name("trl_driver.py")).read_text()
    modules = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not [name for name in modules if name and name.startswith("packcli")]


@pytest.mark.soak
def test_trl_itself_takes_the_steps_that_packcli_takes(tiny_sweep: Any, tmp_path: Path, run_cli: Any) -> None:
    if not os.environ.get(trl_terms.PYTHON):
        pytest.skip(f"{trl_terms.PYTHON} names no Python with TRL")
    sweep = tiny_sweep(
        arms=["padding", "best_fit"],
        train={"epochs": 2, "warmup_steps": 2},
        matrix={"train.backend": ["packcli", "trl"]},
    )
    done = run_cli("sweep", sweep, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    store, losses = Store(tmp_path / "runs"), {}
    for row in done.json()["rows"]:
        records = read_jsonl(store.metrics(row["ids"]["train"]))
        losses[row["labels"]["arm"], row["labels"]["train.backend"]] = [record["loss"] for record in records]
        assert row["train"]["validation_loss"] is not None
    for arm in ("padding", "best_fit"):
        np.testing.assert_allclose(losses[arm, "trl"], losses[arm, "packcli"], rtol=1e-5)
