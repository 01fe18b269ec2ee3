"""What `megatron-sft convert`, `export` and `verify` do, as functions of a resolved run. No flags here."""

import dataclasses
import os
import tempfile
from pathlib import Path

from megatron_sft import parallel
from megatron_sft.checkpoint.distributed import save_checkpoint
from megatron_sft.checkpoint.lock import held
from megatron_sft.checkpoint.tracker import RELEASE, is_megatron_checkpoint, iterations
from megatron_sft.config.folders import folder_problems
from megatron_sft.config.run import CheckpointConfig, LoraConfig, RunConfig
from megatron_sft.errors import CheckpointError, ConfigError
from megatron_sft.hf.exporter import save_hf, try_places
from megatron_sft.hf.peft import is_peft_folder, save_peft
from megatron_sft.hf.verify import changed_tensors, first_difference, rounded_tensors
from megatron_sft.hf.weights import require_finite
from megatron_sft.log import logger
from megatron_sft.weights import WeightSource, build, is_adapter, resolve

NOTHING: frozenset[str] = frozenset()


def convert(run: RunConfig, explicit: frozenset[str] = NOTHING) -> None:
    """HF folder, or Megatron checkpoint of any layout -> torch_dist checkpoint in SAVE/release. All ranks call it.

    Args:
        run: checkpoint.load and save, its layout (a checkpoint can be read with any other one), the dtype of the stored
            weights, who imports and whether the result is compared with transformers. data.tokenizer_model may be the HF
            folder that says the architecture where the checkpoint does not (Megatron-LM's).
        explicit: fields of run.model that a flag set.

    Raises:
        UserError: weights that cannot be read, or flags that contradict them; nothing was written.
    """
    load, save = str(run.checkpoint.load), str(run.checkpoint.save)
    _require_no_other_use(save, load)
    run, source = resolve(_anywhere(run), explicit, training=False, like=_like(run))
    if (
        source.is_hf
        and run.train.params_dtype == "bf16"
        and run.checkpoint.importer == "builtin"
        and (count := rounded_tensors(load))
    ):
        logger.warning(
            "%s: %d tensors of more precision are rounded to bf16 (--bf16). --fp32 keeps them as they are.", load, count
        )
    ranks = parallel.initialize(run.parallel, run.train.seed)
    with held(save, ranks, []) as lock:
        chunks = build(run, source, ranks)
        require_finite(chunks, ranks, save)
        saved = RunConfig(run.model, run.parallel, checkpoint=CheckpointConfig(save=save))
        save_checkpoint(save, RELEASE, chunks, None, None, {}, saved, ranks, lock)
    parallel.finalize()
    logger.info("wrote the weights of %s to %s/release", load, save)


def export(run: RunConfig, explicit: frozenset[str] = NOTHING) -> None:
    """Megatron checkpoint -> HF folder, in the dtypes of the folder that it is like, or in bf16; of adapters, PEFT folder,
    or with lora.lora_merge an HF folder that has them in its weights. All ranks call it.

    Args:
        run: checkpoint.load and save_hf, and the layout to read with. data.tokenizer_model may be the HF folder that
            config, tokenizer and dtypes are taken from, and the architecture where the checkpoint does not say it.
        explicit: fields of run.model that a flag set.

    Raises:
        UserError: as convert's.
    """
    load, folder = str(run.checkpoint.load), str(run.checkpoint.save_hf)
    if not is_megatron_checkpoint(load):
        raise CheckpointError(
            f"{load}: no Megatron checkpoint; expected a folder with latest_checkpointed_iteration.txt. Check --load."
        )
    if is_megatron_checkpoint(folder) or Path(load).resolve().is_relative_to(Path(folder).resolve()):
        raise CheckpointError(f"{folder}: holds a Megatron checkpoint; expected a folder for an HF model. Change --save-hf.")
    if problems := folder_problems(run):
        raise ConfigError(problems)
    run, source = resolve(_in_dtype(_anywhere(run), "bf16"), explicit, training=False, like=_like(run))
    if source.base is not None:  # adapters are written as they were trained
        run = _in_dtype(run, source.run_config.get("train", {}).get("params_dtype", "bf16"))
    _write_folder(run, source, folder, _like(run))


