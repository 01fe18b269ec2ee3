"""A run that does not fit says what to change, and ends with status 3."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMITED = """
import resource, sys
import finetune
from megatron_sft.train import setup

def limited(*arguments, train=setup.train):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
    return train(*arguments)

setup.train = limited
sys.exit(finetune.main(sys.argv[1:]))
"""


def test_host_memory_that_runs_out_names_the_flags(tiny_folder: Path, tmp_path: Path) -> None:
    """600 packs of 128 tokens in one micro-batch, with room for 300 MiB once training starts."""
    row = {"messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes. " * 20}]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(600)))
    flags = ["--load", tiny_folder, "--finetune-hf-dataset", tmp_path / "rows.jsonl", "--seq-length", "128", "--num-workers", "1"]
    flags += ["--micro-batch-size", "600", "--global-batch-size", "600", "--train-iters", "1", "--prefetch", "0"]
    flags += ["--data-cache-path", tmp_path / "cache", "--no-verify-conversion"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", LIMITED, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "rank 0: out of memory on the host: " in done.stdout and "Traceback" not in done.stderr
    for knob in (
        "lower --micro-batch-size (now 600), or fill by --max-tokens-per-gpu",
        "--recompute-granularity selective",
        "--bf16",
        "--use-precision-aware-optimizer",
        "--use-distributed-optimizer",
        "raise --tensor-model-parallel-size (now 1)",
        "raise --pipeline-model-parallel-size (now 1)",
        "raise --context-parallel-size (now 1)",
        "lower --seq-length (now 128)",
    ):
        assert knob in done.stdout
