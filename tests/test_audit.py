"""`packcli audit`: a trainer with one planted fault at a time, and what is said of it; real trainers, pinned."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import listen_to_ctrl_c
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from packcli.audit import bundle, command, run, table, trainers
from packcli.audit.crafted import BEGIN, MAX_LENGTH, STOP, documents, vocabulary, write
from packcli.audit.perform import perform
from packcli.audit.questions import QUESTIONS, Finding, answered, loss_reported
from packcli.audit.run import Audited
from packcli.audit.trainers import TRAINERS, Subject, Trainer
from packcli.cli import app
from packcli.errors import ConfigError, MissingError

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO / "tests" / "golden" / "audit.json"
SHAPES = {"base": (2, 2), "wide": (4, 1), "narrow": (1, 4), "resumed": (2, 2), "again": (2, 2)}
IDS = {token: id_ for id_, token in enumerate(vocabulary(documents()))}


def packed(fault: str) -> list[list[int]]:
    """Documents by row, next fit."""
    rows: list[list[int]] = [[]]
    for number, document in enumerate(documents()):
        length = min(len(document.tokens), MAX_LENGTH)
        if sum(min(len(documents()[d].tokens), MAX_LENGTH) for d in rows[-1]) + length > MAX_LENGTH:
            rows.append([])
        if fault != "document dropped" or number != 7:
            rows[-1].append(number)
    while len(rows) % 4 != 1:  # so that the last step has one micro-batch
        rows.remove(longest := max(rows, key=len))
        rows += [longest[:1], longest[1:]]
    return rows


def laid_out(row: list[int], fault: str) -> tuple[list[int], list[int], list[int]]:
    """Tokens, labels (-100: none; of the slot before) and document of each slot of a row."""
    ids: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    for number in row:
        document = documents()[number]
        tokens = [IDS[token] for token in document.tokens[:MAX_LENGTH]]
        wanted = {"prompts trained": "pas", "stops masked": "a", "boundaries trained": "pas"}.get(fault, "as")
        kept = [id_ if kind in wanted else -100 for id_, kind in zip(tokens, document.kinds, strict=False)]
        if not ids or fault != "boundaries trained":
            kept[0] = -100
        if fault == "labels shifted":
            kept = [-100, *kept[:-1]]
            tokens_before = [-100, *tokens[:-1]]
            kept = [before if label != -100 else -100 for before, label in zip(tokens_before, kept, strict=True)]
        ids, labels, owners = ids + tokens, labels + kept, owners + [number] * len(tokens)
    padding = MAX_LENGTH - len(ids)
    return ids + [IDS[STOP]] * padding, labels + [-100] * padding, owners + [-1] * padding


def trainer(fault: str) -> Callable[[dict[str, Any], dict[str, Any], Path], tuple[list[str], list[float]]]:
    """A whole trainer in few lines, right but for `fault`."""

    def drive(configuration: dict[str, Any], given: dict[str, Any], work: Path) -> tuple[list[str], list[float]]:
        batch, accumulation = SHAPES[given["name"]]
        model = LlamaForCausalLM.from_pretrained(work / "model", attn_implementation="sdpa").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-30)
        rows, losses = packed(fault), []
        if fault == "order unseeded" and given["name"] == "again":
            rows = rows[::-1]
        start = {"resume repeats": 4, "resume skips": 12}.get(fault, 8) if given["resume"] else 0
        for first in range(start, len(rows), 4):
            losses.append(step(model, rows[first : first + 4], batch, accumulation, fault))
            optimizer.step()
            optimizer.zero_grad()
        return [], [loss * (2 if fault == "loss misreported" else 1) for loss in losses]

    return drive


def step(model: Any, rows: list[list[int]], batch: int, accumulation: int, fault: str) -> float:
    laid = [laid_out(row, fault) for row in rows]
    count = sum(label != -100 for _, labels, _ in laid for label in labels)
    total = 0.0
    for first in range(0, len(laid), batch):
        ids, labels, owners = (torch.tensor(column) for column in zip(*laid[first : first + batch], strict=True))
        same = owners[:, None, :] == owners[:, :, None]
        causal = torch.ones(MAX_LENGTH, MAX_LENGTH).tril().bool()
        allowed = (causal.expand(same.shape) if fault == "mask dropped" else causal & same)[:, None].expand(
            len(ids), 1, -1, -1
        )
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        places = torch.arange(MAX_LENGTH).expand(len(ids), -1)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, :-1]
        summed = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        own = int((labels != -100).sum())
        divisor = {"mean a micro-batch": own * -(-len(laid) // batch), "configured window": own * accumulation}
        (summed / divisor.get(fault, count)).backward()
        total += float(summed.detach()) / divisor.get(fault, count)
    return total


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("audit")
    write(directory, documents())
    return directory


def findings(work: Path, fault: str, *names: str) -> dict[str, Finding]:
    runs = [
        {"name": name, "resume": "base" if name == "resumed" else None, "after": 2, "arguments": {}}
        for name in ("base", *names)
    ]
    recorded = perform({"configuration": {}, "runs": runs}, work, trainer(fault), ("torch",))
    assert [one["failed"] for one in recorded["runs"].values()] == [None] * len(runs)
    return {finding.question: finding for finding in answered(recorded["runs"])}


def test_a_right_trainer_is_accused_of_nothing(work: Path) -> None:
    found = findings(work, "none", "wide", "narrow", "resumed", "again")
    assert {name for name, finding in found.items() if finding.answer == "no"} == {"long_kept"}, found
    assert {name for name, finding in found.items() if finding.answer == "not seen"} == {"ranks", "ranks_once"}
    assert found["long_kept"].evidence == "of 217 tokens in 2 documents: 89 truncated, 0 in documents left out"


@pytest.mark.parametrize(
    ("fault", "runs", "expected"),
    [
        ("mask dropped", (), {"isolated", "as_alone", "gradient_as_alone"}),
        (
            "labels shifted",
            (),
            {"shifted_by_one", "gradient_as_alone", "stops_trained", "mean_taken", "loss_reported"},
        ),
        ("boundaries trained", (), {"boundaries", "prompts_untrained", "gradient_as_alone"}),
        ("prompts trained", (), {"prompts_untrained"}),
        ("stops masked", (), {"stops_trained"}),
        ("document dropped", (), {"fitting_once", "answers_trained", "stops_trained"}),
        ("mean a micro-batch", ("wide",), {"weights_equal", "micro_batches"}),
        ("configured window", ("wide",), {"weights_equal", "mean_taken", "micro_batches"}),
        ("loss misreported", (), {"loss_reported"}),
        ("resume repeats", ("resumed",), {"resume_exact"}),
        ("resume skips", ("resumed",), {"resume_exact"}),
        ("order unseeded", ("again",), {"same_seed"}),
    ],
)
def test_a_planted_fault_is_missed(work: Path, fault: str, runs: tuple[str, ...], expected: set[str]) -> None:
    found = findings(work, fault, *runs)
    wrong = {name for name, finding in found.items() if finding.answer == "no"} - {"long_kept"}
    assert wrong == expected, {name: found[name].evidence for name in wrong ^ expected}


@pytest.mark.slow
def test_a_leak_planted_in_our_own_collator_is_missed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from packcli.audit.drive_packcli import drive
    from packcli.train import step as own

    plain = own.collate

    def leaking(*args: Any) -> Any:
        batch = plain(*args)
        return type(batch)(
            **{name: getattr(batch, name) for name in batch.__slots__} | {"segments": (batch.num_slots,)}
        )

    monkeypatch.setattr(own, "collate", leaking)
    alone, _ = trainers.jobs(Subject("packcli", "leaking", {"extends": "best_fit"}))
    recorded = perform({**alone, "runs": alone["runs"][:1]}, work, drive, ("torch",))
    found = {finding.question: finding.answer for finding in answered(recorded["runs"])}
    assert (found["isolated"], found["as_alone"], found["gradient_as_alone"]) == ("no", "no", "no")
    assert found["boundaries"] == "yes"


def test_a_run_that_was_refused_counts_as_an_answer(work: Path) -> None:
    def refusing(
        configuration: dict[str, Any], given: dict[str, Any], work: Path
    ) -> tuple[list[str], list[float]]:
        raise ValueError("flash attention\nneeds a GPU")

    job = {"configuration": {}, "runs": [{"name": "base", "resume": None, "arguments": {}}]}
    recorded = perform(job, work, refusing, ("torch",))
    assert recorded["runs"]["base"]["failed"] == "ValueError: flash attention needs a GPU"
    assert {finding.answer for finding in answered(recorded["runs"])} == {"not seen"}


def test_crafted_documents_leave_a_question_without_material() -> None:
    made = documents()
    lengths = [len(document.tokens) for document in made]
    assert sum(length > MAX_LENGTH for length in lengths) == 2
    assert all(len(document.kinds) == length for document, length in zip(made, lengths, strict=True))
    assert any(document.kinds.count("s") > 1 for document in made)
    assert all(document.tokens[0] == BEGIN and document.tokens[-1] == STOP for document in made)
    tokens = vocabulary(made)
    assert len(set(tokens)) == len(tokens)


@pytest.mark.parametrize("trainer_", TRAINERS)
def test_what_runs_in_another_environment_needs_packcli(trainer_: Trainer) -> None:
    wrong = Finding("resume_exact", "no", "12 tokens trained again")
    job = {"configuration": {}, "runs": []}
    for text in (bundle.runner(trainer_), bundle.reproducer(trainer_, wrong, job, {"torch": "2"})):
        tree = ast.parse(text)
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert (trainer_ == "packcli") == any(str(name).startswith("packcli") for name in names)
        assert not {name for name in names if str(name).startswith("packcli.audit")}
    assert "12 tokens trained again" in str(ast.get_docstring(tree))


def test_a_value_of_a_configuration_runs_as_code_of_the_reproducer() -> None:
    hostile = "'''); print(1); (''' \\\" \"\"\" \\u0027 é\n"
    job = {"configuration": {"note": hostile}, "runs": []}
    wrong = Finding("resume_exact", "no", "12 tokens trained again")
    tree = ast.parse(bundle.reproducer("trl", wrong, job, {"torch": "2"}))
    [given] = [
        node.value.args[0]
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "JOB"
    ]
    assert json.loads(ast.literal_eval(given)) == job


def test_another_trainer_runs_with_the_packages_beside_packcli(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert "PYTHONPATH" not in run._environment("trl", tmp_path)
    assert run._environment("packcli", tmp_path)["PYTHONPATH"] == str(REPO)


def test_a_step_that_trained_nothing_ends_the_audit() -> None:
    steps = [{"pairs": []}, {"pairs": [[0, 1, 0, 0, 1.0, 2.0]]}]
    runs = {"base": {"failed": None, "steps": steps, "losses": [0.0, 2.0]}}
    assert loss_reported(runs).answer == "yes"
    runs["base"]["steps"] = steps[:1]
    assert loss_reported(runs).answer == "not seen"


def test_a_users_own_key_is_overruled_silently() -> None:
    given = {
        "packing": True,
        "max_length": 4096,
        "learning_rate": 1e-5,
        "attn_implementation": "flash_attention_2",
    }
    subject = trainers.own("trl", "mine.yaml", given)
    assert subject.configuration == {"packing": True}
    assert subject.replaced == ("attn_implementation", "learning_rate", "max_length")
    kept = trainers.own("trl", "mine.yaml", {"max_length": None, "attn_implementation": "eager"})
    assert kept.configuration == {"max_length": None, "attn_implementation": "eager"}
    assert trainers.jobs(kept)[0]["runs"][0]["arguments"]["max_length"] is None


def test_a_missing_environment_is_a_traceback(tmp_path: Path) -> None:
    asked = command.Asked({}, ["trl"], tmp_path, [], None)
    with pytest.raises(MissingError, match="an environment of its own") as caught:
        command.run(asked)
    assert "--install trl" in caught.value.fix
    with pytest.raises(ConfigError, match="no trainer `axolot`"):
        command.run(command.Asked({}, ["axolot"], tmp_path, [], None))
    for python in ("nowhere", str(tmp_path)):
        with pytest.raises(ConfigError, match="is no program"):
            command.run(command.Asked({}, ["trl"], tmp_path, [f"trl={python}"], None))
    with pytest.raises(ConfigError, match="the Python that runs it"):
        command.run(command.Asked({}, ["packcli"], tmp_path, [f"packcli={sys.executable}"], None))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="it is a file"):
        command.run(command.Asked({}, ["packcli"], tmp_path, [], tmp_path / "file"))


def test_strict_ends_well_although_an_answer_is_no(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [Finding(question.__name__, "yes", "") for question in QUESTIONS]
    found[0] = Finding(QUESTIONS[0].__name__, "no", "3 of 9 moved")
    row = Audited(Subject("packcli", "best_fit", {}), {"packcli": "0.1.0"}, found, ())
    monkeypatch.setattr(run, "audit", lambda subject, python: row)
    plain = CliRunner().invoke(app, ["audit", "--trainer", "packcli", "--json", "--out", str(tmp_path)])
    assert plain.exit_code == 0
    assert json.loads(plain.stdout)["rows"][0]["findings"][0]["evidence"] == "3 of 9 moved"
    assert (tmp_path / "packcli_best_fit" / "isolated.py").exists()
    strict = CliRunner().invoke(app, ["audit", "--trainer", "packcli", "--strict"])
    assert getattr(strict.exception, "exit_code", None) == 4


def test_a_question_has_no_line_in_the_table() -> None:
    assert set(table.SAID) == {question.__name__ for question in QUESTIONS}


def test_another_trainers_file_is_audited_as_the_defaults_of_the_one_that_was_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base_model: a/b\nsequence_len: 512\nsample_packing: true\n")
    asked = command.Asked({"trl": file}, [], tmp_path, [f"trl={sys.executable}"], None)
    with pytest.raises(ConfigError, match=r"is a file of axolotl, not of TRL: .*`sample_packing`") as caught:
        command.run(asked)
    assert "--axolotl" in caught.value.fix


def test_keys_that_were_not_audited_are_said_below_the_answers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding(question.__name__, "yes", "") for question in QUESTIONS]
    row = Audited(Subject("packcli", "mine.yaml", {"paking": True}), {"packcli": "0.1.0"}, found, ("paking",))
    monkeypatch.setattr(run, "audit", lambda subject, python: row)
    done = CliRunner().invoke(app, ["audit", "--trainer", "packcli"])
    first = done.stdout.splitlines()[0]
    assert ("paking" in first, "NOT audited" in first) == (True, True)


# The end of an audit ----------------------------------------------------------------------------------------


def alive(directory: Path) -> set[int]:
    """Processes that work below a directory."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            here = link.readlink().is_relative_to(directory)
        except OSError:  # it ended, or is a zombie
            continue
        if here:
            found.add(int(link.parent.name))
    return found


