"""Probes of what packing does inside a model. All models here are tiny, of random weights unless trained below."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from packcli.config import ARMS, ArmSpec, ProbeSpec, SourceSpec
from packcli.data import corpus, render
from packcli.errors import ConfigError, DataError, MissingError, RunError
from packcli.eval.probe import boundary as probe_boundary
from packcli.eval.probe import effect as probe_effect
from packcli.eval.probe import probes
from packcli.eval.probe import reading as probe_documents
from packcli.eval.probe.boundary import Marks, boundary, factorial
from packcli.eval.probe.crossing import crossing
from packcli.eval.probe.effect import LAYOUTS, causal_effect, change, neighbours
from packcli.eval.probe.layouts import Document, Layout, Row, attending, batch, losses, packed
from packcli.report import probe_figures

pytestmark = pytest.mark.slow

VOCABULARY = 64
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # attention far from uniform, so that errors show
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "qwen2": TINY,
    "gemma2": TINY | {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 5.0},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
KEPT, CUT = Layout("causal", "continue"), Layout("document", "reset")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(FAMILIES.get(family, TINY) | changes))
    return AutoModelForCausalLM.from_config(config).eval()


def document(length: int, seed: int, group: str | None = None) -> Document:
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, length)
    return Document(ids, np.arange(length) >= length // 2, group)


ROWS = [[document(length, 10 * row + n) for n, length in enumerate(lengths)] for row, lengths in
        enumerate([(7, 12, 5), (20, 3), (9,)])]  # fmt: skip


# Crossing attention ----------------------------------------------------------------------------------------


def eager_shares(model: Any, rows: Sequence[Row], layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """[L, H] shares of attention to other documents, and to the row's first token, by transformers' own weights.

    Under a document mask transformers makes one by itself, from positions that reset.
    """
    model.set_attn_implementation("eager")
    found = []
    for row in rows:
        inputs = batch([row], layout)
        with torch.no_grad():
            weights = model(
                input_ids=inputs.input_ids,
                position_ids=inputs.position_ids,
                use_cache=False,
                output_attentions=True,
            ).attentions
        begin = 0
        for each in row:
            stop = begin + len(each)
            if begin:
                found += [
                    (torch.stack(weights)[:, 0, :, q, :begin].sum(-1), torch.stack(weights)[:, 0, :, q, 0])
                    for q in range(begin, stop)
                ]
            begin = stop
    shares, firsts = zip(*found, strict=True)
    return torch.stack(shares).mean(0), torch.stack(firsts).mean(0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [KEPT, CUT], ids=["causal", "document"])
def test_share_is_not_that_of_transformers_own_weights(family: str, layout: Layout) -> None:
    model = build(family)
    shares, firsts = eager_shares(model, ROWS, layout)
    found = crossing(model, ROWS, layout)
    heads = torch.tensor([layer.heads for layer in found.layers], dtype=torch.float64)
    assert torch.allclose(heads, shares.double(), rtol=0, atol=1e-6)
    assert [layer.share for layer in found.layers] == pytest.approx(shares.mean(1).tolist(), abs=1e-6)
    assert [layer.first for layer in found.layers] == pytest.approx(firsts.mean(1).tolist(), abs=1e-6)
    for layer, share, first in zip(found.layers, shares.mean(1), firsts.mean(1), strict=True):
        assert layer.share_but_first == pytest.approx(float((share - first) / (1 - first)), abs=1e-6)
    assert found.tokens == 12 + 5 + 3
    if layout == CUT:
        assert {share for layer in found.layers for share in layer.heads} == {0.0}
    else:
        assert min(layer.share for layer in found.layers) > 0.01


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_watching_a_model_changes_what_it_computes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, row = build(family), ROWS[0]
    seen: list[torch.Tensor] = []
    model.base_model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    crossing(model, [row], KEPT, block=64)
    model.set_attn_implementation("eager")
    inputs = batch([row], KEPT)
    with torch.no_grad():
        model.base_model(input_ids=inputs.input_ids, position_ids=inputs.position_ids, use_cache=False)
    watched, own = seen
    assert torch.allclose(watched, own, atol=1e-5)


def test_uniform_attention_is_not_the_yardstick_it_is_called() -> None:
    """A model whose scores are all 0 spreads its attention evenly: both shares must be the yardsticks."""
    model = build("gemma2")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    found = crossing(model, ROWS, KEPT)
    assert [layer.window for layer in found.layers] == [9, None]
    assert found.layers[0].uniform < found.layers[1].uniform  # a window sees less of what came before
    for layer in found.layers:
        assert layer.share == pytest.approx(layer.uniform, abs=1e-6)
        assert layer.share_but_first == pytest.approx(layer.uniform_but_first, abs=1e-6)
        assert layer.share_but_first < layer.share


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_share_depends_on_how_many_queries_go_together(family: str) -> None:
    model = build(family)
    whole = crossing(model, ROWS, KEPT)
    for block in (1, 4 * 24, 4 * 24 * 5):
        part = crossing(model, ROWS, KEPT, block=block)
        for one, other in zip(whole.layers, part.layers, strict=True):
            assert other.heads == pytest.approx(one.heads, abs=1e-6)
            assert other.first == pytest.approx(one.first, abs=1e-6)


class Largest(TorchDispatchMode):
    """The most elements of any tensor made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_scores_of_a_long_row_are_all_held_at_once() -> None:
    model, slots, block = build("gemma2"), 480, 1 << 16
    rows = [[document(200, 1), document(280, 2)]]
    with Largest() as bounded:
        crossing(model, rows, KEPT, block=block)
    with Largest() as unbounded:
        crossing(model, rows, KEPT)
    assert unbounded.elements == 4 * slots * slots
    assert bounded.elements <= block


