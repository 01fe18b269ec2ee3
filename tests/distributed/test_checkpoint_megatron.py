"""Checkpoints of ours in Megatron-LM's own loader, and of its own saver here.

megatron-core alone, in every version; and megatron.training, which ships in megatron-core's wheel from 0.17 on: its parser,
its model, load_checkpoint and save_checkpoint.
"""

import dataclasses
import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sft.checkpoint import state, torch_dist, tracker
from megatron_sft.checkpoint.distributed import load_checkpoint, save_checkpoint
from megatron_sft.config.run import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sft.parallel import Ranks, initialize
from tests.distributed.checkpoint_rig import MODEL, Rig, build
from tests.gloo import run_ranks

ASKED = """num_layers hidden_size num_attention_heads add_position_embedding max_position_embeddings padded_vocab_size
tokenizer_type data_parallel_random_init global_batch_size tensor_model_parallel_size pipeline_model_parallel_size world_size
data_parallel_size no_save_optim no_save_rng consumed_train_samples consumed_valid_samples skipped_train_samples
ffn_hidden_size seq_length num_query_groups group_query_attention kv_channels position_embedding_type rotary_base
rotary_percent add_bias_linear add_qkv_bias squared_relu swiglu untie_embeddings_and_output_weights apply_layernorm_1p
normalization tokenizer_model ckpt_format ckpt_fully_parallel_save async_save""".split()
"""What megatron/training/checkpointing.py (0.19.2) reads of a checkpoint's args."""


def _blank(rig: Rig) -> None:
    with torch.no_grad():
        for parameter in (p for chunk in rig.chunks for p in chunk.parameters()):
            parameter.zero_()


def _ours_in_theirs(root: str, layout: dict) -> tuple[str, str, dict]:
    from megatron.core import dist_checkpointing

    rig = build(ParallelConfig(**layout))
    rig.train(1, 2)
    save_checkpoint(root, 2, rig.chunks, rig.optimizer, rig.scheduler, {"consumed_train_samples": 6}, rig.run, rig.ranks)
    expected = rig.digest()
    folder = str(tracker.checkpoint_folder(Path(root), 2))
    common = dist_checkpointing.load_common_state_dict(folder)
    rig.train(3, 3)
    _blank(rig)
    wanted = rig.core_state(is_loading=True)
    wanted["rng_state"] = state.rng_state(rig.ranks)
    loaded = dist_checkpointing.load(wanted, folder, strict="raise_unexpected")
    for chunk in rig.chunks:
        state.unwrap(chunk).load_state_dict(loaded["model"], strict=True)
    rig.optimizer.load_state_dict(loaded["optimizer"])
    rig.scheduler.num_steps = 0
    rig.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    state.restore_rng(loaded["rng_state"])
    return expected, rig.digest(), vars(common["args"]) | {"iteration": loaded["iteration"]}


@pytest.mark.parametrize(("world_size", "layout"), [(1, {}), (2, {"use_distributed_optimizer": True})])
def test_our_checkpoint_loads_in_megatron_core(tmp_path: Path, world_size: int, layout: dict) -> None:
    for expected, found, args in run_ranks(_ours_in_theirs, world_size, str(tmp_path), layout):
        assert found == expected
        assert set(ASKED) <= set(args)
        assert (args["iteration"], args["consumed_train_samples"], args["world_size"]) == (2, 6, world_size)


def _theirs_in_ours(root: str, layout: dict) -> tuple[str, str, dict]:
    from megatron.core import dist_checkpointing

    rig = build(ParallelConfig(**layout))
    rig.train(1, 2)
    folder = tracker.checkpoint_folder(Path(root), 2)
    if rig.ranks.rank == 0:
        folder.mkdir(parents=True)
        (folder.parent / tracker.TRACKER).write_text("2")
    torch.distributed.barrier()
    metadata = state.content_metadata(rig.run.parallel.use_distributed_optimizer)
    full = {**rig.core_state(is_loading=False), "opt_param_scheduler": rig.scheduler.state_dict()}
    full |= {"args": Namespace(consumed_train_samples=6), "checkpoint_version": 3.0, "iteration": 2}
    full["rng_state"] = state.rng_state(rig.ranks)
    dist_checkpointing.save(full, str(folder), content_metadata=metadata)
    expected = rig.digest()
    rig.train(3, 3)
    _blank(rig)
    loaded = load_checkpoint(root, rig.chunks, rig.optimizer, rig.scheduler, rig.ranks)
    return expected, rig.digest(), loaded


@pytest.mark.parametrize(("world_size", "layout"), [(1, {}), (2, {"use_distributed_optimizer": True})])
def test_megatron_cores_checkpoint_loads_here(tmp_path: Path, world_size: int, layout: dict) -> None:
    for expected, found, loaded in run_ranks(_theirs_in_ours, world_size, str(tmp_path), layout):
        assert found == expected
        assert loaded == {"iteration": 2, "consumed_train_samples": 6}
    assert torch_dist.read_common(tracker.checkpoint_folder(tmp_path, 2))["iteration"] == 2


EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16, "moe_layer_freq": [1, 1, 1, 1]}
THEIR_FLAGS = """--use-checkpoint-args --transformer-impl local --micro-batch-size 1 --train-iters 100 --lr 1e-2 --save-interval 1
  --no-masked-softmax-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion --no-bias-swiglu-fusion --no-rope-fusion
  --qk-layernorm --use-cpu-initialization --distributed-backend gloo --dist-ckpt-strictness raise_all
""".split()
"""What load_args_from_checkpoint does not take from a checkpoint, for a CPU."""


def _rig(run: RunConfig, ranks: Ranks, chunks: list[Any]) -> Rig:
    from megatron_sft.train.optim import build_optimizer, build_scheduler, schedule_lengths, wrap_ddp

    wrapped = wrap_ddp(chunks, run.parallel)
    optimizer = build_optimizer(wrapped, run)
    return Rig(run, ranks, wrapped, optimizer, build_scheduler(optimizer, run.optim, schedule_lengths(run, 100, 100)))


def _our_rig(run: RunConfig, ranks: Ranks) -> Rig:
    """Our own model, as finetune.py builds it, with fresh weights."""
    from megatron_sft.model.build import build_model

    torch.manual_seed(7)
    chunks = build_model(run.model, run.parallel, run.train)
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    return _rig(run, ranks, chunks)


def _their_rig(run: RunConfig, ranks: Ranks, load: str, save: str, flags: list[str]) -> Rig:
    """Megatron-LM's model of the `args` in our checkpoint: its parser, its checks, its builder."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator, unset_num_microbatches_calculator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import arguments, checkpointing, global_vars
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    sys.argv = ["pretrain_gpt.py", "--load", load, "--save", save, *THEIR_FLAGS, *flags]
    args = arguments.parse_args()
    checkpointing.load_args_from_checkpoint(args)
    arguments.validate_args(args)
    global_vars.set_args(args)
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(0, None, args.global_batch_size, 1, ranks.dp_size)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return _rig(run, ranks, [GPTModelBuilder(gpt_config_from_args(args)).build_model(groups)])


def _both_ways(root: str, layout: dict, core: dict, sharding: list[str]) -> dict[str, tuple]:
    """Ours -> load_checkpoint -> save_checkpoint, once for each of their ways to shard the optimizer -> ours."""
    ranks = initialize(ParallelConfig(**layout), 1234)
    run = RunConfig(
        model=dataclasses.replace(MODEL, qk_layernorm=True).with_core(core),
        parallel=ParallelConfig(**layout),
        data=DataConfig(seq_length=64),
        optim=OptimConfig(lr=1e-2, clip_grad=0.0, weight_decay=0.01),
        train=TrainConfig(train_iters=100),
    )
    ours = _our_rig(run, ranks)
    ours.train(1, 2)
    first = f"{root}/ours"
    save_checkpoint(first, 2, ours.chunks, ours.optimizer, ours.scheduler, {"consumed_train_samples": 6}, run, ranks)
    expected = {"ours": ours.digest()}
    from megatron.training import checkpointing, global_vars

    flags = ["--use-distributed-optimizer"] if run.parallel.use_distributed_optimizer else []
    theirs = _their_rig(run, ranks, first, f"{root}/theirs", flags)
    iteration, _ = checkpointing.load_checkpoint(theirs.chunks, theirs.optimizer, theirs.scheduler)
    args = global_vars.get_args()
    found = {"ours": (theirs.digest(), iteration, args.consumed_train_samples, args.num_experts)}
    for way in sharding:
        args.dist_ckpt_optim_fully_reshardable, args.save = way == "fully_reshardable", f"{root}/{way}"
        number = iteration + 1 + sharding.index(way)
        theirs.train(number, number)
        expected[way] = theirs.digest()
        args.consumed_train_samples = 3 * number
        checkpointing.save_checkpoint(number, theirs.chunks, theirs.optimizer, theirs.scheduler, 0)
        _blank(ours)
        loaded = load_checkpoint(args.save, ours.chunks, ours.optimizer, ours.scheduler, ranks)
        found[way] = (ours.digest(), loaded["iteration"], loaded["consumed_train_samples"], args.num_experts)
    return {name: (found[name][0] == digest, *found[name][1:]) for name, digest in expected.items()}


@pytest.mark.skipif(importlib.util.find_spec("megatron.training") is None, reason="this megatron-core has no megatron.training")
@pytest.mark.parametrize(
    ("world_size", "layout", "core", "sharding"),
    [
        (1, {}, EXPERTS, ["not sharded"]),
        (2, {"use_distributed_optimizer": True}, {}, ["fully_reshardable", "dp_reshardable"]),
    ],
)
def test_megatron_lm_loads_ours_and_we_load_its_own(
    tmp_path: Path, world_size: int, layout: dict, core: dict, sharding: list[str]
) -> None:
    experts = 4 if core else None
    expected: dict[str, tuple] = {"ours": (True, 2, 6, experts)}
    expected |= {way: (True, 3 + number, 9 + 3 * number, experts) for number, way in enumerate(sharding)}
    for found in run_ranks(_both_ways, world_size, str(tmp_path), layout, core, sharding):
        assert found == expected
