"""Adam with moments and gradients in bf16: one rounding a step, states that survive a checkpoint, few bytes."""

import pytest
import torch

from megatron_sft.train import adam
from megatron_sft.train.adam import FusedAdam

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
NARROW = dict(exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16, use_decoupled_grad=True)


def test_narrow_moments_are_the_fp32_update_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam, "SLICE", 7)
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(5, 4))
    plain = torch.nn.Parameter(param.detach().clone())
    optimizer, reference = FusedAdam([param], **SETTINGS, **NARROW), FusedAdam([plain], **SETTINGS)
    for _ in range(3):
        gradient = torch.randn(5, 4).bfloat16()
        param.decoupled_grad, plain.grad = gradient, gradient.float()
        optimizer.step()
        reference.step()
        for name in ("exp_avg", "exp_avg_sq"):
            rounded = reference.state[plain][name].bfloat16()
            assert torch.equal(optimizer.state[param][name], rounded)
            reference.state[plain][name].copy_(rounded)
        assert torch.equal(param, plain)


def test_master_weights_of_its_own_are_written_back_rounded() -> None:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(6).bfloat16())
    plain = torch.nn.Parameter(param.detach().float())
    optimizer = FusedAdam([param], **SETTINGS, **NARROW, master_weights=True)
    reference = FusedAdam([plain], **SETTINGS, **NARROW)
    for _ in range(3):
        param.decoupled_grad = plain.decoupled_grad = torch.randn(6).bfloat16()
        optimizer.step()
        reference.step()
    assert torch.equal(optimizer.state[param]["master_param"], plain)
    assert torch.equal(param, plain.bfloat16())


def test_states_keep_their_dtype_through_a_state_dict() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = FusedAdam([param], **SETTINGS, **NARROW)
    param.decoupled_grad = torch.ones(4).bfloat16()
    optimizer.step()
    other = FusedAdam([param], **SETTINGS, **NARROW)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["step"] == 1
    for name in ("exp_avg", "exp_avg_sq"):
        assert other.state[param][name].dtype == torch.bfloat16
        assert torch.equal(other.state[param][name], optimizer.state[param][name])
    other.set_scaled_state(param, "exp_avg", torch.full((4,), 0.5))
    assert torch.equal(other.get_unscaled_state(param, "exp_avg"), torch.full((4,), 0.5).bfloat16())
