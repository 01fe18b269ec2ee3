"""Mamba-2 layers in plain torch, for packed rows on any device (Nemotron-H). megatron-core's need mamba_ssm's CUDA kernels.

Names of parameters, their cut over tensor-parallel ranks and their place in checkpoints are megatron-core's
(megatron/core/ssm/mamba_mixer.py). State and convolution begin afresh with every document. The state is carried from
chunk to chunk (arXiv 2405.21060, section 6). Not here: context parallelism, and a state cache for generation.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default

from megatron_sft.errors import ConfigError
from megatron_sft.model.cache import CachedSeqParams
from megatron_sft.model.layers import wait_for_parameters

CHUNK = 64
"""Tokens whose outputs are computed from one another at once; scores take [tokens, CHUNK, heads] fp32."""
KERNEL = 4
"""Tokens that the convolution sees."""


def hybrid_layer(layer: ModuleSpec, kind: str, norm: type) -> ModuleSpec:
    """One layer of a hybrid model: half of a transformer layer, or a Mamba layer.

    Args:
        layer: the spec of a transformer layer, changed in place.
        kind: the layer's letter in --hybrid-layer-pattern: M Mamba, * attention, - MLP, E mixture of experts.
        norm: before the layer.
    """
    if kind == "M":
        return ModuleSpec(module=PackedMambaLayer, params={"norm": norm})
    submodules: Any = layer.submodules
    if kind == "*":
        submodules.pre_mlp_layernorm = submodules.mlp = IdentityOp
        submodules.mlp_bda = IdentityFuncOp
    elif kind in "-E":
        submodules.input_layernorm = submodules.self_attention = IdentityOp
        submodules.self_attn_bda = IdentityFuncOp
    else:
        raise ConfigError([f"--hybrid-layer-pattern: letter {kind!r}; expected M, *, - or E for each layer. Correct it."])
    return layer


class PackedMambaLayer(MambaLayer):
    """Norm, mixer and residual, called as TransformerBlock calls its layers."""

    def __init__(self, config: Any, norm: type, layer_number: int = 1, pg_collection: Any = None, vp_stage: Any = None, **_: Any):
        super(MambaLayer, self).__init__(config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage)
        self.norm = norm(config, config.hidden_size, config.layernorm_epsilon)
        self.mixer = MambaMixer(config, pg_collection)

    def forward(self, hidden_states: torch.Tensor, *_: Any, packed_seq_params: Any = None, **__: Any) -> Any:
        """[tokens, 1, hidden] -> (the same, None); tokens are cut over tensor-parallel ranks by sequence parallelism."""
        return hidden_states + self.mixer(self.norm(hidden_states), packed_seq_params), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron-core's description of norm and mixer."""
        return super(MambaLayer, self).sharded_state_dict(prefix, sharded_offsets, metadata)


class GatedNorm(torch.nn.Module):
    """Root-mean-square norm of x * silu(gate) over each group of heads, in fp32."""

    def __init__(self, config: Any, width: int, groups: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))
        self.groups, self.eps = groups, config.layernorm_epsilon

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """[tokens, width] twice -> [tokens, width] in the gate's dtype."""
        gated = (x.float() * F.silu(gate.float())).unflatten(-1, (self.groups, -1))
        return self.weight * F.rms_norm(gated, gated.shape[-1:], None, self.eps).flatten(-2).type_as(gate)


