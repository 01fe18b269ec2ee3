"""Figures of the data pipeline, and of TRL's on the same rows in the same run.

    python bench/data.py --rows ROWS.jsonl --tokenizer FOLDER [--trl FOLDER] [--million]

ROWS: JSONL with `messages`; FOLDER: an HF tokenizer (Qwen3's for the figures of the issue). --trl: a folder made by
`pip install --target FOLDER --no-deps trl accelerate`; TRL then runs in a process of its own. --million: 1M
rows through the same pipeline for the peak memory. Prints one line a figure: name, value, bar (printed, not enforced).
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_sft import log
from megatron_sft.config.run import DataConfig
from megatron_sft.data.packing import pack, packing_figures
from megatron_sft.data.report import as_table, data_report
from megatron_sft.data.sources import open_source
from megatron_sft.data.store import FILES, read_meta, write_meta
from megatron_sft.data.tokens import build_token_store

SEQ_LENGTH = 4096
R = TypeVar("R")

TRL_PROGRAM = """
import json, os, sys, time
from pathlib import Path
import torch, transformers, trl
from datasets import load_dataset
rows, tokenizer_folder, seq_length, num_proc, out = sys.argv[1:]
begin = time.perf_counter()
tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
# The tokenizer's own template has no generation spans, which TRL needs: TRL's own copy of it, with them.
tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen3_training.jinja").read_text()
data = load_dataset("json", data_files=rows, split="train").select_columns(["messages"])
loading_s = time.perf_counter() - begin
config = transformers.Qwen3Config(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                  num_attention_heads=1, num_key_value_heads=1, head_dim=8)
model = transformers.Qwen3ForCausalLM(config)
args = trl.SFTConfig(output_dir=out, max_length=int(seq_length), packing=True, packing_strategy="bfd",
                     assistant_only_loss=True, dataset_num_proc=int(num_proc), report_to=[], use_cpu=True, bf16=False,
                     disable_tqdm=True, eos_token="<|im_end|>")
prepare = trl.SFTTrainer._prepare_dataset
def timed(self, *args, **kwargs):
    start, cpu_start = time.perf_counter(), sum(os.times()[:4])
    prepared = prepare(self, *args, **kwargs)
    prepare_s, cpu_s = time.perf_counter() - start, sum(os.times()[:4]) - cpu_start
    tokens = sum(len(ids) for ids in prepared["input_ids"])
    print("RESULT " + json.dumps({"seconds": prepare_s, "loading_s": loading_s, "cpu_s": cpu_s, "tokens": tokens,
                                  "trl": trl.__version__, "transformers": transformers.__version__}))
    raise SystemExit(0)
trl.SFTTrainer._prepare_dataset = timed
trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
"""


def timed(function: Callable[..., R], *args: object) -> tuple[R, float]:
    """The function's result, and its wall time in seconds."""
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def show(name: str, value: str, bar: str = "") -> None:
    print(f"{name:<46} {value:<34} {bar}", flush=True)


