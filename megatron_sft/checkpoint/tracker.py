"""Names inside a checkpoint root, the tracker file, and what a kill at any moment may leave behind.

A root holds iter_%07d/ and release/ (whole checkpoints only: they appear by one rename), the tracker
latest_checkpointed_iteration.txt (an iteration or "release"), best_checkpoint.json, and hidden work folders. No torch,
no collectives: one process calls this, the others hear of it through distributed.py.
"""

import json
import os
import re
import shutil
from pathlib import Path

from megatron_sft.files import publish_folder, write_whole
from megatron_sft.log import logger

TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpoint.json"
RELEASE = "release"
_ITERATION = re.compile(r"iter_(\d{7,})$")
_WORK = re.compile(r"\.(saving|deleting|replaced)_(iter_\d{7,}|release)$")

Iteration = int | str
"""A training iteration, or "release" for weights without one."""


def checkpoint_folder(root: Path, iteration: Iteration) -> Path:
    """root/iter_0000010 for 10, root/release for "release"."""
    return root / (RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}")


def saving_folder(root: Path, iteration: Iteration) -> Path:
    """Where a checkpoint is written before it gets its name; no reader looks there."""
    return root / f".saving_{checkpoint_folder(root, iteration).name}"


def iterations(root: Path) -> list[int]:
    """Iterations that have a folder, newest first. A folder says nothing about its content: see manifest.problems."""
    if not root.is_dir():
        return []
    found = (_ITERATION.match(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def is_megatron_checkpoint(path: str | Path) -> bool:
    """A root with the tracker file, or one iteration's folder of torch_dist format."""
    folder = Path(path)
    return (folder / TRACKER).is_file() or (folder / "metadata.json").is_file()


def read_tracker(root: Path) -> Iteration | None:
    """What the tracker says: an iteration, "release", or None when it is missing, empty or garbled."""
    try:
        text = (root / TRACKER).read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    if text == RELEASE:
        return RELEASE
    return int(text) if text.isascii() and text.isdigit() else None


def candidates(root: Path) -> list[Iteration]:
    """Checkpoints to try, best first: what the tracker names, then every other iteration, newest first.

    Iterations above the tracker's come last: whoever set the tracker back wants them ignored, but after a loss of
    everything else they are better than a start from nothing.
    """
    tracked = read_tracker(root)
    numbers = iterations(root)
    release: list[Iteration] = [RELEASE] if (root / RELEASE).is_dir() else []
    if tracked is None:
        return [*numbers, *release]
    if tracked == RELEASE:
        return [*release, *numbers]
    below = [number for number in numbers if number < int(tracked)]
    above = [number for number in numbers if number > int(tracked)]
    return [tracked, *below, *above, *release]


def publish(root: Path, iteration: Iteration) -> Path:
    """Gives the finished saving folder its name, then points the tracker at it. A kill in between loses nothing.

    A checkpoint of the same name is moved aside first; `sweep` puts it back if the kill falls between the two renames.
    """
    source, target = saving_folder(root, iteration), checkpoint_folder(root, iteration)
    publish_folder(source, target, aside=root / f".replaced_{target.name}")
    write_whole(root / TRACKER, f"{iteration}\n" if iteration == RELEASE else f"{int(iteration)}\n")
    return target


def sweep(root: Path) -> None:
    """Removes the work folders that a killed process left; restores a replaced checkpoint without successor."""
    if not root.is_dir():
        return
    for entry in sorted(root.iterdir()):
        match = _WORK.match(entry.name)
        if not match:
            continue
        if match[1] == "replaced" and not (root / match[2]).exists():
            os.rename(entry, root / match[2])
            logger.warning("%s: put back; its replacement was never finished.", root / match[2])
        else:
            shutil.rmtree(entry, ignore_errors=True)


def delete(root: Path, iteration: Iteration) -> None:
    """Removes a checkpoint; its name disappears first, at once."""
    folder = checkpoint_folder(root, iteration)
    hidden = root / f".deleting_{folder.name}"
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def retain(root: Path, number: int | None) -> list[int]:
    """Deletes all but the newest `number` iterations. The best one and the tracker's stay.

    Returns:
        The deleted iterations, newest first.
    """
    if number is None:
        return []
    kept = {read_tracker(root), best_iteration(root)}
    deleted = [iteration for iteration in iterations(root)[max(number, 1) :] if iteration not in kept]
    for iteration in deleted:
        delete(root, iteration)
    return deleted


def mark_best(root: Path, iteration: int, metric: str, value: float) -> None:
    """Records the best checkpoint so far; retention keeps it. The caller compares values and saved `iteration`."""
    write_whole(root / BEST, json.dumps({"iteration": iteration, "metric": metric, "value": value}) + "\n")


def read_best(root: Path) -> dict[str, int | str | float] | None:
    """{"iteration", "metric", "value"} of the best checkpoint, or None."""
    try:
        best = json.loads((root / BEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return best if isinstance(best, dict) and isinstance(best.get("iteration"), int) else None


def best_iteration(root: Path) -> int | None:
    best = read_best(root)
    return None if best is None else int(best["iteration"])