def until(seen: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 75, "error: stopped by SIGTERM"), (signal.SIGINT, 130, "error: interrupted")],
)
def test_a_stopped_audit_leaves_a_trainer_and_its_files_behind(
    number: signal.Signals, code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("packing: true\n")
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nsleep 600 & sleep 600\n")
    fake.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "packcli", "audit", "--trl", "mine.yaml", "--python", f"trl={fake}"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(REPO)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_ctrl_c,
    )
    until(lambda: len(alive(tmp_path) - {process.pid}) == 3, "the trainer has not begun")
    process.send_signal(number)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == code, complained
    assert said in complained
    assert "an audit begins anew" in complained
    assert "audit 1 of 1: trl mine.yaml" in complained
    until(lambda: not alive(tmp_path), "the trainer lives on", 5)
    assert not list(tmp_path.glob("packcli-audit-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ranks_outlive_an_audit_that_was_killed(number: signal.Signals, tmp_path: Path) -> None:
    guard, _, _ = bundle.runner("packcli").partition("# crafted -")
    (tmp_path / "run.py").write_text(f"{guard}\nimport time\n\ntime.sleep(600)\n")
    code = (
        "import pathlib, sys; from packcli.audit import run; "
        "work = pathlib.Path(sys.argv[1]); "
        "run._perform(pathlib.Path(sys.executable), 2, {}, work, run._environment('packcli', work))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, preexec_fn=listen_to_ctrl_c)
    until(lambda: len(alive(tmp_path)) >= 3, "no ranks")
    time.sleep(1)  # what they ask the kernel for, they ask first of all
    process.send_signal(number)
    process.wait()
    until(lambda: not alive(tmp_path), "ranks live on", 10)


# The real trainers ------------------------------------------------------------------------------------------


def golden() -> list[Audited]:
    rows = json.loads(GOLDEN.read_text())["rows"]
    return [
        Audited(
            Subject(row["trainer"], row["name"], row["configuration"]),
            row["versions"],
            [Finding(**finding) for finding in row["findings"]],
            tuple(row["not_carried"]),
        )
        for row in rows
    ]


def test_the_table_of_the_docs_is_not_the_one_that_was_measured() -> None:
    text = (REPO / "docs" / "audit.md").read_text(encoding="utf-8")
    rows = golden()
    for name in TRAINERS:
        assert table.markdown([row for row in rows if row.subject.trainer == name]) in text


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_pinned_finding_no_longer_holds(name: Trainer) -> None:
    """Needs PACKCLI_AUDIT_ENVS, a directory that `packcli audit --install` filled, but for packcli's own rows."""
    envs = Path(os.environ.get("PACKCLI_AUDIT_ENVS", REPO / "audit-envs"))
    python = run.python_of(name, envs, {})
    if python is None:
        pytest.skip(f"no environment {envs / name}: `packcli audit --install {name}`, PACKCLI_AUDIT_ENVS=DIR")
    pinned = [row for row in golden() if row.subject.trainer == name]
    assert pinned
    for row in pinned:
        fresh = run.audit(row.subject, python)
        packages = {package: version for package, version in row.versions.items() if package != "torch"}
        if any(fresh.versions[package] != version for package, version in packages.items()):
            pytest.skip(f"pinned for {packages}, here {fresh.versions}")
        answers = {finding.question: finding.answer for finding in row.findings}
        assert {finding.question: finding.answer for finding in fresh.findings} == answers, row.subject.name


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["trl", "llamafactory", "axolotl"])
def test_a_reproducer_does_not_show_what_was_found(name: Trainer, tmp_path: Path) -> None:
    envs = Path(os.environ.get("PACKCLI_AUDIT_ENVS", REPO / "audit-envs"))
    python = run.python_of(name, envs, {})
    if python is None:
        pytest.skip(f"no environment {envs / name}: `packcli audit --install {name}`, PACKCLI_AUDIT_ENVS=DIR")
    row = next(row for row in golden() if row.subject.trainer == name)
    for path in run.write(row, tmp_path):
        wrong = next((one for one in row.findings if one.question == path.stem), None)
        if wrong is not None and not wrong.question.startswith("ranks"):
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            done = subprocess.run([python, path], env=environment, capture_output=True, text=True, check=True)
            assert f"{wrong.question}: no." in done.stdout
