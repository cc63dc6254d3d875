"""Time how answers are written: `packcli eval`'s `hf` engine beside lm-eval's own `HFLM`, and compare the answers.

    python benchmarks/eval_generation.py --bench-data DIR [--rows 64] [--rounds 3] [--sizes 1,8,16,32,64,128]

GSM8K (`DIR/gsm8k/*.jsonl`), 4 shots, as the packaged task asks, greedy, fp32, on the CPU. Two small Llamas:
`trained` read the training file for a few minutes and ends its answers by itself, at many lengths; `random` has
random weights, a vocabulary of 128,256, and never ends. Neither solves anything: what is measured is the engine.
Both engines hold the same model object and take turns within a round; a figure is the median over rounds, with the
range. CPU seconds are there because a busy machine moves the wall clock. Prints Markdown; `--models DIR` keeps the
models for another run.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import lm_eval
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from packcli.config import EvalSpec
from packcli.eval.engines import engine
from packcli.eval.harness import Harness

END = "<|endoftext|>"
NEGATIVES = 1500  # of the vocabulary, drawn for each training step: a softmax over all of it would take an hour


@dataclass(frozen=True, slots=True)
class Kind:
    """A model to write with: its width, its vocabulary, how long it trains, how far it may write."""

    name: str
    width: int
    vocabulary: int
    steps: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """One engine over all prompts."""

    wall_s: float
    cpu_s: float
    texts: list[str]


def tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`, filled up to `size` with tokens that no text holds."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    spec = json.loads(bpe.to_str())
    vocabulary, draw = spec["model"]["vocab"], random.Random(0)
    while len(vocabulary) < size:
        vocabulary.setdefault("Ġ" + "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=8)), len(vocabulary))
    full = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=full, eos_token=END, pad_token=END)


def make(kind: Kind, bench_data: Path, path: Path) -> None:
    """Save the model and its tokenizer."""
    lines = (bench_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows]
    encoder = tokenizer(texts, kind.vocabulary)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=kind.vocabulary,
        hidden_size=kind.width,
        intermediate_size=kind.width * 5 // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=encoder.eos_token_id,
        pad_token_id=encoder.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    if kind.steps:
        train(model, [encoder.encode(text) for text in texts], kind.steps)
    model.save_pretrained(path)
    encoder.save_pretrained(path)


def train(model: Any, documents: list[list[int]], steps: int, rows: int = 8, length: int = 256) -> None:
    """Next-token training on the documents in a shuffled stream."""
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    stream: list[int] = []
    for _ in range(steps):
        while len(stream) < rows * length:
            order = torch.randperm(len(documents), generator=draw).tolist()
            stream += [token for number in order for token in documents[number]]
        ids = torch.tensor(stream[: rows * length]).view(rows, length)
        del stream[: rows * length]
        targets = ids[:, 1:].reshape(-1)
        drawn = torch.randint(model.config.vocab_size, (NEGATIVES,), generator=draw)
        candidates = torch.unique(torch.cat([targets, drawn]))
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].reshape(len(targets), -1)
        logits = hidden @ model.lm_head.weight[candidates].T
        torch.nn.functional.cross_entropy(logits, torch.searchsorted(candidates, targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def gsm8k(checkpoint: Path, bench_data: Path, rows: int, max_tokens: int) -> list[Any]:
    """The requests that scoring the packaged task makes, with `max_tokens` instead of its own limit."""
    caught: list[Any] = []
    load = engine.load

    def catching(*arguments: Any, **settings: Any) -> Any:
        lm = load(*arguments, **settings)
        lm.generate_until = lambda requests: (caught.extend(requests), [""] * len(requests))[1]
        return lm

    engine.load = catching
    try:
        spec = EvalSpec(bench_data=str(bench_data), limit=rows, chat_template=False)
        list(Harness(spec).evaluate(checkpoint, ["gsm8k"]))
    finally:
        engine.load = load
    return [replace(r, arguments=(r.args[0], r.args[1] | {"max_gen_toks": max_tokens})) for r in caught]


def timed(work: Callable[[], list[str]]) -> Run:
    wall, cpu = time.perf_counter(), time.process_time()
    texts = work()
    return Run(time.perf_counter() - wall, time.process_time() - cpu, texts)


def measure(
    checkpoint: Path, requests: list[Any], sizes: Sequence[int], rounds: int
) -> tuple[dict[str, list[Run]], list[int]]:
    """Runs by engine and batch size, and the batch sizes that ours found."""
    from lm_eval.models.huggingface import HFLM

    from packcli.eval.engines.hf import HuggingFace

    loaded = engine.load(checkpoint, chat_template=False, device="cpu")
    model, encoder = loaded.model, loaded.tokenizer
    runs: dict[str, list[Run]] = {}
    found = []
    for number in range(rounds):
        for size in sizes:
            theirs = HFLM(pretrained=model, tokenizer=encoder, backend="causal", batch_size=size)
            run = timed(lambda lm=theirs: lm.generate_until(requests, disable_tqdm=True))
            runs.setdefault(f"HFLM, batch size {size}", []).append(run)
        for wanted in (None, max(sizes)):
            ours = HuggingFace(model, encoder, chat_template=False, batch_size=wanted)
            run = timed(lambda lm=ours: lm.generate_until(requests))
            runs.setdefault(f"packcli, batch size {wanted or 'found'}", []).append(run)
            if wanted is None:
                found.append(int(ours._writer.size))
        print(f"<!-- round {number + 1} of {rounds} -->", flush=True)
    return runs, found


def table(runs: dict[str, list[Run]], num_rows: int, encoder: Any) -> list[str]:
    """Markdown: samples a second by wall clock and by CPU, against HFLM's default; items that differ from it."""
    [default, *_] = runs
    reference = runs[default][0].texts
    base = median(run.wall_s for run in runs[default]), median(run.cpu_s for run in runs[default])
    lines = [
        "| engine | samples/s (range) | x HFLM's default | CPU s | x HFLM's default | answers that differ |",
        "|---|---|---|---|---|---|",
    ]
    for name, several in runs.items():
        walls = [run.wall_s for run in several]
        cpu = median(run.cpu_s for run in several)
        rate, low, high = (num_rows / wall for wall in (median(walls), max(walls), min(walls)))
        differ = max(sum(a != b for a, b in zip(run.texts, reference, strict=True)) for run in several)
        lines.append(
            f"| {name} | {rate:.2f} ({low:.2f} to {high:.2f}) | {base[0] / median(walls):.1f} | {cpu:.1f} "
            f"| {base[1] / cpu:.1f} | {differ} of {num_rows} |"
        )
    lengths = sorted(len(encoder.encode(text)) for text in reference)
    lines.append(
        f"\nAnswers hold {lengths[0]} to {lengths[-1]} tokens, in the median {lengths[len(lengths) // 2]}."
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench-data", type=Path, required=True)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=512, help="limit of an answer of `trained`")
    parser.add_argument("--random-tokens", type=int, default=128, help="limit of an answer of `random`")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--sizes", type=lambda text: [int(part) for part in text.split(",")], default="1,8,16,32,64,128"
    )
    parser.add_argument("--only", choices=["trained", "random"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kinds = [
        Kind("trained", 128, 32_000, options.steps, options.max_tokens),
        Kind("random", 64, 128_256, 0, options.random_tokens),
    ]
    versions = f"lm-eval {lm_eval.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{versions}, Python {platform.python_version()}, {options.threads} threads")
    with tempfile.TemporaryDirectory() as scratch:
        for kind in kinds:
            if options.only not in (None, kind.name):
                continue
            path = (options.models or Path(scratch)) / kind.name
            if not (path / "config.json").is_file():
                make(kind, options.bench_data, path)
            requests = gsm8k(path, options.bench_data, options.rows, kind.max_tokens)
            runs, found = measure(path, requests, options.sizes, options.rounds)
            print(f"\n### {kind.name}, {len(requests)} rows of GSM8K, at most {kind.max_tokens} tokens\n")
            encoder = PreTrainedTokenizerFast.from_pretrained(path)
            print("\n".join(table(runs, len(requests), encoder)))
            print(f"Batch size that packcli went on with after looking: {', '.join(map(str, found))}.", flush=True)


if __name__ == "__main__":
    main()
