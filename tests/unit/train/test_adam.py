"""Adam with moments and gradients in bf16, and with states in host memory: one rounding a step, states kept by a checkpoint."""

import copy

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


MAIN = dict(master_weights=True, use_decoupled_grad=True)


@pytest.mark.parametrize(
    ("settings", "dtype", "method"),
    [
        ({}, torch.float32, "adam"),
        ({}, torch.float32, "sgd"),
        (MAIN, torch.bfloat16, "adam"),
        (MAIN | NARROW, torch.bfloat16, "adam"),
    ],
)
def test_states_in_host_memory_change_no_bit(
    settings: dict, dtype: torch.dtype, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of three parameters keeps its states beside it. Slices are whole vectors, whose rest a CPU rounds otherwise."""
    monkeypatch.setattr(adam, "SLICE", 16)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 8), (5,), (21,))]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    optimizer, plain = (
        FusedAdam([{"params": group, "method": method, "momentum": 0.9}], **SETTINGS, **settings) for group in (ours, theirs)
    )
    optimizer.keep_in_host_memory(0.61)
    for step in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(mine.shape)
            name = "decoupled_grad" if settings else "grad"
            setattr(mine, name, gradient), setattr(other, name, gradient.clone())
        before = {name: id(state) for name, state in optimizer.state[ours[0]].items()}
        optimizer.step()
        plain.step()
        assert step == 0 or before == {name: id(state) for name, state in optimizer.state[ours[0]].items()}
        if step == 1:
            optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        states, wanted = optimizer.state[mine], plain.state[other]
        assert states.keys() == wanted.keys()
        assert all(states[name].dtype == wanted[name].dtype and torch.equal(states[name], wanted[name]) for name in states)
    assert optimizer._hosted == set(ours[:2])