class MambaMixer(MegatronModule):
    """The mixer of one Mamba-2 layer; a tensor-parallel rank has heads / tp_size heads and groups / tp_size groups.

    Args:
        config: the TransformerConfig; mamba_num_heads, mamba_head_dim, mamba_num_groups and mamba_state_dim count.
        pg_collection: has the groups `tp` and `cp`.
    """

    def __init__(self, config: Any, pg_collection: Any):
        super().__init__(config)
        size = pg_collection.tp.size()
        if config.mamba_num_groups % size or config.mamba_num_heads % size or pg_collection.cp.size() > 1:
            raise ConfigError(
                [
                    f"{config.mamba_num_groups} groups of Mamba states over {size} tensor-parallel and {pg_collection.cp.size()} "
                    "context-parallel ranks: expected a number that divides the groups, and no context parallelism. "
                    "Choose another --tensor-model-parallel-size, and --context-parallel-size 1."
                ]
            )
        self.heads, self.groups = config.mamba_num_heads // size, config.mamba_num_groups // size
        self.head_dim, self.state_dim = config.mamba_head_dim, config.mamba_state_dim
        inner, state = self.heads * self.head_dim, self.groups * self.state_dim
        self.bands = {"z": inner, "x": inner, "B": state, "C": state, "dt": self.heads}
        width, channels = config.mamba_num_heads * config.mamba_head_dim, inner + 2 * state
        plain: dict[str, Any] = dict(config=config, init_method=config.init_method, bias=False, tp_group=pg_collection.tp)
        self.in_proj = ColumnParallelLinear(config.hidden_size, sum(self.bands.values()) * size, gather_output=False, **plain)
        self.out_proj = RowParallelLinear(width, config.hidden_size, input_is_parallel=True, skip_bias_add=True, **plain)
        self.conv1d = torch.nn.Conv1d(channels, channels, KERNEL, groups=channels, dtype=config.params_dtype)
        self.norm = GatedNorm(config, inner, self.groups)
        for name in ("dt_bias", "A_log", "D"):
            setattr(self, name, torch.nn.Parameter(torch.zeros(self.heads, dtype=config.params_dtype)))
        for parameter in (*self.conv1d.parameters(), self.norm.weight, self.dt_bias, self.A_log, self.D):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def forward(self, hidden: torch.Tensor, packed: PackedSeqParams) -> torch.Tensor:
        """[tokens, 1, hidden] -> the same."""
        if isinstance(packed, CachedSeqParams):
            raise ConfigError(
                [
                    "generation: Mamba layers have no state cache here; expected a model of attention layers. "
                    "Write an HF folder (export.sh) and generate with transformers or vLLM."
                ]
            )
        projected, _ = self.in_proj(hidden)
        gate, convolved, step = projected[:, 0].split(
            [self.bands["z"], sum(self.bands[name] for name in "xBC"), self.heads], dim=-1
        )
        documents = _documents(packed.cu_seqlens_q, convolved.shape[0])
        wait_for_parameters(self.conv1d)
        convolved = F.silu(convolve(convolved, self.conv1d.weight[:, 0], self.conv1d.bias, documents))
        x, b, c = convolved.split([self.bands[name] for name in "xBC"], dim=-1)
        out = ssd_scan(
            x.unflatten(-1, (self.heads, -1)),
            F.softplus(step.float() + self.dt_bias.float()),
            -torch.exp(self.A_log.float()),
            b.unflatten(-1, (self.groups, -1)),
            c.unflatten(-1, (self.groups, -1)),
            self.D,
            documents,
        )
        return self.out_proj(self.norm(out.flatten(-2), gate)[:, None])[0]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As megatron-core's: in_proj and conv1d are cut band by band, each over the tensor-parallel ranks."""
        own = {name: getattr(self, name) for name in ("A_log", "dt_bias", "D")}
        own |= {f"conv1d.{name}": value for name, value in self.conv1d.named_parameters()}
        own["norm.weight"] = self.norm.weight
        state: dict = make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(own, 0), sharded_offsets)
        for name in ("in_proj", "out_proj"):
            state |= sharded_state_dict_default(getattr(self, name), f"{prefix}{name}.", sharded_offsets, metadata)
        convolved = {name: self.bands[name] for name in "xBC"}
        for name, bands in {"in_proj.weight": self.bands, "conv1d.weight": convolved, "conv1d.bias": convolved}.items():
            state[prefix + name] = _banded(state[prefix + name], bands)
        return state


def _banded(tensor: ShardedTensor, bands: Mapping[str, int]) -> ShardedTensorFactory:
    """Stores each band of rows as a tensor of its own, in_proj.weight.z, in_proj.weight.x ..., so that TP can change."""
    bare = tensor.without_data()

    def build(key: str, value: torch.Tensor, replica_id: Any, flattened_range: Any = None) -> list[ShardedTensor]:
        whole = dataclasses.replace(bare, key=key, data=value, dtype=value.dtype, replica_id=replica_id)
        parts, first = [], 0
        for name, rows in bands.items():
            (part,) = whole.narrow(0, first, rows)
            parts.append(dataclasses.replace(part, key=f"{key}.{name}"))
            first += rows
        return parts

    return ShardedTensorFactory(tensor.key, tensor.data, build, torch.cat, tensor.replica_id)


