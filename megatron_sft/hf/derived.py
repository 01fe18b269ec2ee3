"""What one key of config.json alone does not say: pairs of functions, from its keys to fields of ModelConfig and back.

names.Family.derived names them. Keys that config.json leaves out or sets to null are given with the family's default,
or not at all. Fields of megatron-core's TransformerConfig are written `core.name`, wherever ModelConfig has them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from megatron_sft.config.fields import Amount, Count, Factor, Kind, Number, Share, kind_of
from megatron_sft.config.run import ModelConfig
from megatron_sft.model.pattern import layers_with_experts, layers_without_rope

Keys = Mapping[str, Any]
Fields = dict[str, Any]
KEY_KINDS: Mapping[str, Kind] = {
    key: kind_of(hint)
    for hint, keys in (
        (bool, "use_sliding_window norm_topk_prob"),
        (str, "hybrid_override_pattern rope_type type"),
        (list[str], "layer_types layers_block_type"),
        (list[int], "mlp_only_layers moe_layers no_rope_layers"),
        (Amount, "max_window_layers first_k_dense_replace n_shared_experts"),
        (
            Count,
            "sliding_window_pattern _sliding_window_pattern decoder_sparse_step moe_layer_freq interleave_moe_layer_step "
            "moe_intermediate_size v_head_dim no_rope_layer_interval floor_scale head_dim attention_head_dim n_group topk_group "
            "n_routed_experts moe_latent_size moe_shared_expert_intermediate_size num_experts_per_tok "
            "original_max_position_embeddings",
        ),
        (Factor, "query_pre_attn_scalar attn_scale routed_scaling_factor factor beta_fast beta_slow"),
        (Annotated[float, Number(0, 1000)], "mscale mscale_all_dim"),
        (Annotated[float, Number(1, 1e12)], "rope_local_base_freq rope_theta"),
        (Share, "partial_rotary_factor"),
    )
    for key in keys.split()
}
"""What the keys hold that the functions of this module read."""
ROPE_PARTS = ("rope_scaling", "rope_parameters", "full_attention", "sliding_attention")
"""Objects with such keys: within config.json, and within each other."""


class KeysError(Exception):
    """Keys that are of the right kind and say what no model here has."""


def given(keys: Keys) -> Fields:
    """What config.json says: null is as good as nothing, also in its objects for RoPE."""
    said = {key: value for key, value in keys.items() if value is not None}
    return {key: given(value) if key in ROPE_PARTS and isinstance(value, Mapping) else value for key, value in said.items()}


def kind_problems(keys: Keys) -> list[str]:
    """Keys of `given` that do not hold what they may, one sentence each."""
    problems = []
    for key, value in keys.items():
        if key in ROPE_PARTS:
            problems += kind_problems(value) if isinstance(value, Mapping) else [f"{key} is {value!r}; expected an object"]
        elif key in KEY_KINDS and not KEY_KINDS[key].has(value):
            problems.append(f"{key} is {value!r}; expected {KEY_KINDS[key].expected()}")
    return problems


def _window_everywhere(keys: Keys) -> Fields:
    return {"window_size": keys.get("sliding_window")}


def _window_everywhere_keys(model: ModelConfig) -> Fields:
    return {"sliding_window": model.window_size}


def _window_qwen(keys: Keys) -> Fields:
    """use_sliding_window switches it on, from layer max_window_layers upwards unless layer_types says otherwise."""
    window = keys.get("sliding_window") if keys.get("use_sliding_window") else None
    first = keys.get("max_window_layers", 0)
    layers = _windowed(keys, lambda layer: layer >= first)
    return {"window_size": window, "window_layers": layers} if window and any(layers) else {}


def _window_qwen_keys(model: ModelConfig) -> Fields:
    return {"use_sliding_window": True, **_window_keys(model)} if model.window_size else {"use_sliding_window": False}


def _window_even(keys: Keys) -> Fields:
    """Layers 0, 2, 4 ... (Gemma 2, gpt-oss)."""
    layers = _windowed(keys, lambda layer: layer % 2 == 0)
    return {"window_size": keys["sliding_window"], "window_layers": layers}


def _window_gemma3(keys: Keys) -> Fields:
    """All but every sixth layer; their RoPE has a theta of its own."""
    pattern = keys.get("sliding_window_pattern", keys.get("_sliding_window_pattern", 6))
    layers = _windowed(keys, lambda layer: (layer + 1) % pattern != 0)
    local = (keys.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta", 10000.0)
    base = float(keys.get("rope_local_base_freq", local))
    return {"window_size": keys["sliding_window"], "window_layers": layers, "rotary_base_local": base}


def _window_gemma3_keys(model: ModelConfig) -> Fields:
    whole = {"rope_type": "default", **(model.rope_scaling or {}), "rope_theta": model.rotary_base}
    local = {"rope_type": "default", "rope_theta": model.rotary_base_local}
    return {
        **_window_keys(model),
        "rope_local_base_freq": model.rotary_base_local,
        "rope_parameters": {"full_attention": whole, "sliding_attention": local},
    }


def _windowed(keys: Keys, default: Callable[[int], bool]) -> tuple[bool, ...]:
    if keys.get("layer_types"):
        odd = set(keys["layer_types"]) - {"sliding_attention", "full_attention"}
        if odd:
            raise KeysError(f"layer_types has {', '.join(map(str, odd))}; expected sliding_attention and full_attention")
        return tuple(kind == "sliding_attention" for kind in keys["layer_types"])
    return tuple(default(layer) for layer in range(keys["num_hidden_layers"]))


def _window_keys(model: ModelConfig) -> Fields:
    layers = model.window_layers or (bool(model.window_size),) * model.num_layers
    kinds = ["sliding_attention" if windowed else "full_attention" for windowed in layers]
    return {"sliding_window": model.window_size, "layer_types": kinds}


def _gemma_scales(keys: Keys) -> Fields:
    scale = float(keys["query_pre_attn_scalar"]) ** -0.5
    return {"embedding_scale": math.sqrt(keys["hidden_size"]), "softmax_scale": scale}


def _gemma_scales_keys(model: ModelConfig) -> Fields:
    if model.softmax_scale is None:
        return {}
    scalar = model.softmax_scale**-2
    return {"query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar}


def _moe_softmax(keys: Keys) -> Fields:
    """Softmax over all experts, then the top k, renormalised if norm_topk_prob: the same as softmax over the k."""
    return {"core.moe_router_pre_softmax": not keys.get("norm_topk_prob", False)}


def _moe_softmax_keys(model: ModelConfig) -> Fields:
    return {"norm_topk_prob": not model.moe.moe_router_pre_softmax}


def _moe_sparse_step(keys: Keys) -> Fields:
    """Layers without experts: mlp_only_layers, and those that decoder_sparse_step jumps over (Qwen)."""
    step, dense = keys.get("decoder_sparse_step", 1), set(keys.get("mlp_only_layers") or ())
    layers = range(keys["num_hidden_layers"])
    return {"core.moe_layer_freq": [int(layer not in dense and (layer + 1) % step == 0) for layer in layers]}


def _moe_sparse_step_keys(model: ModelConfig) -> Fields:
    dense = [layer for layer, sparse in enumerate(layers_with_experts(model)) if not sparse]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _moe_first_dense(keys: Keys) -> Fields:
    first, step = keys["first_k_dense_replace"], keys.get("moe_layer_freq", 1)
    layers = range(keys["num_hidden_layers"])
    return {"core.moe_layer_freq": [int(layer >= first and layer % step == 0) for layer in layers]}


def _moe_first_dense_keys(model: ModelConfig) -> Fields:
    return {"first_k_dense_replace": [*layers_with_experts(model), True].index(True)}


def _moe_interleaved(keys: Keys) -> Fields:
    """Llama 4: every interleave_moe_layer_step-th layer, or those listed."""
    layers, step = range(keys["num_hidden_layers"]), keys.get("interleave_moe_layer_step", 1)
    sparse = keys.get("moe_layers", list(layers[step - 1 :: step]))
    return {"core.moe_layer_freq": [int(layer in sparse) for layer in layers]}


def _moe_interleaved_keys(model: ModelConfig) -> Fields:
    return {"moe_layers": [layer for layer, sparse in enumerate(layers_with_experts(model)) if sparse]}


def _moe_shared(keys: Keys) -> Fields:
    """All shared experts as one of their summed width."""
    return {"core.moe_shared_expert_intermediate_size": keys["moe_intermediate_size"] * keys["n_shared_experts"]}


def _moe_shared_keys(model: ModelConfig) -> Fields:
    moe = model.moe
    return {"n_shared_experts": (moe.moe_shared_expert_intermediate_size or 0) // (moe.moe_ffn_hidden_size or 1)}


def _mla(keys: Keys) -> Fields:
    """Latent attention takes its YaRN settings from megatron-core's own fields; a head has v_head_dim values."""
    scaling = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    fields: Fields = {"kv_channels": keys["v_head_dim"], "num_query_groups": keys["num_attention_heads"]}
    if kind != "yarn":
        return {**fields, "core.rope_type": "rope"}
    return {
        **fields,
        "core.rope_type": "yarn",
        "core.rotary_scaling_factor": float(scaling["factor"]),
        "core.original_max_position_embeddings": scaling["original_max_position_embeddings"],
        "core.beta_fast": float(scaling.get("beta_fast", 32)),
        "core.beta_slow": float(scaling.get("beta_slow", 1)),
        "core.mscale": float(scaling.get("mscale", 1.0)),
        "core.mscale_all_dim": float(scaling.get("mscale_all_dim", 0.0)),
    }


