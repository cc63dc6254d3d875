"""LoRA: only adapters learn, packing changes nothing for them, and what is saved needs no peft to be read."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from packcli import plan, stages, sweepfile
from packcli.config import LoraSpec, ModelSpec
from packcli.errors import ConfigError, MissingError
from packcli.model import attention, load
from packcli.model.collate import Batch
from packcli.model.trainee import Trainee
from packcli.store import Store

peft = pytest.importorskip("peft")

CPU = torch.device("cpu")
WORDS = 50
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LORA = LoraSpec(rank=4, alpha=8)


def tokenizer(added: int = 0) -> PreTrainedTokenizerFast:
    vocabulary = {"<eos>": 0, **{f"w{number}": number for number in range(1, WORDS)}}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": [f"<added{number}>" for number in range(added)]})
    made.chat_template = "{{ messages }}"
    return made


def spec(kind: str = "llama") -> ModelSpec:
    """`qwen2` has biases in the layers that get adapters, `gemma` ties its head to the embedding."""
    own = {"head_dim": 8} if kind == "gemma" else {}
    return ModelSpec(config={"model_type": kind, **SIZES, **own}, tokenizer="some")


def make(kind: str = "llama", lora: LoraSpec | None = LORA, seed: int = 0) -> Any:
    return load.load(spec(kind), None, tokenizer(), 64, seed, lora=lora)


def wrap(model: Any) -> Trainee:
    return Trainee(model, attention.choose("sdpa", CPU, torch.float32))


def batch(*documents: list[int]) -> Batch:
    """Documents end to end; every token but the first of each is a label."""
    positions = [torch.arange(len(document)) for document in documents]
    ids = torch.tensor([token for document in documents for token in document])
    predict = (torch.cat(positions) > 0).nonzero()[:, 0] - 1
    lengths = tuple(len(document) for document in documents)
    return Batch(ids[None], torch.cat(positions)[None], lengths, predict, ids[predict + 1])


DOCUMENTS = ([5, 9, 2, 44, 17], [3, 3, 8], [21, 40, 7, 7, 1, 30, 12])


def trained(kind: str = "llama", model: Any = None, steps: int = 3) -> Any:
    """After some steps in which both factors of every adapter moved."""
    model = make(kind) if model is None else model
    trainee = wrap(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        trainee(batch(*DOCUMENTS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return wrap(model)(batch(*DOCUMENTS), "logits")


def plain_logits(model: Any) -> torch.Tensor:
    """Of the same documents, each alone, in a model with transformers' own attention."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([document])).logits[0] for document in DOCUMENTS])


