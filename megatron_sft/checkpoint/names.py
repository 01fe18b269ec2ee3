"""What each model family calls things on Hugging Face: one `Family` each, in FAMILIES. Data only.

To add a family: one entry here, a config.json under tests/assets/hf_configs, a conf; a function in layout.py only when
its tensors are laid out in a way that no family has yet. Tests find the entry by themselves.

Left of each tensor table: megatron-core's parameter name, counted over all pipeline stages and expert ranks
(`{layer}`, `{expert}`). Right: the layout (layout.LAYOUTS), then the HF tensors that it is made of.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Tensors = Mapping[str, tuple[str, ...]]

LAYER = "decoder.layers.{layer}."
ATTENTION = LAYER + "self_attention."
EXPERT = LAYER + "mlp.experts.local_experts.{expert}."
HF_LAYER = "model.layers.{layer}."
HF_ATTENTION = HF_LAYER + "self_attn."


@dataclass(frozen=True)
class Family:
    """How one `model_type` is written on Hugging Face."""

    architecture: str
    """Class name for config.json."""
    tensors: Tensors
    config: Mapping[str, str] = field(default_factory=dict)
    """Field of ModelConfig (`core.` + name for its mapping) -> key of config.json, beyond CONFIG."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that have this value in every model of the family."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Keys that config.json may leave out, with the value that transformers then takes."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Keys that must have this value if they are there: the other values are not supported."""
    derived: tuple[str, ...] = ()
    """Names of hf_config.DERIVED, for what one key alone does not say."""
    text_prefix: str = ""
    """What stands before every name when the text model is part of a multimodal checkpoint."""


CONFIG: Mapping[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "activation": "hidden_act",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "init_method_std": "initializer_range",
}
"""Keys that nearly every family has; None and absent ones fall back to `defaults`."""

DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
OTHER_SPELLINGS: Mapping[str, str] = {"num_experts": "num_local_experts"}
"""Keys that transformers 5 writes under another name than transformers 4 reads; the first is written, both are read."""

NO_BIASES: Mapping[str, Any] = {"attention_bias": False, "mlp_bias": False}

EMBEDDINGS: Tensors = {
    "embedding.word_embeddings.weight": ("vocabulary", "model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": ("whole", "model.norm.weight"),
    "output_layer.weight": ("vocabulary", "lm_head.weight"),
}
NORMS: Tensors = {
    LAYER + "input_layernorm.weight": ("whole", HF_LAYER + "input_layernorm.weight"),
    LAYER + "pre_mlp_layernorm.weight": ("whole", HF_LAYER + "post_attention_layernorm.weight"),
}
QKV: Tensors = {
    ATTENTION + "linear_qkv.weight": (
        "qkv",
        HF_ATTENTION + "q_proj.weight",
        HF_ATTENTION + "k_proj.weight",
        HF_ATTENTION + "v_proj.weight",
    ),
    ATTENTION + "linear_proj.weight": ("column", HF_ATTENTION + "o_proj.weight"),
}
QKV_BIAS: Tensors = {
    ATTENTION + "linear_qkv.bias": (
        "qkv",
        HF_ATTENTION + "q_proj.bias",
        HF_ATTENTION + "k_proj.bias",
        HF_ATTENTION + "v_proj.bias",
    ),
}
QKV_FUSED: Tensors = {
    ATTENTION + "linear_qkv.weight": ("qkv_fused", HF_ATTENTION + "qkv_proj.weight"),
    ATTENTION + "linear_proj.weight": ("column", HF_ATTENTION + "o_proj.weight"),
}
QK_NORM: Tensors = {
    ATTENTION + "q_layernorm.weight": ("whole", HF_ATTENTION + "q_norm.weight"),
    ATTENTION + "k_layernorm.weight": ("whole", HF_ATTENTION + "k_norm.weight"),
}


def gated_mlp(ours: str, theirs: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Tensors:
    """A gated MLP kept as three tensors."""
    return {
        ours + "linear_fc1.weight": ("gated", f"{theirs}{gate}.weight", f"{theirs}{up}.weight"),
        ours + "linear_fc2.weight": ("column", f"{theirs}{down}.weight"),
    }


MLP = gated_mlp(LAYER + "mlp.", HF_LAYER + "mlp.")
MLP_FUSED: Tensors = {
    LAYER + "mlp.linear_fc1.weight": ("gated_fused", HF_LAYER + "mlp.gate_up_proj.weight"),
    LAYER + "mlp.linear_fc2.weight": ("column", HF_LAYER + "mlp.down_proj.weight"),
}
DENSE: Tensors = {**EMBEDDINGS, **NORMS, **QKV, **MLP}

MOE_CONFIG: Mapping[str, str] = {"core.moe_router_topk": "num_experts_per_tok"}
MOE_ROUTER: Tensors = {LAYER + "mlp.router.weight": ("whole", HF_LAYER + "mlp.gate.weight")}
MOE_EXPERTS = gated_mlp(EXPERT, HF_LAYER + "mlp.experts.{expert}.")

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        tensors=DENSE,
        required=NO_BIASES,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        tensors=DENSE,
        derived=("window_everywhere",),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        tensors={**DENSE, **QKV_BIAS},
        fixed={"add_qkv_bias": True},
        derived=("window_qwen",),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        tensors={**DENSE, **QK_NORM},
        fixed={"qk_layernorm": True},
        defaults={"head_dim": 128},
        required=NO_BIASES,
        derived=("window_qwen",),
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        tensors={**EMBEDDINGS, **NORMS, **QKV_FUSED, **MLP_FUSED},
        defaults={"rms_norm_eps": 1e-5},
        derived=("window_everywhere",),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        tensors={**DENSE, **QK_NORM, **MOE_ROUTER, **MOE_EXPERTS},
        config={
            **MOE_CONFIG,
            "core.num_moe_experts": "num_experts",
            "core.moe_ffn_hidden_size": "moe_intermediate_size",
            "core.moe_aux_loss_coeff": "router_aux_loss_coef",
        },
        fixed={"qk_layernorm": True},
        defaults={"router_aux_loss_coef": 0.001},
        required=NO_BIASES,
        derived=("window_qwen", "moe_softmax", "moe_sparse_step"),
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        tensors={
            **EMBEDDINGS,
            **NORMS,
            **QKV,
            LAYER + "mlp.router.weight": ("whole", HF_LAYER + "block_sparse_moe.gate.weight"),
            **gated_mlp(EXPERT, HF_LAYER + "block_sparse_moe.experts.{expert}.", gate="w1", up="w3", down="w2"),
        },
        config={
            **MOE_CONFIG,
            "core.num_moe_experts": "num_local_experts",
            "core.moe_ffn_hidden_size": "intermediate_size",
            "core.moe_aux_loss_coeff": "router_aux_loss_coef",
        },
        defaults={"rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.001, "rope_theta": 1e6},
        derived=("window_everywhere", "moe_softmax_renormalised"),
    ),
}
"""Every family that can be converted, by config.json's `model_type`."""

WEIGHTLESS = (
    "rotary_emb.inv_freq",
    "masked_bias",
    "attn.bias",
)
"""Endings of tensors that old checkpoints hold and nobody loads."""
