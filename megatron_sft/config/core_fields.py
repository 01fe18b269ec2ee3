"""Which of megatron-core's settings have an effect here, and what they may be: the flags that ModelConfig.core holds.

Any other field of its TransformerConfig would change nothing, or what this project does not do; its flag is refused
(flags.REFUSED says why). tests/unit/model/test_core_fields.py walks over all of both versions, and sees the effect of each.
"""

from typing import Annotated

from megatron_sft.config.fields import Count, Number, Words, kinds

Balance = Annotated[str, Words("aux_loss", "seq_aux_loss", "global_aux_loss", "none")]
Coefficient = Annotated[float, Number(0, 1000)]
Layers = Annotated[int, Number(0)]


class CoreArchitecture:
    """What belongs to the function that the weights compute."""

    num_moe_experts: Count | None
    """Routed experts of a layer."""
    moe_ffn_hidden_size: Count | None
    """Width of one expert."""
    moe_layer_freq: Layers | list[Layers]
    """Every n-th layer has experts, or a list with 1 where one has: ([0]*3+[1]*58)."""
    moe_latent_size: Count | None
    """Width of the space in which experts work; not given: hidden_size."""
    moe_router_topk: Count
    """Experts a token."""
    moe_router_score_function: Annotated[str, Words("softmax", "sigmoid")]
    moe_router_pre_softmax: bool
    """Softmax over all experts, before the best are chosen."""
    moe_router_num_groups: Count | None
    """Groups of experts, of which moe_router_group_topk are chosen first."""
    moe_router_group_topk: Count | None
    moe_router_topk_scaling_factor: Annotated[float, Number(1e-6, 1e6)] | None
    moe_router_enable_expert_bias: bool
    """A bias that is added when experts are chosen, and moved towards balance."""
    moe_shared_expert_intermediate_size: Count | None
    """Width of the expert that every token takes."""
    moe_apply_probs_on_input: bool
    """Experts' inputs are weighted, not their outputs (Llama 4)."""
    multi_latent_attention: bool
    """Keys and values from a latent vector (DeepSeek)."""
    q_lora_rank: Count | None
    """Width of the queries' latent vector; not given: queries are not compressed."""
    kv_lora_rank: Count
    qk_head_dim: Count
    """Width of a head's queries and keys that RoPE does not turn."""
    qk_pos_emb_head_dim: Count
    """Width of what it turns."""
    v_head_dim: Count
    mscale: Annotated[float, Number(0, 1000)]
    mscale_all_dim: Annotated[float, Number(0, 1000)]
    rotary_scaling_factor: Annotated[float, Number(1, 1e6)]
    rope_type: Annotated[str, Words("rope", "yarn")]
    """Of latent attention."""
    original_max_position_embeddings: Count
    beta_fast: Annotated[float, Number(1e-3, 1e6)]
    beta_slow: Annotated[float, Number(1e-3, 1e6)]
    rotary_interleaved: bool
    """RoPE turns neighbours, not halves (Llama 4)."""
    no_rope_freq: Layers | list[Layers] | None
    """Every n-th layer has no RoPE, or a list with 1 where one has none."""
    qk_l2_norm: bool
    """A norm without weight over queries and keys (Llama 4)."""
    softmax_scale: Annotated[float, Number(1e-6, 1e6)] | None
    """Attention scores are multiplied by it; not given: 1 / sqrt(head width)."""
    softmax_type: Annotated[str, Words("vanilla", "learnable")]
    """learnable: a sink for each head (gpt-oss)."""
    glu_linear_offset: Annotated[float, Number(-1000, 1000)]
    """Added to the half that is not gated (gpt-oss)."""
    activation_func_clamp_value: Annotated[float, Number(1e-3, 1e6)] | None
    """Both halves are cut off there (gpt-oss)."""
    mamba_num_heads: Count | None
    mamba_head_dim: Count
    mamba_num_groups: Count
    mamba_state_dim: Count
    hybrid_layer_pattern: str
    """One letter a layer: M Mamba, * attention, - MLP, E experts (Nemotron-H)."""


class CoreTraining:
    """What a run may choose for itself."""

    moe_router_load_balancing_type: Balance | list[Balance]
    moe_aux_loss_coeff: Coefficient | list[Coefficient]
    """Weight of the balancing losses, one a type."""
    moe_z_loss_coeff: Coefficient | None
    """Weight of the router's z-loss (arXiv 2202.08906)."""
    moe_router_bias_update_rate: Annotated[float, Number(0, 1)]
    """Step of the expert bias."""
    moe_router_dtype: Annotated[str, Words("fp32", "fp64")] | None
    """Of the router's scores; not given: that of the weights."""
    moe_token_dispatcher_type: Annotated[str, Words("alltoall")]
    disable_bf16_reduced_precision_matmul: bool
    """On CUDA: products of bf16 matrices are added up in fp32 alone."""
    attention_dropout: Annotated[float, Number(0, 0)]
    """Only 0: there is no dropout here."""
    hidden_dropout: Annotated[float, Number(0, 0)]
    """Only 0: there is no dropout here."""
    transformer_impl: Annotated[str, Words("local")]
    """Only local: layers are built without TransformerEngine."""


EFFECTIVE = kinds(CoreArchitecture) | kinds(CoreTraining)
"""{field of TransformerConfig: what it may be}"""
