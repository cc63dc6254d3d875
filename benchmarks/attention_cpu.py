"""Attention over packed documents on a CPU, forward and backward: one dense mask, a call a document, and ours.

    python benchmarks/attention_cpu.py

Ours calls long documents one by one and short neighbours together, with a small mask. Process CPU time on one
thread, median of 7, all ways in one run; two layers share what is made once a batch. Lengths are synthetic.
"""

import statistics
import time

import torch

from packcli.model import attention
from packcli.model.attention import Backend, Segments

HEADS, DIM = 4, 16
TOGETHER = attention._TOGETHER
SDPA, CPU = Backend("sdpa", torch.__version__, "benchmark"), torch.device("cpu")


def dense(inputs: list[torch.Tensor], lengths: tuple[int, ...]) -> None:
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner[None, :]).tril()
    for _ in range(2):
        torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask).sum().backward()


def segmented(inputs: list[torch.Tensor], lengths: tuple[int, ...], together: int) -> None:
    attention._TOGETHER = together
    segments = Segments(lengths, SDPA, CPU)
    for _ in range(2):
        attention.forward(torch.nn.Identity(), *inputs, None, segments=segments)[0].sum().backward()


def milliseconds(lengths: tuple[int, ...]) -> list[float]:
    ways = [
        dense,
        lambda inputs, lengths: segmented(inputs, lengths, 0),
        lambda inputs, lengths: segmented(inputs, lengths, TOGETHER),
    ]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(8):
        for way, taken in zip(ways, times, strict=True):
            inputs = [torch.randn(1, sum(lengths), HEADS, DIM).transpose(1, 2).requires_grad_() for _ in range(3)]
            started = time.process_time()
            way(inputs, lengths)
            taken.append(1000 * (time.process_time() - started))
    return [statistics.median(taken[1:]) for taken in times]


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print("| slots | mean document | dense mask, ms | loop, ms | ours, ms | dense / ours | loop / ours |")
    print("|---|---|---|---|---|---|---|")
    for slots in (64, 128, 256, 512, 1024, 2048):
        for mean in (8, 16, 32, 128):
            lengths: list[int] = []
            while sum(lengths) < slots:
                drawn = int(torch.randint(mean // 2, 3 * mean // 2, (1,), generator=generator))
                lengths.append(min(drawn, slots - sum(lengths)))
            masked, loop, ours = milliseconds(tuple(lengths))
            print(
                f"| {slots} | {mean} | {masked:.2f} | {loop:.2f} | {ours:.2f} "
                f"| {masked / ours:.2f} | {loop / ours:.2f} |"
            )


if __name__ == "__main__":
    main()
