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

    def costs(self, scores: "_Scores", vocab_size: int) -> tuple[torch.Tensor, "_Slopes"]:
        """[trained tokens] float32, and what their gradient is made of."""
        cross = scores.denominator - scores.label
        if self == CROSS_ENTROPY:
            return cross, _Slopes(None, None, None)
        weight, share = self._weights(scores), self.label_smoothing
        smooth = (1 - share) * cross
        if scores.total is not None:
            smooth += share * (scores.denominator - scores.total / vocab_size)
        cost = weight * smooth + self.z_loss * scores.denominator.square()
        on_all = weight * (share / vocab_size) if share else None
        return cost, _Slopes(weight + 2 * self.z_loss * scores.denominator, weight * (1 - share), on_all)

    def _weights(self, scores: "_Scores") -> torch.Tensor:
        if self.kind == "dft":
            return (scores.label - scores.denominator).exp()
        if scores.top is None:
            return torch.ones_like(scores.denominator)
        log_q = scores.top.log_softmax(dim=1)
        return (-(log_q.exp() * log_q).sum(dim=1) / math.log(scores.top.shape[1])).clamp_(min=0.0)


CROSS_ENTROPY = TokenLoss()


@dataclass
class _Scores:
    """What the costs of n trained tokens are made of, added up over blocks of the vocabulary; float32."""

    denominator: torch.Tensor
    """[n] log of the softmax's denominator."""
    label: torch.Tensor
    """[n] logit of the label."""
    total: torch.Tensor | None
    """[n] sum of all logits; None where it is not asked for."""
    top: torch.Tensor | None
    """[n, k] greatest logits; None where they are not asked for."""


@dataclass(frozen=True)
class _Slopes:
    """A cost's gradient by the logits: on_probability * p - on_label where the label is - on_all; [n] each, None: 1, 1, 0."""

    on_probability: torch.Tensor | None
    on_label: torch.Tensor | None
    on_all: torch.Tensor | None


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

    Returns:
        [tokens] float32; 0 where loss_mask is 0. Not multiplied by the mask's weights.
    """
    if trained is None:
        trained = loss_mask.nonzero(as_tuple=True)[0]
    return _LinearCrossEntropy.apply(hidden, weight, labels, trained, vocab_size, group, softcap, token_loss)


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
    ) -> Any:
        rank, rows = (dist.get_rank(group) if group is not None else 0), weight.shape[0]
        ctx.first_row, ctx.valid_rows = rank * rows, max(0, min(rows, vocab_size - rank * rows))
        ctx.softcap = softcap
        chosen, targets = hidden.index_select(0, index), labels.index_select(0, index)
        peak = torch.full((len(index),), -torch.inf, device=hidden.device)
        total, score = torch.zeros_like(peak), torch.zeros_like(peak)
        scores = _Scores(peak, score, torch.zeros_like(peak) if token_loss.label_smoothing else None, None)
        if token_loss.kind == "eaft":
            scores.top = peak[:, None].expand(-1, min(EAFT_TOP, vocab_size))
        for first, last in _blocks(ctx.valid_rows, len(index)):
            logits = _logits(chosen, weight[first:last], softcap)
            here, column = _local_targets(targets, ctx.first_row + first, last - first)
            score += torch.where(here, logits.gather(1, column[:, None])[:, 0], 0.0)
            if scores.total is not None:
                scores.total += logits.sum(dim=1)
            if scores.top is not None:
                scores.top = _greatest([scores.top, logits], scores.top.shape[1])
            higher = torch.maximum(peak, logits.amax(dim=1))
            total = total * (peak - higher).exp_() + logits.sub_(higher[:, None]).exp_().sum(dim=1)
            peak = higher
        scores.label = score
        if group is not None and dist.get_world_size(group) > 1:
            peak, total = _over_ranks(peak, total, scores, group)
        scores.denominator = peak + total.log()
        cost, slopes = token_loss.costs(scores, vocab_size)
        costs = torch.zeros(labels.shape[0], dtype=torch.float32, device=hidden.device)
        costs[index] = cost
        ctx.save_for_backward(
            hidden, weight, index, targets, scores.denominator, slopes.on_probability, slopes.on_label, slopes.on_all
        )
        return costs

    @staticmethod
    def backward(ctx: Any, grad_loss: Any) -> Any:
        hidden, weight, index, targets, denominator, *slopes = ctx.saved_tensors
        on_probability, on_label, on_all = (slope if slope is None else slope[:, None] for slope in slopes)
        chosen, scale = hidden.index_select(0, index), grad_loss.index_select(0, index)
        grad_chosen = torch.zeros_like(chosen, dtype=torch.float32)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_weight is not None:
            grad_weight[ctx.valid_rows :] = 0
        for first, last in _blocks(ctx.valid_rows, len(index)):
            rows = weight[first:last]
            logits = _logits(chosen, rows, ctx.softcap)
            slope = 1 - (logits / ctx.softcap).square_() if ctx.softcap is not None else None
            grad_logits = logits.sub_(denominator[:, None]).exp_()
            if on_probability is not None:
                grad_logits.mul_(on_probability)
            if on_all is not None:
                grad_logits.sub_(on_all)
            here, column = _local_targets(targets, ctx.first_row + first, last - first)
            less = here[:, None].to(grad_logits.dtype)
            grad_logits.scatter_add_(1, column[:, None], -less if on_label is None else -less * on_label)
            grad_logits = grad_logits.mul_(scale[:, None])
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(weight.dtype)
            grad_chosen += grad_logits @ rows
            if grad_weight is not None:
                torch.mm(grad_logits.T, chosen, out=grad_weight[first:last])
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, index, grad_chosen.to(hidden.dtype))
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _over_ranks(
    peak: torch.Tensor, total: torch.Tensor, scores: _Scores, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """(peak, total) of the whole vocabulary; what else is in `scores` becomes the whole vocabulary's too."""
    own = peak.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack((total * (own - peak).exp_(), scores.label, *([] if scores.total is None else [scores.total])))
    dist.all_reduce(sums, group=group)
    total, scores.label = sums[0], sums[1]
    scores.total = None if scores.total is None else sums[2]
    if scores.top is not None:
        parts = [torch.empty_like(scores.top) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, scores.top.contiguous(), group=group)
        scores.top = _greatest(parts, scores.top.shape[1])
    return peak, total


def _greatest(parts: list[torch.Tensor], count: int) -> torch.Tensor:
    """The greatest of a row's elements over all parts, in order: [n, count]."""
    return torch.cat([part.topk(min(count, part.shape[1]), dim=1).values for part in parts], dim=1).topk(count, dim=1).values


def block_rows(rows: int, tokens: int) -> int:
    """Rows of the vocabulary whose logits for all trained tokens exist at a time: 151936, 16384 tokens -> 4748 -> 4864."""
    wanted = max(1, BLOCK_LOGITS // max(tokens, 1), -(-rows // BLOCKS))
    return -(-wanted // ALIGNED_ROWS) * ALIGNED_ROWS


def _blocks(rows: int, tokens: int) -> Iterator[tuple[int, int]]:
    """First and last row (not included) of each block: 10 rows, 4 per block -> (0, 4), (4, 8), (8, 10)."""
    size = block_rows(rows, tokens)
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
