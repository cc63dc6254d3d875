"""Time one checkpoint in one process and in several: samples/s of `packcli eval --processes N`, on the CPU.

    python benchmarks/eval_processes.py --bench-data DIR [--rows 256] [--tokens 64] [--rounds 3] [--processes 2]

GSM8K (`DIR/gsm8k/*.jsonl`), 4 shots, greedy, fp32. A toy: a small Llama with random weights and a vocabulary of
128,256, which never ends an answer. Each of N processes has one thread; one process has one, and N for comparison.
They take turns within a round; a figure is the median over rounds, with the range. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

import torch
import transformers
from eval_generation import Kind, Run, gsm8k, make, timed

from packcli.eval.engines import engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench-data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    runs: dict[tuple[int, int], list[Run]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch)
        make(Kind("random", 64, 128_256, 0, options.tokens), options.bench_data, path)
        requests = gsm8k(path, options.bench_data, options.rows, options.tokens)
        torch.set_num_threads(options.processes)  # which the processes share
        settings = {"chat_template": False, "batch_size": options.batch_size}
        alone = engine.load(path, device="cpu", **settings)
        together = engine.load(path, device="cpu", processes=options.processes, **settings)
        for _ in range(options.rounds):
            for processes, threads in ((1, 1), (1, options.processes), (options.processes, 1)):
                torch.set_num_threads(threads)
                lm = together if processes > 1 else alone
                runs.setdefault((processes, threads), []).append(timed(lambda lm=lm: lm.generate_until(requests)))
    base, reference = (median(run.wall_s for run in runs[1, 1]), runs[1, 1][0].texts)
    print("| processes | threads each | samples/s (range) | ratio | answers that differ |\n|---|---|---|---|---|")
    for (processes, threads), several in runs.items():
        walls = [run.wall_s for run in several]
        rate, low, high = (len(requests) / wall for wall in (median(walls), max(walls), min(walls)))
        differ = max(sum(a != b for a, b in zip(run.texts, reference, strict=True)) for run in several)
        ratio = base / median(walls)
        print(f"| {processes} | {threads} | {rate:.2f} ({low:.2f} to {high:.2f}) | {ratio:.2f} | {differ} |")


if __name__ == "__main__":
    main()
