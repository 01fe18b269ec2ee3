"""The gradient's norm, and the update that it scales, apart: between them stands a step's one transfer to the host.

Together they are megatron-core's ChainedOptimizer.step (megatron/core/optimizer/optimizer.py), number by number; that one asks
the device for the norm in its middle.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, clip_grads

from megatron_sft.core_compat import gradients_for_norm


@torch.no_grad()
def squared_norms(optimizer: ChainedOptimizer) -> torch.Tensor:
    """Collective: makes the gradients ready for the update. The device is not waited for.

    Returns:
        [n] float32, whose sum is the square of the gradient's norm over all ranks: one number where all parts of the optimizer
        are cut over the same ranks, else one a part.
    """
    optimizer.prepare_grads()
    parts = optimizer.chained_optimizers
    gradients = [gradients_for_norm(part) for part in parts]
    groups = [part.get_grad_stats_parallel_group() for part in parts]
    if optimizer.grads_states_parallel_group_is_shared():
        gradients, groups = [[gradient for part in gradients for gradient in part]], groups[:1]
    return torch.cat([_squared_norm(*pair) for pair in zip(gradients, groups, strict=True)])


def _squared_norm(gradients: list[torch.Tensor], group: Any) -> torch.Tensor:
    """[1] float32; as megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32 before it asks."""
    overflow = torch.zeros(1, dtype=torch.int, device="cuda")
    square = torch.zeros(1, dtype=torch.float, device="cuda")
    if gradients:
        norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [gradients], False)
        square = norm**2.0
    dist.all_reduce(square, group=group)
    return square


@torch.no_grad()
def update(optimizer: ChainedOptimizer, squares: list[float]) -> float:
    """Clips the gradients that squared_norms has made ready, and updates.

    Args:
        optimizer: megatron-core's.
        squares: what squared_norms returned.

    Returns:
        The gradient's norm before it was clipped.
    """
    norms = [square**0.5 for square in squares]
    norm = norms[0] if len(norms) == 1 else math.sqrt(sum(part**2 for part in norms))
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            is_decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grads.clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm, is_decoupled)
    optimizer.step_with_ready_grads()
    return norm
