"""Held-out validation: mean loss per trained token, in all and per source."""

from typing import Any

import numpy as np
import torch

from megatron_sft.core_compat import device
from megatron_sft.data.loader import ValidLoader
from megatron_sft.train.loss import LossTotals, summed_totals
from megatron_sft.train.step import run_schedule


@torch.no_grad()
def evaluate(chunks: list[Any], loader: ValidLoader) -> LossTotals:
    """Runs the held-out steps forward and adds up token sums, so that every token weighs the same.

    Args:
        chunks: the model, in DDP or not; set back to training mode afterwards.
        loader: the held-out steps, the same number on every rank; its store may have other sources than training.
    """
    num_sources = len(loader.dataset.store.source_names)
    for chunk in chunks:
        chunk.eval()
    by_source = np.zeros((num_sources, 3))
    for step in loader:
        reports = run_schedule(chunks, step.micro_batches, forward_only=True)
        by_source = by_source + summed_totals(reports, step.micro_batches, num_sources, device()).cpu().numpy()
    for chunk in chunks:
        chunk.train()
    return LossTotals(by_source)
