"""Mistakes planted in a converted model, or in its settings, and which check finds each."""

import dataclasses

import pytest
import torch

from megatron_sft import conversion, parallel
from megatron_sft.checkpoint.conflicts import conflicts
from megatron_sft.checkpoint.hf import load_hf_weights
from megatron_sft.checkpoint.hf_config import model_config_from_hf, read_hf_config
from megatron_sft.checkpoint.verify import changed_tensors, first_difference, quick_check
from megatron_sft.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_sft.errors import CheckpointError
from megatron_sft.model.build import build_model
from megatron_sft.model.rope import RotaryTable
from tests.unit.checkpoint.tiny_models import LLAMA3_ROPE, tiny_folder


@pytest.fixture(scope="module")
def ranks():
    yield parallel.initialize(ParallelConfig(), 1)
    parallel.finalize()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "qwen2", "qwen3", "mixtral"):
        tiny_folder(name, root / name)
    return root


def loaded(folder, ranks, change=None):
    """The converted model; `change` makes the wrong ModelConfig that it is built from."""
    model = conversion.padded(model_config_from_hf(read_hf_config(folder)), 1)
    model = dataclasses.replace(model, **(change or {}))
    chunks = build_model(model, ParallelConfig(), TrainConfig())
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


def test_verify_names_the_first_layer_that_differs(folders, ranks):
    chunks, model = loaded(folders / "llama", ranks)
    with torch.no_grad():
        chunks[0].decoder.layers[3].mlp.linear_fc2.weight.mul_(1.01)
    assert first_difference(chunks[0], folders / "llama")[0] == "layer 3"
    changed = changed_tensors(chunks, model, folders / "llama", ranks)
    assert [name for name, _, _ in changed] == ["model.layers.3.mlp.down_proj.weight"]


SETTINGS = {
    "eps": {"norm_epsilon": 1e-5},
    "theta": {"rotary_base": 1e4},
    "scaling factor": {"rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}},
    "scaling left out": {"rope_scaling": None},
    "partial rotary": {"rotary_percent": 0.5},
    "activation": {"activation": "gelu"},
    "window": {"window_size": 4},
    "tied": {"share_embeddings_and_output_weights": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_wrong_settings_are_found_by_flags_and_by_the_quick_check(setting, folders, ranks):
    hf = model_config_from_hf(read_hf_config(folders / "llama"))
    wrong = dataclasses.replace(hf, **SETTINGS[setting])
    assert len(conflicts(wrong, frozenset(SETTINGS[setting]), hf)) == 1
    if setting == "tied":
        return
    chunks, model = loaded(folders / "llama", ranks, SETTINGS[setting])
    with pytest.raises(CheckpointError, match=r"config\.json says"):
        quick_check(chunks, model, folders / "llama", ranks)


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
