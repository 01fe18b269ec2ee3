"""Checkpoint folders found by looking: with a tracker, without one, with a damaged one; what retention keeps."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sft.checkpoint import manifest, tracker
from megatron_sft.checkpoint.distributed import latest_iteration, read_run_config
from megatron_sft.checkpoint.tracker import BEST, RELEASE, TRACKER
from megatron_sft.errors import CheckpointError


def put(folder: Path, **files: str) -> Path:
    """Writes a checkpoint's files and their manifest; what is in them does not matter here."""
    folder.mkdir(parents=True)
    config = {"folder": folder.name, "train": {"global_batch_size": 1}}
    content = {"metadata.json": "{}", "run_config.json": json.dumps(config), "data.distcp": "x" * 100, **files}
    manifest.write_manifest(folder, [manifest.write_file(folder / name, text.encode()) for name, text in content.items()])
    return folder


def save(root: Path, iteration: tracker.Iteration, retain: int | None = None) -> None:
    put(tracker.saving_folder(root, iteration))
    tracker.publish(root, iteration)
    tracker.retain(root, retain)


def folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir())


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "kept").write_text("")


def as_link(target: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return damage


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "folder": as_folder,
    "dangling link": as_link("nowhere"),
    "link to itself": as_link(TRACKER),
    "link to a device": as_link("/dev/zero"),
    "FIFO": as_fifo,
    "garbage": lambda path: path.write_bytes(os.urandom(64) + b"\xff"),
    "5,000 digits": lambda path: path.write_text("1" * 5000),
    "another alphabet's digits": lambda path: path.write_text("\u0661"),
    "negative": lambda path: path.write_text("-1"),
    "1 MB": lambda path: path.write_text("1" * 10**6),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_checkpoint_is_found_without_a_usable_tracker(tmp_path: Path, kind: str) -> None:
    for iteration in (1, 2):
        save(tmp_path, iteration)
    DAMAGE[kind](tmp_path / TRACKER)
    assert tracker.is_megatron_checkpoint(tmp_path)
    assert tracker.candidates(tmp_path) == [2, 1]
    assert read_run_config(tmp_path)["folder"] == ".saving_iter_0000002"
    save(tmp_path, 3)
    assert (tmp_path / TRACKER).read_text() == "3\n"
    assert tracker.candidates(tmp_path) == [3, 2, 1]
    assert (kind == "folder") == (tmp_path / f"{TRACKER}_folder" / "kept").exists()


def test_a_kill_between_the_first_rename_and_the_tracker_loses_nothing(tmp_path: Path) -> None:
    put(tmp_path / "iter_0000001")
    assert tracker.is_megatron_checkpoint(tmp_path)
    assert latest_iteration(tmp_path) == 1


def test_release_is_found_without_a_tracker_but_not_any_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "release" / "notes").mkdir(parents=True)
    assert not tracker.is_megatron_checkpoint(tmp_path)
    put(tmp_path / "other" / "release")
    assert tracker.is_megatron_checkpoint(tmp_path / "other")
    assert latest_iteration(tmp_path / "other") == RELEASE


