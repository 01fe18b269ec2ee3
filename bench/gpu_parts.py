"""What bench/gpu_first.py runs, part by part, in a process that it starts anew after a crash:

    python -m bench.gpu_parts --out FOLDER [--cpu] PART...

Each part writes FOLDER/PART.json: "begun" first, its figures at its end, so that an end at any moment loses one part only.
Times are means after warm-up, in milliseconds. --cpu: the same code on tiny sizes.
"""

import argparse
import functools
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
WHERE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16


class Part(NamedTuple):
    """One question to the device."""

    run: Callable[[], dict[str, Any]]
    limit_s: int
    """After which it is ended; on a CPU too."""
    on_cpu: bool = True


def size(on_gpu: int, on_cpu: int) -> int:
    return on_gpu if CUDA else on_cpu


def drawn(*shape: int, dtype: torch.dtype = DTYPE, grad: bool = False) -> torch.Tensor:
    return (torch.randn(*shape, device=WHERE, dtype=dtype) * 0.1).requires_grad_(grad)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(action: Callable[[], object]) -> float:
    """Mean of an action."""
    for _ in range(size(3, 1)):
        action()
    synchronize()
    start, times = time.perf_counter(), size(10, 1)
    for _ in range(times):
        action()
    synchronize()
    return 1e3 * (time.perf_counter() - start) / times


def both_ways(function: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> dict[str, Any]:
    """A function's forward pass, forward and backward, and what both take of memory beside inputs and gradients, in GiB."""
    upstream = torch.randn_like(function(*leaves))

    def whole() -> None:
        torch.autograd.grad(function(*leaves), leaves, upstream)

    row = {"forward_ms": milliseconds(lambda: function(*leaves)), "both_ms": milliseconds(whole)}
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        whole()
        row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return row


def attempt(action: Callable[[], Any]) -> Any:
    """What an action gives, or the text of its error: a kernel that is not there is an answer too."""
    try:
        return action()
    except (RuntimeError, ImportError, ValueError, TypeError, AttributeError) as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def smoke() -> dict[str, Any]:
    """A collective of one rank, a compiled kernel, and which fast paths this torch has."""
    import torch.distributed as dist

    with one_rank():
        total = torch.ones(4, device=WHERE)
        dist.all_reduce(total)
    from torch.nn import attention

    registered = attempt(lambda: list(attention.list_flash_attention_impls()))
    row = {"all_reduce": total.tolist(), "flash_implementations": registered, "grouped_mm": attempt(grouped_runs)}
    if CUDA:
        compiled = torch.compile(lambda x: torch.nn.functional.silu(x) * 2)
        row |= {"compiled": attempt(lambda: float(compiled(torch.ones(8, device=WHERE)).sum())), "torch": torch.__version__}
        row |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "nccl": list(torch.cuda.nccl.version())}
    return row


def grouped_runs() -> float:
    offsets = torch.tensor([8, 16], dtype=torch.int32, device=WHERE)
    return float(torch.nn.functional.grouped_mm(drawn(16, 16), drawn(2, 16, 16), offs=offsets).float().abs().max())


@contextmanager
def one_rank() -> Iterator[Any]:
    """Within it this process is a whole job; gives megatron-core's process groups."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_sft.config.run import ParallelConfig
    from megatron_sft.parallel import finalize, initialize

    initialize(ParallelConfig(), 1)
    yield ProcessGroupCollection.use_mpu_process_groups()
    finalize()


def head_products() -> dict[str, Any]:
    """The head's three products with as many rows of the vocabulary as a block had, has, and all: milliseconds, TFLOP/s."""
    row: dict[str, Any] = {}
    tokens, width = size(16384, 32), size(2048, 16)
    for rows in (4748, 4864, 151936) if CUDA else (12, 16):
        hidden, weight = drawn(tokens, width), drawn(rows, width)
        logits = hidden @ weight.T
        products = {
            "logits": lambda h=hidden, w=weight: h @ w.T,
            "hidden": lambda g=logits, w=weight: g @ w,
            "weight": lambda g=logits, h=hidden: g.T @ h,
        }
        times = {name: milliseconds(product) for name, product in products.items()}
        row[str(rows)] = {f"{name}_ms": ms for name, ms in times.items()}
        row[str(rows)]["tflops"] = 6 * tokens * width * rows / sum(times.values()) / 1e9
    return row


