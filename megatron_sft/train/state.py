"""How far a run is. Four integers: everything else follows from them and the flags."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
