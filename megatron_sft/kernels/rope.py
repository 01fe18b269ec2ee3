"""Queries and keys out of the projection's output: norm of each head, then RoPE.

`triton` says who does it: torch, an operation after another, or one kernel each way (rope_triton.py) that reads the projection
where it is and writes its gradient whole.
"""

from typing import Any

import torch


def norm_and_turn(
    mixed: torch.Tensor,
    table: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values by one Triton kernel, with gradients by one more.

    Args:
        mixed: [T, groups, heads a group + 2, dim], contiguous: the queries of a group, its key and its value.
        table: [T, 2, dim], cosines and sines in two equal halves (model/rope.py: one kind, not interleaved).
        query_weight: [dim], what the root-mean-square norm of a query is multiplied by; None: queries have no norm.
        key_weight: the same for keys; None where query_weight is.
        eps: added to the mean square.

    Returns:
        [T, groups * heads a group, dim], [T, groups, dim] and [T, groups, dim], the last a view of `mixed`.
    """
    return _NormAndTurn.apply(mixed, table, query_weight, key_weight, eps)  # type: ignore[no-any-return]


def norm_and_turn_reference(
    mixed: torch.Tensor,
    table: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """norm_and_turn in torch's words."""
    dim, half = mixed.shape[-1], mixed.shape[-1] // 2
    query, key, value = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
    found = []
    for heads, weight in ((query, query_weight), (key, key_weight)):
        normed = heads if weight is None else torch.nn.functional.rms_norm(heads, (dim,), weight, eps)
        other = torch.cat((-normed[..., half:], normed[..., :half]), dim=-1)
        found.append(normed * table[:, 0, None] + other * table[:, 1, None])
    return found[0], found[1], value


class _NormAndTurn(torch.autograd.Function):
    """Saves the projection's output and the table; norms are taken again."""

    @staticmethod
    def forward(ctx: Any, mixed: Any, table: Any, query_weight: Any, key_weight: Any, eps: float) -> Any:
        from megatron_sft.kernels.rope_triton import forward

        assert (query_weight is None) == (key_weight is None), "queries and keys have a norm, or neither"
        ctx.save_for_backward(mixed, table, query_weight, key_weight)
        ctx.eps = eps
        query, key = forward(mixed, table, query_weight, key_weight, eps)
        return query, key, mixed[:, :, -1].view_as(mixed[:, :, -1])

    @staticmethod
    def backward(ctx: Any, grad_query: Any, grad_key: Any, grad_value: Any) -> Any:
        from megatron_sft.kernels.rope_triton import backward

        mixed, table, query_weight, key_weight = ctx.saved_tensors
        grads = grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous()
        grad_mixed, *weights = backward(*grads, mixed, table, query_weight, key_weight, ctx.eps)
        return grad_mixed, None, *weights, None