# Training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_only_adapters_learn_and_every_one_of_them(kind: str) -> None:
    model = make(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(kind, model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    adapters = {name for name in before if ".lora_" in name}
    assert moved == adapters
    assert len(adapters) == 2 * 2 * 7  # A and B, of two layers, of q k v o gate up down
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters


def test_a_new_adapter_changes_no_output() -> None:
    assert torch.equal(logits(make()), logits(make(lora=None)))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_packing_does_not_change_the_gradient_of_any_adapter(kind: str) -> None:
    trainee = wrap(trained(kind))  # B is 0 at first, and with it all gradients of A

    def gradients(*batches: Batch) -> dict[str, torch.Tensor]:
        trainee.zero_grad()
        for one in batches:
            trainee(one).backward()
        return {name: p.grad.clone() for name, p in trainee.named_parameters() if p.grad is not None}

    packed = gradients(batch(*DOCUMENTS))
    alone = gradients(*(batch(document) for document in DOCUMENTS))
    assert packed.keys() == alone.keys()
    for name, reference in alone.items():
        assert reference.abs().max() > 0
        assert (packed[name] - reference).abs().max() / reference.abs().max() <= 1e-5, name


def test_adapters_learn_the_same_when_activations_are_computed_again() -> None:
    """No input of the layers asks for a gradient: the embedding is frozen."""
    grads = []
    for again in (False, True):
        model = trained().train()
        for layer in model.base_model.layers if again else ():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        wrap(model)(batch(*DOCUMENTS)).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_the_seed_alone_decides_adapters_and_dropout() -> None:
    def a(model: Any) -> torch.Tensor:
        return model.state_dict()["model.layers.1.mlp.up_proj.lora_A.default.weight"]

    torch.manual_seed(7)
    one = make()
    torch.manual_seed(8)
    same, other = make(), make(seed=1)
    assert torch.equal(a(one), a(same))
    assert not torch.equal(a(one), a(other))
    dropping = trained(model=make(lora=LoraSpec(rank=4, alpha=8, dropout=0.5))).train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(float(wrap(dropping)(batch(*DOCUMENTS)).detach()))
    assert losses[0] == losses[1] != losses[2]


def test_named_targets_are_the_only_ones_adapted() -> None:
    model = make(lora=LoraSpec(rank=2, alpha=2, targets=("q_proj", "self_attn.o_proj")))
    adapted = {
        name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_" in name
    }
    assert adapted == {"q_proj", "o_proj"}


@pytest.mark.parametrize(
    ("target", "near"),
    [("q_prj", "q_proj"), ("lm_head", ""), ("embed_tokens", ""), ("mlp", ""), ("proj", "o_proj"), ("", "")],
)
def test_a_target_that_is_no_layer_is_refused_with_those_there_are(target: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"is named `{target}`") as raised:
        make(lora=LoraSpec(rank=2, alpha=2, targets=("q_proj", target)))
    assert near in raised.value.fix
    assert "proj" in raised.value.fix


def test_missing_peft_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingError, match="no package peft") as raised:
        load.load(ModelSpec(name="/nowhere"), None, tokenizer(), 64, 0, lora=LORA)
    assert "packcli[lora]" in raised.value.fix


def test_missing_peft_is_said_before_anything_is_prepared(
    tiny_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = sweepfile.load(tiny_sweep(train={"lora": {"rank": 4, "alpha": 8}}))
    planned = plan.plan(sweep, dict.fromkeys(plan.needed(sweep), "0"))
    stages.preflight(planned, Store(tmp_path / "runs"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingError, match="no package peft"):
        stages.preflight(planned, Store(tmp_path / "runs"))


# Saving -------------------------------------------------------------------------------------------------


def full(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.state_dict().items()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_the_final_directory_holds_the_merged_model_for_programs_without_peft(tmp_path: Path, kind: str) -> None:
    model = trained(kind)
    load.save(model, full(model), tokenizer(), [3], "float32", tmp_path / "final")
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("lora" in name or "base_layer" in name for name in read.state_dict())
    torch.testing.assert_close(plain_logits(read), logits(model), rtol=1e-4, atol=1e-5)
    assert (plain_logits(read) - logits(make(kind, lora=None))).abs().max() > 1e-2
    files = [file for file in (tmp_path / "final").rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}


def test_adapters_are_merged_before_rounding_and_not_after(tmp_path: Path) -> None:
    model = trained()
    load.save(model, full(model), tokenizer(), [3], "bfloat16", tmp_path)
    reference = peft_merged(model)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for name, tensor in read.state_dict().items():
        torch.testing.assert_close(tensor, reference[name].bfloat16(), rtol=2**-8, atol=1e-7)
    exact = sum((read.state_dict()[n] == t.bfloat16()).sum() for n, t in reference.items())
    assert exact / sum(t.numel() for t in reference.values()) > 0.999


def peft_merged(model: Any) -> dict[str, torch.Tensor]:
    """As peft itself merges, in float32."""
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            state[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight("default")
    plain = {n: p for n, p in model.state_dict().items() if ".lora_" not in n and ".base_layer." not in n}
    return {**plain, **{n: p.detach() for n, p in state.items()}}


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_peft_loads_the_adapter_onto_the_base_it_was_trained_on(tmp_path: Path, kind: str) -> None:
    base = make(kind, lora=None)
    load.save(base, base.state_dict(), tokenizer(), [3], "float32", tmp_path / "base")
    source = ModelSpec(name=str(tmp_path / "base"))
    model = trained(model=load.load(source, None, tokenizer(), 64, 0, lora=LORA))
    load.save(model, full(model), tokenizer(), [3], "float32", tmp_path / "final")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "final" / "adapter"
    )
    torch.testing.assert_close(plain_logits(again), logits(model), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "final" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["target_modules"] == sorted(config["target_modules"])


def test_rows_of_added_tokens_learn_too_and_are_saved_with_the_adapter(tmp_path: Path) -> None:
    """Frozen, they would all stay at the mean of the others, and no model could tell them apart."""
    base = make(lora=None)
    load.save(base, base.state_dict(), tokenizer(), [3], "float32", tmp_path / "base")
    source = ModelSpec(name=str(tmp_path / "base"))
    grown = load.load(source, None, tokenizer(added=2), 64, 0, lora=LORA)
    before = grown.lm_head.weight.detach().clone()
    model = trained(model=grown)
    assert not torch.equal(model.lm_head.weight, before)
    load.save(model, full(model), tokenizer(added=2), [3], "float32", tmp_path / "final")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(plain_logits(read), logits(model), rtol=1e-4, atol=1e-5)
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    resized.resize_token_embeddings(WORDS + 2)
    again = peft.PeftModel.from_pretrained(resized, tmp_path / "final" / "adapter")
    torch.testing.assert_close(plain_logits(again), logits(model), rtol=1e-4, atol=1e-5)


def test_equal_runs_leave_equal_files(tmp_path: Path) -> None:
    for name in ("one", "other"):
        model = trained()
        load.save(model, full(model), tokenizer(), [3], "float32", tmp_path / name)
    one, other = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "other")
    )
    assert one == other
    assert len(load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")) == 28
