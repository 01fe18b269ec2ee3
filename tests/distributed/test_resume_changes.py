"""A run that goes on in other layouts trains each row of an epoch once: counted where the model gets its tokens."""

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.soak.resume_changes import Trial, needed_flags, random_trial, run_trial, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


def test_two_processes_go_on_where_one_stopped(inputs: Path, tmp_path: Path) -> None:
    """Without --global-batch-size: 16 of 20 rows, two of them twice, was what this gave when the layout decided it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join((inputs / "big.jsonl").read_text().splitlines()[:20]) + "\n")
    flags = [*needed_flags(inputs), "--finetune-hf-dataset", str(rows), "--packing", "none", "--num-epoch", "1"]
    trial = Trial(random.Random(0), tmp_path / "out", flags, "never")
    trial.part(4, (1, 1, 1))
    part = trial.part(None, (2, 1, 1))
    assert part.is_finished and part.num_packs == 20 and part.epoch == Counter(range(20))
    assert sorted(row for rows in trial.given.values() for row in rows) == list(range(20))
    assert trial.check(part.num_packs, part.epoch) == 1


@pytest.mark.parametrize(("seed", "batch_size", "stops"), [(4, "never", 1), (7, "other", 2)])
def test_random_changes_leave_each_row_once_an_epoch(inputs: Path, seed: int, batch_size: str, stops: int) -> None:
    changes, _, whole_epochs = run_trial(random_trial(inputs, seed, batch_size), 2)
    assert (changes, whole_epochs) == (stops, 1)
