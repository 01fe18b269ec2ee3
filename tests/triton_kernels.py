"""Triton in tests: on a CPU by its interpreter, where triton is installed (`pip install triton`, 190 MB); on CUDA compiled.

tests/conftest.py imports it before anything imports triton.
"""

import importlib.util
import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

CLOSE = 1e-6 if DEVICE.type == "cpu" else 1e-5
"""What fp32 may be apart from torch, relative to the greatest element; a GPU's exponentials and divisions are approximate."""
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install triton")
BOTH = pytest.mark.parametrize("triton", [pytest.param(False, id="torch"), pytest.param(True, id="triton", marks=needs_triton)])
"""By torch's operations, and by the kernel."""


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Greatest difference, relative to the greatest element."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def roundings(found: torch.Tensor, exact: torch.Tensor) -> float:
    """How many roundings to bf16 (2^-7 of a number) `found` is away from `exact` [fp32] at the most, less 1e-6 of the most."""
    assert found.dtype == torch.bfloat16 and exact.dtype == torch.float32
    away = (found.float() - exact).abs() - 1e-6 * exact.abs().max()
    return float((away / (exact.abs() * 2.0**-7).clamp_min(1e-38)).max())
