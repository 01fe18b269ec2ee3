"""nvidia-modelopt's importer gives the parameters that ours gives, and stands in for it with --importer modelopt.

modelopt knows Llama, Qwen2, Qwen3 dense and MoE, DeepSeek-V2 and -V3, Llama 4, gpt-oss, Nemotron-H and Qwen3-VL; of
Llama 4 the checkpoints whose layers are all MoE, of gpt-oss MXFP4 alone. Its other importers need no GPU either.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sft import conversion, parallel
from megatron_sft.checkpoint.distributed import read_run_config
from megatron_sft.config.run import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sft.errors import CheckpointError
from megatron_sft.hf.exporter import save_hf
from megatron_sft.hf.importer import architecture_of, load_weights
from megatron_sft.hf.verify import quick_check
from megatron_sft.hf.weights import load_hf_weights
from megatron_sft.model.build import build_model
from megatron_sft.weights import padded
from tests.unit.hf import tiny_models
from tests.unit.hf.tiny_models import conversion_run, tiny_folder

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MULTIMODAL = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}


def test_convert_command(tmp_path):
    pytest.importorskip("modelopt")
    tiny_folder("qwen3", tmp_path / "hf", torch.bfloat16)
    conversion.convert(conversion_run(tmp_path / "hf", save=tmp_path / "out", importer="modelopt"))
    assert conversion.verify(str(tmp_path / "hf"), str(tmp_path / "out"))
    assert read_run_config(tmp_path / "out")["model"]["num_layers"] == 4


@pytest.fixture(scope="module")
def ranks():
    pytest.importorskip("modelopt")
    yield parallel.initialize(ParallelConfig(), 1)
    parallel.finalize()


def by_modelopt(model=ModelConfig()):
    return RunConfig(model, checkpoint=CheckpointConfig(importer="modelopt"))


def built(folder):
    model = padded(architecture_of(folder, by_modelopt()), 1)
    return build_model(model, ParallelConfig(), TrainConfig()), model


def state(chunks):
    return {name: value for name, value in chunks[0].state_dict().items() if value is not None}


def assert_same_parameters(plain, other, ranks):
    """Our import of `plain` and modelopt's of `other` are bit-identical."""
    (ours, model), (theirs, _) = built(plain), built(plain)
    load_hf_weights(ours, model, plain, ranks)
    load_weights(theirs, by_modelopt(model), other, ranks)
    expected, found = state(ours), state(theirs)
    assert expected.keys() == found.keys() and len(expected) > 20
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


NAMES = ("llama", "llama-tied", "qwen2", "qwen2-untied", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_identical(name, tmp_path, ranks):
    tiny_folder(name, tmp_path)
    assert_same_parameters(tmp_path, tmp_path, ranks)


def test_parameters_of_llama_4_are_identical(tmp_path, ranks, monkeypatch):
    keys = {**tiny_models.KEYS["llama4_text"], "interleave_moe_layer_step": 1}
    monkeypatch.setitem(tiny_models.KEYS, "llama4_text", keys)
    tiny_folder("llama4_text", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {f"language_model.{name}": value for name, value in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**MULTIMODAL, "text_config": text}))
    assert_same_parameters(tmp_path, tmp_path, ranks)


@pytest.mark.parametrize("name", ["nemotron_h", "nemotron_h-moe"])
def test_parameters_of_nemotron_h_are_identical(name, tmp_path, ranks, monkeypatch):
    """Its rules expect megatron-core's MambaModel, whose last norm is called final_norm; ours is a GPTModel."""
    from modelopt.torch.export.plugins.mcore_common import all_mcore_hf_import_mapping

    rules = all_mcore_hf_import_mapping["NemotronHForCausalLM"]
    monkeypatch.setitem(rules, "final_layernorm", rules["final_norm"])
    tiny_folder(name, tmp_path)
    assert_same_parameters(tmp_path, tmp_path, ranks)


