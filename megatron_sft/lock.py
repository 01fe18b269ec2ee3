"""A file lock that lets one process work while the others wait; the kernel frees it when its holder dies.

A forked child holds its parent's lock too, until both are gone.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sft.log import logger


@contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Holds a file lock; waits for its holder as long as it takes."""
    start, told = time.monotonic(), -60.0
    while True:
        with if_free(path) as is_free:
            if is_free:
                yield
                return
        waited = time.monotonic() - start
        if waited - told >= 60:
            told = waited
            logger.info("waiting for %s, which another process makes (%.0f s)", what, waited)
        time.sleep(0.2)


@contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """Holds a file lock, unless another holds it: then False."""
    with open(path, "a", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
