"""Training tokens per second beside TRL's SFTTrainer: the same model, rows, length and steps, one after the other.

    python bench/train.py [--model demo/SmolLM2-135M-Instruct] [--steps 8] [--rounds 2]

Both train bf16 weights with packed rows of 1,024 tokens, one pack a step, on all cores; useful tokens (no padding) a
second are the median over the steps after the second. TRL is installed into a throw-away folder (pip install --target).
Prints a table and one JSON line. The ratio is the figure to read: both ran in the same minutes on the same machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "examples/data/gsm8k_train_400.jsonl"
LENGTH = 1024
TRL = "trl>=1.16,<2"


def ours(model: str, steps: int) -> list[tuple[float, float]]:
    """Tokens and model FLOPs (model/flops.py) a second of each step of finetune.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "finetune.py", "--load", model, "--finetune-hf-dataset", ROWS, "--bf16"]
        command += ["--seq-length", LENGTH, "--global-batch-size", 1, "--train-iters", steps, "--lr", 1e-4]
        command += ["--save", folder, "--no-save-optim", "--no-verify-conversion"]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return [(row["perf/tokens_per_s"], row["perf/tflops_per_gpu"]) for row in rows]


def trl(model: str, steps: int, folder: str) -> list[float]:
    """The same of TRL's SFTTrainer, in a process of its own that has `folder` on its path."""
    command = [sys.executable, __file__, "--peer", "--model", model, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": folder}, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def peer(model: str, steps: int) -> None:
    """TRL with packing, its documentation's way of fine-tuning a chat model; prints its tokens per second."""
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    rates: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            rates.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            packing=True,
            max_length=LENGTH,
            per_device_train_batch_size=1,
            max_steps=steps,
            use_cpu=True,
            bf16=False,
            learning_rate=1e-4,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            model_init_kwargs={"dtype": "bfloat16"},
            gradient_checkpointing=False,
            dataloader_drop_last=False,
        )
        rows = load_dataset("json", data_files=str(ROWS), split="train")
        trainer = SFTTrainer(model, args=config, train_dataset=rows, callbacks=[Clock()])
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        trainer.train()
    print(json.dumps([statistics.mean(lengths) / seconds for seconds in rates]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trl", help="folder that has TRL already")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return peer(options.model, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        if not options.trl:
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, TRL, "accelerate"]
            subprocess.run(install, check=True)
        rates: dict[str, list[float]] = {"megatron-sft": [], "trl": []}
        tflops: list[float] = []
        for number in range(options.rounds):
            done = ours(options.model, options.steps)[2:]
            rates["megatron-sft"] += [tokens for tokens, _ in done]
            tflops += [rate for _, rate in done]
            rates["trl"] += trl(options.model, options.steps, options.trl or folder)[2:]
            print(
                f"round {number + 1}: medians { ({name: round(statistics.median(r)) for name, r in rates.items()}) }", flush=True
            )
    for name, values in rates.items():
        figures = f"{min(values):8.0f} {statistics.median(values):8.0f} {max(values):8.0f}"
        print(f"{name:14s} {figures} useful tokens/s (min, median, max)")
    ratio = statistics.median(rates["megatron-sft"]) / statistics.median(rates["trl"])
    figures = {"ratio_to_trl": round(ratio, 2), "bar": 1.0, "tflops": round(statistics.median(tflops), 3)}
    print(json.dumps({"benchmark": "train bf16 packed 1024", **figures}))


if __name__ == "__main__":
    main()
