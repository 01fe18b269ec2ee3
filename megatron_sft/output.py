"""Files that the user names on the command line (--output, --html, --json): tried before the work, written after it.

A regular file appears whole or not at all and keeps its mode; a link is followed; into a device, a pipe or whatever else
stands there is written. Not here: checkpoints, HF folders, caches.
"""

import errno
import os
import stat
from pathlib import Path

from megatron_sft.errors import TrainingError
from megatron_sft.files import write_whole
from megatron_sft.log import logger


def output_problems(flag: str, path: str | None) -> list[str]:
    """Why the file could not be written, as sentences of a ConfigError; nothing is changed."""
    if not path:
        return []
    target = Path(os.path.realpath(path))
    try:
        os.stat(target)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return [f"{flag} {path:.60}...: {error.strerror}; expected a file that can be written. Choose another place."]
    if target.is_dir():
        return [f"{flag} {path} is a folder; expected a file. Add its name."]
    place = target
    while not place.exists() and place != place.parent:
        place = place.parent
    writable = os.access(place, os.W_OK) and (place == target or place.is_dir())
    if writable and target.is_file() and not _is_written_into(path):
        place = target.parent
        writable = os.access(place, os.W_OK)
    return [] if writable else [f"{flag} {path}: {place} cannot be written; expected a file that can be. Choose another place."]


def write_output(flag: str, path: str, text: str) -> None:
    """Writes the file, and says so; folders above it are made.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        if _is_written_into(path):
            with open(path, "ab") as place:
                place.write(text.encode())
        else:
            _replace(Path(os.path.realpath(path)), text)
    except OSError as error:
        raise TrainingError(
            f"{flag} {path}: not written ({error.strerror}); expected a place with room that can be written. Choose another."
        ) from None
    logger.info("wrote %s", path)


def _is_written_into(path: str) -> bool:
    """A device, pipe or socket; also /dev/stdout where that leads to a regular file."""
    try:
        is_regular = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False
    return not is_regular or os.path.abspath(path).startswith(("/dev/", "/proc/"))


def _replace(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, text, target.stat().st_mode if target.exists() else None)
