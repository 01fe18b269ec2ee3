"""FlexAttention beside attention in blocks. A CPU gives its outputs alone (torch 2.13 has no gradient there): gradients are those
of its mask and scores, put into attention that is written out."""

import itertools

import pytest
import torch

from megatron_sft.model.attention import PackedAttention, packed_seq_params
from megatron_sft.model.flex import BLOCK, _capped, row_mask
from tests.gpu.test_attention import CASES
from tests.gpu.test_attention import attention as module_of
from tests.unit.model.test_flash import groups  # noqa: F401

LENGTHS = [7, 1, 250, 65, 33]
CASES["softcap-and-window"] = (8, 2, 64, dict(attn_logit_softcapping=5.0, window_size=100))


@pytest.mark.parametrize("case", ["softcap", "softcap-and-window"])
def test_outputs_and_gradients_are_those_of_blocks(case, groups):  # noqa: F811
    heads, kv, dim, _ = CASES[case]
    module: PackedAttention = module_of(case, "fp32", groups, "cpu")
    torch.manual_seed(0)
    tensors = [torch.randn(sum(LENGTHS), count, dim, requires_grad=True) for count in (heads, kv, kv)]
    ends = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    packed = packed_seq_params(ends, max(LENGTHS))
    by_blocks = module(*tensors, None, packed_seq_params=packed)
    upstream = torch.randn_like(by_blocks)
    module.is_flex = True
    with torch.no_grad():
        by_flex = module(*(x.detach() for x in tensors), None, packed_seq_params=packed)
    by_definition = written_out(*tensors, row_mask(ends.tolist(), module.window, torch.device("cpu")), module.softcap)
    torch.testing.assert_close(by_flex, by_blocks, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_definition, by_blocks, rtol=1e-5, atol=1e-5)
    pairs = (torch.autograd.grad(output, tensors, upstream) for output in (by_definition, by_blocks))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def written_out(query, key, value, mask, softcap):
    """[T, heads * dim] by the functions that the kernel is made of."""
    places, heads = torch.arange(len(query)), query.shape[1]
    q, k, v = (x.repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1) for x in (query, key, value))
    scores = _capped(softcap)(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, 0, 0, places[:, None], places[None])
    scores = scores.masked_fill(~mask.mask_mod(0, 0, places[:, None], places[None]), -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("window", [None, 2, 100, 300])
def test_the_tiles_are_those_that_somebody_sees_something_in(window):
    ends = [0, *itertools.accumulate([*LENGTHS, 300, 128])]
    mask = row_mask(ends, window, torch.device("cpu"))
    places = torch.arange(ends[-1])
    seen = mask.mask_mod(0, 0, places[:, None], places[None])
    for row, (count, tiles) in enumerate(zip(mask.kv_num_blocks[0, 0].tolist(), mask.kv_indices[0, 0].tolist(), strict=True)):
        queries = seen[row * BLOCK : (row + 1) * BLOCK]
        assert tiles[:count] == sorted({place // BLOCK for place in queries.any(dim=0).nonzero()[:, 0].tolist()})
