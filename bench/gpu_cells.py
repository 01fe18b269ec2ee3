"""What a cell of bench/gpu.py runs, in a process of its own: one engine on one shape. Prints RESULT and a JSON object.

    python -m bench.gpu_cells '["Qwen3-0.6B", "ours", 4, false, []]' --until 1790000000 [--trl-attention sdpa]

Engines: ours, trl, liger (TRL with Liger's kernels), loss (the fused head and loss beside full logits), device. The last item of
a cell names what of ours is left out or put in (SWITCHES).
"""

import argparse
import dataclasses
import functools
import json
import platform
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WARM_UP, MOST_STEPS = 3, 40
NARROW = "--use-precision-aware-optimizer --main-grads-dtype bf16 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
TINY = (
    "--bf16 --normalization RMSNorm --swiglu --disable-bias-linear --num-layers 2 --hidden-size 64 --ffn-hidden-size 96 "
    "--num-attention-heads 4 --group-query-attention --num-query-groups 2 --kv-channels 16 --qk-layernorm "
    "--position-embedding-type rope --max-position-embeddings 512 --padded-vocab-size 256"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, how it is trained, and what is asked of its speed."""

    conf: str
    """conf/<conf>.sh; empty: TINY."""
    flags: str = ""
    """Added for ours: the dtypes of the optimizer's states."""
    first: int = 0
    """Where FITS is begun: what would not fit in 139 GiB is not tried."""
    share: float | None = None
    """Of the floor that ours must reach (docs/gpu.md); None: no row of the table."""
    packs: int = 4
    """Packs an optimizer step."""


SHAPES = {
    "Qwen3-0.6B": Shape("Qwen/Qwen3-0.6B", share=0.55),
    "Qwen3-1.7B": Shape("Qwen/Qwen3-1.7B", share=0.55),
    "Qwen3-4B": Shape("Qwen/Qwen3-4B", first=1, share=0.65),
    "Qwen3-8B": Shape("Qwen/Qwen3-8B", NARROW, first=2, share=0.65),
    "Qwen3-1.7B-64k": Shape("Qwen/Qwen3-1.7B", packs=16),
    "Qwen3-30B-A3B-6": Shape("Qwen/Qwen3-30B-A3B", f"--num-layers 6 {NARROW}", first=1),
    "gpt-oss-20b-6": Shape("openai/gpt-oss-20b", f"--num-layers 6 {NARROW}", first=2),
    "gemma-2-2b": Shape("google/gemma-2-2b-it", first=2),
    "Nemotron-H-4B-13": Shape("nvidia/Nemotron-H-4B-Instruct", "--num-layers 13 --hybrid-layer-pattern M-M-M-M*-M-M-", first=2),
    "tiny": Shape(""),
}
"""A number behind a model's name: layers that are left of it."""
SWITCHES = ("unaligned", "fixed-segments", "FA3", "FA4", "cuDNN", "triton")
"""Blocks of the vocabulary as they come; torch's allocator without expandable segments; attention kernels by name;
--kernels triton."""
FITS = ((4, False), (2, False), (1, False), (1, True))
"""(packs a micro-batch, full recomputation), the fastest first."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a cell trains on. Lengths are in tokens."""

    seq_length: int
    packs: int
    """Packs an optimizer step."""
    documents: int

    @classmethod
    def of(cls, shape: str) -> "Sizes":
        return cls(256, 4, 60) if shape == "tiny" else cls(4096, SHAPES[shape].packs, 2000)

    def lengths(self) -> np.ndarray:
        """Document lengths: log-normal, so that at 4,096 the mean of length^2 over the mean is 1,917 (ShareGPT: 1,895)."""
        drawn = np.random.default_rng(0).lognormal(6.8, 0.8, self.documents) * self.seq_length / 4096
        return np.clip(drawn, 8, self.seq_length).astype(np.int32)

    def documents_of(self, vocab_size: int) -> list[np.ndarray]:
        """Random token ids of every document."""
        random = np.random.default_rng(1)
        return [random.integers(0, vocab_size, length, dtype=np.int32) for length in self.lengths()]


def model_flags(shape: str) -> list[str]:
    """MODEL_ARGS of the shape's conf."""
    if not SHAPES[shape].conf:
        return shlex.split(TINY)
    script = 'source "$0"; printf "%s\\n" "${MODEL_ARGS[@]}"'
    command = ["bash", "-euc", script, str(ROOT / "conf" / f"{SHAPES[shape].conf}.sh")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def run_config(shape: str, packs: int, recompute: bool, more: Sequence[str] = ()) -> Any:
    """RunConfig of ours for a shape, with more flags behind all others."""
    from megatron_sft.config.arguments import parse

    sizes = Sizes.of(shape)
    flags = [*model_flags(shape), "--seq-length", sizes.seq_length, "--micro-batch-size", packs]
    flags += ["--global-batch-size", sizes.packs, "--train-iters", 10_000, "--lr", 1e-5, "--clip-grad", 1.0]
    flags += shlex.split(SHAPES[shape].flags)
    if recompute:
        flags += shlex.split("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    flags += more
    run, _ = parse([str(flag) for flag in flags], 1, training=False)
    model = dataclasses.replace(run.model, vocab_size=run.model.padded_vocab_size)
    return dataclasses.replace(run, model=model)


def squares_of(sizes: Sizes) -> float:
    """Sum of squared lengths over sum of lengths, in tokens."""
    lengths = sizes.lengths().astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_cell() -> dict[str, Any]:
    """Name, memory, bf16 matrix products in TFLOP/s (a CPU may be faster in fp32) and copy bandwidth in GB/s of this device."""
    import torch

    cuda = torch.cuda.is_available()
    where, size = ("cuda", 8192) if cuda else ("cpu", 512)
    dtypes = [torch.bfloat16] if cuda else [torch.bfloat16, torch.float32]
    pairs = [[torch.randn(size, size, device=where, dtype=dtype) for _ in range(2)] for dtype in dtypes]
    source = torch.empty((2**31 if cuda else 2**22), dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    product = 2 * size**3 / min(_seconds(functools.partial(torch.mm, *pair)) for pair in pairs) / 1e12
    copy = 2 * source.numel() / _seconds(lambda: target.copy_(source)) / 1e9
    found: dict[str, Any] = {"name": platform.processor() or platform.machine(), "type": where}
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "capability": [properties.major, properties.minor]}
        found |= {"memory_gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
    return {**found, "matmul_tflops": product, "copy_gb_per_s": copy}


def _seconds(action: Callable[[], object], warm_up: int = 3, times: int = 10) -> float:
    """Mean seconds of an action after warm-up."""
    for _ in range(warm_up):
        action()
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        action()
    synchronize()
    return (time.perf_counter() - start) / times


def ours_cell(shape: str, packs: int, recompute: bool, until: float, flags: Sequence[str]) -> dict[str, Any]:
    """The training step of finetune.py on packs in memory."""
    import torch

    from megatron_sft import parallel
    from megatron_sft.data.loader import TrainLoader
    from megatron_sft.data.packing import pack
    from megatron_sft.data.sft_dataset import SFTDataset
    from megatron_sft.data.store import MemoryStore
    from megatron_sft.train.step import train_step

    run, sizes = run_config(shape, packs, recompute, flags), Sizes.of(shape)
    parallel.initialize(run.parallel, 1)
    chunks, optimizer = fresh_model(run)
    documents = [(tokens, np.ones(len(tokens), np.uint8)) for tokens in sizes.documents_of(run.model.vocab_size)]
    store = MemoryStore(documents)
    dataset = SFTDataset.from_config(store, pack(store.lengths, sizes.seq_length, "best-fit"), run.data, 0)
    loader = TrainLoader(dataset, run.train, pin_memory=torch.cuda.is_available())
    steps = iter(loader)

    def step() -> tuple[float, float]:
        done = train_step(chunks, optimizer, next(steps).micro_batches, 1, store.where)
        return done.totals.tokens, done.totals.loss

    row, narrow = timed_steps(step, until), NARROW in SHAPES[shape].flags
    row["states"] = "bf16 weights and gradients, fp32 master, bf16 moments" if narrow else "bf16 weights, fp32 rest"
    row["bytes_per_parameter"] = 12 if narrow else 18
    give(row)  # before the profiler, which a machine may lack
    row |= kernels(step, row["step_ms"])
    steps.close()  # type: ignore[attr-defined]
    parallel.finalize()
    return row


def give(row: dict[str, Any]) -> None:
    """Prints a result; the last one counts, also of a process that failed or was ended after it."""
    print("RESULT " + json.dumps(row), flush=True)


def fresh_model(run: Any) -> tuple[list[Any], Any]:
    """Model with random weights in DDP, and its optimizer."""
    import torch

    from megatron_sft.model.build import build_model
    from megatron_sft.train.optim import build_optimizer, wrap_ddp

    chunks = build_model(run.model, run.parallel, run.train)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            if parameter.dim() > 1:  # norms stay at one
                parameter.normal_(0, 0.02)
    wrapped = wrap_ddp(chunks, run.parallel, run.optim.main_grads_dtype)
    return wrapped, build_optimizer(wrapped, run)


def timed_steps(step: Callable[[], tuple[float, float]], until: float) -> dict[str, Any]:
    """Runs steps until a time (of time.time) or MOST_STEPS.

    Args:
        step: trains one step; gives its useful tokens and its loss.
    """
    seconds, tokens, losses = [], [], []
    while len(seconds) < WARM_UP + 3 or (len(seconds) < WARM_UP + MOST_STEPS and time.time() < until):
        synchronize()
        start = time.perf_counter()
        trained, loss = step()
        synchronize()
        seconds.append(time.perf_counter() - start)
        tokens.append(trained)
        losses.append(loss)
    return {**rates(seconds[WARM_UP:], tokens[WARM_UP:]), "first_loss": losses[0], "last_loss": losses[-1], **peak_memory()}


def rates(seconds: Sequence[float], tokens: Sequence[float]) -> dict[str, Any]:
    """Useful tokens per second over steps."""
    each = [t / s for t, s in zip(tokens, seconds, strict=True)]
    return {
        "steps": len(each),
        "tokens_per_step": statistics.mean(tokens),
        "tokens_per_s": statistics.median(each),
        "tokens_per_s_range": [min(each), max(each)],
        "step_ms": 1e3 * statistics.median(seconds),
    }


def peak_memory() -> dict[str, float]:
    """GiB that were allocated at the most; on a CPU of the whole process."""
    import resource

    import torch

    if not torch.cuda.is_available():
        return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    reserved = torch.cuda.max_memory_reserved() / 2**30
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "peak_reserved_gib": reserved}


def kernels(step: Callable[[], object], step_ms: float, count: int = 15) -> dict[str, Any]:
    """Where one more step spends its time: the kernels (on a CPU: operators) with the most of it, launches, and busy_share.

    busy_share: time of all kernels over that of a step without the profiler; kernels that overlap count twice.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        step()
        synchronize()
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, field))
    names = ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC")
    return {
        "kernels": [
            {"name": event.key[:120], "ms": getattr(event, field) / 1e3, "calls": event.count} for event in events[:count]
        ],
        "busy_share": sum(getattr(event, field) for event in events) / 1e3 / step_ms,
        "launches": sum(event.count for event in events if event.key in names),
    }


def switch_on(names: Sequence[str]) -> None:
    """What is named of SWITCHES, in this process; the allocator is the caller's."""
    import torch
    from torch.nn.attention import varlen

    from megatron_sft.model import loss

    for name in names:
        assert name in SWITCHES, f"{name} is none of {', '.join(SWITCHES)}"
        if name == "unaligned":
            loss.ALIGNED_ROWS = 1
        if name in ("FA3", "FA4"):
            torch.nn.attention.activate_flash_attention_impl(name)
        if name == "cuDNN":
            varlen._should_use_cudnn = lambda device_index: True


def trl_cell(shape: str, packs: int, recompute: bool, until: float, liger: bool, attention: str) -> dict[str, Any]:
    """TRL's SFTTrainer with packing on the same documents, fp32 weights under bf16 autocast (16 bytes per parameter)."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from tests.text_models import byte_tokenizer

    sizes, cuda = Sizes.of(shape), torch.cuda.is_available()
    config = AutoConfig.for_model(**hf_config(shape))
    torch.manual_seed(1)
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    rows = Dataset.from_dict({"input_ids": [tokens.tolist() for tokens in sizes.documents_of(config.vocab_size)]})
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronize()
            marks.append(time.perf_counter())
            enough = len(marks) > WARM_UP + MOST_STEPS or (len(marks) > WARM_UP + 3 and time.time() > until)
            control.should_training_stop = control.should_training_stop or enough

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            packing=True,
            max_length=sizes.seq_length,
            per_device_train_batch_size=packs,
            gradient_accumulation_steps=sizes.packs // packs,
            num_train_epochs=100,
            learning_rate=1e-5,
            report_to=[],
            save_strategy="no",
            logging_strategy="steps",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=not cuda,
            bf16=cuda,
            gradient_checkpointing=recompute,
            use_liger_kernel=liger,
            optim="adamw_torch_fused",
        )
        trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=byte_tokenizer(), callbacks=[Clock()])
        lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = np.diff(marks)[WARM_UP:].tolist()
    row = rates(seconds, [statistics.mean(lengths) * sizes.packs] * len(seconds))
    row |= {"first_loss": losses[0], "last_loss": losses[-1], "attention": attention, "gradient_checkpointing": recompute}
    return {**row, **peak_memory(), "states": "fp32, bf16 autocast", "bytes_per_parameter": 16}


def hf_config(shape: str) -> dict[str, Any]:
    """config.json of the shape, as it is in the checkout."""
    conf = SHAPES[shape].conf
    if conf:
        path = ROOT / "tests/assets/hf_configs" / f"{conf.replace('/', '__')}.json"
        return dict(json.loads(path.read_text()))
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return {"model_type": "qwen3", **sizes, "head_dim": 16, "vocab_size": 256, "tie_word_embeddings": True}


def loss_cell(shape: str) -> dict[str, Any]:
    """Forward and backward of head and loss on one full row: fused, with full logits, and the three bare products."""
    import torch

    from megatron_sft.model.loss import linear_cross_entropy

    model, tokens = run_config(shape, 1, False).model, Sizes.of(shape).seq_length
    where = "cuda" if torch.cuda.is_available() else "cpu"
    vocab, width = model.padded_vocab_size, model.hidden_size
    torch.manual_seed(1)
    hidden, weight = (torch.randn(n, width, device=where, dtype=torch.bfloat16) * 0.02 for n in (tokens, vocab))
    labels = torch.randint(0, vocab, (tokens,), device=where)
    mask = torch.ones(tokens, device=where)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def fused() -> Any:
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, mask, vocab).sum(), leaves)

    def full() -> Any:
        logits = (hidden @ weight.T).float()
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), leaves)

    def products() -> None:
        with torch.no_grad():
            logits = hidden @ weight.T
            torch.mm(logits, weight), torch.mm(logits.T, hidden)

    row: dict[str, Any] = {"tokens": tokens, "vocab_size": vocab, "hidden_size": width}
    for name, action in (("fused", fused), ("full", full), ("products", products)):
        row[f"{name}_ms"] = 1e3 * _seconds(action, warm_up=1, times=5)
        if where == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            action()
            synchronize()
            given = sum(leaf.nbytes for leaf in leaves)  # the gradients, which every way of computing them needs
            row[f"{name}_peak_gib"] = (torch.cuda.max_memory_allocated() - before - given) / 2**30
    if where == "cuda":
        row |= {"peak_share": row["fused_peak_gib"] / row["full_peak_gib"], "bar": 0.10}
        row["passes"] = row["peak_share"] <= row["bar"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", help="JSON: shape, engine, packs a micro-batch, full recomputation, switches")
    parser.add_argument("--until", type=float, default=0.0, help="time.time() at which measuring ends")
    parser.add_argument("--trl-attention", default="sdpa")
    options = parser.parse_args()
    shape, engine, packs, recompute, switches = json.loads(options.cell)
    if switches:
        switch_on(switches)
    if engine == "device":
        row = device_cell()
    elif engine == "loss":
        row = loss_cell(shape)
    elif engine == "ours":
        flags = ["--kernels", "triton"] if "triton" in switches else []
        row = ours_cell(shape, packs, recompute, options.until, flags)
    else:
        row = trl_cell(shape, packs, recompute, options.until, engine == "liger", options.trl_attention)
    give(row)


if __name__ == "__main__":
    main()
