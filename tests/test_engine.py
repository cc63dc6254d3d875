"""Engines: the same answers as lm-eval's own model, faster; and what a machine or a server can do to them."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import MultiTokenEOSCriteria
from test_eval import build_tokenizer, save_llama
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from packcli.errors import MissingError, OutOfMemoryError
from packcli.eval.checkpoint import read
from packcli.eval.engines import engine, generation
from packcli.eval.engines.generation import BatchSize, Stops

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_llama(path, build_tokenizer())
    return path


def asks(prompts: list[str], until: list[str], limit: int) -> list[Instance]:
    settings = {"until": until, "do_sample": False, "max_gen_toks": limit}
    return [Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts]


def peer(checkpoint: Path, batch_size: int = 1) -> HFLM:
    """lm-eval's own class on the same checkpoint, as greedy as ours."""
    model, tokenizer = read(checkpoint, chat_template=False)
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def ours(checkpoint: Path, batch_size: int | None = None) -> Any:
    return engine.load(checkpoint, chat_template=False, batch_size=batch_size, device="cpu")


def prompts(shared: str = "") -> list[str]:
    draw = random.Random(0)
    words = ["pear", "sun", "cat: 7", "swap", "= pen", "\n", "1,2,3", "über"]
    lengths = [1, 2, 3, 5, 8, 13, 40, 90, 4]
    return [shared + " ".join(draw.choices(words, k=length)) for length in lengths]


# The same answers ---------------------------------------------------------------------------------------


def test_stop_strings_across_token_borders_or_empty_answers_differ_from_lm_evals(llama: Path) -> None:
    """Stops are cut out of what the model writes: at any place, over any border, several at once."""
    theirs = peer(llama)
    free = theirs.generate_until(asks(prompts(), [], 24), disable_tqdm=True)
    draw = random.Random(1)
    pieces = [text[start : start + draw.randint(1, 7)] for text in free for start in (0, 3, 9) if text[start:]]
    pieces = [piece for piece in pieces if piece and "\ufffd" not in piece]
    num_stopped = num_empty = 0
    for number in range(6):
        until = draw.sample(pieces, k=min(3, 1 + number % 3))
        requests = asks(prompts(), until, 24)
        expected = theirs.generate_until(requests, disable_tqdm=True)
        num_stopped += sum(a != b for a, b in zip(expected, free, strict=True))
        num_empty += expected.count("")
        assert ours(llama, (1, 2, 3, 4, 9, 64)[number]).generate_until(requests) == expected
    assert num_stopped > 6
    assert num_empty > 0


