"""A model as the flags of a conf/<org>/<model>.sh, which say all of its architecture. The way back is arguments.parse.

Flags have upstream's spelling where it has one. What only training decides (router dtype, dispatcher, load balancing) is
added for experts, with the values of Megatron-LM's confs.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_sft.config.core_fields import MLAConfig
from megatron_sft.config.flags import SWITCHES
from megatron_sft.config.run import ModelConfig
from megatron_sft.hf.config import model_config_from_hf, read_hf_config
from megatron_sft.model.pattern import layers_with_experts

LINE = 118
"""Longest line, in characters."""
SEQ_LENGTH = 4096
"""Tokens a pack unless the model takes fewer."""
PLAIN = re.compile(r"[A-Za-z0-9._/-]+")
"""Names that need no quotes."""
LATENT = [field.name for field in dataclasses.fields(MLAConfig)]
"""In the order in which they stand on a line."""
SHAPE = (
    "normalization norm_epsilon norm_zero_centered activation gated_mlp add_bias_linear share_embeddings_and_output_weights"
).split()
"""Fields of the first line."""
ELSEWHERE = frozenset(
    (
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size padded_vocab_size "
        "make_vocab_size_divisible_by max_position_embeddings normalization norm_epsilon norm_zero_centered activation gated_mlp "
        "add_bias_linear share_embeddings_and_output_weights position_embedding_type rotary_base rotary_percent rope_scaling "
        "window_size window_layers init_method_std no_rope_freq rotary_interleaved softmax_scale moe mla mamba core"
    ).split()
)
"""Fields of ModelConfig with a place or a spelling of their own; any other is --field-name where it is not the default."""


def conf_text(model: ModelConfig, name: str) -> str:
    """The file. Every value is one word to bash, whatever config.json or the name of the folder holds: sourcing runs nothing.

    Args:
        model: model_config_from_hf of the folder.
        name: its hub name (Qwen/Qwen3-0.6B) or path, the default of HF_MODEL_CKPT.
    """
    plain = PLAIN.fullmatch(name)
    lines = [
        "#!/bin/bash",
        f"# {name if plain else ascii(name)}: the values of its config.json.",
        f'HF_MODEL_CKPT="${{HF_MODEL_CKPT:-{name}}}"' if plain else f"HF_MODEL_CKPT=${{HF_MODEL_CKPT:-{shlex.quote(name)}}}",
        "# shellcheck disable=SC2034  # read by arguments.sh",
        "MODEL_ARGS=(",
        *(line for group in _groups(model) for line in _wrapped(group)),
        ")",
    ]
    return "\n".join(lines) + "\n"


def conf_of_folder(folder: str | Path, name: str | None = None) -> str:
    """The same of an HF folder's config.json; None: the folder is its name."""
    return conf_text(model_config_from_hf(read_hf_config(folder)), name or str(folder))


def _groups(model: ModelConfig) -> Iterator[list[str]]:
    """Flags that stand on one line."""
    yield ["--bf16", *_with_switches(model, SHAPE)]
    yield [_flag(name, getattr(model, name)) for name in ("num_layers", "hidden_size", "ffn_hidden_size")]
    yield _attention(model)
    yield _positions(model)
    core = {name: value for name, value in model.core_fields().items() if value not in (None, False, "softmax")}
    if all(layers_with_experts(model)) or "hybrid_layer_pattern" in core:  # the default; the pattern says it
        core.pop("moe_layer_freq", None)
    if core.get("rope_type") == "rope":
        core = {name: value for name, value in core.items() if name not in LATENT[LATENT.index("rope_type") + 1 :]}
    yield [_flag(name, core[name]) for name in LATENT if name in core]
    yield [_flag(name, core[name]) for name in sorted(core.keys() - set(LATENT)) if "moe" not in name]
    if "num_moe_experts" in core:
        yield [_flag(name, core[name]) for name in sorted(core) if "moe" in name]
        yield _expert_training(core)
    yield [
        _flag("max_position_embeddings", model.max_position_embeddings),
        _flag("seq_length", min(SEQ_LENGTH, model.max_position_embeddings)),
        _flag("padded_vocab_size", model.vocab_size),
        "--make-vocab-size-divisible-by 1",
        "--tokenizer-type HuggingFaceTokenizer",
    ]


