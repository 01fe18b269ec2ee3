"""A gradient that is not finite while the loss is: every rank raises the same error with rank, rows and parameters."""

from typing import Any

import numpy as np
import torch

from megatron_sft.config.run import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sft.errors import TrainingError
from tests.gloo import run_ranks

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=32,
    padded_vocab_size=32,
    max_position_embeddings=32,
)
MARKER = 31
"""The token that only document 5 has; rank 1 meets it."""


def train_until_nan(parallel: ParallelConfig, ranks: Any) -> str:
    """The message of the error that this rank raises when the gradient of MARKER's embedding is made NaN."""
    from megatron_sft.data.loader import TrainLoader
    from megatron_sft.data.packing import pack
    from megatron_sft.data.sft_dataset import SFTDataset
    from megatron_sft.data.store import MemoryStore
    from megatron_sft.model.build import build_model
    from megatron_sft.train.optim import build_optimizer, wrap_ddp
    from megatron_sft.train.step import train_step

    documents = [(np.full(8, number, dtype=np.int32), np.ones(8, dtype=np.uint8)) for number in range(8)]
    documents[5][0][3] = MARKER
    run = RunConfig(model=MODEL, parallel=parallel, optim=OptimConfig(), train=TrainConfig(global_batch_size=8, train_iters=1))
    dataset = SFTDataset(MemoryStore(documents), pack(np.full(8, 8), 8, "none"), 8, 0)
    loader = TrainLoader(dataset, run.train, shuffle=False, dp_rank=ranks.dp_rank, dp_size=ranks.dp_size, prefetch=0)
    chunks = build_model(MODEL, parallel, run.train)
    for parameter in chunks[0].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    wrapped = wrap_ddp(chunks, parallel)

    def plant(module: Any, inputs: tuple, output: torch.Tensor) -> None:
        if (inputs[0] == MARKER).any():
            output.register_hook(lambda gradient: gradient * float("nan"))

    chunks[0].embedding.word_embeddings.register_forward_hook(plant)
    optimizer = build_optimizer(wrapped, run)
    step = next(iter(loader))
    try:
        train_step(wrapped, optimizer, step.micro_batches, 1, lambda document: f"rows.jsonl:{document + 1}", iteration=1)
    except TrainingError as error:
        return str(error)
    return ""


def test_the_error_names_rank_row_and_parameter_with_and_without_overlap():
    messages = run_ranks(both, 2)
    begin = "iteration 1: loss or gradient is not finite; the loss is finite, the gradient is not: rank 1, "
    named = "micro-batch 3 (rows.jsonl:6), embedding.word_embeddings.weight. Expected finite numbers."
    assert messages[0] == messages[1]
    for message in messages[0]:
        assert message.startswith(begin + named)


def both() -> list[str]:
    """Both kinds of gradient reduction, in one launch."""
    from megatron_sft.parallel import finalize, initialize

    ranks = initialize(ParallelConfig(), 1)
    overlapped = ParallelConfig(overlap_grad_reduce=True, use_distributed_optimizer=True)
    messages = [train_until_nan(layout, ranks) for layout in (ParallelConfig(), overlapped)]
    finalize()
    return messages
