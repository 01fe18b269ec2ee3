"""Mistakes planted in a converted model, or in its settings, and which check finds each."""

import dataclasses

import pytest
import torch

from megatron_sft import parallel
from megatron_sft.config.run import ModelConfig, ParallelConfig, TrainConfig
from megatron_sft.errors import CheckpointError
from megatron_sft.hf.config import model_config_from_hf, read_hf_config
from megatron_sft.hf.conflicts import conflicts
from megatron_sft.hf.verify import changed_tensors, first_difference, quick_check
from megatron_sft.hf.weights import load_hf_weights
from megatron_sft.model.build import build_model
from megatron_sft.model.rope import RotaryTable
from megatron_sft.weights import padded
from tests.unit.hf.tiny_models import KEYS, LLAMA3_ROPE, LONG_ROPE, tiny_folder


@pytest.fixture(scope="module")
def ranks():
    yield parallel.initialize(ParallelConfig(), 1)
    parallel.finalize()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in sorted({name for name, *_ in (*WEIGHTS.values(), *PLACES.values(), *SETTINGS.values())}):
        tiny_folder(name, root / name)
    return root


def changed(model, change):
    core = {name.removeprefix("core."): value for name, value in change.items() if name.startswith("core.")}
    plain = {name: value for name, value in change.items() if not name.startswith("core.")}
    return dataclasses.replace(model, **plain).with_core(core)


def loaded(folder, ranks, change=None, dtype="fp32"):
    """The converted model; `change` makes the wrong ModelConfig that it is built from."""
    model = changed(padded(model_config_from_hf(read_hf_config(folder)), 1), change or {})
    chunks = build_model(model, ParallelConfig(), TrainConfig(params_dtype=dtype))
    load_hf_weights(chunks, model, folder, ranks)
    return chunks, model


def attention(chunk, layer=0):
    return chunk.decoder.layers[layer].self_attention


def _swap_halves(weight):
    half = weight.shape[0] // 2
    weight.copy_(torch.cat([weight[half:], weight[:half]]))


def _ungrouped(weight):  # all q, then all k, then all v: HF's order left as it was
    groups = weight.view(2, -1, *weight.shape[1:])
    heads = groups.shape[1] // 4
    q, k, v = groups[:, : 2 * heads], groups[:, 2 * heads : 3 * heads], groups[:, 3 * heads :]
    weight.copy_(torch.cat([part.reshape(-1, *weight.shape[1:]) for part in (q, k, v)]))


def _interleaved(weight):  # RoPE pairs (0, 1), (2, 3) in place of halves
    heads = weight.view(-1, 24, weight.shape[1])
    weight.copy_(torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).reshape(weight.shape))


WEIGHTS = {
    "gate and up swapped": ("llama", lambda m: _swap_halves(m.decoder.layers[0].mlp.linear_fc1.weight)),
    "q, k, v not interleaved by group": ("llama", lambda m: _ungrouped(attention(m).linear_qkv.weight)),
    "RoPE pairs interleaved": ("llama", lambda m: _interleaved(attention(m).linear_qkv.weight)),
    "head order reversed": (
        "llama",
        lambda m: attention(m).linear_proj.weight.copy_(attention(m).linear_proj.weight.flip(1)),
    ),
    "qkv bias dropped": ("qwen2", lambda m: attention(m).linear_qkv.bias.zero_()),
    "query and key norm swapped": (
        "qwen3",
        lambda m: attention(m).q_layernorm.weight.copy_(attention(m).k_layernorm.weight),
    ),
    "norm weights one too small": ("llama", lambda m: m.decoder.layers[0].input_layernorm.weight.sub_(1)),
    "the two norms of a layer swapped": (
        "llama",
        lambda m: m.decoder.layers[0].input_layernorm.weight.copy_(m.decoder.layers[0].pre_mlp_layernorm.weight),
    ),
    "layers off by one": (
        "llama",
        lambda m: attention(m).linear_qkv.weight.copy_(attention(m, 1).linear_qkv.weight),
    ),
    "embedding rows off by one": (
        "llama",
        lambda m: m.embedding.word_embeddings.weight.copy_(m.embedding.word_embeddings.weight.roll(1, 0)),
    ),
    "experts off by one": (
        "mixtral",
        lambda m: m.decoder.layers[0].mlp.router.weight.copy_(m.decoder.layers[0].mlp.router.weight.roll(1, 0)),
    ),
    "a square weight transposed": (
        "qwen2",
        lambda m: attention(m).linear_proj.weight.copy_(attention(m).linear_proj.weight.t().clone()),
    ),
}


