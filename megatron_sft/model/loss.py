"""Language-model head and cross-entropy in one, by blocks of the vocabulary: full logits never exist.

Tokens that are not trained are left out before the head, so a masked prompt costs no FLOP there. Logits are formed twice,
for the softmax's denominator (online, arXiv 1805.02867) and for the gradient. A block of the vocabulary gives its rows of
the weight's gradient whole: nothing as large as the weight is added up block by block, as with blocks of tokens (Liger-
Kernel's fused linear cross-entropy, linkedin/Liger-Kernel src/liger_kernel/ops/fused_linear_cross_entropy.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_sft.kernels.loss import Scores, Slopes, add_block, block_gradient, greatest_of

BLOCK_LOGITS = 16 * 1024 * 1024
"""Elements of one block's logits: 32 MB in bf16, 64 MB in fp32."""
BLOCKS = 32
"""The vocabulary has at most so many blocks: each one reads all hidden states and adds to their gradient."""
ALIGNED_ROWS = 256
"""Rows of a block are a multiple, except of the last one: matrix products of unaligned widths miss a GPU's fast kernels."""

EAFT_TOP = 20
"""Logits that EAFT's entropy is taken over."""


@dataclass(frozen=True)
class TokenLoss:
    """What a trained token costs. With s its logits over a vocabulary of V ids, y its label, p = softmax(s), lse = log sum exp s:

        cost = w * ((1 - e) * (lse - s_y) + e * (lse - mean s)) + z * lse^2

    sft:  w = 1, cross-entropy.
    dft:  w = p_y, without gradient: dynamic fine-tuning, which takes the 1 / p_y out of cross-entropy's gradient (Wu et al.,
          arXiv 2508.05629, equation 9).
    eaft: w = H(q) / ln k, without gradient, q the softmax of the k = min(20, V) greatest logits: tokens that the model is sure
          of weigh little (entropy-adaptive fine-tuning, arXiv 2601.02151).
    e:    label smoothing with a uniform distribution over V (Szegedy et al., arXiv 1512.00567, section 7).
    z:    keeps the softmax's denominator near 1 (PaLM, arXiv 2204.02311, section 5; 1e-4 there).
    """

    kind: str = "sft"
    """sft, dft or eaft."""
    label_smoothing: float = 0.0
    """e."""
    z_loss: float = 0.0
    """z."""

    def costs(self, scores: Scores, denominator: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, Slopes]:
        """[trained tokens] float32, and what their gradient is made of."""
        cross = denominator - scores.label
        if self == CROSS_ENTROPY:
            return cross, Slopes(None, None, None)
        weight, share = self._weights(scores, denominator), self.label_smoothing
        smooth = (1 - share) * cross
        if scores.total is not None:
            smooth += share * (denominator - scores.total / vocab_size)
        cost = weight * smooth + self.z_loss * denominator.square()
        on_all = weight * (share / vocab_size) if share else None
        return cost, Slopes(weight + 2 * self.z_loss * denominator, weight * (1 - share), on_all)

    def _weights(self, scores: Scores, denominator: torch.Tensor) -> torch.Tensor:
        if self.kind == "dft":
            return (scores.label - denominator).exp()
        if scores.top is None:
            return torch.ones_like(denominator)
        log_q = scores.top.log_softmax(dim=1)
        return (-(log_q.exp() * log_q).sum(dim=1) / math.log(scores.top.shape[1])).clamp_(min=0.0)


