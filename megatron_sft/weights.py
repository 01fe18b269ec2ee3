"""The door from a run to a model with weights, for training, inference and conversion alike:

    resolve   where the weights come from and which architecture they have; no process group, no weights
    build     the model with the weights that it starts from; what changes a model (adapters, frozen parameters) belongs
              at its end, before the optimizer is built and a checkpoint's states are restored
    restore   all that a run goes on from

The weights are, in this order:
1. those of --save, if it holds a checkpoint already: the run goes on from it, whatever --load says;
2. those of --load, a Megatron checkpoint: the run goes on from it, or takes its weights alone with --finetune;
3. those of --load, an HF folder: they are converted.

Where one of these is an adapter (a checkpoint of a run with --lora-rank, a PEFT folder), the weights that it belongs to are
those of --load, or what it was trained on. --lora-load names an adapter beside --load.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sft.checkpoint.background import torch_optimizers
from megatron_sft.checkpoint.distributed import latest_iteration, load_checkpoint, read_run_config
from megatron_sft.checkpoint.resume import other_states
from megatron_sft.checkpoint.tracker import RELEASE, is_megatron_checkpoint
from megatron_sft.config.fields import flag_of, shown
from megatron_sft.config.problems import problems
from megatron_sft.config.run import BASE_IDENTITY, LoraConfig, ModelConfig, RunConfig, model_config_from_json
from megatron_sft.environment import process_environment
from megatron_sft.errors import CheckpointError, ConfigError
from megatron_sft.hf.adapters import attach, fingerprint, freeze
from megatron_sft.hf.config import family_of, model_config_from_hf, read_hf_config, text_config
from megatron_sft.hf.conflicts import conflicts, merged
from megatron_sft.hf.families import FAMILIES
from megatron_sft.hf.folder import stored_tensors
from megatron_sft.hf.importer import architecture_of, load_weights
from megatron_sft.hf.peft import is_peft_folder, load_peft, read_settings, refuse_unreadable
from megatron_sft.hf.verify import quick_check
from megatron_sft.hf.weights import LAYER_NUMBER, predicts
from megatron_sft.log import logger
from megatron_sft.model.build import SFTModel, build_model, transformer_config
from megatron_sft.model.lora import adapters_of
from megatron_sft.parallel import Ranks, agree, gather

SAME_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
"""Of a config.json that belongs to a model; how it is trained may differ."""


@dataclass(frozen=True)
class WeightSource:
    """A folder with weights and what is taken from it."""

    path: str
    is_hf: bool
    resumes: bool
    """Optimizer, rng, iteration and data position are taken too."""
    run_config: Mapping[str, Any]
    """The configuration that the checkpoint was written with; empty for HF folders and Megatron-LM's checkpoints."""
    iteration: int | None = None
    """Which checkpoint of the folder (--ckpt-step); None: the newest that is whole."""
    base: "WeightSource | None" = None
    """Of the weights that an adapter at `path` belongs to; None: `path` has all weights."""

    @property
    def whole(self) -> "WeightSource":
        """Where the weights beside adapters are."""
        return self.base or self

    @property
    def base_weights(self) -> str:
        """Fingerprint of the weights that the adapter belongs to, where it says it."""
        return str(self.run_config.get(BASE_IDENTITY) or "") if self.base else ""


def resolve(
    run: RunConfig, explicit: frozenset[str], training: bool = True, like: str | None = None
) -> tuple[RunConfig, WeightSource]:
    """The run with the architecture that its weights have, checked against its layout, and where they are.

    Args:
        run: as the flags say it.
        explicit: fields of run.model that a flag set; they must not contradict the checkpoint.
        training: False takes weights alone, and never those of --save.
        like: HF folder that says the architecture of a Megatron checkpoint that does not (Megatron-LM's).

    Raises:
        ConfigError: flags that contradict the checkpoint, or do not fit together; all of a kind at once.
        CheckpointError: --load is neither an HF folder nor a Megatron checkpoint, or does not say its architecture.
    """
    source = find_source(run, training)
    run = dataclasses.replace(
        run, model=resolve_model(run, explicit, source.whole, like), lora=adapter_settings(run, explicit, source)
    )
    wrong = problems(run, process_environment()[1], training) + (_warm_start_problems(run, source) if training else [])
    if wrong:
        raise ConfigError(wrong)
    transformer_config(run.model, run.parallel, run.train)  # what only megatron-core refuses, before a row is read
    return run, source


