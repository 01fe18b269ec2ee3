"""--use-distributed-optimizer switched on or off between a checkpoint and its resume: states and steps go on as they were."""

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_sft.checkpoint.distributed import load_checkpoint, save_checkpoint
from megatron_sft.config.run import ParallelConfig
from tests.distributed.checkpoint_rig import Rig, build
from tests.gloo import run_ranks


def _rig(sharded: bool, dtype: str) -> Rig:
    parallel_state.destroy_model_parallel()
    return build(ParallelConfig(use_distributed_optimizer=sharded), dtype=dtype)


def _switched(root: str, dtype: str) -> list[list[str]]:
    """For each direction the parameters that are not, bit by bit, those of the unbroken run 2 steps after the switch."""
    found = []
    for before in (False, True):
        rig = _rig(before, dtype)
        rig.train(1, 3)
        save_checkpoint(f"{root}/{before}", 3, rig.chunks, rig.optimizer, rig.scheduler, {}, rig.run, rig.ranks)
        rig.train(4, 5)
        expected = {name: parameter.detach().clone() for name, parameter in rig.chunks[0].named_parameters()}
        rig = _rig(not before, dtype)
        with torch.no_grad():
            for parameter in rig.chunks[0].parameters():
                parameter.add_(1.0)
        rig.optimizer.reload_model_params()
        load_checkpoint(f"{root}/{before}", rig.chunks, rig.optimizer, rig.scheduler, rig.ranks)
        rig.train(4, 5)
        now = dict(rig.chunks[0].named_parameters())
        found.append([name for name, tensor in expected.items() if not torch.equal(tensor, now[name])])
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resume_may_switch_the_distributed_optimizer(tmp_path: Path, dtype: str) -> None:
    assert run_ranks(_switched, 2, str(tmp_path), dtype) == [[[], []], [[], []]]
