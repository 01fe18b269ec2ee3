"""Joining the other processes."""

import pytest
import torch

from megatron_sft.config.run import ParallelConfig
from megatron_sft.errors import ConfigError
from megatron_sft.parallel import initialize


@pytest.mark.skipif(torch.cuda.is_available(), reason="nccl works with a device")
def test_nccl_without_a_device_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="--distributed-backend nccl: there is no CUDA device"):
        initialize(ParallelConfig(distributed_backend="nccl"), 1)