def _warm_start_problems(run: RunConfig, source: WeightSource) -> list[str]:
    """Why --load-optimizer cannot take the optimizer's states of a source that the run does not resume from."""
    if source.resumes or not run.checkpoint.load_optimizer:
        return []
    path = source.path
    if not is_megatron_checkpoint(path):
        return [
            f"--load-optimizer 1: {path} is {'an HF' if source.is_hf else 'a PEFT'} folder, which holds no optimizer states. "
            "Expected a Megatron checkpoint as --load. Leave it out."
        ]
    others = other_states(source.run_config, run)
    return [f"--load-optimizer 1: {path} has other states: {line}. Expected the same. Leave it out." for line in others]


def build(run: RunConfig, source: WeightSource, ranks: Ranks) -> list[SFTModel]:
    """Collective: this rank's chunks with the weights that the run starts from; a run that resumes gets them in `restore`.

    Args:
        run: and its
        source: as resolve gave them.
        ranks: of this process.

    Raises:
        CheckpointError: on every rank, when the weights are not this model's or do not compute what transformers computes.
    """
    chunks, whole = build_model(run.model, run.parallel, run.train), source.whole
    if run.lora.lora_rank or run.train.freeze or run.train.train_only:  # what goes by Hugging Face's names
        model_type = agree(lambda: base_model_type(run, source))
        for chunk in chunks:
            chunk.hf_model_type = model_type
    if whole.is_hf:
        load_weights(chunks, run, whole.path, ranks)
        logger.info("converted the HF weights of %s", whole.path)
        if run.checkpoint.verify_conversion:
            quick_check(chunks, run.model, whole.path, ranks)
    elif not whole.resumes:
        verify = run.checkpoint.verify_integrity
        load_checkpoint(whole.path, chunks, None, None, ranks, whole.iteration, weights_only=True, verify=verify)
    if run.lora.lora_rank:
        _add_adapters(chunks, run, source, ranks)
    freeze(chunks, run, ranks)
    return chunks


def _add_adapters(chunks: list[SFTModel], run: RunConfig, source: WeightSource, ranks: Ranks) -> None:
    """Adapters at the end of build: fresh ones, or those of the source where the run does not resume from it."""
    own, said = fingerprint(chunks, run.model, ranks), source.base_weights
    attach(chunks, run, ranks)
    if run.checkpoint.save_hf and not run.lora.lora_merge:
        refuse_unreadable(chunks, run, ranks)
    for chunk in chunks:
        chunk.base_weights = own
    if source.base and is_peft_folder(source.path):
        said = load_peft(chunks, source.path, ranks)
    elif source.base and not source.resumes:
        load_checkpoint(
            source.path, chunks, None, None, ranks, source.iteration, weights_only=True, verify=run.checkpoint.verify_integrity
        )
    if said not in ("", own):
        raise CheckpointError(
            f"{source.path}: its adapter was trained on other weights ({_short(said)}) than those of {source.whole.path} "
            f"({_short(own)}); expected the same. Pass the model that it was trained on as --load."
        )
    trained = sum(
        parameter.numel() for chunk in chunks for adapter in adapters_of(chunk).values() for parameter in adapter.parameters()
    )
    every = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    logger.info("adapters: rank %d, %d of %d parameters of this rank are trained", run.lora.lora_rank, trained, every)


def _short(fingerprint: str) -> str:
    model_type, _, digest = fingerprint.rpartition(":")
    return f"{model_type} sha256 {digest[:12]}".strip()


def base_model_type(run: RunConfig, source: WeightSource) -> str:
    """model_type of the weights' config.json, "" where there is none.

    It is what the adapter was trained as, else that of the first folder with a config.json of this architecture: the
    weights', --load, what the checkpoint was trained from, --tokenizer-model.
    """
    trained_as = source.base_weights.rpartition(":")[0]
    if trained_as in FAMILIES:
        return trained_as
    saved = source.run_config.get("checkpoint", {}).get("load")
    return model_type_of(run, (source.whole.path, run.checkpoint.load, saved, run.data.tokenizer_model))


def model_type_of(run: RunConfig, folders: Iterable[str | None]) -> str:
    """model_type of the first of some folders whose config.json has run.model's sizes; "" where none has."""
    for folder in folders:
        if folder and os.path.isfile(os.path.join(folder, "config.json")):
            try:
                hf = read_hf_config(folder)
                model = model_config_from_hf(hf, run.data.trust_remote_code)
            except CheckpointError:
                continue
            if all(getattr(model, name) == getattr(run.model, name) for name in SAME_SIZES):
                return str(text_config(hf)["model_type"])
    return ""