def as_mxfp4(weights):
    """Every expert weight replaced by values that MXFP4 has, in place; returns the tensors of an MXFP4 checkpoint.

    Two values a byte, the first in the low half; one power of two for 32 values along the input.
    https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf section 5.
    """
    generator = torch.Generator().manual_seed(3)
    packed = {}
    for name, value in list(weights.items()):
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = value
            continue
        experts, inputs, outputs = value.shape
        codes = torch.randint(16, (experts, outputs, inputs // 32, 32), generator=generator)
        scales = torch.randint(120, 126, (experts, outputs, inputs // 32), generator=generator)
        signs = 1.0 - 2.0 * (codes >= 8)
        dense = FP4[codes % 8] * signs * torch.exp2(scales[..., None] - 127.0)
        weights[name] = dense.flatten(2).transpose(1, 2).contiguous().to(value.dtype)
        packed[name + "_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        packed[name + "_scales"] = scales.to(torch.uint8)
    return packed


@pytest.fixture
def mxfp4(tmp_path):
    """gpt-oss as the hub has it, beside the same weights unpacked."""
    plain, other = tmp_path / "plain", tmp_path / "mxfp4"
    tiny_folder("gpt_oss", plain, torch.bfloat16)
    shutil.copytree(plain, other)
    weights = load_file(plain / "model.safetensors")
    save_file(as_mxfp4(weights), other / "model.safetensors", {"format": "pt"})
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    return plain, other


def test_parameters_of_gpt_oss_in_mxfp4_are_identical(mxfp4, ranks):
    assert_same_parameters(*mxfp4, ranks)


def test_quantised_weights_are_trained_and_exported_unquantised(mxfp4, ranks, tmp_path):
    plain, other = mxfp4
    chunks, model = built(other)
    load_weights(chunks, by_modelopt(model), other, ranks)
    quick_check(chunks, model, other, ranks)
    save_hf(chunks, model, tmp_path / "out", ranks, other, torch.bfloat16)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_type_that_only_modelopt_knows(tmp_path, ranks):
    """Qwen3-VL's language model; its architecture stands in the flags."""
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    tiny_folder("qwen3", tmp_path / "like")
    flags = dataclasses.replace(padded(architecture_of(tmp_path / "like", RunConfig()), 1), rope_scaling=None)
    rope = {"rope_type": "default", "rope_theta": flags.rotary_base, "mrope_section": [8, 4, 4]}
    text = {**tiny_models.SIZES, "head_dim": 32, "rope_parameters": rope}
    vision = {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 64}
    vision["deepstack_visual_indexes"] = []
    config = AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision, tie_word_embeddings=False)
    theirs = Qwen3VLForConditionalGeneration(config)
    theirs.save_pretrained(tmp_path / "vl")
    with pytest.raises(CheckpointError, match=r"unknown model_type 'qwen3_vl_text'.* or use --importer modelopt"):
        architecture_of(tmp_path / "vl", RunConfig(flags))
    assert architecture_of(tmp_path / "vl", by_modelopt(flags)) == flags
    chunks = build_model(flags, ParallelConfig(), TrainConfig())
    load_weights(chunks, by_modelopt(flags), tmp_path / "vl", ranks)
    weight = theirs.model.language_model.layers[3].mlp.down_proj.weight
    assert torch.equal(chunks[0].decoder.layers[3].mlp.linear_fc2.weight, weight)
    quick_check(chunks, flags, tmp_path / "vl", ranks)


def test_what_modelopt_cannot_read_is_refused(tmp_path, ranks):
    tiny_folder("mistral", tmp_path / "a")
    chunks, model = built(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"could not import it \(KeyError: 'MistralForCausalLM'\)"):
        load_weights(chunks, by_modelopt(model), tmp_path / "a", ranks)
    tiny_folder("llama", tmp_path / "b")
    chunks, model = built(tmp_path / "b")
    with pytest.raises(CheckpointError, match="cannot pad 131 tokens to 136"):
        load_weights(chunks, by_modelopt(padded(model, 8)), tmp_path / "b", ranks)
