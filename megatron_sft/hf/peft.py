"""Folders of an adapter, as PEFT writes and reads them.

    adapter_config.json          rank, alpha, kind, modules, the base model's place
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight [rank, in], .lora_B.weight [out, rank] ...

Names are cut to layers.NUMBER...: transformers 5 renames what stands before it in some families (nemotron_h).
Experts have a module each, though transformers 5 keeps them in one tensor: PEFT 0.21 puts them there itself. It takes
rsLoRA's scale of gate and up twice then, so that rsLoRA is written as LoRA with the alpha that gives the same scale.
What PEFT would read otherwise, or not at all, is refused before training (refuse_unreadable).
Not here: which weights have adapters (adapters.py), what they compute (model/lora.py).
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_sft.config.run import BASE_IDENTITY, LoraConfig, ModelConfig, RunConfig
from megatron_sft.errors import CheckpointError, ConfigError
from megatron_sft.files import regular
from megatron_sft.hf.adapters import ENDS, adaptable, adapter_shards, family_for, model_type_for
from megatron_sft.hf.exporter import write_tensors
from megatron_sft.hf.folder import DTYPES, TensorWriter, open_file
from megatron_sft.hf.layout import read_shard
from megatron_sft.hf.weights import core_module
from megatron_sft.model.lora import can_adapt
from megatron_sft.parallel import Ranks, agree, gather

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ADVICE = "Expected a LoRA adapter of linear layers alone, as PEFT writes it. Check --lora-load, or merge it with PEFT."
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "target_parameters": (None, []),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "exclude_modules": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None,),
    "alora_invocation_tokens": (None,),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""Settings of adapter_config.json that must have one of these values, where they are there. PEFT changes the base's weights for
pissa, olora, corda, loftq and lora_ga whenever it loads the folder: on the base as it stands the adapter is another model."""
KINDS: Mapping[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float, type(None)),
    "use_dora": (bool, type(None)),
    "use_rslora": (bool, type(None)),
    "target_modules": (str, list),
}
"""What the settings are that count here; a bool is no int."""
UNREAD = frozenset(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode megatron_core layers_pattern "
    "loftq_config eva_config corda_config lora_ga_config velora_config runtime_config ensure_weight_tying".split()
)
"""Settings without effect on what an adapter computes. Others that nobody here knows may be numbers: sizes of what is off."""


EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of an expert's module."""
FUSED_EXPERTS = frozenset({"qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3"})
"""Families whose experts are one tensor in transformers 5, to which PEFT 0.21 moves every target with an expert's last name."""
GATED = ({"gate_proj", "up_proj"}, {"w1", "w3"})
"""Last names of two modules of an expert that are one tensor there."""


def is_peft_folder(path: str | Path) -> bool:
    """A folder with an adapter as PEFT writes it."""
    return (Path(path) / CONFIG_FILE).is_file()


