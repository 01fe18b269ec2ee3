"""A step of which no token is trained is said, with its rows, and changes no weight."""

import logging

import numpy as np
import torch

from megatron_sft.config.run import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from tests.distributed.test_bad_gradient import MODEL
from tests.gloo import run_ranks


def untrained() -> tuple[list[str], bool]:
    from megatron_sft.data.loader import TrainLoader
    from megatron_sft.data.packing import pack
    from megatron_sft.data.sft_dataset import SFTDataset
    from megatron_sft.data.store import MemoryStore
    from megatron_sft.log import logger
    from megatron_sft.model.build import build_model
    from megatron_sft.parallel import finalize, initialize
    from megatron_sft.train.optim import build_optimizer, wrap_ddp
    from megatron_sft.train.step import train_step

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    ranks, parallel = initialize(ParallelConfig(), 1), ParallelConfig()
    run = RunConfig(model=MODEL, parallel=parallel, optim=OptimConfig(), train=TrainConfig(global_batch_size=2, train_iters=1))
    documents = [(np.full(8, number, dtype=np.int32), np.zeros(8, dtype=np.uint8)) for number in range(2)]
    dataset = SFTDataset(MemoryStore(documents), pack(np.full(2, 8), 8, "none"), 8, 0)
    loader = TrainLoader(dataset, run.train, shuffle=False, dp_rank=ranks.dp_rank, dp_size=ranks.dp_size, prefetch=0)
    chunks = build_model(MODEL, parallel, run.train)
    for parameter in chunks[0].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    wrapped = wrap_ddp(chunks, parallel)
    before = [parameter.detach().clone() for parameter in wrapped[0].parameters()]
    step = next(iter(loader))
    optimizer = build_optimizer(wrapped, run)
    result = train_step(wrapped, optimizer, step.micro_batches, 1, lambda document: f"rows.jsonl:{document + 1}", iteration=3)
    same = all(map(torch.equal, before, wrapped[0].parameters()))
    finalize()
    return said, same and result.grad_norm == 0.0


def test_a_step_without_a_trained_token_is_said_on_every_rank_and_changes_nothing() -> None:
    expected = "iteration 3: no token of its rows (rows.jsonl:1, rows.jsonl:2) is trained; expected some. Look at their masks."
    assert run_ranks(untrained, 2) == [([expected], True)] * 2
