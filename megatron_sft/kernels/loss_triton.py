"""Triton's side of loss.py: logits are read once for a token's sums, and once for their gradient, which is written over them.

About 2 bytes a logit for the sums and 4 for the gradient in bf16; torch's own operations take some 70 together.
"""

import torch
import triton
import triton.language as tl

COLUMNS = 4096
"""Logits of a token that a program holds at a time."""


def add_sums(
    peak: torch.Tensor,
    exponentials: torch.Tensor,
    label: torch.Tensor,
    total: torch.Tensor | None,
    products: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
) -> None:
    """Adds a block to a token's sums in place; arguments as in loss.py:Scores and add_block."""
    tokens, rows = products.shape
    if tokens and rows:
        _sums[(tokens,)](
            *(peak, exponentials, label, peak if total is None else total, products, targets),
            *(products.stride(0), rows, softcap or 1.0),
            CAPPED=softcap is not None,
            TOTAL=total is not None,
            COLUMNS=min(COLUMNS, triton.next_power_of_2(rows)),
        )


def replace_by_gradient(
    products: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    denominator: torch.Tensor,
    scale: torch.Tensor,
    on_probability: torch.Tensor | None,
    on_label: torch.Tensor | None,
    on_all: torch.Tensor | None,
) -> None:
    """Puts the gradient in the products' place; arguments as in loss.py:block_gradient."""
    tokens, rows = products.shape
    columns = min(COLUMNS, triton.next_power_of_2(max(rows, 1)))
    slopes = [scale if slope is None else slope for slope in (on_probability, on_label, on_all)]
    if tokens and rows:
        _gradient[(tokens, triton.cdiv(rows, columns))](
            *(products, targets, denominator, scale, *slopes),
            *(products.stride(0), rows, softcap or 1.0),
            CAPPED=softcap is not None,
            ON_PROBABILITY=on_probability is not None,
            ON_LABEL=on_label is not None,
            ON_ALL=on_all is not None,
            COLUMNS=columns,
        )


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def] # Triton reads annotations as its own
    """To 2e-7 relative: by exp, and near 0, where that cancels, by the power series."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    large = (1.0 - e) / (1.0 + e)
    s = size * size
    small = size * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    magnitude = tl.where(size < 0.25, small, large)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    peak,
    exponentials,
    label,
    total,
    products,
    targets,
    stride,
    rows,
    softcap,
    CAPPED: tl.constexpr,
    TOTAL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    line = products + token * stride
    highest = tl.load(peak + token)
    added = tl.load(exponentials + token)
    everything = 0.0
    for start in range(0, rows, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < rows
        logits = tl.load(line + column, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            logits = softcap * _tanh(logits / softcap)
        if TOTAL:
            everything += tl.sum(tl.where(inside, logits, 0.0), axis=0)
        logits = tl.where(inside, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=0))
        added = added * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        highest = higher
    tl.store(peak + token, highest)
    tl.store(exponentials + token, added)
    if TOTAL:
        tl.store(total + token, tl.load(total + token) + everything)
    target = tl.load(targets + token)
    here = (target >= 0) & (target < rows)
    met = tl.load(line + target, mask=here, other=0.0).to(tl.float32)
    if CAPPED:
        met = softcap * _tanh(met / softcap)
    tl.store(label + token, tl.load(label + token) + met)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    products,
    targets,
    denominator,
    scale,
    on_probability,
    on_label,
    on_all,
    stride,
    rows,
    softcap,
    CAPPED: tl.constexpr,
    ON_PROBABILITY: tl.constexpr,
    ON_LABEL: tl.constexpr,
    ON_ALL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < rows
    place = products + token * stride + column
    logits = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        share = _tanh(logits / softcap)
        logits = softcap * share
    gradient = tl.exp(logits - tl.load(denominator + token))
    if ON_PROBABILITY:
        gradient *= tl.load(on_probability + token)
    if ON_ALL:
        gradient -= tl.load(on_all + token)
    less = 1.0
    if ON_LABEL:
        less = tl.load(on_label + token)
    gradient -= tl.where(column == tl.load(targets + token), less, 0.0)
    gradient *= tl.load(scale + token)
    if CAPPED:
        gradient *= 1.0 - share * share
    tl.store(place, gradient.to(products.dtype.element_ty), mask=inside)
