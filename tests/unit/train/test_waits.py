"""How often a step waits for its device: where a tensor of it is asked for its numbers, or for how many of them there are."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_sft import parallel
from megatron_sft.config.run import ParallelConfig, RunConfig, TrainConfig
from megatron_sft.data.loader import TrainLoader
from megatron_sft.train.loop import StopRequest
from megatron_sft.train.step import train_step
from tests.gpu.training import MODEL, Training

ASKS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__"}
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32, "moe_router_topk": 2, "moe_router_load_balancing_type": "aux_loss"}
EXPERTS |= {"moe_aux_loss_coeff": 0.01, "moe_router_dtype": "fp32"}
MODELS = {"dense": MODEL, "experts": MODEL.with_core(EXPERTS)}


class Waits(TorchFunctionMode):
    """What tensors are asked for within it; those of a micro-batch are on the host and cost nothing."""

    def __init__(self, batches):
        super().__init__()
        tensors = [value for batch in batches for value in vars(batch).values() if hasattr(value, "data_ptr")]
        self.hosts = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ASKS and args[0].untyped_storage().data_ptr() not in self.hosts:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def ranks():
    yield parallel.initialize(ParallelConfig(), 1)
    parallel.finalize()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_waits_once_for_its_totals_and_norm(name, dtype, ranks):
    training = Training.fresh(dtype, ranks, model=MODELS[name], clip_grad=1.0)
    for number, step in zip((1, 2), TrainLoader(training.dataset, training.run.train), strict=False):
        with Waits(step.micro_batches) as waits:
            where = training.dataset.store.where
            result = train_step(training.chunks, training.optimizer, step.micro_batches, 1, where, iteration=number)
        assert len(step.micro_batches) == 2 and result.grad_norm > 0
        assert waits.found == ["tolist"]


def test_ranks_agree_to_stop_between_hosts(ranks):
    """Every tensor of it says that it is the host's: what does not say is on a device without numbers here."""
    stop = StopRequest(RunConfig(train=TrainConfig(exit_signal_handler=False, exit_interval=3)))
    with torch.device("meta"):
        assert stop.agreed(2, 5) == (0, 5) and stop.agreed(3, 7) == (-1, 7)
