"""Norm and RoPE of queries and keys in one kernel each way: values and all gradients are torch's, odd sizes included."""

import pytest
import torch

from megatron_sft.kernels.rope import norm_and_turn, norm_and_turn_reference
from megatron_sft.model.rope import rotate
from tests.triton_kernels import CLOSE, DEVICE, apart, needs_triton, roundings

SHAPES = {"grouped": (70, 2, 3, 16), "one": (1, 3, 1, 64), "odd": (33, 1, 2, 24)}
"""Tokens, groups, queries a group, channels: tokens of less than a program, of one and of three; 12 channels in 16."""


def drawn(name, dtype, normed):
    """The projection's output, a table that is one of two kinds, weights; all of `dtype`."""
    tokens, groups, per_group, dim = SHAPES[name]
    generator = torch.Generator().manual_seed(tokens)
    mixed = torch.randn(tokens, groups, per_group + 2, dim, generator=generator)
    angles = torch.rand(tokens, 2, dim // 2, generator=generator).repeat(1, 1, 2) * 6
    table = torch.stack((angles.cos(), angles.sin()), dim=2)  # [tokens, kinds, 2, dim]
    weights = [torch.rand(dim, generator=generator) + 0.5 for _ in range(2)] if normed else [None, None]
    upstream = [torch.randn(tokens, count, dim, generator=generator) for count in (groups * per_group, groups, groups)]
    moved = [x if x is None else x.to(DEVICE, dtype) for x in (mixed, table, *weights, *upstream)]
    return moved[0], moved[1][:, 1], moved[2:4], moved[4:]


def run(function, mixed, table, weights, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in (mixed, *weights) if x is not None]
    outputs = function(leaves[0], table, *(leaves[1:] or (None, None)), 1e-5)
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


@needs_triton
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_those_of_torch(name, normed):
    drawn_ = drawn(name, torch.float32, normed)
    for found, wanted in zip(run(norm_and_turn, *drawn_), run(norm_and_turn_reference, *drawn_), strict=True):
        assert found.shape == wanted.shape and apart(found, wanted) <= CLOSE


@needs_triton
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_bf16_is_rounded_once(name, normed):
    """Beside the same numbers in fp32: torch's own operations round after each."""
    mixed, table, weights, upstream = drawn(name, torch.bfloat16, normed)
    wide = [x.float() for x in (mixed, table)], [x if x is None else x.float() for x in weights], [x.float() for x in upstream]
    exact = run(norm_and_turn_reference, *wide[0], *wide[1:])
    for found, wanted in zip(run(norm_and_turn, mixed, table, weights, upstream), exact, strict=True):
        assert roundings(found, wanted) <= 1


def test_the_reference_is_what_the_layers_do():
    """Without a norm: model/rope.py's turn of queries and keys, and the values as they are."""
    mixed, table, weights, _ = drawn("grouped", torch.float32, False)
    query, key, value = norm_and_turn_reference(mixed, table, *weights, 1e-5)
    torch.testing.assert_close(query, rotate(mixed[:, :, :-2].flatten(1, 2), table), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(key, rotate(mixed[:, :, -2], table), rtol=1e-6, atol=1e-6)
    assert torch.equal(value, mixed[:, :, -1])
