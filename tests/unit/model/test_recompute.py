"""Recomputation changes memory, not numbers: the loss is identical, gradients are, up to rounding, those without it."""

from typing import Any

import pytest
import torch

from megatron_sft.config.run import ParallelConfig, TrainConfig
from megatron_sft.hf.config import model_config_from_hf, read_hf_config
from megatron_sft.hf.weights import load_hf_weights
from megatron_sft.model.attention import packed_seq_params
from megatron_sft.model.build import build_model
from megatron_sft.parallel import finalize, initialize
from megatron_sft.weights import padded
from tests.unit.hf.tiny_models import tiny_folder

LENGTHS = [14, 1, 4, 11]
MODES: dict[str, dict[str, Any]] = {
    "selective": {"recompute_granularity": "selective"},
    "uniform-1": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform-2": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block-2": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
}
MODULES = {
    "qwen3": ["layernorm", "mlp"],
    "gemma3_text": ["layernorm", "mlp"],
    "qwen3_moe": ["layernorm", "mlp", "moe"],
    "gpt_oss": ["layernorm", "moe"],
    "deepseek_v3": ["layernorm", "mlp", "moe", "shared_experts", "mla_up_proj"],
    "nemotron_h": ["layernorm", "mlp"],
    "nemotron_h-moe": ["moe", "shared_experts"],
}
"""Dense, windows with a rotary table of their own, experts, sinks, latent attention, Mamba; what selective can name of each."""


@pytest.fixture(scope="module")
def ranks():
    yield initialize(ParallelConfig(), 1)
    finalize()


def losses_and_gradients(name: str, folder: Any, ranks: Any, **train: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = padded(model_config_from_hf(read_hf_config(folder)), 8)
    chunk = build_model(model, ParallelConfig(), TrainConfig(**train))[0]
    load_hf_weights([chunk], model, folder, ranks)
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(3, model.vocab_size, (2, 1, sum(LENGTHS)), generator=generator)
    losses, total = [], torch.zeros(())
    for lengths in (LENGTHS, LENGTHS[::-1]):  # two rows before the backward pass, as a pipeline stage has them
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        packed = packed_seq_params(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths))
        losses.append(chunk(tokens, positions, None, labels=labels, packed_seq_params=packed))
        total = total + losses[-1].sum()
    total.backward()
    return torch.cat(losses).detach(), {key: p.grad for key, p in chunk.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODULES)
def test_recomputation_changes_no_number(name, tmp_path, ranks):
    tiny_folder(name, tmp_path, num_layers=4)
    expected, gradients = losses_and_gradients(name, tmp_path, ranks)
    floor = 1e-3 * max(float(gradient.norm()) for gradient in gradients.values())  # for those that are nearly 0
    modules = {"recompute_granularity": "selective", "recompute_modules": tuple(MODULES[name])}
    for mode, train in {**MODES, "modules": modules}.items():
        found, recomputed = losses_and_gradients(name, tmp_path, ranks, **train)
        assert torch.equal(found, expected), mode
        assert recomputed.keys() == gradients.keys()
        for key, gradient in gradients.items():
            apart = float((recomputed[key] - gradient).norm() / gradient.norm().clamp(min=floor))
            assert apart <= 1e-6, (mode, key, apart)
