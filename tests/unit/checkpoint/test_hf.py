"""HF folder -> model -> HF folder on one process, against transformers; what is refused before any weight is read."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sft import conversion, parallel
from megatron_sft.checkpoint import tensors
from megatron_sft.checkpoint.hf import is_hf_folder, load_hf_weights, save_hf
from megatron_sft.checkpoint.hf_config import model_config_from_hf, read_hf_config
from megatron_sft.checkpoint.verify import changed_tensors, first_difference, quick_check
from megatron_sft.config import ParallelConfig, TrainConfig
from megatron_sft.errors import CheckpointError
from megatron_sft.model.build import build_model
from tests.unit.checkpoint.tiny_models import KEYS, tiny_folder


@pytest.fixture(scope="module")
def ranks():
    yield parallel.initialize(ParallelConfig(), 1)
    parallel.finalize()


def loaded(folder, ranks, dtype="fp32"):
    model = conversion.padded(model_config_from_hf(read_hf_config(folder)), 8)
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
    monkeypatch.setattr(tensors, "MAX_SHARD_BYTES", 100_000)
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


def test_tied_output_that_is_stored_too_is_kept(tmp_path, ranks):
    tiny_folder("llama-tied", tmp_path / "in")
    weights = load_file(tmp_path / "in" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    chunks, model = loaded(tmp_path / "in", ranks)
    save_hf(chunks, model, tmp_path / "out", ranks, tmp_path / "in")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], weights["lm_head.weight"])


def test_saving_over_another_folder_is_refused(tmp_path, ranks):
    tiny_folder("llama", tmp_path / "in")
    chunks, model = loaded(tmp_path / "in", ranks)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is no Hugging Face folder"):
        save_hf(chunks, model, tmp_path / "home", ranks, tmp_path / "in")
    assert (tmp_path / "home" / "thesis.tex").exists()


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


def _cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _bomb(folder):
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def _index(folder, file, tensor="model.norm.weight"):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {tensor: file}}))


def _link(folder):
    target = folder.parent / "elsewhere.safetensors"
    os.rename(folder / "model.safetensors", target)
    (folder / "model.safetensors").symlink_to(target)


def _pickle(folder):
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")


def _integers(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors")


WRONG = {
    "missing": (_drop, r"1 tensors missing \(first: model.layers.2.mlp.up_proj.weight\)"),
    "extra": (_add, r"1 tensors that the model does not have \(first: model.layers.1.self_attn.q_proj.bias\)"),
    "shape": (_reshape, r"model.norm.weight has shape \[63\], not \[64\]"),
    "cut": (_cut, "damaged or cut off"),
    "bomb": (_bomb, "damaged or cut off"),
    "outside": (lambda folder: _index(folder, "../secret.safetensors"), "outside the folder"),
    "absolute": (lambda folder: _index(folder, "/etc/passwd"), "outside the folder"),
    "link": (_link, "outside the folder"),
    "absent": (lambda folder: _index(folder, "other.safetensors"), "Finish the download"),
    "index": (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "not a safetensors index"),
    "stale index": (lambda folder: _index(folder, "model.safetensors"), "are in only one of the file and"),
    "pickle": (_pickle, "Unpickling can run code"),
    "none": (lambda folder: (folder / "model.safetensors").unlink(), "expected the weights of a Hugging Face model"),
    "dtype": (_integers, "has dtype I8"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_folder_is_refused_before_anything_is_copied(fault, tmp_path, ranks):
    folder = tmp_path / "model"
    tiny_folder("llama", folder)
    model = conversion.padded(model_config_from_hf(read_hf_config(folder)), 8)
    chunks = build_model(model, ParallelConfig(), TrainConfig())
    for parameter in chunks[0].parameters():
        parameter.data.fill_(7.0)
    spoil, message = WRONG[fault]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_hf_weights(chunks, model, folder, ranks)
    assert all((parameter == 7.0).all() for parameter in chunks[0].parameters())


def test_folder_kinds(tmp_path):
    tiny_folder("llama", tmp_path / "hf")
    assert is_hf_folder(tmp_path / "hf") and not is_hf_folder(tmp_path)