@pytest.mark.parametrize("batch_size", [1, 2, 5, None])
def test_limits_mixed_in_one_call_or_prompts_of_different_length_change_answers(
    llama: Path, batch_size: int | None
) -> None:
    requests = [asks(prompts(), ["\n\n"], limit)[n] for n, limit in enumerate((1, 7, 24, 1, 7, 24, 7, 24, 1))]
    assert ours(llama, batch_size).generate_until(requests) == peer(llama).generate_until(
        requests, disable_tqdm=True
    )


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        Qwen2Config(**SIZES, use_sliding_window=False),
        MistralConfig(**SIZES, sliding_window=12),
        Gemma2Config(**SIZES, sliding_window=12, query_pre_attn_scalar=8),
    ],
    ids=["llama", "qwen2", "mistral_window", "gemma2_window_and_full"],
)
@pytest.mark.parametrize("shared", ["", "swap: sun cat pen\n= cat sun pen\n" * 5], ids=["apart", "shared_shots"])
def test_shared_shots_or_leaving_rows_change_the_answers_of_a_family(
    config: Any, shared: str, tmp_path: Path
) -> None:
    tokenizer = build_tokenizer()
    config.update({"vocab_size": len(tokenizer), "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 0})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = peer(tmp_path)
    free = theirs.generate_until(asks(prompts(shared), [], 20), disable_tqdm=True)
    requests = asks(prompts(shared), [free[0][4:6], free[5][8:10]], 20)
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert ours(tmp_path, 8).generate_until(requests) == expected


def test_prompt_that_does_not_fit_is_cut_elsewhere_than_lm_evals(llama: Path) -> None:
    theirs, mine = peer(llama), ours(llama, 4)
    theirs._max_length = mine._max_length = 60
    requests = asks(prompts(), ["\n\n"], 20)
    assert mine.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their space in front, which decoding drops from a text's first token, as in Llama 2."""
    words = ["<unk>", "<pad>", "<|im_end|>", *(f"▁{word}" for word in ("sun", "cat", "=", "pen")), "s", "▁", "un"]
    bpe = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    bpe.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<|im_end|>")


@pytest.mark.parametrize("build", [build_tokenizer, metaspace_tokenizer])
def test_stop_looked_for_where_the_newest_token_cannot_end_it(
    build: Callable[[], PreTrainedTokenizerFast],
) -> None:
    """The quick look at the newest token against lm-eval's criterion, which decodes at every step."""
    tokenizer = build()
    draw = random.Random(0)
    texts = [tokenizer.decode(draw.choices(range(3, len(tokenizer)), k=12)) for _ in range(30)]
    strings = [text[3:5] for text in texts if "\ufffd" not in text[3:5]] + ["<|im_end|>", "n ", "\n", "é"]
    num_found = 0
    for _ in range(300):
        tokens = draw.choices(range(len(tokenizer)), k=20)
        until = draw.sample(strings, k=2)
        stops = Stops(tokenizer, until, [])
        theirs = [MultiTokenEOSCriteria(string, tokenizer, 0, 1) for string in until]
        for length in range(1, len(tokens) + 1):
            written = torch.tensor(tokens[:length])
            expected = any(criterion(written[None], None) for criterion in theirs)
            assert stops.ends(written, tokens[length - 1]) == expected
            if expected:
                num_found += 1
                break
    assert num_found > 30


def test_special_token_that_is_a_stop_string_but_not_the_models_end(llama: Path, tmp_path: Path) -> None:
    """lm-eval writes on behind it as long as another row of the batch does; at batch size 1 it stops."""
    theirs = peer(llama)
    theirs.model.generation_config.eos_token_id = None
    mine = ours(llama, 9)
    mine.model.generation_config.eos_token_id = None
    for lm in (theirs, mine):
        forward = lm.model.lm_head.forward
        weight = torch.zeros(lm.model.lm_head.weight.shape[0])
        weight[lm.tokenizer.convert_tokens_to_ids("<|im_start|>")] = 0.25
        lm.model.lm_head.forward = lambda hidden, forward=forward, weight=weight: forward(hidden) + weight
    requests = asks(prompts(), ["<|im_start|>"], 24)
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert mine.generate_until(requests) == expected
    lengths = [answer.num_tokens for batch in mine.answers([r.args for r in requests]) for _, answer in batch]
    assert min(lengths) < 24  # type: ignore[type-var]


def test_how_an_answer_ended_is_told_wrong(llama: Path) -> None:
    lm = ours(llama, 4)

    def answer(until: list[str]) -> Any:
        [(_, said)] = [item for batch in lm.answers([asks(["swap: sun"], until, 12)[0].args]) for item in batch]
        return said

    free = answer([])
    assert (free.num_tokens, free.ended) == (12, "length")
    cut = answer([free.text[2:4]])
    assert (cut.text, cut.ended) == (free.text.split(free.text[2:4])[0], "stop")
    assert cut.num_tokens < 12


# The speed ----------------------------------------------------------------------------------------------


def test_shots_are_read_again_for_every_prompt(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = ours(llama, 9)
    read_: list[tuple[int, int]] = []
    lm.model.register_forward_pre_hook(
        lambda _, __, given: read_.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    shared = "swap: sun cat pen\n= cat sun pen\n" * 12
    requests = asks(prompts(shared), [], 4)
    lm.generate_until(requests)
    num_shared = len(lm.tok_encode(shared))
    longest = max(len(lm.tok_encode(request.args[0])) for request in requests)
    assert read_[0][0] == 1
    assert read_[0][1] > num_shared - 4
    assert read_[1] == (9, longest - read_[0][1])


def test_shots_are_read_again_for_the_next_call_or_taken_for_those_of_others(llama: Path) -> None:
    lm = ours(llama, 9)
    sizes: list[int] = []
    lm.model.register_forward_pre_hook(
        lambda _, __, given: sizes.append(given["input_ids"].shape[0]), with_kwargs=True
    )
    shots = "swap: sun cat pen\n= cat sun pen\n" * 12
    calls = [
        prompts(shots)[:5],
        [text + " sun" for text in prompts(shots)[4:]],
        prompts(shots.replace("cat", "sun")),
    ]
    for texts, is_read in zip(calls, (True, False, True), strict=True):
        sizes.clear()
        requests = asks(texts, [], 12)
        assert lm.generate_until(requests) == peer(llama).generate_until(requests, disable_tqdm=True)
        assert (sizes[0] == 1) == is_read


def test_ended_answers_are_computed_until_the_last_one_ends(llama: Path) -> None:
    lm = ours(llama, 9)
    rows: list[int] = []
    lm.model.register_forward_pre_hook(
        lambda _, __, given: rows.append(given["input_ids"].shape[0]), with_kwargs=True
    )
    free = lm.generate_until(asks(prompts(), [], 24))
    rows.clear()
    lm.generate_until(asks(prompts(), [free[0][2:3], free[4][1:2]], 24))
    assert rows[0] == 9
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 9


def test_batch_size_that_is_slower_or_does_not_fit_is_kept() -> None:
    size = BatchSize(None)
    for seconds in (1.0, 2.1, 1.5, 5.0, 9.0):  # 32, 64 while the machine is busy, 128, then too many
        size.saw(int(size), 100 * int(size), seconds)
    assert int(size) == 128
    size = BatchSize(None)
    for seconds in (1.0, 1.5, 4.0, 9.0):
        size.saw(int(size), 100 * int(size), seconds)
    assert int(size) == 64
    size.saw(64, 1, 1.0)
    assert int(size) == 64
    assert size.out_of_memory(64)
    assert int(size) == 32
    size.saw(32, 10**9, 1.0)
    assert int(size) == 32
    assert not size.out_of_memory(1)
    few = BatchSize(None)
    few.saw(3, 1, 1.0)  # the last prompts of a task say nothing
    assert int(few) == generation.SIZES[0]
    assert int(BatchSize(5)) == 5


def test_out_of_memory_loses_answers_or_is_a_traceback(llama: Path) -> None:
    requests = asks(prompts(), ["\n\n"], 8)
    expected = ours(llama, 1).generate_until(requests)
    lm = ours(llama, 8)
    generate, holds, sizes = lm.model.generate, 2, []

    def scarce(**given: Any) -> Any:
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**given)

    lm.model.generate = scarce
    assert lm.generate_until(requests) == expected
    assert sizes[:3] == [8, 4, 2]
    assert max(sizes[3:]) == 2
    holds = 0
    with pytest.raises(OutOfMemoryError, match="single prompt"):
        lm.generate_until(requests)


def test_out_of_memory_while_comparing_given_answers(llama: Path) -> None:
    requests = [Instance("loglikelihood", {}, (prompt, " cat"), 0) for prompt in prompts()]
    expected = peer(llama).loglikelihood(requests, disable_tqdm=True)
    lm = ours(llama)
    call, holds = lm._model_call, 2

    def scarce(inputs: torch.Tensor, **given: Any) -> Any:
        if len(inputs) > holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(inputs, **given)

    lm._model_call = scarce
    found = lm.loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (reference, same) in zip(found, expected, strict=True):
        assert value == pytest.approx(reference, abs=1e-4)
        assert greedy == same
    holds = 0
    with pytest.raises(OutOfMemoryError, match="single prompt"):
        lm.loglikelihood(requests, disable_tqdm=True)


def test_logits_of_long_prompts_fill_the_memory(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packcli.eval.engines.hf._LOGITS_BYTES", 100 * 4 * 400)
    lm = ours(llama)
    sizes: list[int] = []
    lm.model.register_forward_pre_hook(lambda _, given: sizes.append(given[0].numel()))
    for text in ("sun cat pen " * 3, "sun cat pen " * 20):
        pairs = [Instance("loglikelihood", {}, (text, f" {n} pears"), 0) for n in range(6)]
        lm.loglikelihood(pairs, disable_tqdm=True)
    assert max(sizes[:-6]) <= 100
    assert len(sizes[-6:]) == 6


# Which engine -------------------------------------------------------------------------------------------


def test_naming_the_engine_loads_it() -> None:
    code = (
        "import sys; from packcli.eval.engines import engine; print(engine.identity('hf')); "
        "print(engine.identity('vllm')); print(engine.identity('openai')); "
        "print(*[name for name in ('torch', 'transformers', 'lm_eval', 'openai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, third, loaded = done.stdout.splitlines()
    assert first == f"hf transformers {version('transformers')} torch {version('torch')}"
    assert second.startswith("vllm vllm ")
    assert (third, loaded) == ("openai", "")


def version(package: str) -> str:
    return str(sys.modules[package].__version__).partition("+")[0]


def test_vllm_that_is_not_installed_is_a_traceback(llama: Path) -> None:
    with pytest.raises(MissingError, match="not in this environment") as caught:
        engine.load(llama, chat_template=False, engine="vllm")
    assert "pip install vllm" in caught.value.fix


STAND_IN = {
    "vllm/__init__.py": """
class SamplingParams:
    def __init__(self, **settings): self.settings = settings
def TokensPrompt(prompt_token_ids): return prompt_token_ids
class _Any:
    def __init__(self, **fields): self.__dict__ |= fields
class LLM:
    def __init__(self, **settings):
        self.settings, self.asked = settings, []
        self.llm_engine = _Any(model_config=_Any(max_model_len=100))
    def generate(self, prompts, sampling_params, use_tqdm, lora_request):
        self.asked += zip(prompts, sampling_params)
        said = [("cat pen" * 3, "length"), ("sun", "stop")]
        return [_Any(outputs=[_Any(text=said[n % 2][0], token_ids=[5] * 7, finish_reason=said[n % 2][1])])
                for n in range(len(prompts))]
""",
    "vllm/lora/__init__.py": "",
    "vllm/lora/request.py": "class LoRARequest: pass",
    "vllm/tokenizers.py": """
def get_tokenizer(name, **settings):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(name)
""",
    "vllm/renderers/__init__.py": "",
    "vllm/renderers/hf.py": "def resolve_chat_template(tokenizer, **_): return tokenizer.chat_template",
    "vllm-0.33.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n",
}
"""What lm-eval's class takes from vLLM, with canned answers: shows what vLLM is asked, and not that it can."""


@pytest.mark.parametrize("chat_template", [True, False])
def test_vllm_is_asked_something_else_than_the_model_in_this_process(
    chat_template: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in STAND_IN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    lm = engine.load(llama, chat_template=chat_template, engine="vllm")
    reference = engine.load(llama, chat_template=chat_template)
    try:
        requests = [r.args for r in asks(["swap: sun\n", "x " * 300], ["pen", "<|im_start|>"], 16)]
        first, second = [answer for batch in lm.answers(requests) for _, answer in batch]
        assert (first.text, first.num_tokens, first.ended) == ("cat ", 7, "stop")
        assert (second.text, second.ended) == ("sun", "stop")
        (ids, sampling), (cut, _) = lm.model.asked
        assert ids == reference._prompt("swap: sun\n", 84)
        assert len(cut) == 84
        assert sampling.settings["temperature"] == 0
        assert sampling.settings["max_tokens"] == 16
        assert set(sampling.settings["stop"]) == {"pen", "<|im_start|>", "<|im_end|>"}
        tokenizer = AutoTokenizer.from_pretrained(llama)
        ends = set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
        assert set(sampling.settings["stop_token_ids"]) == ends
        pair = ("<|im_start|>assistant\n", "= cat<|im_end|>")
        assert lm._encode_pair(*pair) == reference._encode_pair(*pair)
        assert lm.model.settings["trust_remote_code"] is False
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm" or "vllm" in name]:
            del sys.modules[name]
