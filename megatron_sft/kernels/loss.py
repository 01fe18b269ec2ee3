"""A block of the vocabulary in the head's softmax: what its logits add to a token's sums, and their gradient.

Costs and slopes by token are model/loss.py's, as are the products; `triton` says who reads the logits: torch, in about fifteen
passes, or one kernel (loss_triton.py) in one pass each.
"""

from dataclasses import dataclass

import torch


@dataclass
class Scores:
    """What the costs of n tokens are made of, added up over blocks of the vocabulary; float32."""

    peak: torch.Tensor
    """[n] greatest logit so far; -inf where there was none."""
    exponentials: torch.Tensor
    """[n] sum of exp(logit - peak)."""
    label: torch.Tensor
    """[n] logit of the label; 0 where it has not been met."""
    total: torch.Tensor | None
    """[n] sum of all logits; None where it is not asked for."""
    top: torch.Tensor | None
    """[n, k] greatest logits; None where they are not asked for."""

    def denominator(self) -> torch.Tensor:
        """[n] log of the softmax's denominator."""
        return self.peak + self.exponentials.log()


@dataclass(frozen=True)
class Slopes:
    """A cost's gradient by the logits: on_probability * p - on_label where the label is - on_all; [n] each, None: 1, 1, 0."""

    on_probability: torch.Tensor | None
    on_label: torch.Tensor | None
    on_all: torch.Tensor | None


def add_block(scores: Scores, products: torch.Tensor, targets: torch.Tensor, softcap: float | None, triton: bool) -> None:
    """Adds a block's logits to the scores.

    Args:
        scores: of the blocks before it; changed.
        products: [n, rows] hidden states times the block's rows, in the weight's dtype; what they hold afterwards is not said.
        targets: [n] int64, the label's row in the block; outside of 0 .. rows - 1 where it is in another block.
        softcap: logits are softcap * tanh(product / softcap); None: the products.
        triton: by the kernel.
    """
    if triton:
        from megatron_sft.kernels.loss_triton import add_sums

        if scores.top is not None:
            greatest = _capped(products.topk(min(scores.top.shape[1], products.shape[1]), dim=1).values.float(), softcap)
            scores.top = greatest_of([scores.top, greatest], scores.top.shape[1])
        add_sums(scores.peak, scores.exponentials, scores.label, scores.total, products, targets, softcap)
        return
    logits = _capped(products.float(), softcap)
    here, column = _local(targets, logits.shape[1])
    scores.label += torch.where(here, logits.gather(1, column[:, None])[:, 0], 0.0)
    if scores.total is not None:
        scores.total += logits.sum(dim=1)
    if scores.top is not None:
        scores.top = greatest_of([scores.top, logits], scores.top.shape[1])
    higher = torch.maximum(scores.peak, logits.amax(dim=1))
    added = logits.sub_(higher[:, None]).exp_().sum(dim=1)
    scores.exponentials = scores.exponentials * (scores.peak - higher).exp_() + added
    scores.peak = higher


def block_gradient(
    products: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    denominator: torch.Tensor,
    scale: torch.Tensor,
    slopes: Slopes,
    triton: bool,
) -> torch.Tensor:
    """The gradient of the costs by a block's products.

    Args:
        products: as in add_block.
        targets: as in add_block.
        softcap: as in add_block.
        denominator: [n] float32, log of the softmax's denominator over the whole vocabulary.
        scale: [n] float32, the gradient by each token's cost.
        slopes: of the costs.
        triton: by the kernel.

    Returns:
        [n, rows] in the products' dtype: scale * (on_probability * p - on_label where the label is - on_all), by the logits, and
        times 1 - (logit / softcap)^2.
    """
    if triton:
        from megatron_sft.kernels.loss_triton import replace_by_gradient

        parts = slopes.on_probability, slopes.on_label, slopes.on_all
        replace_by_gradient(products, targets, softcap, denominator, scale, *parts)
        return products
    logits = _capped(products.float(), softcap)
    cap_slope = 1 - (logits / softcap).square_() if softcap is not None else None
    gradient = logits.sub_(denominator[:, None]).exp_()
    if slopes.on_probability is not None:
        gradient.mul_(slopes.on_probability[:, None])
    if slopes.on_all is not None:
        gradient.sub_(slopes.on_all[:, None])
    here, column = _local(targets, logits.shape[1])
    less = here[:, None].to(gradient.dtype)
    gradient.scatter_add_(1, column[:, None], -less if slopes.on_label is None else -less * slopes.on_label[:, None])
    gradient = gradient.mul_(scale[:, None])
    if cap_slope is not None:
        gradient.mul_(cap_slope)
    return gradient.to(products.dtype)


def greatest_of(parts: list[torch.Tensor], count: int) -> torch.Tensor:
    """The greatest of a row's elements over all parts, in order: [n, count]."""
    return torch.cat([part.topk(min(count, part.shape[1]), dim=1).values for part in parts], dim=1).topk(count, dim=1).values


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _local(targets: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets are among `rows` rows, and the row: -3, 1 of 8 rows -> (False, True), (0, 1)."""
    here = (targets >= 0) & (targets < rows)
    return here, torch.where(here, targets, 0)
