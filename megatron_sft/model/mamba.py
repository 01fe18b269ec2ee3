"""Mamba-2 layers in plain torch, for packed rows on any device (Nemotron-H). megatron-core's need mamba_ssm's CUDA kernels.

Names of parameters, their cut over tensor-parallel ranks and their place in checkpoints are megatron-core's
(megatron/core/ssm/mamba_mixer.py). State and convolution begin afresh with every document. The state is carried from
chunk to chunk (arXiv 2405.21060, section 6); in generation from token to token. Not here: context parallelism.
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
        self.mixer = MambaMixer(config, pg_collection, self.layer_number)

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
        layer_number: 1 for the first layer of the whole model.
    """

    def __init__(self, config: Any, pg_collection: Any, layer_number: int):
        super().__init__(config)
        self.layer_number = layer_number
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
        projected, _ = self.in_proj(hidden)
        gate, convolved, step = projected[:, 0].split(
            [self.bands["z"], sum(self.bands[name] for name in "xBC"), self.heads], dim=-1
        )
        wait_for_parameters(self.conv1d)
        step = F.softplus(step.float() + self.dt_bias.float())
        if isinstance(packed, CachedSeqParams):
            out = self._with_cache(convolved[: packed.tokens], step[: packed.tokens], packed)
            out = F.pad(out, (0, 0, 0, len(gate) - packed.tokens))  # behind the documents: sequence parallelism
        else:
            out = self._scanned(convolved, step, _documents(packed.cu_seqlens_q, len(gate)))[0].flatten(-2)
        return self.out_proj(self.norm(out, gate)[:, None])[0]

    def _scanned(self, convolved: torch.Tensor, step: torch.Tensor, documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolution and scan of packed documents.

        Args:
            convolved: what the convolution sees, [tokens, channels].
            step: [tokens, heads] fp32.
            documents: [tokens].

        Returns:
            As ssd_scan.
        """
        bands = F.silu(convolve(convolved, self.conv1d.weight[:, 0], self.conv1d.bias, documents))
        return ssd_scan(*self._divided(bands, step), self.D, documents)

    def _divided(self, bands: Any, step: Any) -> tuple[Any, Any, Any, Any, Any]:
        """x, step, decay, b and c of ssd_scan, of what the convolution gave."""
        x, b, c = bands.split([self.bands[name] for name in "xBC"], dim=-1)
        b, c = (value.unflatten(-1, (self.groups, -1)) for value in (b, c))
        return x.unflatten(-1, (self.heads, -1)), step, -torch.exp(self.A_log.float()), b, c

    def _with_cache(self, convolved: torch.Tensor, step: torch.Tensor, cache: CachedSeqParams) -> torch.Tensor:
        """Generation: [tokens, heads * head_dim] fp32. Kept are the scan's state and what the next convolution looks back at."""
        names = [(self.layer_number, "tail"), (self.layer_number, "state")]
        if cache.decodes:
            tail, state = (cache.states[name] for name in names)
            seen = torch.cat((tail, convolved[:, None]), dim=1)  # [documents, KERNEL, channels]
            summed = torch.einsum("dkc,ck->dc", seen, self.conv1d.weight[:, 0])
            bands = F.silu(summed if self.conv1d.bias is None else summed + self.conv1d.bias)
            out, state = ssd_step(state, *self._divided(bands, step), self.D)
            new = [(seen[:, 1:], state)]
        else:  # a document after the other, so that each has its last state
            lengths, parts, new = cache.cu_seqlens_q.diff().tolist(), [], []
            for columns, steps in zip(convolved.split(lengths), step.split(lengths), strict=True):
                out, state = self._scanned(columns, steps, torch.zeros(len(columns), dtype=torch.int64, device=columns.device))
                parts.append(out)
                new.append((F.pad(columns[1 - KERNEL :], (0, 0, max(0, KERNEL - 1 - len(columns)), 0))[None], state[None]))
            out = torch.cat(parts)
        if cache.keeps:
            cache.states.update(zip(names, (torch.cat(values) for values in zip(*new, strict=True)), strict=True))
        return out.flatten(-2)

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
) -> tuple[torch.Tensor, torch.Tensor]:
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
        out, [tokens, heads, head_dim] fp32, and the state behind the row's last token, [heads, head_dim, state_dim] fp32.
    """
    tokens, heads, groups = x.shape[0], x.shape[1], b.shape[1]
    more = -tokens % CHUNK
    parts = [F.pad(value.float(), [0, 0] * (value.dim() - 1) + [0, more]).unflatten(0, (-1, CHUNK)) for value in (x, step, b, c)]
    values, steps, keys, queries = parts
    owner = torch.cat((documents, documents[-1:].expand(more))).unflatten(0, (-1, CHUNK))  # [chunks, CHUNK]
    values = (values * steps[..., None]).unflatten(2, (groups, -1))  # [chunks, CHUNK, groups, heads per group, head_dim]
    total = _running_sum(steps * decay).unflatten(2, (groups, -1))  # log of the decay since the chunk's first token
    seen = (owner[:, :, None] == owner[:, None, :]).tril()[..., None, None]
    weights = torch.where(seen, total[:, :, None] - total[:, None], -torch.inf).exp()  # [chunks, to, from, groups, heads]
    scores = torch.einsum("clgn,csgn->clsg", queries, keys)[..., None] * weights
    out = torch.einsum("clsgr,csgrp->clgrp", scores, values)
    ending = torch.where((owner == owner[:, -1:])[..., None, None], (total[:, -1:] - total).exp(), 0)
    states = torch.einsum("csgn,csgrp->cgrpn", keys, values * ending[..., None])
    carried = [torch.zeros_like(states[0])]
    for number in range(1, states.shape[0] + 1):
        before = carried[-1] * total[number - 1, -1].exp()[..., None, None] if number > 1 else 0
        goes_on = owner[number - 2, -1] == owner[number - 1, -1] if number > 1 else True
        carried.append(states[number - 1] + before * goes_on)
    previous = F.pad(owner[:-1, -1:], (0, 0, 1, 0), value=-2)
    reach = torch.where((owner == previous)[..., None, None], total.exp(), 0)
    out = out + torch.einsum("clgn,cgrpn->clgrp", queries, torch.stack(carried[:-1])) * reach[..., None]
    out = out.flatten(0, 1)[:tokens].reshape(tokens, heads, -1) + skip.float()[:, None] * x.float()
    return out, carried[-1].flatten(0, 1)


def _running_sum(values: torch.Tensor) -> torch.Tensor:
    """Sums over dimension 1 up to each place: [chunks, CHUNK, heads] fp32, alike.

    CUDA's cumsum of floats does not repeat bit by bit and raises under torch.use_deterministic_algorithms; a product does.
    https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html
    """
    if not torch.are_deterministic_algorithms_enabled():
        return values.cumsum(1)
    return torch.ones(CHUNK, CHUNK, dtype=values.dtype, device=values.device).tril() @ values


def ssd_step(
    state: torch.Tensor,
    x: torch.Tensor,
    step: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token more of each document: ssd_scan's formula once.

    Args:
        state: [documents, heads, head_dim, state_dim] fp32.
        x: as ssd_scan's, and so are the others, with documents in the place of tokens.
        step: [documents, heads] fp32.
        decay: [heads] fp32.
        b: [documents, groups, state_dim].
        c: as b.
        skip: [heads].

    Returns:
        out, [documents, heads, head_dim] fp32, and the new state.
    """
    b, c = (value.float().repeat_interleave(x.shape[1] // value.shape[1], dim=1) for value in (b, c))
    x = x.float()
    state = state * torch.exp(step * decay)[..., None, None] + (step[..., None] * x)[..., None] * b[:, :, None]
    return torch.einsum("dhpn,dhn->dhp", state, c) + skip.float()[:, None] * x, state
