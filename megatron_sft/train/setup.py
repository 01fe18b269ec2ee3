"""From a RunConfig to a Job that can be trained: architecture, data, model, weights, optimizer, in this order.

Cheap checks come first: every contradiction in the configuration is found before a row is read, and every bad row
before a weight is.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sft.checkpoint.distributed import CheckpointSaver, load_checkpoint
from megatron_sft.checkpoint.hf import load_hf_weights, save_hf
from megatron_sft.checkpoint.source import WeightSource
from megatron_sft.config import RunConfig
from megatron_sft.data.chat import load_tokenizer
from megatron_sft.data.loader import TrainLoader, ValidLoader
from megatron_sft.data.packing import pack
from megatron_sft.data.sft_dataset import SFTDataset, pad_token_id_of
from megatron_sft.data.store import DocumentStore
from megatron_sft.log import logger
from megatron_sft.model.build import build_model
from megatron_sft.parallel import Ranks
from megatron_sft.train.loop import Job
from megatron_sft.train.optim import build_optimizer, build_scheduler, schedule_lengths, wrap_ddp
from megatron_sft.train.state import TrainState


def finetune(run: RunConfig, explicit: frozenset[str]) -> int:
    """Runs one training from flags to the last checkpoint, on every rank.

    Args:
        run: resolved flags; its model holds what flags alone say.
        explicit: fields of run.model that a flag set.

    Returns:
        The process's exit status: 0 at the end of training, 128 + n after signal n, 4 after --exit-duration-in-mins.

    Raises:
        UserError: anything that the user can mend; the message says what.
    """
    source = find_source(run.checkpoint)
    run = with_model(run, explicit, source)
    ranks = parallel.initialize(run.parallel, run.train.seed)
    data = build_data(run, ranks)
    job, state = build_job(run, ranks, source, data)
    state, stopped = train(job, state)
    if stopped:
        return 128 + stopped if stopped > 0 else EXIT_DURATION
    if run.checkpoint.save_hf:
        save_hf(job.chunks, run.model, run.checkpoint.save_hf, ranks, run.data.tokenizer_model)
        logger.info("wrote the HF folder %s", run.checkpoint.save_hf)
    parallel.finalize()
    return 0
