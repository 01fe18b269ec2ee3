"""What is written appears whole or not at all, and leaves nothing else behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sft.files import exchange, publish_folder, replace_in_two_steps, write_whole


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "first")
    write_whole(tmp_path / "a", b"second")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"second")]


def test_a_reader_of_the_old_file_keeps_it(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "old")
    with open(tmp_path / "a") as reader:
        write_whole(tmp_path / "a", "new")
        assert reader.read() == "old"


def test_a_refused_file_leaves_the_old_one_alone(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(OSError):
        write_whole(tmp_path / "a", "text")  # a folder stands there
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for name, text in (("new", "2"), ("place", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    (tmp_path / "new" / "below").mkdir()
    publish_folder(tmp_path / "new", tmp_path / "place", aside=tmp_path / "aside")
    assert [p.name for p in tmp_path.iterdir()] == ["place"]
    assert sorted(os.listdir(tmp_path / "place")) == ["below", "file"] and (tmp_path / "place" / "file").read_text() == "2"


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_at_every_moment_a_whole_folder_is_in_its_place(tmp_path: Path) -> None:
    """A second process looks all the time."""
    target = folder_with(tmp_path / "place", "0")
    if not exchange(folder_with(tmp_path / "a", "a"), folder_with(tmp_path / "b", "b")):
        pytest.skip("this file system cannot exchange two names")
    look = "import sys\nn = 0\nprint('looks', flush=True)\nwhile True:\n    open(sys.argv[1]).read()\n"
    watcher = subprocess.Popen([sys.executable, "-c", look, target / "file"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert watcher.stdout is not None and watcher.stdout.readline() == b"looks\n"
        for number in range(300):
            publish_folder(folder_with(tmp_path / "new", str(number)), target, aside=tmp_path / "aside")
        assert watcher.poll() is None, watcher.communicate()[1].decode()
    finally:
        watcher.kill()
        watcher.communicate()
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "place"]


def test_without_an_exchange_the_folder_is_replaced_in_two_steps_or_stays(tmp_path: Path) -> None:
    target = folder_with(tmp_path / "place", "old")
    with pytest.raises(OSError):
        replace_in_two_steps(tmp_path / "none", target, tmp_path / "aside")
    assert (target / "file").read_text() == "old" and os.listdir(tmp_path) == ["place"]
    replace_in_two_steps(folder_with(tmp_path / "new", "new"), target, tmp_path / "aside")
    assert (target / "file").read_text() == "new" and (tmp_path / "aside" / "file").read_text() == "old"
