"""Which module stands where in a layer: megatron-core's local spec with our norms and our attention."""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sft.model.attention import PackedAttention
from megatron_sft.model.layers import LayerNorm, RMSNorm


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one model chunk on this pipeline rank.

    Args:
        config: decides between dense and expert layers (moe_layer_freq).
        vp_stage: virtual pipeline stage of the chunk; None without.
    """
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    if config.num_moe_experts:
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
    else:
        from megatron.core.transformer.transformer_block import get_num_layers_to_build

        layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
        block = TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage), norm)
    for layer in block.layer_specs:
        _replace(layer, norm, config)
    block.layer_norm = norm
    return block


def _replace(layer: ModuleSpec, norm: type, config: TransformerConfig) -> None:
    """Puts our modules into megatron-core's spec of one layer."""
    submodules: Any = layer.submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = norm
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
