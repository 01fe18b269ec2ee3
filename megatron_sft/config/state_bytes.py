"""Bytes a parameter of weights, gradients and optimizer states, and where they are. Not here: how many parameters (plan.py)."""

from typing import NamedTuple

from megatron_sft.config.groups import parameter_groups
from megatron_sft.config.run import RunConfig


class StateBytes(NamedTuple):
    """Bytes a parameter."""

    weights: int
    gradients: int
    states: float
    """Of the optimizer, on the device; a mean where a share of them is elsewhere."""
    host: float
    """Of the optimizer, in host memory."""


def adam_has_main_weights(run: RunConfig) -> bool:
    """Whether the fp32 weights of bf16 ones are a state of Adam's (train/adam.py), and not megatron-core's, on the device."""
    optim = run.optim
    if not run.parallel.use_distributed_optimizer or run.train.params_dtype != "bf16":
        return False
    is_adam = optim.optimizer == "adam" and all(group.optimizer == "adam" for group in parameter_groups(optim))
    return optim.use_precision_aware_optimizer or (optim.optimizer_cpu_offload and is_adam)


def state_bytes(run: RunConfig) -> StateBytes:
    """What a trained parameter takes (train/optim.py:build_optimizer); muon's as adam's."""
    optim, size = run.optim, {"fp32": 4, "bf16": 2}
    weights = size[run.train.params_dtype]
    plain = 4 if optim.optimizer == "sgd" else 8
    moments = size[optim.exp_avg_dtype] + size[optim.exp_avg_sq_dtype] if optim.use_precision_aware_optimizer else plain
    main = 4 if weights == 2 else 0
    share = optim.optimizer_offload_fraction if optim.optimizer_cpu_offload else 0.0
    host = share * (moments + (main if adam_has_main_weights(run) else 0))
    return StateBytes(weights, size[optim.main_grads_dtype], moments + main - host, host)
