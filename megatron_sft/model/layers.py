"""Norms with megatron-core's constructor. Its own WrappedTorchNorm refuses sequence parallelism."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import torch_norm
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


def wait_for_parameters(module: torch.nn.Module) -> None:
    """Runs the hooks of a module whose weight is used without a call: --overlap-param-gather waits in them for its weight."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


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


class L2Norm(torch_norm.L2Norm):
    """Root-mean-square norm without a weight, in fp32 (Llama 4's queries and keys); modelopt's importer knows the class."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__(hidden_size, eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same."""
        return F.rms_norm(hidden.float(), (hidden.shape[-1],), None, self.eps).type_as(hidden)


class HeadsNorm(torch.nn.Module):
    """Root-mean-square norm over all heads together, of which a tensor-parallel rank has some (OLMo-2).

    Args:
        config: the TransformerConfig.
        width: heads x head_dim over all ranks.
        eps: added to the mean square.
        group: tensor-parallel group.
    """

    def __init__(self, config: Any, width: int, eps: float, group: Any):
        super().__init__()
        self.width, self.eps, self.group = width, eps, group
        self.weight = torch.nn.Parameter(torch.ones(width // group.size(), dtype=config.params_dtype))

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """[tokens, 1, heads, head_dim] or [tokens, 1, groups, head_dim] -> the same."""
        flat = heads.flatten(2).float()
        squares = flat.square().sum(dim=-1, keepdim=True)
        if self.group.size() > 1:  # both directions: every rank's heads depend on every rank's squares
            squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normed = flat * torch.rsqrt(squares / self.width + self.eps)
        return (normed.type_as(heads) * self.weight).view_as(heads)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron-core's description of the weight, cut over heads."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class NormedRowParallelLinear(RowParallelLinear):
    """A projection back to the residual stream with a norm after it (Gemma, OLMo-2), as NVIDIA's Bridge names it."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any):
        super().__init__(input_size, output_size, config=config, **kwargs)
        assert not config.add_bias_linear, "a bias would have to be added before the norm"
        norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
        self.post_layernorm = norm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[tokens, 1, input_size / tp] -> [tokens, 1, output_size] and no bias."""
        output, _ = super().forward(input_)
        adapter = getattr(self, "lora", None)
        return self.post_layernorm(output if adapter is None else adapter(input_, output)), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron-core's description of the matrix, cut along its input, and of the norm, whole on every rank."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 1}, sharded_offsets)


class WholeLinear(torch.nn.Module):
    """A projection that every tensor-parallel rank holds whole: TransformerEngine's with parallel_mode="duplicated"."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, bias: bool, **unused: Any):
        super().__init__()
        assert not bias, "no family has a bias here"
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[..., input_size] -> [..., output_size] and no bias."""
        return F.linear(hidden, self.weight), None


class BiasedRowParallelLinear(RowParallelLinear):
    """An expert's second projection when it has a bias.

    megatron/core/transformer/mlp.py adds the bias in place to this output, which autograd refuses for the view that
    RowParallelLinear returns on a single tensor-parallel rank.
    """

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[tokens, input_size / tp] -> a copy of [tokens, output_size], and the bias."""
        output, bias = super().forward(input_)
        return output.clone(), bias
