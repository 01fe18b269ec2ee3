"""Which of megatron-core's settings have an effect here, what they may be and what they are by default.

Their flags are their names (--moe-router-topk), wherever a ModelConfig has them: in its records `moe`, `mla` and `mamba`, or in
its mapping `core` (ModelConfig.with_core puts each in its place). The records' defaults are megatron-core's, but for
q_lora_rank, which is Megatron-LM's. Any other field of its TransformerConfig would change nothing, or what this project does not
do; its flag is refused (flags.REFUSED says why). tests/unit/model/test_core_fields.py walks over all of both versions, and sees
the effect of each.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from megatron_sft.config.fields import Count, Number, Parts, Words

Balance = Annotated[str, Words("aux_loss", "seq_aux_loss", "global_aux_loss", "none")]
Coefficient = Annotated[float, Number(0, 1000)]
Layers = Annotated[int, Number(0)]


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts: what a token's way through them computes. CoreTraining says how the router is trained."""

    num_moe_experts: Parts | None = None
    """Routed experts of a layer; not given: the model has none."""
    moe_ffn_hidden_size: Count | None = None
    """Width of one expert; not given: ffn_hidden_size."""
    moe_layer_freq: Layers | list[Layers] = 1
    """Every n-th layer has experts, or a list with 1 where one has: ([0]*3+[1]*58)."""
    moe_latent_size: Count | None = None
    """Width of the space in which experts work; not given: hidden_size."""
    moe_router_topk: Count = 2
    """Experts a token."""
    moe_router_score_function: Annotated[str, Words("softmax", "sigmoid")] = "softmax"
    """Of the experts' scores."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts, before the best are chosen."""
    moe_router_num_groups: Count | None = None
    """Groups of experts, of which moe_router_group_topk are chosen first."""
    moe_router_group_topk: Count | None = None
    """Groups a token."""
    moe_router_topk_scaling_factor: Annotated[float, Number(1e-6, 1e6)] | None = None
    """The chosen experts' weights are multiplied by it."""
    moe_router_enable_expert_bias: bool = False
    """A bias that is added when experts are chosen, and moved towards balance."""
    moe_shared_expert_intermediate_size: Count | None = None
    """Width of the expert that every token takes."""
    moe_apply_probs_on_input: bool = False
    """Experts' inputs are weighted, not their outputs (Llama 4)."""


@dataclass(frozen=True)
class MLAConfig:
    """Latent attention (DeepSeek)."""

    multi_latent_attention: bool = False
    """Keys and values from a latent vector (DeepSeek)."""
    q_lora_rank: Count | None = None
    """Width of the queries' latent vector; not given: queries are not compressed."""
    kv_lora_rank: Count = 512
    """Width of the latent vector of keys and values."""
    qk_head_dim: Count = 128
    """Width of a head's queries and keys that RoPE does not turn."""
    qk_pos_emb_head_dim: Count = 64
    """Width of what it turns."""
    v_head_dim: Count = 128
    """Width of a head's values."""
    rope_type: Annotated[str, Words("rope", "yarn")] = "yarn"
    """Of latent attention."""
    rotary_scaling_factor: Annotated[float, Number(1, 1e6)] = 40.0
    """YaRN: by how much longer contexts are."""
    original_max_position_embeddings: Count = 4096
    """YaRN: longest position before."""
    beta_fast: Annotated[float, Number(1e-3, 1e6)] = 32.0
    """YaRN: turns above which a frequency stays."""
    beta_slow: Annotated[float, Number(1e-3, 1e6)] = 1.0
    """YaRN: turns below which a frequency is divided."""
    mscale: Annotated[float, Number(0, 1000)] = 1.0
    """YaRN: of the attention scores' scale."""
    mscale_all_dim: Annotated[float, Number(0, 1000)] = 0.0
    """YaRN: the same for all widths."""


@dataclass(frozen=True)
class MambaConfig:
    """Hybrid models (Nemotron-H): Mamba-2 layers among others."""

    hybrid_layer_pattern: str | None = None
    """One letter a layer: M Mamba, * attention, - MLP, E experts (Nemotron-H)."""
    mamba_num_heads: Count | None = None
    """Heads of a Mamba layer."""
    mamba_head_dim: Count = 64
    """Width of one."""
    mamba_num_groups: Count = 8
    """Groups of B and C."""
    mamba_state_dim: Count = 128
    """Width of the state."""


class CoreArchitecture:
    """What else belongs to the function that the weights compute; in ModelConfig.core."""

    qk_l2_norm: bool
    """A norm without weight over queries and keys (Llama 4)."""
    softmax_type: Annotated[str, Words("vanilla", "learnable")]
    """learnable: a sink for each head (gpt-oss)."""
    glu_linear_offset: Annotated[float, Number(-1000, 1000)]
    """Added to the half that is not gated (gpt-oss)."""
    activation_func_clamp_value: Annotated[float, Number(1e-3, 1e6)] | None
    """Both halves are cut off there (gpt-oss)."""


class CoreTraining:
    """What a run may choose for itself; in ModelConfig.core."""

    moe_router_load_balancing_type: Balance | list[Balance]
    """Balancing losses of the router."""
    moe_aux_loss_coeff: Coefficient | list[Coefficient]
    """Weight of the balancing losses, one a type."""
    moe_z_loss_coeff: Coefficient | None
    """Weight of the router's z-loss (arXiv 2202.08906)."""
    moe_router_bias_update_rate: Annotated[float, Number(0, 1)]
    """Step of the expert bias."""
    moe_router_dtype: Annotated[str, Words("fp32", "fp64")] | None
    """Of the router's scores; not given: that of the weights."""
    moe_token_dispatcher_type: Annotated[str, Words("alltoall")]
    """Only alltoall."""
    disable_bf16_reduced_precision_matmul: bool
    """On CUDA: products of bf16 matrices are added up in fp32 alone."""
    attention_dropout: Annotated[float, Number(0, 0)]
    """Only 0: there is no dropout here."""
    hidden_dropout: Annotated[float, Number(0, 0)]
    """Only 0: there is no dropout here."""
    transformer_impl: Annotated[str, Words("local")]
    """Only local: layers are built without TransformerEngine."""


RECORDS: Mapping[str, type] = {"moe": MoEConfig, "mla": MLAConfig, "mamba": MambaConfig}
"""By their names in ModelConfig. A model has the part if the first field says so; else the others mean nothing."""
RECORD_OF: Mapping[str, str] = {field.name: name for name, kind in RECORDS.items() for field in dataclasses.fields(kind)}
"""Name of megatron-core -> record."""


def has_part(record: Any) -> bool:
    """Whether a model with this record has experts, latent attention, Mamba layers."""
    return bool(getattr(record, dataclasses.fields(record)[0].name))


def record_fields(record: Any) -> dict[str, Any]:
    """All fields of a part that the model has; of one that it has not, those that are not the default."""
    every = has_part(record)
    values = {field.name: (getattr(record, field.name), field.default) for field in dataclasses.fields(record)}
    return {name: value for name, (value, default) in values.items() if every or value != default}
