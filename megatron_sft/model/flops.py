"""Floating-point operations of a model by kind of layer, as formulas: what its matrices and its attention have to do.

Counted, two a multiplication: products with weights; attention's two products over the keys that a query sees, within its
document, window or chunk; the experts that a token visits and their router; Mamba's scan as the recurrence that it is, two to
update and two to read an element of the state; the head over trained tokens and over the rows that are no padding.
Not counted: element by element work (norms, softmax, RoPE, activations, Mamba's convolution of 4 tokens), lookups, padding,
masked corners of a kernel's blocks, and what the scan's form by chunks does beyond the recurrence.
Backward is twice forward: tests/unit/model/test_flops.py holds all of it against torch.utils.flop_counter.
"""

import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

from megatron_sft.config.run import ModelConfig
from megatron_sft.model.pattern import layer_chunk, layer_kinds, layer_window

NAMES: Mapping[str, str] = {"*": "attention", "-": "mlp", "E": "experts", "M": "mamba"}
"""By the letters of layer_kinds."""
PEAK_TFLOPS: Mapping[str, float] = {
    "A10": 125.0,
    "A10G": 70.0,
    "A100": 312.0,
    "A800": 312.0,
    "L4": 121.0,
    "L40S": 362.0,
    "H20": 148.0,
    "H100": 989.4,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H200": 989.4,
    "H800": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
}
"""Dense bf16 of NVIDIA's data sheets, by a part of the name that CUDA gives the device."""


def peak_tflops(device: str) -> float | None:
    """Of a device by its name, "NVIDIA H100 80GB HBM3"; None: not known."""
    names = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device)]
    return PEAK_TFLOPS[max(names, key=len)] if names else None


def forward_flops(model: ModelConfig, lengths: np.ndarray, trained_tokens: int) -> dict[str, float]:
    """FLOPs of one forward pass by kind: those of NAMES, and head.

    Args:
        model: the architecture.
        lengths: int [documents], what attention treats as one document, without padding.
        trained_tokens: tokens that have a loss.
    """
    tokens = float(np.sum(lengths))
    counts = Counter("".join(layer_kinds(model)))
    by_token = {"*": _projections(model), "-": _mlp(model, model.ffn_hidden_size)}
    if counts["E"]:
        by_token["E"] = _experts(model)
    if counts["M"]:
        by_token["M"] = _mamba(model)
    by_kind = {NAMES[letter]: counts[letter] * tokens * flops for letter, flops in by_token.items()}
    by_kind["attention"] += _pair(model) * sum(seen_pairs(lengths, *sight) * times for sight, times in _sights(model).items())
    return {**by_kind, "head": 2.0 * model.hidden_size * model.vocab_size * trained_tokens}


def train_flops(model: ModelConfig, lengths: np.ndarray, trained_tokens: int) -> float:
    """FLOPs that a training step has to do, forward and backward: no operation is counted that is only done again."""
    return 3 * sum(forward_flops(model, lengths, trained_tokens).values())


def computed_flops(model: ModelConfig, lengths: np.ndarray, trained_tokens: int, recomputes: bool = False) -> float:
    """train_flops and what is done again: the head's logits (model/loss.py), and all layers with full recomputation."""
    forward = forward_flops(model, lengths, trained_tokens)
    head = forward.pop("head")
    return (4 if recomputes else 3) * sum(forward.values()) + 4 * head


def seen_pairs(lengths: np.ndarray, window: int | None, chunk: int | None) -> int:
    """Pairs of a query and a key that it sees, its own included: [3, 2] -> 6 + 3; [3], window 2 -> 1 + 2 + 2.

    Args:
        lengths: int [documents].
        window: newest tokens that a query sees; None: all.
        chunk: documents are cut into pieces of this many tokens; None: whole.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if chunk:
        lengths = np.concatenate([np.full(int((lengths // chunk).sum()), chunk), lengths % chunk])
    short = lengths if window is None else np.minimum(lengths, window)
    return int((short * (short + 1) // 2 + (lengths - short) * short).sum())


def _sights(model: ModelConfig) -> Counter[tuple[int | None, int | None]]:
    """How many attention layers have each (window, chunk)."""
    kinds = layer_kinds(model)
    return Counter((layer_window(model, i), layer_chunk(model, i)) for i, kind in enumerate(kinds) if "*" in kind)


def _pair(model: ModelConfig) -> float:
    """Of one layer, a query and a key that it sees, all heads: their score and the value's share."""
    mla = model.mla
    if mla.multi_latent_attention:
        return 2.0 * model.num_attention_heads * (mla.qk_head_dim + mla.qk_pos_emb_head_dim + mla.v_head_dim)
    return 2.0 * model.num_attention_heads * 2 * model.kv_channels


def _projections(model: ModelConfig) -> float:
    """Of one attention layer and token: queries, keys and values, and back to the residual stream."""
    hidden, heads, mla = model.hidden_size, model.num_attention_heads, model.mla
    if not mla.multi_latent_attention:
        return 2.0 * hidden * model.kv_channels * 2 * (heads + model.num_query_groups)
    query, rank = heads * (mla.qk_head_dim + mla.qk_pos_emb_head_dim), mla.q_lora_rank
    products = rank * (hidden + query) if rank else hidden * query
    products += hidden * (mla.kv_lora_rank + mla.qk_pos_emb_head_dim)
    products += mla.kv_lora_rank * heads * (mla.qk_head_dim + mla.v_head_dim)
    return 2.0 * (products + heads * mla.v_head_dim * hidden)


def _mlp(model: ModelConfig, width: int, hidden: int | None = None) -> float:
    """Of one token in an MLP of this width."""
    return 2.0 * (3 if model.gated_mlp else 2) * (hidden or model.hidden_size) * width


def _experts(model: ModelConfig) -> float:
    """Of one token in a layer of experts: router, the experts that run, shared ones, the way into a latent space and back."""
    moe, hidden = model.moe, model.hidden_size
    routed = moe.moe_router_topk * _mlp(model, moe.moe_ffn_hidden_size or model.ffn_hidden_size, moe.moe_latent_size)
    shared = _mlp(model, moe.moe_shared_expert_intermediate_size or 0)
    return routed + shared + 2.0 * hidden * (moe.num_moe_experts or 0) + 4.0 * hidden * (moe.moe_latent_size or 0)


def _mamba(model: ModelConfig) -> float:
    """Of one token in a Mamba layer: projections in and out, and the scan."""
    mamba, heads = model.mamba, model.mamba.mamba_num_heads or 0
    inner, state = heads * mamba.mamba_head_dim, mamba.mamba_state_dim
    rows = 2 * inner + 2 * mamba.mamba_num_groups * state + heads
    return 2.0 * model.hidden_size * (rows + inner) + 4.0 * inner * state
