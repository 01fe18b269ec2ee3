"""From per-token losses to what megatron-core's schedule and the log need.

The loss of a step is the sum over its trained tokens divided by their number, over micro-batches, data parallel and
context parallel. The schedule adds up the numerators and counts; finalize_model_grads divides the gradient once.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_sft.core_compat import moved
from megatron_sft.data.loader import Batch


def document_losses(
    token_loss: torch.Tensor, loss_mask: torch.Tensor, document_of_token: torch.Tensor, count: int
) -> torch.Tensor:
    """Loss sum, trained tokens and tokens of every document of a micro-batch (of this context-parallel rank's part).

    Args:
        token_loss: [1, tokens] float32, weighted by the mask.
        loss_mask: [1, tokens] float32; above 0 where a token is trained.
        document_of_token: [tokens] int64, index of the document in the micro-batch.
        count: documents in the micro-batch.

    Returns:
        [count, 3] float64: (loss sum, trained tokens, tokens). float64 so that the order of addition does not show.
    """
    sums = torch.zeros(count, 3, dtype=torch.float64, device=token_loss.device)
    trained = (loss_mask[0] > 0).double()
    values = torch.stack([token_loss.detach()[0].double(), trained, torch.ones_like(trained)], dim=1)
    return sums.index_add_(0, document_of_token, values)


def step_loss(token_loss: torch.Tensor, loss_mask: torch.Tensor, documents: torch.Tensor) -> tuple:
    """The triple that megatron-core's schedule wants of a loss function with calculate_per_token_loss.

    Returns:
        (loss sum with gradient, number of trained tokens as int32, {"documents": document_losses(...)}).
    """
    num_tokens = (loss_mask > 0).sum().to(torch.int32)
    return token_loss.sum(), num_tokens, {"documents": documents}


@dataclass(frozen=True)
class LossTotals:
    """Loss sums and token counts of a step (or a validation) over all ranks, per source.

    `by_source` is [sources, 3] float64: (loss sum, trained tokens, tokens without padding).
    """

    by_source: np.ndarray

    @property
    def trained_tokens(self) -> int:
        return int(self.by_source[:, 1].sum())

    @property
    def tokens(self) -> int:
        return int(self.by_source[:, 2].sum())

    @property
    def loss(self) -> float:
        """Mean over the trained tokens; 0 when there is none."""
        total, tokens = self.by_source.sum(axis=0)[:2]
        return float(total / tokens) if tokens else 0.0

    def source_loss(self, source: int) -> float | None:
        """Mean over the trained tokens of one source; None when the step has none of it."""
        total, tokens = self.by_source[source][:2]
        return float(total / tokens) if tokens else None


def summed_totals(reports: list[dict], batches: list[Batch], num_sources: int, device: torch.device) -> torch.Tensor:
    """Adds up the reports of a step over micro-batches, data parallel, context parallel and pipeline stages.

    Args:
        reports: what step_loss returned for each micro-batch; empty except on the last pipeline stage.
        batches: this rank's micro-batches, in the same order.
        num_sources: sources of the data set.
        device: where the collectives run; it is not waited for.

    Returns:
        [num_sources, 3] float64 on the device: LossTotals.by_source.
    """
    from megatron.core import parallel_state as ps

    totals = torch.zeros(num_sources + 1, 3, dtype=torch.float64, device=device)
    for report, batch in zip(reports, batches, strict=False):
        is_padding = torch.as_tensor(np.asarray(batch.document_ids) < 0)  # padding is a document of id -1: the last row's
        rows = batch.source_ids.long().masked_fill(is_padding, num_sources)
        totals.index_add_(0, moved(rows), report["documents"][: len(rows)])  # a lengthened batch ends with one more padding
    totals = totals[:num_sources].contiguous()
    dist.all_reduce(totals, group=ps.get_data_parallel_group(with_context_parallel=True))
    if ps.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(totals, src=ps.get_pipeline_model_parallel_last_rank(), group=ps.get_pipeline_model_parallel_group())
    return totals
