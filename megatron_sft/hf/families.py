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
OTHER_SPELLINGS: Mapping[str, str] = {"num_experts": "num_local_experts", "n_routed_experts": "num_local_experts"}
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

MOE_SHARED = gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts.")

POST_NORMS: Tensors = {
    ATTENTION + "linear_proj.post_layernorm.weight": ("whole", HF_LAYER + "post_attention_layernorm.weight"),
    LAYER + "mlp.linear_fc2.post_layernorm.weight": ("whole", HF_LAYER + "post_feedforward_layernorm.weight"),
}
GEMMA: Tensors = {
    **EMBEDDINGS,
    **QKV,
    **MLP,
    **POST_NORMS,
    LAYER + "input_layernorm.weight": ("whole", HF_LAYER + "input_layernorm.weight"),
    LAYER + "pre_mlp_layernorm.weight": ("whole", HF_LAYER + "pre_feedforward_layernorm.weight"),
}
GEMMA_CONFIG: Mapping[str, str] = {
    "activation": "hidden_activation",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
GEMMA_DEFAULTS: Mapping[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
GEMMA_FIXED: Mapping[str, Any] = {"norm_zero_centered": True, "norm_placement": "pre_post"}

MLA: Tensors = {
    ATTENTION + "linear_q_proj.weight": ("row", HF_ATTENTION + "q_proj.weight"),
    ATTENTION + "linear_q_down_proj.weight": ("row", HF_ATTENTION + "q_a_proj.weight"),
    ATTENTION + "q_layernorm.weight": ("whole", HF_ATTENTION + "q_a_layernorm.weight"),
    ATTENTION + "linear_q_up_proj.weight": ("row", HF_ATTENTION + "q_b_proj.weight"),
    ATTENTION + "linear_kv_down_proj.weight": ("row", HF_ATTENTION + "kv_a_proj_with_mqa.weight"),
    ATTENTION + "kv_layernorm.weight": ("whole", HF_ATTENTION + "kv_a_layernorm.weight"),
    ATTENTION + "linear_kv_up_proj.weight": ("row", HF_ATTENTION + "kv_b_proj.weight"),
    ATTENTION + "linear_proj.weight": ("column", HF_ATTENTION + "o_proj.weight"),
}
DEEPSEEK_CONFIG: Mapping[str, str] = {
    **MOE_CONFIG,
    "core.num_moe_experts": "n_routed_experts",
    "core.moe_ffn_hidden_size": "moe_intermediate_size",
    "core.moe_router_topk_scaling_factor": "routed_scaling_factor",
    "core.moe_router_num_groups": "n_group",
    "core.moe_router_group_topk": "topk_group",
    "core.q_lora_rank": "q_lora_rank",
    "core.kv_lora_rank": "kv_lora_rank",
    "core.qk_head_dim": "qk_nope_head_dim",
    "core.qk_pos_emb_head_dim": "qk_rope_head_dim",
    "core.v_head_dim": "v_head_dim",
}
DEEPSEEK_FIXED: Mapping[str, Any] = {
    "qk_layernorm": True,
    "core.multi_latent_attention": True,
    "core.moe_router_pre_softmax": True,
}
DEEPSEEK: Tensors = {**EMBEDDINGS, **NORMS, **MLA, **MLP, **MOE_ROUTER, **MOE_EXPERTS, **MOE_SHARED}
DEEPSEEK_DEFAULTS: Mapping[str, Any] = {"q_lora_rank": None, "n_group": None, "topk_group": None}
DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    tensors={
        **DEEPSEEK,
        LAYER + "mlp.router.expert_bias": ("whole", HF_LAYER + "mlp.gate.e_score_correction_bias"),
    },
    config=DEEPSEEK_CONFIG,
    fixed={
        **DEEPSEEK_FIXED,
        "core.moe_router_score_function": "sigmoid",
        "core.moe_router_enable_expert_bias": True,
    },
    defaults={**DEEPSEEK_DEFAULTS, "routed_scaling_factor": 2.5},
    required={"attention_bias": False, "norm_topk_prob": True, "rope_interleave": True},
    derived=("moe_first_dense", "moe_shared", "mla"),
)

MIXER = LAYER + "mixer."
HF_HYBRID = "backbone.layers.{layer}."
HF_MIXER = HF_HYBRID + "mixer."
NEMOTRON_H = Family(
    architecture="NemotronHForCausalLM",
    tensors={
        "embedding.word_embeddings.weight": ("vocabulary", "backbone.embeddings.weight"),
        "decoder.final_layernorm.weight": ("whole", "backbone.norm_f.weight"),
        "output_layer.weight": ("vocabulary", "lm_head.weight"),
        LAYER + "norm.weight": ("whole", HF_HYBRID + "norm.weight"),
        MIXER + "in_proj.weight": ("mamba_in", HF_MIXER + "in_proj.weight"),
        MIXER + "conv1d.weight": ("mamba_conv", HF_MIXER + "conv1d.weight"),
        MIXER + "conv1d.bias": ("mamba_conv", HF_MIXER + "conv1d.bias"),
        MIXER + "dt_bias": ("row", HF_MIXER + "dt_bias"),
        MIXER + "A_log": ("row", HF_MIXER + "A_log"),
        MIXER + "D": ("row", HF_MIXER + "D"),
        MIXER + "norm.weight": ("row", HF_MIXER + "norm.weight"),
        MIXER + "out_proj.weight": ("column", HF_MIXER + "out_proj.weight"),
        LAYER + "input_layernorm.weight": ("whole", HF_HYBRID + "norm.weight"),
        ATTENTION + "linear_qkv.weight": (
            "qkv",
            HF_MIXER + "q_proj.weight",
            HF_MIXER + "k_proj.weight",
            HF_MIXER + "v_proj.weight",
        ),
        ATTENTION + "linear_proj.weight": ("column", HF_MIXER + "o_proj.weight"),
        LAYER + "pre_mlp_layernorm.weight": ("whole", HF_HYBRID + "norm.weight"),
        LAYER + "mlp.linear_fc1.weight": ("row", HF_MIXER + "up_proj.weight"),
        LAYER + "mlp.linear_fc2.weight": ("column", HF_MIXER + "down_proj.weight"),
        LAYER + "mlp.router.weight": ("whole", HF_MIXER + "gate.weight"),
        LAYER + "mlp.router.expert_bias": ("whole", HF_MIXER + "gate.e_score_correction_bias"),
        LAYER + "mlp.fc1_latent_proj.weight": ("whole", HF_MIXER + "fc1_latent_proj.weight"),
        LAYER + "mlp.fc2_latent_proj.weight": ("whole", HF_MIXER + "fc2_latent_proj.weight"),
        LAYER + "mlp.shared_experts.linear_fc1.weight": ("row", HF_MIXER + "shared_experts.up_proj.weight"),
        LAYER + "mlp.shared_experts.linear_fc2.weight": ("column", HF_MIXER + "shared_experts.down_proj.weight"),
        EXPERT + "linear_fc1.weight": ("row", HF_MIXER + "experts.{expert}.up_proj.weight"),
        EXPERT + "linear_fc2.weight": ("column", HF_MIXER + "experts.{expert}.down_proj.weight"),
    },
    config={
        "activation": "mlp_hidden_act",
        "norm_epsilon": "layer_norm_epsilon",
        "core.mamba_num_heads": "mamba_num_heads",
        "core.mamba_head_dim": "mamba_head_dim",
        "core.mamba_num_groups": "n_groups",
        "core.mamba_state_dim": "ssm_state_size",
    },
    fixed={"gated_mlp": False, "position_embedding_type": "none"},
    defaults={"num_hidden_layers": None, "mlp_hidden_act": "relu2", "layer_norm_epsilon": 1e-5},
    required={
        **NO_BIASES,
        "use_bias": False,
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        "conv_kernel": 4,
        "mamba_hidden_act": "silu",
        "sliding_window": None,
        "norm_topk_prob": True,
        "residual_in_fp32": False,
        "tie_word_embeddings": False,
    },
    derived=("hybrid",),
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        tensors=DENSE,
        required=NO_BIASES,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        tensors=DENSE,
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True},
        required={**NO_BIASES, "use_sliding_window": False},
        derived=("no_rope",),
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
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        tensors=GEMMA,
        config=GEMMA_CONFIG,
        fixed=GEMMA_FIXED,
        defaults={**GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        required=NO_BIASES,
        derived=("window_even", "gemma_scales"),
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        tensors={**GEMMA, **QK_NORM},
        config=GEMMA_CONFIG,
        fixed={**GEMMA_FIXED, "qk_layernorm": True},
        defaults={
            **GEMMA_DEFAULTS,
            "rope_theta": 1e6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
        },
        required={**NO_BIASES, "use_bidirectional_attention": False, "attn_logit_softcapping": None},
        derived=("window_gemma3", "gemma_scales"),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        tensors={
            **EMBEDDINGS,
            **QKV,
            **MLP,
            **POST_NORMS,
            ATTENTION + "q_layernorm.weight": ("row", HF_ATTENTION + "q_norm.weight"),
            ATTENTION + "k_layernorm.weight": ("row", HF_ATTENTION + "k_norm.weight"),
        },
        fixed={"norm_placement": "post", "qk_layernorm": True, "qk_layernorm_full": True},
        defaults={"rms_norm_eps": 1e-5},
        required=NO_BIASES,
    ),
    "nemotron": Family(
        architecture="NemotronForCausalLM",
        tensors={
            **EMBEDDINGS,
            **NORMS,
            **QKV,
            "decoder.final_layernorm.bias": ("whole", "model.norm.bias"),
            LAYER + "input_layernorm.bias": ("whole", HF_LAYER + "input_layernorm.bias"),
            LAYER + "pre_mlp_layernorm.bias": ("whole", HF_LAYER + "post_attention_layernorm.bias"),
            LAYER + "mlp.linear_fc1.weight": ("row", HF_LAYER + "mlp.up_proj.weight"),
            LAYER + "mlp.linear_fc2.weight": ("column", HF_LAYER + "mlp.down_proj.weight"),
        },
        config={"norm_epsilon": "norm_eps"},
        fixed={"normalization": "LayerNorm", "norm_zero_centered": True, "gated_mlp": False},
        defaults={"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5, "initializer_range": 0.0134},
        required=NO_BIASES,
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        tensors=DEEPSEEK,
        config=DEEPSEEK_CONFIG,
        fixed={**DEEPSEEK_FIXED, "core.moe_router_score_function": "softmax"},
        defaults={**DEEPSEEK_DEFAULTS, "routed_scaling_factor": 1.0},
        required={**NO_BIASES, "norm_topk_prob": False, "topk_method": "greedy"},
        derived=("moe_first_dense", "moe_shared", "mla"),
    ),
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": DEEPSEEK_V3,
    "nemotron_h": NEMOTRON_H,
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        tensors={
            **EMBEDDINGS,
            **NORMS,
            **QKV,
            **QKV_BIAS,
            ATTENTION + "linear_proj.bias": ("whole", HF_ATTENTION + "o_proj.bias"),
            ATTENTION + "core_attention.softmax_offset": ("row", HF_ATTENTION + "sinks"),
            LAYER + "mlp.router.weight": ("whole", HF_LAYER + "mlp.router.weight"),
            LAYER + "mlp.router.bias": ("whole", HF_LAYER + "mlp.router.bias"),
            EXPERT + "linear_fc1.weight": ("experts_interleaved", HF_LAYER + "mlp.experts.gate_up_proj"),
            EXPERT + "linear_fc1.bias": ("experts_interleaved", HF_LAYER + "mlp.experts.gate_up_proj_bias"),
            EXPERT + "linear_fc2.weight": ("experts_down", HF_LAYER + "mlp.experts.down_proj"),
            EXPERT + "linear_fc2.bias": ("experts_whole", HF_LAYER + "mlp.experts.down_proj_bias"),
        },
        config={
            **MOE_CONFIG,
            "core.num_moe_experts": "num_local_experts",
            "core.moe_ffn_hidden_size": "intermediate_size",
            "core.activation_func_clamp_value": "swiglu_limit",
        },
        fixed={
            "add_bias_linear": True,
            "position_embedding_type": "yarn",
            "core.softmax_type": "learnable",
            "core.glu_linear_offset": 1.0,
            "core.moe_router_pre_softmax": False,
        },
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "swiglu_limit": 7.0, "head_dim": 64},
        required={"attention_bias": True, "swiglu_alpha": 1.702},
        derived=("window_even", "quick_gelu"),
    ),
    "llama4_text": Family(
        architecture="Llama4ForCausalLM",
        tensors={
            **EMBEDDINGS,
            **NORMS,
            **QKV,
            **gated_mlp(LAYER + "mlp.", HF_LAYER + "feed_forward."),
            **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "feed_forward.shared_expert."),
            LAYER + "mlp.router.weight": ("whole", HF_LAYER + "feed_forward.router.weight"),
            EXPERT + "linear_fc1.weight": ("experts_gated", HF_LAYER + "feed_forward.experts.gate_up_proj"),
            EXPERT + "linear_fc2.weight": ("experts_down", HF_LAYER + "feed_forward.experts.down_proj"),
        },
        config={
            **MOE_CONFIG,
            "ffn_hidden_size": "intermediate_size_mlp",
            "attention_chunk_size": "attention_chunk_size",
            "core.num_moe_experts": "num_local_experts",
            "core.moe_ffn_hidden_size": "intermediate_size",
            "core.moe_shared_expert_intermediate_size": "intermediate_size",
            "core.qk_l2_norm": "use_qk_norm",
        },
        fixed={
            "rotary_interleaved": True,
            "core.moe_router_score_function": "sigmoid",
            "core.moe_apply_probs_on_input": True,
        },
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "attention_chunk_size": 8192,
            "use_qk_norm": True,
            "attn_temperature_tuning": True,
            "attn_scale": 0.1,
            "floor_scale": 8192,
        },
        required=NO_BIASES,
        derived=("moe_interleaved", "no_rope", "temperature"),
    ),
}
"""Every family that can be converted, by config.json's `model_type`."""

TEXT_PREFIX = "language_model."
"""Stands before the names of the text model in a multimodal checkpoint, whose other tensors are left out."""

WEIGHTLESS = (
    "rotary_emb.inv_freq",
    "masked_bias",
    "attn.bias",
)
"""Endings of tensors that old checkpoints hold and nobody loads."""
