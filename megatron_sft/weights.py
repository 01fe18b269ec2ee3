"""Where a run's weights come from, and which architecture they have. Decided before anything is built.

1. --save already holds a checkpoint: the run goes on from it, whatever --load says;
2. --load is a Megatron checkpoint: the run goes on from it, or takes its weights alone with --finetune;
3. --load is an HF folder: its weights are converted.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sft.checkpoint.distributed import latest_iteration, read_run_config
from megatron_sft.checkpoint.tracker import RELEASE, is_megatron_checkpoint
from megatron_sft.config.run import CheckpointConfig, ModelConfig
from megatron_sft.errors import CheckpointError, ConfigError
from megatron_sft.hf.config import family_of, model_config_from_hf, read_hf_config
from megatron_sft.hf.conflicts import conflicts, merged
from megatron_sft.hf.folder import stored_tensors
from megatron_sft.hf.importer import architecture_of
from megatron_sft.hf.weights import LAYER_NUMBER, predicts


@dataclass(frozen=True)
class WeightSource:
    """A folder with weights and what is taken from it."""

    path: str
    is_hf: bool
    resumes: bool
    """Optimizer, rng, iteration and data position are taken too."""
    run_config: Mapping[str, Any]
    """The configuration that the checkpoint was written with; empty for HF folders and Megatron-LM's checkpoints."""


def find_source(checkpoint: CheckpointConfig, trust_remote_code: bool = False) -> WeightSource:
    """Looks at --save and --load.

    Raises:
        ConfigError: there is no --load.
        CheckpointError: --load is neither an HF folder nor a Megatron checkpoint.
    """
    if checkpoint.save and is_megatron_checkpoint(checkpoint.save) and latest_iteration(checkpoint.save) is not None:
        return _megatron_source(checkpoint.save, resumes=True)
    if not checkpoint.load:
        raise ConfigError(
            ["--load is missing: expected an HF folder or a Megatron checkpoint. Set HF_MODEL_CKPT or MLM_MODEL_CKPT."]
        )
    if is_megatron_checkpoint(checkpoint.load):
        return _megatron_source(checkpoint.load, resumes=not checkpoint.finetune)
    if os.path.isfile(os.path.join(checkpoint.load, "config.json")):
        return hf_source(checkpoint.load, checkpoint.importer, trust_remote_code)
    raise CheckpointError(
        f"{checkpoint.load}: neither an HF folder (config.json and *.safetensors) nor a Megatron checkpoint "
        "(latest_checkpointed_iteration.txt). Check the path given to --load."
    )


def _megatron_source(root: str, resumes: bool) -> WeightSource:
    """A release holds weights alone (megatron-sft convert): there is no training to go on with."""
    return WeightSource(root, False, resumes and latest_iteration(root) != RELEASE, read_run_config(root))


def hf_source(folder: str, importer: str = "builtin", trust_remote_code: bool = False) -> WeightSource:
    """The weights of an HF folder, after a look at its config.json and at the files' headers, which costs milliseconds.

    Raises:
        CheckpointError: unknown family; files that are missing, damaged or quantised; another vocabulary, width or number
            of layers than config.json describes.
    """
    source = WeightSource(folder, True, False, {})
    if importer != "builtin":
        return source
    hf = read_hf_config(folder)
    model, family, stored = model_config_from_hf(hf, trust_remote_code), family_of(hf, trust_remote_code), stored_tensors(folder)
    layers = {int(match[1]) for name in stored if (match := LAYER_NUMBER.match(name)) and not predicts(name, stored)}
    name = family.tensors["embedding.word_embeddings.weight"][1]
    faults = []
    if name in stored and stored[name].shape != (model.vocab_size, model.hidden_size):
        faults.append(f"{name} has shape {list(stored[name].shape)}, not {[model.vocab_size, model.hidden_size]}")
    if layers != set(range(model.num_layers)):
        span = f"numbered {min(layers, default=0)} to {max(layers, default=0)}"
        faults.append(f"{len(layers)} layers, {span}, not {model.num_layers}")
    if faults:
        raise CheckpointError(
            f"{folder}: {'; '.join(faults)}; expected what config.json describes. Check that config.json and the weights "
            "belong together, or download the folder again."
        )
    return source


def resolve_model(
    flags: ModelConfig,
    explicit: frozenset[str],
    source: WeightSource,
    tensor_parallel: int,
    trust_remote_code: bool = False,
    importer: str = "builtin",
) -> ModelConfig:
    """The architecture: the checkpoint's, with what the flags add. Without a config.json it is the flags' alone.

    Args:
        flags: the architecture as the flags say it.
        explicit: fields of it that a flag set.
        source: where the weights come from.
        tensor_parallel: pads the vocabulary to a multiple of it.
        trust_remote_code: families that come with their own Python code are read by config.json alone.
        importer: builtin or modelopt; with modelopt an unknown model_type is what the flags say.

    Raises:
        ConfigError: a flag contradicts the checkpoint; all contradictions at once, before any weight is read.
    """
    if source.is_hf:
        model = architecture_of(source.path, flags, importer, trust_remote_code)
    elif "model" in source.run_config:
        model = model_config_from_json(source.run_config["model"])
    else:
        model = flags
    problems = conflicts(flags, explicit, model)
    if problems:
        raise ConfigError([f"{source.path}: {problem}" for problem in problems])
    model = merged(flags, explicit, model)
    return padded(model, tensor_parallel if model.padded_vocab_size else model.make_vocab_size_divisible_by * tensor_parallel)


def padded(model: ModelConfig, multiple: int) -> ModelConfig:
    """The model with its vocabulary rounded up to a multiple: 5 tokens, 4 -> 8 rows; 7 rows of a checkpoint, 2 -> 8."""
    rows = max(model.padded_vocab_size, model.vocab_size)  # the tokenizer may have grown since the conf was written
    rows = -(-rows // multiple) * multiple
    return dataclasses.replace(model, padded_vocab_size=rows, vocab_size=model.vocab_size or rows)


def model_config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig whose dataclasses.asdict went through JSON. Unknown keys are of a later release: an error."""
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise CheckpointError(
            f"run_config.json: unknown model settings {', '.join(unknown)}; expected those of this release. "
            "Use the release of megatron-sft that wrote the checkpoint, or a newer one."
        )
    return ModelConfig(**{**values, "window_layers": tuple(values.get("window_layers", ()))})
