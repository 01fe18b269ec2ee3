"""Optimizers, rates of groups and a warm start from the command line."""

import pytest

from tests.functional.conftest import metrics_of

SHORT = ["--train-iters", "4", "--global-batch-size", "4"]


def test_a_warm_start_takes_moments_and_not_the_rate(finetune, tmp_path):
    """The second run has the first one's moments, so that its first update is another one, and rates of its own."""
    first = tmp_path / "first"
    done = finetune(*SHORT, "--lr", "1e-4", "--save-interval", "2", "--save", first)
    assert done.returncode == 0, done.stdout + done.stderr
    rates = "--lr 1e-3 --init-lr-frac 0.8 --warmdown-ratio 0.5 --final-lr-frac 0.25 --finetune".split()
    losses = {}
    for moments in (0, 1):
        save = tmp_path / f"second{moments}"
        done = finetune(*SHORT, *rates, "--load", first, "--ckpt-step", "2", "--load-optimizer", moments, "--save", save)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = metrics_of(save)
        assert [line["lr"] for line in lines] == pytest.approx([8e-4, 8e-4, 8e-4, 5e-4], rel=1e-9)
        losses[moments] = [line["sft/loss"] for line in lines]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]
    flags = ["--lr", "1e-3", "--optimizer", "sgd", "--finetune", "--load", first, "--load-optimizer", "1"]
    done = finetune(*SHORT, *flags, "--save", tmp_path / "other")
    assert done.returncode == 2 and not (tmp_path / "other").exists()
    said = f'--load-optimizer 1: {first} has other states: optim.optimizer: "adam" -> "sgd". Expected the same. Leave it out.'
    assert said in done.stdout + done.stderr


def test_an_hf_folder_has_no_moments(finetune, tiny_folder, tmp_path):
    done = finetune(*SHORT, "--lr", "1e-4", "--load-optimizer", "1", "--save", tmp_path / "out")
    assert done.returncode == 2
    assert f"--load-optimizer 1: {tiny_folder} is an HF folder, which holds no optimizer states." in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_muon_warns_once_and_logs_the_rate_of_each_group(finetune, tmp_path):
    flags = "--lr 1e-3 --optimizer muon --embedding-lr 1e-4 --lr-decay-style constant".split()
    done = finetune(*SHORT, *flags, "--save", tmp_path / "out", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("github.com/pytorch/torchtune/issues/2803") == 1
    lines = metrics_of(tmp_path / "out")
    assert [(line["lr"], line["lr/embedding"], line["lr/matrix"], line["lr/other"]) for line in lines] == [
        (1e-3, 1e-4, 1e-3, 1e-3)
    ] * 4
    assert lines[-1]["sft/loss"] < lines[0]["sft/loss"] - 0.2
    assert " lr/embedding: 1.000000E-04 |" in done.stdout


def test_adapters_have_groups_and_a_warm_start(finetune, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ["--lora-rank", "2", "--param-groups", r"lora\.b$ lr=8e-3", "--lr-decay-style", "constant"]
    done = finetune(*SHORT, *flags, "--lr", "1e-3", "--save", first)
    assert done.returncode == 0, done.stdout + done.stderr
    again = ["--train-iters", "1", "--global-batch-size", "4", "--lr", "1e-3", "--finetune", "--lora-load", first]
    done = finetune(*again, *flags, "--load-optimizer", "1", "--save", second)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = metrics_of(first), metrics_of(second)
    assert [(line["lr"], line[r"lr/lora\.b$"], line["lr/other"]) for line in before + after] == [(1e-3, 8e-3, 1e-3)] * 5
    assert after[0]["sft/loss"] < before[0]["sft/loss"] - 0.05 and "no optimizer states" not in done.stdout + done.stderr
