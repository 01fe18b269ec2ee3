"""HF folder -> model -> HF folder on one process, against transformers; what is refused before any weight is read."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sft import parallel
from megatron_sft.config.run import ParallelConfig, TrainConfig
from megatron_sft.errors import CheckpointError, SavingError, TrainingError
from megatron_sft.hf import folder as hf_folder
from megatron_sft.hf import weights as hf_weights
from megatron_sft.hf.config import model_config_from_hf, read_hf_config
from megatron_sft.hf.exporter import save_hf, try_hf
from megatron_sft.hf.verify import changed_tensors, first_difference, quick_check
from megatron_sft.hf.weights import is_hf_folder, load_hf_weights, require_finite
from megatron_sft.model.build import build_model
from megatron_sft.weights import padded
from tests.unit.hf.tiny_models import KEYS, SIZES, tiny_folder


@pytest.fixture(scope="module")
def ranks():
    yield parallel.initialize(ParallelConfig(), 1)
    parallel.finalize()


def loaded(folder, ranks, dtype="fp32"):
    model = padded(model_config_from_hf(read_hf_config(folder)), 8)
    chunks = build_model(model, ParallelConfig(), TrainConfig(params_dtype=dtype))
    load_hf_weights(chunks, model, folder, ranks)
    return chunks, model


@pytest.mark.parametrize("name", KEYS)
def test_every_layer_and_the_logits_equal_transformers(name, tmp_path, ranks):
    tiny_folder(name, tmp_path)
    chunks, model = loaded(tmp_path, ranks)
    place, difference = first_difference(chunks[0], tmp_path)
    assert place is None and difference <= 1e-4
    assert changed_tensors(chunks, model, tmp_path, ranks) == []
    quick_check(chunks, model, tmp_path, ranks)


@pytest.mark.parametrize("name", KEYS)
def test_round_trip_is_bit_identical(name, tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(hf_folder, "MAX_SHARD_BYTES", 100_000)
    tiny_folder(name, tmp_path / "in", torch.bfloat16)
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    chunks, model = loaded(tmp_path / "in", ranks)
    save_hf(chunks, model, tmp_path / "out", ranks, tmp_path / "in")
    before = load_file(tmp_path / "in" / "model.safetensors")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    after = {}
    for file in sorted(set(index["weight_map"].values())):
        after.update(load_file(tmp_path / "out" / file))
    assert before.keys() == after.keys() == index["weight_map"].keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"chat_template": "x"}'
    assert model_config_from_hf(read_hf_config(tmp_path / "out")) == dataclasses.replace(model, padded_vocab_size=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_source_without_weights_gives_its_config_and_an_unknown_one_only_its_tokenizer(tmp_path, ranks):
    """As the hub's cache has it where only --tokenizer-model names the model."""
    tiny_folder("llama-tied", tmp_path / "in")
    chunks, model = loaded(tmp_path / "in", ranks)
    (tmp_path / "in" / "model.safetensors").unlink()
    config = json.loads((tmp_path / "in" / "config.json").read_text()) | {"of_its_own": 1}
    for name, keys in (("same", {}), ("unknown", {"model_type": "other"})):
        (tmp_path / "in" / "config.json").write_text(json.dumps(config | keys))
        (tmp_path / "in" / "tokenizer_config.json").write_text("{}")
        save_hf(chunks, model, tmp_path / name, ranks, tmp_path / "in")
        assert (tmp_path / name / "tokenizer_config.json").exists()
        assert json.loads((tmp_path / name / "config.json").read_text()).get("of_its_own") == (1 if name == "same" else None)


def test_tied_output_that_is_stored_too_is_kept(tmp_path, ranks):
    tiny_folder("llama-tied", tmp_path / "in")
    weights = load_file(tmp_path / "in" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    chunks, model = loaded(tmp_path / "in", ranks)
    save_hf(chunks, model, tmp_path / "out", ranks, tmp_path / "in")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], weights["lm_head.weight"])


@pytest.mark.parametrize(
    ("is_tied", "head", "message"),
    [
        (True, "none", ""),
        (True, "same", ""),
        (True, "same in bf16", ""),
        (True, "other", "lm_head.weight holds other values than model.embed_tokens.weight, though config.json ties them"),
        (True, "one value", "lm_head.weight holds other values than model.embed_tokens.weight"),
        (True, "alone", r"1 tensors missing \(first: model.embed_tokens.weight\)"),
        (False, "other", ""),
        (False, "same", ""),
        (False, "none", r"1 tensors missing \(first: lm_head.weight\)"),
    ],
)
def test_a_tie_flag_that_the_weights_deny_is_refused(is_tied, head, message, tmp_path, ranks, monkeypatch):
    """transformers 5 unties what has two values, 4 ties it: neither is taken for granted."""
    monkeypatch.setattr(hf_weights, "OPEN_BYTES", 64 * 16 * 4)  # a few rows at a time
    tiny_folder("qwen3", tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    weights = load_file(path)
    embedding = weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].bfloat16().float()
    weights.pop("lm_head.weight", None)
    made = {"same": embedding.clone(), "alone": embedding.clone(), "other": embedding.flip(0), "one value": embedding.clone()}
    made["one value"][100, 63] += 1
    made["same in bf16"] = embedding.bfloat16()
    if head != "none":
        weights["lm_head.weight"] = made[head]
    if head == "alone":
        del weights["model.embed_tokens.weight"]
    save_file(weights, path, {"format": "pt"})
    config = json.loads((tmp_path / "in" / "config.json").read_text()) | {"tie_word_embeddings": is_tied}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    if message:
        with pytest.raises(CheckpointError, match=message):
            loaded(tmp_path / "in", ranks)
        return
    chunks, _ = loaded(tmp_path / "in", ranks)
    assert first_difference(chunks[0], tmp_path / "in")[0] is None


