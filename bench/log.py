"""What logging costs: milliseconds per step of each place, beside the time of a real step.

    python bench/log.py [--model demo/SmolLM2-135M-Instruct] [--writes 300]

Writes steps of a run with ten sources to metrics.jsonl and the console, then to each place of train/writers.py besides whose
package is installed (W&B and SwanLab offline, MLflow and Trackio into files), and trains six steps of 1,024 tokens for the
ratio. Prints a table and one JSON line; the bar is that of what every run writes: console, metrics.jsonl and TensorBoard.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_sft.config.log import LogConfig, is_installed
from megatron_sft.config.run import CheckpointConfig, RunConfig
from megatron_sft.train import metrics as writing

ROOT = Path(__file__).parents[1]
STEP = {
    "consumed_samples": 24,
    "global_batch_size": 8,
    "sft/loss": 1.25,
    **{f"sft/loss/source_{number}": 1.25 for number in range(10)},
    "sft/per_token_loss": 1.25,
    "sft/trained_tokens": 4000,
    "sft/tokens_seen": 90000,
    "sft/epoch": 0.5,
    "grad_norm": 2.5,
    "lr": 1e-4,
    "perf/step_ms": 1500.04,
    "perf/tokens_per_s": 5461.3,
    "perf/tflops_per_gpu": 0.25,
    "perf/peak_memory_gb": 1.5,
    "data/prefetch_queue_depth": 2,
    "data/wait_ms": 0.01,
    "skipped_iterations": 0,
}


def write_ms(writes: int, folder: str, **places: str) -> float:
    """Median milliseconds of MetricsWriter.write with these fields of LogConfig."""
    run = RunConfig(log=dataclasses.replace(LogConfig(), **places), checkpoint=CheckpointConfig(save=folder))
    times = []
    with contextlib.redirect_stdout(io.StringIO()), writing.metrics_writer(run, 0, 0, writes) as write:
        for iteration in range(1, writes + 1):
            begin = time.perf_counter()
            write({"iteration": iteration, **STEP})
            times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


def step_ms(model: str, folder: str) -> float:
    """Median milliseconds of a step of finetune.py, after the second."""
    rows = ROOT / "examples/data/gsm8k_train_400.jsonl"
    command = [
        sys.executable,
        ROOT / "finetune.py",
        "--load",
        model,
        "--finetune-hf-dataset",
        rows,
        "--bf16",
        "--seq-length",
        1024,
    ]
    command += ["--train-iters", 6, "--lr", 1e-5, "--save", folder, "--no-save-optim", "--no-verify-conversion"]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["perf/step_ms"] for line in lines[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--writes", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TRACKIO_DIR": f"{folder}/trackio", "WANDB_SILENT": "true"}
        offline = {
            "wandb": {"wandb_project": "p", "wandb_mode": "offline"},
            "mlflow": {"mlflow_experiment": "p", "mlflow_tracking_uri": f"sqlite:///{folder}/mlflow.db"},
            "trackio": {"trackio_project": "p"},
            "swanlab": {"swanlab_project": "p", "swanlab_mode": "offline"},
        }
        found = {"console, metrics.jsonl, TensorBoard": write_ms(options.writes, f"{folder}/all")}
        for package, places in offline.items():
            if is_installed(package):
                found[f"and {package}"] = write_ms(options.writes, f"{folder}/{package}", **places)
        step = step_ms(options.model, f"{folder}/run")
    for name, milliseconds in found.items():
        print(f"{name:36s} {milliseconds:7.2f} ms per step, {milliseconds / step:.2%} of {step:.0f} ms")
    share = next(iter(found.values())) / step
    print(json.dumps({"benchmark": "logging, share of a step", "share": round(share, 5), "bar": 0.01, "step_ms": round(step)}))


if __name__ == "__main__":
    main()
