"""Attention over packed documents on a CPU: one dense mask against a loop over documents, forward and backward.

    python benchmarks/attention_cpu.py

Process CPU time on one thread, median of 7, both ways in one run. Lengths are synthetic.
"""

import statistics
import time

import torch

from packcli.model import attention
from packcli.model.attention import Segments

HEADS, DIM = 4, 16


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def milliseconds(lengths: tuple[int, ...], masked: bool) -> float:
    q, k, v = (torch.randn(1, HEADS, sum(lengths), DIM, requires_grad=True) for _ in range(3))
    times = []
    for _ in range(7):
        started = time.process_time()
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        mask = (owner[:, None] == owner[None, :]).tril()
        for _ in range(2):  # two layers share the mask of a batch
            if masked:
                out = dense(q, k, v, mask)
            else:
                out = attention.forward(torch.nn.Identity(), q, k, v, None, segments=Segments(lengths))[0]
            out.sum().backward()
        times.append(1000 * (time.process_time() - started))
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print("| slots | mean document | dense mask, ms | loop, ms | dense / loop |\n|---|---|---|---|---|")
    for slots in (64, 128, 256, 512, 1024, 2048):
        for mean in (8, 32, 128):
            lengths: list[int] = []
            while sum(lengths) < slots:
                drawn = int(torch.randint(mean // 2, 3 * mean // 2, (1,), generator=generator))
                lengths.append(min(drawn, slots - sum(lengths)))
            masked, loop = (milliseconds(tuple(lengths), way) for way in (True, False))
            print(f"| {slots} | {mean} | {masked:.2f} | {loop:.2f} | {masked / loop:.2f} |")


if __name__ == "__main__":
    main()
