"""Language-model head and cross-entropy in one, by chunks of the vocabulary: full logits never exist.

Tokens that are not trained are left out before the head, so a masked prompt costs no FLOP there. Logits are formed twice,
for the softmax's denominator (online, arXiv 1805.02867) and for the gradient. A chunk of the vocabulary gives its rows of
the weight's gradient whole: nothing as large as the weight is added up chunk by chunk, as with chunks of tokens (Liger-
Kernel's fused linear cross-entropy, linkedin/Liger-Kernel src/liger_kernel/ops/fused_linear_cross_entropy.py).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

CHUNK_LOGITS = 16 * 1024 * 1024
"""Elements of one chunk's logits: 32 MB in bf16, 64 MB in fp32."""
CHUNKS = 32
"""The vocabulary has at most so many chunks: each one reads all hidden states and adds to their gradient."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Per-token cross-entropy of labels under softmax(hidden @ weight.T).

    Args:
        hidden: [tokens, hidden], the same on every rank of `group`.
        weight: [rows, hidden], this rank's rows of the output embedding (vocabulary parallel).
        labels: [tokens] int64, ids over the whole vocabulary.
        loss_mask: [tokens] float32; tokens at 0 are skipped.
        vocab_size: ids from here on are padding of the table and get no probability.
        group: tensor-parallel group; None: one rank has all rows.
        softcap: logits become softcap * tanh(logit / softcap) (Gemma 2).

    Returns:
        [tokens] float32; 0 where loss_mask is 0. Not multiplied by the mask's weights.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, loss_mask, vocab_size, group, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward keeps the log of the softmax's denominator a token; backward forms each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Any,
        weight: Any,
        labels: Any,
        loss_mask: Any,
        vocab_size: int,
        group: Any,
        softcap: float | None,
    ) -> Any:
        rank, rows = (dist.get_rank(group) if group is not None else 0), weight.shape[0]
        ctx.first_row, ctx.valid_rows = rank * rows, max(0, min(rows, vocab_size - rank * rows))
        ctx.softcap = softcap
        index = loss_mask.nonzero(as_tuple=True)[0]
        chosen, targets = hidden.index_select(0, index), labels.index_select(0, index)
        peak = torch.full((len(index),), -torch.inf, device=hidden.device)
        total, score = torch.zeros_like(peak), torch.zeros_like(peak)
        for first, last in _chunks(ctx.valid_rows, len(index)):
            logits = _logits(chosen, weight[first:last], softcap)
            here, column = _local_targets(targets, ctx.first_row + first, last - first)
            score += torch.where(here, logits.gather(1, column[:, None])[:, 0], 0.0)
            higher = torch.maximum(peak, logits.amax(dim=1))
            total = total * (peak - higher).exp_() + logits.sub_(higher[:, None]).exp_().sum(dim=1)
            peak = higher
        if group is not None and dist.get_world_size(group) > 1:
            own = peak.clone()
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack((total * (own - peak).exp_(), score))
            dist.all_reduce(sums, group=group)
            total, score = sums
        denominator = peak + total.log()
        token_loss = torch.zeros(labels.shape[0], dtype=torch.float32, device=hidden.device)
        token_loss[index] = denominator - score
        ctx.save_for_backward(hidden, weight, index, targets, denominator)
        return token_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Any) -> Any:
        hidden, weight, index, targets, denominator = ctx.saved_tensors
        chosen, scale = hidden.index_select(0, index), grad_loss.index_select(0, index)
        grad_chosen = torch.zeros_like(chosen, dtype=torch.float32)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_weight is not None:
            grad_weight[ctx.valid_rows :] = 0
        for first, last in _chunks(ctx.valid_rows, len(index)):
            rows = weight[first:last]
            logits = _logits(chosen, rows, ctx.softcap)
            slope = 1 - (logits / ctx.softcap).square_() if ctx.softcap is not None else None
            grad_logits = logits.sub_(denominator[:, None]).exp_()
            here, column = _local_targets(targets, ctx.first_row + first, last - first)
            grad_logits.scatter_add_(1, column[:, None], -here[:, None].to(grad_logits.dtype))
            grad_logits = grad_logits.mul_(scale[:, None])
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(weight.dtype)
            grad_chosen += grad_logits @ rows
            if grad_weight is not None:
                torch.mm(grad_logits.T, chosen, out=grad_weight[first:last])
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, index, grad_chosen.to(hidden.dtype))
        return grad_hidden, grad_weight, None, None, None, None, None


def chunk_rows(rows: int, tokens: int) -> int:
    """Rows of the vocabulary whose logits for all trained tokens exist at a time."""
    return max(1, CHUNK_LOGITS // max(tokens, 1), -(-rows // CHUNKS))


def _chunks(rows: int, tokens: int) -> Iterator[tuple[int, int]]:
    """First and last row (not included) of each chunk: 10 rows, 4 a chunk -> (0, 4), (4, 8), (8, 10)."""
    size = chunk_rows(rows, tokens)
    return ((first, min(first + size, rows)) for first in range(0, rows, size))


def _logits(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """[tokens, rows] float32."""
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _local_targets(target: torch.Tensor, first_row: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets are among `rows` rows, and the row: ids 5, 9 on rows 8..15 -> (False, True), (0, 1)."""
    here = (target >= first_row) & (target < first_row + rows)
    return here, torch.where(here, target - first_row, 0)
