"""What a run that resumes takes over from its checkpoint, and what it must not change.

Beside every checkpoint stands its resolved configuration (run_config.json). Each field of it has one of four fates:
refused  it makes the two halves trainings of different data, order or models;
by data  refused unless the rows' tokens and the packs are proved to be the same (DATA_IDENTITY): the flag is but a name;
told     it changes the rest of training on purpose (learning rate, length): one line; of --param-groups all but the optimizers;
free     layout, folders, logging and speed.
--allow-changed NAME makes told of refused. tests/unit/checkpoint/test_resume.py holds that no field is forgotten.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_sft.config.core_fields import RECORDS
from megatron_sft.config.groups import optimizers_of
from megatron_sft.config.run import BASE_IDENTITY, DATA_IDENTITY, ROW_FIELDS, RunConfig, TrainConfig, model_config_from_json
from megatron_sft.errors import CheckpointError
from megatron_sft.log import logger

_DEFAULTS = dataclasses.asdict(RunConfig())
_PADDING = ("padded_vocab_size", "make_vocab_size_divisible_by")
"""Rows of the embedding that no token has; tensor-parallel ranks ask for them."""
REFUSED: Mapping[str, tuple[str, ...]] = {
    "model": tuple(name for name in _DEFAULTS["model"] if name not in _PADDING),
    "data": (
        "seq_length",
        "packing",
        "truncation",
        "train_on",
        "train_on_tool_calls",
        "history_thinking",
        "empty_thinking",
        "special_in_content",
        "role_map",
        "train_epochs",
        "train_weights",
        "shuffle",
        "seed",
        "reset_position_ids",
        "reset_attention_mask",
        "eod_mask_loss",
    ),
    "optim": ("optimizer", "muon_variant"),
    "train": ("seed", "global_batch_size", "params_dtype", "freeze", "train_only"),
    "lora": ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_type"),
}
BY_DATA: Mapping[str, tuple[str, ...]] = {
    "data": (
        "train_data",
        "train_names",
        "split",
        "data_split",
        "data_config",
        "tokenizer_model",
        "chat_template",
        "trust_remote_code",
        *ROW_FIELDS,
    ),
}
TOLD: Mapping[str, tuple[str, ...]] = {
    "data": ("valid_data",),
    "optim": tuple(name for name in _DEFAULTS["optim"] if name not in REFUSED["optim"] and "offload" not in name),
    "train": (
        "micro_batch_size",
        "max_tokens_per_gpu",
        "train_iters",
        "train_samples",
        "num_epoch",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "recompute_modules",
        "loss_type",
        "label_smoothing",
        "z_loss_coeff",
        "neftune_noise_alpha",
        "check_for_nan",
        "loss_spike_factor",
        "loss_spike_action",
        "eval_iters",
        "eval_interval",
        "early_stop_patience",
        "deterministic_mode",
        "kernels",
        "attention_backend",
    ),
}
STATES = (
    *("optim.optimizer", "optim.muon_variant", "optim.param_groups", "train.freeze", "train.train_only"),
    *("lora.lora_rank", "lora.lora_target_modules", "lora.lora_type"),
)
"""Refused settings that say which states which parameter has: without them a new run cannot take an optimizer's states."""
FREE: Mapping[str, tuple[str, ...]] = {
    "model": _PADDING,
    "parallel": tuple(_DEFAULTS["parallel"]),
    "data": ("data_cache_path", "num_workers", "prefetch"),
    "optim": ("optimizer_cpu_offload", "optimizer_offload_fraction"),
    "train": ("skip_train", "exit_interval", "exit_duration_in_mins", "exit_signal_handler"),
    "checkpoint": tuple(_DEFAULTS["checkpoint"]),
    "lora": ("lora_init", "lora_load", "lora_merge"),
    "log": tuple(_DEFAULTS["log"]),
    "tasks": tuple(_DEFAULTS["tasks"]),
}


def run_config_json(run: RunConfig, state: Mapping[str, Any]) -> str:
    """What is written beside a checkpoint: the resolved configuration and the identity of the data."""
    content = json.loads(run.to_json())
    content |= {name: state.get(name) for name in DATA_IDENTITY}
    content[BASE_IDENTITY] = state.get(BASE_IDENTITY)
    return json.dumps(content, indent=1, sort_keys=True)


