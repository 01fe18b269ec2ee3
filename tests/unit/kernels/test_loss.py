"""Triton's passes over logits are torch's, of bf16 and odd sizes too; whole losses with either are in model/test_losses.py."""

import pytest
import torch

from megatron_sft.kernels.loss import Scores, Slopes, add_block, block_gradient
from tests.triton_kernels import CLOSE, DEVICE, apart, needs_triton, roundings

TOKENS = 13


def drawn(rows, dtype, stride=0):
    """Products in a row of `stride` more numbers; labels in this block (first, last), before and behind it."""
    generator = torch.Generator().manual_seed(rows)
    products = (torch.randn(TOKENS, rows + stride, generator=generator) * 4).to(dtype)[:, :rows]
    targets = torch.randint(-rows, 2 * rows, (TOKENS,), generator=generator)
    targets[:4] = torch.tensor([0, rows - 1, -1, rows])
    return products.to(DEVICE), targets.to(DEVICE), generator


def scores(extras):
    peak = torch.full((TOKENS,), -torch.inf, device=DEVICE)
    zeros = torch.zeros(TOKENS, device=DEVICE)
    top = torch.full((TOKENS, 3), -torch.inf, device=DEVICE) if extras else None
    return Scores(peak, zeros.clone(), zeros.clone(), zeros.clone() if extras else None, top)


@needs_triton
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_blocks_are_those_of_torch(dtype, softcap, monkeypatch):
    """Blocks of 1, 37, 300 (three of the kernel's steps) and 256 rows; also of products that are part of a wider matrix."""
    from megatron_sft.kernels import loss_triton

    monkeypatch.setattr(loss_triton, "COLUMNS", 128)
    for extras in (False, True):
        found = {triton: scores(extras) for triton in (True, False)}
        for rows, stride in ((1, 0), (37, 0), (300, 5), (256, 0)):
            products, targets, _ = drawn(rows, dtype, stride)
            for triton, sums in found.items():
                add_block(sums, products, targets, softcap, triton)  # torch's last: it writes over products in fp32
        torch_, triton_ = found[False], found[True]
        assert torch.equal(torch_.peak, triton_.peak) or softcap
        pairs = [(triton_.denominator(), torch_.denominator()), (triton_.peak, torch_.peak), (triton_.label, torch_.label)]
        if extras:
            pairs += [(triton_.total, torch_.total), (triton_.top, torch_.top)]
        assert max(apart(*pair) for pair in pairs) <= CLOSE


@needs_triton
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("slopes", ["none", "label", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_torch(dtype, slopes, softcap, monkeypatch):
    from megatron_sft.kernels import loss_triton

    monkeypatch.setattr(loss_triton, "COLUMNS", 128)
    for rows, stride in ((1, 0), (37, 3), (300, 0)):
        products, targets, generator = drawn(rows, dtype, stride)
        rest = [torch.rand(TOKENS, generator=generator).to(DEVICE) for _ in range(4)]
        chosen = Slopes(*(rest[:3] if slopes == "all" else (None, rest[0], None) if slopes == "label" else (None,) * 3))
        denominator = products.float().logsumexp(dim=1) + 1
        settings = targets, softcap, denominator, rest[3], chosen
        exact = block_gradient(products.float().clone(), *settings, triton=False)
        found = block_gradient(products.clone(), *settings, triton=True)
        assert found.dtype == dtype and found.shape == products.shape
        if dtype == torch.float32:
            assert apart(found, exact) <= CLOSE
        else:
            assert roundings(found, exact) <= 1


@needs_triton
def test_what_is_beside_the_block_is_left_as_it_is():
    wide = torch.full((3, 20), 7.0, device=DEVICE)
    ones = torch.ones(3, device=DEVICE)
    targets = torch.tensor([0, 12, 13], device=DEVICE)  # 13 is the first row of the next block
    block_gradient(wide[:, :13], targets, None, ones, ones, Slopes(None, None, None), triton=True)
    assert bool((wide[:, 13:] == 7).all())
    assert torch.equal(wide[1, 12] + 1, wide[2, 12])


@needs_triton
def test_no_token_and_no_row_are_no_error():
    for shape in ((0, 5), (4, 0)):
        sums = Scores(*(torch.zeros(shape[0], device=DEVICE) for _ in range(3)), None, None)
        targets = torch.zeros(shape[0], dtype=torch.int64, device=DEVICE)
        products = torch.zeros(shape, device=DEVICE)
        add_block(sums, products, targets, None, triton=True)
        ones = torch.ones(shape[0], device=DEVICE)
        assert block_gradient(products, targets, None, ones, ones, Slopes(None, None, None), triton=True).shape == shape
        assert float(sums.exponentials.sum()) == 0