@pytest.mark.parametrize("mistake", WEIGHTS)
def test_quick_check_and_verify_find_wrong_weights(mistake, folders, ranks):
    name, spoil = WEIGHTS[mistake]
    chunks, model = loaded(folders / name, ranks)
    with torch.no_grad():
        spoil(chunks[0])
    with pytest.raises(CheckpointError, match=r"the output of (embedding|layer 0) differs"):
        quick_check(chunks, model, folders / name, ranks)
    assert first_difference(chunks[0], folders / name)[0] in ("embedding", "layer 0")
    assert changed_tensors(chunks, model, folders / name, ranks) != []


def _swap(a, b):
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def layer(chunk, number=1):
    return chunk.decoder.layers[number]


def expert(chunk, number, index):
    return layer(chunk, number).mlp.experts.local_experts[index]


def _swap_experts(chunk, number):
    for a, b in zip(expert(chunk, number, 0).parameters(), expert(chunk, number, 1).parameters(), strict=True):
        _swap(a, b)


PLACES = {  # family, mistake, the place that verify names, the first HF tensor that differs
    "router bias": ("gpt_oss", lambda m: layer(m).mlp.router.bias.zero_(), 1, "mlp.router.bias"),
    "sinks dropped": ("gpt_oss", lambda m: attention(m, 1).core_attention.softmax_offset.fill_(-1e9), 1, "self_attn.sinks"),
    "output bias dropped": ("gpt_oss", lambda m: attention(m, 1).linear_proj.bias.zero_(), 1, "self_attn.o_proj.bias"),
    "expert bias dropped": (
        "gpt_oss",
        lambda m: [expert(m, 2, n).linear_fc2.bias.zero_() for n in range(4)],
        2,
        "mlp.experts.down_proj_bias",
    ),
    "stacked experts swapped": ("gpt_oss", lambda m: _swap_experts(m, 1), 1, "mlp.experts.gate_up_proj_bias"),
    "experts swapped": ("qwen3_moe", lambda m: _swap_experts(m, 2), 2, "mlp.experts.0.gate_proj.weight"),
    "gate and up of the shared expert": (
        "deepseek_v3",
        lambda m: _swap_halves(layer(m, 3).mlp.shared_experts.linear_fc1.weight),
        3,
        "mlp.shared_experts.gate_proj.weight",
    ),
    "router's correction": (
        "deepseek_v3",
        lambda m: layer(m).mlp.router.expert_bias.zero_(),
        1,
        "mlp.gate.e_score_correction_bias",
    ),
    "norm of the latent": (
        "deepseek_v3",
        lambda m: attention(m, 1).kv_layernorm.weight.fill_(1),
        1,
        "self_attn.kv_a_layernorm.weight",
    ),
    "gate and up of one tensor": ("phi3", lambda m: _swap_halves(layer(m).mlp.linear_fc1.weight), 1, "mlp.gate_up_proj.weight"),
    "both post-norms swapped": (
        "gemma3_text",
        lambda m: _swap(attention(m, 1).linear_proj.post_layernorm.weight, layer(m).mlp.linear_fc2.post_layernorm.weight),
        1,
        "post_feedforward_layernorm.weight",
    ),
    "query norm's heads": ("olmo2", lambda m: _swap_halves(attention(m, 1).q_layernorm.weight), 1, "self_attn.q_norm.weight"),
    "norm bias": ("nemotron", lambda m: layer(m).input_layernorm.bias.zero_(), 1, "input_layernorm.bias"),
    "norm not centred": ("nemotron", lambda m: layer(m).input_layernorm.weight.sub_(1), 1, "input_layernorm.weight"),
    "z and x of Mamba": (
        "nemotron_h",
        lambda m: _swap(layer(m, 0).mixer.in_proj.weight[:64], layer(m, 0).mixer.in_proj.weight[64:128]),
        0,
        "mixer.in_proj.weight",
    ),
    "taps of the convolution": (
        "nemotron_h",
        lambda m: layer(m, 3).mixer.conv1d.weight.copy_(layer(m, 3).mixer.conv1d.weight.flip(2)),
        3,
        "mixer.conv1d.weight",
    ),
    "D dropped": ("nemotron_h", lambda m: layer(m, 0).mixer.D.zero_(), 0, "mixer.D"),
    "latent projection": (
        "nemotron_h-latent",
        lambda m: layer(m, 2).mlp.fc2_latent_proj.weight.neg_(),
        2,
        "mixer.fc2_latent_proj.weight",
    ),
    "shared expert left out": (
        "llama4_text",
        lambda m: layer(m).mlp.shared_experts.linear_fc2.weight.zero_(),
        1,
        "feed_forward.shared_expert.down_proj.weight",
    ),
    "one value of the last layer": (
        "llama",
        lambda m: layer(m, 3).mlp.linear_fc2.weight[5, 7].add_(0.01),
        3,
        "mlp.down_proj.weight",
    ),
    "final norm one too large": ("gemma2", lambda m: m.decoder.final_layernorm.weight.add_(1), None, "model.norm.weight"),
    "last row of the head": ("llama", lambda m: m.output_layer.weight[130].zero_(), None, "lm_head.weight"),
}