def loss() -> dict[str, Any]:
    """Head and loss whole, with aligned blocks of the vocabulary, without, and by Triton's kernels."""
    from megatron_sft.model import loss as module

    tokens, width, rows = size(16384, 32), size(2048, 16), size(151936, 600)
    hidden, weight = drawn(tokens, width, grad=True), drawn(rows, width, grad=True)
    labels, mask = torch.randint(0, rows, (tokens,), device=WHERE), torch.ones(tokens, device=WHERE)
    row, aligned = {}, module.ALIGNED_ROWS
    for name, multiple in (("aligned", aligned), ("unaligned", 1)):
        module.ALIGNED_ROWS = multiple
        row[name] = both_ways(lambda h, w: module.linear_cross_entropy(h, w, labels, mask, rows), hidden, weight)
        row[name]["block_rows"] = min(rows, module.block_rows(rows, tokens))
    module.ALIGNED_ROWS = aligned
    if CUDA:
        settings = labels, mask, rows, None, None, module.CROSS_ENTROPY, None, True
        row["triton"] = both_ways(lambda h, w: module.linear_cross_entropy(h, w, *settings), hidden, weight)
    return row


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_size": 1024},
    "sinks": {"core": {"softmax_type": "learnable"}},
    "softcap": {"attn_logit_softcapping": 50.0},
    "chunked": {"attention_chunk_size": 1024},
}


def attention() -> dict[str, Any]:
    """Attention of packed rows at the benchmark's lengths: every kind of layer, and the plain one with every kernel."""
    from megatron_sft.model.attention import packed_seq_params

    from .gpu_cells import Sizes, switch_on

    rows = Sizes.of("Qwen3-8B" if CUDA else "tiny").lengths()[: size(16, 3)].tolist()
    offsets = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32)
    packed = packed_seq_params(offsets, max(rows), torch.device(WHERE))
    heads, groups, dim = size(32, 4), size(8, 2), size(128, 16)
    leaves = [drawn(sum(rows), n, dim, grad=True) for n in (heads, groups, groups)]
    squares = sum(length**2 for length in rows)
    found: dict[str, Any] = {"tokens": sum(rows), "squared_over_tokens": squares / sum(rows)}
    with one_rank() as process_groups:

        def run(kind: str) -> dict[str, Any]:
            module = attention_of(kind, heads, groups, dim, process_groups)
            row = both_ways(lambda q, k, v: module(q, k, v, None, packed_seq_params=packed), *leaves)
            return {**row, "forward_tflops": 2 * heads * dim * squares / row["forward_ms"] / 1e9}

        for kind in ATTENTION:
            found[kind] = attempt(lambda kind=kind: run(kind))
        for name in ("FA3", "FA4", "cuDNN") if CUDA else ():  # what one switches on stays on until the next
            found[f"plain, {name}"] = attempt(lambda name=name: (switch_on([name]), run("plain"))[1])
    return found


def attention_of(kind: str, heads: int, groups: int, dim: int, process_groups: Any) -> torch.nn.Module:
    from megatron_sft.config.run import ModelConfig, ParallelConfig, TrainConfig
    from megatron_sft.model.attention import PackedAttention
    from megatron_sft.model.build import transformer_config

    sizes = dict(num_layers=1, hidden_size=heads * dim, ffn_hidden_size=64, num_attention_heads=heads, kv_channels=dim)
    sizes |= dict(num_query_groups=groups, vocab_size=8, padded_vocab_size=8, max_position_embeddings=8192)
    config = transformer_config(ModelConfig(**sizes, **ATTENTION[kind]), ParallelConfig(), TrainConfig(params_dtype="bf16"))
    return PackedAttention(config, 1, None, "self", pg_collection=process_groups).to(WHERE)


