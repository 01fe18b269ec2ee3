"""A resume with other flags, from the command line: what is kept, told and refused. Rows are counted in
tests/distributed/test_resume_changes.py."""

import json
import shutil
from argparse import Namespace

import pytest
import torch

from megatron_sft.checkpoint import manifest
from tests.functional.conftest import metrics_of

EPOCH = ["--num-epoch", "1", "--packing", "none", "--lr", "1e-3"]
"""23 packs."""


@pytest.fixture
def stopped(finetune, tmp_path):
    """Gives a --save folder that holds a run stopped after some iterations, by its flags."""

    def run(*flags, after=4, processes=1):
        save = tmp_path / "out"
        done = finetune(*EPOCH, *flags, "--save", save, "--exit-interval", after, processes=processes)
        assert done.returncode == 4, done.stdout + done.stderr
        return save

    return run


def run_config(save, iteration):
    return json.loads((save / f"iter_{iteration:07d}" / "run_config.json").read_text())


def args_of(save, iteration):
    return torch.load(save / f"iter_{iteration:07d}" / "common.pt", weights_only=False)["args"]


def test_the_batch_size_that_counts_is_kept_by_other_layouts(finetune, stopped, tmp_path):
    """The first start is 1 process at micro-batch 1; the others would give 2 and 3."""
    save = stopped()
    assert run_config(save, 4)["train"]["global_batch_size"] == args_of(save, 4).global_batch_size == 1
    two = finetune(*EPOCH, "--save", save, "--exit-interval", 6, processes=2)
    assert two.returncode == 4, two.stdout + two.stderr
    said = "global batch size: 1 as in the checkpoint; --micro-batch-size 1 x 2 data-parallel processes would be 2. They do not"
    assert said in two.stdout
    done = finetune(*EPOCH, "--save", save, "--micro-batch-size", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["consumed_samples"] for line in metrics_of(save)] == list(range(1, 24))


def test_a_run_without_the_flag_keeps_what_the_flag_said(finetune, stopped):
    save = stopped("--global-batch-size", 4, after=2)
    done = finetune(*EPOCH, "--save", save)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["consumed_samples"] for line in metrics_of(save)] == [4, 8, 12, 16, 20, 23]


def test_a_checkpoint_that_says_only_what_the_batch_size_was_made_of(finetune, stopped):
    """As an early release wrote it: micro-batch 3 on one process, then 1 on two."""
    save = stopped("--micro-batch-size", 3, after=2)
    folder = save / "iter_0000002"
    config = run_config(save, 2)
    config["train"]["global_batch_size"] = None
    common = torch.load(folder / "common.pt", weights_only=False)
    common["args"] = Namespace(**{**vars(common["args"]), "global_batch_size": None})
    del common["train_state"]["order_batch_size"]
    torch.save(common, folder / "common.pt")
    common_pt = (folder / "common.pt").read_bytes()
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    records = [manifest.FileRecord(name, file["bytes"], int(file["crc32"], 16)) for name, file in listed.items()]
    new = {"run_config.json": json.dumps(config).encode(), "common.pt": common_pt}
    records = [record for record in records if record.name not in new]
    (folder / "manifest.json").unlink()
    for name in new:
        (folder / name).unlink()
    records += [manifest.write_file(folder / name, content) for name, content in new.items()]
    manifest.write_manifest(folder, records)
    done = finetune(*EPOCH, "--save", save, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["consumed_samples"] for line in metrics_of(save)] == [3, 6, 9, 12, 15, 18, 21, 23]


def test_another_batch_size_is_refused_or_exact(finetune, stopped, tmp_path):
    """8 packs of 23 are done in steps of 4 when the step becomes 5; the schedule goes on where it was."""
    save = stopped("--global-batch-size", 4, after=2)
    flags = [*EPOCH, "--save", save, "--global-batch-size", 5]
    refused = finetune(*flags)
    assert refused.returncode == 2 and "train.global_batch_size: 4 -> 5" in refused.stdout
    assert "--allow-changed train.global_batch_size." in refused.stdout
    done = finetune(*flags, "--allow-changed", "train.global_batch_size")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = metrics_of(save)
    assert [line["consumed_samples"] for line in lines] == [4, 8, 13, 18, 23]
    rates = [line["lr"] for line in lines]
    assert rates == sorted(rates, reverse=True) and run_config(save, 5)["train"]["global_batch_size"] == 5


def test_lengths_in_iterations_count_iterations_of_any_size(finetune, tmp_path):
    flags = ["--packing", "none", "--train-iters", 5, "--lr", "1e-3", "--lr-decay-style", "linear", "--save", tmp_path / "out"]
    assert finetune(*flags, "--global-batch-size", 4, "--exit-interval", 2).returncode == 4
    done = finetune(*flags, "--global-batch-size", 6, "--allow-changed", "global_batch_size")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = metrics_of(tmp_path / "out")
    assert [line["consumed_samples"] for line in lines] == [4, 8, 14, 20, 23]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * (5 - k) / 5 for k in range(5)])


def test_finetune_from_a_checkpoint_starts_afresh_with_its_own_batch_size(finetune, stopped, tmp_path):
    save = stopped("--global-batch-size", 4, after=2)
    done = finetune(*EPOCH, "--load", save, "--finetune", "--micro-batch-size", 6, "--save", tmp_path / "new")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["consumed_samples"] for line in metrics_of(tmp_path / "new")] == [6, 12, 18, 23]


def test_valid_data_on_resume_is_told_and_trains_on_the_same_packs(finetune, stopped, rows_file, tmp_path):
    """The issue's case was 16 training packs that became 20."""
    save = stopped("--split", "80,20,0")
    flags = [*EPOCH, "--split", "80,20,0", "--save", save, "--valid-data", rows_file, "--eval-iters", "-1"]
    done = finetune(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed since the checkpoint: data.valid_data: [] -> [" in done.stdout
    assert metrics_of(save)[-1]["consumed_samples"] == 18 and "valid/loss" in metrics_of(save)[-1]


def test_what_changes_the_training_rows_is_refused_by_name(finetune, stopped, rows_file, tmp_path):
    flags = [*EPOCH, "--save", stopped("--split", "80,20,0"), "--exit-interval", 5]
    done = finetune(*flags, "--split", "90,10,0")
    assert done.returncode == 2 and "data.split: [80.0, 20.0, 0.0] -> [90.0, 10.0, 0.0]; data_packs: " in done.stdout
    (tmp_path / "changed.jsonl").write_text(rows_file.read_text().replace("What is 3 ", "What is three "))
    done = finetune(*flags, "--split", "80,20,0", "--finetune-hf-dataset", tmp_path / "changed.jsonl")
    assert done.returncode == 2 and "data.train_data: [" in done.stdout and "data_tokens: " in done.stdout


def test_what_leaves_the_training_rows_is_told(finetune, stopped, rows_file, tmp_path):
    """The file at another place, and a test share taken from validation."""
    flags = [*EPOCH, "--save", stopped("--split", "80,20,0"), "--exit-interval", 5]
    shutil.copy(rows_file, tmp_path / "moved.jsonl")
    done = finetune(*flags, "--split", "8,1,1", "--finetune-hf-dataset", tmp_path / "moved.jsonl")
    assert done.returncode == 4, done.stdout + done.stderr
    for name in ("data.train_data", "data.split"):
        assert f"changed since the checkpoint: {name}: [" in done.stdout