CROSS_ENTROPY = TokenLoss()


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    softcap: float | None = None,
    token_loss: TokenLoss = CROSS_ENTROPY,
    trained: torch.Tensor | None = None,
    triton: bool = False,
) -> torch.Tensor:
    """Per-token costs of labels under softmax(hidden @ weight.T).

    Args:
        hidden: [tokens, hidden], the same on every rank of `group`.
        weight: [rows, hidden], this rank's rows of the output embedding (vocabulary parallel).
        labels: [tokens] int64, ids over the whole vocabulary.
        loss_mask: [tokens] float32; tokens at 0 are skipped.
        vocab_size: ids from here on are padding of the table and get no probability.
        group: tensor-parallel group; None: one rank has all rows.
        softcap: logits become softcap * tanh(logit / softcap) (Gemma 2).
        token_loss: what a token costs; cross-entropy unless said otherwise.
        trained: [n] int64, where loss_mask is not 0; None: it is looked for, and the device is waited for.
        triton: logits go through one kernel, not through torch's operations.

    Returns:
        [tokens] float32; 0 where loss_mask is 0. Not multiplied by the mask's weights.
    """
    if trained is None:
        trained = loss_mask.nonzero(as_tuple=True)[0]
    return _LinearCrossEntropy.apply(hidden, weight, labels, trained, vocab_size, group, softcap, token_loss, triton)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward keeps the log of the softmax's denominator per token; backward forms each block's logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Any,
        weight: Any,
        labels: Any,
        index: Any,
        vocab_size: int,
        group: Any,
        softcap: float | None,
        token_loss: TokenLoss,
        triton: bool,
    ) -> Any:
        rank, rows = (dist.get_rank(group) if group is not None else 0), weight.shape[0]
        ctx.first_row, ctx.valid_rows = rank * rows, max(0, min(rows, vocab_size - rank * rows))
        ctx.softcap, ctx.triton = softcap, triton
        chosen, targets = hidden.index_select(0, index), labels.index_select(0, index)
        peak = torch.full((len(index),), -torch.inf, device=hidden.device)
        nothing = torch.zeros_like(peak)
        scores = Scores(peak, nothing.clone(), nothing.clone(), nothing if token_loss.label_smoothing else None, None)
        if token_loss.kind == "eaft":
            scores.top = peak[:, None].expand(-1, min(EAFT_TOP, vocab_size)).clone()
        for first, last in _blocks(ctx.valid_rows, len(index)):
            add_block(scores, chosen @ weight[first:last].T, targets - (ctx.first_row + first), softcap, triton)
        if group is not None and dist.get_world_size(group) > 1:
            _over_ranks(scores, group)
        denominator = scores.denominator()
        cost, slopes = token_loss.costs(scores, denominator, vocab_size)
        costs = torch.zeros(labels.shape[0], dtype=torch.float32, device=hidden.device)
        costs[index] = cost
        ctx.save_for_backward(hidden, weight, index, targets, denominator, slopes.on_probability, slopes.on_label, slopes.on_all)
        return costs

    @staticmethod
    def backward(ctx: Any, grad_loss: Any) -> Any:
        hidden, weight, index, targets, denominator, *slopes = ctx.saved_tensors
        chosen, scale = hidden.index_select(0, index), grad_loss.index_select(0, index)
        grad_chosen = torch.zeros_like(chosen, dtype=torch.float32)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_weight is not None:
            grad_weight[ctx.valid_rows :] = 0
        for first, last in _blocks(ctx.valid_rows, len(index)):
            rows = weight[first:last]
            places = targets - (ctx.first_row + first), ctx.softcap, denominator, scale
            grad_logits = block_gradient(chosen @ rows.T, *places, Slopes(*slopes), ctx.triton)
            grad_chosen += grad_logits @ rows
            if grad_weight is not None:
                torch.mm(grad_logits.T, chosen, out=grad_weight[first:last])
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, index, grad_chosen.to(hidden.dtype))
        return grad_hidden, grad_weight, *[None] * 7


def _over_ranks(scores: Scores, group: dist.ProcessGroup) -> None:
    """Makes the scores of a rank's rows those of the whole vocabulary."""
    own = scores.peak.clone()
    dist.all_reduce(scores.peak, op=dist.ReduceOp.MAX, group=group)
    exponentials = scores.exponentials * (own - scores.peak).exp_()
    sums = torch.stack((exponentials, scores.label, *([] if scores.total is None else [scores.total])))
    dist.all_reduce(sums, group=group)
    scores.exponentials, scores.label = sums[0], sums[1]
    scores.total = None if scores.total is None else sums[2]
    if scores.top is not None:
        parts = [torch.empty_like(scores.top) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, scores.top.contiguous(), group=group)
        scores.top = greatest_of(parts, scores.top.shape[1])


def block_rows(rows: int, tokens: int) -> int:
    """Rows of the vocabulary whose logits for all trained tokens exist at a time: 151936, 16384 tokens -> 4748 -> 4864."""
    wanted = max(1, BLOCK_LOGITS // max(tokens, 1), -(-rows // BLOCKS))
    return -(-wanted // ALIGNED_ROWS) * ALIGNED_ROWS


def _blocks(rows: int, tokens: int) -> Iterator[tuple[int, int]]:
    """First and last row (not included) of each block: 10 rows, 4 per block -> (0, 4), (4, 8), (8, 10)."""
    size = block_rows(rows, tokens)
    return ((first, min(first + size, rows)) for first in range(0, rows, size))