def test_rows_are_not_those_the_arm_packs() -> None:
    documents = [document(length, length) for length in range(5, 35)]
    whole = packed(documents, ArmSpec.model_validate(ARMS["best_fit"]), 64, seed=3)
    assert sorted(len(each) for row in whole for each in row) == list(range(5, 35))
    cut = packed(documents, ArmSpec.model_validate(ARMS["random"]), 64, seed=3)
    assert [sum(map(len, row)) for row in cut][:-1] == [64] * (len(cut) - 1)
    text = [token for row in cut for each in row for token in each.input_ids.tolist()]
    assert sorted(text) == sorted(token for each in documents for token in each.input_ids.tolist())
    assert sum(int(each.supervised.sum()) for row in cut for each in row) == sum(
        int(each.supervised.sum()) for each in documents
    )


def test_one_document_a_row_gives_a_share_of_zero() -> None:
    with pytest.raises(ConfigError, match="no row holds two documents"):
        crossing(build("llama"), [[document(9, 1)]], KEPT)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4}, "`bloom` has not the attention interface"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "`lfm2`: 1 of 2 layers attend"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}, "asks for `s_aux`"),
    ],
)
def test_model_that_cannot_be_hooked_is_measured_wrongly(family: str, changes: Any, says: str) -> None:
    model = build(family, **changes)
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        crossing(model, ROWS, KEPT)
    assert "\n" not in str(error.value)
    assert error.value.fix
    assert model.config._attn_implementation == before


# Causal effect ---------------------------------------------------------------------------------------------


def grouped(count: int, length: int = 9) -> list[Document]:
    return [document(length + number % 4, number, "ab"[number % 2]) for number in range(count)]


