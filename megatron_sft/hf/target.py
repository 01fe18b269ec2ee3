"""Where an HF folder is written: refused before the work, whole at every moment, left clean.

A folder may be new, empty, or hold nothing but files that an HF folder has, which the new ones replace. The new folder is
written into .NAME.writing beside it, under a lock; then the two change names in one step (files.publish_folder). What a
killed process left in .NAME.writing the next one removes, or puts back.

Not here: what is written (exporter.py).
"""

import filecmp
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sft.errors import CheckpointError, SavingError
from megatron_sft.files import publish_folder, remove, sync
from megatron_sft.lock import if_free
from megatron_sft.log import logger

REPLACED = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|adapter_config\.json|adapter_model\.safetensors|chat_template\.(jinja|json)|\w*processor_config\.json"
)
"""Files of an HF folder. Others that come from the source (README.md, LICENSE, code) are replaced where they are equal."""
SPARE_BYTES = 2**26
"""Beside the tensors: tokenizer and other files."""


def try_target(folder: Path, source: Path | None, num_bytes: int) -> None:
    """Looks whether an HF folder can be written there, and cleans up after a killed process; writes nothing.

    Args:
        folder: as the user names it.
        source: folder that companions (tokenizer, README ...) are copied from.
        num_bytes: of all tensors.

    Raises:
        CheckpointError: something stands in the way, the place cannot be written, or there is too little room.
    """
    place = Path(os.path.realpath(folder))
    if problem := _obstacle(place, source):
        raise CheckpointError(f"{folder}: {problem}")
    work = _work_folder(place)
    if os.path.lexists(work):
        try:
            with _working(place, folder):
                pass
        except SavingError as error:
            raise CheckpointError(str(error)) from None
    parent = work.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f"{work.name}.try-", dir=parent))
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {parent} cannot be written ({error.strerror}); expected a place for the HF folder. Name another one."
        ) from None
    if num_bytes and free < num_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"{folder}: {free / 1e9:.1f} GB free; expected {(num_bytes + SPARE_BYTES) / 1e9:.1f} GB for the HF folder, which is "
            "complete before an older one is removed. Free room, or name a folder on another disk."
        )


def lock_folder(folder: str | Path) -> Path:
    """Beside an HF folder: where the run that will write it, perhaps in days, has its lock meanwhile."""
    work = _work_folder(Path(os.path.realpath(folder)))
    return work.with_name(work.name.removesuffix("writing") + "lock")


@contextmanager
def new_folder(folder: Path, source: Path | None) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes when it does not.

    Args:
        folder: as the user names it; a link is followed.
        source: as try_target's.

    Raises:
        SavingError: something stands in the way.
        OSError: the disk refuses.
    """
    place = Path(os.path.realpath(folder))
    with _working(place, folder) as work:
        new = work / "new"
        new.mkdir()
        yield new
        if problem := _obstacle(place, source):
            raise SavingError(f"{folder}: not written: {problem}")
        if work.parent == place:
            _fill(place, new)
        else:
            publish_folder(new, place, aside=work / "old")


def _obstacle(place: Path, source: Path | None) -> str:
    """What would be lost if a new HF folder took this place, as a sentence without its beginning; nothing if all is well."""
    if not os.path.lexists(place):
        return ""
    if not place.is_dir():
        return "a file stands there; expected a new or empty folder, or one with the files of an HF folder alone. Name another."
    try:
        entries = sorted(path for path in place.iterdir() if path not in (_work_folder(place), lock_folder(place)))
    except OSError as error:
        return f"cannot be read ({error.strerror}); expected a folder of your own. Name another."
    foreign = [path.name for path in entries if not _is_replaceable(path, source)]
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        return (
            f"holds {shown}; expected a new or empty folder, or one with the files of an HF folder alone, which are replaced. "
            "Move what is there, or name another folder."
        )
    if entries and _work_folder(place).parent == place:
        return (
            "holds a model and cannot be renamed (a mount point, the current folder, or in one that cannot be written), so that "
            "it could not be replaced as a whole; expected an empty folder. Empty it, or name a folder below it."
        )
    return ""


def _is_replaceable(path: Path, source: Path | None) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    if REPLACED.fullmatch(path.name):
        return True
    twin = source / path.name if source else None
    return twin is not None and twin.is_file() and filecmp.cmp(path, twin, shallow=False)


def _is_current(place: Path) -> bool:
    """Whether this process, and the shell that started it, would be left in a folder that is gone."""
    try:
        return place in (Path.cwd(), *Path.cwd().parents)
    except FileNotFoundError:
        return False


def _work_folder(place: Path) -> Path:
    """Beside the place, or within it where it cannot be renamed: then only an empty one is taken."""
    is_fixed = os.path.isdir(place) and (os.path.ismount(place) or _is_current(place) or not os.access(place.parent, os.W_OK))
    return place / ".writing" if is_fixed else place.with_name(f".{place.name}.writing")


@contextmanager
def _working(place: Path, folder: Path) -> Iterator[Path]:
    """The work folder, locked, and clean at both ends."""
    work = _work_folder(place)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with if_free(work / "lock") as is_free:
            if not is_free:
                raise SavingError(
                    f"{folder}: another process writes it ({work}/lock is held); expected one at a time. Wait for it, or name "
                    "another folder."
                )
            if os.path.lexists(work / "old") and not os.path.lexists(place):
                os.rename(work / "old", place)
                logger.warning("%s: put back; a killed process had not replaced it.", folder)
            for left in ("new", "old"):
                remove(work / left)
            try:
                yield work
            finally:
                remove(work)
    except OSError as error:
        raise SavingError(
            f"{folder}: not written ({error.strerror or error}); expected room in a place that can be written. Free some, or "
            "name another folder."
        ) from None


def _fill(place: Path, new: Path) -> None:
    """Moves the files into an empty folder, config.json last: before it nobody takes the folder for a model."""
    for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
        sync(path)
        os.rename(path, place / path.name)
        sync(place)