def _no_rope(keys: Keys) -> Fields:
    """no_rope_layers has 1 where RoPE is used; megatron-core's list has 1 where it is not."""
    interval = keys.get("no_rope_layer_interval", 4)
    default = [int((layer + 1) % interval != 0) for layer in range(keys["num_hidden_layers"])]
    return {"no_rope_freq": [1 - used for used in keys.get("no_rope_layers") or default]}


def _no_rope_keys(model: ModelConfig) -> Fields:
    return {"no_rope_layers": [int(not skipped) for skipped in layers_without_rope(model)]}


def _temperature(keys: Keys) -> Fields:
    """Llama 4; Scout's config.json says 4 where transformers says true."""
    if not keys["attn_temperature_tuning"]:
        return {}
    return {"attn_temperature_scale": keys["attn_scale"], "attn_temperature_floor": keys["floor_scale"]}


def _temperature_keys(model: ModelConfig) -> Fields:
    if model.attn_temperature_scale is None:
        return {"attn_temperature_tuning": False}
    scale, floor = model.attn_temperature_scale, model.attn_temperature_floor
    return {"attn_temperature_tuning": True, "attn_scale": scale, "floor_scale": floor}


def _nothing(model: ModelConfig) -> Fields:
    return {}


LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}
"""Kinds of layers as Nemotron-H's config.json names them, before and since transformers 5, and megatron-core's letters."""


