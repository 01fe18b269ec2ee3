"""convert, export, verify and conf as the commands call them."""

import json

import torch
from safetensors.torch import load_file

from megatron_sft import conversion
from megatron_sft.config import ParallelConfig
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
