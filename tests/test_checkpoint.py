"""Checkpoints: whole or ignored, verified before they are read, and never the last good one deleted."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from training import Data, stop_after

from packcli import stages
from packcli.config import EvalSpec
from packcli.errors import IntegrityError, MissingError, PreemptedError
from packcli.files import read_json, read_jsonl
from packcli.plan import EvalOrder, TrainOrder
from packcli.report import progress
from packcli.store import MANIFEST, verify
from packcli.train import checkpoint, faults, loop


def interrupted(data: Data, id_: str, step: int, **settings: Any) -> TrainOrder:
    """A run that was killed after `step`."""
    order = data.train_order("best_fit", id_, **settings)
    note = stop_after(step)
    with pytest.raises(note.error):  # type: ignore[attr-defined]
        stages.train(order, data.store, note)
    return order


def steps(data: Data, id_: str) -> list[int]:
    return [step for step, _ in data.store.checkpoints(id_)]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def losses(data: Data, id_: str) -> list[float]:
    return [record["loss"] for record in read_jsonl(data.store.metrics(id_))]


@pytest.mark.parametrize("background", [False, True], ids=["at_once", "in_the_background"])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tiny: Data, background: bool) -> None:
    whole = tiny.train_order("best_fit", f"whole-{background}")
    stages.train(whole, tiny.store)
    order = interrupted(tiny, f"cut-{background}", 5, save_every=2, async_save=background)
    assert 4 in steps(tiny, order.id) or background  # the last one may still have been in the making
    stages.train(order, tiny.store)
    assert losses(tiny, order.id) == losses(tiny, whole.id)


def test_a_checkpoint_says_where_it_stands_and_whose_it_is(tiny: Data) -> None:
    order = interrupted(tiny, "position", 5, save_every=2)
    path = tiny.store.checkpoint(order.id, 4)
    assert verify(path) >= 3
    assert read_json(path / MANIFEST)["train"] == order.id
    progress = read_json(tiny.store.progress(path))
    assert (progress["step"], progress["epoch"]) == (4, 0)
    assert progress["row"] == 4 * order.train.global_batch


def test_case_21_a_checkpoint_that_was_not_finished_is_named_and_deleted(
    tiny: Data, caplog: pytest.LogCaptureFixture
) -> None:
    order = interrupted(tiny, "unfinished", 5, save_every=2)
    half = tiny.store.checkpoint(order.id, 6)
    shutil.copytree(tiny.store.checkpoint(order.id, 4), half)
    (half / MANIFEST).unlink()
    with caplog.at_level("INFO", "packcli"):
        stages.train(order, tiny.store)
    assert "checkpoint-6 was not finished: it is deleted" in caplog.text
    assert "goes on from step 4 of 8" in caplog.text
    assert losses(tiny, order.id)[4:]
    assert len(losses(tiny, order.id)) == 8


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_case_22_a_damaged_checkpoint_is_refused_and_the_one_before_taken_only_when_asked(
    tiny: Data, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tiny.train_order("best_fit", f"undamaged-{damage}")
    stages.train(whole, tiny.store)
    order = interrupted(tiny, f"damaged-{damage}", 5, save_every=2, keep_last=2)
    shard = next(tiny.store.checkpoint(order.id, 4).glob("*.distcp"))
    match damage:
        case "flipped":
            flip(shard)
        case "short":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "missing":
            shard.unlink()
    with pytest.raises(IntegrityError, match=shard.name) as caught:
        stages.train(order, tiny.store)
    assert "--allow-fallback" in caught.value.fix
    with caplog.at_level("INFO", "packcli"):
        stages.train(order, tiny.store, fallback=True)
    assert f"{shard.name}: " in caplog.text
    assert "going on from the checkpoint before it" in caplog.text
    assert "goes on from step 2 of 8" in caplog.text
    assert losses(tiny, order.id) == losses(tiny, whole.id)


def test_case_23_the_only_verified_checkpoint_survives_one_that_cannot_be_written(
    tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 30 too: the disk fills while the second checkpoint is written."""
    order = tiny.train_order("best_fit", "full-disk", save_every=2, keep_last=1)
    save = checkpoint.dcp.save

    def full(state: Any, *, checkpoint_id: Path, **options: Any) -> Any:
        if checkpoint_id.name == "checkpoint-4":
            checkpoint_id.mkdir()
            (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(state, checkpoint_id=checkpoint_id, **options)

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(MissingError, match="disk is full"):
        stages.train(order, tiny.store)
    assert steps(tiny, order.id) == [2]
    assert verify(tiny.store.checkpoint(order.id, 2))
    monkeypatch.undo()
    stages.train(order, tiny.store)
    assert len(losses(tiny, order.id)) == 8


def test_case_30_a_disk_too_small_for_a_checkpoint_is_seen_before_the_first_byte(
    tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = tiny.train_order("best_fit", "small-disk", save_every=2)
    monkeypatch.setattr(type(tiny.store), "free_bytes", lambda self: 1000)
    with pytest.raises(MissingError, match="1,000 are free"):
        stages.train(order, tiny.store)
    assert not steps(tiny, order.id)


def test_case_30_an_error_in_the_background_stops_the_training(
    tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = tiny.train_order("best_fit", "full-aside", save_every=2, async_save=True)

    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(MissingError, match="disk is full"):
        stages.train(order, tiny.store)
    assert len(losses(tiny, order.id)) <= 4


@pytest.mark.parametrize("writer", ["write_json", "write_sealed"], ids=["progress", "manifest"])
def test_case_30_a_disk_that_fills_after_the_tensors_leaves_half_a_checkpoint(
    tiny: Data, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = tiny.train_order("best_fit", f"full-{writer}", save_every=2)
    write = getattr(checkpoint, writer)

    def full(path: Path, value: Any) -> None:
        if path.parent.name == "checkpoint-4":
            raise MissingError(f"{path}: the disk is full (0 bytes free)")
        write(path, value)

    monkeypatch.setattr(checkpoint, writer, full)
    with pytest.raises(MissingError, match="disk is full"):
        stages.train(order, tiny.store)
    assert steps(tiny, order.id) == [2]


def test_case_30_an_unfinished_checkpoint_fills_the_disk_for_every_retry(
    tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = interrupted(tiny, "no-room", 3, save_every=2)
    half, store = tiny.store.checkpoint(order.id, 4), tiny.store
    shutil.copytree(store.checkpoint(order.id, 2), half)
    (half / MANIFEST).unlink()
    full = lambda self: 1000 if half.exists() and not store.is_whole(half) else 10**9  # noqa: E731
    monkeypatch.setattr(type(store), "free_bytes", full)
    assert stages.train(order, store).results["steps"] == 8


def test_after_a_fallback_new_checkpoints_are_deleted_as_older_than_the_damaged_one(tiny: Data) -> None:
    order = interrupted(tiny, "fallen-back", 5, save_every=2, keep_last=2)
    flip(next(tiny.store.checkpoint(order.id, 4).glob("*.distcp")))
    train = order.train.model_copy(update={"keep_last": 1, "save_every": 1})
    note = stop_after(4)
    with pytest.raises(note.error):  # type: ignore[attr-defined]
        stages.train(order.model_copy(update={"train": train}), tiny.store, note, fallback=True)
    assert steps(tiny, order.id) == [3]
    stages.train(order, tiny.store)  # needs no fallback


def test_a_writer_of_a_checkpoint_outlives_the_lock_of_its_training(
    tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.dcp.save

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return save(*arguments, **options)

    monkeypatch.setattr(checkpoint.dcp, "save", slow)
    monkeypatch.setattr(checkpoint, "_LAST_WRITE_S", 0.01)
    order = interrupted(tiny, "slow-writer", 3, save_every=2, async_save=True)
    assert tiny.store.is_whole(tiny.store.checkpoint(order.id, 2))


# Between the last step and the manifest -------------------------------------------------------------------


class Killed(BaseException):
    """As a kill would: nothing is cleaned up after it."""


def test_a_run_killed_between_its_last_step_and_its_commit_begins_anew(
    tiny: Data, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    order = tiny.train_order("best_fit", "killed-late", save_every=3)

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    monkeypatch.setattr(type(tiny.store), "commit", killed)
    with pytest.raises(Killed):
        stages.train(order, tiny.store)
    monkeypatch.undo()
    assert steps(tiny, order.id) == [6]
    kept = read_jsonl(tiny.store.metrics(order.id))[:6]
    with caplog.at_level("INFO", "packcli"):
        manifest = stages.train(order, tiny.store)
    assert "goes on from step 6 of 8" in caplog.text
    assert read_jsonl(tiny.store.metrics(order.id))[:6] == kept  # with their times: none was done again
    assert not [name for name in manifest.outputs if name.startswith("checkpoint-")]
    assert steps(tiny, order.id) == []


def test_a_stop_while_a_run_validates_costs_all_since_its_last_checkpoint(
    tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = tiny.train_order("best_fit", "stopped-validating", save_every=None)
    validate = loop.validation_loss

    def stopped(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "validation_loss", stopped)
        with pytest.raises(PreemptedError, match="stopped at step 8 of 8"):
            stages.train(order, tiny.store)
    assert steps(tiny, order.id) == [8]
    kept = read_jsonl(tiny.store.metrics(order.id))
    assert stages.train(order, tiny.store).results["validation_loss"] > 0
    assert read_jsonl(tiny.store.metrics(order.id)) == kept
    assert steps(tiny, order.id) == []


def test_validation_takes_more_memory_than_any_step(tiny: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    order = tiny.train_order("best_fit", "validated", steps=1, micro_batch=1)
    collate, slots = loop.collate, list[int]()

    def counted(*arguments: Any) -> Any:
        batch = collate(*arguments)
        slots.append(batch.num_slots)
        return batch

    monkeypatch.setattr(loop, "collate", counted)
    stages.train(order, tiny.store)
    assert len(slots) > 1
    assert max(slots) <= order.max_length


def test_a_stop_that_comes_while_a_run_commits_kills_it(tiny: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    order, commit = tiny.train_order("best_fit", "stopped-late", steps=2), tiny.store.commit

    def stopped(*arguments: Any, **options: Any) -> Any:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        return commit(*arguments, **options)

    monkeypatch.setattr(tiny.store, "commit", stopped)
    assert stages.train(order, tiny.store).results["steps"] == 2


@pytest.mark.parametrize("when", ["before", "half_way"])
def test_a_run_killed_after_its_commit_keeps_its_checkpoints_for_ever(
    tiny: Data, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, store = tiny.train_order("best_fit", f"killed-{when}", save_every=3, keep_last=2), tiny.store

    def killed(self: Any, train: str) -> None:
        if when == "half_way":
            newest = store.checkpoint(train, 6)
            newest.rename(newest.with_name(f".{newest.name}.tmp-here-1-0"))
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "clear_checkpoints", killed)
        with pytest.raises(Killed):
            stages.train(order, store)
    directory = store.directory("train", order.id)
    assert len(list(directory.glob("*checkpoint-*"))) == 2
    manifest = store.manifest("train", order.id)
    assert manifest is not None
    assert verify(directory) == len(manifest.outputs)
    assert not [name for name in manifest.outputs if "checkpoint-" in name]
    stages.tidy([("index", order.index), ("train", order.id)], store)
    assert list(directory.glob("*checkpoint-*")) == []
    assert verify(directory) == len(manifest.outputs)


# Writers that know nothing of full disks ------------------------------------------------------------------


def test_case_30_a_disk_that_fills_under_the_log_of_a_run_is_called_a_bug(
    tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = tiny.train_order("best_fit", "full-log", steps=2)
    monkeypatch.setattr(
        loop.journal, "truncate", lambda store, id_, *_: store.metrics(id_).symlink_to("/dev/full")
    )
    with pytest.raises(MissingError, match="the disk is full"):
        stages.train(order, tiny.store)


def test_case_30_a_disk_that_fills_under_the_final_weights_is_called_a_bug(
    tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = tiny.train_order("best_fit", "full-weights", steps=4, save_every=3)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(loop.load, "save", full)
    with pytest.raises(MissingError, match="the disk is full"):
        stages.train(order, tiny.store)
    assert steps(tiny, order.id) == [3]
    with pytest.raises(SafetensorError, match="other"), faults.disk(Path()):
        raise SafetensorError("other")


def test_case_25_a_checkpoint_of_another_training_is_never_taken_for_ones_own(tiny: Data) -> None:
    """A changed setting is another id, so its own directory; what is copied there by hand is refused."""
    order = interrupted(tiny, "with-one-lr", 5, save_every=4)
    other = tiny.train_order("best_fit", "with-another-lr", lr=0.5)
    shutil.copytree(tiny.store.checkpoint(order.id, 4), tiny.store.checkpoint(other.id, 4))
    with pytest.raises(IntegrityError, match="another training"):
        stages.train(other, tiny.store)


def test_case_31_checkpoints_are_named_by_step_whatever_the_clock_says(
    tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(loop.time, "time", lambda: float(next(clock)))
    order = interrupted(tiny, "clock", 7, save_every=2, keep_last=3)
    assert steps(tiny, order.id) == [6, 4, 2]


def test_case_31_a_clock_that_jumps_makes_no_speed_negative_or_absurd(
    tiny: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back by a year and forth again at each look; only in provenance does anybody read it."""
    year = 31_536_000.0
    looks = itertools.count()
    monkeypatch.setattr(loop.time, "time", lambda: 1.8e9 - year * (next(looks) % 2))
    order = interrupted(tiny, "jumps", 7, save_every=2)
    for since_s in (0.0, 1.8e9 - year):
        there = progress.training(order, tiny.store, 8, since_s)
        assert there.done == 7
        assert 0 < (there.left_s or 0) < 60
        assert 0 < (there.useful_tokens_per_s or 0) < 1e7
    assert progress.training(order, tiny.store, 8, since_s=4e9).left_s is None, "of an attempt yet to come"
    stages.train(order, tiny.store)
    for record in read_jsonl(tiny.store.metrics(order.id)):
        assert 0 < record["step_s"] < 60
        assert record["useful_tokens_per_s"] == pytest.approx(record["tokens"] / record["step_s"])


def test_results_are_made_of_metrics_that_changed_while_the_run_was_interrupted(tiny: Data) -> None:
    order = interrupted(tiny, "edited", 5, save_every=4)
    path = tiny.store.metrics(order.id)
    lines = path.read_bytes().splitlines(keepends=True)
    for changed in ([*lines[:2], *lines[3:]], [b"{" + lines[0], *lines[1:]], []):
        path.write_bytes(b"".join(changed))
        with pytest.raises(IntegrityError, match=r"metrics.jsonl: its first 4 lines are not those"):
            stages.train(order, tiny.store)
    path.write_bytes(b"".join(lines[:4]) + b'{"step": 5, "torn')
    assert stages.train(order, tiny.store).results["steps"] == 8


def test_case_18_no_checkpoint_is_saved_from_a_diverged_state(tiny: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    order = tiny.train_order("best_fit", "diverged", save_every=1, keep_last=9)
    backward = loop.Objective.backward

    def diverging(self: Any, trainee: Any, chosen: Any) -> tuple[float, int]:
        mean, slots = backward(self, trainee, chosen)
        return (float("nan") if (tiny.store.checkpoint("diverged", 3)).exists() else mean), slots

    monkeypatch.setattr(loop.Objective, "backward", diverging)
    with pytest.raises(Exception, match="step 4: loss nan"):
        stages.train(order, tiny.store)
    assert steps(tiny, order.id) == [3, 2, 1]
    failure = json.loads(tiny.store.failure_file("train", order.id).read_text())
    assert "no update was made" in failure["cause"]
    assert "Documents:" in failure["cause"]


def test_case_43_a_damaged_pickle_in_a_checkpoint_is_never_opened(tiny: Data) -> None:
    """DCP unpickles `.metadata`: a changed one must be refused before that."""
    order = interrupted(tiny, "pickle", 5, save_every=4)
    metadata = tiny.store.checkpoint(order.id, 4) / ".metadata"
    canary = Path(metadata.parent.parent) / "canary"
    metadata.write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(IntegrityError, match="metadata"):
        stages.train(order, tiny.store)
    assert not canary.exists()


def test_a_model_whose_bytes_changed_is_neither_scored_nor_trained_on(tiny: Data) -> None:
    order = tiny.train_order("best_fit", "rotten", steps=2)
    stages.train(order, tiny.store)
    weights = tiny.store.final(order.id) / "model.safetensors"
    flip(weights)
    scoring = EvalOrder(
        id="rotten-score", train=order.id, task="tiny_copy", protocol="p", eval=EvalSpec(tasks=("tiny_copy",))
    )
    with pytest.raises(IntegrityError, match=weights.name):
        next(stages.evaluate([scoring], tiny.store, None))  # type: ignore[arg-type]
    on_top = tiny.train_order("best_fit", "on-rotten").model_copy(update={"base": order.id})
    with pytest.raises(IntegrityError, match=weights.name):
        stages.train(on_top, tiny.store)


def test_bfloat16_moments_are_right_on_average_where_rounding_to_nearest_stands_still() -> None:
    from packcli.train.optim import stochastic

    torch.manual_seed(0)
    value = torch.full((200_000,), 1.0 + 2**-10)  # an eighth of the way to the next bfloat16
    assert torch.equal(value.to(torch.bfloat16).float(), torch.ones_like(value))
    rounded = stochastic(value).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded.mean()) == pytest.approx(1.0 + 2**-10, abs=5e-5)
    assert float(stochastic(-value).float().mean()) == pytest.approx(-1.0 - 2**-10, abs=5e-5)


def test_lean_adamw_follows_adamw() -> None:
    from packcli.config import TrainSpec
    from packcli.train.optim import optimizer

    torch.manual_seed(0)
    target, start = torch.randn(64, 64), torch.randn(64, 64)
    ends = {}
    for state in ("float32", "bfloat16"):
        spec = TrainSpec(steps=1, lr=1e-2, global_batch=1, weight_decay=0.01, optimizer_state=state)
        module = torch.nn.Linear(64, 64, bias=False)
        module.weight.data = start.clone()
        adamw = optimizer(module, spec, fused=False)
        for _ in range(200):
            ((module.weight - target) ** 2).mean().backward()
            adamw.step()
            adamw.zero_grad()
        ends[state] = float(((module.weight.detach() - target) ** 2).mean())
    assert ends["bfloat16"] == pytest.approx(ends["float32"], rel=0.1)
    assert ends["float32"] < 0.5  # from 2
