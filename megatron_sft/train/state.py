"""How far a run is: everything else follows from it and the flags."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOSS_MEMORY = 100
"""Steps that the running mean of the loss reaches back."""
LOSS_STEPS = 10
"""Losses that the mean needs before a step can exceed it."""


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
    skipped_iterations: int = 0
    """Iterations without an update (--loss-spike-factor)."""
    loss_steps: int = 0
    """Losses in loss_mean, at most LOSS_MEMORY."""
    loss_mean: float = 0.0
    """Running mean of the steps' losses, in nats a trained token."""
    order_batch_size: int = 0
    """The global batch size that the order of this epoch was made for (data/loader.py); 0: the run's own."""
    best_metric: str = ""
    """The --best-metric that the next three are about."""
    best_value: float = 0.0
    best_iteration: int = 0
    """0: none yet."""
    stale_evaluations: int = 0
    """Evaluations in a row that were no better than the best before."""

    def loss_limit(self, factor: float | None) -> float:
        """The loss above which a step is a spike; infinite without a factor or before LOSS_STEPS losses."""
        return factor * self.loss_mean if factor is not None and self.loss_steps >= LOSS_STEPS else float("inf")

    def with_loss(self, loss: float, limit: float) -> "TrainState":
        """Takes a step's loss into the running mean: the plain mean of the first LOSS_MEMORY, then exponential.

        Args:
            loss: of a step that has trained tokens.
            limit: loss_limit; a loss above it counts as much as the limit, so that a lasting change ends the skipping.
        """
        steps = min(self.loss_steps + 1, LOSS_MEMORY)
        mean = self.loss_mean + (min(loss, limit) - self.loss_mean) / steps
        return dataclasses.replace(self, loss_steps=steps, loss_mean=mean)

    def with_metric(self, name: str, value: float, is_less_better: bool) -> "TrainState":
        """Takes what an evaluation at this iteration found; of another metric than before it is the first."""
        known = self.best_iteration if name == self.best_metric else 0
        is_better = not known or (value < self.best_value if is_less_better else value > self.best_value)
        if is_better and math.isfinite(value):
            best: dict[str, Any] = {"best_metric": name, "best_value": value, "best_iteration": self.iteration}
            return dataclasses.replace(self, stale_evaluations=0, **best)
        return dataclasses.replace(self, stale_evaluations=self.stale_evaluations + 1)

    def is_stale(self, patience: int | None) -> bool:
        """Whether --early-stop-patience is at its end."""
        return patience is not None and self.stale_evaluations >= patience

    def to_dict(self) -> dict[str, int | float | str]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainState":
        """Reads to_dict's form; other keys are left alone, and what an older checkpoint lacks begins at 0."""
        begin: dict[str, Any] = cls().to_dict()
        return cls(**{name: type(begin[name])(values.get(name, begin[name])) for name in begin})
