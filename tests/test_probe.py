"""The start-up probe lets through what holds, and refuses each way in which it may not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training import BACKEND, CPU, LLAMA, MAX_LENGTH, Data, arm
from transformers import AutoConfig, AutoModelForCausalLM

from packcli.errors import RunError
from packcli.model import attention, backends, head, probe
from packcli.model.attention import Segments
from packcli.model.collate import Batch, collate
from packcli.model.trainee import Trainee


def trainee(model_type: str = "llama", **changes: Any) -> Trainee:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**LLAMA, "vocab_size": 97, "model_type": model_type, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    with torch.no_grad():  # weights of 0.02 would leave attention nearly uniform, and faults of it small
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return Trainee(model, BACKEND)


# What the arms ask for ---------------------------------------------------------------------------------------


def test_positions_are_not_what_keeps_documents_apart(tiny: Data) -> None:
    """RoPE is relative: running positions under a document mask must give the same loss as reset ones."""
    model = tiny.model()
    batch = tiny.batch("best_fit", [0, 1, 2])
    running = Batch(
        batch.input_ids,
        torch.arange(batch.num_slots)[None] % MAX_LENGTH,
        batch.segments,
        batch.predict,
        batch.labels,
    )
    with torch.no_grad():
        assert float(model(running)) == pytest.approx(float(model(batch)), rel=1e-5)


def test_a_causal_pack_attends_across_documents_on_purpose(data: Data) -> None:
    """transformers masks documents by itself when it sees reset positions: then the paper's arms would vanish."""
    model = data.model()
    crossing, masked = arm("greedy"), arm("best_fit")
    rows = data.index("greedy")
    row = int(np.argmax(np.diff(rows.rows.offsets)))
    changed = collate(data.tokens, rows, [row], crossing, MAX_LENGTH, 0)
    isolated = collate(data.tokens, rows, [row], masked, MAX_LENGTH, 0)
    assert torch.equal(changed.input_ids, isolated.input_ids)
    with torch.no_grad():
        assert abs(float(model(changed)) / float(model(isolated)) - 1) > 1e-5
    assert probe.check(model, crossing, len(data.tokenizer)).crosses
    assert not probe.check(model, masked, len(data.tokenizer)).crosses


@pytest.mark.parametrize("attention_", ["document", "causal"])
@pytest.mark.parametrize("positions", ["reset", "continue"])
def test_every_mix_of_attention_and_positions_passes(attention_: str, positions: str) -> None:
    asked = arm("best_fit").model_copy(update={"attention": attention_, "positions": positions})
    found = probe.check(trainee(), asked, 97)
    assert found.crosses == (attention_ == "causal")
    assert found.parity is not None
    assert 0 < found.parity < probe.TOLERANCE


def test_the_probe_leaves_no_trace() -> None:
    model = trainee(attention_dropout=0.3)
    model.train()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    found = probe.check(model, arm("best_fit"), 97)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert model.model.config._attn_implementation == attention.NAME
    assert not model.model.get_input_embeddings()._forward_hooks
    record = found.record()
    assert (record["backend"], record["device"], record["dtype"]) == ("sdpa", "cpu", "float32")
    assert record == probe.check(model, arm("best_fit"), 97).record()


def test_the_longest_document_passes_the_sliding_window() -> None:
    found = probe.check(trainee("mistral", sliding_window=40), arm("best_fit"), 97)
    assert found.window == 40
    assert max(found.lengths) > 40
    assert 1 in found.lengths


def test_frozen_embeddings_do_not_stop_the_probe() -> None:
    model = trainee()
    model.model.get_input_embeddings().requires_grad_(False)
    assert not probe.check(model, arm("best_fit"), 97).crosses
    assert not model.model.get_input_embeddings().weight.requires_grad


# What is refused ---------------------------------------------------------------------------------------------


def with_segments(monkeypatch: pytest.MonkeyPatch, model: Trainee, change: Any) -> None:
    """The model's layers see other segments than they are given."""
    decoder = model.model.base_model
    original = decoder.forward

    def changed(*args: object, segments: Segments, **kwargs: object) -> object:
        return original(*args, segments=Segments(change(segments.lengths), BACKEND, CPU), **kwargs)

    monkeypatch.setattr(decoder, "forward", changed)


def test_a_leaking_model_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainee()
    with_segments(monkeypatch, model, lambda lengths: (sum(lengths),))
    for name in ("best_fit", "random", "padding"):
        with pytest.raises(RunError, match="another's outputs"):
            probe.check(model, arm(name), 97)


def test_a_causal_arm_whose_documents_never_meet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainee()
    with_segments(monkeypatch, model, lambda lengths: (7, 1, 13, 6, 71) if sum(lengths) == 98 else lengths)
    with pytest.raises(RunError, match="never meet"):
        probe.check(model, arm("random"), 97)


