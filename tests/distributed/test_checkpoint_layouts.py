"""Checkpoints: any layout loads any other, and a resume is the same training."""

from pathlib import Path

import pytest
import torch

from megatron_sft.checkpoint.distributed import latest_iteration, load_checkpoint, read_run_config, save_checkpoint
from megatron_sft.config.run import ParallelConfig
from tests.distributed.checkpoint_rig import build
from tests.gloo import run_ranks


def _resume(root: str, layout: dict, dtype: str) -> tuple[str, str, dict]:
    whole = build(ParallelConfig(**layout), dtype=dtype)
    whole.train(1, 2)
    state = {"consumed_train_samples": 16, "note": "kept", "loss_sum": torch.tensor(1.5)}
    save_checkpoint(root, 2, whole.chunks, whole.optimizer, whole.scheduler, state, whole.run, whole.ranks)
    whole.train(3, 4)
    expected = whole.digest()
    torch.rand(5)
    with torch.no_grad():
        for parameter in (p for chunk in whole.chunks for p in chunk.parameters()):
            parameter.zero_()
    loaded = load_checkpoint(root, whole.chunks, whole.optimizer, whole.scheduler, whole.ranks)
    whole.train(3, 4)
    loaded["loss_sum"] = float(loaded["loss_sum"])
    return expected, whole.digest(), loaded


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (1, {"use_distributed_optimizer": True}),
        (2, {"use_distributed_optimizer": True}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    ],
)
def test_resume_is_bit_identical(tmp_path: Path, world_size: int, layout: dict, dtype: str) -> None:
    for expected, found, state in run_ranks(_resume, world_size, str(tmp_path), layout, dtype):
        assert found == expected
        assert state == {"consumed_train_samples": 16, "note": "kept", "loss_sum": 1.5, "iteration": 2}
    assert latest_iteration(tmp_path) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000002", "latest_checkpointed_iteration.txt"]
    assert read_run_config(tmp_path)["optim"]["lr"] == 1e-2
