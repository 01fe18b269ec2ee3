"""config.json <-> ModelConfig, and the contradictions between flags and a config.json. No weights here.

A family's keys stand in families.py. What one key alone does not say (windows, MoE routing) is a pair of functions
in derived.py: from config.json's keys to fields, and back.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sft.config.core_fields import RECORD_OF, RECORDS
from megatron_sft.config.fields import kinds
from megatron_sft.config.problems import rope_problems
from megatron_sft.config.run import EFFECTIVE, ModelConfig
from megatron_sft.errors import CheckpointError
from megatron_sft.files import regular, regular_folder
from megatron_sft.hf.conflicts import ARCHITECTURE, PADDING
from megatron_sft.hf.derived import DERIVED, Fields, Keys, KeysError, given, kind_problems
from megatron_sft.hf.families import CONFIG, DEFAULTS, FAMILIES, OTHER_SPELLINGS, Family

KINDS = kinds(ModelConfig) | {f"core.{name}": kind for name, kind in EFFECTIVE.items()}
NULLABLE = ("attn_logit_softcapping", "final_logit_softcapping")
"""Keys whose null says "none" where the family's default is a value."""
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "squared_relu",
    "quick_gelu": "quick_gelu",
}
"""config.json's name -> ours; the first of several names for one thing is the one that is written."""


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """config.json of an HF folder as a dict. Raises CheckpointError when it is missing or no JSON object."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(regular(path).read_text(encoding="utf-8"))
    except OSError as error:
        if path.with_name("adapter_config.json").exists():
            raise CheckpointError(
                f"{folder}: an adapter (LoRA) alone; expected the weights of a whole model. Merge it into its base model "
                "(peft: merge_and_unload, then save_pretrained)."
            ) from None
        raise CheckpointError(
            f"{folder}: no config.json ({error.strerror}); expected a Hugging Face model folder. Check the path, or download "
            "the model."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); expected a model's config.json. Copy it again.") from None
    try:
        regular_folder(Path(folder))  # transformers reads others
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: {error.strerror}; expected only files and folders in a model's folder. Remove it."
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(config).__name__}; expected an object. Copy it again.")
    return config


def text_config(hf: Keys) -> Keys:
    """The keys of the language model: those of `text_config` where the checkpoint is multimodal."""
    nested = hf.get("text_config")
    return nested if isinstance(nested, Mapping) and hf.get("model_type") not in FAMILIES else hf


def family_of(hf: Keys, trust_remote_code: bool = False) -> Family:
    """The entry of names.FAMILIES for this config.json. Raises CheckpointError when there is none."""
    model_type = str(text_config(hf).get("model_type"))
    if hf.get("auto_map") and model_type not in FAMILIES and not trust_remote_code:
        raise CheckpointError(
            f"config.json: auto_map asks to run Python code that came with model_type {model_type!r}; expected a family "
            "that this library knows. If you trust the code, pass --trust-remote-code."
        )
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json: unknown model_type {model_type!r}; expected one of {', '.join(sorted(FAMILIES))}. "
            "Add the family to megatron_sft/hf/families.py, or use --importer modelopt."
        )
    return FAMILIES[model_type]


def check_not_quantised(hf: Keys) -> None:
    """Raises CheckpointError for FP8, INT4, MXFP4 ... weights, which cannot be trained."""
    quantised = hf.get("quantization_config") or text_config(hf).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else "unknown"
        raise CheckpointError(
            f"config.json: quantization_config of method {method!r}; expected bf16, fp16 or fp32 weights. Take the "
            "unquantised checkpoint; MXFP4 (gpt-oss) and FP8 in blocks (DeepSeek) are read with --importer modelopt; others "
            "transformers loads (dequantize=True in the quantisation config) and save_pretrained writes to a new folder."
        )


def _rope(keys: Keys, family: Family) -> Fields:
    """RoPE base, share and scaling from transformers 5's rope_parameters or the older separate keys."""
    parameters = dict(keys.get("rope_parameters") or {})
    parameters = dict(parameters.get("full_attention", parameters))
    scaling = dict(keys.get("rope_scaling") or parameters)
    fallback = {**DEFAULTS, **family.defaults}
    theta = keys.get("rope_theta") or parameters.get("rope_theta") or fallback["rope_theta"]
    share = keys.get("partial_rotary_factor") or parameters.get("partial_rotary_factor")
    kind = scaling.pop("type", None)
    kind = scaling.pop("rope_type", kind) or "default"
    if "short_factor" in scaling:  # Phi-3 has other names for longrope, and its original length beside rope_scaling
        kind = "longrope"
        if keys.get("original_max_position_embeddings"):
            scaling["original_max_position_embeddings"] = keys["original_max_position_embeddings"]
    scaling.pop("rope_theta", None)
    scaling.pop("partial_rotary_factor", None)
    return {
        "rotary_base": float(theta),
        "rotary_percent": float(share or fallback.get("partial_rotary_factor", 1.0)),
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **scaling},
    }


