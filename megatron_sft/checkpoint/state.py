"""The state dict of a checkpoint, with the keys that Megatron-LM's loader asks for (megatron/training/checkpointing.py)

args (Namespace), checkpoint_version 3.0, iteration, model or model0, model1 ... (virtual stages), optimizer,
opt_param_scheduler, rng_state, num_floating_point_operations_so_far, content_metadata; and of ours `train_state`.
"""

import dataclasses
import random
from argparse import Namespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import Float16Module

from megatron_sft.checkpoint import optimizer_shards
from megatron_sft.config.core_fields import RECORDS
from megatron_sft.config.groups import mixes_optimizers
from megatron_sft.config.optim import OptimConfig
from megatron_sft.config.run import RunConfig
from megatron_sft.parallel import Ranks, gather

TRAIN_STATE = "train_state"
RNG_KEY = "rng_state"


def unwrap(chunk: torch.nn.Module) -> Any:
    """The model inside DDP and Float16Module wrappers."""
    while isinstance(chunk, (DistributedDataParallel, Float16Module)):
        chunk = chunk.module
    return chunk


def layers_differ(chunks: list[Any], optim: OptimConfig) -> bool:
    """Collective: whether layers can differ in the states that they have: some are not trained, or have another optimizer."""
    frozen = any(gather(any(not parameter.requires_grad for chunk in chunks for parameter in chunk.parameters())))
    return frozen or mixes_optimizers(optim)


def content_metadata(use_distributed_optimizer: bool, by_layer: bool = False) -> dict[str, Any]:
    """How sharded state dicts are built here; stored in the checkpoint, and read back before a load.

    Args:
        use_distributed_optimizer: its states are sharded over data parallel.
        by_layer: layers_differ. Layers then have names of their own in place of one tensor over all layers, in which the states
            of some would be missing.
    """
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if by_layer:
        metadata["non_homogeneous_layers"] = True
    if use_distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = optimizer_shards.FORMAT
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    return metadata


