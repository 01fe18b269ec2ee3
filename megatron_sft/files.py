"""Files and folders that appear whole or not at all, also when the process is killed or the power fails.

A new file or folder is written under another name beside its place, brought to the disk, and renamed. Not here: what to
say when the disk refuses; every function raises OSError, which the caller explains.
"""

import ctypes
import errno
import os
import shutil
import stat
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""linux/fcntl.h, linux/fs.h"""


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
        target: its place; a folder that is there now is replaced: the two change names in one step where the file system can
            do that (RENAME_EXCHANGE), so that a whole folder is there at every moment.
        aside: name beside it, for the replaced folder; elsewhere it has that between two renames, and a kill there leaves it.

    Raises:
        OSError: source and what was at target are still there, under one of their names.
    """
    for path in (*source.rglob("*"), source):
        sync(path)
    if os.path.lexists(target):
        remove(aside)
        if exchange(source, target):
            os.rename(source, aside)
        else:
            replace_in_two_steps(source, target, aside)
    else:
        os.rename(source, target)
    sync(target.parent)
    remove(aside)


def replace_in_two_steps(source: Path, target: Path, aside: Path) -> None:
    """Renames target to aside, then source to target. Raises OSError: nothing was changed."""
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except OSError:
        os.rename(aside, target)
        raise


def exchange(one: Path, other: Path) -> bool:
    """Lets two paths change names in one step (renameat2(2)); False where the file system or the C library cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


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
