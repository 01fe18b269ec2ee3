"""Norms with megatron-core's constructor. Its own WrappedTorchNorm refuses sequence parallelism."""

from typing import Any

import torch
import torch.nn.functional as F


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467).

    Args:
        config: the TransformerConfig; layernorm_zero_centered_gamma stores the weight as w - 1.
        hidden_size: width of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__()
        self.zero_centered = config.layernorm_zero_centered_gamma
        fill = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(fill(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.eps)


class LayerNorm(torch.nn.Module):
    """Layer norm over the last dimension; arguments as in RMSNorm."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__()
        self.zero_centered = config.layernorm_zero_centered_gamma
        fill = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(fill(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        return F.layer_norm(hidden, (hidden.shape[-1],), weight, self.bias, self.eps)
