"""A --save folder with something wrong in it, through finetune.py: no start from nothing, no shortened history."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.functional.conftest import metrics_of

LENGTH = ["--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "3", "--save-interval", "1", "--lr", "1e-3"]


def damaged_config(save: Path) -> None:
    path = save / "iter_0000002" / "run_config.json"
    path.write_bytes(path.read_bytes().replace(b'"hidden_size"', b'"hidden_siz\xff"'))


def without_both(save: Path) -> None:
    for name in ("manifest.json", "run_config.json"):
        (save / "iter_0000002" / name).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
    "no tracker": (lambda save: (save / "latest_checkpointed_iteration.txt").unlink(), 2),
    "a tracker of 5,000 digits": (lambda save: (save / "latest_checkpointed_iteration.txt").write_text("1" * 5000), 2),
    "no manifest": (lambda save: (save / "iter_0000002" / "manifest.json").unlink(), 1),
    "neither manifest nor run_config.json": (without_both, 1),
    "a damaged run_config.json": (damaged_config, 1),
}


def test_a_damaged_save_folder_is_resumed_with_the_losses_of_an_unbroken_run(finetune, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run = finetune("--save", whole, *LENGTH)
    assert run.returncode == 0, run.stdout + run.stderr
    for name, (damage, resumed_from) in DAMAGE.items():
        save = tmp_path / name
        shutil.copytree(whole, save)
        shutil.rmtree(save / "iter_0000003")
        (save / "latest_checkpointed_iteration.txt").write_text("2")
        lines = (save / "metrics.jsonl").read_text().splitlines()
        (save / "metrics.jsonl").write_text("\n".join(["a note", *lines[:2], ""]))
        damage(save)
        run = finetune("--save", save, *LENGTH)
        assert run.returncode == 0, f"{name}: {run.stdout} {run.stderr}"
        assert f"at iteration {resumed_from}\n" in run.stdout, name
        note, _, kept = (save / "metrics.jsonl").read_text().partition("\n")
        (save / "metrics.jsonl").write_text(kept)
        assert note == "a note"
        assert [line["sft/loss"] for line in metrics_of(save)] == [line["sft/loss"] for line in metrics_of(whole)], name
