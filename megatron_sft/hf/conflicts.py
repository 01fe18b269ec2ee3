"""Contradictions between what flags say and what a checkpoint's config.json says. No files, no torch.

Flags may repeat or leave out what config.json knows; they may not say otherwise, because the run would then train
another function than the one that the weights were made for.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_sft.config.arguments import spelled
from megatron_sft.config.core_fields import CoreArchitecture
from megatron_sft.config.fields import kinds
from megatron_sft.config.run import ModelConfig

PADDING = frozenset({"padded_vocab_size", "make_vocab_size_divisible_by"})
FREE = PADDING | {"max_position_embeddings", "init_method_std", "core"}
"""Fields that a run may choose for itself."""

ARCHITECTURE = frozenset(kinds(CoreArchitecture))
"""Fields of ModelConfig.core that belong to the function that the weights compute."""


def conflicts(flags: ModelConfig, explicit: frozenset[str], hf: ModelConfig) -> list[str]:
    """One sentence for each field on which a flag and config.json disagree, in ModelConfig's order.

    Args:
        flags: the model as the command line describes it.
        explicit: names of the ModelConfig fields that a flag set; others are defaults and never contradict.
            Entries of core by their own names.
        hf: model_config_from_hf of the checkpoint.
    """
    sentences = []
    for item in dataclasses.fields(ModelConfig):
        name, ours, theirs = item.name, getattr(flags, item.name), getattr(hf, item.name)
        if name in explicit - FREE and not _agree(ours, theirs):
            sentences.append(_sentence(name, ours, theirs))
    for name in sorted(ARCHITECTURE & flags.core.keys() & explicit):
        if flags.core[name] is not None and not _agree_core(name, flags, hf):
            sentences.append(_sentence(name, flags.core[name], hf.core.get(name)))
    return sentences


def _sentence(name: str, ours: Any, theirs: Any) -> str:
    found = f"the flags say {name} = {_show(ours)}, config.json says {_show(theirs)}"
    return f"{spelled(name)}: {found}. Leave the flag out or correct it."


def _show(value: Any) -> str:
    return repr(dict(value)) if isinstance(value, Mapping) else repr(value)


def _agree(ours: Any, theirs: Any) -> bool:
    """Equal; a mapping (RoPE scaling) agrees when every entry that it names does."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return all(_agree(value, theirs.get(key)) for key, value in ours.items())
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return abs(ours - theirs) <= 1e-9 * max(abs(ours), abs(theirs))
    return bool(ours == theirs)


def _agree_core(name: str, flags: ModelConfig, hf: ModelConfig) -> bool:
    ours, theirs = flags.core[name], hf.core.get(name)
    layers = range(hf.num_layers)
    if name == "moe_layer_freq":
        return _sparse_layers(ours, layers) == _sparse_layers(theirs, layers)
    if name == "no_rope_freq" and isinstance(ours, int):  # every n-th layer has no RoPE
        ours = [int((layer + 1) % ours == 0) for layer in layers]
    return _agree(ours, theirs) or (not ours and not theirs)


def _sparse_layers(frequency: Any, layers: range) -> list[bool]:
    """Which layers have experts: megatron-core takes every n-th layer, or a list of 0 and 1."""
    if isinstance(frequency, list | tuple):
        return [bool(value) for value in frequency]
    return [layer % (frequency or 1) == 0 for layer in layers]


def merged(flags: ModelConfig, explicit: frozenset[str], hf: ModelConfig) -> ModelConfig:
    """The model to build once conflicts() is empty: config.json's, with what a run may choose taken from the flags."""
    chosen = {name: getattr(flags, name) for name in (FREE - {"core"}) & explicit}
    core = {
        **flags.core,
        **{name: value for name, value in hf.core.items() if name in ARCHITECTURE or name not in flags.core},
    }
    return dataclasses.replace(hf, **chosen, core=core)
