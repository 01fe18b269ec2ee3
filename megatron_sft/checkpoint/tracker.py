"""Names inside a checkpoint root, the tracker file, and what a kill at any moment may leave behind.

A root holds iter_%07d/ and release/ (whole checkpoints only: they appear by one rename), the tracker
latest_checkpointed_iteration.txt (an iteration or "release"), best_checkpoint.json, discarded_iter_%07d/ (see `publish`),
and hidden work folders. Checkpoints are found by looking; the tracker only says which of them comes first, and may be
missing or damaged. No torch, no collectives: one process calls this, the others hear of it through distributed.py.
"""

import itertools
import json
import math
import os
import re
from pathlib import Path

from megatron_sft.checkpoint.reading import read_limited
from megatron_sft.errors import CheckpointError
from megatron_sft.files import publish_folder, remove, write_whole
from megatron_sft.log import logger

TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpoint.json"
RELEASE = "release"
_ITERATION = re.compile(r"iter_([0-9]{7,18})$")
_WORK = re.compile(r"\.(saving|deleting|replaced)_(iter_[0-9]{7,18}|release)$")
_DISCARDED = re.compile(r"discarded_iter_[0-9]{7,18}(_[0-9]+)?$")
_TEMPORARY = re.compile(r"\.(latest_checkpointed_iteration\.txt|best_checkpoint\.json|metrics\.jsonl)\.[0-9]+\.tmp$")
"""What files.write_whole leaves behind when it is killed."""
_OF_A_CHECKPOINT = ("metadata.json", ".metadata", "common.pt", "manifest.json")
_SMALL_BYTES = 1 << 16

Iteration = int | str
"""A training iteration, or "release" for weights without one."""


def checkpoint_folder(root: Path, iteration: Iteration) -> Path:
    """root/iter_0000010 for 10, root/release for "release"."""
    return root / (RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}")


def saving_folder(root: Path, iteration: Iteration) -> Path:
    """Where a checkpoint is written before it gets its name; no reader looks there."""
    return root / f".saving_{checkpoint_folder(root, iteration).name}"