class _Smeared(torch.autograd.Function):
    """Right forward, leaking backward: each slot's gradient goes to the slot before as well."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient + gradient.roll(-1, 2)


def test_a_kernel_that_leaks_only_in_its_backward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backends.sdpa
    monkeypatch.setattr(backends, "sdpa", lambda *args, **options: _Smeared.apply(real(*args, **options)))
    with pytest.raises(RunError, match="gradient by another's inputs"):
        probe.check(trainee(), arm("best_fit"), 97)


def test_a_kernel_whose_gradients_depend_on_the_packing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backends.sdpa

    def off(*args: Any, sizes: Any, **options: Any) -> torch.Tensor:
        out = real(*args, sizes=sizes, **options)
        return out if len(sizes) == 1 else out * 1.001

    monkeypatch.setattr(backends, "sdpa", off)
    monkeypatch.setattr(attention, "_TOGETHER", 0)
    with pytest.raises(RunError, match="packed batch are off by"):
        probe.check(trainee(), arm("random"), 97)


@pytest.mark.parametrize(
    ("model_type", "config", "change"),
    [
        ("mistral", {"sliding_window": 8}, {"window": 9}),
        ("gemma2", {"sliding_window": 8, "head_dim": 8, "attn_logit_softcapping": 2.0}, {"softcap": None}),
        ("llama", {}, {"scale": 0.5}),
    ],
)
def test_attention_that_is_not_the_models_own_is_refused(
    monkeypatch: pytest.MonkeyPatch, model_type: str, config: dict[str, Any], change: dict[str, Any]
) -> None:
    """Packed and unpacked runs agree, both wrong."""
    model = trainee(model_type, **config)
    assert probe.check(model, arm("best_fit"), 97).attention < 1e-6
    real = attention._compute

    def changed(q: Any, k: Any, v: Any, segments: Any, options: Any) -> torch.Tensor:
        window = change.get("window", options.window) if options.window else None
        return real(q, k, v, segments, options._replace(**{**change, "window": window}))

    monkeypatch.setattr(attention, "_compute", changed)
    with pytest.raises(RunError, match="transformers' own attention"):
        probe.check(model, arm("best_fit"), 97)


def test_a_head_that_forgets_to_scale_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainee("granite", logits_scaling=4.0)
    probe.check(model, arm("best_fit"), 97)
    monkeypatch.setattr(head, "shaping", lambda config: head.Shaping())
    with pytest.raises(RunError, match="cross entropy of the model's own logits"):
        probe.check(model, arm("best_fit"), 97)


def test_a_balance_loss_is_refused() -> None:
    model = trainee("mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    with pytest.raises(RunError, match="output_router_logits"):
        probe.check(model, arm("best_fit"), 97)


def test_a_non_finite_gradient_is_no_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainee()
    with torch.no_grad():
        model.model.base_model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="start-up probe"):
        probe.check(model, arm("best_fit"), 97)


# Half precision ----------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Trainee) -> Trainee:
    """In bfloat16 over float32 masters, as training has it."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["best_fit", "random"])
@pytest.mark.parametrize("tied", [True, False])
def test_half_precision_is_held_against_a_float32_run_of_the_same_weights(name: str, tied: bool) -> None:
    model = sharded(trainee(tie_word_embeddings=tied))
    found = probe.check(model, arm(name), 97)
    assert found.dtype == "bfloat16"
    assert found.parity is not None
    assert found.parity_unpacked is not None
    assert 1e-5 < found.parity <= 2 * found.parity_unpacked < 0.2
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("one_process")
def test_a_half_precision_kernel_that_is_worse_for_packs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharded(trainee())
    base = probe.check(model, arm("best_fit"), 97).parity_unpacked
    assert base is not None
    real = backends.sdpa

    def rough(*args: Any, sizes: Any, **options: Any) -> torch.Tensor:
        out = real(*args, sizes=sizes, **options)
        return out if len(sizes) == 1 else out * (1 + 20 * base)

    monkeypatch.setattr(backends, "sdpa", rough)
    monkeypatch.setattr(attention, "_TOGETHER", 0)
    with pytest.raises(RunError, match=r"a packed batch errs by .* against float32"):
        probe.check(model, arm("best_fit"), 97)


def test_half_precision_without_a_reference_says_so() -> None:
    model = trainee()
    model.model.to(torch.bfloat16)
    found = probe.check(model, arm("best_fit"), 97)
    assert (found.parity, found.note) == (None, "no float32 reference: the weights are not float32")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "varlen", "flex", "sdpa"])
def test_every_backend_passes_on_a_gpu(name: str) -> None:
    from packcli.errors import ConfigError

    device = torch.device("cuda", 0)
    try:
        backend = attention.choose(name, device, torch.bfloat16)
    except ConfigError as error:
        pytest.skip(error.cause)
    plain = trainee(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = Trainee(plain.model.to(device), backend)
        fully_shard(model, mesh=init_device_mesh("cuda", (1,)), mp_policy=policy)
        for asked in ("best_fit", "random", "padding"):
            assert probe.check(model, arm(asked), 97).parity is not None
    finally:
        dist.destroy_process_group()