def _hybrid(keys: Keys) -> Fields:
    """One letter a layer; the experts' settings only where a layer has experts (every config.json holds some)."""
    kinds = keys.get("layers_block_type")
    pattern = "".join(LETTERS[kind] for kind in kinds) if kinds else str(keys.get("hybrid_override_pattern", "ME*-"))
    fields: Fields = {"core.hybrid_layer_pattern": pattern, "num_layers": len(pattern)}
    fields["kv_channels"] = keys.get("head_dim") or keys.get("attention_head_dim") or 128
    if "E" not in pattern:
        return fields
    grouped = keys.get("n_group", 1) > 1
    return fields | {
        "core.num_moe_experts": keys["n_routed_experts"],
        "core.moe_layer_freq": [int(letter == "E") for letter in pattern],
        "core.moe_ffn_hidden_size": keys["moe_intermediate_size"],
        "core.moe_latent_size": keys.get("moe_latent_size"),
        "core.moe_shared_expert_intermediate_size": keys["moe_shared_expert_intermediate_size"],
        "core.moe_router_topk": keys["num_experts_per_tok"],
        "core.moe_router_topk_scaling_factor": keys["routed_scaling_factor"],
        "core.moe_router_num_groups": keys["n_group"] if grouped else None,
        "core.moe_router_group_topk": keys["topk_group"] if grouped else None,
        "core.moe_router_score_function": "sigmoid",
        "core.moe_router_enable_expert_bias": True,
    }


def _hybrid_keys(model: ModelConfig) -> Fields:
    moe, pattern = model.moe, model.mamba.hybrid_layer_pattern or ""
    keys: Fields = {"hybrid_override_pattern": pattern}
    if "E" in pattern:
        keys |= {
            "n_routed_experts": moe.num_moe_experts,
            "moe_intermediate_size": moe.moe_ffn_hidden_size,
            "moe_latent_size": moe.moe_latent_size,
            "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
            "num_experts_per_tok": moe.moe_router_topk,
            "routed_scaling_factor": moe.moe_router_topk_scaling_factor,
            "n_group": moe.moe_router_num_groups or 1,
            "topk_group": moe.moe_router_group_topk or 1,
        }
    return keys


DERIVED: Mapping[str, tuple[Callable[[Keys], Fields], Callable[[ModelConfig], Fields]]] = {
    "window_everywhere": (_window_everywhere, _window_everywhere_keys),
    "window_qwen": (_window_qwen, _window_qwen_keys),
    "window_even": (_window_even, _window_keys),
    "window_gemma3": (_window_gemma3, _window_gemma3_keys),
    "gemma_scales": (_gemma_scales, _gemma_scales_keys),
    "moe_softmax": (_moe_softmax, _moe_softmax_keys),
    "moe_softmax_renormalised": (lambda keys: {"core.moe_router_pre_softmax": False}, _nothing),
    "moe_sparse_step": (_moe_sparse_step, _moe_sparse_step_keys),
    "moe_first_dense": (_moe_first_dense, _moe_first_dense_keys),
    "moe_interleaved": (_moe_interleaved, _moe_interleaved_keys),
    "moe_shared": (_moe_shared, _moe_shared_keys),
    "mla": (_mla, lambda model: {"head_dim": model.mla.qk_pos_emb_head_dim}),
    "no_rope": (_no_rope, _no_rope_keys),
    "temperature": (_temperature, _temperature_keys),
    "hybrid": (_hybrid, _hybrid_keys),
    "quick_gelu": (lambda keys: {"activation": "quick_gelu"}, lambda model: {"hidden_act": "silu"}),
}