def peak_gib(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / 2**20


def bench_packing() -> None:
    for num_documents, bar in ((1_000_000, "<= 1.5 s, >= 99.9 %"), (10_000_000, "<= 15 s")):
        lengths = np.clip(np.random.default_rng(0).lognormal(7.0, 1.0, num_documents), 8, SEQ_LENGTH).astype(np.int32)
        plan, seconds = timed(pack, lengths, SEQ_LENGTH, "best-fit")
        full = packing_figures(plan, lengths, SEQ_LENGTH)["efficiency"]
        value = f"{seconds:.2f} s, {full:.3%} full, peak {peak_gib(resource.RUSAGE_SELF):.2f} GiB"
        show(f"pack {num_documents:,} lengths at {SEQ_LENGTH}", value, bar)


def bench_opening() -> None:
    """The checksums of a store, which are compared whenever it is opened; of files that are in memory already."""
    with tempfile.TemporaryDirectory() as folder:
        data = np.random.default_rng(0).bytes(2**28)
        for name in FILES:
            Path(folder, name).write_bytes(data * 4 if name == "tokens.bin" else data if name == "loss_mask.bin" else b"")
        write_meta(Path(folder), {})
        cpu_start = sum(os.times()[:4])
        seconds = min(timed(read_meta, Path(folder))[1] for _ in range(3))
        cpu_s = (sum(os.times()[:4]) - cpu_start) / 3
    value = f"{5 * 2**28 / seconds / 1e9:.2f} GB/s, {5 * 2**28 / cpu_s / 1e9:.2f} GB a CPU s"
    show("open a store of 1.3 GB: its checksums", value, ">= 2 GB/s")


def bench_ours(rows: str, tokenizer: str, num_workers: int) -> float:
    """Mtok/s of load + tokenise + mask + write + pack, from an empty cache; imports are not in it, the tokenizer's loading is."""
    config = DataConfig(
        tokenizer_model=tokenizer,
        seq_length=SEQ_LENGTH,
        truncation="right",
        num_workers=num_workers,
        max_bad_rows=10**9,
    )
    with tempfile.TemporaryDirectory() as cache:
        cpu_start = sum(os.times()[:4])
        store, tokenise_s = timed(build_token_store, config, [open_source(rows, config)], cache)
        plan, pack_s = timed(pack, store.lengths, SEQ_LENGTH, "best-fit")
        cpu_s = sum(os.times()[:4]) - cpu_start
        tokens = int(store.lengths.sum())
        rate = tokens / (tokenise_s + pack_s) / 1e6
        show(
            f"tokenise + mask + pack, {num_workers} processes",
            f"{rate:.2f} Mtok/s, {cpu_s:.1f} CPU s",
            ">= 2.5 Mtok/s",
        )
        print(as_table(data_report(store, plan, SEQ_LENGTH)))
    show("peak memory, largest process", f"{peak_gib(resource.RUSAGE_CHILDREN):.2f} GiB", "<= 2 GiB")
    return rate


def bench_trl(rows: str, tokenizer: str, num_proc: int, folder: str) -> float:
    """Mtok/s of the tokenizer's and the rows' loading and SFTTrainer's preparation (tokens, assistant mask, best-fit packing)."""
    path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as out:
        environment = {**os.environ, "PYTHONPATH": path, "HF_DATASETS_CACHE": out, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", TRL_PROGRAM, rows, tokenizer, str(SEQ_LENGTH), str(num_proc), out]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(run.stderr[-2000:])
        raise SystemExit(f"TRL failed with status {run.returncode}")
    result = json.loads(found[0].removeprefix("RESULT "))
    rate = result["tokens"] / (result["loading_s"] + result["seconds"]) / 1e6
    alone = result["tokens"] / result["seconds"] / 1e6
    show("versions", f"trl {result['trl']}, transformers {result['transformers']}")
    show("TRL, load + prepare", f"{rate:.3f} Mtok/s")
    show("TRL, SFTTrainer._prepare_dataset alone", f"{alone:.3f} Mtok/s, {result['cpu_s']:.1f} CPU s")
    return rate


def bench_million(rows: str, tokenizer: str, num_workers: int) -> None:
    """1M rows: the given ones, over and over."""
    lines = Path(rows).read_bytes().splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/million.jsonl"
        with open(path, "wb") as file:
            for i in range(1_000_000):
                file.write(lines[i % len(lines)])
        bench_ours(path, tokenizer, num_workers)
    show("peak memory of the parent", f"{peak_gib(resource.RUSAGE_SELF):.2f} GiB", "<= 2 GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures of the data pipeline.")
    parser.add_argument("--rows", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--trl")
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--num-workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    log.configure(0)
    importlib.import_module("transformers.models.auto.tokenization_auto")  # before the clock, as in TRL's program
    importlib.import_module("transformers.activations")  # which a tokenizer's config.json makes AutoTokenizer import: 1 s
    importlib.import_module("tiktoken")
    show("versions", f"numpy {metadata.version('numpy')}, tokenizers {metadata.version('tokenizers')}")
    bench_packing()
    bench_opening()
    ours = bench_ours(args.rows, args.tokenizer, args.num_workers)
    if args.trl:
        peer = bench_trl(args.rows, args.tokenizer, args.num_workers, args.trl)
        show("ours / TRL", f"{ours / peer:.1f}x", ">= 8x")
    if args.million:
        bench_million(args.rows, args.tokenizer, args.num_workers)


if __name__ == "__main__":
    main()
