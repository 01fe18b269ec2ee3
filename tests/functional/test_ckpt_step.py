"""--ckpt-step, and the folder of one checkpoint as --load: in training, generation, export, conversion and verify."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sft.config.arguments import parse
from megatron_sft.config.folders import checkpoint_place
from megatron_sft.errors import ConfigError
from tests.functional.conftest import metrics_of
from tests.gloo import run_script


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, rows_file: Path) -> Path:
    """Checkpoints of iterations 2 and 4."""
    work = tmp_path_factory.mktemp("trained")
    done = train(tiny_folder, rows_file, work, "--load", tiny_folder, "--save", work / "out", "--train-iters", 4, "--lr", "1e-2")
    assert done.returncode == 0, done.stderr
    return work / "out"


def train(model: Path, rows: Path, work: Path, *flags: Any) -> Any:
    needed = ["--tokenizer-model", model, "--finetune-hf-dataset", rows, "--seq-length", 256, "--num-workers", 1]
    return run_script("finetune.py", [*needed, "--data-cache-path", work / "cache", "--save-interval", 2, *flags])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_export_takes_the_checkpoint_that_is_asked_for(trained: Path, tiny_folder: Path, tmp_path: Path) -> None:
    ways = {"newest": [trained], "step": [trained, "--ckpt-step", "2"], "folder": [trained / "iter_0000002"]}
    for name, place in ways.items():
        flags = ["export", "--load", *place, "--tokenizer-model", tiny_folder, "--save-hf", tmp_path / name]
        done = run_script("megatron_sft/__main__.py", flags)
        assert done.returncode == 0, done.stdout
    tensors = {name: weights(tmp_path / name)["model.norm.weight"] for name in ways}
    assert torch.equal(tensors["step"], tensors["folder"]) and not torch.equal(tensors["step"], tensors["newest"])


def test_a_run_goes_on_from_it(trained: Path, tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    flags = ["--load", trained / "iter_0000002", "--save", tmp_path / "out", "--train-iters", 3, "--lr", "1e-2"]
    done = train(tiny_folder, rows_file, tmp_path, *flags, "--lr-decay-iters", 4)
    assert done.returncode == 0, done.stderr
    (line,) = metrics_of(tmp_path / "out")
    assert (line["iteration"], line["sft/loss"]) == (3, metrics_of(trained)[2]["sft/loss"])


def test_going_back_in_the_folder_itself_sets_the_later_ones_aside(
    trained: Path, tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """With a save beyond the newest too: 40 would otherwise count among the checkpoints of a training that is not its own."""
    import shutil

    shutil.copytree(trained, tmp_path / "out")
    flags = ["--load", tmp_path / "out", "--save", tmp_path / "out", "--ckpt-step", 2, "--train-iters", 6, "--lr", "1e-2"]
    done = train(tiny_folder, rows_file, tmp_path, *flags, "--save-interval", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if "iter_" in path.name and path.is_dir())
    assert names == ["discarded_iter_0000004", "iter_0000002", "iter_0000003", "iter_0000006"]


def test_what_is_not_there_is_named(trained: Path, tiny_folder: Path, tmp_path: Path) -> None:
    flags = ["export", "--load", trained, "--ckpt-step", "3", "--save-hf", tmp_path / "hf"]
    done = run_script("megatron_sft/__main__.py", flags)
    assert done.returncode == 2
    assert f"{trained}: no checkpoint of iteration 3; there: 4, 2. Change --ckpt-step" in done.stdout + done.stderr
    flags = ["export", "--load", tiny_folder, "--ckpt-step", "3", "--save-hf", tmp_path / "hf"]
    assert run_script("megatron_sft/__main__.py", flags).returncode == 2


def test_places(trained: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trained / "iter_0000004"
    assert checkpoint_place(str(one)) == checkpoint_place(f"{one}/") == (str(trained), 4)
    assert checkpoint_place(str(trained)) == (str(trained), None)
    assert checkpoint_place(str(trained / "iter_0000009")) == (str(trained / "iter_0000009"), None)
    monkeypatch.chdir(one)
    assert checkpoint_place(".") == (str(trained), 4)
    (tmp_path / "release").mkdir()
    assert checkpoint_place(str(tmp_path / "release")) == (str(tmp_path), None)
    run, _ = parse(["--load", str(one)], 1, training=False)
    assert (run.checkpoint.load, run.checkpoint.ckpt_step, run.data.tokenizer_model) == (str(trained), 4, str(trained))
    with pytest.raises(ConfigError, match="name two checkpoints"):
        parse(["--load", str(one), "--ckpt-step", "2"], 1, training=False)


def test_generate_and_verify_take_it(trained: Path, tiny_folder: Path, tmp_path: Path) -> None:
    place, answers = trained / "iter_0000002", tmp_path / "answers.jsonl"
    done = run_script("generate.py", ["--load", place, "--prompt", "What is 1 plus 1?", "--osl", "3", "--output", answers])
    assert done.returncode == 0, done.stderr
    assert len(json.loads(answers.read_text())["tokens"]) <= 3
    done = run_script("megatron_sft/__main__.py", ["convert", "--load", place, "--save", tmp_path / "weights"])
    assert done.returncode == 0, done.stdout
    done = run_script("megatron_sft/__main__.py", ["verify", tiny_folder, place])
    assert done.returncode == 1 and "differ" in done.stdout  # it was trained
