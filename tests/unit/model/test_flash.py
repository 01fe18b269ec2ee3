"""The CUDA branch of PackedAttention with torch's varlen kernel, which a CPU has not, written out by its documentation."""

import itertools

import pytest
import torch
from torch.nn.attention import varlen

from megatron_sft.config.run import ParallelConfig
from megatron_sft.model import attention
from megatron_sft.model.attention import PackedAttention, packed_seq_params
from megatron_sft.parallel import finalize, initialize
from tests.gpu.test_attention import CASES
from tests.gpu.test_attention import attention as module_of

LENGTHS = [7, 1, 60, 12]


def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """torch 2.11's varlen_attn: grouped queries unasked, window (left, right) around the query, -1 for no limit."""
    assert (max_q, cu_seq_q.dtype, type(max_q)) == (max(LENGTHS), torch.int32, int)
    assert query.shape[2] == key.shape[2] == value.shape[2], "one width for queries, keys and values"
    parts, repeats = [], query.shape[1] // key.shape[1]
    for first, last in itertools.pairwise(cu_seq_q.tolist()):
        q, k, v = (x[first:last].transpose(0, 1) for x in (query, key, value))
        distance = torch.arange(last - first)[:, None] - torch.arange(last - first)[None]
        left, right = window_size
        seen = (distance <= left if left >= 0 else torch.tensor(True)) & (
            distance >= -right if right >= 0 else torch.tensor(True)
        )
        scores = q @ k.repeat_interleave(repeats, 0).transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append((shares @ v.repeat_interleave(repeats, 0)).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture(scope="module")
def groups():
    from megatron.core.process_groups_config import ProcessGroupCollection

    initialize(ParallelConfig(), 1)
    yield ProcessGroupCollection.use_mpu_process_groups()
    finalize()


@pytest.mark.parametrize("case", ["one-to-one", "grouped", "latent", "window", "window-of-two"])
def test_flash_branch_is_the_other_branch(case, groups, monkeypatch):
    heads, kv, dim, _ = CASES[case]
    module: PackedAttention = module_of(case, "fp32", groups, "cpu")
    shapes = ((heads, dim), (kv, dim), (kv, dim * 2 // 3 if case == "latent" else dim))
    tensors = [torch.randn(sum(LENGTHS), *shape, requires_grad=True) for shape in shapes]
    packed = packed_seq_params(torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32), max(LENGTHS))
    by_document = module(*tensors, None, packed_seq_params=packed)
    upstream = torch.randn_like(by_document)
    expected = torch.autograd.grad(by_document, tensors, upstream)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "fits_flash", lambda query, value: True)
    by_kernel = module(*tensors, None, packed_seq_params=packed)
    torch.testing.assert_close(by_kernel, by_document, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(by_kernel, tensors, upstream), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
