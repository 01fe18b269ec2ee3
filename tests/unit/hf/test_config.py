"""config.json <-> ModelConfig in both spellings, and the contradictions with flags."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest

from megatron_sft.errors import CheckpointError
from megatron_sft.hf import derived
from megatron_sft.hf.config import hf_config_from_model, model_config_from_hf, text_config
from megatron_sft.hf.conflicts import conflicts, merged
from megatron_sft.hf.families import CONFIG

LLAMA_3_2 = {
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}


def test_rope_of_transformers_4_and_5_read_the_same():
    new = {key: value for key, value in LLAMA_3_2.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {**LLAMA_3_2["rope_scaling"], "rope_theta": 500000.0}
    model = model_config_from_hf(LLAMA_3_2)
    assert model == model_config_from_hf(new)
    assert (model.rotary_base, model.rope_scaling["factor"]) == (500000.0, 32.0)


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_default_scaling_is_no_scaling(kind):
    model = model_config_from_hf({**LLAMA_3_2, "rope_scaling": {kind: "default"}})
    assert model.rope_scaling is None


def test_config_survives_both_ways():
    model = model_config_from_hf(LLAMA_3_2)
    written = hf_config_from_model(model, None)
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert model_config_from_hf(written) == model
    again = hf_config_from_model(model, {**LLAMA_3_2, "_name_or_path": "kept"})
    assert again["_name_or_path"] == "kept" and model_config_from_hf(again) == model


def test_head_size_and_groups_have_defaults():
    keys = {key: value for key, value in LLAMA_3_2.items() if key not in ("head_dim", "num_key_value_heads")}
    model = model_config_from_hf(keys)
    assert (model.kv_channels, model.num_query_groups) == (64, 32)


def test_all_conflicts_at_once_with_flag_spellings():
    hf = model_config_from_hf(LLAMA_3_2)
    flags = dataclasses.replace(
        hf,
        norm_epsilon=1e-6,
        rotary_base=10000.0,
        rope_scaling={"factor": 8.0},
        qk_layernorm=True,
        kv_channels=128,
        max_position_embeddings=4096,
    )
    explicit = frozenset(field.name for field in dataclasses.fields(hf))
    found = conflicts(flags, explicit, hf)
    assert [sentence.split(":")[0] for sentence in found] == [
        "--kv-channels",
        "--norm-epsilon",
        "--qk-layernorm",
        "--rotary-base",
        "--use-rope-scaling or --rope-scaling",
    ]
    assert found[1] == (
        "--norm-epsilon: the flags say norm_epsilon = 1e-06, config.json says 1e-05. Leave the flag out or correct it."
    )
    assert conflicts(flags, frozenset({"max_position_embeddings"}), hf) == []
    assert merged(flags, frozenset({"max_position_embeddings"}), hf).max_position_embeddings == 4096


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "nobody"}, "unknown model_type 'nobody'; expected one of"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config of method 'fp8'"),
        ({"attention_bias": True}, "attention_bias is True; expected False"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "2048"}, "hidden_size is '2048'; expected a whole number"),
        ({"hidden_act": "mish"}, "activation 'mish'; expected one of"),
        ({"model_type": "own", "auto_map": {"AutoModel": "modeling.Own"}}, "--trust-remote-code"),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        model_config_from_hf({**LLAMA_3_2, **change})


CONFIGS = sorted((Path(__file__).parents[2] / "assets" / "hf_configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_published_configs_read_as_transformers_reads_them(path):
    from transformers import AutoConfig

    hf = json.loads(path.read_text())
    keys = dict(text_config(hf))
    if keys["model_type"] == "kimi_k2":  # DeepSeek-V3's class under a name of its own
        keys["model_type"] = "deepseek_v3"
    model, theirs = model_config_from_hf(hf), AutoConfig.for_model(**keys)
    heads = theirs.num_attention_heads
    eps = {"nemotron": "norm_eps", "nemotron_h": "layer_norm_epsilon"}.get(keys["model_type"], "rms_norm_eps")
    assert (model.num_query_groups, model.norm_epsilon) == (theirs.num_key_value_heads, getattr(theirs, eps))
    if model.position_embedding_type != "none":
        rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
        assert model.rotary_base == rope["rope_theta"]
        assert (model.rope_scaling or {}).get("factor") == rope.get("factor")
    assert model.share_embeddings_and_output_weights == theirs.tie_word_embeddings
    if not model.mla.multi_latent_attention:
        assert model.kv_channels == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    kinds = getattr(theirs, "layer_types", None)
    if kinds and "sliding_attention" in kinds:
        assert model.window_size == theirs.sliding_window
        assert [("full" if not windowed else "sliding") + "_attention" for windowed in model.window_layers] == kinds
    assert model_config_from_hf(hf_config_from_model(model, None)) == model


def test_every_key_that_is_read_beside_the_families_tables_has_a_kind():
    """So that what config.json holds never fails in the middle of our own code."""
    read = set()
    for node in ast.walk(ast.parse(Path(derived.__file__).read_text())):
        names = [node.slice] if isinstance(node, ast.Subscript) else node.args[:1] if isinstance(node, ast.Call) else []
        owner = node.value if isinstance(node, ast.Subscript) else getattr(getattr(node, "func", None), "value", None)
        if isinstance(owner, ast.Name) and owner.id in ("keys", "scaling"):
            read |= {name.value for name in names if isinstance(name, ast.Constant)}
    switches = {"attn_temperature_tuning", "sliding_window"}  # true or not; held to the range of its field
    assert len(read) > 30 and read - derived.KEY_KINDS.keys() - {*derived.ROPE_PARTS, *CONFIG.values(), *switches} == set()
