"""Tiny random Hugging Face folders, one or more a family, each with the family's features on."""

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_sft.config.run import CheckpointConfig, DataConfig, ParallelConfig, RunConfig, TrainConfig

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
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
MSCALE = {"mscale": 1.0, "mscale_all_dim": 0.7}
LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.4, 2.0],
    "long_factor": [1.0, 1.3, 2.0, 4.0, 9.0, 20.0],
}
WINDOW = 8
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "moe_intermediate_size": 48}
MOE = {"num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1}
GEMMA = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}
HYBRID = {
    "model_type": "nemotron_h",
    "head_dim": 16,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "time_step_min": 1e-9,  # transformers limits steps to it, where the models were trained nothing does
}
KEYS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 24, "rope_parameters": LLAMA3_ROPE},
    "llama-tied": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 0]},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rope_parameters": YARN_ROPE},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW, "head_dim": 32},
    "phi3": {
        "model_type": "phi3",
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONG_ROPE,
        "original_max_position_embeddings": 32,
        "sliding_window": WINDOW,
    },
    "phi3-long": {  # documents longer than the original positions
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONG_ROPE,
        "original_max_position_embeddings": 6,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
    },
    "gemma2": {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **GEMMA},
    "gemma3_text": {
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **GEMMA,
    },
    "olmo2": {"model_type": "olmo2"},
    "nemotron": {"model_type": "nemotron"},
    "deepseek_v2": dict(
        model_type="deepseek_v2",
        num_key_value_heads=4,
        q_lora_rank=None,
        n_shared_experts=2,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        rope_parameters={**YARN_ROPE, **MSCALE},
        **MLA,
        **MOE,
    ),
    "deepseek_v2-compressed": dict(
        model_type="deepseek_v2",
        num_key_value_heads=4,
        q_lora_rank=24,
        n_shared_experts=1,
        topk_method="greedy",
        n_group=None,
        topk_group=None,
        routed_scaling_factor=1.5,
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
        rope_parameters={**YARN_ROPE, **MSCALE},
        **MLA,
        **MOE,
    ),
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "swiglu_limit": 0.5,
        "rope_parameters": {**YARN_ROPE, "truncate": False},
    },
    "nemotron_h": {
        **HYBRID,
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"],
    },
    "nemotron_h-moe": {
        **HYBRID,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_routed_experts": 4,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 40,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    "nemotron_h-latent": {
        **HYBRID,
        "layers_block_type": ["moe", "linear_attention", "moe", "full_attention"],
        "n_routed_experts": 4,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 40,
        "moe_latent_size": 24,
        "routed_scaling_factor": 2.0,
    },
    "llama4_text": {
        "model_type": "llama4_text",
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 80,
        "interleave_moe_layer_step": 2,
        "moe_layers": None,
        "no_rope_layers": [1, 0, 1, 0],
        "attention_chunk_size": WINDOW,
        "attn_temperature_tuning": True,
        "floor_scale": 4,
        "attn_scale": 0.3,
        "rope_parameters": LLAMA3_ROPE,
    },
}


def conversion_run(load: Path | str, like: Path | str = "", parallel: ParallelConfig | None = None, **places: Any) -> RunConfig:
    """The run of `megatron-sft convert` or `export`; `like` is --tokenizer-model, places are save, save_hf and importer."""
    checkpoint = CheckpointConfig(load=str(load), **{name: str(place) for name, place in places.items()})
    data, train = DataConfig(tokenizer_model=str(like)), TrainConfig(params_dtype="bf16")
    return RunConfig(parallel=parallel or ParallelConfig(), data=data, train=train, checkpoint=checkpoint)


def tiny_folder(name: str, folder: Path, dtype: torch.dtype = torch.float32, num_layers: int = 4) -> Any:
    """Saves a random model of KEYS[name] in `folder` and returns it, in eval mode.

    Norm weights, biases, sinks and the router's expert bias are random too: a mistake in them would not show on ones
    and zeros.
    """
    keys = {**SIZES, **KEYS[name], "num_hidden_layers": num_layers}
    keys.update({key: keys[key][:num_layers] for key in ("layer_types", "no_rope_layers", "layers_block_type") if key in keys})
    model, files = _saved(json.dumps(keys), dtype)
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    torch.manual_seed(0)
    return copy.deepcopy(model)


@functools.cache
def _saved(keys: str, dtype: torch.dtype) -> tuple[Any, dict[str, bytes]]:
    """The model of a config.json and the files that transformers saves of it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**json.loads(keys))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("bias") or (tensor.dim() == 1 and tensor.requires_grad):
                tensor.add_(torch.randn_like(tensor) * 0.2)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, {path.name: path.read_bytes() for path in Path(folder).iterdir()}