def _anywhere(run: RunConfig) -> RunConfig:
    """With the kernels that there are: those that flags name are the training machine's."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, kernels="auto", attention_backend="auto"))


def _in_dtype(run: RunConfig, dtype: str) -> RunConfig:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, params_dtype=dtype))


def merge(run: RunConfig) -> None:
    """Weights and an adapter of them -> HF folder of a plain model. All ranks call it.

    Args:
        run: checkpoint.load and save_hf, lora.lora_load, and the layout to read with.

    Raises:
        UserError: as convert's; the adapter belongs to other weights.
    """
    load, folder = str(run.checkpoint.load), str(run.checkpoint.save_hf)
    if problems := folder_problems(run):
        raise ConfigError(problems)
    like = _like(run) or (load if not is_megatron_checkpoint(load) else None)
    checkpoint = dataclasses.replace(run.checkpoint, verify_conversion=False)
    run = dataclasses.replace(run, lora=dataclasses.replace(run.lora, lora_merge=True), checkpoint=checkpoint)
    run, source = resolve(run, NOTHING, training=False, like=like)
    _write_folder(run, source, folder, like)


def _write_folder(run: RunConfig, source: WeightSource, folder: str, like: str | None) -> None:
    """Builds the model and writes it as an HF folder, or its adapters as a PEFT folder. All ranks call it."""
    ranks = parallel.initialize(run.parallel, run.train.seed)
    try_places([folder], ranks, like)
    chunks = build(run, source, ranks)
    require_finite(chunks, ranks, folder)
    if run.lora.lora_rank and not run.lora.lora_merge:
        save_peft(chunks, run, folder, ranks, source.whole.path)
    else:
        save_hf(chunks, run.model, folder, ranks, like)
    parallel.finalize()
    logger.info("wrote %s to %s", source.path, folder)


def _require_no_other_use(save: str, load: str) -> None:
    """Weights alone beside checkpoints of a training, or in an HF folder, would make both unusable."""
    place = Path(save)
    if place.resolve() == Path(load).resolve():
        found = "--save is --load"
    elif (place / "config.json").exists() or any(place.glob("*.safetensors")):
        found = "is an HF folder"
    elif numbers := iterations(place):
        found = f"holds the checkpoints of a training, up to iteration {numbers[0]}"
    elif (place / "metadata.json").exists():
        found = "is the folder of one checkpoint"
    else:
        return
    raise CheckpointError(f"{save}: {found}; expected another folder, which the weights alone go to. Change --save.")


def _like(run: RunConfig) -> str | None:
    """--tokenizer-model where it was given; without it --load stands there."""
    return run.data.tokenizer_model if run.data.tokenizer_model not in ("", run.checkpoint.load) else None


def verify(hf_folder: str, other: str | None = None, iteration: int | None = None) -> bool:
    """Compares a conversion in memory, a Megatron checkpoint, or the model with adapters, with transformers. One process, fp32.

    Args:
        hf_folder: the whole model.
        other: a checkpoint of all weights; a PEFT folder or a checkpoint of adapters, which PEFT computes on the other side.
        iteration: of the checkpoint; None: its last.

    Returns:
        Whether the logits agree, and without adapters every tensor; what differs is logged, the first layer first.
    """
    adapter = other if other is not None and is_adapter(other) else None
    places = CheckpointConfig(load=hf_folder, verify_conversion=False, ckpt_step=iteration if adapter else None)
    run, source = resolve(RunConfig(checkpoint=places, lora=LoraConfig(lora_load=adapter)), NOTHING, training=False)
    if other is not None and adapter is None:
        source = dataclasses.replace(source, path=other, is_hf=False, iteration=iteration)
    ranks = parallel.initialize(run.parallel, run.train.seed)
    chunks = build(run, source, ranks)
    with tempfile.TemporaryDirectory() as folder:
        if adapter is not None and not is_peft_folder(adapter):
            adapter = os.path.join(folder, "adapter")
            save_peft(chunks, run, adapter, ranks, hf_folder)
        place, difference = first_difference(chunks[0], hf_folder, adapter=adapter)
    logger.info("logits: largest difference from transformers %.1e", difference)
    if place:
        logger.info("first difference: %s", place)
    changed = changed_tensors(chunks, run.model, hf_folder, ranks) if adapter is None else []
    parallel.finalize()
    if adapter is not None:
        return place is None
    for name, ours, theirs, _ in changed:
        logger.info("%s: sha256 %s here, %s in the folder", name, ours, theirs)
    logger.info("tensors: %d differ", len(changed))
    if changed and all(tensor.is_rounded for tensor in changed):
        logger.info(
            "each of them is the folder's, rounded to bf16, as --bf16 has it, which every conf sets: the checkpoint has lost "
            "digits, no value is wrong. convert with --fp32 (MLM_EXTRA_ARGS=--fp32) keeps them."
        )
    return place is None and not changed