def _rope_keys(model: ModelConfig) -> Fields:
    """RoPE in both spellings: transformers 4 reads the first two, transformers 5 the last."""
    parameters = {"rope_type": "default", **(model.rope_scaling or {}), "rope_theta": model.rotary_base}
    keys: Fields = {
        "rope_theta": model.rotary_base,
        "rope_scaling": dict(model.rope_scaling) if model.rope_scaling else None,
        "rope_parameters": parameters,
    }
    if model.rotary_percent != 1.0:
        keys["partial_rotary_factor"] = parameters["partial_rotary_factor"] = model.rotary_percent
    return keys


def model_config_from_hf(hf: Keys, trust_remote_code: bool = False) -> ModelConfig:
    """Every field of the architecture as config.json gives it.

    Raises:
        CheckpointError: unknown family, quantised weights, or settings of the family that are not supported.
    """
    family, keys = family_of(hf, trust_remote_code), text_config(hf)
    check_not_quantised(hf)
    nulls = {key: None for key in NULLABLE if key in keys and keys[key] is None}
    fallback = {**DEFAULTS, **family.defaults, **nulls}
    problems = [
        f"{key} is {keys[key]!r}; expected {value!r}" for key, value in family.required.items() if keys.get(key, value) != value
    ]
    fields: Fields = dict(family.fixed)
    for name, key in {**CONFIG, **family.config}.items():
        value = keys.get(key, keys.get(OTHER_SPELLINGS.get(key, key)))
        if value is None and key not in fallback:
            problems.append(f"{key} is missing")
        kind = dataclasses.replace(KINDS[name], rule=None) if name == "activation" else KINDS[name]  # ACTIVATIONS has its words
        if value is not None and not kind.has(value):
            problems.append(f"{key} is {value!r}; expected {kind.expected()}")
        fields[name] = fallback.get(key) if value is None else value
    problems = problems or _derived_problems(fields, family, keys, fallback)
    if problems:
        raise CheckpointError(
            f"config.json of model_type {keys['model_type']}: {'; '.join(problems)}. Take a complete config.json of a "
            "model without these settings, or add them to megatron_sft/hf/families.py."
        )
    return _model_config(fields)


def _derived_problems(fields: Fields, family: Family, keys: Keys, fallback: Keys) -> list[str]:
    """Adds to `fields` what several keys say together; what is wrong with it, one sentence each."""
    if problems := kind_problems(given(keys)):
        return problems
    known = {**fallback, **given(keys)}
    for name, read in {"rope": lambda values: _rope(values, family), **{n: DERIVED[n][0] for n in family.derived}}.items():
        try:
            fields.update(read(known if name != "rope" else keys))
        except KeyError as error:
            problems.append(f"{name.replace('_', ' ')} settings: {error} is missing or unknown")
        except KeysError as error:
            problems.append(str(error))
    return problems or rope_problems(fields["rope_scaling"]) + _count_problems(fields)


def _count_problems(fields: Fields) -> list[str]:
    """Counts that do not go together."""
    heads, groups, layers = fields["num_attention_heads"], fields["num_query_groups"], fields["num_layers"]
    experts, chosen = fields.get("core.num_moe_experts"), fields.get("core.moe_router_topk", 0)
    softmax = fields.get("core.moe_router_score_function", "softmax") == "softmax"
    window = fields.get("window_size")
    lists = {"window_layers": "layer_types", "no_rope_freq": "no_rope_layers"}
    wrong = {
        f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}": groups and heads % groups,
        f"sliding_window is {window!r}; expected {KINDS['window_size'].expected()}": not KINDS["window_size"].has(window),
        f"num_experts_per_tok {chosen} of {experts} experts": experts and not 0 < chosen <= experts,
        "num_experts_per_tok 1 with norm_topk_prob: the expert would always count 1; megatron-core refuses it": (
            chosen == 1 and softmax and not fields.get("core.moe_router_pre_softmax")
        ),
        f"num_experts_per_tok {chosen}; expected 1 in this family": chosen > 1 and fields.get("core.moe_apply_probs_on_input"),
    }
    for name, key in lists.items():
        wrong[f"{key} does not name {layers} layers"] = fields.get(name) and len(fields[name]) != layers
    return [sentence for sentence, is_wrong in wrong.items() if is_wrong]