def _with_switches(model: ModelConfig, names: Sequence[str]) -> Iterator[str]:
    """Fields as flags: a switch where one says it (--swiglu for two), nothing for a boolean that is as by default."""
    left = {f"model.{name}": getattr(model, name) for name in names}
    for name in names:
        path = f"model.{name}"
        switches = [flag for flag, sets in SWITCHES.items() if sets and sets[0][0] == path and set(sets) <= set(left.items())]
        if switches:
            yield switches[0]
            left = {other: value for other, value in left.items() if other not in dict(SWITCHES[switches[0]])}
        elif path in left and not (isinstance(left[path], bool) and left[path] == getattr(ModelConfig, name)):
            yield _flag(name, left[path])


def _attention(model: ModelConfig) -> list[str]:
    """Heads, windows, and every field that no other flag says."""
    flags = [_flag("num_attention_heads", model.num_attention_heads), "--group-query-attention"]
    flags += [_flag(name, getattr(model, name)) for name in ("num_query_groups", "kv_channels")]
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name not in ELSEWHERE and value != field.default:
            flags.append(_flag(field.name, value))
    if model.window_size:
        flags.append(f"--window-size '{model.window_size - 1},0'")
    if model.window_layers:
        flags.append(f"--window-attn-skip-freq {_window_layers(model.window_layers)}")
    return flags


def _positions(model: ModelConfig) -> list[str]:
    flags = [_flag("position_embedding_type", model.position_embedding_type)]
    if model.position_embedding_type == "none":
        return flags
    flags += [_flag("rotary_percent", model.rotary_percent), _flag("rotary_base", model.rotary_base)]
    if model.mla.multi_latent_attention:  # its own flags say the scaling
        return flags
    scaling = dict(model.rope_scaling or {})
    llama3 = {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    if scaling and {**scaling, **llama3} == scaling:
        flags.append(f"--use-rope-scaling {_flag('rope_scaling_factor', scaling['factor'])}")
    elif scaling:
        flags.append(f"--rope-scaling {shlex.quote(json.dumps(scaling))}")
    return flags


def _expert_training(core: dict[str, Any]) -> list[str]:
    """How the router is trained; Megatron-LM's confs have these values."""
    flags = ["--moe-router-dtype fp32", "--moe-token-dispatcher-type alltoall", "--sequence-parallel"]
    if core.get("moe_router_enable_expert_bias"):
        return [*flags, "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4"]
    return [*flags, "--moe-router-load-balancing-type aux_loss"]


def _flag(name: str, value: Any) -> str:
    """A field as a flag: ("num_moe_experts", 8) -> "--num-experts 8"."""
    spelled = "--num-experts" if name == "num_moe_experts" else "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return spelled if value else "--no-" + spelled[2:]
    if isinstance(value, list | tuple):
        return f"{spelled} {shlex.quote(pattern_text(value))}"
    return f"{spelled} {shlex.quote(value if isinstance(value, str) else _number(value))}"


def _number(value: Any) -> str:
    """1000000.0 -> 1000000, 1e-06 -> 1e-6; every other digit stays."""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else repr(value).replace("e-0", "e-")


def _window_layers(layers: Sequence[bool]) -> str:
    """The shortest way to say which layers have a window: every n-th has not, or a list."""
    for every in range(2, len(layers) + 1):
        if all(windowed == ((layer + 1) % every != 0) for layer, windowed in enumerate(layers)):
            return str(every)
    return shlex.quote(pattern_text([int(windowed) for windowed in layers]))


def pattern_text(values: Sequence[int]) -> str:
    """A list of layers as Megatron writes it: [0, 1, 0, 1] -> "[0,1]*2", [0, 1, 1] -> "[0]*1+[1]*2"."""
    for period in range(1, len(values) // 2 + 1):
        times = len(values) // period
        if len(values) % period == 0 and list(values) == list(values[:period]) * times:
            return f"[{','.join(map(str, values[:period]))}]*{times}"
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return "+".join(f"[{value}]*{times}" for value, times in runs)


def _wrapped(flags: Sequence[str]) -> Iterator[str]:
    """Lines of at most LINE characters; a flag and its value stay together."""
    line = " "
    for flag in flags:
        if len(line) + len(flag) + 1 > LINE and line.strip():
            yield line
            line = " "
        line += f" {flag}"
    if line.strip():
        yield line
