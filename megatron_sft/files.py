"""Files and folders that appear whole or not at all, also when the process is killed or the power fails.

A new file or folder is written under another name beside its place, brought to the disk, and renamed. Not here: what to
say when the disk refuses; every function raises OSError, which the caller explains.
"""

import os
import shutil
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes or replaces a file: a reader sees the old content or the new one.

    Args:
        path: in a folder that exists.
        content: text is written as UTF-8.

    Raises:
        OSError: nothing was changed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
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


def sync(path: Path) -> None:
    """Brings a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
