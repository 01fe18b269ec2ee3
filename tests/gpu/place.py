"""Where the tests of this folder run: on CUDA; with GPU_TESTS_ON_CPU=1 (bench/gpu.sh --cpu) their CPU form, the same code."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; for the tests that resume

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
RUNS_HERE = CUDA or os.environ.get("GPU_TESTS_ON_CPU") == "1"
on_device = pytest.mark.skipif(not RUNS_HERE, reason="needs a CUDA device: run bench/gpu.sh on a GPU machine")
on_cuda = pytest.mark.skipif(not CUDA, reason="has no CPU form: run bench/gpu.sh on a GPU machine")


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of `exact`."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-30))


def without_gpu(module: str, words: list[str], out: Path, timeout: float) -> Any:
    """What a module, run in a process that sees no GPU, saves at `out`."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)
