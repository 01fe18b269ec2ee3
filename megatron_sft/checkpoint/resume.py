"""Compares the configuration beside a checkpoint with that of the run that resumes from it.

Free: layout, folders, logging and speed. Told: what changes the rest of training on purpose (learning rate, length).
Refused unless allowed by name: what makes the two halves trainings of different data, models or order.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sft.config.run import RunConfig
from megatron_sft.errors import CheckpointError
from megatron_sft.log import logger

FINGERPRINT = "data_fingerprint"
_REFUSED = {
    "data": (
        "tokenizer_model",
        "chat_template",
        "seq_length",
        "packing",
        "truncation",
        "train_on",
        "train_on_tool_calls",
        "history_thinking",
        "role_map",
        "train_epochs",
        "train_weights",
        "split",
        "shuffle",
        "seed",
        "reset_position_ids",
        "reset_attention_mask",
        "eod_mask_loss",
    ),
    "optim": ("optimizer",),
    "train": ("seed", "global_batch_size", "params_dtype"),
}
_PATHS = {"data.tokenizer_model"}


def run_config_json(run: RunConfig, state: Mapping[str, Any]) -> str:
    """What is written beside a checkpoint: the resolved configuration and the fingerprint of the data."""
    content = json.loads(run.to_json())
    content[FINGERPRINT] = state.get(FINGERPRINT)
    return json.dumps(content, indent=1, sort_keys=True)


def changes(saved: Mapping[str, Any], run: RunConfig, fingerprint: str | None) -> tuple[list[str], list[str]]:
    """(refused, told): one `section.name: old -> new` a setting that differs.

    Args:
        saved: run_config.json; {} has no changes.
        run: of the resuming run.
        fingerprint: of its data; None: not compared.
    """
    now, refused, told = json.loads(run.to_json()), [], []
    for section in ("model", "data", "optim", "train"):
        old = saved.get(section, {})
        for name in sorted(set(old) & set(now[section])):
            if _same(f"{section}.{name}", old[name], now[section][name]):
                continue
            line = f"{section}.{name}: {_short(old[name])} -> {_short(now[section][name])}"
            if section == "model" or name in _REFUSED[section]:
                refused.append(line)
            elif section != "data":
                told.append(line)
    old_fingerprint = saved.get(FINGERPRINT)
    if fingerprint and old_fingerprint and old_fingerprint != fingerprint:
        refused.append(f"{FINGERPRINT}: {_short(old_fingerprint)} -> {_short(fingerprint)}")
    return refused, told


def refuse_changed(saved: Mapping[str, Any], run: RunConfig, allowed: Sequence[str] = (), fingerprint: str | None = None) -> None:
    """Raises when a setting changed that a resume must not change.

    Args:
        saved: read_run_config(root).
        run: of the resuming run.
        allowed: names of settings that may differ, with or without their section (--allow-changed).
        fingerprint: of the run's data.

    Raises:
        CheckpointError: naming every changed setting with its old and new value.
    """
    refused, told = changes(saved, run, fingerprint)
    names = {line: line.split(":", 1)[0] for line in refused}
    left = [line for line in refused if not {names[line], names[line].rpartition(".")[2]} & set(allowed)]
    for line in [*told, *(line for line in refused if line not in left)]:
        logger.warning("changed since the checkpoint: %s", line)
    if left:
        listed = ",".join(names[line] for line in left)
        raise CheckpointError(
            f"resume: {len(left)} settings differ from the checkpoint's: {'; '.join(left)}. Expected the same data, "
            f"order and model. Restore them, start afresh with another --save folder, or pass --allow-changed {listed}."
        )


def _same(name: str, old: Any, new: Any) -> bool:
    """Equal, or the same folder name at another place."""
    if name in _PATHS and isinstance(old, str) and isinstance(new, str):
        return old.rstrip("/").rpartition("/")[2] == new.rstrip("/").rpartition("/")[2]
    return bool(old == new)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
