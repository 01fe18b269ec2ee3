"""Two runs with one --save folder: the second one is refused with the first one's name; a killed one holds nothing."""

import os
import signal
import time
from pathlib import Path

from tests.gloo import RunningScript

LENGTH = ["--global-batch-size", "1", "--train-iters", "400", "--save-interval", "1", "--save-retain", "2", "--lr", "1e-3"]


def wait_for(folder: Path) -> None:
    deadline = time.monotonic() + 200
    while not folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_second_run_is_refused_until_the_first_one_is_dead(finetune, started, tmp_path: Path) -> None:
    save = tmp_path / "out"
    first: RunningScript = started("--save", save, *LENGTH)
    wait_for(save / "iter_0000001")
    for processes in (1, 2):
        refused = finetune("--save", save, *LENGTH, "--seed", "7", processes=processes)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        text = (refused.stdout + refused.stderr).strip().splitlines()
        said = [line for line in text if f"{save}: another run is using it: process {first.ranks[0].pid} on " in line]
        assert len(said) == 1, text
    os.kill(first.ranks[0].pid, signal.SIGKILL)
    assert first.result().returncode == -signal.SIGKILL
    resumed = finetune("--save", save, *LENGTH, "--exit-interval", "1")
    assert resumed.returncode == 4, resumed.stdout + resumed.stderr
    assert f"{save / 'run.lock'}: taken over from process {first.ranks[0].pid} on " in resumed.stdout
    assert not (save / "run.lock").exists()


def test_two_runs_do_not_write_one_hf_folder(finetune, started, tmp_path: Path) -> None:
    export = tmp_path / "hf"
    first: RunningScript = started("--save-hf", export, *LENGTH[:2], "--train-iters", "100000", "--lr", "1e-3")
    wait_for(tmp_path / ".hf.lock" / "run.lock")
    refused = finetune("--save-hf", export, *LENGTH[:2], "--train-iters", "1")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    text = refused.stdout + refused.stderr
    assert f"{export}: another run is using it: process {first.ranks[0].pid} on " in text
    assert text.rstrip().endswith("or choose another --save-hf.")
    os.kill(first.ranks[0].pid, signal.SIGKILL)
    first.result()
    done = finetune("--save-hf", export, *LENGTH[:2], "--train-iters", "1", "--lr", "1e-3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (export / "config.json").is_file() and not (tmp_path / ".hf.lock").exists()


def test_the_lock_is_given_back_after_an_error_and_after_a_signal(finetune, started, tmp_path: Path) -> None:
    save = tmp_path / "out"
    early: RunningScript = started("--save", save, *LENGTH)
    wait_for(save / "run.lock")
    os.kill(early.ranks[0].pid, signal.SIGTERM)
    ended = early.result()
    assert ended.returncode == 143, ended.stdout + ended.stderr
    assert "ended by SIGTERM while " in ended.stdout + ended.stderr
    assert not (save / "run.lock").exists()
    failed = finetune("--save", save, *LENGTH, "--seq-length", "8")  # no row fits
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert not (save / "run.lock").exists()
    run: RunningScript = started("--save", save, *LENGTH)
    wait_for(save / "iter_0000001")
    assert (save / "run.lock").exists()
    os.kill(run.ranks[0].pid, signal.SIGTERM)
    assert run.result().returncode == 143
    assert not (save / "run.lock").exists()
