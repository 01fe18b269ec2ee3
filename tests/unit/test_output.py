"""Files of the user's own naming: regular ones appear whole, links are followed, whatever else stands there stays what it is."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_sft.errors import TrainingError
from megatron_sft.files import regular
from megatron_sft.output import output_problems, write_output


def write(path: Path | str, text: str = "new\n") -> None:
    assert output_problems("--output", str(path)) == []
    write_output("--output", str(path), text)


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    place = tmp_path / "a"
    place.write_text("old")
    place.chmod(0o600)
    with place.open() as reader:
        write(place)
        assert reader.read() == "old"
    assert (place.read_text(), stat.S_IMODE(place.stat().st_mode)) == ("new\n", 0o600)
    write(tmp_path / "b" / "c" / "d")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "b", "b/c", "b/c/d"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "real").mkdir()
    if exists:
        (tmp_path / "real" / "a").write_text("old")
    (tmp_path / "link").symlink_to("real/a")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "new\n"


def test_a_device_stays_a_device(tmp_path: Path) -> None:
    write("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        device.open("wb").close()
    except PermissionError:
        pytest.skip("device nodes are not permitted here")
    (tmp_path / "link").symlink_to(device)
    for place in (device, tmp_path / "link"):
        write(place)
    assert stat.S_ISCHR(device.stat().st_mode) and (tmp_path / "link").is_symlink()


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write(tmp_path / "pipe")
    reader.join(30)
    assert read == ["new\n"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_standard_output_keeps_what_was_printed(tmp_path: Path) -> None:
    script = "from megatron_sft.output import write_output as w; print('old', flush=True); w('--output', '/dev/stdout', 'new\\n')"
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", script], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "old\nnew\n"


def test_what_cannot_be_written_is_said_before_and_after(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    [folder] = output_problems("--output", str(tmp_path))
    assert folder == f"--output {tmp_path} is a folder; expected a file. Add its name."
    [below] = output_problems("--json", str(tmp_path / "file" / "a"))
    assert below.startswith(f"--json {tmp_path}/file/a: {tmp_path}/file cannot be written; expected a file that can be.")
    with pytest.raises(TrainingError, match=r"--output /dev/full: not written \(No space left on device\)") as caught:
        write_output("--output", "/dev/full", "text")
    assert caught.value.exit_status == 3
    assert output_problems("--output", None) == []


def test_names_that_are_too_long_are_said_before(tmp_path: Path) -> None:
    (problem,) = output_problems("--json", str(tmp_path / ("x" * 300)))
    assert problem.endswith("...: File name too long; expected a file that can be written. Choose another place.")


def test_only_regular_files_are_opened_to_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert regular(tmp_path / "link").read_text() == "a"
    for wrong in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="no regular file"):
            regular(wrong)
    with pytest.raises(FileNotFoundError):
        regular(tmp_path / "none")
