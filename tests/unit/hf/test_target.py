"""What an HF folder may replace, that it is whole at every moment, and that nothing is left of killed processes."""

import ctypes
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sft.errors import CheckpointError, SavingError
from megatron_sft.hf.target import new_folder, try_target
from megatron_sft.lock import if_free
from tests.gloo import process_context

FILES = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json")


def write(folder: Path, text: str, source: Path | None = None, pause_s: float = 0.0) -> None:
    """A folder of small files that all hold the same text, and README.md where the source has one."""
    with new_folder(folder, source) as place:
        for name in FILES:
            (place / name).write_text(text)
            time.sleep(pause_s)
        if source is not None:
            shutil.copyfile(source / "README.md", place / "README.md")


def contents(folder: Path) -> dict[str, str]:
    """Every file, folder and link below it, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = f"-> {os.readlink(path)}" if path.is_symlink() else "folder" if path.is_dir() else path.read_text()
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "README.md").write_text("about the base model")
    return folder


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "thesis.tex": lambda out: (out / "thesis.tex").write_text("mine"),
    ".git": lambda out: (out / ".git").mkdir(),
    "iter_0000010": lambda out: (out / "iter_0000010").mkdir(),
    "latest_checkpointed_iteration.txt": lambda out: (out / "latest_checkpointed_iteration.txt").write_text("10"),
    "pytorch_model.bin": lambda out: (out / "pytorch_model.bin").write_text("other weights"),
    "README.md": lambda out: (out / "README.md").write_text("my own model card"),
    "tokenizer.json": lambda out: (out / "tokenizer.json").symlink_to("../source/README.md"),
    "model.safetensors": lambda out: (out / "model.safetensors").mkdir(),
    "a, b, c, d, e and 2 more": lambda out: [(out / name).write_text("x") for name in "abcdefg"],
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_is_no_file_of_an_hf_folder_is_refused_and_stays(name: str, tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    OBSTACLES[name](out)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError) as early:
        try_target(out, source, 0)
    with pytest.raises(SavingError) as late:
        write(out, "new", source)
    assert f"{out}: holds {name}; expected a new or empty folder, or one with the files of an HF folder" in str(early.value)
    assert str(late.value).startswith(f"{out}: not written: holds {name};")
    assert (early.value.exit_status, late.value.exit_status) == (2, 3)
    assert contents(tmp_path) == before


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="out: a file stands there; expected a new or empty folder"):
        try_target(tmp_path / "out", None, 0)


def test_new_empty_and_older_folders_are_taken(tmp_path: Path, source: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("older")
    expected = {**dict.fromkeys(FILES, "new"), "README.md": "about the base model"}
    write(tmp_path / "older", "old", source)
    (tmp_path / "older" / "vocab.json").write_text("of another tokenizer")
    for name in ("empty", "made/on/the/way", "link"):
        try_target(tmp_path / name, source, 1000)
        write(tmp_path / name, "new", source)
    for name in ("empty", "made/on/the/way", "older"):
        assert contents(tmp_path / name) == dict(sorted(expected.items()))
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["empty", "link", "made", "older", "source"]


def test_trying_leaves_nothing(tmp_path: Path) -> None:
    try_target(tmp_path / "not" / "yet" / "there", None, 0)
    assert os.listdir(tmp_path) == []


def test_places_without_room_or_permission_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"file cannot be written \(Not a directory\); expected a place"):
        try_target(tmp_path / "file" / "out", None, 0)
    with pytest.raises(CheckpointError, match=r"out: [0-9.]+ GB free; expected 1000000.1 GB for the HF folder"):
        try_target(tmp_path / "out", None, 10**15)
    with pytest.raises(SavingError, match=r"file/out: not written \(Not a directory\)"):
        write(tmp_path / "file" / "out", "new")


@pytest.mark.parametrize("length", [245, 255, 300])
def test_names_that_are_too_long_are_refused_before(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written \\(File name too long\\); expected a place for the HF folder"):
        try_target(tmp_path / ("x" * length), None, 0)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("place", [".", "../run"])
def test_the_current_folder_stays_the_current_folder(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "run")
    folder = Path(place)
    try_target(folder, None, 0)
    write(folder, "new")
    assert set(os.listdir(".")) == set(FILES) and Path.cwd() == tmp_path / "out" / "run"
    with pytest.raises(CheckpointError, match=r"holds a model and cannot be renamed \(a mount point, the current folder"):
        try_target(folder, None, 0)


def test_a_failed_write_leaves_the_older_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(SavingError, match=r"out: not written \(No space left on device\)"), new_folder(tmp_path / "out", None):
        Path("/dev/full").write_text("x")
    assert contents(tmp_path / "out") == dict.fromkeys(FILES, "old") and os.listdir(tmp_path) == ["out"]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    (tmp_path / ".out.writing").mkdir()
    with if_free(tmp_path / ".out.writing" / "lock") as is_free:
        assert is_free
        with pytest.raises(SavingError, match=r"out: another process writes it \(.*\.out\.writing/lock is held\)"):
            write(tmp_path / "out", "new")
        with pytest.raises(CheckpointError, match="another process writes it"):
            try_target(tmp_path / "out", None, 0)


def test_what_a_killed_process_left_is_put_back_or_removed(tmp_path: Path) -> None:
    """Between the two renames of a file system that cannot exchange names, and while it wrote."""
    write(tmp_path / "out", "old")
    (tmp_path / ".out.writing" / "new").mkdir(parents=True)
    (tmp_path / "out").rename(tmp_path / ".out.writing" / "old")
    try_target(tmp_path / "out", None, 0)
    assert contents(tmp_path / "out") == dict.fromkeys(FILES, "old") and os.listdir(tmp_path) == ["out"]


def write_for_ever(folder: Path) -> None:
    for number in range(10**6):
        write(folder, str(number), pause_s=0.001)


def test_killed_at_any_moment_the_folder_is_whole_and_the_next_run_tidies_up(tmp_path: Path) -> None:
    out, draw = tmp_path / "out", random.Random(1)
    for _ in range(15):
        process = process_context().Process(target=write_for_ever, args=(out,))
        process.start()
        deadline = time.monotonic() + 60
        while not out.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = contents(out)
        assert set(found) == set(FILES) and len(set(found.values())) == 1
        try_target(out, None, 0)
        assert os.listdir(tmp_path) == ["out"] and contents(out) == found


def in_a_mount(place: Path) -> None:
    """Exits with 9 where mounting is not permitted."""
    libc, clone_newns, ms_private = ctypes.CDLL(None), 0x20000, 1 << 18 | 1 << 14
    if libc.unshare(clone_newns) or libc.mount(None, b"/", None, ms_private, None):
        os._exit(9)
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, None):
        os._exit(9)
    try_target(place, None, 1000)
    write(place, "new")
    assert contents(place) == dict.fromkeys(FILES, "new")
    with pytest.raises(CheckpointError, match=r"out: holds a model and cannot be renamed \(a mount point"):
        try_target(place, None, 0)
    write(place / "below", "newer")


def test_an_empty_mount_point_is_filled_and_a_full_one_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    process = process_context().Process(target=in_a_mount, args=(tmp_path / "out",))
    process.start()
    process.join(60)
    if process.exitcode == 9:
        pytest.skip("mounting is not permitted here")
    assert process.exitcode == 0