def _documents(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Number of each token's document, [tokens]: cu_seqlens [0, 3, 5], 6 tokens -> [0, 0, 0, 1, 1, 2]."""
    return torch.searchsorted(cu_seqlens[1:], torch.arange(tokens, device=cu_seqlens.device), right=True)


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, documents: torch.Tensor) -> torch.Tensor:
    """Causal convolution of each channel within its document.

    Args:
        x: [tokens, channels].
        weight: [channels, KERNEL]; the last column is the token's own.
        bias: [channels], or none.
        documents: [tokens].

    Returns:
        [tokens, channels].
    """
    out = x * weight[:, -1] if bias is None else bias + x * weight[:, -1]
    for back in range(1, min(KERNEL, x.shape[0])):
        same = (documents[back:] == documents[:-back])[:, None]
        out = out + F.pad(torch.where(same, x[:-back], 0) * weight[:, -1 - back], (0, 0, back, 0))
    return out


def ssd_scan(
    x: torch.Tensor,
    step: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    documents: torch.Tensor,
) -> torch.Tensor:
    """state[t] = exp(step[t] decay) state[t - 1] + step[t] x[t] b[t]^T;  out[t] = state[t] c[t] + skip x[t], in fp32.

    Args:
        x: [tokens, heads, head_dim].
        step: [tokens, heads] fp32, positive.
        decay: [heads] fp32, negative.
        b: [tokens, groups, state_dim]; head h has group h // (heads / groups).
        c: as b.
        skip: [heads].
        documents: [tokens]; states do not pass from one to the next.

    Returns:
        [tokens, heads, head_dim] fp32.
    """
    tokens, heads, groups = x.shape[0], x.shape[1], b.shape[1]
    more = -tokens % CHUNK
    parts = [F.pad(value.float(), [0, 0] * (value.dim() - 1) + [0, more]).unflatten(0, (-1, CHUNK)) for value in (x, step, b, c)]
    values, steps, keys, queries = parts
    owner = F.pad(documents, (0, more), value=-1).unflatten(0, (-1, CHUNK))  # [chunks, CHUNK]
    values = (values * steps[..., None]).unflatten(2, (groups, -1))  # [chunks, CHUNK, groups, heads a group, head_dim]
    total = (steps * decay).cumsum(1).unflatten(2, (groups, -1))  # log of the decay since the chunk's first token
    seen = (owner[:, :, None] == owner[:, None, :]).tril()[..., None, None]
    weights = torch.where(seen, total[:, :, None] - total[:, None], -torch.inf).exp()  # [chunks, to, from, groups, heads]
    scores = torch.einsum("clgn,csgn->clsg", queries, keys)[..., None] * weights
    out = torch.einsum("clsgr,csgrp->clgrp", scores, values)
    ending = torch.where((owner == owner[:, -1:])[..., None, None], (total[:, -1:] - total).exp(), 0)
    states = torch.einsum("csgn,csgrp->cgrpn", keys, values * ending[..., None])
    carried = [torch.zeros_like(states[0])]
    for number in range(1, states.shape[0]):
        before = carried[-1] * total[number - 1, -1].exp()[..., None, None] if number > 1 else 0
        goes_on = owner[number - 2, -1] == owner[number - 1, -1] if number > 1 else True
        carried.append(states[number - 1] + before * goes_on)
    previous = F.pad(owner[:-1, -1:], (0, 0, 1, 0), value=-2)
    reach = torch.where((owner == previous)[..., None, None], total.exp(), 0)
    out = out + torch.einsum("clgn,cgrpn->clgrp", queries, torch.stack(carried)) * reach[..., None]
    return out.flatten(0, 1)[:tokens].reshape(tokens, heads, -1) + skip.float()[:, None] * x.float()
