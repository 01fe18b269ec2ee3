"""Held-out loss after a short fine-tuning on GSM8K: Adam, Muon at three rates, LoRA; whole runs of finetune.py on one core.

    python bench/optimizers.py [WORD ...] [--steps 30] [--seq-length 1024] [--rows gsm8k_train.jsonl] [--model FOLDER]

Words choose rows of the table whose names have one of them. fp32: a CPU without bf16 kernels takes bf16 products in fp32 anyway.
A step is one pack. Time is processor time of the whole run, its start included. Training rows: question and answer, or messages.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "data"
RUNS = {
    "no step": "--lr 0",
    "adam 1e-4": "--lr 1e-4",
    "muon 3e-5": "--optimizer muon --lr 1e-4 --matrix-lr 3e-5",
    "muon 1e-4": "--optimizer muon --lr 1e-4 --matrix-lr 1e-4",
    "muon 3e-4": "--optimizer muon --lr 1e-4 --matrix-lr 3e-4",
    "lora rank 16, 1e-3": "--lora-rank 16 --lr 1e-3",
}
"""Muon's embeddings, head and norms are Adam's, at 1e-4."""


def trained(options: argparse.Namespace, flags: str, steps: int) -> tuple[float, float, float]:
    """(loss of the last step, held-out loss, processor seconds) of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "finetune.py", "--load", options.model, "--train-data", options.rows, "--fp32"]
        command += ["--seq-length", options.seq_length, "--global-batch-size", 1, "--train-iters", steps, *flags.split()]
        command += ["--valid-data", DATA / "gsm8k_test_16.jsonl", "--eval-iters", -1, "--eval-interval", steps]
        command += ["--save", folder, "--no-save-optim", "--data-cache-path", f"{folder}/cache", "--seed", 1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            sys.exit(f"{flags}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        last = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])
    return last["sft/loss"], last["valid/loss"], after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--model", default=str(ROOT / "demo" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--rows", default=str(DATA / "gsm8k_train_400.jsonl"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seq-length", type=int, default=1024)
    options = parser.parse_args()
    print(f"| {options.steps} steps of {options.seq_length} tokens | last step's loss | held-out loss | processor s |")
    print("|---|---|---|---|", flush=True)
    for name, flags in RUNS.items():
        if not options.words or any(word in name for word in options.words):
            loss, held_out, seconds = trained(options, flags, 1 if name == "no step" else options.steps)
            print(f"| {name} | {loss:.4f} | {held_out:.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
