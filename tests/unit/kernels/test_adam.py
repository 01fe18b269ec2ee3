"""Adam in one kernel is torch's update in fp32, each state rounded once, and the parameter with it."""

import pytest
import torch

from megatron_sft.train.adam import FusedAdam
from tests.triton_kernels import CLOSE, DEVICE, apart, needs_triton, roundings

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
BF16, FP32 = torch.bfloat16, torch.float32


@needs_triton
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(("moments", "gradients"), [((BF16, BF16), BF16), ((FP32, BF16), FP32), ((FP32, FP32), BF16)])
def test_a_step_is_torchs_rounded_once(moments, gradients, decoupled):
    """2051 numbers, three programs; states are made the same again before each of three steps."""
    torch.manual_seed(0)
    start = torch.randn(7, 293)
    settings = dict(**SETTINGS, adam_w_mode=decoupled)
    narrow = dict(exp_avg_dtype=moments[0], exp_avg_sq_dtype=moments[1], use_decoupled_grad=True, master_weights=True)
    param = torch.nn.Parameter(start.to(DEVICE, BF16))
    plain = torch.nn.Parameter(param.detach().float())
    optimizer, reference = FusedAdam([param], **settings, **narrow), FusedAdam([plain], **settings)
    optimizer.triton = True
    for _ in range(3):
        gradient = torch.randn(7, 293).to(DEVICE, gradients)
        param.decoupled_grad, plain.grad = gradient, gradient.float()
        optimizer.step()
        reference.step()
        state, exact = optimizer.state[param], reference.state[plain]
        assert apart(state["master_param"], plain) <= CLOSE
        assert roundings(param.detach(), plain.detach()) <= 1
        for name, dtype in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            assert state[name].dtype == dtype
            assert (roundings if dtype == BF16 else apart)(state[name], exact[name]) <= (1 if dtype == BF16 else CLOSE)
            exact[name].copy_(state[name])
        plain.data.copy_(state["master_param"])


@needs_triton
def test_weights_without_a_copy_and_of_one_dtype_are_updated_too():
    """Without the distributed optimizer the parameters are the fp32 weights; what is fp32 throughout is torch's kernel's."""
    torch.manual_seed(0)
    for dtype in (BF16, FP32):
        param = torch.nn.Parameter(torch.randn(5, device=DEVICE))
        plain = torch.nn.Parameter(param.detach().clone())
        narrow = dict(exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype, use_decoupled_grad=True)
        optimizer, reference = FusedAdam([param], **SETTINGS, **narrow), FusedAdam([plain], **SETTINGS, **narrow)
        optimizer.triton = True
        param.decoupled_grad = plain.decoupled_grad = torch.randn(5, device=DEVICE).to(dtype)
        optimizer.step()
        reference.step()
        assert apart(param.detach(), plain.detach()) <= CLOSE
