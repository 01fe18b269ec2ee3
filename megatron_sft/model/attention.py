"""Core attention over packed documents, in place of megatron-core's, which packs only with TransformerEngine.

CUDA: torch's varlen flash attention. CPU: one scaled_dot_product_attention a document. Never an S x S mask.
Context parallelism: all-to-all over heads (cp_comm_type a2a) or all-gather of keys and values (allgather).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams


def packed_seq_params(cu_seqlens: torch.Tensor, max_seqlen: int) -> PackedSeqParams:
    """megatron-core's description of a packed row.

    Args:
        cu_seqlens: [documents + 1] int32; lengths [3, 2] -> [0, 3, 5].
        max_seqlen: longest document, in tokens.
    """
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


@dataclass
class CachedSeqParams(PackedSeqParams):
    """A row of documents whose earlier tokens are in a cache: for generation.

    Prefill: cu_seqlens_q are the prompts, `lengths` zeros. Decode: each document has one new token.
    """

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    """By layer number: [documents, capacity, groups, head_dim]; the layer makes it on first use."""
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    """Tokens a document has in the cache before this row."""
    capacity: int = 0
    """Tokens a document can have in the cache."""


class PackedAttention(torch.nn.Module):
    """Causal attention within each document of a packed row.

    The interface is megatron-core's core_attention (megatron/core/transformer/attention.py:CoreAttention).

    Args:
        config: the TransformerConfig.
        layer_number: 1 for the first layer.
        attn_mask_type: causal in every spec of ours.
        attention_type: self attention in every spec of ours.
        softmax_scale: None: 1 / sqrt(head_dim).
        cp_comm_type: a2a or allgather.
        pg_collection: has the context-parallel group as `cp`.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ):
        super().__init__()
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attention of a packed row.

        Args:
            query: [tokens, heads, head_dim].
            key: [tokens, groups, head_dim].
            value: [tokens, groups, head_dim].
            packed_seq_params: where documents begin.

        Returns:
            [tokens, heads * head_dim].
        """
        assert packed_seq_params is not None, "PackedAttention needs packed_seq_params"
        offsets = packed_seq_params.cu_seqlens_q.tolist()
        parts = []
        for first, last in zip(offsets[:-1], offsets[1:], strict=True):
            q, k, v = (x[first:last].transpose(0, 1) for x in (query, key, value))
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=self.softmax_scale).transpose(0, 1))
        return torch.cat(parts).reshape(query.shape[0], -1)
