"""Which module stands where in a layer: megatron-core's local spec with our norms, projections and attention."""

import copy
import functools
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_sft.config.run import ModelConfig
from megatron_sft.model.attention import PackedAttention
from megatron_sft.model.experts import GroupedExperts
from megatron_sft.model.layers import BiasedRowParallelLinear, L2Norm, LayerNorm, NormedRowParallelLinear, RMSNorm
from megatron_sft.model.mamba import hybrid_layer
from megatron_sft.model.self_attention import PackedMLASelfAttention, PackedSelfAttention


def block_spec(model: ModelConfig, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one model chunk on this pipeline rank.

    Args:
        model: where norms stand.
        config: decides between dense and expert layers (moe_layer_freq).
        vp_stage: virtual pipeline stage of the chunk; None without.
    """
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    block.layer_specs = [copy.deepcopy(layer) for layer in block.layer_specs]
    for layer in block.layer_specs:
        _replace(layer, norm, model, config)
    pattern = model.mamba.hybrid_layer_pattern
    if pattern:
        kinds = pattern[get_transformer_layer_offset(config, vp_stage) :]
        block.layer_specs = [hybrid_layer(*pair, norm) for pair in zip(block.layer_specs, kinds, strict=False)]
    block.layer_norm = norm
    return block


def _replace(layer: ModuleSpec, norm: type, model: ModelConfig, config: TransformerConfig) -> None:
    """Puts our modules into megatron-core's spec of one layer."""
    submodules: Any = layer.submodules
    before = IdentityOp if model.norm_placement == "post" else norm
    submodules.input_layernorm = submodules.pre_mlp_layernorm = before
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.multi_latent_attention:
        submodules.self_attention.module = PackedMLASelfAttention
        if config.qk_layernorm:  # queries without compression (DeepSeek-V2-Lite) have no norm
            attention.kv_layernorm = norm
            attention.q_layernorm = norm if config.q_lora_rank else IdentityOp
    else:
        submodules.self_attention.module = PackedSelfAttention
        head_norm = L2Norm if config.qk_l2_norm else norm if config.qk_layernorm else IdentityOp
        attention.q_layernorm = attention.k_layernorm = head_norm
    after = RowParallelLinear if model.norm_placement == "pre" else NormedRowParallelLinear
    attention.linear_proj = after
    mlp = _submodules(submodules.mlp)
    if hasattr(mlp, "linear_fc2"):  # a dense layer; experts have no norm after them
        mlp.linear_fc2 = after
        return
    if config.add_bias_linear:
        _submodules(mlp.experts).linear_fc2 = BiasedRowParallelLinear
    if isinstance(mlp.experts, functools.partial):
        mlp.experts = functools.partial(GroupedExperts, *mlp.experts.args, **mlp.experts.keywords)
    else:
        mlp.experts.module = GroupedExperts


def _submodules(spec: Any) -> Any:
    """Of a ModuleSpec (0.16) or of a partial of a module's class (0.19)."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules
