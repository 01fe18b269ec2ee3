"""From ModelConfig to megatron-core's GPTModel with packed attention and a head that never holds full logits."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_sft.config.problems import core_problems
from megatron_sft.config.run import ModelConfig, ParallelConfig, TrainConfig
from megatron_sft.core_compat import (
    apply_gathered_rope,
    balance_experts_by_row,
    device,
    keep_frozen_expert_bias,
    leave_sorted_tokens,
    provide_latent_projections,
)
from megatron_sft.errors import ConfigError
from megatron_sft.kernels import takes_triton
from megatron_sft.model.attention import PackedAttention
from megatron_sft.model.backend import choose_backend
from megatron_sft.model.context import token_lengths
from megatron_sft.model.head import Head, Output
from megatron_sft.model.layers import HeadsNorm, WholeLinear, wait_for_parameters
from megatron_sft.model.lora import NAME, adapters_of
from megatron_sft.model.lora_ends import HeadAdapter
from megatron_sft.model.loss import CROSS_ENTROPY, TokenLoss
from megatron_sft.model.noise import add_noise
from megatron_sft.model.rope import RotaryTable, rotate
from megatron_sft.model.specs import block_spec

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "squared_relu": squared_relu,
    "quick_gelu": quick_gelu,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SFTModel(GPTModel):
    """GPTModel for packed rows: RoPE follows position_ids, and one head gives losses, logits or hidden states.

    Args:
        model: the architecture.
        config: what transformer_config made of it.
        vp_stage: virtual pipeline stage; None without.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, vp_stage: int | None):
        super().__init__(
            config,
            block_spec(model, config, vp_stage),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            parallel_output=True,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            position_embedding_type="none",  # the table is ours
            vp_stage=vp_stage,
        )
        self.vocab_rows, self.final_softcap = model.vocab_size, model.final_logit_softcapping
        self.embedding_scale = model.embedding_scale
        self.token_loss = CROSS_ENTROPY
        """What a token costs in training; one that is held out costs its cross-entropy."""
        latent_dim = config.qk_pos_emb_head_dim if config.multi_latent_attention else None
        self.rotary_table = RotaryTable(model, latent_dim) if model.position_embedding_type != "none" else None

    hf_model_type = ""
    """Of the config.json that the weights came with, where one is known: the family whose names adapters have."""
    base_weights = ""
    """Fingerprint of the weights beside adapters (hf/adapters.py); "" without adapters."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron-core's description of all parameters; of a model with adapters, theirs alone."""
        adapters = adapters_of(self)
        if not adapters:
            return dict(super().sharded_state_dict(prefix, sharded_offsets, metadata))
        parts = (adapter.sharded_parameters(f"{prefix}{name}.") for name, adapter in adapters.items())
        return {name: value for part in parts for name, value in part.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; a model with adapters takes them alone."""
        adapters = {f"{name}.{key}" for name, adapter in adapters_of(self).items() for key, _ in adapter.named_parameters()}
        assert not (adapters and strict) or state_dict.keys() == adapters, "a checkpoint of adapters has all of them, and no more"
        return super().load_state_dict(state_dict, strict and not adapters, assign)

    def head(self) -> Head:
        """The head of the last stage's chunk, with its weight as it is now."""
        wait_for_parameters(self.output_layer)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        if isinstance(adapter := getattr(self.output_layer, NAME, None), HeadAdapter):
            wait_for_parameters(adapter)
            weight = adapter.widened(weight)
        group = parallel_state.get_tensor_model_parallel_group()
        return Head(weight, self.vocab_rows, self.final_softcap, group, self.config.sft_triton)

    def forward(  # in place of GPTModel's, which knows no head of ours and no table by position
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: None = None,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        noise: tuple[torch.Tensor, torch.Tensor] | None = None,
        output: Output | None = None,
        trained: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One pass over a packed row; T counts this context-parallel rank's tokens.

        Args:
            tokens: [1, T] int64.
            position_ids: [1, T] int64.
            attention_mask: not used: packed_seq_params says who sees whom.
            labels: [1, T] int64, or None.
            loss_mask: [1, T] float32; None: every token counts.
            padding_mask: [1, T] bool, True where experts need no balance.
            packed_seq_params: where documents begin in the whole row.
            noise: (keys [1, T] int64, bounds [1, T] float32) of noise.py; None: embeddings as they are.
            output: what the last stage gives; None: with labels losses [1, T] float32, 0 where loss_mask is 0, else
                logits [1, T, padded_vocab_size / tp_size].
            trained: [n] int64, where loss_mask is not 0; None: the device is asked, and waited for.

        Returns:
            On the last stage the output; before it hidden states [T, 1, hidden], cut by sequence parallelism.
        """
        sequence_parallel = self.config.sequence_parallel
        table = None
        if self.rotary_table is not None:
            lengths, count = None, position_ids.shape[1]
            if self.rotary_table.original_positions is not None:
                lengths = token_lengths(packed_seq_params, count)
            table = self.rotary_table.gather(position_ids, lengths, self.config.params_dtype)
        if padding_mask is not None and sequence_parallel:
            padding_mask = scatter_to_sequence_parallel_region(padding_mask.transpose(0, 1).contiguous()).transpose(0, 1)
        hidden = self.decoder(
            hidden_states=self._embedded(tokens, position_ids, noise) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=table,
            packed_seq_params=packed_seq_params,
            padding_mask=padding_mask,
        )
        if not self.post_process:
            return hidden
        gather = gather_from_sequence_parallel_region if sequence_parallel else copy_to_tensor_model_parallel_region
        states, head = gather(hidden)[:, 0], self.head()
        if isinstance(adapter := getattr(self.output_layer, NAME, None), HeadAdapter):
            states = adapter(states)
        if output is not None:
            return output(head, states)
        if labels is None:
            return head.logits(states)[None]
        mask = torch.ones_like(labels[0]).float() if loss_mask is None else loss_mask[0]
        return head.losses(states, labels[0], mask, self.token_loss if self.training else CROSS_ENTROPY, trained)[None]

    def _embedded(
        self, tokens: torch.Tensor, position_ids: torch.Tensor, noise: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        hidden = self.embedding(input_ids=tokens, position_ids=position_ids)
        if self.config.recompute_granularity and torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.requires_grad_()  # of a frozen embedding: torch recomputes only what an input's gradient asks for
        if self.embedding_scale is not None:  # rounded, as transformers does
            hidden = hidden * torch.full((), self.embedding_scale, dtype=hidden.dtype, device=hidden.device)
        if noise is None:
            return hidden
        keys, bounds = (part[0] for part in noise)
        if self.config.sequence_parallel:
            keys, bounds = scatter_to_sequence_parallel_region(keys), scatter_to_sequence_parallel_region(bounds)
        return add_noise(hidden, keys, bounds)


def transformer_config(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> TransformerConfig:
    """megatron-core's configuration of the layers; kernels that need TransformerEngine or Apex are off.

    Raises:
        ConfigError: a setting of ModelConfig.core has no effect, or megatron-core refuses the settings together.
    """
    if problems := core_problems(model.core):
        raise ConfigError(problems)
    dtype = DTYPES[train.params_dtype]
    fields: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        layernorm_zero_centered_gamma=model.norm_zero_centered,
        activation_func=ACTIVATIONS[model.activation],
        gated_linear_unit=model.gated_mlp,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        init_method_std=model.init_method_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=train.params_dtype == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=not torch.cuda.is_available() or torch.get_default_device().type == "meta",
        perform_initialization=False,
        calculate_per_token_loss=True,
        moe_token_dispatcher_type="alltoall",
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        recompute_granularity=train.recompute_granularity,
        recompute_method=train.recompute_method,
        recompute_num_layers=train.recompute_num_layers,
        recompute_modules=list(train.recompute_modules) or None,
        deterministic_mode=train.deterministic_mode,
        **_layout_fields(parallel),
    )
    latent = model.mla.multi_latent_attention
    if latent:
        fields |= dict(rotary_base=model.rotary_base, rotary_percent=model.rotary_percent)
    kind = MLATransformerConfig if latent else TransformerConfig
    core = model.core_fields()
    is_hybrid = core.pop("hybrid_layer_pattern", None) is not None
    config = _accepted(kind, {**fields, **core})
    config.hetereogenous_dist_checkpoint |= is_hybrid  # a name for each layer, as MambaModel has
    config.no_rope_freq = None  # megatron-core would take the table away that scales queries in these layers
    _add_ours(config, model, parallel, train)
    return config


def _add_ours(config: Any, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> None:
    """What our modules need beyond megatron-core's fields."""
    config.sft_model = model
    config.sft_cp_comm_type = parallel.cp_comm_type
    config.sft_backend = choose_backend(train.attention_backend, model, train.params_dtype)
    config.sft_triton = takes_triton(train.kernels)


def _accepted(kind: type, fields: dict[str, Any]) -> Any:
    """The configuration; what megatron-core's __post_init__ refuses, by assertion or ValueError, is a ConfigError."""
    try:
        return kind(**fields)
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            [
                f"megatron-core's {kind.__name__} refuses the model: {' '.join(str(error).split())} Expected fields that go "
                "together. Correct or leave out the flags of these names."
            ]
        ) from None


def _layout_fields(parallel: ParallelConfig) -> dict[str, Any]:
    """What TransformerConfig says of the cut over processes.

    A micro-batch is as long as its packs; the interleaved schedule knows one shape a step (step.py), and needs
    overlapped sends, because with two stages both neighbours are the same process (megatron/training/arguments.py).
    """
    is_interleaved = bool(parallel.virtual_pipeline_model_parallel_size)
    return dict(
        variable_seq_lengths=not is_interleaved,
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
    )


def build_model(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> list[SFTModel]:
    """This rank's model chunks on its device, with weights that are still to be loaded.

    Returns:
        One chunk, or one a virtual pipeline stage.
    """
    apply_gathered_rope(rotate)
    balance_experts_by_row()
    keep_frozen_expert_bias()
    leave_sorted_tokens()
    provide_latent_projections(WholeLinear)
    config = transformer_config(model, parallel, train)
    stages = parallel.virtual_pipeline_model_parallel_size
    chunks = [_chunk(model, config, stage) for stage in (range(stages) if stages else [None])]
    for chunk in chunks:
        chunk.token_loss = TokenLoss(train.loss_type, train.label_smoothing, train.z_loss_coeff)
    return chunks


def _chunk(model: ModelConfig, config: TransformerConfig, vp_stage: int | None) -> SFTModel:
    chunk = SFTModel(model, config, vp_stage)
    _mark_tensor_parallel(chunk)
    return chunk if torch.get_default_device().type == "meta" else chunk.to(device())  # meta: shapes alone


def _mark_tensor_parallel(chunk: SFTModel) -> None:
    """Says which weights are cut over tensor-parallel ranks; the gradient norm counts the others once only.

    megatron/core/tensor_parallel/layers.py does it while it draws fresh weights, which are not drawn here. It takes experts
    for dense weights where ETP is not TP and EP is 1, and leaves the gradients of the other ranks' tokens out.
    """
    config = chunk.config
    is_cut_alike = config.expert_tensor_parallel_size == config.tensor_model_parallel_size
    for module in chunk.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            cut = {"weight": 0}  # their biases are marked
        elif isinstance(module, RowParallelLinear):
            cut = {"weight": 1}
        elif isinstance(module, (HeadsNorm, PackedAttention)):
            cut = {"weight": 0, "softmax_offset": 0}
        else:
            continue
        for name, dim in cut.items():
            parameter = getattr(module, name, None)
            if parameter is not None and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
            if parameter is not None and getattr(module, "is_expert", False) and not is_cut_alike:
                parameter.allreduce = False  # its gradient is added up over the expert data-parallel ranks