@pytest.mark.parametrize("mistake", PLACES)
def test_verify_names_the_first_place_and_the_tensor(mistake, folders, ranks):
    name, spoil, place, tensor = PLACES[mistake]
    chunks, model = loaded(folders / name, ranks)
    with torch.no_grad():
        spoil(chunks[0])
    assert first_difference(chunks[0], folders / name)[0] == ("logits" if place is None else f"layer {place}")
    found = changed_tensors(chunks, model, folders / name, ranks)[0][0]
    assert found == tensor if place is None else found.split(f"layers.{place}.")[1] == tensor


def _early_mistakes():
    """Those of PLACES and WEIGHTS within the layers that the quick check runs."""
    found = {name: (family, spoil) for name, (family, spoil) in WEIGHTS.items()}
    return found | {name: (family, spoil) for name, (family, spoil, place, _) in PLACES.items() if place in (0, 1)}


@pytest.mark.parametrize("mistake", _early_mistakes())
def test_quick_check_in_bf16_finds_what_it_finds_in_fp32(mistake, folders, ranks):
    """Sinks and biases of a router are small beside bf16's rounding."""
    name, spoil = _early_mistakes()[mistake]
    chunks, model = loaded(folders / name, ranks, dtype="bf16")
    before = {name: parameter.clone() for name, parameter in chunks[0].named_parameters()}
    quick_check(chunks, model, folders / name, ranks)
    after = dict(chunks[0].named_parameters())
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        spoil(chunks[0])
    with pytest.raises(CheckpointError, match=r"the output of (embedding|layer [01]) differs"):
        quick_check(chunks, model, folders / name, ranks)


@pytest.mark.parametrize("name", sorted(KEYS))
def test_quick_check_in_bf16_passes_every_family(name, tmp_path, ranks):
    tiny_folder(name, tmp_path / name)
    chunks, model = loaded(tmp_path / name, ranks, dtype="bf16")
    quick_check(chunks, model, tmp_path / name, ranks)


def test_verify_compares_bits_of_what_no_token_uses(folders, ranks):
    chunks, model = loaded(folders / "llama", ranks)
    with torch.no_grad():
        chunks[0].decoder.layers[3].mlp.linear_fc2.weight[5, 7] *= 1 + 2**-23
    assert first_difference(chunks[0], folders / "llama")[0] is None
    (found,) = changed_tensors(chunks, model, folders / "llama", ranks)
    assert found[0] == "model.layers.3.mlp.down_proj.weight" and found[1] != found[2]


def _llama3(**change):
    return {"rope_scaling": {**LLAMA3_ROPE, **change}}


