"""Folders of a run: one checkpoint's folder as --load, and what --save-hf would destroy."""

import glob
import itertools
import os
import re

from megatron_sft.config.run import RunConfig

PLACEHOLDERS = ("{iteration}", "{rollout_id}")
"""Names in --save-hf that stand for the iteration."""


def checkpoint_place(load: str) -> tuple[str, int | None]:
    """The folder of one checkpoint -> (the folder of them all, its iteration): out/iter_0000040 -> (out, 40).

    Any other place -> (itself, None), and out/release -> (out, None) where nothing else is in out.
    """
    path = os.path.abspath(load)
    root, name = os.path.split(path)
    match = re.fullmatch("iter_([0-9]{7,18})", name)
    if os.path.isdir(path) and (match or (name == "release" and not glob.glob(glob.escape(root) + "/iter_*"))):
        return os.path.dirname(load.rstrip("/")) or root, int(match[1]) if match else None
    return load, None


def export_folder(save_hf: str, iteration: int) -> str:
    """--save-hf at an iteration: out/{iteration} -> out/100."""
    for name in PLACEHOLDERS:
        save_hf = save_hf.replace(name, str(iteration))
    return save_hf


def export_folders(save_hf: str) -> list[str]:
    """--save-hf as it may be written: itself, or with {iteration} those that are there already, and a new one."""
    pattern = glob.escape(save_hf)
    for name in PLACEHOLDERS:
        pattern = pattern.replace(name, "[0-9]*")
    if pattern == glob.escape(save_hf):
        return [save_hf]
    new = itertools.count()
    return [*sorted(glob.glob(pattern)), next(path for n in new if not os.path.lexists(path := export_folder(save_hf, n)))]


def written_place(save_hf: str) -> str:
    """What two runs with this --save-hf would both write into: out/hf itself, out/{iteration} of out/{iteration}/hf."""
    parts = [save_hf]
    while (above := os.path.dirname(parts[-1])) != parts[-1]:
        parts.append(above)
    return next((part for part in reversed(parts) if any(name in part for name in PLACEHOLDERS)), save_hf)


def folder_problems(run: RunConfig) -> list[str]:
    """What stands at or below --save-hf although the run reads it or writes it itself, one sentence each."""
    save_hf = run.checkpoint.save_hf
    if not save_hf:
        return []
    target = os.path.realpath(export_folders(save_hf)[-1])
    read = {"--load": run.checkpoint.load, "--lora-load": run.lora.lora_load, "--tokenizer-model": run.data.tokenizer_model}
    read |= {f"data set {number}": path for number, path in enumerate((*run.data.train_data, *run.data.valid_data), start=1)}
    written = {"--save": run.checkpoint.save, "--data-cache-path": run.data.data_cache_path}
    written |= {"--tensorboard-dir": run.log.tensorboard_dir}
    problems = [
        f"--save-hf {save_hf}: {flag} {path} is there or below; expected a folder of the HF folder's own. Name another."
        for flag, path in {**read, **written}.items()
        if path and (flag in written or os.path.lexists(path)) and _is_at_or_below(os.path.realpath(path), target)
    ]
    return list(dict.fromkeys(problems))


def _is_at_or_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