def condition(found: probe_effect.CausalEffect, neighbour: str, layout: Layout) -> probe_effect.Condition:
    (one,) = [
        each
        for each in found.conditions
        if (each.neighbour, each.attention, each.positions) == (neighbour, *layout)
    ]
    return one


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_off_document_has_another_loss_than_alone(family: str) -> None:
    model, documents = build(family), grouped(8)
    found = causal_effect(model, documents)
    assert found.check <= 1e-5
    assert found.documents == 8
    # The loss alone is that of the model as transformers runs it.
    model.set_attn_implementation("eager")
    for each, alone in zip(documents, found.alone, strict=True):
        ids = torch.tensor(each.input_ids)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        own = F.cross_entropy(logits[each.supervised[1:]], ids[1:][each.supervised[1:]])
        assert alone == pytest.approx(float(own), abs=1e-5)
    kept = condition(found, "unrelated", KEPT)
    assert min(abs(a - b) for a, b in zip(kept.losses, found.alone, strict=True)) > 1e-4
    moved = condition(found, "unrelated", Layout("document", "continue"))
    # Only a model that knows absolute positions can tell where a document stands.
    assert (abs(moved.effect.mean) > 1e-3) == (family == "gpt2")


def test_leak_beside_attention_passes_for_an_effect_of_attention() -> None:
    model = build("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out + 0.1 * out.roll(1, dims=1))
    with pytest.raises(RunError, match="attention is not all that carries"):
        causal_effect(model, grouped(6))


@pytest.fixture(scope="module")
def copier() -> Any:
    """Trained to copy: the second of two equal documents of eight random tokens, which nothing else tells."""
    model = build("llama", num_hidden_layers=1, num_attention_heads=2, initializer_range=0.1, hidden_size=64)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        once = torch.randint(1, VOCABULARY, (64, 8), generator=generator)
        row = torch.cat([once, once], dim=1)
        labels = row.clone()
        labels[:, :9] = -100
        loss = model(row, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.5
    return model.eval()


def test_copying_from_the_document_before_goes_unseen(copier: Any) -> None:
    documents = [
        Document(each.input_ids, np.arange(8) > 0, each.group)
        for each in (document(8, 1000 + n, "ab"[n % 2]) for n in range(8))
    ]
    found = causal_effect(copier, documents)
    kept = condition(found, "duplicate", KEPT).effect
    assert kept.high is not None
    assert kept.high < -2.0
    for layout in LAYOUTS[:2]:
        assert abs(condition(found, "duplicate", layout).effect.mean) < 1e-4
    attention = [each for each in found.contrasts if (each.neighbour, each.given) == ("duplicate", "continue")]
    assert [each.difference.mean for each in attention] == pytest.approx([kept.mean], abs=1e-4)
    # Against the model before it was trained: training is what made the effect.
    untrained = causal_effect(build("llama", num_hidden_layers=1, initializer_range=0.1), documents)
    changes = {
        (each.neighbour, each.attention, each.positions): each.difference for each in change(untrained, found)
    }
    assert changes["duplicate", "causal", "continue"].high < -2.0  # type: ignore[operator]
    assert abs(changes["duplicate", "document", "reset"].mean) < 1e-4


def test_effects_of_other_documents_are_paired() -> None:
    model = build("llama", num_hidden_layers=1)
    one, other = causal_effect(model, grouped(8)), causal_effect(model, grouped(8, length=10))
    with pytest.raises(ValueError, match="cannot be paired"):
        change(one, other)


def test_interval_is_not_students_over_documents() -> None:
    found = causal_effect(build("llama"), grouped(8))
    kept = condition(found, "related", KEPT)
    differences = np.subtract(kept.losses, found.alone)
    margin = 2.3646 * differences.std(ddof=1) / 8**0.5  # t(0.975, 7)
    assert kept.effect.mean == pytest.approx(differences.mean())
    assert kept.effect.low == pytest.approx(differences.mean() - margin, rel=1e-4)
    assert kept.effect.high == pytest.approx(differences.mean() + margin, rel=1e-4)


def test_related_neighbour_is_of_another_topic_or_a_copy() -> None:
    copies = [document(9, 5, "a"), document(9, 5, "a")]
    documents = [*grouped(8), *copies, document(9, 99, "alone")]
    found, by = neighbours(documents, seed=0)
    assert by == "group"
    assert found[-1] is None
    for each, pair in zip(documents[:-1], found[:-1], strict=True):
        assert pair is not None
        unlike, like = (documents[place] for place in pair)
        assert (unlike.group == each.group, like.group == each.group) == (False, True)
        assert like.key != each.key
    assert neighbours(documents, seed=0)[0] == found
    assert neighbours(documents, seed=1)[0] != found


def test_nearest_document_is_not_found_without_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    originals = [document(40, number) for number in range(6)]
    near = []
    for number, each in enumerate(originals):
        ids = each.input_ids.copy()
        ids[:4] = np.random.default_rng(number + 50).integers(1, VOCABULARY, 4)
        near.append(Document(ids, each.supervised))
    documents = [*originals, *near, *originals[:1]]  # the last: a copy, which is nobody's neighbour
    found, by = neighbours(documents, seed=0)
    assert by == "tf-idf"
    for number, pair in enumerate(found):
        assert pair is not None
        assert pair[1] % 6 == number % 6
        assert pair[0] % 6 != number % 6
        assert documents[pair[1]].key != documents[number].key
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(MissingError, match="scikit-learn"):
        neighbours(documents, seed=0)


def test_document_left_out_is_not_said() -> None:
    unlabelled = Document(np.arange(1, 9), np.zeros(8, bool), "a")
    found = causal_effect(build("llama"), [*grouped(6), unlabelled, document(60, 1, "a")], max_length=40)
    assert found.documents <= 6
    assert found.left_out["no supervised token"] == 1
    assert found.left_out["its rows are too long"] >= 1
    assert found.documents + sum(found.left_out.values()) == 8
    with pytest.raises(DataError, match="fewer than two documents"):
        causal_effect(build("llama"), grouped(6), max_length=10)


def test_loss_depends_on_what_else_is_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = build("gemma2"), [[document(9, n), document(12, n + 40)] for n in range(6)]
    with attending(model):
        together = losses(model, rows, KEPT)
        one_by_one = [losses(model, [row], KEPT)[0] for row in rows]
    assert together == pytest.approx(one_by_one, abs=1e-5)


# Boundary --------------------------------------------------------------------------------------------------

MARKS = Marks(eos=(60,), bos=(61,), header=(62, 63))


def plant(monkeypatch: pytest.MonkeyPatch, planted: Mapping[frozenset[str], float]) -> list[Any]:
    """`boundary` on losses that are made up, of what really stands at the border; and what it asked for."""
    noise, asked = np.random.default_rng(0), []

    def fake(model: Any, rows: Sequence[Row], layout: Layout) -> list[float]:
        found = []
        for row in rows:
            before, own = row[-2].input_ids, row[-1].input_ids
            present = {"mask"} if layout.attention == "document" else set()
            present |= {"eos"} if before[-1] == 60 else set()
            present |= {"bos"} if own[0] == 61 else set()
            present |= {"header"} if 62 in own[:2] else set()
            asked.append((frozenset(present), row, layout))
            document_own = int(row[-1].input_ids[row[-1].supervised].sum()) / 50
            effect = sum(size for factors, size in planted.items() if factors <= present)
            found.append(document_own + effect + noise.normal(0, 0.05))
        return found

    monkeypatch.setattr(probe_boundary, "losses", fake)
    monkeypatch.setattr(probe_boundary, "attending", lambda model: nullcontext())
    return asked


def test_planted_interaction_is_missed_or_one_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {frozenset({"eos"}): -0.3, frozenset({"eos", "mask"}): 0.3, frozenset({"header"}): 0.1}
    asked = plant(monkeypatch, planted)
    documents = [Document(np.arange(1, 9) + n, np.arange(8) > 3) for n in range(40)]
    found = boundary(build("llama"), documents, MARKS)
    assert len(found.cells) == 16
    assert {frozenset(cell.present) for cell in found.cells} == {present for present, _, _ in asked}
    assert {len(row) for _, row, _ in asked} == {2, 3}
    effects = {each.factors: each.difference for each in found.effects}
    assert len(effects) == 4 + 6
    wanted = {("eos",): -0.15, ("header",): 0.1, ("mask",): 0.15, ("eos", "mask"): 0.3}
    for factors, estimate in effects.items():
        assert estimate.mean == pytest.approx(wanted.get(factors, 0.0), abs=0.03), factors
        assert estimate.low is not None
        assert estimate.high is not None
        if factors in wanted:
            assert not estimate.low <= 0 <= estimate.high, factors
        assert estimate.high - estimate.low < 0.06  # paired: documents differ by far more
    assert np.std(found.cells[0].losses) > 0.1


def test_effects_differ_from_the_contrasts_of_a_two_by_two() -> None:
    cells = {
        (False, False): [1.0, 2.0],
        (False, True): [1.5, 2.5],
        (True, False): [0.0, 1.2],
        (True, True): [4.0, 5.0],
    }
    effects = {each.factors: each.difference.mean for each in factorial(("eos", "mask"), cells)}
    assert effects["eos",] == pytest.approx((2.55) - (1.75))
    assert effects["mask",] == pytest.approx(3.25 - 1.05)
    assert effects["eos", "mask"] == pytest.approx((4.5 - 2.0) - (0.6 - 1.5))


def test_cells_score_other_tokens() -> None:
    own = Document(np.arange(1, 9), np.ones(8, bool))
    for level in product((False, True), repeat=3):
        marked = MARKS.around(own, dict(zip(("eos", "bos", "header"), level, strict=True)))
        scored = batch([[own, marked]], KEPT)
        assert scored.labels.tolist()[-7:] == list(range(2, 9))
        assert marked.labels == 7


def test_mark_before_the_border_is_seen_through_the_mask() -> None:
    documents = [document(9 + n % 3, n) for n in range(8)]
    found = boundary(build("llama"), documents, MARKS)
    assert found.behind_mask is not None
    assert found.behind_mask < 1e-4
    cells = {frozenset(cell.present): cell.losses for cell in found.cells}
    open_, closed = cells[frozenset()], cells[frozenset({"eos"})]
    assert np.abs(np.subtract(open_, closed)).min() > 1e-4


def test_missing_mark_is_crossed_with_nothing() -> None:
    documents = [document(9, n) for n in range(6)]
    found = boundary(build("llama"), documents, Marks(eos=(60,), missing={"bos": "no bos token"}))
    assert found.factors == ("eos", "mask")
    assert found.missing == {"bos": "no bos token", "header": "none was given"}
    assert len(found.cells) == 4


# Documents and marks ---------------------------------------------------------------------------------------

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<h>{{ m['role'] }}</h>\n\n{{ m['content'] }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}"
)
DEFAULT_HEADER = (
    "{% if messages[0]['role'] != 'system' %}<h>system</h>You help.<eot>{% endif %}"
    "{% for m in messages %}<h>{{ m['role'] }}</h>{{ m['content'] }}<eot>\n{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<h>{{ m['role'] }}</h>{{ m['content'] }}<eot>\n{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>{% endif %}"
)
INSIDE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{% elif m['role'] == 'user' %}{{ bos_token }}[I]"
    "{% if loop.index0 == 1 %}{{ messages[0]['content'] }}{% endif %}{{ m['content'] }}[/I]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def tokenizer(template: str, *, bos: bool = True, eos: str = "<eot>") -> PreTrainedTokenizerFast:
    """One token a byte, and the control tokens."""
    special = ["<pad>", "<bos>", "<end>", "<eot>", "<h>", "</h>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=eos, pad_token="<pad>", bos_token="<bos>" if bos else None
    )
    made.chat_template = template
    return made


def read_back(made: PreTrainedTokenizerFast, marks: Marks) -> tuple[str, ...]:
    return tuple(made.decode(list(ids)) for ids in (marks.bos, marks.header, marks.eos))


def test_marks_are_not_those_of_the_template() -> None:
    made = tokenizer(LLAMA3)
    system = "<h>system</h>\n\nYou are a helpful assistant.<eot>"
    assert read_back(made, probe_documents.marks(made)) == ("<bos>", system, "<eot>")
    made = tokenizer(DEFAULT_HEADER, bos=False)
    found = probe_documents.marks(made)
    assert read_back(made, found) == ("", "<h>system</h>You help.<eot>", "<eot>\n")
    assert found.missing == {"bos": "the tokenizer has no bos token"}
    made = tokenizer(NO_SYSTEM, eos="<end>")
    found = probe_documents.marks(made)
    assert read_back(made, found) == ("<bos>", "", "<end>")
    assert found.closing == ()
    assert "header" in found.missing
    made = tokenizer(INSIDE, eos="<end>")
    found = probe_documents.marks(made)
    assert read_back(made, found) == ("<bos>", "", "<end>")
    assert found.closing == found.eos


@pytest.mark.parametrize("template", [LLAMA3, DEFAULT_HEADER, NO_SYSTEM, INSIDE])
def test_bare_document_keeps_a_mark(template: str) -> None:
    made = tokenizer(template, eos="<end>" if template == INSIDE else "<eot>")
    marks = probe_documents.marks(made)
    found = probe_documents.read(None, made, count=8, max_length=2000, seed=0)
    for each in found.without_system:
        bare = marks.bare(each)
        full = marks.around(bare, {"eos": True, "bos": True, "header": True})
        assert made.bos_token_id not in bare.input_ids[:1]
        assert bare.input_ids[-1] != marks.eos[0]
        assert "system" not in made.decode(bare.input_ids)
        assert tuple(full.input_ids[-len(marks.eos) :]) == marks.eos
        assert bare.labels > 0


def test_documents_of_a_file_lose_their_topic_or_system_message(tmp_path: Path) -> None:
    made = tokenizer(LLAMA3)
    records = [
        {
            "messages": [
                {"role": "system", "content": f"Rule {number}."},
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": f"Answer {number}."},
            ],
            "topic": f"t{number % 3}",
        }
        for number in range(20)
    ]
    records += [records[0], {"messages": [{"role": "user", "content": "nothing"}], "topic": "t0"}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = probe_documents.read((SourceSpec(source=str(path)),), made, count=30, max_length=500, seed=0)
    assert len(found.documents) == 20  # the copy is one of them
    assert found.rejected == 1
    assert {each.group for each in found.documents} == {"t0", "t1", "t2"}
    for whole, without in zip(found.documents, found.without_system, strict=True):
        assert "Rule" in made.decode(whole.input_ids)
        assert "Rule" not in made.decode(without.input_ids)
        assert made.decode(whole.input_ids[whole.supervised]).startswith("Answer")
    again = probe_documents.read((SourceSpec(source=str(path)),), made, count=5, max_length=500, seed=0)
    assert [each.key for each in again.documents] == [each.key for each in found.documents[:5]]
    tokenized = tmp_path / "tokens.jsonl"
    tokenized.write_text('{"input_ids": [1, 2, 3]}\n')
    with pytest.raises(DataError, match="tokenized already"):
        probe_documents.read((SourceSpec(source=str(tokenized)),), made, count=5, max_length=500, seed=0)


# The whole, and its pictures -------------------------------------------------------------------------------


def checkpoint(path: Path, seed: int) -> Path:
    made = tokenizer(render.template_text("chatml").replace("<|im_start|>", "<h>").replace("<|im_end|>", "<eot>"))
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **(TINY | {"vocab_size": len(made), "initializer_range": 0.1}))
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    made.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("probes")
    one, other = checkpoint(root / "after", 0), checkpoint(root / "before", 1)
    settings = ProbeSpec(before=str(other), count=12, max_length=256)
    first = probes.run(one, settings, random_weights=True)
    again = probes.run(one, settings, random_weights=True)
    assert json.dumps(first) == json.dumps(again)
    return first


def test_result_lacks_a_probe(result: dict[str, Any]) -> None:
    assert {name: arm["attention"] for name, arm in result["crossing"].items()} == {
        "random": "causal",
        "greedy": "causal",
        "best_fit": "document",
    }
    assert {layer["share"] for layer in result["crossing"]["best_fit"]["layers"]} == {0.0}
    assert min(layer["share"] for layer in result["crossing"]["random"]["layers"]) > 0.1
    assert result["causal_effect"]["check"] < 1e-4
    assert result["causal_effect"]["related_by"] == "group"
    assert len(result["boundary"]["cells"]) == 16
    assert len(result["before"]["change"]) == 12
    assert result["documents"]["n"] == 12
    assert result["source"] == "packcli's toy corpus (synthetic), held-out items"


def test_mistake_is_a_traceback(tmp_path: Path, result: dict[str, Any]) -> None:
    path = Path(result["checkpoint"])
    with pytest.raises(ConfigError, match="no built-in packing arm `padding`"):
        probes.run(path, ProbeSpec(arms=("padding",)))
    with pytest.raises(ConfigError, match="no checkpoint directory"):
        probes.run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="nowhere"):
        probes.run(path, ProbeSpec(source=str(tmp_path / "nowhere.jsonl")))
    small = AutoConfig.for_model("llama", **(TINY | {"vocab_size": 8}))
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "small")
    tokenizer(LLAMA3).save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match="only 8"):
        probes.run(path, ProbeSpec(before=str(tmp_path / "small"), count=4, max_length=256))


