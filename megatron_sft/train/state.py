"""How far a run is, and how long it will be. Pure integers: everything else follows from them and the flags."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sft.config import TrainConfig


@dataclass(frozen=True)
class TrainState:
    """Progress of a run; saved in every checkpoint. A step makes a new one."""

    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Packs trained on; with the seed it fixes the position in the data."""
    tokens_seen: int = 0
    """Tokens trained or read as context, without padding."""
    trained_tokens: int = 0
    """Tokens that the loss was taken of."""

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainState":
        """Reads to_dict's form; other keys are left alone."""
        return cls(**{field.name: int(values[field.name]) for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class RunLength:
    """Length of the whole run in optimizer steps and in packs."""

    iterations: int
    samples: int


def run_length(train: TrainConfig, num_packs: int, global_batch_size: int) -> RunLength:
    """Resolves --train-iters, --train-samples or --num-epoch to steps and packs.

    A step never crosses the end of an epoch: the last one of an epoch is smaller, so an epoch has
    ceil(num_packs / global_batch_size) steps. Example: 10 packs, batches of 4: an epoch is steps of 4, 4 and 2;
    5 iterations are 18 packs, 12 samples are 4 iterations (14 packs), 1.5 epochs are 5 iterations (18 packs).

    Args:
        train: exactly one of train_iters, train_samples and num_epoch is set.
        num_packs: packs of one epoch.
        global_batch_size: packs of a step.
    """
    steps = math.ceil(num_packs / global_batch_size)
    if train.train_iters is not None:
        iterations = train.train_iters
    else:
        wanted = train.train_samples if train.train_samples is not None else round((train.num_epoch or 0) * num_packs)
        epochs, rest = divmod(wanted, num_packs)
        iterations = epochs * steps + math.ceil(rest / global_batch_size)
    epochs, rest = divmod(iterations, steps)
    return RunLength(iterations, epochs * num_packs + min(rest * global_batch_size, num_packs))
