"""Contradictions between what flags say and what a checkpoint's config.json says. No files, no torch.

Flags may repeat or leave out what config.json knows; they may not say otherwise, because the run would then train
another function than the one that the weights were made for.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_sft.config.arguments import spelled
from megatron_sft.config.core_fields import RECORD_OF, RECORDS, CoreArchitecture
from megatron_sft.config.fields import kinds
from megatron_sft.config.run import OWN_CORE, ModelConfig
from megatron_sft.model.pattern import layers_with_experts, layers_without_rope

PADDING = frozenset({"padded_vocab_size", "make_vocab_size_divisible_by"})
FREE = PADDING | {"max_position_embeddings", "init_method_std", "core"}
"""Fields that a run may choose for itself."""

NAMES = [item.name for item in dataclasses.fields(ModelConfig) if item.name not in RECORDS]
ARCHITECTURE = frozenset([*RECORD_OF, *OWN_CORE, *kinds(CoreArchitecture)])
"""Names of megatron-core that belong to the function that the weights compute."""


def conflicts(flags: ModelConfig, explicit: frozenset[str], hf: ModelConfig) -> list[str]:
    """One sentence for each field on which a flag and config.json disagree, in ModelConfig's order.

    Args:
        flags: the model as the command line describes it.
        explicit: names of what a flag set, of ModelConfig or of megatron-core; others are defaults and never contradict.
        hf: model_config_from_hf of the checkpoint.
    """
    sentences = []
    for name in [*NAMES, *sorted(ARCHITECTURE - {*NAMES})]:
        if name in explicit - FREE:
            theirs = hf.core_fields().get(name) if name in RECORD_OF else _value(hf, name)  # None of a part that it has not
            ours = _value(flags, name)
            if not _agree(_by_layer(name, ours, hf), _by_layer(name, theirs, hf)):
                sentences.append(_sentence(name, ours, theirs))
    return sentences


def _value(model: ModelConfig, name: str) -> Any:
    """Of a field of ModelConfig, of one of its records, or of an entry of `core`."""
    place = getattr(model, RECORD_OF[name]) if name in RECORD_OF else model
    return getattr(place, name, model.core.get(name))


def _by_layer(name: str, value: Any, hf: ModelConfig) -> Any:
    """The layers that a frequency means."""
    if value is not None and name == "moe_layer_freq":
        return layers_with_experts(hf.with_core({name: value}))
    return layers_without_rope(hf.with_core({name: value})) if name == "no_rope_freq" else value


def _sentence(name: str, ours: Any, theirs: Any) -> str:
    found = f"the flags say {name} = {_show(ours)}, config.json says {_show(theirs)}"
    return f"{spelled(name)}: {found}. Leave the flag out or correct it."


def _show(value: Any) -> str:
    return repr(dict(value)) if isinstance(value, Mapping) else repr(value)


def _agree(ours: Any, theirs: Any) -> bool:
    """Equal, or both nothing; a mapping (RoPE scaling) agrees when every entry that it names does."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return all(_agree(value, theirs.get(key)) for key, value in ours.items())
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return abs(ours - theirs) <= 1e-9 * max(abs(ours), abs(theirs))
    return bool(ours == theirs) or (not ours and not theirs)


def merged(flags: ModelConfig, explicit: frozenset[str], hf: ModelConfig) -> ModelConfig:
    """The model to build once conflicts() is empty: config.json's, with what a run may choose taken from the flags."""
    chosen = {name: getattr(flags, name) for name in (FREE - {"core"}) & explicit}
    core = {
        **flags.core,
        **{name: value for name, value in hf.core.items() if name in ARCHITECTURE or name not in flags.core},
    }
    return dataclasses.replace(hf, **chosen, core=core)
