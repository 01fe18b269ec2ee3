"""convert, export, verify and conf as the commands call them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_sft import conversion
from megatron_sft.config import ModelConfig, ParallelConfig
from megatron_sft.errors import CheckpointError, ConfigError
from tests.unit.checkpoint.tiny_models import tiny_folder


def test_there_and_back_through_a_megatron_checkpoint(tmp_path):
    tiny_folder("qwen3", tmp_path / "hf", torch.bfloat16)
    conversion.convert(tmp_path / "hf", tmp_path / "megatron", ParallelConfig(), "bf16")
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    assert conversion.verify(tmp_path / "hf", tmp_path / "megatron")
    conversion.export(tmp_path / "megatron", tmp_path / "back", ParallelConfig(), tmp_path / "hf")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    conversion.export(tmp_path / "megatron", tmp_path / "alone", ParallelConfig(), None)
    assert json.loads((tmp_path / "alone" / "config.json").read_text())["model_type"] == "qwen3"


def test_conf_takes_the_folder_for_its_default_checkpoint(tmp_path):
    tiny_folder("qwen3_moe", tmp_path / "tiny")
    text = conversion.conf(tmp_path / "tiny")
    assert text.split("\n")[1:3] == [
        f"# {tmp_path / 'tiny'}: the values of its config.json.",
        f'HF_MODEL_CKPT="${{HF_MODEL_CKPT:-{tmp_path / "tiny"}}}"',
    ]
    assert "  --num-layers 4 --hidden-size 64 --ffn-hidden-size 96\n" in text


def test_wrong_places_and_flags_are_refused(tmp_path):
    tiny_folder("llama", tmp_path / "hf")
    nothing = ParallelConfig()
    with pytest.raises(ConfigError, match=r"--num-layers: the flags say num_layers = 7, config\.json says 4"):
        described = (ModelConfig(num_layers=7), frozenset({"num_layers"}))
        conversion.convert(tmp_path / "hf", tmp_path / "out", nothing, described=described)
    with pytest.raises(CheckpointError, match="no Megatron checkpoint; expected a folder with latest_checkpointed"):
        conversion.export(tmp_path / "hf", tmp_path / "out", nothing, None)
    other = tmp_path / "other"
    other.mkdir()
    (other / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CheckpointError, match="does not say which architecture it has"):
        conversion.export(other, tmp_path / "out", nothing, None)
    with pytest.raises(CheckpointError, match="--save is --load"):
        conversion.reshard(other, other, nothing, None)
    assert not (tmp_path / "out").exists()
