"""Memory of a training, checked against what transformers' layers keep and what torch's tracker counts."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packcli import flops, memory, shapes, sweepfile
from packcli.config import ClusterSpec, LoraSpec, ModelSpec, TrainSpec
from packcli.memory import GIB, Setup

REPO = Path(__file__).resolve().parents[1]
A800 = ClusterSpec(nodes=4, gpus_per_node=8, gpu="A800-80GB")
PAPER = TrainSpec(epochs=4, lr=1e-5, global_batch=128, micro_batch=2)


def llama(size: str) -> flops.Shape:
    found = shapes.shape(ModelSpec(name=f"meta-llama/Meta-Llama-3-{size}"))
    assert found is not None
    return found


def changed(train: TrainSpec, **fields: Any) -> TrainSpec:
    return TrainSpec.model_validate({**train.model_dump(), **fields})


def setup_of(size: str = "8B", *, world: int = 32, degree: int = 32, train: TrainSpec = PAPER) -> Setup:
    shape = llama(size)
    return Setup(shape=shape, train=train, dtype="bfloat16", max_length=4096, world=world, degree=degree)


# Against what others count -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "billions"), [("8B", 8.03), ("70B", 70.55)])
def test_a_packaged_shape_has_the_parameters_of_the_released_model(size: str, billions: float) -> None:
    assert memory.parameters(llama(size)) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_module(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        tie_word_embeddings=tied,
    )
    shape = flops.shape(config.to_dict())
    assert shape is not None
    assert memory.parameters(shape) == sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def kept_by_transformers(dtype: str, *, compiled: bool) -> tuple[float, Setup]:
    """Bytes per slot that autograd keeps of one Llama layer, and the same layer as we describe it."""
    import torch
    from transformers import AttentionInterface, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    def causal(module: Any, q: Any, k: Any, v: Any, mask: Any, **_: Any) -> tuple[torch.Tensor, None]:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("causal", causal)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    config._attn_implementation = "causal"
    slots, kind = 512, getattr(torch, dtype)
    layer = LlamaDecoderLayer(config, 0).to(kind)
    rotary = LlamaRotaryEmbedding(config)(torch.zeros(1, slots, 256, dtype=kind), torch.arange(slots)[None])
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *rotary)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    forward = torch.compile(layer.forward) if compiled else layer.forward
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(torch.randn(1, slots, 256, dtype=kind, requires_grad=True), position_embeddings=rotary)
    total = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in shared)
    shape = flops.shape(config.to_dict())
    assert shape is not None
    train = changed(PAPER, compile=compiled)
    described = dataclasses.replace(setup_of(train=train), shape=shape, dtype=dtype)  # type: ignore[arg-type]
    return total / slots, described


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_tensors_named_are_those_a_layer_keeps(dtype: str) -> None:
    found, described = kept_by_transformers(dtype, compiled=False)
    assert memory.kept_bytes(described, "none") == found


@pytest.mark.slow
def test_the_tensors_named_are_those_a_compiled_layer_keeps() -> None:
    found, described = kept_by_transformers("bfloat16", compiled=True)
    assert memory.kept_bytes(described, "none") == found


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        ("4", "none", "8192", "4096", "14336"),
        ("4", "selective", "8192", "4096", "14336"),
        ("4", "full", "4096", "8192", "28672"),
        ("4", "none", "512", "4096", "14336"),
    ],
    ids=["8B none", "8B selective", "70B full", "few slots"],
)
def test_a_sharded_step_takes_what_torch_counts(case: tuple[str, ...]) -> None:
    command = [sys.executable, str(REPO / "tests" / "tracked.py"), *case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    # Never below by more than what is rounded; above where gradients leave before the next layer's are there.
    assert 0.995 < counted["ours"] / counted["torch"] < 1.07


def test_a_layer_of_8b_keeps_what_is_published() -> None:
    compiled = memory.kept_bytes(setup_of(train=changed(PAPER, compile=True)), "none")
    assert compiled / 1000 == pytest.approx(139, abs=1)
    assert 32 * memory.kept_bytes(setup_of(), "full") / 1e6 == pytest.approx(0.26, abs=0.005)


def test_the_head_takes_the_chunk_of_logits_that_is_counted() -> None:
    from packcli.model import head

    assert head.CHUNK_BYTES["cuda"] == memory.LOGITS_CHUNK_BYTES


# Its own rules -----------------------------------------------------------------------------------------


def test_the_parts_sum_to_the_total_and_say_how() -> None:
    found = memory.estimate(llama("70B"), changed(PAPER, checkpointing="full"), "bfloat16", 4096, A800)
    assert found.total_bytes == pytest.approx(sum(part.bytes for part in found.parts))
    weights = found.parts[0]
    assert weights.bytes / GIB == pytest.approx(70.55e9 * 4 / 32 / GIB, rel=1e-3)
    assert weights.arithmetic.startswith("70.55 B parameters x 4 B / 32 GPUs")


def test_leaner_states_take_half_and_adapters_have_the_only_gradients() -> None:
    def parts(**fields: Any) -> dict[str, float]:
        found = memory.estimate(llama("8B"), changed(PAPER, sharding="full", **fields), "bfloat16", 4096, A800)
        return {part.name: part.bytes for part in found.parts}

    whole, lean = parts(), parts(optimizer_state="bfloat16")
    assert lean["optimizer states"] == whole["optimizer states"] / 2
    lora = parts(lora={"rank": 16, "alpha": 32})
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert lora["gradients"] == adapters * 4 / 32
    assert lora["weights"] == whole["weights"]


def test_lora_adds_what_peft_adds() -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    shape = flops.shape(config.to_dict())
    assert shape is not None
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        wanted = peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(LlamaForCausalLM(config), wanted)
        added = sum(p.numel() for name, p in model.named_parameters() if "lora" in name)
        spec = LoraSpec.model_validate({"rank": 3, "alpha": 1, "targets": targets})
        assert shape.layers * memory.adapter_parameters(shape, spec) == added


def sharded(wanted: str, **fields: Any) -> int:
    asked = {"world": 32, "per_node": 8, "capacity_bytes": 79.1 * GIB, "max_length": 4096, **fields}
    shape = asked.pop("shape", llama("8B"))
    return memory.sharding(wanted, shape, asked.pop("train", PAPER), **asked)  # type: ignore[arg-type]


def test_auto_shards_within_a_node_only_where_that_fits() -> None:
    light = changed(PAPER, checkpointing="selective")
    assert sharded("auto", train=light) == 8
    assert sharded("auto", train=light, capacity_bytes=39.4 * GIB) == 32
    assert sharded("auto", train=light, shape=llama("70B")) == 32
    assert sharded("auto", train=light, shape=None) == 32
    assert sharded("auto", train=light, capacity_bytes=None) == 32


def test_what_is_asked_for_is_done_and_one_node_has_nothing_to_choose() -> None:
    assert sharded("full", train=changed(PAPER, checkpointing="full")) == 32
    assert sharded("hybrid", shape=llama("70B")) == 8
    assert sharded("hybrid", world=4) == 4
    assert sharded("hybrid", world=12) == 12  # nodes of unlike size


def test_a_remedy_fits_and_a_setup_that_fits_has_none() -> None:
    small = ClusterSpec(nodes=1, gpus_per_node=8, gpu="A100-80GB")
    heavy = changed(PAPER, micro_batch=8)
    found = memory.estimate(llama("8B"), heavy, "bfloat16", 4096, small)
    assert found.fits == "no"
    assert [text.split(" (")[0] for text in found.remedies] == [
        "train.micro_batch: 1",
        "train.checkpointing: full",
    ]
    for update in ({"micro_batch": 1}, {"checkpointing": "full"}):
        fixed = memory.estimate(llama("8B"), changed(heavy, **update), "bfloat16", 4096, small)
        assert (fixed.fits, fixed.remedies) == ("yes", ())


def test_a_model_too_large_for_the_cluster_is_told_how_many_gpus_would_do() -> None:
    small = ClusterSpec(nodes=1, gpus_per_node=8, gpu="A100-80GB")
    found = memory.estimate(llama("70B"), PAPER, "bfloat16", 4096, small)
    assert found.micro_batch == 0
    assert [text.split(" (")[0] for text in found.remedies] == [
        "train.micro_batch: 1, train.optimizer_state: bfloat16, train.checkpointing: full, 32 GPUs"
    ]
    lighter = changed(PAPER, micro_batch=1, checkpointing="full")
    found = memory.estimate(llama("70B"), lighter, "bfloat16", 4096, small)
    assert [text.split(" (")[0] for text in found.remedies] == [
        "train.optimizer_state: bfloat16, 32 GPUs",
        "32 GPUs",
    ]
    assert found.total_bytes > memory.CARDS["A100-80GB"][1] * GIB


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    train = changed(PAPER, global_batch=1024)
    found = memory.estimate(llama("8B"), train, "bfloat16", 4096, A800)
    free = (1 - memory.SPARE) * found.capacity_bytes
    for count, fits in ((found.micro_batch, True), (found.micro_batch + 1, False)):
        total = memory.total_bytes(setup_of(train=changed(train, micro_batch=count)))
        assert (total <= free) is fits


def test_a_micro_batch_holds_no_more_rows_than_a_step_has_for_a_gpu() -> None:
    assert memory.total_bytes(setup_of(train=changed(PAPER, micro_batch=64))) == memory.total_bytes(
        setup_of(train=changed(PAPER, micro_batch=4))
    )


@pytest.mark.parametrize("gpu", memory.CARDS)
def test_every_card_has_a_peak(gpu: Any) -> None:
    assert memory.peak_flops(gpu)


@pytest.mark.parametrize("name", ["llama3_8b", "llama3_8b_apart", "llama3_70b"])
def test_the_papers_sweeps_fit_the_papers_cluster(name: str) -> None:
    for _, cell in sweepfile.load(REPO / "sweeps" / f"{name}.yaml").cells:
        shape, cluster = shapes.shape(cell.model), cell.estimate.cluster
        assert shape is not None
        assert cluster is not None
        assert cluster.gpus == cell.train.ranks
        found = memory.estimate(shape, cell.train, cell.model.dtype, cell.data.max_length, cluster)
        assert found.fits == "yes"


def test_a_checkpoint_directory_knows_its_shape(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    found = shapes.shape(ModelSpec(name=str(tmp_path)))
    assert found == flops.shape(config.to_dict())
    (tmp_path / "config.json").write_text("{")
    assert shapes.shape(ModelSpec(name=str(tmp_path))) is None


def test_a_model_nobody_knows_has_no_shape_and_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("nobody/nothing", "./not/there", "a b c"):
        assert shapes.shape(ModelSpec(name=name)) is None


def test_a_dry_run_says_offline_what_70b_takes(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    sweep = REPO / "sweeps" / "llama3_70b.yaml"
    document = run_cli("sweep", sweep, "--dry-run", "--json", cwd=tmp_path).json()
    assert len(document["cells"]) == 12
    for cell in document["cells"]:
        assert cell["memory"]["fits"] == "yes"
        assert cell["memory"]["sharded_over"] == 32
        assert cell["estimate"]["lengths"] == "fitted"
    shown = run_cli("sweep", sweep, "--dry-run", "--set", "estimate.cluster.nodes=1", cwd=tmp_path)
    assert shown.stdout.count("Memory of one GPU") == 1
    assert "70.55 B parameters x 4 B / 8 GPUs" in shown.stdout
    assert "it does not fit" in shown.stdout
    assert not (tmp_path / "runs").exists()


def test_a_card_nobody_knows_is_refused(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    done = run_cli(
        "sweep",
        REPO / "sweeps" / "llama3_8b.yaml",
        "--dry-run",
        "--set",
        "estimate.cluster.gpu=H1000",
        cwd=tmp_path,
    )
    assert done.code == 2
    assert "estimate.cluster.gpu" in done.stderr
    assert "H100-80GB" in done.stderr
