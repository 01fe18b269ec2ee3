"""What is written appears whole or not at all, and leaves nothing else behind."""

import os
from pathlib import Path

import pytest

from megatron_sft.files import publish_folder, write_whole


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
