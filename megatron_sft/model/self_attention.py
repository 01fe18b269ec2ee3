"""megatron-core's self attention for packed rows: the rotary table is gathered by position, some norms span all heads."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from megatron_sft.config.run import ModelConfig
from megatron_sft.kernels.rope import norm_and_turn
from megatron_sft.model.layers import HeadsNorm, RMSNorm, wait_for_parameters
from megatron_sft.model.pattern import layer_window, layers_without_rope


class PackedSelfAttention(SelfAttention):
    """Takes the table of RotaryTable.gather; layers with a window may have a kind of their own (Gemma 3)."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        model: ModelConfig = config.sft_model
        local = model.rotary_base_local is not None and layer_window(model, self.layer_number - 1) is not None
        self.rotary_kind = 1 if local else 0
        self.skips_rope = layers_without_rope(model)[self.layer_number - 1]
        self.has_temperature = model.attn_temperature_scale is not None
        if config.qk_l2_norm and self.skips_rope:
            self.q_layernorm = self.k_layernorm = None  # Llama 4 has this norm only beside RoPE
        if model.qk_layernorm_full:
            eps = config.layernorm_epsilon
            self.q_layernorm = HeadsNorm(config, self.query_projection_size, eps, self.tp_group)
            self.k_layernorm = HeadsNorm(config, self.kv_projection_size, eps, self.tp_group)
        self.fuses = config.sft_triton and self._fits_kernel(model)
        self._table: torch.Tensor | None = None

    def _fits_kernel(self, model: ModelConfig) -> bool:
        """Whether kernels/rope.py does what this layer does: RoPE of whole heads in two halves, a norm a head or none."""
        norms = self.q_layernorm, self.k_layernorm
        plain = all(isinstance(norm, RMSNorm) for norm in norms) or not (model.qk_layernorm or model.qk_layernorm_full)
        turned = model.position_embedding_type != "none" and not self.skips_rope and model.rotary_percent == 1.0
        gated = getattr(self.config, "attention_output_gate", False)
        whole = self.config.num_query_groups >= self.tp_group.size()  # else a group's queries are dealt to several ranks
        return plain and turned and whole and not (gated or model.rotary_interleaved or self.config.qk_l2_norm)

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        """As megatron-core's; `rotary_pos_emb` is [T, kinds, 2, dim] or None."""
        table = kwargs.pop("rotary_pos_emb", None)
        chosen: Any = None
        if self.skips_rope:
            chosen = (table[:, -1], None) if self.has_temperature else None  # queries alone
        elif table is not None:
            chosen = table[:, self.rotary_kind]
        if self.fuses:
            self._table, chosen = chosen, None
        return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=chosen, **kwargs)

    def get_query_key_value_tensors(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As megatron-core's; by the kernel queries and keys are turned already."""
        if not self.fuses:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        assert self._table is not None, "a model with RoPE has a table"
        mixed, _ = self.linear_qkv(hidden_states)
        groups, dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        weights = self._norm_weight(self.q_layernorm), self._norm_weight(self.k_layernorm)
        mixed = mixed.view(mixed.shape[0], groups, -1, dim)
        heads = norm_and_turn(mixed, self._table, *weights, self.config.layernorm_epsilon)
        return tuple(x[:, None] for x in heads)

    def _norm_weight(self, norm: Any) -> torch.Tensor | None:
        if not isinstance(norm, RMSNorm):
            return None
        wait_for_parameters(norm)
        return norm.weight + 1 if norm.zero_centered else norm.weight


class PackedMLASelfAttention(MLASelfAttention):
    """Latent attention (DeepSeek). megatron-core's makes a rotary table a layer, by place in the document.

    modelopt's importer knows latent attention by these letters of the name.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        del self.rotary_pos_emb  # a module, which could be replaced by modules only: each forward pass brings its table
        if self.tp_group.size() > 1:
            self.linear_kv_down_proj.register_forward_hook(self._gather_latents)

    def _gather_latents(self, module: Any, inputs: Any, output: tuple) -> tuple:
        """The down projection whole on every rank: [T, 1, latent], or [T / tp, 1, latent] with sequence parallelism.

        megatron/core/transformer/multi_latent_attention.py:get_query_key_value_tensors gathers it too, but the gradient
        of the rotary part is then that of this rank's heads alone (0.16.1 and 0.19.2).
        """
        latents = gather_from_tensor_model_parallel_region(output[0], group=self.tp_group)
        if self.config.sequence_parallel:  # gathered again with a gradient that is added up
            return scatter_to_sequence_parallel_region(latents, group=self.tp_group), output[1]
        latent, rotary = latents.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        return torch.cat((latent, copy_to_tensor_model_parallel_region(rotary, group=self.tp_group)), dim=-1), output[1]

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """The modules of the spec as they are.

        From 0.17 on (mla_qk_norm_config.py:QKNormConfigResolver), megatron-core takes TransformerEngine's fused norm and
        projection where queries are not compressed (DeepSeek-V2-Lite, whose queries have no norm).
        """
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        """As megatron-core's; `rotary_pos_emb` is [T, 1, 2, dim]."""
        table = kwargs.pop("rotary_pos_emb")[:, 0]
        self.rotary_pos_emb = GatheredTable(table, self.config.rope_type)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)


class GatheredTable:
    """Stands where MLASelfAttention expects its RotaryEmbedding or YarnRotaryEmbedding, and gives this row's table.

    No module: DDP with --overlap-param-gather must not find one that was not there when it was made.
    """

    def __init__(self, table: torch.Tensor, rope_type: str):
        self.table, self.rope_type = table, rope_type

    def get_rotary_seq_len(self, *args: Any) -> int:
        """Not used: the table is gathered already."""
        return self.table.shape[0]

    def __call__(self, length: int, packed_seq: bool = False) -> Any:
        """The table; with YaRN also its factor, which is in the table."""
        return self.table if self.rope_type == "rope" else (self.table, 1.0)
