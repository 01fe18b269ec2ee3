"""Adam in one pass: reads gradient, moments and weight, each in its dtype, and writes the moments, the weight and a rounded copy.

Its reference is torch's fused kernel, through fp32 copies of what is narrower (train/adam.py). With moments and gradient in
bf16 that moves 64 bytes a parameter, this 20.
"""

import torch
import triton
import triton.language as tl

ELEMENTS = 1024
"""That a program updates."""


def update(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    copy: torch.Tensor | None,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """One update, in place.

    Args:
        weight: fp32, contiguous, as all the others.
        gradient: fp32 or bf16; as many elements as weight, as all the others.
        first: exp_avg, fp32 or bf16.
        second: exp_avg_sq, fp32 or bf16.
        copy: gets the weight in its own dtype; None: nothing does.
        step: number of this update, from 1.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: of the weight (AdamW) when `decoupled`, else added to the gradient.
        decoupled: which of the two.
    """
    assert all(tensor.is_contiguous() for tensor in (weight, gradient, first, second)), "states are contiguous"
    assert copy is None or copy.is_contiguous(), "a parameter is contiguous"
    count = weight.numel()
    if count:
        _update[(triton.cdiv(count, ELEMENTS),)](
            *(weight, gradient, first, second, weight if copy is None else copy, count),
            *(lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5, betas[0], 1 - betas[0], betas[1], 1 - betas[1]),
            *(eps, 1 - lr * weight_decay if decoupled else weight_decay),
            DECOUPLED=decoupled,
            COPIES=copy is not None,
            ELEMENTS=ELEMENTS,
        )


@triton.jit
def _update(  # type: ignore[no-untyped-def] # Triton reads annotations as its own
    weight,
    gradient,
    first,
    second,
    copy,
    count,
    step_size,
    root_correction,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    decay,
    DECOUPLED: tl.constexpr,
    COPIES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < count
    w = tl.load(weight + place, mask=inside, other=0.0)
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(first + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second + place, mask=inside, other=0.0).to(tl.float32)
    if DECOUPLED:
        w *= decay
    else:
        g += w * decay
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    w -= step_size * m / (tl.sqrt_rn(v) / root_correction + eps)
    tl.store(first + place, m.to(first.dtype.element_ty), mask=inside)
    tl.store(second + place, v.to(second.dtype.element_ty), mask=inside)
    tl.store(weight + place, w, mask=inside)
    if COPIES:
        tl.store(copy + place, w.to(copy.dtype.element_ty), mask=inside)
