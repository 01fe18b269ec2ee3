"""convert, export, verify and conf as the commands call them."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sft import conversion, parallel
from megatron_sft.__main__ import main
from megatron_sft.config.run import ModelConfig, ParallelConfig
from megatron_sft.errors import CheckpointError, ConfigError
from megatron_sft.hf.conf import conf_of_folder
from tests.unit.checkpoint.test_lock import taken
from tests.unit.checkpoint.test_tracker import put
from tests.unit.hf.tiny_models import conversion_run, tiny_folder

ROOT = Path(__file__).parents[2]
LAUNCHER = "import json, sys; print('RUN ' + json.dumps(sys.argv[2:]))"
NAME = "Qwen/Qwen3-0.6B"


def commands(page, tmp_path):
    """Arguments of every command that the page shows, of scripts as their launcher gets them; /path/to is tmp_path."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL):
        block = block.replace("/path/to", str(tmp_path))
        for line in [line for line in block.split("\n") if line.startswith("megatron-sft ")]:
            found.append(shlex.split(line)[1:])
        if "convert.sh" in block:
            launch = {"LAUNCH_SCRIPT": shlex.join([sys.executable, "-c", LAUNCHER]), "SANDBOX_ROOT": str(tmp_path)}
            done = subprocess.run(
                ["bash", "-euc", block], cwd=ROOT, env={**os.environ, **launch}, capture_output=True, text=True, check=True
            )
            found += [json.loads(line[4:])[1:] for line in done.stdout.split("\n") if line.startswith("RUN ")]
    return found