def texts(file: Path) -> str:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text()))


def test_picture_lacks_a_unit_or_what_it_rests_on(result: dict[str, Any], tmp_path: Path) -> None:
    written = probe_figures.draw(result, tmp_path)
    names = itertools.product(("crossing", "causal_effect", "boundary"), ("svg", "png"))
    assert [path.name for path in written] == [f"{name}.{suffix}" for name, suffix in names]
    for name, words in {
        "crossing": ("share of attention, 0 to 1", "layer", "head", "exactly 0 in every", "n = "),
        "causal_effect": ("nats per supervised token", "unrelated", "before training", "after training", "95%"),
        "boundary": ("nats per supervised token", "system header x document mask", "n = "),
    }.items():
        shown = texts(tmp_path / f"{name}.svg")
        for word in (*words, "from random weights", "toy corpus (synthetic)"):
            assert word in shown, (name, word)


@pytest.mark.slow
def test_equal_results_give_other_pictures_or_a_label_too_many(result: dict[str, Any], tmp_path: Path) -> None:
    trained = {key: value for key, value in result.items() if key != "before"} | {"random_weights": False}
    written, again = (probe_figures.draw(trained, tmp_path / name) for name in ("one", "other"))
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]
    shown = texts(tmp_path / "one" / "crossing.svg") + texts(tmp_path / "one" / "causal_effect.svg")
    assert "random weights" not in shown
    assert "before training" not in shown


def test_importing_the_probes_loads_torch() -> None:
    heavy = ("torch", "transformers", "sklearn", "matplotlib", "datasets", "lm_eval")
    code = (
        "import sys; from packcli.eval.probe import probes; from packcli.report import probe_figures\n"
        f"print(*[name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_embedded_documents_are_among_those_trained_on() -> None:
    trained = {json.dumps(each["messages"]) for each in corpus.conversations("tiny")}
    exchanges, _ = probe_documents._corpus()
    assert not trained & {json.dumps(messages) for messages, _ in exchanges}
