"""Muon is torch.optim.Muon on each HF matrix, bit for bit; nanochat's variant is its formulas."""

import math

import pytest
import torch

from megatron_sft.config.run import ModelConfig
from megatron_sft.train.adam import SLICE
from megatron_sft.train.muon import POLAR, Matrix, MixedOptimizer, _in_slices, evened, gathered, nanochat_momentum, polar

MODEL = ModelConfig(
    num_layers=1, hidden_size=16, num_attention_heads=4, num_query_groups=2, kv_channels=8, ffn_hidden_size=24, vocab_size=9
)
GROUP = {"lr_mult": 1.0, "wd_mult": 1.0, "momentum": 0.95}
PARTS = {"whole": [(20, 12)], "wide": [(12, 20)], "gated": [(24, 16), (24, 16)], "qkv": [(32, 16), (16, 16), (16, 16)]}


def built(layout: str, method: str, weight: torch.Tensor) -> tuple[torch.nn.Parameter, Matrix, MixedOptimizer]:
    parameter = torch.nn.Parameter(weight.clone())
    layout = "whole" if layout == "wide" else layout
    matrix = Matrix(layout, tuple(weight.shape), 0, weight.numel(), MODEL, None, None)
    optimizer = MixedOptimizer([{"params": [parameter], "method": method, **GROUP}], lr=1e-2, weight_decay=0.1)
    optimizer.plans = {(1.0, 1.0): [(parameter, matrix)]}
    return parameter, matrix, optimizer


def sources(matrix: Matrix, whole: torch.Tensor, dtype: torch.dtype) -> dict[int, torch.Tensor]:
    return gathered([(matrix, whole)], dtype)[0]


@pytest.mark.parametrize("name", PARTS)
def test_muon_is_torchs_on_each_hf_matrix(name):
    torch.manual_seed(1)
    rows, columns = sum(shape[0] for shape in PARTS[name]), PARTS[name][0][1]
    parameter, matrix, optimizer = built(name, "muon-torch", torch.randn(rows, columns))
    theirs = [torch.nn.Parameter(part.clone()) for part in sources(matrix, parameter.detach(), torch.float32).values()]
    assert [tuple(part.shape) for part in theirs] == PARTS[name]
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        parameter.grad = torch.randn_like(parameter)
        for part, gradient in zip(theirs, sources(matrix, parameter.grad, torch.float32).values(), strict=True):
            part.grad = gradient
        optimizer.step()
        reference.step()
    for ours, part in zip(sources(matrix, parameter.detach(), torch.float32).values(), theirs, strict=True):
        assert torch.equal(ours, part.detach())
    assert set(optimizer.state[parameter]) == {"exp_avg"}


def transcribed(weight, gradients, lr, decay):
    """nanochat/optim.py:muon_step_fused in float64, one matrix."""
    rows, columns = weight.shape
    momentum_buffer, line = torch.zeros_like(weight), -1 if rows >= columns else -2
    second = torch.zeros_like(weight.mean(dim=line, keepdim=True))
    for step, gradient in enumerate(gradients):
        share = min(step / 300, 1)
        momentum = (1 - share) * 0.85 + share * 0.95
        momentum_buffer = momentum_buffer + (1 - momentum) * (gradient - momentum_buffer)
        x = gradient + momentum * (momentum_buffer - gradient)
        x = x * ((x.norm() / math.sqrt(rows)) / x.norm(dim=-1, keepdim=True))
        x = x / (x.norm() * 1.01 + 1e-6)
        for a, b, c in POLAR:
            if rows > columns:
                x = a * x + x @ (b * (x.T @ x) + c * (x.T @ x) @ (x.T @ x))
            else:
                x = a * x + (b * (x @ x.T) + c * (x @ x.T) @ (x @ x.T)) @ x
        x = x * math.sqrt(min(rows, columns)) / x.norm()
        mean, size = x.square().mean(dim=line, keepdim=True), weight.shape[line]
        second = second + 0.1 * (mean - second)
        scale = second.rsqrt()
        scale = scale * ((mean.sum() * size).sqrt() / ((mean * size) * scale.square()).sum().sqrt())
        x = x * scale
        rate = lr * max(1.0, rows / columns) ** 0.5
        weight = weight - rate * (x + decay * weight * ((x * weight) >= 0))
    return weight


@pytest.mark.parametrize("name", PARTS)
def test_nanochats_variant_is_its_formulas(name):
    torch.manual_seed(2)
    rows, columns = sum(shape[0] for shape in PARTS[name]), PARTS[name][0][1]
    parameter, matrix, optimizer = built(name, "muon-nanochat", torch.randn(rows, columns))
    gradients = [torch.randn_like(parameter) for _ in range(4)]
    before = sources(matrix, parameter.detach(), torch.float64)
    by_step = [sources(matrix, gradient, torch.float64) for gradient in gradients]
    for gradient in gradients:
        parameter.grad = gradient.detach().clone()
        optimizer.step()
    for number, ours in sources(matrix, parameter.detach(), torch.float64).items():
        wanted = transcribed(before[number], [step[number] for step in by_step], 1e-2, 0.1)
        assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_matrix_without_gradient_stays_finite():
    zero = torch.zeros(6, 4)
    update, second = evened(polar(zero), zero)
    assert not update.any() and not second.any()
    assert [nanochat_momentum(step) for step in (1, 151, 301, 9999)] == pytest.approx([0.85, 0.90, 0.95, 0.95])


def test_what_is_sent_at_once_has_a_bound():
    shapes = [(SLICE // 8, 4), (SLICE // 8, 4), (3, 3), (SLICE, 2), (1, 1)]
    plan = [(None, Matrix("whole", shape, 0, 0, MODEL, None, None)) for shape in shapes]
    assert [[matrix.shape for _, matrix in part] for part in _in_slices(plan)] == [
        shapes[:2],
        shapes[2:3],
        shapes[3:4],
        shapes[4:],
    ]
    assert list(_in_slices([])) == []