def read_settings(folder: str | Path) -> tuple[dict[str, Any], str]:
    """(fields of LoraConfig, the base model's place or "") of a PEFT folder.

    Raises:
        CheckpointError: it is damaged, or an adapter of another kind.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(regular(path).read_text(encoding="utf-8"))
        faults = [name for name, values in PLAIN.items() if config.get(name, values[0]) not in values]
        faults += [name for name, kinds in KINDS.items() if type(config.get(name)) not in kinds]
        unknown = config.keys() - PLAIN.keys() - KINDS.keys() - UNREAD
        faults += sorted(name for name in unknown if config[name] and type(config[name]) not in (int, float))
        if faults:
            raise CheckpointError(f"{path}: {', '.join(f'{name} is {config.get(name)!r}' for name in faults)}. {ADVICE}")
        targets = config["target_modules"]
        settings: dict[str, Any] = {
            "lora_rank": int(config["r"]),
            "lora_alpha": float(config["lora_alpha"]),
            "lora_dropout": float(config.get("lora_dropout") or 0.0),
            "lora_target_modules": (targets,) if isinstance(targets, str) else tuple(sorted(map(str, targets))),
            "lora_type": "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora",
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}). {ADVICE}") from None
    if config.get("use_dora") and config.get("use_rslora"):
        raise CheckpointError(f"{path}: use_rslora with use_dora. {ADVICE}")
    return settings, str(config.get("base_model_name_or_path") or "")


def load_peft(chunks: Sequence[nn.Module], folder: str | Path, ranks: Ranks) -> str:
    """Fills the adapters from a PEFT folder. Collective.

    Args:
        chunks: with the adapters that read_settings says.
        folder: PEFT folder.
        ranks: of this process.

    Returns:
        The fingerprint of the weights that it was trained on; "" where the folder does not say it.

    Raises:
        CheckpointError: on every rank: other tensors or shapes than the adapters have; before anything is copied.
    """
    path = Path(folder) / WEIGHTS_FILE
    held = list(adapter_shards(chunks, PREFIX))
    own = {name for item in held for name in item.sources}
    wanted = {name: shape for item in held for name, shape in zip(item.sources, item.placement.shapes, strict=True)}
    for other in gather(wanted):
        wanted |= other

    def read() -> str:
        with open_file(path) as file:
            stored = {name: file.get_slice(name) for name in file.keys()}
            faults = [f"{name} is missing" for name in sorted(wanted.keys() - stored.keys())]
            faults += [f"{name} belongs to no adapter" for name in sorted(stored.keys() - wanted.keys())]
            for name in wanted.keys() & stored.keys():
                shape, dtype = tuple(stored[name].get_shape()), stored[name].get_dtype()
                if shape != wanted[name] or dtype not in DTYPES:
                    faults.append(f"{name} is {dtype} {list(shape)}, not {list(wanted[name])}")
                elif name in own and not torch.isfinite(file.get_tensor(name)).all():
                    faults.append(f"{name} has NaN or Inf")
            if faults:
                more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
                raise CheckpointError(f"{path}: {'; '.join(faults[:4])}{more}. {ADVICE}")
            with torch.no_grad():
                for item in held:
                    read_shard(item.placement, item.local, {n: file.get_tensor(name) for n, name in enumerate(item.sources)})
            return str((file.metadata() or {}).get(BASE_IDENTITY, ""))

    return agree(read)


def save_peft(chunks: Sequence[nn.Module], run: RunConfig, folder: str | Path, ranks: Ranks, trained_on: str = "") -> None:
    """Writes a PEFT folder. All ranks call it; rank 0 writes.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        run: its `lora` and `model`.
        folder: new folder; a PEFT folder there is replaced when the new one is complete.
        ranks: of this process.
        trained_on: the place of the base model; "": --load's.

    Raises:
        SavingError: on every rank when the folder cannot be written; what was there is untouched.
    """
    base = core_module(chunks[0]).base_weights
    every, own = _modules(chunks, run.model, ranks)
    is_fused = any(map(EXPERT.search, own)) and agree(lambda: model_type_for(chunks, run.model)) in FUSED_EXPERTS
    lora = dataclasses.replace(run.lora, lora_dropout=0.0) if is_fused else run.lora  # PEFT refuses any other there
    held = {(item.name, item.part): item for item in adapter_shards(chunks, PREFIX)}

    def write(temporary: Path, announced: Any) -> TensorWriter:
        text = json.dumps(_config(lora, _target_modules(every, own), trained_on or str(run.checkpoint.load or "")), indent=2)
        (temporary / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        return TensorWriter(temporary, announced, WEIGHTS_FILE, {BASE_IDENTITY: base} if base else {})

    write_tensors(Path(folder), held, ranks, run.data.tokenizer_model, write)


def _modules(chunks: Sequence[nn.Module], model: ModelConfig, ranks: Ranks) -> tuple[set[str], set[str]]:
    """Names of all modules that could have an adapter, and of those that have one. Collective."""
    family = agree(lambda: family_for(chunks, model))
    every = {
        name
        for chunk in chunks
        for held, base, names in adaptable(chunk, model, family, ranks)
        for name in names
        if can_adapt(base) or held.local_name in ENDS
    }
    own = {source.split(".lora_")[0] for item in adapter_shards(chunks) for source in item.sources}
    every, own = (set().union(*parts) for parts in zip(*gather((every, own)), strict=True))
    return every, own


def _target_modules(every: set[str], own: set[str]) -> list[str]:
    """Last parts of the names in `own`; the names from layers.NUMBER on where that would mean others of `every` too."""
    last = {name.rpartition(".")[2] for name in own}
    is_enough = {name for name in every if name.rpartition(".")[2] in last} == own
    return sorted(last if is_enough else {name[max(0, name.find("layers.")) :] for name in own})


def refuse_unreadable(chunks: Sequence[nn.Module], run: RunConfig, ranks: Ranks) -> None:
    """Before training: adapters that PEFT would put elsewhere, or refuse. Collective.

    Raises:
        ConfigError: on every rank, with all that is wrong.
    """
    every, own = _modules(chunks, run.model, ranks)
    model_type = agree(lambda: model_type_for(chunks, run.model))
    problems = [
        f"--save-hf with --lora-target-modules {' '.join(run.lora.lora_target_modules)}: {text} in {model_type} models. "
        "Expected adapters that PEFT can load. Add --lora-merge, leave out --save-hf, or name other modules."
        for text in unreadable(model_type, every, own, run.lora.lora_type)
    ]
    if problems:
        raise ConfigError(problems)


def unreadable(model_type: str, every: set[str], own: set[str], lora_type: str) -> list[str]:
    """What PEFT 0.21 makes of the adapters of `own`, of the modules `every`, otherwise than here; one clause each."""
    last = {name: name.rpartition(".")[2] for name in every}
    experts = {name for name in every if EXPERT.search(name)}
    routed, shared_names = own & experts, {last[name] for name in experts}
    reasons = []
    if model_type == "nemotron_h":
        reasons += ["PEFT refuses adapters of out_proj"] if "out_proj" in {last[name] for name in own} else []
        reasons += ["PEFT does not find experts' adapters"] if routed else []
    if model_type in FUSED_EXPERTS:
        chosen = {last[name] for name in routed}
        if others := sorted(name for name in own - experts if last[name] in shared_names):
            reasons.append(f"PEFT puts adapters of {others[0]} and its like on experts alone")
        if routed != {name for name in experts if last[name] in chosen} or any(len(pair & chosen) == 1 for pair in GATED):
            reasons.append("PEFT has no adapters of some experts without the others, or of gate without up,")
        reasons += ["PEFT has no DoRA of experts"] if routed and lora_type == "dora" else []
    return reasons


def _config(lora: LoraConfig, targets: list[str], base: str) -> dict[str, Any]:
    alpha = lora.scale * lora.lora_rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": targets,
        "use_dora": lora.lora_type == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