def iterations(root: Path) -> list[int]:
    """Iterations that have a folder, newest first. A folder says nothing about its content: see manifest.problems.

    Raises:
        CheckpointError: the root cannot be read.
    """
    try:
        names = [entry.name for entry in root.iterdir() if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{root}: {error.strerror}; expected a folder that can be read. Check path and rights.") from None
    numbers = [int(match[1]) for match in map(_ITERATION.match, names) if match]
    return sorted((number for number in numbers if checkpoint_folder(root, number).name in names), reverse=True)


def is_megatron_checkpoint(path: str | Path) -> bool:
    """A root with a checkpoint or a tracker, whole or damaged, or one iteration's folder of torch_dist format."""
    folder = Path(path)
    return bool(candidates(folder)) or os.path.lexists(folder / TRACKER) or (folder / "metadata.json").is_file()


def read_tracker(root: Path) -> Iteration | None:
    """What the tracker says: an iteration, "release", or None when it is missing, garbled or no file."""
    try:
        text = read_limited(root / TRACKER, _SMALL_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if text == RELEASE:
        return RELEASE
    return int(text) if text.isdigit() and len(text) <= 18 else None


def candidates(root: Path) -> list[Iteration]:
    """Checkpoints to try, best first: what the tracker names, then every other iteration, newest first.

    Iterations above the tracker's come last: whoever set the tracker back wants them ignored, but after a loss of
    everything else they are better than a start from nothing.
    """
    tracked = read_tracker(root)
    numbers = iterations(root)
    has_release = any(os.path.lexists(root / RELEASE / name) for name in _OF_A_CHECKPOINT)
    release: list[Iteration] = [RELEASE] if has_release else []
    if tracked is None:
        return [*numbers, *release]
    if tracked == RELEASE:
        return [RELEASE, *numbers]
    below = [number for number in numbers if number < int(tracked)]
    above = [number for number in numbers if number > int(tracked)]
    return [tracked, *below, *above, *release]


def publish(root: Path, iteration: Iteration, went_on_from: int | None = None) -> Path:
    """Gives the finished saving folder its name, then points the tracker at it. A kill in between loses nothing.

    A checkpoint of the same name is moved aside first; `sweep` puts it back if the kill falls between the two renames.

    Iterations above the one that the tracker named before are not of this training: it was set back, or training fell back
    from a damaged checkpoint, or `went_on_from` an earlier one (--ckpt-step; said with a run's first save). Now that the
    training in use has a checkpoint of its own they become discarded_iter_%07d, which nothing resumes from and --save-retain
    deletes. With tracker 20 of 10, 20, 30, 40, a save of 25 leaves 10, 20, 25.
    One of the same number, a save of 30, is replaced.
    """
    source, target = saving_folder(root, iteration), checkpoint_folder(root, iteration)
    before = read_tracker(root)
    publish_folder(source, target, aside=root / f".replaced_{target.name}")
    _make_way(root / TRACKER)
    write_whole(root / TRACKER, f"{iteration}\n" if iteration == RELEASE else f"{int(iteration)}\n")
    if before is not None and iteration != RELEASE:
        last = 0 if before == RELEASE else min(int(before), int(iteration))
        last = last if went_on_from is None else min(last, went_on_from)
        _discard(root, [number for number in iterations(root) if number > last and number != iteration])
    return target


def _discard(root: Path, numbers: list[int]) -> None:
    if best_iteration(root) in numbers:
        (root / BEST).unlink()
    for number in numbers:
        folder = checkpoint_folder(root, number)
        os.rename(folder, _free(root / f"discarded_{folder.name}"))
        logger.warning("%s: above the iteration that training went on from; set aside as discarded_%s.", folder, folder.name)


def _free(path: Path) -> Path:
    """The path, or with _2, _3 ... at its end the first that nothing stands at."""
    numbered = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain([path], numbered) if not os.path.lexists(place))


def _make_way(path: Path) -> None:
    """Moves a folder away that stands where a file is to be written."""
    if path.is_dir() and not path.is_symlink():
        aside = _free(path.with_name(f"{path.name}_folder"))
        os.rename(path, aside)
        logger.warning("%s: is a folder; expected a file. Renamed to %s.", path, aside.name)


def sweep(root: Path) -> None:
    """Removes the work folders and files that a killed process left; restores a replaced checkpoint without successor."""
    if not root.is_dir():
        return
    for entry in sorted(root.iterdir()):
        match = _WORK.match(entry.name)
        if not match:
            if _TEMPORARY.match(entry.name):
                remove(entry)
            continue
        if match[1] == "replaced" and not os.path.lexists(root / match[2]):
            os.rename(entry, root / match[2])
            logger.warning("%s: put back; its replacement was never finished.", root / match[2])
        else:
            remove(entry)


def delete(root: Path, iteration: Iteration) -> None:
    """Removes a checkpoint; its name disappears first, at once."""
    folder = checkpoint_folder(root, iteration)
    hidden = root / f".deleting_{folder.name}"
    remove(hidden)
    os.rename(folder, hidden)
    remove(hidden)


def retain(root: Path, number: int | None) -> list[int]:
    """Deletes all but the newest `number` iterations up to the tracker's, and all discarded ones. The best one stays.

    Returns:
        The deleted iterations, newest first.
    """
    tracked = read_tracker(root)
    if number is None or tracked is None or tracked == RELEASE:
        return []
    counted = [iteration for iteration in iterations(root) if iteration <= int(tracked)]
    best = best_iteration(root)
    deleted = [iteration for iteration in counted[max(number, 1) :] if iteration != best]
    for iteration in deleted:
        delete(root, iteration)
    for entry in root.iterdir():
        if _DISCARDED.match(entry.name):
            remove(entry)
    return deleted


def mark_best(root: Path, iteration: int, metric: str, value: float) -> None:
    """Records the best checkpoint so far; retention keeps it. The caller compares values and saved `iteration`."""
    _make_way(root / BEST)
    write_whole(root / BEST, json.dumps({"iteration": iteration, "metric": metric, "value": value}) + "\n")


def read_best(root: Path) -> dict[str, int | str | float] | None:
    """{"iteration", "metric", "value"} of the best checkpoint, or None: also when the file is damaged."""
    try:
        best = json.loads(read_limited(root / BEST, _SMALL_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {"iteration": int, "metric": str, "value": float}
    if not isinstance(best, dict) or any(type(best.get(name)) is not kind for name, kind in kinds.items()):
        return None
    return best if math.isfinite(best["value"]) and 0 <= best["iteration"] < 10**18 else None


def best_iteration(root: Path) -> int | None:
    best = read_best(root)
    return None if best is None else int(best["iteration"])
