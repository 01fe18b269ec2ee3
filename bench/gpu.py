"""Training throughput on one GPU: ours, TRL with packing, TRL with packing and Liger; useful tokens/s, MFU, peak memory.

    python bench/gpu.py --out gpu.json [--budget-seconds 400] [--shapes Qwen3-0.6B,Qwen3-8B] [--engines ours,trl,liger]
    python bench/gpu.py --out gpu.json --cpu

Shapes come from conf/Qwen; weights are random, documents have the lengths of ShareGPT's chats, packed to 4,096 tokens,
16,384 tokens a step, every token trained. A cell is a process of its own, given its share of the budget; one that does not
fit is tried with smaller micro-batches, then with full recomputation, and is a row all the same. Useful tokens are those
that are no padding, FLOPs those of attention within documents (train/flops.py). The floor is the time that an H200 needs
at the least (its derivation: docs/gpu.md). --cpu: a tiny shape through the same code. bench/gpu.sh runs this after tests/gpu.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WARM_UP, MOST_STEPS = 3, 40
START_UP_S, GRACE_S = 15.0, 40.0
"""Of a cell's share of the budget, what is not for steps; what it may take beyond its share before it is ended."""
ENGINES = ("ours", "trl", "liger")
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
    share: float = 0.55
    """Of the floor that ours must reach (perf_reliability.md A6: 0.55 for 0.6B, 0.65 for 4B and 8B)."""


SHAPES = {
    "Qwen3-0.6B": Shape("Qwen/Qwen3-0.6B"),
    "Qwen3-1.7B": Shape("Qwen/Qwen3-1.7B"),
    "Qwen3-4B": Shape("Qwen/Qwen3-4B", first=1, share=0.65),
    "Qwen3-8B": Shape("Qwen/Qwen3-8B", NARROW, first=2, share=0.65),
    "tiny": Shape(""),
}
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
        return cls(256, 4, 60) if shape == "tiny" else cls(4096, 4, 2000)

    def lengths(self) -> np.ndarray:
        """Document lengths: log-normal, so that at 4,096 the mean of length^2 over the mean is 1,917 (ShareGPT: 1,895)."""
        drawn = np.random.default_rng(0).lognormal(6.8, 0.8, self.documents) * self.seq_length / 4096
        return np.clip(drawn, 8, self.seq_length).astype(np.int32)

    def documents_of(self, vocab_size: int) -> list[np.ndarray]:
        """Random token ids of every document."""
        random = np.random.default_rng(1)
        return [random.integers(0, vocab_size, length, dtype=np.int32) for length in self.lengths()]


def floor_tokens_per_s(model: Any, squared_over_tokens: float) -> float:
    """Tokens/s that an H200 cannot exceed (perf_reliability.md A1).

    Matrix products at 790 TFLOP/s (measured, random data), flash attention forward at 667 and backward at 450 with 2.5
    times the operations, element-wise work at 4.3 TB/s (measured copy, bytes read and written). The optimizer is not in it.

    Args:
        model: ModelConfig of a dense model with a gated MLP.
        squared_over_tokens: sum of squared document lengths / sum of lengths.
    """
    h, f, layers, d = model.hidden_size, model.ffn_hidden_size, model.num_layers, model.kv_channels
    heads, groups = model.num_attention_heads, model.num_query_groups
    products = layers * (h * (heads + 2 * groups) * d + heads * d * h + 3 * h * f) + model.padded_vocab_size * h
    attention = 2 * layers * heads * d * squared_over_tokens
    elementwise = 3 * layers * (8 * h + 2 * (heads + groups) * d + 3 * f) * 2
    return 1 / (6 * products / 790e12 + attention / 667e12 + 2.5 * attention / 450e12 + elementwise / 4.3e12)


