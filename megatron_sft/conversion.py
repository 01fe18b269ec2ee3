"""What `megatron-sft convert`, `export`, `verify` and `conf` do, as functions of resolved values. No flags here."""

from pathlib import Path
from typing import Any

import torch

from megatron_sft import parallel
from megatron_sft.checkpoint.distributed import load_checkpoint, read_run_config, save_checkpoint
from megatron_sft.checkpoint.tracker import is_megatron_checkpoint
from megatron_sft.config.run import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sft.errors import CheckpointError
from megatron_sft.hf.conf import conf_text
from megatron_sft.hf.config import model_config_from_hf, read_hf_config
from megatron_sft.hf.importer import load_weights
from megatron_sft.hf.verify import changed_tensors, first_difference, quick_check
from megatron_sft.hf.weights import load_hf_weights, save_hf
from megatron_sft.log import logger
from megatron_sft.model.build import build_model
from megatron_sft.parallel import Ranks
from megatron_sft.weights import WeightSource, hf_source, padded, resolve_model

SEED = 1234
Described = tuple[ModelConfig, frozenset[str]]
"""A model as flags describe it, and the fields that a flag set."""
NOT_DESCRIBED: Described = (ModelConfig(), frozenset())


def built(model: ModelConfig, layout: ParallelConfig, dtype: str) -> tuple[list[Any], Ranks]:
    """Joins the other processes and builds this rank's chunks; dtype is fp32 or bf16."""
    ranks = parallel.initialize(layout, SEED)
    return build_model(model, layout, TrainConfig(params_dtype=dtype)), ranks


def convert(
    hf_folder: str | Path,
    save: str | Path,
    layout: ParallelConfig,
    dtype: str = "bf16",
    verify: bool = True,
    importer: str = "builtin",
    described: Described = NOT_DESCRIBED,
    trust_remote_code: bool = False,
) -> None:
    """HF folder -> torch_dist checkpoint in SAVE/release. All ranks call it.

    Args:
        hf_folder: where the weights are.
        save: root of the new checkpoint.
        layout: how the model is cut while it is written; a checkpoint can be read with any other layout.
        dtype: bf16 or fp32, of the stored weights.
        verify: compare with transformers before writing.
        importer: builtin or modelopt.
        described: must not contradict config.json; the whole architecture for a model_type that only modelopt reads.
        trust_remote_code: modelopt may run Python code that came with the model.
    """
    source = hf_source(str(hf_folder), importer, trust_remote_code)
    model = resolve_model(*described, source, layout.tensor_model_parallel_size, trust_remote_code, importer)
    chunks, ranks = built(model, layout, dtype)
    load_weights(chunks, model, hf_folder, ranks, importer, trust_remote_code)
    if verify:
        quick_check(chunks, model, hf_folder, ranks)
    _save_release(save, chunks, model, layout, ranks)
    logger.info("converted %s to %s/release", hf_folder, save)


def reshard(
    load: str | Path,
    save: str | Path,
    layout: ParallelConfig,
    hf_folder: str | Path | None,
    dtype: str = "bf16",
    described: Described = NOT_DESCRIBED,
) -> None:
    """The weights of a Megatron checkpoint in any layout -> SAVE/release. All ranks call it.

    Args:
        load: root of the checkpoint.
        save: root of the new one.
        layout: how the model is cut while it is read and written.
        hf_folder: says the architecture where the checkpoint does not (Megatron-LM's).
        dtype: bf16 or fp32, of the stored weights.
        described: must not contradict the checkpoint; the whole architecture where neither it nor hf_folder says one.
    """
    if Path(load).resolve() == Path(save).resolve():
        raise CheckpointError(f"{save}: --save is --load; expected another folder, which the weights alone go to. Change --save.")
    model = _architecture(load, hf_folder, described, layout)
    chunks, ranks = built(model, layout, dtype)
    load_checkpoint(load, chunks, None, None, ranks, weights_only=True)
    _save_release(save, chunks, model, layout, ranks)
    logger.info("wrote the weights of %s to %s/release", load, save)


def _save_release(save: str | Path, chunks: list[Any], model: ModelConfig, layout: ParallelConfig, ranks: Ranks) -> None:
    run = RunConfig(model, layout, checkpoint=CheckpointConfig(save=str(save)))
    save_checkpoint(save, "release", chunks, None, None, {}, run, ranks)
    parallel.finalize()


def export(
    load: str | Path,
    save_folder: str | Path,
    layout: ParallelConfig,
    hf_folder: str | Path | None,
    dtype: str | None = None,
    described: Described = NOT_DESCRIBED,
) -> None:
    """Megatron checkpoint -> HF folder. All ranks call it.

    Args:
        load: root of the checkpoint.
        save_folder: the new HF folder.
        layout: how the model is cut while it is read.
        hf_folder: HF folder that config, tokenizer and dtypes are taken from; also the architecture, when the
            checkpoint does not say it (Megatron-LM's do not).
        dtype: bf16 or fp32; None: that of hf_folder, without one bf16.
        described: as reshard's.
    """
    model = _architecture(load, hf_folder, described, layout)
    chunks, ranks = built(model, layout, dtype or "bf16")
    load_checkpoint(load, chunks, None, None, ranks)
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype] if dtype else None
    save_hf(chunks, model, save_folder, ranks, hf_folder, stored)
    parallel.finalize()
    logger.info("exported %s to %s", load, save_folder)


def _architecture(root: str | Path, hf_folder: str | Path | None, described: Described, layout: ParallelConfig) -> ModelConfig:
    if not is_megatron_checkpoint(root):
        raise CheckpointError(
            f"{root}: no Megatron checkpoint; expected a folder with latest_checkpointed_iteration.txt. Check --load."
        )
    source = WeightSource(str(root), False, False, read_run_config(root))
    if "model" not in source.run_config and hf_folder is not None:
        source = WeightSource(str(hf_folder), True, False, {})
    elif "model" not in source.run_config and "num_layers" not in described[1]:
        raise CheckpointError(
            f"{root}: does not say which architecture it has; expected run_config.json with it. Pass the HF folder "
            "that the model came from (--tokenizer-model), or the flags of its conf."
        )
    return resolve_model(*described, source, layout.tensor_model_parallel_size)


def verify(hf_folder: str | Path, megatron_checkpoint: str | Path | None = None) -> bool:
    """Compares a Megatron checkpoint, or a conversion in memory, with the HF folder. One process, fp32.

    Returns:
        Whether logits and every tensor agree; what differs is logged, the first layer first.
    """
    hf_source(str(hf_folder))
    model = padded(model_config_from_hf(read_hf_config(hf_folder)), 1)
    chunks, ranks = built(model, ParallelConfig(), "fp32")
    if megatron_checkpoint is None:
        load_hf_weights(chunks, model, hf_folder, ranks)
    else:
        load_checkpoint(megatron_checkpoint, chunks, None, None, ranks)
    place, difference = first_difference(chunks[0], hf_folder)
    logger.info("logits: largest difference from transformers %.1e", difference)
    if place:
        logger.info("first difference: %s", place)
    changed = changed_tensors(chunks, model, hf_folder, ranks)
    parallel.finalize()
    for name, ours, theirs in changed:
        logger.info("%s: sha256 %s here, %s in the folder", name, ours, theirs)
    logger.info("tensors: %d differ", len(changed))
    return place is None and not changed


def conf(hf_folder: str | Path) -> str:
    """The text of a conf/<org>/<model>.sh with the values of an HF folder's config.json."""
    return conf_text(model_config_from_hf(read_hf_config(hf_folder)), str(hf_folder))