def test_commands_of_the_convert_page_run(tmp_path, capsys):
    tiny_folder("qwen3", tmp_path / "Qwen3-0.6B", torch.bfloat16)
    script = tmp_path / "conf" / "model" / f"{NAME}.sh"
    script.parent.mkdir(parents=True)
    script.write_text(conf_of_folder(tmp_path / "Qwen3-0.6B"))
    shown = commands("convert.md", tmp_path)
    assert [words[0] for words in shown] == ["convert", "export", "verify", "conf"]
    for words in shown:
        assert main(words) == 0, words
    assert "tensors: 0 differ" in capsys.readouterr().out
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("Qwen3-0.6B", "hf"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_conversion_that_rounds_says_so_and_verify_names_the_precision(tmp_path, capsys, dtype):
    tiny_folder("qwen3", tmp_path / "hf", torch.float32)
    assert main(["convert", f"--{dtype}", "--load", f"{tmp_path}/hf", "--save", f"{tmp_path}/out"]) == 0
    said = f"{tmp_path}/hf: 47 tensors of more precision are rounded to bf16 (--bf16). --fp32 keeps them as they are."
    assert (said in capsys.readouterr().out) == (dtype == "bf16")
    assert main(["verify", f"{tmp_path}/hf", f"{tmp_path}/out"]) == (1 if dtype == "bf16" else 0)
    printed = capsys.readouterr().out
    assert ("each of them is the folder's, rounded to bf16" in printed) == (dtype == "bf16")
    assert ("tensors: 0 differ" in printed) == (dtype == "fp32")
    assert f"loaded the weights of {tmp_path}/out/release; nothing else of it is taken" in printed


def test_conf_command_of_the_models_page_runs(tmp_path, capsys):
    tiny_folder("gemma3_text", tmp_path / "model")
    ((command, folder, *_),) = [words for words in commands("models.md", tmp_path) if words[0] == "conf"]
    assert main([command, folder]) == 0
    assert capsys.readouterr().out == conf_of_folder(tmp_path / "model")


def test_there_and_back_through_a_megatron_checkpoint(tmp_path):
    tiny_folder("qwen3", tmp_path / "hf", torch.bfloat16)
    conversion.convert(conversion_run(tmp_path / "hf", save=tmp_path / "megatron"))
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    assert conversion.verify(str(tmp_path / "hf"), str(tmp_path / "megatron"))
    conversion.export(conversion_run(tmp_path / "megatron", save_hf=tmp_path / "back", like=tmp_path / "hf"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    conversion.export(conversion_run(tmp_path / "megatron", save_hf=tmp_path / "alone"))
    assert json.loads((tmp_path / "alone" / "config.json").read_text())["model_type"] == "qwen3"


def test_conf_takes_the_folder_for_its_default_checkpoint(tmp_path):
    tiny_folder("qwen3_moe", tmp_path / "tiny")
    text = conf_of_folder(tmp_path / "tiny")
    assert text.split("\n")[1:3] == [
        f"# {tmp_path / 'tiny'}: the values of its config.json.",
        f'HF_MODEL_CKPT="${{HF_MODEL_CKPT:-{tmp_path / "tiny"}}}"',
    ]
    assert "  --num-layers 4 --hidden-size 64 --ffn-hidden-size 96\n" in text


def test_a_layout_that_the_folders_model_does_not_allow_is_refused(tmp_path):
    tiny_folder("gpt_oss", tmp_path / "hf")
    layout = ParallelConfig(tensor_model_parallel_size=2, expert_tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="megatron-core cuts no expert that has biases"):
        conversion.convert(conversion_run(tmp_path / "hf", parallel=layout, save=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_wrong_places_and_flags_are_refused(tmp_path):
    tiny_folder("llama", tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"--num-layers: the flags say num_layers = 7, config\.json says 4"):
        run = dataclasses.replace(conversion_run(tmp_path / "hf", save=tmp_path / "out"), model=ModelConfig(num_layers=7))
        conversion.convert(run, frozenset({"num_layers"}))
    with pytest.raises(CheckpointError, match="no Megatron checkpoint; expected a folder with latest_checkpointed"):
        conversion.export(conversion_run(tmp_path / "hf", save_hf=tmp_path / "out"))
    other = tmp_path / "other"
    (other / "release").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no Megatron checkpoint"):
        conversion.export(conversion_run(other, save_hf=tmp_path / "out"))
    (other / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint\. Found: .*release: no metadata\.json"):
        conversion.export(conversion_run(other, save_hf=tmp_path / "out"))
    (other / "release" / "metadata.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not say which architecture it has"):
        conversion.export(conversion_run(other, save_hf=tmp_path / "out"))
    with pytest.raises(CheckpointError, match="--save is --load"):
        conversion.convert(conversion_run(other, save=other))
    assert not (tmp_path / "out").exists()


def as_it_is(folder):
    """Everything below it, with what changes when it is written to."""
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path in folder.rglob("*") for stat in [path.stat()]}


def test_a_target_that_is_something_else_is_refused_before_any_work(tmp_path):
    hf, other, root = tmp_path / "hf", tmp_path / "other", tmp_path / "root"
    tiny_folder("llama", hf)
    other.mkdir()
    (other / "model.safetensors").write_text("")
    for folder in (root / "iter_0000002", root / "iter_0000007", tmp_path / "weights" / "release"):
        put(folder)
    before = as_it_is(tmp_path)
    refused = {
        hf: "--save is --load",
        other: "is an HF folder",
        root: "holds the checkpoints of a training, up to iteration 7",
        root / "iter_0000002": "is the folder of one checkpoint",
    }
    for save, found in refused.items():
        with pytest.raises(CheckpointError, match=f"^{save}: {found}; expected another folder, which the weights alone go to"):
            conversion.convert(conversion_run(hf, save=save))
    for folder in (root, root / "iter_0000002", tmp_path / "weights", tmp_path):
        with pytest.raises(CheckpointError, match=f"^{folder}: holds a Megatron checkpoint; expected a folder for an HF model"):
            conversion.export(conversion_run(root, save_hf=folder))
    with taken(tmp_path / "busy"):
        with pytest.raises(CheckpointError, match="busy: another run is using it: process"):
            conversion.convert(conversion_run(hf, save=tmp_path / "busy"))
    parallel.finalize()
    assert as_it_is(tmp_path) == before