def kept_batch_size(saved: Mapping[str, Any], train: TrainConfig, dp_size: int) -> int:
    """The global batch size of a run, in packs: the flag's, else the checkpoint's, else micro-batch x data-parallel size.

    A checkpoint's is kept whatever the layout is now: the order of an epoch and the steps' size are part of the training.

    Args:
        saved: run_config.json of the checkpoint that the run resumes from; {} without one.
        train: flags of this run.
        dp_size: data-parallel processes of this run.
    """
    by_layout = train.micro_batch_size * dp_size
    kept = saved.get("train", {}).get("global_batch_size")
    if train.global_batch_size or not kept:
        return train.global_batch_size or by_layout
    if kept != by_layout:
        unit = dp_size if train.max_tokens_per_gpu else by_layout
        idle = (
            f" They do not share {kept} evenly, so some wait in part of each step; the numbers stay right." if kept % unit else ""
        )
        logger.info(
            "global batch size: %d as in the checkpoint; --micro-batch-size %d x %d data-parallel processes would be %d.%s",
            *(kept, train.micro_batch_size, dp_size, by_layout, idle),
        )
    return int(kept)


def changes(saved: Mapping[str, Any], run: RunConfig, identity: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(refused, told): one `section.name: old -> new` a setting that differs. What an older release did not know had its default.

    Args:
        saved: run_config.json.
        run: of the resuming run.
        identity: of its data, by DATA_IDENTITY's names.
    """
    now: dict[str, Any] = json.loads(run.to_json())
    defaults: dict[str, Any] = json.loads(RunConfig().to_json())
    same_data = all(saved.get(name) == identity.get(name) for name in DATA_IDENTITY)
    refused: list[str] = []
    told: list[str] = []
    for table, lines in ((REFUSED, refused), (BY_DATA, told if same_data else refused), (TOLD, told)):
        for section, names in table.items():
            old = {**defaults[section], **_known(section, saved[section])} if section in saved else now[section]
            for path, before, after in _leaves(section, names, old, now[section]):
                unknown = path == "train.global_batch_size" and before is None  # an early release left it open
                regroups = path == "optim.param_groups" and optimizers_of(before) != optimizers_of(after)
                if before != after and not unknown:
                    (refused if regroups else lines).append(f"{path}: {_short(before)} -> {_short(after)}")
    for name in DATA_IDENTITY:
        if "data" in saved and saved.get(name) != identity.get(name):
            refused.append(f"{name}: {_short(saved.get(name))} -> {_short(identity.get(name))}")
    return refused, told


def other_states(saved: Mapping[str, Any], run: RunConfig) -> list[str]:
    """What makes the optimizer states of a checkpoint another run's, one `section.name: old -> new` a setting (STATES)."""
    return [line for line in changes(saved, run, {})[0] if line.partition(":")[0] in STATES]


def _leaves(section: str, names: Sequence[str], old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(section.name, old value, new value); of a record of ModelConfig each field alone."""
    for name in names:
        if name in RECORDS and isinstance(old[name], dict) and isinstance(new[name], dict):
            yield from _leaves(f"{section}.{name}", sorted(new[name]), old[name], new[name])
        else:
            yield f"{section}.{name}", old[name], new[name]


def _known(section: str, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A section of run_config.json as this release would have written it."""
    if section != "model":
        return saved
    return dict(json.loads(json.dumps(dataclasses.asdict(model_config_from_json(saved)), default=str)))


def refuse_changed(saved: Mapping[str, Any], run: RunConfig, allowed: Sequence[str], identity: Mapping[str, str]) -> None:
    """Raises when a setting changed that a resume must not change.

    Args:
        saved: read_run_config(root).
        run: of the resuming run.
        allowed: names of settings that may differ, with or without their section (--allow-changed).
        identity: of the run's data, by DATA_IDENTITY's names.

    Raises:
        CheckpointError: naming every changed setting with its old and new value.
    """
    if "data" not in saved:
        logger.warning("the checkpoint does not say what it was trained on (Megatron-LM's do not): nothing is compared.")
    refused, told = changes(saved, run, identity)
    names = {line: line.split(":", 1)[0] for line in refused}
    left = [line for line in refused if not {names[line], names[line].rpartition(".")[2]} & set(allowed)]
    for line in [*told, *(line for line in refused if line not in left)]:
        logger.warning("changed since the checkpoint: %s", line)
    if left:
        listed = " ".join(names[line] for line in left)
        raise CheckpointError(
            f"resume: {len(left)} settings differ from the checkpoint's: {'; '.join(left)}. Expected the same data, "
            f"order and model. Restore them, start afresh with another --save folder, or pass --allow-changed {listed}."
        )
    if any(name in names.values() for name in DATA_IDENTITY):
        logger.warning("other data since the checkpoint: rows of the epoch under way may be trained twice, or not at all.")


def _short(value: Any) -> str:
    text = json.dumps(value[:16] if isinstance(value, str) and len(value) == 64 else value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