def restore(run: RunConfig, source: WeightSource, ranks: Ranks, chunks: list[Any], optimizer: Any) -> dict[str, Any]:
    """Collective: puts a checkpoint's weights, optimizer states and random states in their places.

    Args:
        run: and its
        source: as resolve gave them.
        ranks: of this process.
        chunks: build's, wrapped or not.
        optimizer: megatron-core's, over `chunks`.

    Returns:
        What was saved as the run's state, which the schedule's place follows from; {} for a run that does not resume.

    Raises:
        CheckpointError: no usable checkpoint, or one of another model.
    """
    wanted = run.checkpoint
    if not source.resumes and wanted.load_optimizer:
        verify, iteration = wanted.verify_integrity, source.iteration
        load_checkpoint(source.path, chunks, optimizer, None, ranks, iteration, load_rng=False, verify=verify)
        if not any(gather(any(part.state for part in torch_optimizers(optimizer)))):
            logger.warning("%s holds no optimizer states: --load-optimizer 1 starts with fresh ones.", source.path)
    if not source.resumes:
        return {}
    loaded = optimizer if wanted.load_optim else None
    rng, verify = wanted.load_rng, wanted.verify_integrity
    state = load_checkpoint(source.path, chunks, loaded, None, ranks, source.iteration, load_rng=rng, verify=verify)
    if loaded is None:
        optimizer.reload_model_params()  # its fp32 weights are those that the model was built with
    return state


def find_source(run: RunConfig, training: bool = True) -> WeightSource:
    """Looks at --save, --load and --lora-load.

    Args:
        run: its `checkpoint`, `lora`, and what it says of HF folders.
        training: False looks at --load alone, and takes its weights alone.

    Raises:
        ConfigError: there is no --load, or --lora-load is no adapter.
        CheckpointError: --load is neither an HF folder nor a Megatron checkpoint, or has none of --ckpt-step.
    """
    save, load, step, adapter = run.checkpoint.save, run.checkpoint.load, run.checkpoint.ckpt_step, run.lora.lora_load
    if training and save and is_megatron_checkpoint(save) and latest_iteration(save) is not None:
        is_load = bool(load) and os.path.realpath(str(load)) == os.path.realpath(save)
        if step is not None and not is_load:
            logger.info("--ckpt-step %d has no effect: it is about --load, and the run goes on from --save %s.", step, save)
        return _with_base(run, _megatron_source(save, True, step if is_load else None), load)
    if not load and adapter is None:
        raise ConfigError(
            ["--load is missing: expected an HF folder or a Megatron checkpoint. Set HF_MODEL_CKPT or MLM_MODEL_CKPT."]
        )
    resumes = training and not run.checkpoint.finetune and adapter is None
    source = _place(run, str(adapter or load), resumes, step)
    if adapter is not None and not _is_adapter(source):
        raise ConfigError([f"--lora-load {adapter}: no adapter. Expected a PEFT folder, or a checkpoint of a LoRA run."])
    return _with_base(run, source, load if adapter is not None else None)


def _place(run: RunConfig, path: str, resumes: bool = False, step: int | None = None) -> WeightSource:
    """What is at a path: a Megatron checkpoint, a PEFT folder or an HF folder."""
    if is_megatron_checkpoint(path):
        return _megatron_source(path, resumes, step)
    if step is not None:
        raise ConfigError([f"--ckpt-step {step}: {path} has no checkpoints; expected a Megatron checkpoint. Leave it out."])
    if is_peft_folder(path):
        settings, base = read_settings(path)
        return WeightSource(path, False, False, {"lora": settings, "checkpoint": {"load": base}})
    if os.path.isfile(os.path.join(path, "config.json")):
        return hf_source(run, path)
    raise CheckpointError(
        f"{path}: neither an HF folder (config.json and *.safetensors) nor a Megatron checkpoint "
        "(latest_checkpointed_iteration.txt). Check the path given to --load."
    )


def is_adapter(path: str) -> bool:
    """Whether a PEFT folder or a checkpoint of adapters is at a path; raises CheckpointError where nothing usable is."""
    return _is_adapter(_place(RunConfig(), path))


def _is_adapter(source: WeightSource) -> bool:
    return bool(source.run_config.get("lora", {}).get("lora_rank"))


