"""Rows that are padded up to an alignment train as those that are not."""

import pytest
import torch

from megatron_sft import parallel
from megatron_sft.config.run import ParallelConfig
from megatron_sft.data.loader import TrainLoader, pack_alignment
from megatron_sft.train.step import train_step
from tests.gpu.training import Training
from tests.unit.train.test_waits import MODELS


@pytest.fixture(scope="module")
def ranks():
    yield parallel.initialize(ParallelConfig(), 1)
    parallel.finalize()


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_no_loss_and_no_gradient(name, ranks):
    """In fp32, to the order of additions; the balancing loss of experts too."""
    found = []
    for multiple in (1, pack_alignment("bf16", 1, 1)):
        training = Training.fresh("fp32", ranks, model=MODELS[name])
        step = next(iter(TrainLoader(training.dataset, training.run.train, multiple=multiple, prefetch=0)))
        assert [batch.tokens.shape[1] % multiple for batch in step.micro_batches] == [0, 0]
        totals = train_step(training.chunks, training.optimizer, step.micro_batches, 1, training.dataset.store.where).totals
        found.append((totals.loss, totals.tokens, training.gradients(), sum(b.tokens.shape[1] for b in step.micro_batches)))
    (loss, tokens, gradients, length), (padded_loss, padded_tokens, padded_gradients, padded_length) = found
    assert padded_length > length and padded_tokens == tokens
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(padded_gradients, gradients, rtol=1e-5, atol=1e-7)