def model_flags(shape: str) -> list[str]:
    """MODEL_ARGS of the shape's conf."""
    if not SHAPES[shape].conf:
        return shlex.split(TINY)
    script = 'source "$0"; printf "%s\\n" "${MODEL_ARGS[@]}"'
    command = ["bash", "-euc", script, str(ROOT / "conf" / f"{SHAPES[shape].conf}.sh")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def run_config(shape: str, packs: int, recompute: bool) -> Any:
    """RunConfig of ours for a shape."""
    from megatron_sft.arguments import parse

    sizes = Sizes.of(shape)
    flags = [*model_flags(shape), "--seq-length", sizes.seq_length, "--micro-batch-size", packs]
    flags += ["--global-batch-size", sizes.packs, "--train-iters", 10_000, "--lr", 1e-5, "--clip-grad", 1.0]
    flags += shlex.split(SHAPES[shape].flags)
    if recompute:
        flags += shlex.split("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    run, _ = parse([str(flag) for flag in flags], 1, training=False)
    model = dataclasses.replace(run.model, vocab_size=run.model.padded_vocab_size)
    return dataclasses.replace(run, model=model)


def squares_of(sizes: Sizes) -> float:
    """Sum of squared lengths over sum of lengths, in tokens."""
    lengths = sizes.lengths().astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


# ---- cells: each in a process of its own ----


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_cell() -> dict[str, Any]:
    """Name, memory, bf16 matrix products in TFLOP/s and copy bandwidth in GB/s of this device."""
    import torch

    cuda = torch.cuda.is_available()
    where, size = ("cuda", 8192) if cuda else ("cpu", 512)
    a, b = (torch.randn(size, size, device=where, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty((2**31 if cuda else 2**22), dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    product = 2 * size**3 / _seconds(lambda: torch.mm(a, b)) / 1e12
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


def ours_cell(shape: str, packs: int, recompute: bool, until: float) -> dict[str, Any]:
    """The training step of finetune.py on packs in memory."""
    import torch

    from megatron_sft import parallel
    from megatron_sft.data.loader import TrainLoader
    from megatron_sft.data.packing import pack
    from megatron_sft.data.sft_dataset import SFTDataset
    from megatron_sft.data.store import MemoryStore
    from megatron_sft.train.step import train_step

    run, sizes = run_config(shape, packs, recompute), Sizes.of(shape)
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

    row = timed_steps(step, until)
    row["kernels"] = kernels(step)
    row["states"] = "bf16 weights and gradients, fp32 master, bf16 moments" if SHAPES[shape].flags else "bf16 weights, fp32 rest"
    row["bytes_per_parameter"] = 12 if SHAPES[shape].flags else 18
    steps.close()  # type: ignore[attr-defined]
    parallel.finalize()
    return row


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
    """Useful tokens a second over steps."""
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


def kernels(step: Callable[[], object], count: int = 15) -> list[dict[str, Any]]:
    """Where one more step spends its time: the kernels (on a CPU: operators) with the most of it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        step()
        synchronize()
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, field))[:count]
    return [{"name": event.key[:120], "ms": getattr(event, field) / 1e3, "calls": event.count} for event in events]


def trl_cell(shape: str, packs: int, recompute: bool, until: float, liger: bool, attention: str) -> dict[str, Any]:
    """TRL's SFTTrainer with packing on the same documents, fp32 weights under bf16 autocast (16 bytes a parameter)."""
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
            output_dir=folder, packing=True, max_length=sizes.seq_length, per_device_train_batch_size=packs,
            gradient_accumulation_steps=sizes.packs // packs, num_train_epochs=100, learning_rate=1e-5, report_to=[],
            save_strategy="no", logging_strategy="steps", logging_steps=1, disable_tqdm=True, use_cpu=not cuda, bf16=cuda,
            gradient_checkpointing=recompute, use_liger_kernel=liger, optim="adamw_torch_fused",
        )  # fmt: skip
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


def run_cell(options: argparse.Namespace) -> dict[str, Any]:
    shape, engine, packs, recompute = json.loads(options.cell)
    if engine == "device":
        return device_cell()
    if engine == "ours":
        return ours_cell(shape, packs, recompute, options.until)
    return trl_cell(shape, packs, recompute, options.until, engine == "liger", options.trl_attention)


# ---- the table ----


def attempt(options: argparse.Namespace, cell: Sequence[Any], until: float) -> dict[str, Any]:
    """Runs one cell in a process; a row with a status, whatever happens in it."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell), "--until", str(until)]
    command += ["--trl-attention", options.trl_attention, "--out", "-"]
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONWARNINGS"] = "ignore"
    if options.trl_folder:
        environment["PYTHONPATH"] = os.pathsep.join([options.trl_folder, environment.get("PYTHONPATH", "")])
    if options.cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    limit = until - time.time() + GRACE_S
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"status": f"no end within {limit:.0f} s"}
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if results:
        return {"status": "ok", **json.loads(results[-1].removeprefix("RESULT ")), "wall_s": time.monotonic() - start}
    if "OutOfMemoryError" in done.stderr or "out of memory" in done.stderr:
        return {"status": "out of memory"}
    lines = done.stderr.strip().splitlines() or ["no message"]
    return {"status": f"failed ({done.returncode}): {lines[-1][:300]}", "stderr": "\n".join(lines[-25:])}


def row_of(options: argparse.Namespace, shape: str, engine: str, until: float) -> dict[str, Any]:
    """The cell's row: the first setting of FITS that fits; time may run out before one does."""
    tried = []
    for packs, recompute in FITS[SHAPES[shape].first :]:
        row = attempt(options, (shape, engine, packs, recompute), until)
        tried.append([packs, recompute, row["status"]])
        if row["status"] != "out of memory":
            break
        until = max(until, time.time() + START_UP_S)
    named = {"shape": shape, "engine": engine, "packs_per_micro_batch": packs, "recompute": recompute}
    return {**named, **row, "tried": tried}


def judged(row: dict[str, Any], device: dict[str, Any]) -> dict[str, Any]:
    """The row with its FLOPs, MFU and share of the floor."""
    from megatron_sft.train.flops import train_flops

    if row["status"] != "ok":
        return row
    model, squares = run_config(row["shape"], 1, False).model, squares_of(Sizes.of(row["shape"]))
    tflops = train_flops(model, 10**6, round(squares * 10**6)) / 1e6 * row["tokens_per_s"] / 1e12
    row |= {"tflops": tflops, "mfu": tflops / device["matmul_tflops"], "squared_over_tokens": squares}
    if "H200" in device["name"] and row["shape"] != "tiny":
        floor, bar = floor_tokens_per_s(model, squares), SHAPES[row["shape"]].share
        share = row["tokens_per_s"] / floor
        row |= {"floor_tokens_per_s": floor, "share_of_floor": share, "bar": bar, "passes": share >= bar}
    return row


def line_of(row: dict[str, Any]) -> str:
    setting = f"micro-batch {row['packs_per_micro_batch']}{' recompute' * row['recompute']}"
    name = f"{row['shape']:<11} {row['engine']:<6} {setting:<23}"
    if row["status"] != "ok":
        return f"{name} {row['status']}"
    text = f"{name} {row['tokens_per_s']:>9,.0f} tok/s  MFU {row['mfu']:6.1%}  {row['peak_gib']:6.1f} GiB"
    if "passes" not in row:
        return f"{text}  no floor for this device"
    verdict = "pass" if row["passes"] else "FAIL"
    return f"{text}  {row['share_of_floor']:.0%} of the floor {row['floor_tokens_per_s']:,.0f} (bar {row['bar']:.0%}): {verdict}"


def ratios(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Ours beside each peer, by shape."""
    rate = {(row["shape"], row["engine"]): row["tokens_per_s"] for row in rows if row["status"] == "ok"}
    for (shape, engine), value in rate.items():
        if engine != "ours" and (shape, "ours") in rate:
            yield f"{shape:<11} ours / {engine}: {rate[shape, 'ours'] / value:.2f}x"


def versions() -> dict[str, str | None]:
    names = ("torch", "megatron-core", "transformers", "triton", "trl", "liger-kernel", "transformer-engine", "flash-attn")
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def engines_of(options: argparse.Namespace) -> list[str]:
    """The engines asked for; of peers only those that are installed, unless they are named."""
    if options.engines:
        return list(options.engines.split(","))
    if options.cpu:
        return ["ours"]
    has_trl, has_liger = (importlib.util.find_spec(name) is not None for name in ("trl", "liger_kernel"))
    return ["ours"] + ["trl"] * has_trl + ["liger"] * (has_trl and has_liger)


def counted(junit: Path) -> dict[str, int]:
    """Tests of a JUnit file by outcome."""
    if not junit.is_file():
        return {}
    suite = next(ElementTree.parse(junit).getroot().iter("testsuite")).attrib
    counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]}


def table(options: argparse.Namespace) -> int:
    """Runs every cell, prints its line, writes the JSON file after each; 1 where a row of ours failed."""
    deadline = time.time() + options.budget_seconds
    out = Path(options.out)
    shapes = options.shapes.split(",") if options.shapes else ["tiny"] if options.cpu else [s for s in SHAPES if s != "tiny"]
    cells = [(shape, engine) for engine in engines_of(options) for shape in shapes]  # ours first: a budget may be short
    device = attempt(options, ("", "device", 1, False), time.time() + 60)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "versions": versions(),
        "device": device,
        "budget_seconds": options.budget_seconds,
        "tests": {"status": options.tests_status, **counted(Path(options.tests or "-"))},
        "rows": [],
    }
    figures = "{matmul_tflops:.1f} TFLOP/s in bf16 products, {copy_gb_per_s:,.0f} GB/s copied (bytes read and written)"
    print(f"{device['name']}: {figures.format(**device)}" if device["status"] == "ok" else f"the device: {device}", flush=True)
    for number, (shape, engine) in enumerate(cells):
        share = (deadline - time.time()) / (len(cells) - number)
        row = row_of(options, shape, engine, time.time() + max(5.0, share - START_UP_S))
        report["rows"].append(judged(row, device) if device["status"] == "ok" else row)
        print(line_of(row), flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    print(*ratios(report["rows"]), sep="\n")
    return int(any(row["status"] != "ok" and row["engine"] == "ours" for row in report["rows"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file")
    parser.add_argument("--budget-seconds", type=float, default=400.0, help="divided over the cells")
    parser.add_argument("--shapes", help=f"of {','.join(SHAPES)}; default: the four Qwen3, with --cpu tiny")
    parser.add_argument("--engines", help=f"of {','.join(ENGINES)}; default: those that are installed, with --cpu ours")
    parser.add_argument("--trl-attention", default="sdpa", help="attn_implementation of TRL's model")
    parser.add_argument("--trl-folder", help="made by pip install --no-deps --target FOLDER trl accelerate")
    parser.add_argument("--cpu", action="store_true", help="no GPU is used, also where there is one")
    parser.add_argument("--tests", help="JUnit file of tests/gpu, for the JSON file")
    parser.add_argument("--tests-status", type=int, help="exit status of tests/gpu, for the JSON file")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print("RESULT " + json.dumps(run_cell(options)), flush=True)
        return 0
    return table(options)


if __name__ == "__main__":
    sys.exit(main())
