"""--loss-spike-factor: a step with a sudden loss is skipped, or stops the run with the state before it saved."""

import json
import random
import shutil
from pathlib import Path

import pytest

from megatron_sft.__main__ import main
from tests.functional.conftest import metrics_of
from tests.unit.report.test_page import assert_self_contained

SPIKE = 16
"""The iteration that holds the odd row (two rows a step, in file order)."""


@pytest.fixture
def odd_rows(tmp_path: Path) -> Path:
    """40 rows of one kind, of which the 31st has letters that nobody can guess."""
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz@#%&*", k=120))
    path = tmp_path / "odd.jsonl"
    with path.open("w") as file:
        for number in range(40):
            answer = letters if number == 2 * SPIKE - 2 else "yes yes yes yes"
            messages = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def test_a_spike_is_skipped_the_same_way_after_a_resume_or_stops_every_rank(finetune, odd_rows, tmp_path):
    flags = ["--finetune-hf-dataset", odd_rows, "--packing", "none", "--no-shuffle", "--train-iters", "20", "--lr", "1e-2"]
    flags += ["--global-batch-size", "2", "--loss-spike-factor", "3", "--lr-decay-style", "constant"]
    whole, again, stopped = tmp_path / "whole", tmp_path / "again", tmp_path / "stopped"
    done = finetune(*flags, "--save", whole, "--save-interval", "13")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = metrics_of(whole)
    assert [line["skipped_iterations"] for line in lines] == [0] * (SPIKE - 1) + [1] * (20 - SPIKE + 1)
    assert [line["iteration"] for line in lines if line["grad_norm"] == 0.0] == [SPIKE]
    assert f"in the rows {odd_rows}:31 (--loss-spike-factor 3" in done.stdout
    assert "number of skipped iterations:   1 |" in done.stdout

    shutil.copytree(whole / "iter_0000013", again / "iter_0000013")
    (again / "latest_checkpointed_iteration.txt").write_text("13")
    assert finetune(*flags, "--save", again).returncode == 0
    same = ("iteration", "sft/loss", "grad_norm", "lr", "skipped_iterations")
    assert [[line[name] for name in same] for line in metrics_of(again)] == [[line[name] for name in same] for line in lines[13:]]

    layout = ["--tensor-model-parallel-size", "2", "--loss-spike-action", "stop"]
    done = finetune(*flags, *layout, "--save", stopped, processes=2)
    assert done.returncode == 3 and f"iteration {SPIKE}: loss" in done.stdout
    assert (stopped / "latest_checkpointed_iteration.txt").read_text().strip() == str(SPIKE - 1)
    _assert_page(whole, again, stopped)


def _assert_page(*runs: Path) -> None:
    """`megatron-sft report` of what these runs left: skipped step, fault, command, rows, data."""
    output = runs[0].parent / "page.html"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    page = assert_self_contained(output.read_text())
    assert page.names.count("svg") == len(page.texts["figcaption"]) >= 10
    assert {"Loss nats per trained token", "Learning rate", "Documents by length"} <= set(page.texts["figcaption"])
    told = page.texts["body"][0]
    assert f"whole: steps without an update (--loss-spike-factor): {SPIKE}." in told
    assert f"failed (status 3): TrainingError: iteration {SPIKE}: loss" in told
    assert any(row.startswith("parallel.tensor_model_parallel_size112") for row in page.texts["tr"])
    assert "finetune.py --load" in page.texts["pre"][-1] and "yes yes yes yes<|end|>" in page.texts["span"]
    assert any(row.startswith("odd404000") for row in page.texts["tr"]), "40 rows, 40 kept, none cut"
