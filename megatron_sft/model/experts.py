"""Experts of a layer by grouped products, in place of megatron-core's loop over them.

Parameters, their names and checkpoints are SequentialMLP's (megatron/core/transformer/moe/experts.py), and so is the loop where
grouped products do not fit: one expert on this rank, adapters on experts, no tokens. The dispatcher sorts tokens by expert, and
adds up over ETP and EP; nothing here waits for how many tokens an expert has.

    tokens [T, in] in groups, weights E x [out, in] -> torch.nn.functional.grouped_mm -> [T, out]
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_sft.model.layers import BiasedRowParallelLinear, wait_for_parameters

PLAIN = (ColumnParallelLinear, RowParallelLinear, BiasedRowParallelLinear)


class GroupedExperts(SequentialMLP):
    """SequentialMLP's arguments, parameters, outputs and gradients."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for linears in self._linears():
            _lay_together([linear.weight for linear in linears])

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """What the experts make of their tokens.

        Args:
            permuted_local_hidden_states: [T, hidden], tokens of the first expert first.
            tokens_per_expert: [experts] int64, on the host or the device.
            permuted_probs: [T] float32, what each output is multiplied by.

        Returns:
            [T, hidden], and no bias: it is in the output.
        """
        hidden, probs = permuted_local_hidden_states, permuted_probs
        columns, rows = self._linears()
        if not (_fits(columns, hidden) and _fits(rows, hidden)):
            return super().forward(hidden, tokens_per_expert, probs)
        for linear in (*columns, *rows):
            wait_for_parameters(linear)
        if self.config.moe_apply_probs_on_input:
            hidden, probs = (probs[:, None] * hidden).to(hidden.dtype), torch.ones_like(probs)
        counts = tokens_per_expert.to(hidden.device, non_blocking=True)
        ends, owner = counts.cumsum(0).to(torch.int32), None
        if self.config.add_bias_linear:
            experts = torch.arange(len(columns), device=hidden.device)
            owner = torch.repeat_interleave(experts, counts, output_size=hidden.shape[0])
        inner = _Product.apply(hidden, ends, *(linear.weight for linear in columns))
        if owner is not None:
            inner = inner + _Rows.apply(owner, *(linear.bias for linear in columns))
        inner = (self._activated(inner) * probs[:, None]).to(inner.dtype)
        output = _Product.apply(inner, ends, *(linear.weight for linear in rows))
        if owner is not None:
            output = (output + _Rows.apply(owner, *(linear.bias for linear in rows)) * probs[:, None]).to(output.dtype)
        return output, None

    def _activated(self, inner: torch.Tensor) -> torch.Tensor:
        """As megatron/core/transformer/mlp.py:MLP.forward without fused kernels."""
        config: Any = self.config
        if not config.gated_linear_unit:
            return config.activation_func(inner)
        gate, linear = inner.chunk(2, dim=-1)
        if (limit := config.activation_func_clamp_value) is not None:
            gate, linear = gate.clamp(max=limit), linear.clamp(min=-limit, max=limit)
        return config.activation_func(gate) * (linear + config.glu_linear_offset)

    def _linears(self) -> tuple[list[Any], list[Any]]:
        """The first and the second projections of all experts."""
        experts: Any = self.local_experts
        return [expert.linear_fc1 for expert in experts], [expert.linear_fc2 for expert in experts]


def _fits(linears: list[Any], hidden: torch.Tensor) -> bool:
    """Whether one product can take the place of these projections: a hook is an adapter; a GPU wants 16 bytes aligned."""
    aligned = all(size * hidden.element_size() % 16 == 0 for size in linears[0].weight.shape)
    plain = all(type(linear) in PLAIN and not linear._forward_hooks for linear in linears)
    return len(linears) > 1 and hidden.shape[0] > 0 and plain and (aligned or not hidden.is_cuda)


@torch.no_grad()
def _lay_together(weights: list[torch.nn.Parameter]) -> None:
    """Makes the weights views of one tensor, which `_together` then finds. A distributed optimizer moves them again."""
    for weight, place in zip(weights, torch.stack(list(weights)), strict=True):
        weight.data = place


def _together(weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[experts, out, in]: no copy where the weights lie behind one another."""
    first = weights[0]
    start, size = first.data_ptr(), first.numel() * first.element_size()
    if all(weight.data_ptr() == start + number * size and weight.is_contiguous() for number, weight in enumerate(weights)):
        if len(weights) * size <= first.untyped_storage().nbytes() - first.storage_offset() * first.element_size():
            return first.as_strided((len(weights), *first.shape), (first.numel(), *first.stride()))
    return torch.stack(weights)


class _Product(torch.autograd.Function):
    """tokens [T, in] and each group's weight [out, in] -> [T, out]. Kept are the tokens; weights are laid together again."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, ends: Any, *weights: Any) -> Any:
        ctx.save_for_backward(hidden if any(ctx.needs_input_grad[2:]) else None, ends, *weights)
        return F.grouped_mm(hidden, _together(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        hidden, ends, *weights = ctx.saved_tensors
        grad, grad_hidden = grad.contiguous(), None
        if ctx.needs_input_grad[0]:
            grad_hidden = F.grouped_mm(grad, _together(tuple(weights)), offs=ends)
        grad_weights: Any = [None] * len(weights)
        if hidden is not None:
            grad_weights = F.grouped_mm(grad.T, hidden, offs=ends).unbind(0)
        return (
            grad_hidden,
            None,
            *(g if needed else None for g, needed in zip(grad_weights, ctx.needs_input_grad[2:], strict=True)),
        )


class _Rows(torch.autograd.Function):
    """The bias of each token's expert: owner [T] int64, biases E x [out] -> [T, out]. Gradients are added up in fp32."""

    @staticmethod
    def forward(ctx: Any, owner: Any, *biases: Any) -> Any:
        ctx.save_for_backward(owner)
        ctx.count = len(biases)
        return torch.stack(biases)[owner]

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (owner,) = ctx.saved_tensors
        sums = torch.zeros(ctx.count, grad.shape[1], dtype=torch.float32, device=grad.device)
        return None, *sums.index_add_(0, owner, grad.float()).to(grad.dtype).unbind(0)
