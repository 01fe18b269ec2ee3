"""What stands between megatron-core, torch and us gives what they give."""

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sft import core_compat
from megatron_sft.core_compat import fuse_gradient_norm, varlen_attention
from megatron_sft.environment import process_environment
from megatron_sft.errors import ConfigError


def test_gradient_norm_and_clipping_are_megatron_cores_in_fp32():
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    importlib.reload(clip_grads)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((300, 7), (65,), (1,))]
    cpu = [g.clone() for g in gradients]
    local_multi_tensor_scale(0, None, [cpu, cpu], 0.3)
    expected = torch.norm(torch.tensor([float(torch.norm(g)) for g in gradients]))
    assert clip_grads.l2_norm_impl is local_multi_tensor_l2_norm
    fuse_gradient_norm()
    norm, _ = clip_grads.l2_norm_impl(0, None, [gradients], False)
    assert norm.shape == (1,) and norm.dtype == torch.float32 and norm[0] == expected
    clip_grads.multi_tensor_scale_impl(0, None, [gradients, gradients], 0.3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, cpu, strict=True))
    fuse_gradient_norm()  # a second time changes nothing
    narrow = [g.to(torch.bfloat16) for g in cpu]
    exact = torch.norm(torch.stack([g.double().norm() for g in narrow]))
    assert abs(float(clip_grads.l2_norm_impl(0, None, [narrow], False)[0]) / float(exact) - 1) < 1e-6


def test_varlen_attention_asks_for_grouped_queries_where_torch_wants_to_be_asked(monkeypatch):
    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        return "2.11"

    def of_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        return enable_gqa

    for function, answer in ((of_2_11, "2.11"), (of_2_12, True)):
        monkeypatch.setattr(varlen, "varlen_attn", function)
        assert varlen_attention()(0, 1, 2, 3, 4, 5, 6, scale=None, window_size=(-1, 0)) == answer


PLACE = {"MASTER_ADDR": "h", "MASTER_PORT": "1"}
ENVIRONMENTS = [
    ({}, (0, 1, 0)),
    ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, 0)),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **PLACE}, (3, 4, 1)),
    ({"RANK": "1", "WORLD_SIZE": "2", **PLACE}, (1, 2, 0)),
    ({"WORLD_SIZE": "2"}, "no RANK beside WORLD_SIZE, no MASTER_ADDR beside WORLD_SIZE, no MASTER_PORT beside WORLD_SIZE;"),
    ({"RANK": "1"}, "RANK=1 with WORLD_SIZE=1;"),
    ({"RANK": "4", "WORLD_SIZE": "4", **PLACE}, "RANK=4 with WORLD_SIZE=4;"),
    ({"RANK": "-1", "WORLD_SIZE": "two", "LOCAL_RANK": "1e3"}, "RANK='-1', WORLD_SIZE='two', LOCAL_RANK='1e3';"),
    ({"WORLD_SIZE": "0"}, "RANK=0 with WORLD_SIZE=0;"),
    ({"RANK": "0", "WORLD_SIZE": "2", **PLACE, "MASTER_PORT": "65536"}, "MASTER_PORT='65536';"),
    ({"RANK": "0", "WORLD_SIZE": "2", **PLACE, "MASTER_PORT": "x"}, "MASTER_PORT='x';"),
    ({"RANK": "0", "WORLD_SIZE": "9" * 20, **PLACE}, f"WORLD_SIZE='{'9' * 20}';"),
]


@pytest.mark.parametrize(("variables", "expected"), ENVIRONMENTS)
def test_a_launchers_variables_are_whole_or_an_error(monkeypatch, variables, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, tuple):
        assert process_environment() == expected
    else:
        with pytest.raises(ConfigError) as caught:
            process_environment()
        assert f"environment: {expected} expected RANK, WORLD_SIZE" in str(caught.value)


@pytest.mark.parametrize(("limit", "status"), [("ulimit -n 64", 2), ("ulimit -n 255", 2), ("ulimit -Sn 64", 0)])
def test_the_limit_of_open_files_is_raised_or_an_error(limit, status):
    command = f'{limit}; exec "$0" -m megatron_sft prepare --help 2>&1'
    done = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout
    refused = f"at most {limit.split()[-1]} open files are allowed; expected 256 or more. Allow more: ulimit -n 4096."
    assert (refused in done.stdout) == bool(status) and "Traceback" not in done.stdout


class Product(torch.autograd.Function):
    """As megatron-core's linear layers: products in Python, forward and backward."""

    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        return torch.matmul(left, right.t())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = ctx.saved_tensors
        return gradient.matmul(right), torch.mm(gradient.t(), left, out=torch.empty_like(right))


class Dtypes(TorchDispatchMode):
    """Collects the dtypes that products are taken in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.seen |= {value.dtype for value in args if isinstance(value, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def test_a_cpu_without_bf16_kernels_takes_products_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_compat, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(core_compat, "products_in_fp32", set())
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", torch.autograd._engine_run_backward)  # type: ignore[attr-defined]
    left, right = (torch.randn(6, 5).bfloat16().requires_grad_() for _ in range(2))
    mode = core_compat._cpu_function_mode()
    core_compat._take_mode_into_backward(mode)
    with Dtypes() as products, mode:
        native = torch.nn.functional.linear(left, right)
        product = Product.apply(left, right)
        (product + 2 * native).sum().backward()
    assert products.seen == {torch.float32}
    expected = (left.float() @ right.float().t()).bfloat16()
    assert torch.equal(product, expected) and torch.equal(native, expected)
    with torch.no_grad():
        summed = (right.float().sum(0)).bfloat16()  # of the custom function; twice that of linear, rounded apart
        assert left.grad is not None and torch.equal(left.grad, (summed + 2 * summed).expand(6, 5))
