"""The head's chunked loss against plain cross entropy over whole logits."""

from __future__ import annotations

import copy
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from packcli.errors import ConfigError, MissingError
from packcli.model import head
from packcli.model.collate import Batch

CPU = torch.device("cpu")


class Model(torch.nn.Module):
    """A head and a config: all that the loss asks of a model."""

    def __init__(
        self, vocab: int, dim: int, *, bias: bool = False, dtype: torch.dtype = torch.float32, **config: Any
    ):
        super().__init__()
        self.lm_head = torch.nn.Linear(dim, vocab, bias=bias, dtype=dtype)
        torch.nn.init.normal_(self.lm_head.weight)
        text = SimpleNamespace(model_type="test", **config)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head


def batch_of(slots: int, labels: int, vocab: int, weights: list[float] | None = None) -> Batch:
    """`labels` of `slots`, at distinct slots in mixed order."""
    none = torch.zeros(1, slots, dtype=torch.int64)
    return Batch(
        none,
        none,
        (slots,),
        torch.randperm(slots)[:labels],
        torch.randint(vocab, (labels,)),
        None if weights is None else torch.tensor(weights),
    )


def whole(model: Any, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The definition: all logits of all slots, then those with a label."""
    shape = head.shaping(model.config)
    logits = model.get_output_embeddings()(hidden) * shape.scale
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if shape.cap is not None:
        logits = shape.cap * torch.tanh(logits / shape.cap)
    each = F.cross_entropy(logits[batch.predict], batch.labels, reduction="none")
    return each.sum() if batch.weights is None else each @ batch.weights.to(each.dtype)


def results(function: Any, model: Any, hidden: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """Loss and its gradients by hidden states and by the head's parameters."""
    leaf = hidden.detach().requires_grad_()
    loss = function(model, leaf, batch)
    # An upstream gradient that is not 1, as dividing by the step's labels makes it.
    gradients = torch.autograd.grad(loss * 0.37, [leaf, *model.lm_head.parameters()])
    return [loss.detach(), *gradients]


def exact(model: Any, hidden: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """The definition's results in float64."""
    return results(whole, copy.deepcopy(model).double(), hidden.double(), batch)


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], scale: float = 0.0) -> None:
    """To 1e-6 of the largest element, or of `scale` where that is larger."""
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other.double()).abs().max()
        assert error <= 1e-6 * max(scale, other.abs().max())


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`chunks(size, vocab)`: so many labels at once."""
    return lambda size, vocab: monkeypatch.setitem(head.CHUNK_BYTES, "cpu", size * vocab * 4)


@pytest.mark.parametrize("size", [1, 5, 7, 22, 23, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"final_logit_softcapping": 3.0}, {"logit_scale": 0.25}, {"logits_scaling": 8.0}]
)
def test_chunks_that_do_not_divide_the_labels_change_nothing(
    chunks: Any, size: int, bias: bool, config: dict[str, float]
) -> None:
    torch.manual_seed(size)
    model, hidden, batch = Model(50, 16, bias=bias, **config), torch.randn(40, 16), batch_of(40, 23, 50)
    chunks(size, 50)
    assert_close(results(head.loss, model, hidden, batch), exact(model, hidden, batch))


@given(
    weights=st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=30).filter(lambda some: max(some) > 1e-3),
    size=st.integers(1, 31),
    vocab=st.integers(2, 40),
    seed=st.integers(0, 1000),
)
def test_every_label_counts_its_weight(weights: list[float], size: int, vocab: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, hidden, batch = Model(vocab, 8), torch.randn(33, 8), batch_of(33, len(weights), vocab, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head.CHUNK_BYTES, "cpu", size * vocab * 4)
        # A label that is nearly certain has a gradient that is nearly nothing, the difference of two near 1.
        largest = max(float(tensor.abs().max()) for tensor in (hidden, model.lm_head.weight.detach()))
        assert_close(results(head.loss, model, hidden, batch), exact(model, hidden, batch), max(weights) * largest)


@pytest.mark.parametrize("config", [{}, {"final_logit_softcapping": 2.0, "logit_scale": 0.5}])
def test_gradients_are_those_of_finite_differences(chunks: Any, config: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = Model(7, 5, bias=True, dtype=torch.float64, **config)
    batch = batch_of(9, 6, 7, [0.5, 1, 2, 0.1, 3, 1])
    chunks(2, 14)  # float64: twice the bytes
    leaves = (torch.randn(9, 5, dtype=torch.float64, requires_grad=True), *model.lm_head.parameters())
    assert torch.autograd.gradcheck(lambda hidden, *_: head.loss(model, hidden, batch), leaves)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(chunks: Any, dtype: torch.dtype) -> None:
    vocab, labels = 1000, 400
    model, batch = Model(vocab, 8, dtype=dtype), batch_of(500, labels, vocab)
    chunks(32, vocab)
    hidden = torch.randn(500, 8, dtype=dtype)
    with Largest() as seen:
        results(head.loss, model, hidden, batch)
    assert seen.elements == 32 * vocab
    with Largest() as seen:
        results(whole, model, hidden, batch)
    assert seen.elements == 500 * vocab


def test_validation_does_no_gradient_work(chunks: Any) -> None:
    model, hidden, batch = Model(50, 16), torch.randn(40, 16), batch_of(40, 23, 50)
    chunks(5, 50)
    ran: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Names():
        loss = head.loss(model, hidden.requires_grad_(), batch)
    assert ran.count("mm") == 5  # one product a chunk, not three
    assert "zeros_like" not in ran
    assert_close([loss], [whole(model, hidden, batch).detach()])


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    model, hidden, batch = Model(50, 16), torch.randn(40, 16, requires_grad=True), batch_of(40, 23, 50)
    model.requires_grad_(False)
    with Largest() as seen:
        head.loss(model, hidden, batch).backward()
    assert model.lm_head.weight.grad is None
    assert seen.elements == 23 * 50  # logits of labels; the transposed weight has 16 x 50
    expected = torch.autograd.grad(whole(model, hidden, batch), hidden)
    assert hidden.grad is not None
    assert_close([hidden.grad], list(expected))


@pytest.mark.parametrize("kind", ["own", "liger"])
def test_a_batch_without_labels_still_takes_part_in_the_backward_pass(kind: head.Kind) -> None:
    model, hidden = Model(50, 16, bias=True), torch.full((4, 16), torch.inf, requires_grad=True)
    loss = head.loss(model, hidden, batch_of(4, 0, 50), kind)
    loss.backward()
    assert float(loss.detach()) == 0
    for tensor in (hidden, *model.lm_head.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_tied_embeddings_get_the_gradient_of_both_uses() -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(50, 16)
    model = Model(50, 16)
    model.lm_head.weight = embedding.weight
    batch, ids = batch_of(40, 23, 50), torch.randint(50, (40,))
    found, expected = (
        torch.autograd.grad(function(model, torch.tanh(embedding(ids)), batch), embedding.weight)
        for function in (head.loss, whole)
    )
    assert_close(list(found), list(expected))


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_in_bfloat16_the_error_is_at_most_twice_that_of_whole_logits(chunks: Any, how: str) -> None:
    torch.manual_seed(0)
    model, hidden, batch = Model(300, 64), torch.randn(200, 64), batch_of(200, 130, 300)
    model.lm_head.weight.data = (model.lm_head.weight.data / 8).bfloat16().float()
    hidden = hidden.bfloat16().float()
    reference = exact(model, hidden, batch)
    chunks(17, 300)
    if how == "weights":
        model, hidden = model.bfloat16(), hidden.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        ours, plain = (results(function, model, hidden, batch) for function in (head.loss, whole))
    assert ours[0].dtype == torch.float32
    assert [one.dtype for one in ours] == [one.dtype for one in plain]
    for one, other, true in zip(ours, plain, reference, strict=True):
        # The loss has one rounding of fp32 at least.
        allowed = 2 * (other - true).abs().max() + 1e-6 * true.abs().max()
        assert (one - true).abs().max() <= allowed


SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
SHAPED = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 0.1},
    "gemma3_text": {"final_logit_softcapping": 0.1},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 8.0},
    "nanochat": {"final_logit_softcapping": 0.1},
}


@pytest.mark.parametrize("kind", SHAPED)
def test_logits_are_shaped_as_the_model_itself_shapes_them(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **SHAPED[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(1, 60, (1, 30))
    with torch.no_grad():
        hidden, logits = model.base_model(input_ids=ids).last_hidden_state[0], model(input_ids=ids).logits[0]
        batch = batch_of(30, 20, 60)
        expected = F.cross_entropy(logits[batch.predict].float(), batch.labels, reduction="sum")
        assert_close([head.loss(model, hidden, batch)], [expected])


def test_a_head_with_an_adapter_is_refused_and_not_trained_without_it() -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    with_adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ConfigError, match="not a plain linear layer"):
        head.check(with_adapter, "own", weighted=False, device=CPU)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    without = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    head.check(without, "own", weighted=True, device=CPU)


def test_liger_is_refused_before_training_where_it_cannot_do_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    with pytest.raises(ConfigError, match="needs a GPU"):
        head.check(Model(5, 2), "liger", weighted=False, device=CPU)
    with pytest.raises(ConfigError, match="cannot weight labels"):
        head.check(Model(5, 2), "liger", weighted=True, device=cuda)
    with pytest.raises(ConfigError, match="cannot scale logits"):
        head.check(Model(5, 2, logit_scale=0.1), "liger", weighted=False, device=cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="no package liger_kernel and triton"):
        head.check(Model(5, 2), "liger", weighted=False, device=cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    head.check(Model(5, 2, final_logit_softcapping=3.0), "liger", weighted=False, device=cuda)


class LigerStub(torch.autograd.Function):
    """The signature, and what it returns, of liger-kernel 0.8.5, with the sum of cross entropies inside."""

    @staticmethod
    def forward(
        ctx: Any,
        _input: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        bias: torch.Tensor | None = None,
        ce_weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        ce_impl: Any = None,
        ce_mode: Any = None,
        chunk_mem_const: int = 1,
    ) -> Any:
        assert ce_weight is None
        assert (lse_square_scale, label_smoothing, return_z_loss) == (0.0, 0.0, False)
        assert accum_dtype is torch.float32
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (_input, weight)]
            logits = leaves[0] @ leaves[1].T
            if bias is not None:
                logits = logits + bias.detach()
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            loss = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
            ctx.save_for_backward(*torch.autograd.grad(loss, leaves))
        return loss.detach(), None, None, None

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        by_input, by_weight = ctx.saved_tensors
        gradients = (by_input * upstream[0], by_weight * upstream[0], *[None] * 16)
        return gradients[: len(ctx.needs_input_grad)]


@pytest.mark.parametrize("config", [{}, {"final_logit_softcapping": 3.0}])
def test_liger_gets_its_arguments_in_its_own_order(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, float]
) -> None:
    name = "liger_kernel.ops.fused_linear_cross_entropy"
    module = ModuleType(name)
    module.LigerFusedLinearCrossEntropyFunction = LigerStub  # type: ignore[attr-defined]
    for part in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    torch.manual_seed(0)
    model, hidden, batch = Model(50, 16, **config), torch.randn(40, 16), batch_of(40, 23, 50)
    with_liger = results(lambda *given: head.loss(*given, "liger"), model, hidden, batch)
    assert_close(with_liger, results(whole, model, hidden, batch))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["own", "liger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_each_head_keeps_the_error_rule(
    monkeypatch: pytest.MonkeyPatch, kind: head.Kind, dtype: torch.dtype
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if kind == "liger":
        pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    vocab, dim, slots, labels = 32_000, 512, 3_000, 1_111
    model, batch = Model(vocab, dim).cuda(), batch_of(slots, labels, vocab).to(torch.device("cuda"))
    hidden = torch.randn(slots, dim, device="cuda").bfloat16().float()
    model.lm_head.weight.data = (model.lm_head.weight.data / dim**0.5).bfloat16().float()
    reference = exact(model, hidden, batch)
    monkeypatch.setitem(head.CHUNK_BYTES, "cuda", 200 * vocab * 4)
    model, hidden = model.to(dtype), hidden.to(dtype)
    ours = results(lambda *given: head.loss(*given, kind), model, hidden, batch)
    plain = results(whole, model, hidden, batch)
    for one, other, true in zip(ours, plain, reference, strict=True):
        allowed = 2 * (other.double() - true).abs().max() + 1e-5 * true.abs().max()
        assert (one.double() - true).abs().max() <= allowed