def test_saving_over_another_folder_is_refused(tmp_path, ranks):
    tiny_folder("llama", tmp_path / "in")
    chunks, model = loaded(tmp_path / "in", ranks)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"home: holds thesis.tex; expected a new or empty folder") as before:
        try_hf(chunks, model, tmp_path / "home", ranks, tmp_path / "in")
    with pytest.raises(SavingError, match=r"home: not written: holds thesis.tex") as after:
        save_hf(chunks, model, tmp_path / "home", ranks, tmp_path / "in")
    assert (before.value.exit_status, after.value.exit_status) == (2, 3)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent.name != "in") == ["home", "in", "thesis.tex"]


def test_weights_that_are_not_finite_are_found_whatever_their_size(tmp_path, ranks):
    tiny_folder("qwen3", tmp_path / "in")
    chunks, _ = loaded(tmp_path / "in", ranks)
    named = dict(chunks[0].named_parameters())
    with torch.no_grad():
        named["embedding.word_embeddings.weight"].fill_(3e38)  # finite, though its sum is not
        require_finite(chunks, ranks, "x")
        for value in (math.nan, math.inf, -math.inf):
            weight = named["decoder.layers.1.mlp.linear_fc1.weight"]
            before, weight[3, 5] = float(weight[3, 5]), value
            with pytest.raises(TrainingError, match=r"^x: not saved. decoder.layers.1.mlp.linear_fc1.weight on rank 0 holds NaN"):
                require_finite(chunks, ranks, "x")
            weight[3, 5] = before


def _drop(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def _add(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.layers.1.self_attn.q_proj.bias": torch.ones(96)}, folder / "model.safetensors")


def _reshape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(63)
    save_file(weights, folder / "model.safetensors")


WRONG = {
    "missing": (_drop, r"1 tensors missing \(first: model.layers.2.mlp.up_proj.weight\)"),
    "extra": (_add, r"1 tensors that the model does not have \(first: model.layers.1.self_attn.q_proj.bias\)"),
    "shape": (_reshape, r"model.norm.weight has shape \[63\], not \[64\]"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_tensors_are_refused_before_anything_is_copied(fault, tmp_path, ranks):
    folder = tmp_path / "model"
    tiny_folder("llama", folder)
    model = padded(model_config_from_hf(read_hf_config(folder)), 8)
    chunks = build_model(model, ParallelConfig(), TrainConfig())
    for parameter in chunks[0].parameters():
        parameter.data.fill_(7.0)
    spoil, message = WRONG[fault]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_hf_weights(chunks, model, folder, ranks)
    assert all((parameter == 7.0).all() for parameter in chunks[0].parameters())


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}


def multimodal(name, folder):
    """The text model as the part of a model that sees, as Gemma 3 and Llama 4 are published."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {**SIZES, **KEYS[name]}
    kind = name.removesuffix("_text")
    config = AutoConfig.for_model(kind, text_config=text, vision_config=VISION)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)


def kimi(folder):
    """DeepSeek-V3's class under a name that transformers does not have, with code that nobody may run."""
    tiny_folder("deepseek_v3", folder)
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change_config(folder, model_type="kimi_k2", auto_map=code)
    (folder / "code.py").write_text("raise SystemExit('code of the checkpoint was run')")


def change_config(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def predicting(folder):
    """DeepSeek-V3 with its layer that predicts a second token."""
    tiny_folder("deepseek_v3", folder)
    weights = load_file(folder / "model.safetensors")
    ahead = {key.replace("layers.3", "layers.4"): value.clone() for key, value in weights.items() if "layers.3" in key}
    ahead["model.layers.4.eh_proj.weight"] = torch.ones(64, 128)
    save_file({**weights, **ahead}, folder / "model.safetensors", metadata={"format": "pt"})


PUBLISHED = {
    "gemma3": lambda folder: multimodal("gemma3_text", folder),
    "llama4": lambda folder: multimodal("llama4_text", folder),
    "kimi_k2": kimi,
    "deepseek_v3": predicting,
}


@pytest.mark.parametrize("form", PUBLISHED)
def test_published_forms_are_compared_and_exported(form, tmp_path, ranks):
    """Nested config, names with a prefix and other parts; code beside the weights; layers of multi-token prediction."""
    PUBLISHED[form](tmp_path / "in")
    chunks, model = loaded(tmp_path / "in", ranks)
    quick_check(chunks, model, tmp_path / "in", ranks)
    assert first_difference(chunks[0], tmp_path / "in")[0] is None
    assert changed_tensors(chunks, model, tmp_path / "in", ranks) == []
    save_hf(chunks, model, tmp_path / "out", ranks, tmp_path / "in")
    assert (tmp_path / "out" / "code.py").exists() == (form == "kimi_k2"), "auto_map names it"
    again, _ = loaded(tmp_path / "out", ranks)
    assert changed_tensors(again, model, tmp_path / "out", ranks) == []
    assert first_difference(again[0], tmp_path / "out")[0] is None


def test_null_takes_the_soft_caps_of_gemma_2_away(tmp_path, ranks):
    tiny_folder("gemma2", tmp_path)
    change_config(tmp_path, attn_logit_softcapping=None, final_logit_softcapping=None)
    chunks, model = loaded(tmp_path, ranks)
    assert (model.attn_logit_softcapping, model.final_logit_softcapping) == (None, None)
    assert first_difference(chunks[0], tmp_path)[0] is None


def test_folder_kinds(tmp_path):
    tiny_folder("llama", tmp_path / "hf")
    assert is_hf_folder(tmp_path / "hf") and not is_hf_folder(tmp_path)
