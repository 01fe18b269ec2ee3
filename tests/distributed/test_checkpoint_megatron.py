"""Checkpoints of ours in megatron-core's own loader, and of megatron-core's own saver (as Megatron-LM calls it) here."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_sft.checkpoint import state, torch_dist, tracker
from megatron_sft.checkpoint.distributed import load_checkpoint, save_checkpoint
from megatron_sft.config import ParallelConfig
from tests.distributed.checkpoint_rig import Rig, build
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
    save_checkpoint(
        root, 2, rig.chunks, rig.optimizer, rig.scheduler, {"consumed_train_samples": 6}, rig.run, rig.ranks
    )
    expected = rig.digest()
    folder = str(tracker.checkpoint_folder(Path(root), 2))
    common = dist_checkpointing.load_common_state_dict(folder)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    rig.train(3, 3)
    _blank(rig)
    wanted = state.sharded_state(rig.chunks, rig.optimizer, None, metadata, is_loading=True)
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
    full = state.sharded_state(rig.chunks, rig.optimizer, rig.scheduler, metadata, is_loading=False)
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
