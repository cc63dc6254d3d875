"""Stages: scores filed under the wrong task, or a stage skipped because another one failed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import chat_records, write_lines

from packcli import fingerprints, stages, sweepfile
from packcli.config import ARMS, ArmSpec, EvalSpec
from packcli.errors import ConfigError, LockedError, PackcliError, RunError
from packcli.eval.harness import Harness, ScoredTask, TaskResult
from packcli.eval.scoring import Scorer
from packcli.files import read_sealed, write_sealed
from packcli.launch.worker import Worker
from packcli.plan import EvalOrder, IndexOrder, Kind, TokensOrder, TrainOrder
from packcli.store import Manifest, Store

TASKS = ("tiny_copy", "tiny_reverse", "tiny_rotate")


class FakeHarness(Harness):
    """Scores every task 1; raises at those in `bad`. `loads` counts how often a model would be loaded."""

    def __init__(self, bad: Sequence[str] = ()) -> None:
        super().__init__()
        self.bad, self.loads = set(bad), 0

    def require(self, task: str) -> None:
        pass

    def load(self, checkpoint: object) -> object:
        self.loads += 1
        return checkpoint

    def score(self, lm: object, task: str, kept: object = None) -> ScoredTask:
        if task in self.bad:
            raise RunError(f"{task} went wrong", "mend it")
        fields = {"task": task, "metric": "m", "score": 1.0, "stderr": 0.0, "n": 1, "n_total": 1, "health": {}}
        fields["left_out"] = None
        result = TaskResult(**{name: fields.get(name, 1) for name in TaskResult.__dataclass_fields__})
        return ScoredTask(result, [1.0], [{"task": task}], {})


def orders() -> list[EvalOrder]:
    spec = EvalSpec(tasks=TASKS)
    return [EvalOrder(id=f"id-{task}", train="t", task=task, protocol="p", eval=spec) for task in TASKS]


def run(store: Store, harness: FakeHarness) -> dict[str, str]:
    """task -> the task its stored result names, or the error."""
    found = {}
    scorer = Scorer(EvalSpec())
    scorer.harness = harness
    for order, outcome in stages.evaluate(orders(), store, scorer, checkpoint="x"):
        if isinstance(outcome, Manifest):
            with store.writing("eval", order.id):
                pass  # not held any more
            [sample] = store.samples(order.id).read_text().splitlines()
            assert json.loads(sample)["task"] == outcome.results["task"]
            found[order.task] = outcome.results["task"]
        else:
            found[order.task] = str(outcome)
    return found


def test_a_task_that_another_process_holds_does_not_shift_the_scores_of_the_rest(tmp_path: Path) -> None:
    store, harness = Store(tmp_path), FakeHarness()
    with store.writing("eval", "id-tiny_reverse"):
        found = run(store, harness)
    assert found["tiny_copy"] == "tiny_copy"
    assert "is being written by process" in found["tiny_reverse"]
    assert found["tiny_rotate"] == "tiny_rotate"
    assert run(store, harness) == {task: task for task in TASKS}


def test_a_task_that_fails_leaves_the_others_their_turn(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert run(store, FakeHarness(["tiny_reverse"])) == {
        "tiny_copy": "tiny_copy",
        "tiny_reverse": "tiny_reverse went wrong",
        "tiny_rotate": "tiny_rotate",
    }
    assert store.state("eval", "id-tiny_reverse") == "failed"


def test_a_model_is_loaded_once_for_all_tasks_and_not_at_all_when_all_are_done(tmp_path: Path) -> None:
    store, harness = Store(tmp_path), FakeHarness()
    run(store, harness)
    run(store, harness)
    assert harness.loads == 1


def test_a_task_that_another_process_scored_in_the_meantime_is_scored_again(tmp_path: Path) -> None:
    store, harness = Store(tmp_path), FakeHarness()
    scorer = Scorer(EvalSpec())
    scorer.harness = harness
    ours = stages.evaluate(orders(), store, scorer, checkpoint="x")
    next(ours)
    run(store, FakeHarness())  # all of it, while we had one
    before = {order.id: store.manifest_file("eval", order.id).stat().st_ino for order in orders()}
    harness.bad = set(TASKS)
    assert all(isinstance(outcome, Manifest) for _, outcome in ours)
    assert before == {order.id: store.manifest_file("eval", order.id).stat().st_ino for order in orders()}


@pytest.mark.parametrize("kind", ["tokens", "index", "train"])
def test_a_stage_that_another_process_made_in_the_meantime_is_made_again(
    kind: str, tiny_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "runs")
    plan = stages.make_plan(sweepfile.load(tiny_sweep(arms=["padding"], train={"steps": 2})), store)
    writing = Store.writing
    made: list[int] = []

    @contextlib.contextmanager
    def after_another(self: Store, kind_: Kind, id_: str) -> Iterator[Path]:
        if kind_ == kind and not made:
            made.append(0)
            stages.run(kind_, order, store)  # another process, from its first look to its end
            made[0] = store.manifest_file(kind_, id_).stat().st_ino
        with writing(self, kind_, id_) as directory:
            yield directory

    monkeypatch.setattr(Store, "writing", after_another)
    for order in (*plan.tokens.values(), *plan.indexes.values(), *plan.trains.values()):
        stages.run(stages_kind(order), order, store)
        if stages_kind(order) == kind:
            assert made == [store.manifest_file(kind, order.id).stat().st_ino]


def stages_kind(order: object) -> Kind:
    return {TokensOrder: "tokens", IndexOrder: "index", TrainOrder: "train"}[type(order)]  # type: ignore[return-value]


def test_what_was_scored_in_part_vouches_for_bytes_that_are_being_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, harness = Store(tmp_path), FakeHarness()
    run(store, harness)
    [order, *_] = orders()
    path = store.manifest_file("eval", order.id)
    manifest = read_sealed(path)
    manifest["results"]["left_out"] = {"reason": "no splitter", "fix": "install it"}
    write_sealed(path, manifest)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stages, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run(store, harness)
    assert store.state("eval", order.id) == "pending"
    assert run(store, harness) == {task: task for task in TASKS}


def test_scoring_a_run_that_was_not_trained_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train t is missing") as caught:
        list(stages.evaluate(orders(), Store(tmp_path), Scorer(EvalSpec())))
    assert "packcli train" in caught.value.fix


def test_an_index_without_its_tokens_names_the_command(tmp_path: Path) -> None:
    arm = ArmSpec.model_validate(ARMS["padding"])
    order = IndexOrder(
        id="i", tokens="t", max_length=8, validation=0.0, seed=0, layout=arm.rows, batching=None, epochs=1
    )
    with pytest.raises(ConfigError, match="tokens t is missing") as caught:
        stages.prepare_index(order, Store(tmp_path))
    assert "packcli prepare" in caught.value.fix
    assert Store(tmp_path).state("index", "i") == "pending"


@pytest.mark.parametrize(("error", "code"), [(LockedError("held", "wait"), 5), (ZeroDivisionError("x"), 1)])
def test_a_job_of_several_tasks_that_breaks_fails_every_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def broken(spec: EvalSpec, **options: object) -> Any:
        raise error

    monkeypatch.setattr(stages, "scorer_for", broken)
    receive, send = os.pipe()
    jobs = [order.model_dump(mode="json") for order in orders()]
    Worker(Store(tmp_path), send, 1)._do({"kind": "eval", "ids": [job["id"] for job in jobs], "orders": jobs})
    os.close(send)
    with os.fdopen(receive, "rb") as answers:
        answer = json.loads(answers.readline())
    assert [failure["id"] for failure in answer["failures"]] == [order.id for order in orders()]
    assert {failure["exit_code"] for failure in answer["failures"]} == {code}
    assert all(failure["fix"] for failure in answer["failures"])


def test_an_input_is_hashed_again_when_it_changes_and_not_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = fingerprints.sha256_file
    monkeypatch.setattr(fingerprints, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    store, file = Store(tmp_path / "runs"), write_lines(tmp_path / "x.jsonl", chat_records(3))
    found = []
    for change in (False, False, True, False):
        if change:
            write_lines(file, chat_records(4))
        hashes = fingerprints.FileHashes(store)
        found.append(hashes.sha256(file))
        hashes.save()
    assert len(hashed) == 2
    assert found[0] == found[1] != found[2] == found[3]


def test_a_torn_cache_of_hashes_is_made_anew(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "runs"), write_lines(tmp_path / "x.jsonl", chat_records(3))
    for content in (b"", b"{", b"{}"):
        store.fingerprints_file().parent.mkdir(parents=True, exist_ok=True)
        store.fingerprints_file().write_bytes(content)
        hashes = fingerprints.FileHashes(store)
        assert len(hashes.sha256(file)) == 64
        hashes.save()


def test_an_error_knows_its_exit_code_in_another_process() -> None:
    import pickle

    for kind in PackcliError.__subclasses__():
        again = pickle.loads(pickle.dumps(kind("cause", "fix")))
        assert (again.cause, again.fix, again.exit_code) == ("cause", "fix", kind.exit_code)
    codes = sorted(kind.exit_code for kind in PackcliError.__subclasses__())
    assert codes == [2, 3, 4, 5, 6, 7, 75, 130]


def test_a_task_with_no_room_for_its_answers_is_told_after_training(
    tiny_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tiny_sweep(
        model={"config": {"model_type": "llama", "max_position_embeddings": 128}},
        eval={"tasks": ["tiny_copy", "needle_4k"]},
    )
    planned = stages.make_plan(sweepfile.load(path), Store(tmp_path / "runs"))
    told = stages.preflight(planned, Store(tmp_path / "runs"))
    assert [str(one) for one in told] == ["task `needle_4k` fills 4096 tokens, this model holds 128"]
