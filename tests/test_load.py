"""Models: whole or empty, resized for added tokens, and saved so that transformers reads back what was trained."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from packcli.config import LoraSpec, ModelSpec
from packcli.errors import ConfigError
from packcli.model import attention, configs, load
from packcli.model.collate import Batch
from packcli.model.trainee import Trainee

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "initializer_range": 0.3},
    "llama_tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **{k: v for k, v in SIZES.items() if k != "head_dim"}},
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": None},
    "gemma": {"model_type": "gemma", **SIZES},
}
WORDS = 50


def tokenizer(words: int = WORDS, added: int = 0) -> PreTrainedTokenizerFast:
    """`words` tokens, ids from 0, and `added` special ones after them."""
    vocabulary = {"<eos>": 0, **{f"w{number}": number for number in range(1, words)}}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": [f"<added{number}>" for number in range(added)]})
    made.chat_template = "{{ messages }}"
    return made


def spec(family: str = "llama", **changes: Any) -> ModelSpec:
    return ModelSpec(config={**FAMILIES[family], **changes}, tokenizer="some")


def make(family: str = "llama", *, words: int = WORDS, seed: int = 0, **options: Any) -> Any:
    return load.load(spec(family), None, tokenizer(words), 64, seed, **options)


def saved(path: Path, family: str = "llama", dtype: str = "float32", **changes: Any) -> Path:
    """A checkpoint of a random model; `changes` to its config.json."""
    model = make(family)
    load.save(model, model.state_dict(), tokenizer(), [3], dtype, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def again(path: Path, **options: Any) -> Any:
    """What plain transformers reads from a directory, no key missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of one document, through our attention."""
    slots = torch.arange(len(ids))
    none = torch.zeros(0, dtype=torch.int64)
    trainee = Trainee(model.eval(), attention.choose("sdpa", torch.device("cpu"), torch.float32))
    with torch.no_grad():
        return trainee(Batch(ids[None], slots[None], (len(ids),), none, none), "logits")


IDS = torch.tensor([5, 9, 2, 44, 17, 3])

# Final directory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_reads_back_is_what_was_trained(tmp_path: Path, family: str, dtype: str) -> None:
    model = make(family)
    load.save(model, model.state_dict(), tokenizer(), [3], dtype, tmp_path)
    read = again(tmp_path, dtype="auto")
    assert read.dtype == getattr(torch, dtype)  # `auto` takes the config's word for it
    assert read.config.vocab_size == WORDS
    assert read.generation_config.eos_token_id == [0, 3]
    assert read.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor.to(read.dtype)), name
    if dtype == "float32":
        slots = torch.arange(len(IDS))[None]
        torch.testing.assert_close(read(IDS[None], position_ids=slots).logits[0], logits(model, IDS))
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (
        family not in ("llama_tied", "gemma")
    )
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o644}


def test_weights_handed_over_one_by_one_make_the_same_directory(tmp_path: Path) -> None:
    model = make("gemma")
    load.save(model, model.state_dict(), tokenizer(), [3], "bfloat16", tmp_path / "whole")
    load.save(model, iter(model.state_dict().items()), tokenizer(), [3], "bfloat16", tmp_path / "stream")
    whole, stream = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "stream")
    )
    assert whole == stream


def test_a_model_too_large_for_one_file_is_read_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_SHARD", "20KB")
    model = make("gemma")
    load.save(model, model.state_dict(), tokenizer(), [], "float32", tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in model.parameters())
    read = again(tmp_path)
    assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_experts_are_saved_under_the_names_other_programs_know(tmp_path: Path) -> None:
    config = {"model_type": "mixtral", **SIZES, "num_local_experts": 2, "sliding_window": None}
    model = load.load(ModelSpec(config=config, tokenizer="some"), None, tokenizer(), 64, 0)
    load.save(model, model.state_dict(), tokenizer(), [], "float32", tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in names
    read = again(tmp_path)
    assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_state_that_lacks_a_weight_is_not_saved_as_if_it_were_whole(tmp_path: Path) -> None:
    model = make()
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="not the model's"):
        load.save(model, state, tokenizer(), [], "float32", tmp_path / "renamed")
    state = dict(list(model.state_dict().items())[1:])
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight"):
        load.save(model, state, tokenizer(), [], "float32", tmp_path / "short")


def test_contradictory_generation_settings_do_not_cost_the_trained_weights(tmp_path: Path) -> None:
    """Some published checkpoints set a temperature for greedy decoding; transformers refuses to save that."""
    source = saved(tmp_path / "base")
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 2}))
    model = load.load(ModelSpec(name=str(source)), None, tokenizer(), 64, 0)
    load.save(model, model.state_dict(), tokenizer(), [3], "float32", tmp_path / "final")
    assert again(tmp_path / "final").generation_config.eos_token_id == [0, 3]


# Empty models -------------------------------------------------------------------------------------------


def description(model: Any) -> dict[str, Any]:
    """All that processes must agree on before tensors can be sent from one to the others."""
    parameters = model.named_parameters(remove_duplicate=False)
    shared: dict[int, str] = {}
    return {
        "parameters": [
            (name, p.shape, p.dtype, p.requires_grad, shared.setdefault(id(p), name)) for name, p in parameters
        ],
        "buffers": [(name, buffer.tolist()) for name, buffer in model.named_buffers()],
        "modules": [(name, type(module).__name__) for name, module in model.named_modules()],
        "vocab_size": model.config.vocab_size,
        "added": model.embedding_rows_added,
    }


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("source", ["config", "checkpoint", "added tokens", "lora", "added tokens and lora"])
def test_an_empty_model_differs_from_the_whole_one_in_nothing_but_weights(
    tmp_path: Path, family: str, source: str
) -> None:
    model = spec(family) if source == "config" else ModelSpec(name=str(saved(tmp_path, family)))
    lora = LoraSpec(rank=2, alpha=4, dropout=0.1) if "lora" in source else None
    own = tokenizer(added=3 if "added" in source else 0)
    whole, empty = (
        load.load(model, None, own, 64, 0, lora=lora, empty=without_weights) for without_weights in (False, True)
    )
    assert description(empty) == description(whole)
    assert all(p.is_meta for p in empty.parameters())
    assert not any(p.is_meta for p in whole.parameters())
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    empty.load_state_dict(whole.state_dict(), assign=True)
    empty.tie_weights()
    assert torch.equal(logits(empty, IDS), logits(whole, IDS))


def test_making_an_empty_model_reads_no_weights(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "model.safetensors").unlink()
    assert load.load(ModelSpec(name=str(path)), None, tokenizer(), 64, 0, empty=True).lm_head.weight.is_meta
    assert not make().lm_head.weight.is_meta  # and what is made afterwards is not empty


# Added tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
def test_added_tokens_get_rows_that_do_not_disturb_the_model(tmp_path: Path, family: str) -> None:
    source = saved(tmp_path / "base", family)
    own = tokenizer(added=3)
    plain = load.load(ModelSpec(name=str(source)), None, tokenizer(), 64, 0)
    one, same, other = (load.load(ModelSpec(name=str(source)), None, own, 64, seed) for seed in (0, 0, 1))
    assert (plain.embedding_rows_added, one.embedding_rows_added) == (0, 3)
    tied = plain.lm_head.weight is plain.get_input_embeddings().weight
    assert (one.lm_head.weight is one.get_input_embeddings().weight) == tied
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new, twin, differing = (m.state_dict()[name] for m in (plain, one, same, other))
        assert new.shape == (WORDS + 3, 32)
        assert torch.equal(new[:WORDS], old)
        assert torch.equal(new, twin)
        assert not torch.equal(new, differing)
        assert len(new[WORDS:].unique(dim=0)) == 3
        assert ((new[WORDS:] - old.mean(0)).abs() <= 0.02 * old.std(0)).all()
    torch.testing.assert_close(logits(one, IDS)[:, :WORDS], logits(plain, IDS))

    load.save(one, one.state_dict(), own, [], "float32", tmp_path / "final")
    read = again(tmp_path / "final")
    assert read.config.vocab_size == WORDS + 3
    assert load.load(ModelSpec(name=str(tmp_path / "final")), None, own, 64, 0).embedding_rows_added == 0


def test_a_biased_head_is_resized_with_its_bias(tmp_path: Path) -> None:
    config = {"model_type": "phi", **{k: v for k, v in SIZES.items() if k != "head_dim"}}
    model = load.load(ModelSpec(config=config, tokenizer="some"), None, tokenizer(), 64, 0)
    torch.nn.init.normal_(model.lm_head.bias)
    load.save(model, model.state_dict(), tokenizer(), [], "float32", tmp_path)
    grown = load.load(ModelSpec(name=str(tmp_path)), None, tokenizer(added=2), 64, 0)
    assert torch.equal(grown.lm_head.bias[:WORDS], model.lm_head.bias)
    torch.testing.assert_close(grown.lm_head.bias[WORDS:], model.lm_head.bias.mean().expand(2))


def test_case_14_the_tokenizer_of_another_model_is_refused_though_it_has_added_tokens(tmp_path: Path) -> None:
    source = saved(tmp_path)
    with pytest.raises(ConfigError, match="embeds 50 tokens, the tokenizer has 62"):
        load.load(ModelSpec(name=str(source)), None, tokenizer(words=60, added=2), 64, 0)


def test_ids_with_gaps_get_rows_up_to_the_last_one() -> None:
    """`len(tokenizer)` counts tokens: with a gap the last id lies beyond the embedding."""
    vocabulary = {"<eos>": 0, "a": 1, "b": 7}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    gaps = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>")
    assert load.load(spec(), None, gaps, 64, 0).config.vocab_size == 8


# Refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"model_type": "gemma3"}, "`gemma3` is a model of several parts"),
        ({"model_type": "phi4_multimodal"}, "`phi4_multimodal` is a model of several parts"),
        ({"model_type": "bart"}, "encoder-decoder"),
        ({"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2}, "attention interface"),
        ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1}, "attention interface"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "vit"}, "no causal model"),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_a_kind_of_model_that_cannot_be_trained_here_is_named(
    tmp_path: Path, kind: dict[str, Any], message: str, empty: bool
) -> None:
    with pytest.raises(ConfigError, match=message):
        load.load(ModelSpec(config=kind, tokenizer="some"), None, tokenizer(), 64, 0, empty=empty)
    (tmp_path / "config.json").write_text(json.dumps(kind))
    with pytest.raises(ConfigError, match=message):
        load.load(ModelSpec(name=str(tmp_path)), None, tokenizer(), 64, 0, empty=empty)


def test_a_head_of_its_own_under_a_config_that_ties_it_is_not_lost(tmp_path: Path) -> None:
    """transformers leaves such a head untied; saved by its config, what it learned would be gone."""
    source = saved(tmp_path, "llama", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"ties `lm_head.weight` to the embedding, but their weights differ"):
        load.load(ModelSpec(name=str(source)), None, tokenizer(), 64, 0)


def test_quantized_weights_are_refused_by_their_method(tmp_path: Path) -> None:
    source = saved(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match=r"quantized \(gptq\)"):
        load.load(ModelSpec(name=str(source)), None, tokenizer(), 64, 0)


def test_case_44_code_that_comes_with_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(ConfigError, match="cannot load"):
        load.load(ModelSpec(name=str(tmp_path)), None, tokenizer(), 64, 0)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"num_attention_heads": 6, "hidden_size": 96, "num_key_value_heads": 4},
            "cannot share 4 key-value heads",
        ),
        (
            {"hiden_size": 60, "heads": 7},
            r"`model.config.hiden_size`, did you mean `hidden_size`.*`model.config.heads`",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_config_that_fails_in_the_first_forward_pass_is_refused_before(
    kind: str, changed: dict[str, int], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        configs.build({"model_type": kind, **changed})
