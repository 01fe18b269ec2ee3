"""Where the tests of this folder run: on CUDA; with GPU_TESTS_ON_CPU=1 (bench/gpu.sh --cpu) their CPU form, the same code."""

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; for the tests that resume

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
RUNS_HERE = CUDA or os.environ.get("GPU_TESTS_ON_CPU") == "1"
on_device = pytest.mark.skipif(not RUNS_HERE, reason="needs a CUDA device: run bench/gpu.sh on a GPU machine")
on_cuda = pytest.mark.skipif(not CUDA, reason="has no CPU form: run bench/gpu.sh on a GPU machine")


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of `exact`."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-30))
