"""Every attention backend computes the same thing, and nothing but it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import create_mask as dense_of
from transformers import AttentionMaskInterface, AutoConfig

from packcli.errors import ConfigError
from packcli.model import attention, backends
from packcli.model.attention import Backend, Segments

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SDPA = Backend("sdpa", "", "")
LENGTHS = (7, 1, 200, 64, 3, 70, 1)


def visible(lengths: tuple[int, ...], window: int | None = None) -> torch.Tensor:
    """[N, N] bool, from the definition."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner[None, :]).tril()
    return mask if window is None else mask & mask.new_ones(mask.shape).triu(1 - window)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    softcap: float | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """[1, N, H, D]: softmax over all pairs, masked."""
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    scores = q @ k.transpose(2, 3) * (scale or q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def qkv(slots: int, *, heads: int = 4, groups: int = 2, dim: int = 8) -> list[torch.Tensor]:
    """Laid out as a model's projections leave them: [1, N, H, D] transposed."""
    torch.manual_seed(0)
    sizes = (heads, heads // groups, heads // groups)
    return [torch.randn(1, slots, size, dim).transpose(1, 2).requires_grad_() for size in sizes]


def check(segments: Segments, *, window: int | None = None, softcap: float | None = None, groups: int = 2) -> None:
    """Values and gradients of our function against the definition."""
    inputs = qkv(sum(segments.lengths), groups=groups)
    out, _ = attention.forward(
        torch.nn.Identity(), *inputs, None, segments=segments, scaling=0.3, sliding_window=window, softcap=softcap
    )
    wanted = reference(*inputs, visible(segments.lengths, window), softcap, 0.3)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=2e-6)
    direction = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((x * direction).sum(), inputs) for x in (out, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


# SDPA, the reference ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=8),
    st.sampled_from([1, 2]),
    st.sampled_from([None, 1, 5, 64]),
    st.sampled_from([None, 2.0]),
)
def test_attention_by_segment_equals_one_dense_block_mask(
    lengths: list[int], groups: int, window: int | None, softcap: float | None
) -> None:
    check(Segments(tuple(lengths), SDPA, CPU), window=window, softcap=softcap, groups=groups)


@pytest.mark.parametrize("window", [None, 5])
def test_segments_of_one_length_are_one_batched_call(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Segments((20,) * 6, SDPA, CPU), window=window)
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        backends.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    attention.forward(torch.nn.Identity(), *qkv(120), None, segments=Segments((20,) * 6, SDPA, CPU))
    assert len(calls) == 1


def test_short_neighbours_share_a_call_and_long_documents_go_without_a_mask() -> None:
    sizes, masks = Segments((30, 30, 30, 65, 2), SDPA, CPU).runs(None)
    assert sizes == [60, 30, 65, 2]
    assert [mask is None for mask in masks] == [False, True, True, True]


def test_a_window_counts_the_slot_itself_as_transformers_does() -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    theirs = sliding_window_causal_mask_function(4)
    slots = torch.arange(12)
    wanted = theirs(0, 0, slots[:, None], slots[None, :])
    [mask] = Segments((12,), SDPA, CPU).runs(4)[1]
    assert torch.equal(mask, wanted)


# flash-attn and varlen, through functions of exactly their signature -----------------------------------------


def by_bounds(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, **asked: Any
) -> torch.Tensor:
    """What a varlen kernel computes, [N, H, D] as they take it. It trusts nothing but its arguments."""
    assert bounds.dtype == torch.int32
    lengths = bounds.diff()
    assert (lengths >= 0).all()
    assert int(lengths.sum()) == len(q)
    assert int(lengths.max()) <= longest
    left, right = asked["window_size"]
    assert right in (0, -1, None)
    window = None if left in (-1, None) else left + 1
    mask = visible(tuple(int(n) for n in lengths if n), window)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return reference(q, k, v, mask, asked.get("softcap") or None, asked["scale"])[0]


SEEN: list[dict[str, Any]] = []


def _fa(q: Any, k: Any, v: Any, bounds: Any, longest: Any, given: dict[str, Any]) -> torch.Tensor:
    assert given["causal"]
    SEEN.append(given)
    return by_bounds(
        q, k, v, bounds, longest, window_size=given["window_size"], softcap=given["softcap"], scale=given["scale"]
    )


def flash_2(  # flash-attn 2.8.3, flash_attn/flash_attn_interface.py
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    given = {"causal": causal, "window_size": window_size, "softcap": softcap, "scale": softmax_scale}
    return _fa(
        q, k, v, cu_seqlens_q, max_seqlen_q, {**given, "deterministic": deterministic, "dropout": dropout_p}
    )


def flash_3(  # Dao-AILab/flash-attention 01afd16, hopper/flash_attn_interface.py
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Any = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    given = {"causal": causal, "window_size": window_size, "softcap": softcap, "scale": softmax_scale}
    return _fa(q, k, v, cu_seqlens_q, max_seqlen_q, {**given, "deterministic": deterministic})


def flash_4(  # flash-attn-4 4.0.0b36, flash_attn/cute/interface.py
    q: Any,
    k: Any,
    v: Any,
    qv: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    min_seqlen_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    gather_kv_indices: Any = None,
    page_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (None, None),
    learnable_sink: Any = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Any = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    block_sparse_tensors: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: Any = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: Any = None,
) -> Any:
    given = {"causal": causal, "window_size": window_size, "softcap": softcap, "scale": softmax_scale}
    out = _fa(q, k, v, cu_seqlens_q, max_seqlen_q, {**given, "deterministic": deterministic})
    return out, None  # it returns the log-sum-exp, asked or not


def varlen_2_11(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    assert window_size[1] == 0  # anything else would look ahead
    return by_bounds(query, key, value, cu_seq_q, max_q, window_size=window_size, scale=scale)


def varlen_2_13(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
) -> Any:
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
FUNCTIONS = {2: flash_2, 3: flash_3, 4: flash_4}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend a GPU of a compute capability and which flash-attn generations are installed."""

    def pretend(capability: tuple[int, int], *generations: int, triton: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        find = attention.importlib.util.find_spec
        monkeypatch.setattr(
            attention.importlib.util,
            "find_spec",
            lambda name: find("torch") if triton or name != "triton" else None,
        )
        for generation, name in MODULES.items():
            module = ModuleType(name)
            if generation in generations:
                module.flash_attn_varlen_func = FUNCTIONS[generation]  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)

    return pretend


def use_varlen(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    monkeypatch.setattr(backends, "VARLEN_ACCEPTS", frozenset(inspect.signature(function).parameters))


@pytest.fixture(autouse=True)
def _forget() -> None:
    SEEN.clear()


def stubbed(backend: Backend) -> Backend:
    """On this machine, in float32, so that values compare."""
    return Backend(backend.name, backend.version, backend.why, backend.deterministic, None, backend.flash)


@pytest.mark.parametrize("generation", [2, 3, 4])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 2.0)])
def test_flash_attn_of_every_generation_gets_what_it_needs(
    machine: Callable[..., None], generation: int, window: int | None, softcap: float | None
) -> None:
    machine((9, 0), generation)
    chosen = attention.choose("flash", CUDA, torch.bfloat16, deterministic=True)
    assert chosen.version.startswith(f"{generation} (")
    assert chosen.dtype == torch.bfloat16
    check(Segments(LENGTHS, stubbed(chosen), CPU), window=window, softcap=softcap)
    assert SEEN[0]["deterministic"]


@pytest.mark.parametrize("function", [varlen_2_11, varlen_2_13])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("groups", [1, 2])
def test_varlen_of_every_torch_gets_what_it_needs(
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., Any],
    window: int | None,
    groups: int,
) -> None:
    machine((9, 0))
    use_varlen(monkeypatch, function)
    chosen = attention.choose("varlen", CUDA, torch.bfloat16)
    check(Segments(LENGTHS, stubbed(chosen), CPU), window=window, groups=groups)


def test_half_precision_kernels_get_half_precision_even_from_float32_norms(machine: Callable[..., None]) -> None:
    machine((8, 0), 2)
    chosen = attention.choose("flash", CUDA, torch.bfloat16)
    out, _ = attention.forward(torch.nn.Identity(), *qkv(12), None, segments=Segments((12,), chosen, CPU))
    assert out.dtype == torch.bfloat16


def test_dropout_reaches_the_kernel_in_training_only(machine: Callable[..., None]) -> None:
    machine((8, 0), 2)
    segments = Segments((12,), stubbed(attention.choose("flash", CUDA, torch.bfloat16)), CPU)
    for module in (torch.nn.Identity(), torch.nn.Identity().eval()):
        attention.forward(module, *qkv(12), None, segments=segments, dropout=0.25)
    assert [seen["dropout"] for seen in SEEN] == [0.25, 0.0]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_bounds_say_the_lengths_and_take_few_shapes(lengths: list[int]) -> None:
    segments = Segments(tuple(lengths), Backend("varlen", "", ""), CPU)
    assert [n for n in segments.bounds.diff().tolist() if n] == lengths
    assert segments.bounds.dtype == torch.int32
    assert segments.longest >= max(lengths)
    for number in (len(segments.bounds), segments.longest):
        assert number & (number - 1) == 0


def test_batches_of_other_lengths_do_not_compile_a_layer_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.library.custom_op("packcli_test::varlen", mutates_args=())
    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int
    ) -> torch.Tensor:
        return by_bounds(q, k, v, bounds, longest, window_size=(-1, 0), scale=None).contiguous()

    kernel.register_fake(lambda q, k, v, bounds, longest: q.new_empty(q.shape))
    use_varlen(monkeypatch, lambda q, k, v, a, b, m, n, *, scale, window_size: kernel(q, k, v, a, m))
    counter = CompileCounter()
    layer = torch.compile(attention.forward, backend=counter, fullgraph=True)
    module, inputs = torch.nn.Identity(), [tensor.detach() for tensor in qkv(96)]
    for lengths in ((96,), (40, 56), (1,) * 9 + (87,), (32, 32, 32)):
        out, _ = layer(module, *inputs, None, segments=Segments(lengths, Backend("varlen", "", ""), CPU))
        torch.testing.assert_close(out, reference(*inputs, visible(lengths)), rtol=1e-5, atol=2e-6)
    assert counter.frame_count == 1


# flex ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(1,), (128,), (7, 1, 300, 128, 20), (256, 256), (500,)])
@pytest.mark.parametrize("window", [None, 1, 130, 200])
def test_the_block_mask_is_that_of_all_pairs(lengths: tuple[int, ...], window: int | None) -> None:
    segments = Segments(lengths, Backend("flex", "", ""), CPU, (None, window))
    mask, slots = segments.masks[window], sum(lengths)
    wanted = visible(lengths, window)
    assert torch.equal(dense_of(mask.mask_mod, 1, 1, slots, slots, device="cpu")[0, 0], wanted)
    theirs = create_block_mask(lambda b, h, q, k: wanted[q, k], None, None, slots, slots, device="cpu")
    # A block this one calls partial may be full (in the last row); never the reverse, and none is missing.
    assert torch.equal(mask.to_dense().bool() | theirs.to_dense().bool(), mask.to_dense().bool())
    count = mask.full_kv_num_blocks[0, 0]
    for row, number in enumerate(count.tolist()):
        for block in mask.full_kv_indices[0, 0, row, :number].tolist():
            assert wanted[row * 128 : (row + 1) * 128, block * 128 : (block + 1) * 128].all()
    assert int(mask.kv_num_blocks.sum() + count.sum()) == int(
        theirs.kv_num_blocks.sum() + theirs.full_kv_num_blocks.sum()
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 2.0)])
def test_flex_computes_the_same_values(window: int | None, softcap: float | None) -> None:
    segments = Segments(LENGTHS, Backend("flex", "", ""), CPU, (None, window))
    inputs = [tensor.detach() for tensor in qkv(sum(LENGTHS), dim=16)]
    out, _ = attention.forward(
        torch.nn.Identity(), *inputs, None, segments=segments, sliding_window=window, softcap=softcap
    )
    wanted = reference(*inputs, visible(LENGTHS, window), softcap)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=2e-6)


# The choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "installed", "generation"),
    [
        ((9, 0), (2, 3, 4), 3),
        ((9, 0), (2, 4), 4),
        ((9, 0), (2,), 2),
        ((10, 0), (2, 3, 4), 4),
        ((10, 0), (2, 3), 2),
        ((8, 0), (2, 3, 4), 2),
        ((12, 0), (2, 4), 2),
    ],
)
def test_the_newest_flash_attn_that_fits_the_gpu_is_taken(
    machine: Callable[..., None], capability: tuple[int, int], installed: tuple[int, ...], generation: int
) -> None:
    machine(capability, *installed)
    chosen = attention.choose("auto", CUDA, torch.bfloat16)
    assert (chosen.name, chosen.version[0]) == ("flash", str(generation))


def test_auto_goes_down_to_what_can_run_and_says_why(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine((9, 0))
    use_varlen(monkeypatch, varlen_2_11)
    chosen = attention.choose("auto", CUDA, torch.bfloat16)
    assert (chosen.name, chosen.why) == ("varlen", "flash-attn is not installed")
    chosen = attention.choose("auto", CUDA, torch.float32)
    assert (chosen.name, chosen.why) == ("flex", "computes in bfloat16 or float16, not in float32")
    machine((9, 0), triton=False)
    assert attention.choose("auto", CUDA, torch.float32).name == "sdpa"
    assert attention.choose("auto", CPU, torch.float32).why == "no GPU"
    machine((7, 5))
    assert attention.choose("auto", CUDA, torch.float16).name == "flex"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "gemma2"}, "flex"),
        ({"model_type": "llama"}, "varlen"),
        ({"model_type": "llama", "attention_dropout": 0.1}, "sdpa"),
        ({"model_type": "deepseek_v3"}, "flex"),
        ({"model_type": "gpt_neox", "hidden_size": 1024, "num_attention_heads": 2}, "flex"),
    ],
)
def test_a_backend_that_lacks_what_the_model_needs_is_passed_over(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], name: str
) -> None:
    machine((9, 0))
    use_varlen(monkeypatch, varlen_2_13)
    parsed = AutoConfig.for_model(**config)
    assert attention.choose("auto", CUDA, torch.bfloat16, config=parsed).name == name


def test_a_flash_attn_without_a_deterministic_backward_is_not_taken_for_one(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def old(  # flash-attn 2.4.0
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Any = (-1, -1),
        alibi_slopes: Any = None,
        return_attn_probs: bool = False,
    ) -> None: ...

    monkeypatch.setitem(FUNCTIONS, 2, old)
    machine((8, 0), 2)
    assert attention.choose("flash", CUDA, torch.bfloat16).name == "flash"
    with pytest.raises(ConfigError, match="flash-attn 2 has no `deterministic`"):
        attention.choose("flash", CUDA, torch.bfloat16, deterministic=True)


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "cause"),
    [
        ("flash", CPU, torch.bfloat16, "no GPU"),
        ("flash", CUDA, torch.bfloat16, "flash-attn is not installed"),
        ("flash", CUDA, torch.float32, "not in float32"),
        ("varlen", CPU, torch.float32, "no GPU"),
        ("flex", CPU, torch.float32, "no GPU"),
    ],
)
def test_a_backend_that_cannot_run_here_is_refused_with_what_to_do(
    machine: Callable[..., None], wanted: str, device: torch.device, dtype: torch.dtype, cause: str
) -> None:
    machine((9, 0))
    with pytest.raises(ConfigError, match=f"attention_backend: {wanted}.*{cause}") as raised:
        attention.choose(wanted, device, dtype)
    assert "auto" in raised.value.fix


# What would change the result ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ({"s_aux": torch.zeros(4)}, "asks for `s_aux`"),
        ({"is_causal": False}, "asks for `is_causal`"),
        ({"some_bias": torch.zeros(4)}, "asks for `some_bias`"),
        ({"segments": None}, "does not hand `segments` on"),
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, "makes a mask of its own"),
    ],
)
def test_what_would_change_the_result_is_refused_not_ignored(given: dict[str, Any], cause: str) -> None:
    given = {"segments": Segments((12,), SDPA, CPU), "attention_mask": None, **given}
    with pytest.raises(ConfigError, match=cause):
        attention.forward(torch.nn.Identity(), *qkv(12), **given)


def test_attention_in_chunks_is_refused() -> None:
    with pytest.raises(ConfigError, match="attends in chunks"):
        attention.windows(AutoConfig.for_model("llama4_text"))


def test_no_mask_is_made_and_no_device_waited_for() -> None:
    """A name registered for masks would make transformers look for packed rows in the positions, and wait."""
    assert attention.NAME not in AttentionMaskInterface._global_mapping


# On a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "varlen", "flex", "sdpa"])
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_on_a_gpu_err_no_more_than_twice_what_sdpa_does(
    name: str, window: int | None, groups: int, softcap: float | None, deterministic: bool
) -> None:
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    if softcap is not None and name == "varlen":
        pytest.skip("varlen has no softcap")
    try:
        backend = attention.choose(name, device, dtype, deterministic=deterministic)
    except ConfigError as error:
        pytest.skip(error.cause)
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        inputs = [t.detach().to(device) for t in qkv(sum(LENGTHS), heads=8, groups=groups, dim=64)]
        direction = torch.randn(1, sum(LENGTHS), 8, 64, device=device)

        def run(backend: Backend, dtype: torch.dtype) -> list[torch.Tensor]:
            leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
            segments = Segments(LENGTHS, backend, device, (None, window))
            out, _ = attention.forward(
                torch.nn.Identity(), *leaves, None, segments=segments, sliding_window=window, softcap=softcap
            )
            found = torch.autograd.grad((out.float() * direction).sum(), leaves)
            return [out.detach().double(), *(gradient.double() for gradient in found)]

        exact, plain = run(SDPA, torch.float32), run(SDPA, dtype)
        ours = run(backend, dtype)
        for found, half, wanted in zip(ours, plain, exact, strict=True):
            assert (found - wanted).abs().max() <= 2 * (half - wanted).abs().max() + 1e-5
        if deterministic:
            assert all(torch.equal(a, b) for a, b in zip(ours, run(backend, dtype), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