def norms() -> dict[str, Any]:
    """Norms of whole tokens and of heads: milliseconds, GB/s of reads and writes in the forward pass."""
    row = {}
    for rows, width in ((16384, 4096), (655360, 128)) if CUDA else ((32, 64), (64, 16)):
        hidden, weight = drawn(rows, width, grad=True), drawn(width, grad=True)
        found = both_ways(lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-6), hidden, weight)
        row[f"{rows} x {width}"] = {**found, "forward_gb_per_s": 4 * rows * width / found["forward_ms"] / 1e6}
    return row


def rope() -> dict[str, Any]:
    """Rotary embedding of queries and of keys, as model/rope.py does it; norm and RoPE of the projection, torch and Triton."""
    from megatron_sft.kernels.rope import norm_and_turn, norm_and_turn_reference
    from megatron_sft.model.rope import rotate

    tokens, dim = size(16384, 32), size(128, 16)
    table, mixed, weights = drawn(tokens, 2, dim), drawn(tokens, 8, 6, dim, grad=True), [drawn(dim, grad=True) for _ in range(2)]
    row: dict[str, Any] = {
        f"{heads} heads": both_ways(lambda x: rotate(x, table, False), drawn(tokens, heads, dim, grad=True)) for heads in (32, 8)
    }
    for name, function in (("norm and turn", norm_and_turn_reference), *([("by triton", norm_and_turn)] if CUDA else [])):
        row[name] = both_ways(lambda *x, f=function: torch.cat(f(x[0], table, *x[1:], 1e-6), dim=1), mixed, *weights)
    return row


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def activations() -> dict[str, Any]:
    """SwiGLU op by op, and compiled into one kernel."""
    hidden = drawn(size(16384, 16), 2 * size(12288, 32), grad=True)
    row = {"eager": both_ways(swiglu, hidden)}
    if CUDA:
        row["compiled"] = attempt(lambda: both_ways(torch.compile(swiglu), hidden))
    return row


def adam() -> dict[str, Any]:
    """One update with moments and gradients in fp32, and in bf16: nanoseconds a parameter."""
    from megatron_sft.train.adam import FusedAdam

    count, row = size(2**28, 2**12), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        weight = torch.nn.Parameter(drawn(count, dtype=torch.float32))
        weight.decoupled_grad = drawn(count, dtype=dtype)  # type: ignore[attr-defined]
        optimizer = FusedAdam([weight], exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype, use_decoupled_grad=True)
        row[f"{name}_ns_per_parameter"] = 1e6 * milliseconds(optimizer.step) / count
    if CUDA:
        optimizer.triton = True
        row["bf16_triton_ns_per_parameter"] = 1e6 * milliseconds(optimizer.step) / count
    return row


def main_gradient() -> dict[str, Any]:
    """A weight's gradient added to fp32: a product and main_grad.add_, and in one product where torch has it."""
    tokens, width = size(4096, 16), size(4096, 32)
    upstream, hidden, total = drawn(tokens, width), drawn(tokens, width), torch.zeros(width, width, device=WHERE)
    row: dict[str, Any] = {"product_ms": milliseconds(lambda: upstream.T @ hidden)}
    row["product_and_add_ms"] = milliseconds(lambda: total.add_(upstream.T @ hidden))

    def in_one() -> float:
        kinds = {"out_dtype": torch.float32, "out": total}
        return milliseconds(lambda: torch.addmm(total, upstream.T, hidden, **kinds))

    return {**row, "addmm_ms": attempt(in_one)} if CUDA else row