def _with_base(run: RunConfig, source: WeightSource, load: str | None) -> WeightSource:
    """The source; of an adapter, with that of the weights which it belongs to: --load's, or what it was trained on."""
    if not _is_adapter(source):
        return source
    if load is None or os.path.realpath(load) == os.path.realpath(source.path):
        load = source.run_config.get("checkpoint", {}).get("load")
    if not load or not os.path.isdir(load):
        raise CheckpointError(
            f"{source.path}: an adapter alone, trained on {load or 'weights that it does not name'}, which is not there; "
            f"expected the whole model too. Pass its folder as --load, and --lora-load {source.path}."
        )
    base = _place(run, load)
    if _is_adapter(base):
        raise CheckpointError(f"{load}: an adapter alone; expected the whole model that {source.path} belongs to. Change --load.")
    return dataclasses.replace(source, base=base)


def adapter_settings(run: RunConfig, explicit: frozenset[str], source: WeightSource) -> LoraConfig:
    """What an adapter says of itself, where the source is one; a flag may say the same, dropout and merging also other things.

    Raises:
        ConfigError: a flag contradicts the adapter; all of them at once.
    """
    if source.base is None:
        return run.lora
    saved = source.run_config["lora"]
    values: dict[str, Any] = {}
    problems = []
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_type"):
        value = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
        given = getattr(run.lora, name)
        if name not in explicit:
            values[name] = value
        elif given != value and name != "lora_dropout" and not source.resumes:
            problems.append(f"{flag_of(name)} {shown(given)}: {source.path} has {shown(value)}. Leave the flag out.")
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(run.lora, **values)


def _megatron_source(root: str, resumes: bool, iteration: int | None) -> WeightSource:
    """A release holds weights alone (megatron-sft convert): there is no training to go on with."""
    resumes = resumes and latest_iteration(root, iteration) != RELEASE
    return WeightSource(root, False, resumes, read_run_config(root, iteration), iteration)


def hf_source(run: RunConfig, folder: str) -> WeightSource:
    """The weights of an HF folder, after a look at its config.json and at the files' headers, which costs milliseconds.

    Raises:
        CheckpointError: unknown family; files that are missing, damaged or quantised; another vocabulary, width or number
            of layers than config.json describes.
    """
    source, remote = WeightSource(folder, True, False, {}), run.data.trust_remote_code
    if run.checkpoint.importer != "builtin":
        return source
    hf = read_hf_config(folder)
    model, family, stored = model_config_from_hf(hf, remote), family_of(hf, remote), stored_tensors(folder)
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


def resolve_model(run: RunConfig, explicit: frozenset[str], source: WeightSource, like: str | None = None) -> ModelConfig:
    """The architecture: the checkpoint's, with what the flags add. Without a config.json it is the flags' alone.

    Args:
        run: its `model` is the architecture as the flags say it; tensor parallelism pads the vocabulary.
        explicit: fields of it that a flag set.
        source: where the weights come from.
        like: as resolve's.

    Raises:
        ConfigError: a flag contradicts the checkpoint; all contradictions at once, before any weight is read.
        CheckpointError: neither it nor the flags say the architecture.
    """
    place = source.path
    if source.is_hf:
        model = architecture_of(place, run)
    elif "model" in source.run_config:
        model = model_config_from_json(source.run_config["model"])
    elif like is not None:
        place, model = like, architecture_of(like, run)
    elif "num_layers" in explicit:
        model = run.model
    else:
        raise CheckpointError(
            f"{place}: does not say which architecture it has; expected run_config.json with it. Pass the flags of its conf, "
            "or to convert and export the HF folder that the model came from (--tokenizer-model)."
        )
    if problems := conflicts(run.model, explicit, model):
        raise ConfigError([f"{place}: {problem}" for problem in problems])
    model, size = merged(run.model, explicit, model), run.parallel.tensor_model_parallel_size
    return padded(model, size if model.padded_vocab_size else model.make_vocab_size_divisible_by * size)


def padded(model: ModelConfig, multiple: int) -> ModelConfig:
    """The model with its vocabulary rounded up to a multiple: 5 tokens, 4 -> 8 rows; 7 rows of a checkpoint, 2 -> 8."""
    rows = max(model.padded_vocab_size, model.vocab_size)  # the tokenizer may have grown since the conf was written
    rows = -(-rows // multiple) * multiple
    return dataclasses.replace(model, padded_vocab_size=rows, vocab_size=model.vocab_size or rows)
