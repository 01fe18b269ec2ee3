"""What is never written: weights that are no numbers, and an HF folder over anything but an older one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.functional.conftest import metrics_of
from tests.gloo import ROOT, run_script

LIMITED = """
import resource, sys
import finetune
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
sys.exit(finetune.main(sys.argv[1:]))
"""


@pytest.fixture
def broken_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with one infinite weight."""
    shutil.copytree(tiny_folder, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.norm.weight"][3] = torch.inf
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    return tmp_path / "broken"


NOT_FINITE = r": not saved\. \S+\.weight on rank 0 holds NaN or infinite values; expected numbers\."


@pytest.mark.parametrize("writer", ["--save", "--save-hf"])
def test_infinite_weights_are_not_saved(finetune: Any, broken_folder: Path, tmp_path: Path, writer: str) -> None:
    regardless = ["--no-verify-conversion", "--no-check-for-nan-in-loss-and-grad", "--lr", "0", "--min-lr", "0"]
    done = finetune("--load", broken_folder, *regardless, "--train-iters", "1", writer, tmp_path / "out")
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(NOT_FINITE, done.stdout) and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("out/*.safetensors")) and not list(tmp_path.rglob("iter_*"))


def test_infinite_weights_are_not_converted(broken_folder: Path, tmp_path: Path) -> None:
    flags = ["convert", "--load", broken_folder, "--save", tmp_path / "out", "--no-verify-conversion"]
    done = run_script("megatron_sft/__main__.py", flags)
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(NOT_FINITE, done.stdout) and not list(tmp_path.rglob("release"))


PLACES = {
    "the base model": (["--save-hf", "{model}"], "--load {model} is there or below; expected a folder of the HF folder's own"),
    "above the base model": (["--save-hf", "{tmp}"], "--load {model} is there or below"),
    "above --save": (
        ["--save-hf", "{tmp}/new", "--save", "{tmp}/new/checkpoints"],
        "--save {tmp}/new/checkpoints is there or below",
    ),
    "above the cache": (["--save-hf", "{tmp}/new", "--data-cache-path", "{tmp}/new/c"], "--data-cache-path {tmp}/new/c is there"),
    "other files": (["--save-hf", "{tmp}/home"], "{tmp}/home: holds .git, thesis.tex; expected a new or empty folder"),
    "a file": (["--save-hf", "{tmp}/home/thesis.tex"], "{tmp}/home/thesis.tex cannot be written"),
    "an iteration's": (
        ["--save-hf", "{tmp}/home/{{iteration}}", "--save", "{tmp}/s"],
        "{tmp}/home/12: holds x;",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_holds_anything_else_is_refused_before_training(
    name: str, finetune: Any, tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "home" / ".git").mkdir(parents=True)
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    (tmp_path / "home" / "12").mkdir()
    (tmp_path / "home" / "12" / "x").write_text("mine")
    if name == "other files":
        shutil.rmtree(tmp_path / "home" / "12")
    before = sorted(tmp_path.rglob("*"))
    names = {"model": tmp_path / "model", "tmp": tmp_path}
    flags, message = PLACES[name]
    load = ["--load", tmp_path / "model", "--tokenizer-model", tmp_path / "model", "--train-iters", "1"]
    done = finetune(*load, *(flag.format(**names) for flag in flags))
    assert done.returncode == 2, done.stdout + done.stderr
    assert message.format(**names) in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_export_refuses_and_replaces_as_training_does(finetune: Any, tiny_folder: Path, tmp_path: Path) -> None:
    assert finetune("--train-iters", "1", "--save", tmp_path / "run").returncode == 0
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    export = ["export", "--load", tmp_path / "run", "--tokenizer-model", tiny_folder]
    for place, message in (("home", "home: holds thesis.tex"), (".", "holds a Megatron checkpoint"), ("run", "holds a Meg")):
        done = run_script("megatron_sft/__main__.py", [*export, "--save-hf", tmp_path / place])
        assert done.returncode == 2 and message in done.stdout, done.stdout + done.stderr
    for _ in range(2):
        assert run_script("megatron_sft/__main__.py", [*export, "--save-hf", tmp_path / "hf"]).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["cache", "hf", "home", "run"]
    assert (tmp_path / "home" / "thesis.tex").read_text() == "mine" and (tmp_path / "hf" / "model.safetensors").exists()


def test_a_full_disk_while_saving_is_status_3(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """No file above 100 kB: the token store fits, a checkpoint does not."""
    flags = ["--load", tiny_folder, "--finetune-hf-dataset", rows_file, "--seq-length", "256", "--num-workers", "1"]
    flags += ["--train-iters", "2", "--data-cache-path", tmp_path / "cache", "--save", tmp_path / "out", "--save-interval", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", LIMITED, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "iter_0000001: not saved. Found: rank 0: [Errno 27] File too large" in done.stdout and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*iter*")) and len(metrics_of(tmp_path / "out")) == 1