def experts() -> dict[str, Any]:
    """Products of 128 experts one after another, grouped, and grouped after their weights were stacked."""
    count, width, inner, tokens = size(128, 4), size(2048, 16), size(1536, 32), size(131072, 32)
    hidden, weights = drawn(tokens, width), list(drawn(count, inner, width))
    each = tokens // count
    offsets = torch.arange(each, tokens + 1, each, dtype=torch.int32, device=WHERE)
    stacked = torch.stack(weights)
    grouped = torch.nn.functional.grouped_mm
    ways = {
        "loop": lambda: torch.cat([part @ weight.T for part, weight in zip(hidden.split(each), weights, strict=True)]),
        "grouped": lambda: grouped(hidden, stacked.transpose(1, 2), offs=offsets),
        "stacked and grouped": lambda: grouped(hidden, torch.stack(weights).transpose(1, 2), offs=offsets),
    }
    return {name: attempt(lambda way=way: {"forward_ms": milliseconds(way)}) for name, way in ways.items()}


def mamba() -> dict[str, Any]:
    """The scan of a Mamba-2 layer (Nemotron-H-4B's sizes), and once more with deterministic algorithms."""
    from megatron_sft.model.mamba import ssd_scan

    tokens, heads, dim, groups, state = size(4096, 70), size(112, 4), size(64, 8), size(8, 2), size(128, 8)
    documents = torch.arange(tokens, device=WHERE) // size(1024, 40)
    x = drawn(tokens, heads, dim, grad=True)
    step, decay = (drawn(*shape, dtype=torch.float32).abs() for shape in ((tokens, heads), (heads,)))
    b, c, skip = drawn(tokens, groups, state), drawn(tokens, groups, state), drawn(heads)

    def scan(values: torch.Tensor) -> torch.Tensor:
        return ssd_scan(values, step, -decay, b, c, skip, documents)[0]

    row = {"scan": both_ways(scan, x)}
    torch.use_deterministic_algorithms(True)
    row["deterministic"] = attempt(lambda: both_ways(scan, x))
    torch.use_deterministic_algorithms(False)
    return row


def layer() -> dict[str, Any]:
    """Host time of a layer: 16 tokens, forward and backward, the difference of models of two and of four layers."""
    from megatron_sft.model.attention import packed_seq_params

    from .gpu_cells import fresh_model, run_config

    tokens, labels = torch.randint(0, 200, (2, 1, 16), device=WHERE)
    places = torch.arange(16, device=WHERE)[None]
    packed = packed_seq_params(torch.tensor([0, 16], dtype=torch.int32), 16, torch.device(WHERE))
    found = {}
    with one_rank():
        for layers in (2, 4):
            run = run_config("Qwen3-1.7B" if CUDA else "tiny", 1, False, ("--num-layers", str(layers)))
            chunks, _ = fresh_model(run)

            def step(chunk: Any = chunks[0]) -> None:
                chunk(tokens, places, None, labels=labels, packed_seq_params=packed).sum().backward()

            found[layers] = milliseconds(step)
    return {"layer_ms": (found[4] - found[2]) / 2, "two_layers_ms": found[2], "four_layers_ms": found[4]}


def tests(limit_s: int, *arguments: str) -> dict[str, Any]:
    """Tests of tests/gpu by outcome; those that ended before the limit count."""
    from .gpu import counted

    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *arguments]
    try:
        kept = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit_s)
        done = subprocess.run(command, cwd=ROOT, **kept)  # type: ignore[call-overload]
        status, output = done.returncode, done.stdout.decode()
    except subprocess.TimeoutExpired as late:
        status, output = 1, (late.stdout or b"").decode()
    assert status in (0, 1), f"pytest ended with status {status}: {output[-1000:]}"
    return {**counted(output), **({"output": output[-20000:]} if status else {})}


def cell(shape: str, engine: str = "ours", packs: int = 0, *switches: str) -> dict[str, Any]:
    """Steps of a shape in a process of its own, by bench/gpu.py's rules. packs: packs a micro-batch; 0: the most that fit."""
    from .gpu import cell_row

    row = cell_row(shape, engine, time.time() + size(40, 1), packs, switches)
    assert row["status"] == "ok", f"{row['status']}\n{row.get('stderr', '')}"
    return row


