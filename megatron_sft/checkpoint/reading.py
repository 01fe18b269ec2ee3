"""Opens what a checkpoint folder holds, without trust: a FIFO or a device in a file's place is an error, never a wait.

Links are followed; what they lead to must be a regular file.
"""

import errno
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}")


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, unbuffered.

    Raises:
        OSError: it is missing, unreadable, or a folder, FIFO, socket or device.
    """
    _require_regular(os.stat(path), path)  # before it is opened: that alone does something to some devices
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb", buffering=0)
    try:
        _require_regular(os.fstat(descriptor), path)
    except OSError:
        file.close()
        raise
    return file


def read_limited(path: Path, limit_bytes: int) -> bytes:
    """The whole content of a regular file of at most `limit_bytes`; OSError otherwise."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit_bytes:
            raise OSError(errno.EFBIG, f"larger than {limit_bytes} bytes", str(path))
        parts = []
        while part := file.read(limit_bytes + 1):
            parts.append(part)
        return b"".join(parts)


def is_plain_name(name: object) -> bool:
    """Whether a name that a checkpoint gives names a file of its own folder: `__0_0.distcp`, not `../x`, `..` or `a/b`."""
    return isinstance(name, str) and bool(_PLAIN_NAME.fullmatch(name)) and name not in (".", "..")


def _require_regular(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
