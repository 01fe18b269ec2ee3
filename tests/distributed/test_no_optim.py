"""A run that goes on without the checkpoint's optimizer states takes its fp32 weights from the checkpoint's parameters."""

import dataclasses
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_sft.checkpoint.distributed import load_checkpoint, save_checkpoint
from megatron_sft.config.run import CheckpointConfig, ParallelConfig
from megatron_sft.weights import WeightSource, restore
from tests.distributed.checkpoint_rig import build
from tests.gloo import run_ranks


def _went_on(root: str) -> list[bool]:
    """Whether a step after each way of loading gives what it gives after loading the weights alone."""
    rig = build(ParallelConfig(), dtype="bf16")
    rig.train(1, 2)
    save_checkpoint(f"{root}/with", 2, rig.chunks, rig.optimizer, rig.scheduler, {}, rig.run, rig.ranks)
    without = dataclasses.replace(rig.run, checkpoint=CheckpointConfig(save_optim=False))
    save_checkpoint(f"{root}/without", 2, rig.chunks, rig.optimizer, rig.scheduler, {}, without, rig.ranks)
    after = []
    for name in ("alone", "no-load-optim", "no-save-optim"):
        parallel_state.destroy_model_parallel()
        rig = build(ParallelConfig(), dtype="bf16")
        with torch.no_grad():
            for parameter in rig.chunks[0].parameters():
                parameter.add_(1.0)
        rig.optimizer.reload_model_params()
        if name == "alone":
            load_checkpoint(f"{root}/with", rig.chunks, rig.optimizer, None, rig.ranks, weights_only=True)
        else:
            source = WeightSource(f"{root}/{'with' if name == 'no-load-optim' else 'without'}", False, True, {})
            run = dataclasses.replace(rig.run, checkpoint=CheckpointConfig(load_optim=name != "no-load-optim"))
            restore(run, source, rig.ranks, rig.chunks, rig.optimizer)
        rig.train(3, 3)
        after.append([parameter.detach().clone() for parameter in rig.chunks[0].parameters()])
    return [all(map(torch.equal, after[0], other)) for other in after[1:]]


def test_master_weights_follow_the_loaded_parameters(tmp_path: Path) -> None:
    assert run_ranks(_went_on, 1, str(tmp_path)) == [[True, True]]
