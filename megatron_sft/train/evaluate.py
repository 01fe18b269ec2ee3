"""Held-out validation: mean loss per trained token, in all and per source."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from megatron_sft.core_compat import device
from megatron_sft.data.loader import Step
from megatron_sft.train.loss import LossTotals, reduce_totals
from megatron_sft.train.step import run_schedule


@torch.no_grad()
def evaluate(chunks: list[Any], steps: Iterable[Step], num_sources: int) -> LossTotals:
    """Runs the held-out steps forward and adds up token sums, so that every token weighs the same.

    Args:
        chunks: the model, in DDP or not; set back to training mode afterwards.
        steps: the same number on every rank.
        num_sources: sources of the held-out data.
    """
    for chunk in chunks:
        chunk.eval()
    by_source = np.zeros((num_sources, 4))
    for step in steps:
        reports = run_schedule(chunks, step.micro_batches, forward_only=True)
        by_source = by_source + reduce_totals(reports, step.micro_batches, num_sources, device()).by_source
    for chunk in chunks:
        chunk.train()
    return LossTotals(by_source)
