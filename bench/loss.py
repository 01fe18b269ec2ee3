"""Peak memory of head and loss: model/loss.py beside full logits, forward and backward.

    python bench/loss.py [--tokens 4096] [--vocab 151936] [--hidden 1024]

bf16, every token trained, gradients of hidden states and head included. On a CPU each path runs in a process of its own:
the peak is the kernel's high-water mark of resident memory (VmHWM of /proc/self/status, reset before the pass) above what
was resident before it; on CUDA it is max_memory_allocated above what was allocated. Then both in fp32 with a vocabulary of
a tenth: same losses and gradients. Exits with 1 over 10 % of full logits, or more than 1e-5 apart.
"""

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path

import torch

from megatron_sft.model.loss import linear_cross_entropy

MEMORY_BAR, NUMBER_BAR = 0.10, 1e-5


def inputs(tokens: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states, head, labels and mask, on the GPU where there is one."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).to(where, dtype).requires_grad_()
    head = (torch.randn(vocab, hidden, generator=generator) * 0.02).to(where, dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator).to(where)
    return states, head, labels, torch.ones(tokens, device=where)


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As transformers has it: logits in the model's dtype, the loss in fp32 (loss/loss_utils.py:ForCausalLMLoss)."""
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="none") * mask


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, labels, mask, weight.shape[0])


PATHS = {"full logits": full_logits, "ours": ours}


def resident(name: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measured(name: str, sizes: tuple[int, int, int]) -> tuple[int, float]:
    """(bytes above what was there, seconds) of one forward and backward pass, in this process."""
    small = inputs(8, 32, 16, torch.bfloat16)
    PATHS[name](*small).sum().backward()  # threads and libraries that the first pass brings
    made = inputs(*sizes, torch.bfloat16)
    cuda = made[0].is_cuda
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again (proc(5))
        before = resident("VmRSS")
    began = time.perf_counter()
    PATHS[name](*made).sum().backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before, seconds


def apart(sizes: tuple[int, int, int]) -> float:
    """Greatest difference of losses and of both gradients in fp32, each relative to the greatest element."""
    results = []
    for function in PATHS.values():
        made = inputs(*sizes, torch.float32)
        loss = function(*made)
        results.append([loss.detach(), *torch.autograd.grad(loss.mean(), made[:2])])
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="file of the figures")
    options = parser.parse_args()
    sizes = (options.tokens, options.vocab, options.hidden)
    figures: dict[str, float] = {}
    for name in PATHS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak, seconds = pool.apply(measured, (name, sizes))
        figures[f"{name} GB"], figures[f"{name} s"] = peak / 1e9, seconds
    figures["share"] = figures["ours GB"] / figures["full logits GB"]
    figures["apart in fp32"] = apart((options.tokens, options.vocab // 10, options.hidden))
    where = "CUDA" if torch.cuda.is_available() else "CPU"
    print(f"{sizes[0]} tokens, vocabulary {sizes[1]}, hidden {sizes[2]}, bf16, forward and backward on {where}")
    for name in PATHS:
        print(f"{name:12}{figures[f'{name} GB']:8.3f} GB{figures[f'{name} s']:8.2f} s")
    print(
        f"ours / full logits: {figures['share']:.1%} (bar {MEMORY_BAR:.0%}); fp32 apart: {figures['apart in fp32']:.1e}"
        f" (bar {NUMBER_BAR:g})"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return int(figures["share"] > MEMORY_BAR or figures["apart in fp32"] > NUMBER_BAR)


if __name__ == "__main__":
    sys.exit(main())
