"""attempts.jsonl in a --save folder: a line when training starts, with command, versions, settings and data; one when it ends.

A start without an end was killed, ran out of memory or lost power. Lines are only ever added; `megatron-sft report` reads
them. Not here: what a step measured (metrics.jsonl, train/metrics.py).
"""

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ATTEMPTS = "attempts.jsonl"
START, END = "start", "end"
MOST_BYTES = 1 << 26
"""Of a file that is read."""


def append(save: str, line: Mapping[str, Any]) -> None:
    """Adds a line; raises OSError where it cannot be written, or where no regular file is: a link may lead to anything."""
    folder = Path(save)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / ATTEMPTS).is_symlink():
        raise OSError(errno.EINVAL, "no regular file")
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW
    descriptor = os.open(folder / ATTEMPTS, flags, 0o666)
    with os.fdopen(descriptor, "ab") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        half = status.st_size > 0 and os.pread(descriptor, 1, status.st_size - 1) != b"\n"
        file.write(b"\n" * half + json.dumps(line, default=str).encode() + b"\n")


def json_lines(path: Path, most_bytes: int = MOST_BYTES) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; what else stands there is passed over. Empty where there is no file.

    Raises:
        OSError: it cannot be read, or holds more than `most_bytes`.
    """
    if not path.exists():
        return []
    if not path.is_file() or path.stat().st_size > most_bytes:
        raise OSError(f"no regular file of at most {most_bytes >> 20} MiB")
    values = []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            values.append(value)
    return values
