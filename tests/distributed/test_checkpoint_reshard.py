"""Checkpoints across layouts: the same whole tensors, weights and optimizer moments, and the same training after it."""

from pathlib import Path

import pytest
import torch

from megatron_sft.checkpoint.distributed import load_checkpoint, save_checkpoint
from megatron_sft.config import ParallelConfig
from tests.distributed.checkpoint_rig import build
from tests.gloo import run_ranks

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
PP2_DP2 = {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}
VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
MOE = {"core": {"num_moe_experts": 4, "moe_router_topk": 2}}


def _step(load: str | None, save: str, iteration: int, layout: dict, model: dict) -> None:
    """Loads the checkpoint before, trains one iteration, saves."""
    rig = build(ParallelConfig(**layout), **model)
    if load:
        assert load_checkpoint(load, rig.chunks, rig.optimizer, rig.scheduler, rig.ranks)["iteration"] == iteration - 1
    rig.train(iteration, iteration)
    save_checkpoint(save, iteration, rig.chunks, rig.optimizer, rig.scheduler, {}, rig.run, rig.ranks)


def _whole(root: str, layout: dict, model: dict) -> dict[str, torch.Tensor]:
    rig = build(ParallelConfig(**layout), **model)
    load_checkpoint(root, rig.chunks, rig.optimizer, rig.scheduler, rig.ranks)
    return {key: tensor.numpy() for key, tensor in rig.weights().items()}


@pytest.mark.parametrize(
    ("layouts", "model"),
    [
        ([(4, TP2_PP2), (1, {}), (4, PP2_DP2 | {"use_distributed_optimizer": False}), (2, VPP2)], {}),
        (
            [
                (4, TP2_PP2 | {"use_distributed_optimizer": True}),
                (1, {"use_distributed_optimizer": True}),
                (4, PP2_DP2),
                (2, {"use_distributed_optimizer": True}),
            ],
            {},
        ),
        ([(2, EP2), (1, {}), (4, EP2 | {"tensor_model_parallel_size": 2})], MOE),
    ],
    ids=["plain", "distributed-optimizer", "experts"],
)
def test_training_across_layouts_equals_one_layout(tmp_path: Path, layouts: list, model: dict) -> None:
    load = None
    for iteration, (world_size, layout) in enumerate(layouts, start=1):
        save = str(tmp_path / f"save{iteration}")
        run_ranks(_step, world_size, load, save, iteration, layout, model)
        load = save
    single = {"use_distributed_optimizer": layouts[0][1].get("use_distributed_optimizer", False)}
    reference = None
    for iteration in range(1, len(layouts) + 1):
        run_ranks(_step, 1, reference, str(tmp_path / f"reference{iteration}"), iteration, single, model)
        reference = str(tmp_path / f"reference{iteration}")
    [expected] = run_ranks(_whole, 1, reference, single, model)
    [found] = run_ranks(_whole, 1, load, single, model)
    assert set(found) == set(expected)
    different = [key for key in expected if expected[key].tobytes() != found[key].tobytes()]
    assert not different
    assert sum(key.startswith("optimizer.state.exp_avg") for key in found) >= 8