@pytest.mark.parametrize("name", ["iter_1", "iter_00000001", "iter_0000001x", "iter_" + "1" * 200, "xiter_0000001"])
def test_other_names_are_no_iterations(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert tracker.iterations(tmp_path) == []
    assert not tracker.is_megatron_checkpoint(tmp_path)


def test_a_damaged_only_checkpoint_is_an_error_not_a_start_from_nothing(tmp_path: Path) -> None:
    (tmp_path / "iter_0000005").mkdir()
    assert tracker.is_megatron_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no usable checkpoint\. Found: .*iter_0000005: no metadata"):
        latest_iteration(tmp_path)


def test_with_the_tracker_set_back_the_lineage_in_use_is_kept(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 40, 50):
        save(tmp_path, iteration)
    (tmp_path / TRACKER).write_text("20")
    assert tracker.candidates(tmp_path) == [20, 10, 50, 40, 30]
    save(tmp_path, 27, retain=3)
    assert folders(tmp_path) == ["iter_0000010", "iter_0000020", "iter_0000027"]
    save(tmp_path, 34, retain=3)
    assert folders(tmp_path) == ["iter_0000020", "iter_0000027", "iter_0000034"]


def test_without_retention_the_discarded_lineage_is_set_aside(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 40, 20, 40):  # 30 is discarded, then 20 and 40 again
        save(tmp_path, iteration)
    (tmp_path / TRACKER).write_text("20")
    save(tmp_path, 20)
    assert folders(tmp_path) == [
        *("discarded_iter_0000030", "discarded_iter_0000040", "discarded_iter_0000040_2"),
        *("iter_0000010", "iter_0000020"),
    ]
    assert tracker.candidates(tmp_path) == [20, 10]
    (tmp_path / TRACKER).unlink()
    assert tracker.candidates(tmp_path) == [20, 10]


def test_after_a_fall_back_a_damaged_later_checkpoint_does_not_push_out_good_ones(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 40):
        save(tmp_path, iteration)
    (tmp_path / "iter_0000040" / "data.distcp").write_text("")
    (tmp_path / TRACKER).unlink()  # and so nothing tells at the first save what was above
    assert latest_iteration(tmp_path) == 30
    save(tmp_path, 35, retain=2)
    assert folders(tmp_path) == ["iter_0000030", "iter_0000035", "iter_0000040"]
    save(tmp_path, 37, retain=2)
    assert folders(tmp_path) == ["iter_0000035", "iter_0000037"]


def test_release_again_discards_what_was_trained_from_it(tmp_path: Path) -> None:
    save(tmp_path, RELEASE)
    for iteration in (1, 2):
        save(tmp_path, iteration)
    (tmp_path / TRACKER).write_text(RELEASE)
    save(tmp_path, 1, retain=5)
    assert folders(tmp_path) == ["iter_0000001", "release"]


def test_the_best_is_kept_unless_it_was_discarded(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 40):
        save(tmp_path, iteration)
    tracker.mark_best(tmp_path, 10, "valid/loss", 1.0)
    save(tmp_path, 50, retain=2)
    assert folders(tmp_path) == ["iter_0000010", "iter_0000040", "iter_0000050"]
    tracker.mark_best(tmp_path, 50, "valid/loss", 0.5)
    (tmp_path / TRACKER).write_text("40")
    save(tmp_path, 45, retain=2)
    assert folders(tmp_path) == ["iter_0000040", "iter_0000045"]
    assert not (tmp_path / BEST).exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"iteration": ' + "1" * 5000 + "}",
        '{"iteration": 1, "metric": "valid/loss", "value": "low"}',
        '{"iteration": 1, "metric": "valid/loss", "value": NaN}',
        '{"iteration": true, "metric": "valid/loss", "value": 0.5}',
        '{"iteration": -1, "metric": "valid/loss", "value": 0.5}',
        '{"iteration": "1", "metric": "valid/loss", "value": 0.5}',
        '{"iteration": 1, "metric": "valid/loss", "value": 1' + "0" * 400 + "}",
    ],
)
def test_a_damaged_mark_of_the_best_is_no_mark(tmp_path: Path, text: str) -> None:
    (tmp_path / BEST).write_text(text)
    assert tracker.read_best(tmp_path) is None
    tracker.mark_best(tmp_path, 1, "valid/loss", 0.5)
    assert tracker.read_best(tmp_path) == {"iteration": 1, "metric": "valid/loss", "value": 0.5}


@pytest.mark.parametrize("kind", ["folder", "dangling link", "link to a device", "FIFO"])
def test_a_mark_of_the_best_that_is_no_file_is_no_mark(tmp_path: Path, kind: str) -> None:
    tracker.mark_best(tmp_path, 1, "valid/loss", 0.5)
    DAMAGE[kind](tmp_path / BEST)
    assert tracker.read_best(tmp_path) is None
    tracker.mark_best(tmp_path, 2, "valid/loss", 0.25)
    assert tracker.best_iteration(tmp_path) == 2


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    for name in (".saving_iter_0000001", ".deleting_release", ".replaced_iter_0000002"):
        (tmp_path / name).mkdir()
    for name in (TRACKER, BEST, "metrics.jsonl"):
        (tmp_path / f".{name}.123.tmp").write_text("")
    (tmp_path / ".mine").write_text("")
    tracker.sweep(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".mine", "iter_0000002"]


def test_nothing_outside_the_root_is_removed(tmp_path: Path) -> None:
    precious, root = tmp_path / "precious", tmp_path / "root"
    put(precious / "iter_0000001")
    root.mkdir()
    for name in (".saving_iter_0000009", ".deleting_iter_0000009", ".replaced_iter_0000009", "discarded_iter_0000009"):
        (root / name).symlink_to(precious, target_is_directory=True)
    (root / "iter_0000003").symlink_to(precious / "iter_0000001", target_is_directory=True)
    (root / "iter_0000009").symlink_to(tmp_path / "nowhere")
    tracker.sweep(root)
    assert sorted(entry.name for entry in root.iterdir()) == ["discarded_iter_0000009", "iter_0000003", "iter_0000009"]
    save(root, 4)
    save(root, 3)
    save(root, 4, retain=1)
    assert folders(root) == ["iter_0000004"]
    assert latest_iteration(precious) == 1
