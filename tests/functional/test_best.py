"""The checkpoint with the least held-out loss is named and kept; HF folders appear with the checkpoints."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_sft.errors import DataError
from megatron_sft.report.runs import read_runs
from tests.functional.conftest import metrics_of


def test_the_best_checkpoint_is_kept_and_hf_folders_follow_the_saves(finetune, tmp_path):
    """Held-out rows of which the model forgets more and more make an early checkpoint the best one."""
    save, other = tmp_path / "out", tmp_path / "other.jsonl"
    messages = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "XYZ#@&" * 9}]
    other.write_text(json.dumps({"messages": messages}) + "\n")
    flags = ["--train-iters", "8", "--global-batch-size", "4", "--lr-decay-style", "constant", "--lr", "1e-2"]
    flags += ["--valid-data", other, "--eval-iters", "-1", "--eval-interval", "2", "--save-interval", "2", "--save-retain", "1"]
    flags += ["--save", save, "--save-hf", tmp_path / "hf-{iteration}", "--async-save"]
    done = finetune(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    valid = {line["iteration"]: line["valid/loss"] for line in metrics_of(save) if "valid/loss" in line}
    best = min(valid, key=valid.get)
    assert sorted(valid) == [2, 4, 6, 8] and best != 8, "this test needs a run that gets worse"
    assert json.loads((save / "best_checkpoint.json").read_text()) == {
        "iteration": best,
        "metric": "valid/loss",
        "value": valid[best],
    }
    assert sorted(path.name for path in save.glob("iter_*")) == [f"iter_{number:07d}" for number in (best, 8)]
    assert f"best checkpoint so far: iteration {best}, valid/loss {valid[best]:.6f}" in done.stdout
    folders = {number: load_file(tmp_path / f"hf-{number}" / "model.safetensors") for number in (2, 4, 6, 8)}
    name = "model.embed_tokens.weight"
    assert not torch.equal(folders[2][name], folders[8][name])
    assert not list(tmp_path.glob(".*")), "no half-written folder is left"

    (save / "best_checkpoint.json").unlink()  # as a kill between the save and the mark leaves it
    shutil.rmtree(save / f"iter_{best:07d}")
    again = finetune(*flags, "--train-iters", "10", "--eval-interval", "100")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"best checkpoint so far: iteration 8, valid/loss {valid[8]:.6f}" in again.stdout
    assert json.loads((save / "best_checkpoint.json").read_text())["value"] == valid[8]


def test_a_run_ends_when_a_task_gets_no_better(finetune, tmp_path):
    """By the bits per byte of a text that training makes less likely; the best checkpoint stays, and the run is over."""
    save, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("XYZ#@&" * 9)
    rows = tmp_path / "valid.jsonl"
    messages = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "\u00fc#@" * 9}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    flags = ["--train-iters", "9", "--global-batch-size", "4", "--lr-decay-style", "constant", "--lr", "1e-2", "--save", save]
    flags += ["--eval-tasks", "text/bits-per-byte", "--eval-data", f"text={text}", "--eval-task-interval", "1"]
    flags += [
        "--best-metric",
        "eval/text/bits-per-byte",
        "--early-stop-patience",
        "2",
        "--save-interval",
        "1",
        "--save-retain",
        "1",
    ]
    flags += ["--valid-data", rows, "--eval-iters", "-1", "--eval-interval", "1"]
    done = finetune(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = metrics_of(save)
    scores = [line["eval/text/bits-per-byte"] for line in lines]
    best, last = min(range(len(scores)), key=scores.__getitem__) + 1, len(scores)
    assert last == best + 2 < 9, scores
    assert (
        f"is no better than {scores[best - 1]:.6f} at iteration {best} since 2 evaluations (--early-stop-patience)" in done.stdout
    )
    assert json.loads((save / "best_checkpoint.json").read_text())["metric"] == "eval/text/bits-per-byte"
    assert sorted(path.name for path in save.glob("iter_*")) == [f"iter_{number:07d}" for number in (best, last)]
    assert f"ended after iteration {last} of 9 (--early-stop-patience): checkpoints in " in done.stdout
    page = read_runs([str(save)])[0]
    assert page.attempts[-1].outcome == f"ended early, at iteration {last} of 9 (--early-stop-patience)"
    tokens, size = 36 + 1, 36  # the end of the turn is a token without text
    assert lines[0]["valid/bits_per_byte"] == pytest.approx(lines[0]["valid/loss"] * tokens / size / math.log(2), rel=1e-12)
    other = finetune(*flags, "--best-metric", "valid/loss/rows", "--save", tmp_path / "other")
    assert other.returncode == DataError.exit_status
    assert (
        "--best-metric valid/loss/rows: the held-out rows are of valid; expected one of several." in other.stdout + other.stderr
    )
    again = finetune(*flags)
    assert again.returncode != 0
    assert f"ended at iteration {last} already, 2 evaluations after the best; expected fewer" in again.stdout + again.stderr
