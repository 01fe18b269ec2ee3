"""Which files of a folder are a split's, by the rules of the `datasets` package (datasets/data_files.py@5.2.0).

The first of these that finds a split decides, and files that it does not name are left out:

1. README.md's `configs`, as a copy of a hub data set has them;
2. data/SPLIT-00000-of-00001.parquet;
3. a folder named for a split, such as `train/` or `my-dev_2/`;
4. a file named so, such as `train.jsonl`, `rows_test-1.parquet`.

Without any the folder is taken whole. Not here: reading files (sources.py).
"""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sft.errors import DataError
from megatron_sft.log import logger

KEYWORDS: Mapping[str, Sequence[str]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_FOLDER, _FILE = (
    {split: re.compile(rf"(.*[-._ 0-9])?({'|'.join(words)}){end}", re.DOTALL) for split, words in KEYWORDS.items()}
    for end in ("([-._ 0-9].*)?", "[-._ 0-9].*")
)
LISTED = 4


def files_of_split(folder: str, files: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The files to read, in their order; says which, where some are left.

    Args:
        folder: given by the user.
        files: data files below it.
        wanted: names of splits; the first that is there counts.

    Raises:
        DataError: there are splits, but none of these; or README.md says nothing that can be followed.
    """
    splits = _by_card(folder, files) or _by_name(folder, files)
    if not splits:
        return list(files)
    split = next((name for name in wanted if splits.get(name)), None)
    if split is None:
        raise DataError(
            f"{folder}: has the splits {', '.join(splits)}; expected {' or '.join(wanted)}. Name the files themselves, for "
            "instance by a glob, or choose with --finetune-data-split."
        )
    taken = splits[split]
    if len(taken) < len(files):
        others = [f"{name} ({len(named)})" for name, named in splits.items() if name != split]
        unnamed = len(set(files) - {file for named in splits.values() for file in named})
        left = ", ".join([*others, *([f"of no split ({unnamed})"] if unnamed else [])])
        names = [os.path.relpath(file, folder) for file in taken[:LISTED]] + ["..."] * (len(taken) > LISTED)
        logger.info(
            "%s: %d of %d files are split %s (%s); left: %s", folder, len(taken), len(files), split, ", ".join(names), left
        )
    return taken


def _by_name(folder: str, files: Sequence[str]) -> dict[str, list[str]]:
    paths = {file: os.path.relpath(file, folder) for file in files}
    shards = {file: match[1] for file, path in paths.items() if (match := _SHARD.fullmatch(path))}
    if shards:
        return {split: [file for file in shards if shards[file] == split] for split in dict.fromkeys(shards.values())}
    parts = {file: path.split(os.sep) for file, path in paths.items()}
    by_folder = {split: [f for f in files if any(map(_FOLDER[split].fullmatch, parts[f][:-1]))] for split in KEYWORDS}
    by_file = {split: [f for f in files if _FILE[split].fullmatch(parts[f][-1])] for split in KEYWORDS}
    chosen = by_folder if any(by_folder.values()) else by_file
    return {split: named for split, named in chosen.items() if named}


def _by_card(folder: str, files: Sequence[str]) -> dict[str, list[str]]:
    """The splits of README.md's default configuration; {}: it has none."""
    card = os.path.join(folder, "README.md")
    config = _default_config(card) if os.path.isfile(card) else {}
    inside = os.path.join(folder, str(config.get("data_dir") or ""))
    normal = {os.path.normpath(file): file for file in files}
    patterns = config.get("data_files")
    if patterns is None:
        below = os.path.join(os.path.normpath(inside), "")
        return _by_name(inside, [normal[path] for path in normal if path.startswith(below)]) if config.get("data_dir") else {}
    splits: dict[str, set[str]] = {}
    for entry in patterns if isinstance(patterns, list) else [patterns]:
        split, paths = (str(entry.get("split")), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for path in paths if isinstance(paths, list) else [paths]:
            matched = glob.glob(os.path.join(glob.escape(inside), str(path)), recursive=True)
            splits.setdefault(split, set()).update(normal[path] for path in map(os.path.normpath, matched) if path in normal)
    if not any(splits.values()):
        raise DataError(f"{card}: its data_files {patterns} are no data files below {folder}; expected some. Correct it.")
    return {split: sorted(named) for split, named in splits.items() if named}


def _default_config(card: str) -> dict[str, Any]:
    """The entry of `configs` that is the only one, or called default, or marked so; {}: the card has no such list."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        configs = (metadata_load(card) or {}).get("configs")
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise DataError(
            f"{card}: its head cannot be read ({' '.join(str(error).split())}); expected YAML. Correct or remove it."
        ) from None
    named = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    default = [c for c in named if len(named) == 1 or c.get("config_name") == "default" or c.get("default")]
    if named and len(default) != 1:
        names = ", ".join(str(config.get("config_name")) for config in named)
        raise DataError(
            f"{card}: has the configurations {names}, and {len(default)} of them are the default; expected one. Name the files "
            "of one of them, for instance by a glob."
        )
    return default[0] if default else {}
