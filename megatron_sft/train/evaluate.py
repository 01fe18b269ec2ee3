"""Held-out validation: mean loss per trained token and bits per byte, in all and per source."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megatron_sft.core_compat import device
from megatron_sft.data.loader import ValidLoader
from megatron_sft.data.text_bytes import trained_bytes
from megatron_sft.parallel import Ranks, gather
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


def valid_bytes(loader: ValidLoader, tokenizer: Any, ranks: Ranks) -> np.ndarray:
    """Collective: bytes of the text that a validation takes the loss of, by source. int64 [sources]"""
    mine = range(ranks.rank, loader.num_samples, ranks.world_size)
    return np.sum(gather(trained_bytes(loader.dataset, mine, tokenizer)), axis=0)


def bits_per_byte(totals: LossTotals, text_bytes: np.ndarray, names: list[str]) -> Mapping[str, float]:
    """valid/bits_per_byte, and that of each source when there are several; left out where there is no text.

    Args:
        totals: of a validation.
        text_bytes: as valid_bytes.
        names: of the sources.
    """
    nats, metrics = totals.by_source[:, 0], {}
    if text_bytes.sum():
        metrics["valid/bits_per_byte"] = float(nats.sum() / text_bytes.sum() / math.log(2))
    for name, mine, size in zip(names, nats, text_bytes, strict=True):
        if len(names) > 1 and size:
            metrics[f"valid/bits_per_byte/{name}"] = float(mine / size / math.log(2))
    return metrics