def _model_config(fields: Fields) -> ModelConfig:
    if fields["activation"] not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: activation {fields['activation']!r}; expected one of {', '.join(ACTIVATIONS)}. "
            "Add it to ACTIVATIONS in megatron_sft/hf/config.py and to the model."
        )
    fields["activation"] = ACTIVATIONS[fields["activation"]]
    fields["num_query_groups"] = fields["num_query_groups"] or fields["num_attention_heads"]
    fields["kv_channels"] = fields["kv_channels"] or fields["hidden_size"] // fields["num_attention_heads"]
    core = {name.removeprefix("core."): value for name, value in fields.items() if name.startswith("core.")}
    plain = {name: value for name, value in fields.items() if not name.startswith("core.")}
    return ModelConfig(**plain).with_core(core)


def hf_config_from_model(model: ModelConfig, like: Keys | None) -> dict[str, Any]:
    """config.json of a model.

    Args:
        model: the architecture.
        like: the config.json that the weights came from. Its keys stay; what the model says otherwise is replaced.
            None: the keys are written afresh, for the first family that can express the model.

    Raises:
        CheckpointError: no family of families.py expresses the model.
    """
    if like is not None:
        keys = dict(text_config(like))
        keys.setdefault("architectures", [family_of(like).architecture])
        fresh = _write_keys(model, str(keys["model_type"]))
        before = _write_keys(model_config_from_hf(like), str(keys["model_type"]))
        both = {"rope_theta", "rope_scaling", "rope_parameters", *OTHER_SPELLINGS} - keys.keys()
        keys.update({key: fresh[key] for key in fresh if fresh[key] != before.get(key) or key in both})
        return keys
    for model_type in FAMILIES:
        written = _try_write(model, model_type)
        if written is not None:
            return written
    raise CheckpointError(
        f"no family of families.py expresses this model ({model}). Pass the HF folder that the model came from."
    )


def likely_model_type(model: ModelConfig) -> str:
    """The first family that can express the model, however its experts are balanced. Raises CheckpointError where none can."""
    balanced = model.with_core({"moe_aux_loss_coeff": 0.001}) if model.moe.num_moe_experts else model
    return str(hf_config_from_model(balanced, None)["model_type"])


def _try_write(model: ModelConfig, model_type: str) -> dict[str, Any] | None:
    """config.json of the model as this family writes it, or None when reading it would give another model."""
    try:
        keys = _write_keys(model, model_type)
        again = model_config_from_hf(keys)
    except (KeyError, CheckpointError):
        return None
    return keys if same_architecture(model, again) else None


def same_architecture(model: ModelConfig, hf: ModelConfig) -> bool:
    """Whether config.json says all that the model is; entries of `core` that no family uses are left aside."""
    used = ARCHITECTURE | hf.core.keys()
    mine, theirs = ({name: value for name, value in each.core_fields().items() if name in used and value} for each in (model, hf))
    same = {name: getattr(hf, name) for name in (*PADDING, "core", *RECORDS)}  # the vocabulary's padding is this run's alone
    return mine == theirs and dataclasses.replace(model, **same) == hf


def _write_keys(model: ModelConfig, model_type: str) -> dict[str, Any]:
    family = FAMILIES[model_type]
    activation = next(name for name, ours in ACTIVATIONS.items() if ours == model.activation)
    fields = {**dataclasses.asdict(model), "activation": activation}
    fields.update({f"core.{name}": getattr(getattr(model, record), name) for name, record in RECORD_OF.items()})
    fields.update({f"core.{name}": value for name, value in model.core.items()})
    keys: dict[str, Any] = {"architectures": [family.architecture], "model_type": model_type}
    keys.update({key: fields[name] for name, key in {**CONFIG, **family.config}.items()})
    keys.update(_rope_keys(model) if model.position_embedding_type != "none" else {})
    for name in family.derived:
        keys.update(DERIVED[name][1](model))
    return keys