def _cells() -> Iterator[tuple[str, Part]]:
    for shape, packs in itertools.product(("Qwen3-1.7B", "Qwen3-0.6B", "Qwen3-8B", "Qwen3-4B"), (4, 1)):
        if packs == 1 or shape in ("Qwen3-1.7B", "Qwen3-0.6B"):
            yield f"step-{shape}-{packs}", Part(functools.partial(cell, shape, "ours", packs), 150, False)
    for shape in ("Qwen3-1.7B-64k", "Qwen3-30B-A3B-6", "gpt-oss-20b-6", "gemma-2-2b", "Nemotron-H-4B-13"):
        yield f"step-{shape}", Part(functools.partial(cell, shape), 200, False)
    for shape, switch in itertools.product(("Qwen3-1.7B", "Qwen3-8B"), ("unaligned", "fixed-segments", "FA3")):
        yield f"without-{shape}-{switch}", Part(functools.partial(cell, shape, "ours", 0, switch), 150, False)
    for shape in ("Qwen3-1.7B", "Qwen3-8B"):
        yield f"with-{shape}-triton", Part(functools.partial(cell, shape, "ours", 0, "triton"), 150, False)
    for engine, shape in itertools.product(("trl", "liger"), ("Qwen3-0.6B", "Qwen3-1.7B")):
        yield f"{engine}-{shape}", Part(functools.partial(cell, shape, engine), 200, False)


PARTS: dict[str, Part] = {
    "smoke": Part(smoke, 90),
    "head-products": Part(head_products, 60),
    "loss": Part(loss, 60),
    "attention": Part(attention, 120),
    "tests-attention-loss": Part(
        functools.partial(tests, 220, "tests/gpu/test_attention.py", "tests/gpu/test_loss.py"), 240, False
    ),
    "tests-kernels": Part(functools.partial(tests, 160, "tests/unit/kernels"), 180, False),
    "layer": Part(layer, 120),
    "norms": Part(norms, 60),
    "rope": Part(rope, 60),
    "activations": Part(activations, 90),
    "adam": Part(adam, 60),
    "main-gradient": Part(main_gradient, 60),
    "experts": Part(experts, 60),
    "mamba": Part(mamba, 90),
    "step-tiny": Part(functools.partial(cell, "tiny"), 120, False),
    "tests-families": Part(functools.partial(tests, 380, "tests/gpu/test_families.py"), 400, False),
    **dict(_cells()),
}
"""The most informative first."""


def wanted(cpu: bool) -> list[str]:
    """Names of the parts, in order."""
    return [name for name, part in PARTS.items() if part.on_cpu or not cpu]


def write(file: Path, row: dict[str, Any]) -> None:
    """Whole or not at all."""
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(row, indent=1) + "\n")
    beside.replace(file)


def attempts(file: Path) -> int:
    """How often a part was begun."""
    return int(json.loads(file.read_text())["attempts"]) if file.is_file() else 0


def run(name: str, folder: Path) -> None:
    """One part, which SIGALRM ends with the process when it takes too long, in whatever code it is."""
    file = folder / f"{name}.json"
    begun = {"part": name, "status": "begun", "attempts": attempts(file) + 1}
    write(file, begun)
    signal.alarm(PARTS[name].limit_s)
    start = time.perf_counter()
    torch.manual_seed(0)
    figures = PARTS[name].run()
    signal.alarm(0)
    row = {**begun, "status": "ok", "seconds": round(time.perf_counter() - start, 1), "figures": figures}
    write(file, row)
    print(f"{name}: {json.dumps(figures)[:1500]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    options = parser.parse_args()
    from megatron_sft.core_compat import install_cpu_mode

    install_cpu_mode()
    for name in options.parts:
        run(name, options.out)


if __name__ == "__main__":
    main()
