"""Training tokens per second beside TRL's SFTTrainer: the same model, rows, length and steps, one after the other.

    python bench/train.py [--model demo/SmolLM2-135M-Instruct] [--steps 8] [--rounds 2] [--masks all assistant]

Both train packed rows of 1,024 tokens, one pack a step, on all cores, in bf16 where this CPU multiplies it, else in fp32; useful
tokens (no padding) a second are the median over the steps after the second. TRL is installed into a throw-away folder (pip
install --target). With `all` both train every token; with `assistant` both are asked for the assistant's alone, and TRL gets the
model's template with the marks that it needs for that. Prints a table and one JSON line a mask. The ratio is the figure to read:
both ran in the same minutes on the same machine.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_sft.core_compat import multiplies_bf16  # noqa: E402

ROWS = ROOT / "examples/data/gsm8k_train_400.jsonl"
LENGTH = 1024
TRL = "trl>=1.16,<2"
BARS = {"all": 1.75, "assistant": 2.0}
MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's template, the same text, with TRL's marks of what the assistant says."""


def ours(model: str, steps: int, mask: str, dtype: str) -> list[tuple[float, float]]:
    """Tokens and model FLOPs (model/flops.py) a second of each step of finetune.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "finetune.py", "--load", model, "--finetune-hf-dataset", ROWS, f"--{dtype}"]
        command += ["--seq-length", LENGTH, "--global-batch-size", 1, "--train-iters", steps, "--lr", 1e-4]
        command += ["--save", folder, "--no-save-optim", "--no-verify-conversion", "--train-on", mask]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return [(row["perf/tokens_per_s"], row["perf/tflops_per_gpu"]) for row in rows]


def trl(model: str, steps: int, mask: str, dtype: str, folder: str) -> list[float]:
    """The same of TRL's SFTTrainer, in a process of its own that has `folder` on its path."""
    command = [sys.executable, __file__, "--peer", "--model", model, "--steps", str(steps), "--masks", mask, "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": folder}, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def peer(model: str, steps: int, mask: str, dtype: str) -> None:
    """TRL with packing, its documentation's way of fine-tuning a chat model; prints its tokens per second."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    rates: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            rates.append(time.perf_counter() - self.start)

    tokenizer = AutoTokenizer.from_pretrained(model)
    if mask == "assistant":
        tokenizer.chat_template = MARKED
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
            model_init_kwargs={"dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype]},
            assistant_only_loss=mask == "assistant",
            gradient_checkpointing=False,
            dataloader_drop_last=False,
        )
        rows = load_dataset("json", data_files=str(ROWS), split="train")
        trainer = SFTTrainer(model, args=config, train_dataset=rows, callbacks=[Clock()], processing_class=tokenizer)
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        trainer.train()
    print(json.dumps([statistics.mean(lengths) / seconds for seconds in rates]))


def compare(model: str, steps: int, rounds: int, mask: str, dtype: str, folder: str) -> None:
    """Prints the rows of one mask."""
    rates: dict[str, list[float]] = {"megatron-sft": [], "trl": []}
    tflops: list[float] = []
    for number in range(rounds):
        done = ours(model, steps, mask, dtype)[2:]
        rates["megatron-sft"] += [tokens for tokens, _ in done]
        tflops += [rate for _, rate in done]
        rates["trl"] += trl(model, steps, mask, dtype, folder)[2:]
        medians = {name: round(statistics.median(r)) for name, r in rates.items()}
        print(f"{mask}, round {number + 1}: medians {medians}", flush=True)
    for name, values in rates.items():
        figures = f"{min(values):8.0f} {statistics.median(values):8.0f} {max(values):8.0f}"
        print(f"{name:14s} {figures} useful tokens/s (min, median, max)")
    ratio = statistics.median(rates["megatron-sft"]) / statistics.median(rates["trl"])
    figures = {"trained": mask, "ratio_to_trl": round(ratio, 2), "bar": BARS[mask], "tflops": round(statistics.median(tflops), 3)}
    print(json.dumps({"benchmark": f"train {dtype} packed 1024", **figures}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--masks", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 where this CPU multiplies it")
    parser.add_argument("--trl", help="folder that has TRL already")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return peer(options.model, options.steps, options.masks[0], options.dtype)
    dtype = options.dtype or ("bf16" if multiplies_bf16() else "fp32")
    with tempfile.TemporaryDirectory() as folder:
        if not options.trl:
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, TRL, "accelerate"]
            subprocess.run(install, check=True)
        for mask in options.masks:
            compare(options.model, options.steps, options.rounds, mask, dtype, options.trl or folder)


if __name__ == "__main__":
    main()
