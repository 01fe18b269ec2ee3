"""Tiny random Hugging Face folders, one or more a family, each with the family's features on."""

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "moe_intermediate_size": 48}
MOE = {"num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1}
KEYS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 24, "rope_parameters": LLAMA3_ROPE},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "phi3": {"model_type": "phi3"},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24},
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24},
    "olmo2": {"model_type": "olmo2"},
    "nemotron": {"model_type": "nemotron"},
    "deepseek_v2": dict(
        model_type="deepseek_v2",
        num_key_value_heads=4,
        q_lora_rank=None,
        n_shared_experts=2,
        topk_method="greedy",
        n_group=None,
        topk_group=None,
        **MLA,
        **MOE,
    ),
    "deepseek_v3": dict(
        model_type="deepseek_v3",
        q_lora_rank=24,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        num_key_value_heads=4,
        **MLA,
        **MOE,
    ),
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
    "llama4_text": {
        "model_type": "llama4_text",
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 80,
        "interleave_moe_layer_step": 2,
        "moe_layers": None,
    },
}
BUILT = tuple(name for name in KEYS if name not in ("deepseek_v2", "deepseek_v3"))
"""Those that model/ can build."""
EXACT = tuple(name for name in BUILT if name != "llama4_text")
"""Those of them that compute what transformers computes; Llama 4 differs in its layers without RoPE."""


def tiny_folder(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Saves a random model of KEYS[name] in `folder` and returns it, in eval mode.

    Norm weights and biases are random too: a mistake in them would not show on ones and zeros.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SIZES, **KEYS[name]})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model
