"""Adapters from the command line: training, checkpoints, resume, PEFT folders, generation, merging."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.functional.conftest import metrics_of
from tests.gloo import run_script

FLAGS = [
    "--lora-rank",
    "4",
    "--lora-target-modules",
    "all-linear",
    "embed_tokens",
    "lm_head",
    "--lr",
    "1e-2",
    "--global-batch-size",
    "4",
]
STEPS = [*FLAGS, "--train-iters", "4", "--save-interval", "2"]
TOKENS = torch.tensor([[1, 40, 41, 42, 43, 44, 45, 46, 47]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def with_peft(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter))


def plain(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def test_an_adapter_is_trained_resumed_exported_used_and_merged(finetune: Any, tiny_folder: Path, tmp_path: Path) -> None:
    save, adapter, base = tmp_path / "out", tmp_path / "adapter", load_file(tiny_folder / "model.safetensors")
    done = finetune(*STEPS, "--save", save, "--save-hf", adapter)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert not (adapter / "config.json").exists()
    trained = load_file(adapter / "adapter_model.safetensors")
    assert len(trained) == 2 * (7 * 4 + 2) and all(bool(tensor.any()) for tensor in trained.values())
    size = sum(path.stat().st_size for path in (save / "iter_0000004").iterdir())
    assert size < sum(tensor.nbytes for tensor in base.values()), "a checkpoint of adapters does not hold the base"
    saved = json.loads((save / "iter_0000004" / "run_config.json").read_text())
    model_type = json.loads((tiny_folder / "config.json").read_text())["model_type"]
    assert re.fullmatch(rf"{model_type}:[0-9a-f]{{64}}", saved["base_weights"])

    again, continued = tmp_path / "again", tmp_path / "continued"
    shutil.copytree(save / "iter_0000002", again / "iter_0000002")
    (again / "latest_checkpointed_iteration.txt").write_text("2")
    done = finetune(*STEPS, "--save", again, "--save-hf", continued)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["sft/loss"] for line in metrics_of(again)] == [line["sft/loss"] for line in metrics_of(save)[2:]]
    resumed = load_file(continued / "adapter_model.safetensors")
    assert resumed.keys() == trained.keys() and all(torch.equal(trained[name], resumed[name]) for name in trained)

    outputs = {}
    for name, flags in {
        "exported": ["export", "--load", save, "--save-hf", tmp_path / "exported"],
        "merged-export": ["export", "--load", save, "--lora-merge", "--save-hf", tmp_path / "merged-export"],
        "merged": ["merge", tiny_folder, adapter, tmp_path / "merged"],
    }.items():
        done = run_script("megatron_sft/__main__.py", flags)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs[name] = with_peft(tiny_folder, tmp_path / name) if name == "exported" else plain(tmp_path / name)
    expected, before = with_peft(tiny_folder, adapter), plain(tiny_folder)
    assert torch.equal(outputs["exported"], expected)
    for place in (save, adapter):
        done = run_script("megatron_sft/__main__.py", ["verify", tiny_folder, place])
        assert done.returncode == 0, done.stdout + done.stderr
        assert float(done.stdout.rpartition("difference from transformers ")[2].split()[0]) < 1e-5 * expected.abs().max()
    for name in ("merged", "merged-export"):
        assert (outputs[name] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (expected - before).abs().max() > 1e-2 * expected.abs().max()
    after = load_file(tiny_folder / "model.safetensors")
    assert all(torch.equal(base[name], after[name]) for name in base)
