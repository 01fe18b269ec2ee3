"""Language-model head and cross-entropy in one, by chunks of tokens: full logits never exist.

Tokens that are not trained are left out before the head, so a masked prompt costs no FLOP there. Gradients with
respect to the logits are formed in the backward pass, chunk by chunk (the idea of Liger-Kernel's fused linear
cross-entropy, linkedin/Liger-Kernel src/liger_kernel/ops/fused_linear_cross_entropy.py; the code is our own).
"""

from typing import Any

import torch
import torch.distributed as dist

CHUNK_LOGITS = 32 * 1024 * 1024
"""Elements of one chunk's logits: 64 MB in bf16, 128 MB in fp32."""
CHUNKS = 20
"""A row has at most so many chunks: each one reads the head's weight and adds to its whole gradient, which for a GPU and
a long row costs more than the matrix products. 16,384 tokens and 151,936 ids: 820 tokens a chunk in place of 220."""


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
        ctx.group = group if group is not None and dist.get_world_size(group) > 1 else None
        index = loss_mask.nonzero(as_tuple=True)[0]
        chosen, targets = hidden.index_select(0, index), labels.index_select(0, index)
        losses, denominators = [], []
        size = _chunk_tokens(rows, len(index))
        for part, target in zip(chosen.split(size), targets.split(size), strict=True):
            logits = _logits(part, weight, ctx.valid_rows, softcap)
            peak = logits.amax(dim=1)
            _all_reduce(peak, dist.ReduceOp.MAX, ctx.group)
            total = (logits - peak[:, None]).exp_().sum(dim=1)
            _all_reduce(total, dist.ReduceOp.SUM, ctx.group)
            here, column = _local_targets(target, ctx.first_row, ctx.valid_rows)
            score = torch.where(here, logits.gather(1, column[:, None])[:, 0], 0.0)
            _all_reduce(score, dist.ReduceOp.SUM, ctx.group)
            denominators.append(peak + total.log())
            losses.append(denominators[-1] - score)
        token_loss = torch.zeros(labels.shape[0], dtype=torch.float32, device=hidden.device)
        if losses:
            token_loss[index] = torch.cat(losses)
        denominator = torch.cat(denominators) if denominators else token_loss[:0]
        ctx.save_for_backward(hidden, weight, index, targets, denominator)
        return token_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Any) -> Any:
        hidden, weight, index, targets, denominator = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        scale = grad_loss.index_select(0, index)
        size = _chunk_tokens(weight.shape[0], len(index))
        for first in range(0, len(index), size):
            part = slice(first, first + size)
            chosen = hidden.index_select(0, index[part])
            logits = _logits(chosen, weight, ctx.valid_rows, ctx.softcap)
            slope = 1 - (logits / ctx.softcap).square_() if ctx.softcap is not None else None
            grad_logits = logits.sub_(denominator[part, None]).exp_()
            here, column = _local_targets(targets[part], ctx.first_row, ctx.valid_rows)
            grad_logits.scatter_add_(1, column[:, None], -here[:, None].to(grad_logits.dtype))
            grad_logits = grad_logits.mul_(scale[part, None])
            if slope is not None:
                grad_logits[:, : ctx.valid_rows] *= slope[:, : ctx.valid_rows]
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden.index_copy_(0, index[part], grad_logits @ weight)
            grad_weight += grad_logits.T @ chosen
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _chunk_tokens(rows: int, tokens: int) -> int:
    return max(1, CHUNK_LOGITS // rows, -(-tokens // CHUNKS))


def _logits(hidden: torch.Tensor, weight: torch.Tensor, valid_rows: int, softcap: float | None) -> torch.Tensor:
    """[tokens, rows] float32; rows of the padded table get -inf."""
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if valid_rows < weight.shape[0]:
        logits[:, valid_rows:] = -torch.inf
    return logits


def _local_targets(target: torch.Tensor, first_row: int, valid_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets this rank has a row of, and the row: ids 5, 9 on rows 8..15 -> (False, True), (0, 1)."""
    here = (target >= first_row) & (target < first_row + valid_rows)
    return here, torch.where(here, target - first_row, 0)


def _all_reduce(tensor: torch.Tensor, operation: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.all_reduce(tensor, op=operation, group=group)