def content_for(optimizer: Any, content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's content_metadata, for this optimizer to load: states of one that was not distributed are whole tensors."""
    if optimizer is None or "distrib_optim_sharding_type" in content or optimizer_shards.distributed_parts(optimizer) is None:
        return content
    return {**content, "distrib_optim_sharding_type": optimizer_shards.FORMAT}


def own_shards(optimizer: Any, metadata: dict[str, Any]) -> list[DistributedOptimizer] | None:
    """The distributed optimizers whose states optimizer_shards.py writes and reads; None: megatron-core does (other formats)."""
    is_ours = metadata.get("distrib_optim_sharding_type") == optimizer_shards.FORMAT
    return optimizer_shards.distributed_parts(optimizer) if is_ours else None


def model_state(chunks: list[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The sharded state dict of each model chunk, under `model`, or `model0`, `model1` ... for virtual stages."""
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    metadata = _with_group(metadata)
    return {name: unwrap(chunk).sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)}


def _with_group(metadata: dict[str, Any]) -> dict[str, Any]:
    return {**metadata, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def sharded_state(
    chunks: list[Any], optimizer: Any | None, scheduler: Any | None, metadata: dict[str, Any], is_loading: bool
) -> dict[str, Any]:
    """Model, optimizer and scheduler parts of the state dict; without the states that optimizer_shards.py writes and reads.

    Args:
        chunks: model chunks of this process, wrapped or not.
        optimizer: megatron-core's optimizer, or None to leave it out.
        scheduler: megatron-core's OptimizerParamScheduler, or None.
        metadata: content_metadata, of this run on saving and of the checkpoint on loading.
        is_loading: optimizer states that do not exist yet are created.
    """
    state = model_state(chunks, metadata)
    if optimizer is not None:
        parts = own_shards(optimizer, metadata)
        if parts is not None:
            state["optimizer"] = optimizer_shards.settings(parts, is_loading)
        else:
            state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=_with_group(metadata))
    if scheduler is not None:
        state["opt_param_scheduler"] = scheduler.state_dict()
    return state


def optimizer_settings(wanted: Any, saved: Any) -> Any:
    """The part of an optimizer's state dict that is not sharded, for this layout, with the checkpoint's step count.

    Parameter groups differ between layouts (expert parallelism makes groups of its own) and their values are this run's
    flags; all that a checkpoint says of them is how many steps were taken, the same number for all.

    Args:
        wanted: optimizer part of sharded_state(is_loading=True).
        saved: optimizer part of the checkpoint's common state.
    """
    values = _values(saved, "step") + _values(saved, "common_step")
    steps = [step for step in values if isinstance(step, (int, float)) or (torch.is_tensor(step) and step.numel() == 1)]
    settings = _not_sharded(wanted)
    for groups in _values(settings, "param_groups"):
        for group in groups:
            if steps:
                group["step"] = int(max(steps))
    return settings


def _values(tree: Any, name: str) -> list[Any]:
    """Every value under a key of this name, at any depth."""
    if isinstance(tree, dict):
        return [v for key, value in tree.items() for v in ([value] if key == name else _values(value, name))]
    return [v for value in tree for v in _values(value, name)] if isinstance(tree, list) else []


def _not_sharded(tree: Any) -> Any:
    """A copy without sharded and local leaves, and without what only held such leaves; None when nothing is left."""
    if isinstance(tree, dict):
        kept = {key: _not_sharded(value) for key, value in tree.items()}
        return {key: value for key, value in kept.items() if value is not None} or None
    if isinstance(tree, list):
        items = [_not_sharded(value) for value in tree]
        return items if any(item is not None for item in items) else None
    return None if isinstance(tree, (ShardedBase, LocalNonpersistentObject)) else tree


def rng_state(ranks: Ranks) -> ShardedObject:
    """Collective over data parallel: every generator of every process, one shard a (pipeline, tensor) rank.

    The list of a shard has one entry a data-parallel rank, as Megatron-LM's --data-parallel-random-init writes it.
    """
    own = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    shape, place = (ranks.pp_size, ranks.tp_size), (ranks.pp_rank, ranks.tp_rank)
    return ShardedObject(RNG_KEY, gather(own, group), shape, place, replica_id=dist.get_rank(group))


def restore_rng(states: list[dict[str, Any]]) -> None:
    """Sets every generator from a loaded rng_state; its first entry serves everybody when it has only one."""
    index = dist.get_rank(parallel_state.get_data_parallel_group(with_context_parallel=True))
    own = states[index] if index < len(states) else states[0]
    random.setstate(own["random_rng_state"])
    np.random.set_state(own["np_rng_state"])
    torch.set_rng_state(own["torch_rng_state"])
    torch.cuda.set_rng_state(own["cuda_rng_state"])
    if own["rng_tracker_states"]:
        tensor_parallel.get_cuda_rng_tracker().set_states(own["rng_tracker_states"])


def megatron_args(run: RunConfig, ranks: Ranks, iteration: int, state: dict[str, Any]) -> Namespace:
    """The `args` of Megatron-LM for this run: what check_checkpoint_args and load_args_from_checkpoint read."""
    model, train, optim = run.model, run.train, run.optim
    taken = {*RECORDS, "core", "rope_scaling", "vocab_size", "window_size", "window_layers", "norm_epsilon", "activation"}
    values = {name: value for name, value in dataclasses.asdict(model).items() if name not in taken}
    values.update(model.core_fields())
    values.update(dataclasses.asdict(run.parallel))
    values.update(
        vocab_size=model.vocab_size,
        num_experts=model.moe.num_moe_experts,
        layernorm_epsilon=model.norm_epsilon,
        swiglu=model.activation == "silu" and model.gated_mlp,
        squared_relu=model.activation == "squared_relu",
        apply_layernorm_1p=model.norm_zero_centered,
        group_query_attention=model.num_query_groups != model.num_attention_heads,
        untie_embeddings_and_output_weights=not model.share_embeddings_and_output_weights,
        add_position_embedding=True,
        use_rotary_position_embeddings=model.position_embedding_type == "rope",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        seq_length=run.data.seq_length,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=run.data.tokenizer_model,
        bf16=train.params_dtype == "bf16",
        fp16=False,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size or train.micro_batch_size * ranks.dp_size,
        seed=train.seed,
        lr=optim.lr,
        world_size=ranks.world_size,
        data_parallel_size=ranks.dp_size,
        data_parallel_random_init=False,
        ckpt_format="torch_dist",
        ckpt_fully_parallel_save=False,
        dist_ckpt_optim_fully_reshardable=True,
        async_save=False,
        no_save_rng=not run.checkpoint.save_rng,
        iteration=iteration,
        consumed_train_samples=int(state.get("consumed_train_samples", 0)),
        consumed_valid_samples=int(state.get("consumed_valid_samples", 0)),
        skipped_train_samples=0,
    )
    return Namespace(**{name: value for name, value in values.items() if _plain(value)})


def _plain(value: Any) -> bool:
    """Whether a value survives weights_only=True without an allow-list."""
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
