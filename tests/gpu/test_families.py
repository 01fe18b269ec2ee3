"""Every family on the device beside the CPU: experts, sinks, soft caps, Mamba layers, latent attention and the rest."""

from pathlib import Path

import pytest
import torch

from megatron_sft.core_compat import use_deterministic_algorithms
from tests.gpu.families import FAMILIES, step
from tests.gpu.place import CUDA, error, on_device, without_gpu
from tests.unit.hf.tiny_models import KEYS

ROOT = Path(__file__).parents[2]
NAMES = list(KEYS) if CUDA else FAMILIES


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory, ranks):
    """Every family on the CPU, in a process that sees no GPU; without CUDA in this one."""
    if not CUDA:
        return {name: step(name, "fp32", ranks) for name in NAMES}
    out = tmp_path_factory.mktemp("cpu") / "families.pt"
    return without_gpu("tests.gpu.families", [str(out), *NAMES], out, timeout=240)


@pytest.fixture
def deterministic():
    use_deterministic_algorithms()
    yield
    torch.use_deterministic_algorithms(False)


@on_device
@pytest.mark.parametrize("name", NAMES)
def test_a_family_in_fp32_is_the_cpus(name, on_the_cpu, ranks):
    ours, theirs = step(name, "fp32", ranks), on_the_cpu[name]
    assert error(ours["losses"], theirs["losses"]) <= 1e-4
    assert error(ours["gradient"], theirs["gradient"]) <= 1e-3


@on_device
@pytest.mark.parametrize("name", NAMES)
def test_a_family_in_bf16_repeats_bit_by_bit(name, on_the_cpu, ranks, deterministic):
    """A tenth of the loss: with random weights a rounded score may choose another expert."""
    first, second = (step(name, "bf16", ranks) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first) and first["gradient"].isfinite().all()
    assert float(first["losses"].mean()) == pytest.approx(float(on_the_cpu[name]["losses"].mean()), rel=0.1)
