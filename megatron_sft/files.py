"""Files and folders that appear whole or not at all, also when the process is killed or the power fails.

A new file or folder is written under another name beside its place, brought to the disk, and renamed. Not here: what to
say when the disk refuses; every function raises OSError, which the caller explains.
"""

import errno
import os
import shutil
import stat
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes, mode: int | None = None) -> None:
    """Writes or replaces a file: a reader sees the old content or the new one.

    Args:
        path: in a folder that exists.
        content: text is written as UTF-8.
        mode: permissions of the file; None: what new files have.

    Raises:
        OSError: nothing was changed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode & 0o777)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def publish_folder(source: Path, target: Path, aside: Path) -> None:
    """Gives a finished folder its name, at once, after all that is in it is on the disk.

    Args:
        source: the finished folder, beside target.
        target: its place; a folder that is there now is replaced.
        aside: name beside it, for the replaced folder between two renames; a kill there leaves it behind.

    Raises:
        OSError: source and what was at target are still there, under one of their names.
    """
    for path in (*source.rglob("*"), source):
        sync(path)
    if os.path.lexists(target):
        remove(aside)
        os.rename(target, aside)
    os.rename(source, target)
    sync(target.parent)
    remove(aside)


def remove(path: Path) -> None:
    """Removes a file or a folder, as far as that can be done; of a link the link alone, never what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def regular(path: Path) -> Path:
    """The path, if a regular file is there or a link to one: opening a pipe waits for its writer, and a device has no end.

    Raises:
        OSError: there is none, or something else.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return path


def regular_folder(folder: Path) -> Path:
    """The folder, if all files directly in it are regular: for readers that are not ours. Raises OSError as `regular` does."""
    for path in folder.iterdir():
        if path.exists() and not path.is_dir():
            regular(path)
    return folder


def sync(path: Path) -> None:
    """Brings a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
