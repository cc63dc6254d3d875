"""The training half: equal objectives under every layout and split, and runs that end where they would have."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from training import LLAMA, MAX_LENGTH, Data, arm, assert_close, gradients, one_step, stop_after

from packcli import batching, packing, stages
from packcli.config import ARMS, ArmSpec, ModelSpec, TrainSpec
from packcli.data import index as indexes
from packcli.data.index import Index
from packcli.errors import IntegrityError, PreemptedError, RunError
from packcli.files import read_jsonl
from packcli.model import load
from packcli.model.collate import Batch, collate
from packcli.plan import TrainOrder
from packcli.store import normalized
from packcli.train import loop, loss, optim

# The objective ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["best_fit", "padding_free"])
def test_packing_with_a_document_mask_does_not_change_loss_or_any_gradient(data: Data, layout: str) -> None:
    model = data.model()
    packed, padded = data.index(layout), data.index("padding")
    rows = list(range(min(12, packed.rows.num_rows)))
    documents = {
        int(d) for r in rows for d in packed.rows.document[packed.rows.offsets[r] : packed.rows.offsets[r + 1]]
    }
    alone = [
        r for r in range(padded.rows.num_rows) if int(padded.rows.document[padded.rows.offsets[r]]) in documents
    ]
    assert len(documents) == len(alone) >= len(rows)
    one = gradients(model, [data.batch(layout, rows)])
    other = gradients(model, [data.batch("padding", [row]) for row in alone])
    assert_close(one, other)


@pytest.mark.parametrize("name", ["padding", "random", "best_fit"])
def test_splitting_a_step_into_micro_batches_does_not_change_its_gradient(tiny: Data, name: str) -> None:
    model, rows = tiny.model(), list(range(6))
    whole = gradients(model, [tiny.batch(name, rows)])
    split = gradients(model, [tiny.batch(name, rows[:1]), tiny.batch(name, rows[1:4]), tiny.batch(name, rows[4:])])
    assert_close(split, whole)


def test_case_19_a_micro_batch_without_labels_adds_no_loss_and_no_gradient(tiny: Data) -> None:
    """Of a rank without rows, and of rows in which all is masked: no 0 / 0."""
    model, none = tiny.model(), torch.zeros(0, dtype=torch.int64)
    empty = collate(tiny.tokens, tiny.index("best_fit"), [], arm("best_fit"), MAX_LENGTH, 0)
    masked = replace(tiny.batch("best_fit", [0, 1]), predict=none, labels=none)
    for batch in (empty, masked):
        summed = model(batch)
        summed.backward()
        assert float(summed.detach()) == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["token", "document"])
@pytest.mark.parametrize("layout", ["best_fit", "padding_free", "longalign"])
def test_a_step_of_the_same_documents_has_one_gradient_in_every_layout(tiny: Data, layout: str, kind: str) -> None:
    """The claim packcli rests on, through the step that training takes: weights, divisor and all."""

    def order(name: str) -> TrainOrder:
        found = tiny.train_order(name, f"layout-{name}")
        return found.model_copy(update={"arm": found.arm.model_copy(update={"loss": kind})})

    packed, padded, rows = tiny.index(layout), tiny.index("padding"), np.arange(7)
    pieces = packed.rows.document[: packed.rows.offsets[7]]
    alone = np.flatnonzero(np.isin(padded.rows.document, pieces))
    assert len(alone) == len(pieces)
    assert_close(one_step(tiny.store, order(layout), rows), one_step(tiny.store, order("padding"), alone))


def test_the_micro_batch_loss_is_the_rule_of_the_released_code(tiny: Data) -> None:
    """8 rows, 2 GPUs, 2 rows a micro-batch: the mean of four token means, dealt as a distributed sampler does.

    (transformers' model computes a micro-batch's token mean, its Trainer their mean over accumulation, DDP that
    over ranks.) Worked out by hand from each row's own loss.
    """
    order = tiny.train_order("padding_released", "worked", micro_batch=2, ranks=2)
    index, trainee = tiny.index("padding_released"), tiny.model()
    sums, labels = [], []
    for row in range(8):
        batch = tiny.batch("padding_released", [row])
        sums.append(float(trainee(batch).detach()))
        labels.append(len(batch.labels))
    means = [
        (sums[0] + sums[2]) / (labels[0] + labels[2]),  # GPU 0
        (sums[4] + sums[6]) / (labels[4] + labels[6]),
        (sums[1] + sums[3]) / (labels[1] + labels[3]),  # GPU 1
        (sums[5] + sums[7]) / (labels[5] + labels[7]),
    ]
    assert len(set(labels)) > 2  # else every rule gives the same
    found, _ = one_step(tiny.store, order, np.arange(8))
    assert found == pytest.approx(sum(means) / 4, rel=1e-6)
    assert found != pytest.approx(sum(sums) / sum(labels), rel=1e-4)
    assert index.supervised[:8].tolist() == labels


@pytest.mark.parametrize("name", list(ARMS))
def test_labels_of_the_index_and_of_the_batches_are_the_same_tokens(tiny: Data, name: str) -> None:
    rows = tiny.index(name)
    for row in range(min(40, rows.rows.num_rows)):
        batch = tiny.batch(name, [row])
        assert len(batch.labels) == rows.supervised[row]
        assert torch.equal(batch.input_ids[0, batch.predict + 1], batch.labels)
        assert sum(batch.segments) == batch.num_slots
        longest = min(-(-rows.tokens[row] // 8) * 8, MAX_LENGTH)
        slots = {"none": rows.tokens[row], "longest": longest, "max_length": MAX_LENGTH}
        assert batch.num_slots == slots[arm(name).pad_to]


# Batches and rates --------------------------------------------------------------------------------------


def fake_index(documents: list[int]) -> Index:
    """Rows in which the given numbers of documents start, ten tokens each."""
    count = np.asarray(documents, np.int64)
    offsets = np.concatenate([[0], np.cumsum(np.maximum(count, 1))])
    pieces = np.arange(offsets[-1])
    rows = packing.Rows(document=pieces, start=pieces * 0, stop=pieces * 0 + 10, offsets=offsets)
    return Index(
        rows, np.maximum(count, 1) * 10, 0 * count, count, np.maximum(count, 1) * 5, np.array([0, len(count)])
    )


def plan_steps(index: Index, spec: TrainSpec, seed: int) -> list[np.ndarray]:
    return batching.run_steps(index.sizes, spec, "shuffled", seed)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(lambda counts: sum(counts) > 0),
    st.integers(1, 12),
    st.sampled_from(["rows", "documents", "tokens"]),
    st.integers(1, 3),
)
def test_every_row_comes_once_an_epoch_and_no_step_is_empty(
    documents: list[int], global_batch: int, unit: str, epochs: int
) -> None:
    index = fake_index(documents)
    spec = TrainSpec.model_validate({"epochs": epochs, "lr": 1, "global_batch": global_batch, "batch_unit": unit})
    steps = plan_steps(index, spec, seed=3)
    assert all(len(step) for step in steps)
    order = np.concatenate(steps).reshape(epochs, -1)
    assert all(sorted(epoch) == list(range(len(documents))) for epoch in order.tolist())
    weights = {"rows": np.ones(len(documents), int), "documents": index.documents, "tokens": index.tokens}[unit]
    reached = np.cumsum([weights[step].sum() for step in steps])
    lasts = np.array([weights[step[-1]] for step in steps])
    # Each step but the last crosses a multiple of the batch with its last row, and not before.
    for total, last in list(zip(reached, lasts, strict=True))[:-1]:
        assert total // global_batch > (total - last) // global_batch


def test_a_step_budget_gives_exactly_that_many_steps() -> None:
    for unit in ("rows", "documents", "tokens"):
        spec = TrainSpec.model_validate({"steps": 57, "lr": 1, "global_batch": 7, "batch_unit": unit})
        assert len(plan_steps(fake_index([3, 1, 0, 5, 2]), spec, seed=0)) == 57


def test_a_token_budget_stops_at_the_row_that_reaches_it() -> None:
    spec = TrainSpec.model_validate({"tokens": 95, "lr": 1, "global_batch": 1})
    rows = np.concatenate(plan_steps(fake_index([1] * 4), spec, seed=0))
    assert len(rows) == 10


def test_padding_and_padding_free_see_the_same_order(tiny: Data) -> None:
    spec = TrainSpec.model_validate({"epochs": 2, "lr": 1, "global_batch": 5})
    one, other = (plan_steps(tiny.index(name), spec, seed=1) for name in ("padding", "padding_free"))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 99), min_size=1, max_size=60),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from(["rows", "tokens"]),
)
def test_sorted_batches_hold_every_row_once_an_epoch_and_rows_of_like_length(
    lengths: list[int], global_batch: int, epochs: int, unit: str
) -> None:
    tokens = np.array(lengths, np.int64)
    sizes = batching.Sizes(tokens, np.ones_like(tokens), np.array([0, len(tokens)]))
    budget = batching.Budget(epochs=epochs)
    steps = batching.steps(sizes, budget, global_batch=global_batch, unit=unit, seed=1, order="sorted")
    stream = np.concatenate(steps).reshape(epochs, -1)
    assert all(sorted(epoch) == list(range(len(lengths))) for epoch in stream.tolist())
    if unit == "rows" and len(tokens) % global_batch == 0:
        for step in steps:  # nothing outside a batch lies between its shortest and its longest row
            outside = np.setdiff1d(np.arange(len(tokens)), step)
            low, high = tokens[step].min(), tokens[step].max()
            assert not ((tokens[outside] > low) & (tokens[outside] < high)).any()


def test_each_epoch_is_packed_anew_and_each_holds_every_document_once(tiny: Data) -> None:
    index = tiny.index("best_fit", epochs=3)
    spec = TrainSpec.model_validate({"epochs": 3, "lr": 1, "global_batch": 1})
    steps = np.concatenate(plan_steps(index, spec, seed=0))
    packed = []
    for epoch in range(3):
        first, last = index.blocks[epoch : epoch + 2]
        assert sorted(steps[first:last]) == list(range(first, last))
        own = index.epoch(epoch).rows
        packed.append({frozenset(own.document[a:b].tolist()) for a, b in pairwise(own.offsets)})
    documents = [sorted(d for row in rows for d in row) for rows in packed]
    assert documents[0] == documents[1] == documents[2]
    assert packed[0] != packed[1] != packed[2]


@pytest.mark.parametrize("name", ["padding", "best_fit", "random"])
@pytest.mark.parametrize("kind", ["document", "row", "micro_batch"])
def test_each_loss_weighs_what_its_name_says(tiny: Data, name: str, kind: str) -> None:
    model, index, rows = tiny.model(), tiny.index(name), np.arange(5)
    weighting = loss.weighting(kind, index, indexes.Labels(tiny.tokens))
    parts = [rows[:2], rows[2:]]
    total = 0.0
    for part in parts:
        batch = collate(tiny.tokens, index, part.tolist(), arm(name), MAX_LENGTH, 0, weighting.pieces)
        total += float(model(batch).detach()) * weighting.scale(part, index.supervised)
    found = total / weighting.divisor(rows, parts, index.supervised)

    def mean(batch: Batch) -> float:
        return float(model(batch).detach()) / max(1, len(batch.labels))

    if kind == "row":
        wanted = np.mean([mean(tiny.batch(name, [row])) for row in rows.tolist()])
    elif kind == "micro_batch":
        wanted = np.mean([mean(tiny.batch(name, part.tolist())) for part in parts])
    elif name == "padding":  # one document a row
        wanted = np.mean([mean(tiny.batch(name, [row])) for row in rows.tolist()])
    else:
        wanted = document_loss(tiny, model, index, rows, arm(name)) / index.documents[rows].sum()
    assert found == pytest.approx(wanted, rel=1e-5)


def document_loss(data: Data, model: torch.nn.Module, index: Index, rows: np.ndarray, arm_: ArmSpec) -> float:
    """Sum over the documents in these rows of their loss there over their labels in the whole epoch."""
    totals = np.zeros(data.tokens.num_documents)
    per_piece = indexes.supervised(index.rows, indexes.Labels(data.tokens))
    np.add.at(totals, index.rows.document, per_piece)
    total = 0.0
    for row in rows.tolist():
        batch = collate(data.tokens, index, [row], arm_, MAX_LENGTH, 0)
        pieces = range(index.rows.offsets[row], index.rows.offsets[row + 1])
        owner = np.repeat([totals[index.rows.document[piece]] for piece in pieces], [per_piece[p] for p in pieces])
        batch = replace(batch, weights=torch.tensor(1 / owner, dtype=torch.float32))
        total += float(model(batch).detach())
    return total


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 5))
def test_ranks_have_equally_many_micro_batches_and_share_all_rows(rows: int, world: int, micro: int) -> None:
    costs = np.arange(rows)[::-1].astype(float)
    shares = batching.spread(np.arange(rows), costs, world, micro)
    assert len({len(share) for share in shares}) == 1
    assert sorted(np.concatenate([part for share in shares for part in share]).tolist()) == list(range(rows))


@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.2}, {"warmup_steps": 10}])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_are_those_of_transformers(schedule: str, warmup: dict[str, float]) -> None:
    from transformers import get_scheduler

    spec = TrainSpec.model_validate({"steps": 50, "lr": 0.3, "global_batch": 1, "schedule": schedule, **warmup})
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, adamw, num_warmup_steps=10, num_training_steps=50)
    for step in range(50):
        assert optim.lr_at(step, 50, 0.3, spec) == pytest.approx(adamw.param_groups[0]["lr"], abs=1e-12)
        adamw.step()
        theirs.step()


# Whole runs ---------------------------------------------------------------------------------------------


def test_a_finished_run_is_a_checkpoint_that_transformers_loads(tiny: Data) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    manifest = stages.train(tiny.train_order("best_fit", "whole"), tiny.store)
    final = tiny.store.final("whole")
    model, info = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop in GenerationConfig.from_pretrained(final).eos_token_id
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert manifest.results["steps"] == 8
    assert manifest.results["random_weights"] is True
    isolation = manifest.results["isolation"]
    assert (isolation["expected"], isolation["crosses"], isolation["backend"]) == ("document", False, "sdpa")
    assert math.isfinite(manifest.results["validation_loss"])
    losses = [record["loss"] for record in read_jsonl(tiny.store.metrics("whole"))]
    assert losses[-1] < losses[0]


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_resumed_run_ends_bitwise_where_an_uninterrupted_one_does(tiny: Data) -> None:
    whole = tiny.train_order("random", "uninterrupted", save_every=3)
    stages.train(whole, tiny.store)
    broken = whole.model_copy(update={"id": "interrupted"})
    note = stop_after(5)
    with pytest.raises(note.error):  # type: ignore[attr-defined]
        stages.train(broken, tiny.store, note)
    assert [step for step, _ in tiny.store.checkpoints("interrupted")] == [3]
    stages.train(broken, tiny.store)
    assert files(tiny.store.final("interrupted")) == files(tiny.store.final("uninterrupted"))
    one, other = (
        [normalized(record) for record in read_jsonl(tiny.store.metrics(id_))]
        for id_ in ("interrupted", "uninterrupted")
    )
    assert one == other
    assert not tiny.store.checkpoints("interrupted")


def test_a_resumed_run_drops_the_same_activations_as_an_uninterrupted_one(tiny: Data) -> None:
    whole = tiny.train_order("best_fit", "dropout-whole", save_every=3)
    config = {**LLAMA, "attention_dropout": 0.3}
    whole = whole.model_copy(update={"model": ModelSpec(config=config, tokenizer="train", vocab_size=600)})
    stages.train(whole, tiny.store)
    note = stop_after(4)
    broken = whole.model_copy(update={"id": "dropout-broken"})
    with pytest.raises(note.error):  # type: ignore[attr-defined]
        stages.train(broken, tiny.store, note)
    stages.train(broken, tiny.store)
    assert files(tiny.store.final("dropout-broken")) == files(tiny.store.final("dropout-whole"))


def test_a_run_from_a_checkpoint_directory_starts_from_its_weights(tiny: Data) -> None:
    first = tiny.train_order("best_fit", "pretrained")
    stages.train(first, tiny.store)
    final = tiny.store.final("pretrained")
    order = tiny.train_order("best_fit", "fine-tuned", lr=1e-9, steps=1)
    order = order.model_copy(update={"model": ModelSpec(name=str(final))})
    manifest = stages.train(order, tiny.store)
    assert manifest.results["random_weights"] is False
    one, other = (load_file(path / "model.safetensors") for path in (final, tiny.store.final("fine-tuned")))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_a_short_shard_is_refused_before_training(tmp_path: Path) -> None:
    data = Data(tmp_path, "tiny", 30)
    order = data.train_order("padding", "short")
    shard = data.store.shard("tokens", 0)
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(IntegrityError, match=r"shard-00000\.arrow: [\d,]+ bytes, not"):
        stages.train(order, data.store)


def test_case_18_a_non_finite_loss_stops_before_the_update_and_names_the_documents(tiny: Data) -> None:
    order = tiny.train_order("padding", "diverged", lr=1e30, clip=None, warmup_ratio=0)
    with pytest.raises(RunError, match=r"step \d+: loss .*Documents: tiny:\d+"):
        stages.train(order, tiny.store)
    failure = json.loads(tiny.store.failure_file("train", "diverged").read_bytes())
    assert "no update was made" in failure["cause"]
    assert tiny.store.state("train", "diverged") == "failed"
    assert not tiny.store.final("diverged").exists()


def test_sigterm_writes_a_checkpoint_at_a_step_boundary(tiny: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    order = tiny.train_order("best_fit", "preempted")

    def note(done: int, total: int, remark: str) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError):
        stages.train(order, tiny.store, note)
    [(step, _)] = tiny.store.checkpoints("preempted")
    assert step == 3
    stages.train(order, tiny.store)
    assert tiny.store.state("train", "preempted") == "done"


def test_case_32_weights_that_do_not_match_their_config_are_refused_by_key(tiny: Data, tmp_path: Path) -> None:
    from packcli.errors import ConfigError

    model = copy.deepcopy(tiny.model())
    model.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"do not match its config.* missing keys, first `model\.layers\.2"):
        load.load(ModelSpec(name=str(tmp_path)), None, tiny.tokenizer, MAX_LENGTH, 0)


def test_a_context_too_short_for_the_rows_is_refused(tiny: Data) -> None:
    from packcli.errors import ConfigError

    spec = ModelSpec(config={**LLAMA, "max_position_embeddings": 64}, tokenizer="train", vocab_size=600)
    with pytest.raises(ConfigError, match="positions for 64 tokens"):
        load.load(spec, None, tiny.tokenizer, MAX_LENGTH, 0)


def test_metrics_count_the_slots_each_layout_computes(tiny: Data) -> None:
    stages.train(tiny.train_order("padding", "slots-padding", steps=2), tiny.store)
    stages.train(tiny.train_order("padding_free", "slots-free", steps=2), tiny.store)
    padded, free = (tiny.store.manifest("train", id_) for id_ in ("slots-padding", "slots-free"))
    assert padded is not None
    assert free is not None
    assert padded.results["slots"] == 2 * 4 * MAX_LENGTH
    assert free.results["slots"] == free.results["tokens"] == padded.results["tokens"]
    assert loop.Progress().step == 0
