"""Floating-point operations of training, counted on what attention really computes."""

from megatron_sft.config.run import ModelConfig


def train_flops(model: ModelConfig, tokens: int, squared_lengths: int) -> float:
    """FLOPs of forward and backward over packed documents, without recomputation.

    6 a matmul parameter and token, plus attention within documents only (causal: half of length^2). A mixture of
    experts counts the experts that a token visits.

    Args:
        model: the architecture.
        tokens: tokens without padding.
        squared_lengths: sum over documents of length^2.
    """
    query = model.num_attention_heads * model.kv_channels
    attention = model.hidden_size * (2 * query + 2 * model.num_query_groups * model.kv_channels)
    matrices = 3 if model.gated_mlp else 2
    width = model.ffn_hidden_size
    if model.core.get("num_moe_experts"):
        width = model.core.get("moe_ffn_hidden_size", width) * model.core.get("moe_router_topk", 2)
        width += model.core.get("moe_shared_expert_intermediate_size") or 0
    layer = attention + matrices * model.hidden_size * width
    parameters = model.num_layers * layer + model.vocab_size * model.hidden_size
    return 6.0 * parameters * tokens + 6.0 * model.num_layers * query * squared_lengths