SETTINGS = {  # family, mistake, the place that verify names
    "eps": ("llama", {"norm_epsilon": 1e-5}, "layer 0"),
    "theta": ("llama", {"rotary_base": 1e4}, "layer 0"),
    "scaling factor": ("llama", _llama3(factor=32.0), "layer 0"),
    "low frequencies": ("llama", _llama3(low_freq_factor=2.0), "layer 0"),
    "high frequencies": ("llama", _llama3(high_freq_factor=8.0), "layer 0"),
    "original positions": ("llama", _llama3(original_max_position_embeddings=4096), "layer 0"),
    "scaling left out": ("llama", {"rope_scaling": None}, "layer 0"),
    "partial rotary": ("llama", {"rotary_percent": 0.5}, "layer 0"),
    "activation": ("llama", {"activation": "gelu"}, "layer 0"),
    "window": ("llama", {"window_size": 4}, "layer 0"),
    "window one too small": ("mistral", {"window_size": 7}, "layer 0"),
    "window one too large": ("mistral", {"window_size": 9}, "layer 0"),
    "layers with a window": ("qwen2-untied", {"window_layers": (False, False, True, True)}, "layer 1"),
    "cap of the scores": ("gemma2", {"attn_logit_softcapping": None}, "layer 0"),
    "cap of the logits": ("gemma2", {"final_logit_softcapping": None}, "logits"),
    "scale of the embedding": ("gemma2", {"embedding_scale": None}, "embedding"),
    "scale of the scores": ("gemma2", {"core.softmax_scale": 0.25}, "layer 0"),
    "norms not centred": ("gemma2", {"norm_zero_centered": False}, "layer 0"),
    "gelu without tanh": ("gemma2", {"activation": "gelu"}, "layer 0"),
    "local theta": ("gemma3_text", {"rotary_base_local": 1e6}, "layer 0"),
    "mscale of all": ("deepseek_v3", {"core.mscale_all_dim": 1.0}, "layer 0"),
    "factor of the experts": ("deepseek_v3", {"core.moe_router_topk_scaling_factor": 1.0}, "layer 1"),
    "experts renormalised": ("deepseek_v2", {"core.moe_router_pre_softmax": False}, "layer 1"),
    "number of experts": ("qwen3_moe", {"core.moe_router_topk": 3}, "layer 0"),
    "clamp": ("gpt_oss", {"core.activation_func_clamp_value": 7.0}, "layer 0"),
    "offset of the gate": ("gpt_oss", {"core.glu_linear_offset": 0.0}, "layer 0"),
    "layers without RoPE": ("llama4_text", {"core.no_rope_freq": [1, 0, 1, 0]}, "layer 0"),
    "chunks": ("llama4_text", {"attention_chunk_size": 9}, "layer 0"),
    "temperature": ("llama4_text", {"attn_temperature_floor": 5}, "layer 1"),
    "long factors": ("phi3-long", {"rope_scaling": {**LONG_ROPE, "original_max_position_embeddings": 128}}, "layer 0"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_wrong_settings_are_found_by_flags_by_verify_and_by_the_quick_check(setting, folders, ranks):
    name, change, place = SETTINGS[setting]
    hf = model_config_from_hf(read_hf_config(folders / name))
    assert len(conflicts(changed(hf, change), frozenset(key.removeprefix("core.") for key in change), hf)) == 1
    chunks, model = loaded(folders / name, ranks, change)
    assert first_difference(chunks[0], folders / name)[0] == place
    with pytest.raises(CheckpointError, match=r"config\.json says"):
        quick_check(chunks, model, folders / name, ranks)


def test_epsilon_that_model_building_lost_is_found(folders, ranks):
    chunks, model = loaded(folders / "llama", ranks)
    chunks[0].decoder.layers[1].input_layernorm.eps = 1e-5
    with pytest.raises(CheckpointError, match=r"input_layernorm has epsilon 1e-05, config\.json says 1e-06"):
        quick_check(chunks, model, folders / "llama", ranks)


def test_rotary_base_that_model_building_lost_is_found(folders, ranks):
    chunks, model = loaded(folders / "llama", ranks)
    chunks[0].rotary_table = RotaryTable(dataclasses.replace(model, rotary_base=4e4))
    with pytest.raises(CheckpointError, match="rotary frequencies"):
        quick_check(chunks, model, folders / "llama", ranks)


def test_flags_of_another_model_are_all_named():
    hf, other = ModelConfig(num_layers=2, hidden_size=8), ModelConfig(num_layers=3, hidden_size=8, vocab_size=5)
    found = conflicts(other, frozenset({"num_layers", "hidden_size", "vocab_size"}), hf)
    assert [sentence.split(":")[0] for sentence in found] == ["--num-layers", "--vocab-size"]
