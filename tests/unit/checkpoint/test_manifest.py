"""What speaks against a checkpoint: its manifest, its files' checksums, and what stands in a file's place."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sft.checkpoint import manifest
from megatron_sft.checkpoint.distributed import latest_iteration, read_run_config
from megatron_sft.checkpoint.manifest import MANIFEST, RUN_CONFIG, problems
from tests.unit.checkpoint.test_tracker import put, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put(tmp_path / "iter_0000001", large="x" * (1 << 20) + "y")


def resigned(folder: Path, change: Callable[[dict], None]) -> None:
    """Changes the manifest's list of files as somebody would who writes its checksum anew."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    change(files)
    text = json.dumps({"algorithm": "crc32", "files": files, "crc32": manifest._entry_crc(files)})
    (folder / MANIFEST).write_text(text)


def test_small_files_are_checksummed_even_when_content_is_not_asked_for(folder: Path) -> None:
    assert problems(folder, content=True) == problems(folder, content=False) == []
    for name, is_small in ((RUN_CONFIG, True), ("metadata.json", True), ("data.distcp", True), ("large", False)):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + b"z")
        [problem] = problems(folder, content=True)
        assert problem.startswith(f"{folder / name}: crc32 ")
        assert problems(folder, content=False) == ([problem] if is_small else [])
        (folder / name).write_bytes(whole)


def test_a_deleted_manifest_is_damage_where_a_run_config_proves_that_there_was_one(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    for content in (True, False):
        [problem] = problems(folder, content)
        assert problem == f"{folder}: run_config.json without the manifest.json that was written with it; expected both"
    (folder / RUN_CONFIG).unlink()
    assert problems(folder, content=True) == []  # Megatron-LM's look like this


@pytest.mark.parametrize("name", [MANIFEST, RUN_CONFIG, "metadata.json", "data.distcp"])
@pytest.mark.parametrize("damage", ["delete", "truncate", "garbage", "folder", "FIFO", "device", "dangling link"])
def test_damage_of_any_file_falls_back_to_the_iteration_before(tmp_path: Path, name: str, damage: str) -> None:
    for iteration in (1, 2):
        save(tmp_path, iteration)
    path = tmp_path / "iter_0000002" / name
    size = path.stat().st_size
    path.unlink()
    if damage == "truncate":
        path.write_text("")
    elif damage == "garbage":
        path.write_bytes(b"\xff" * size)
    elif damage == "folder":
        path.mkdir()
    elif damage == "FIFO":
        os.mkfifo(path)
    elif damage == "device":
        path.symlink_to("/dev/zero")
    elif damage == "dangling link":
        path.symlink_to("nowhere")
    assert latest_iteration(tmp_path) == 1
    assert read_run_config(tmp_path)["folder"] == ".saving_iter_0000001"


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "a/b", "/etc/passwd", "a\0b", "\ud800", "x" * 300, "a\nb"])
def test_a_manifest_names_files_of_its_folder_alone(folder: Path, name: str) -> None:
    resigned(folder, lambda files: files.update({name: files["large"]}))
    assert problems(folder, content=True) == [
        f"{folder / MANIFEST}: it names a file outside its folder; expected the manifest that was written with it"
    ]


@pytest.mark.parametrize("entry", [None, [], {}, {"bytes": "1", "crc32": "0"}, {"bytes": 1}, {"bytes": True, "crc32": "0"}])
def test_an_entry_without_size_and_checksum_is_a_problem(folder: Path, entry: object) -> None:
    resigned(folder, lambda files: files.update(large=entry))
    [problem] = problems(folder, content=True)
    assert "large has no size and checksum" in problem


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000, '{"files": []}', '{"files": {}}', "1" * 5000, "\xff"])
def test_any_other_manifest_is_a_problem(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    [problem] = problems(folder, content=True)
    assert problem.startswith(f"{folder / MANIFEST}: ")
    shutil.move(folder / MANIFEST, folder / manifest.MEGATRON_MANIFEST)
    (folder / RUN_CONFIG).unlink()
    found = problems(folder, content=True)
    assert found == [] if text == '{"files": {}}' else found[0].startswith(f"{folder / manifest.MEGATRON_MANIFEST}: ")


def test_a_manifest_lists_every_file_that_is_read(folder: Path) -> None:
    resigned(folder, lambda files: files.pop(RUN_CONFIG))
    assert problems(folder, content=False) == [
        f"{folder / MANIFEST}: does not list run_config.json; expected every file with its checksum"
    ]


def test_megatrons_manifest_is_checked_in_its_own_folder(folder: Path) -> None:
    import hashlib

    (folder / MANIFEST).unlink()
    (folder / RUN_CONFIG).unlink()
    digest = hashlib.sha256((folder / "large").read_bytes()).hexdigest()
    for name, expected in {
        "large": [],
        "gone": [f"{folder / 'gone'}: No such file or directory; expected the file that the manifest lists"],
        "../large": [
            f"{folder / 'integrity.json'}: it does not list files of its folder and their checksums; "
            "expected the manifest that was written with it"
        ],
    }.items():
        (folder / "integrity.json").write_text(json.dumps({"files": {name: digest}}))
        assert problems(folder, content=True) == expected
    (folder / "integrity.json").write_text(json.dumps({"files": {"large": "0" * 64}}))
    assert problems(folder, content=True) == [f"{folder / 'large'}: sha256 {digest[:16]}; expected {'0' * 16}"]
