"""The promises on a real model: SmolLM2-135M-Instruct (make model) and GSM8K, in fp32."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import metrics_of
from tests.gloo import ROOT

FOLDER = ROOT / "demo" / "SmolLM2-135M-Instruct"
TRAIN, TEST = ROOT / "examples/data/gsm8k_train_400.jsonl", ROOT / "examples/data/gsm8k_test_16.jsonl"

SIZES = ["--seq-length", "1056", "--global-batch-size", "2"]
HELD_OUT = ["--valid-data", TEST, "--eval-iters", "-1", *SIZES]
SCHEDULE = ["--lr", "1e-4", "--lr-decay-style", "cosine", "--train-iters", "30", "--no-save-optim"]
THIRTY_STEPS = [*HELD_OUT, *SCHEDULE]

pytestmark = pytest.mark.skipif(not (FOLDER / "config.json").exists(), reason="run `make model` first")


LOSSES = [1.34085, 1.30373, 1.06572, 0.91330]
"""Of the first steps of tests/soak/smollm2.py's run, which goes on to 30 of them and takes a quarter of an hour."""


def finetune(*flags: Any, status: int = 0) -> str:
    needed = ["--load", FOLDER, "--finetune-hf-dataset", TRAIN, "--adam-beta1", "0.9", "--adam-beta2", "0.95", "--clip-grad", "1"]
    command = list(map(str, [sys.executable, "finetune.py", *needed, *flags]))
    # Two threads, that this longest test does not leave one core idle when all others are done.
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=6000, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_logits_equal_transformers() -> None:
    from megatron_sft.conversion import verify

    assert verify(str(FOLDER)), "verify compares every layer and the logits; it prints the first difference"


def test_nll_before_and_the_first_steps() -> None:
    """1.4560 +- 0.002 over 2,292 trained tokens; then the losses of steps of about 2,100 tokens."""
    assert nll_before() == (pytest.approx(1.4560, abs=0.002), 2292)
    with tempfile.TemporaryDirectory() as folder:
        finetune(*SIZES, *SCHEDULE, "--save", folder, "--exit-interval", len(LOSSES), status=4)
        lines = metrics_of(Path(folder))
    assert [line["sft/loss"] for line in lines] == pytest.approx(LOSSES, abs=5e-4)
    assert lines[-1]["sft/tokens_seen"] / len(LOSSES) == pytest.approx(2100, rel=0.05)


def nll_before() -> tuple[float, int]:
    """Of the held-out rows before training, and how many tokens that is about."""
    found = re.search(r"validation loss: ([\d.]+) \| trained tokens: (\d+)", finetune(*HELD_OUT, "--skip-train"))
    assert found is not None
    return float(found[1]), int(found[2])


def test_shipped_rows_are_gsm8k() -> None:
    """Licence and origin: examples/data/README.md; here only that the rows are what the promises above are about."""
    rows = [json.loads(line) for line in TEST.read_text().splitlines()]
    assert len(rows) == 16 and rows[0]["messages"][0]["content"].startswith("Janet")
    assert len(TRAIN.read_text().splitlines()) == 400
