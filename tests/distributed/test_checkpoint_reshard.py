"""Checkpoints across layouts: the same whole tensors, weights and optimizer moments, and the same training after it."""

from pathlib import Path

import pytest
import torch

from megatron_sft.checkpoint.distributed import load_checkpoint, save_checkpoint
from megatron_sft.config.run import ParallelConfig
from tests.distributed.checkpoint_rig import build
from tests.gloo import run_ranks

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
PP2_DP2 = {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}
VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
MOE = {"core": {"num_moe_experts": 4, "moe_router_topk": 2}}


def _write(load: str | None, save: str, layout: dict, model: dict) -> None:
    """Without a checkpoint trains two iterations, else loads it; saves in its own layout."""
    rig = build(ParallelConfig(**layout), **model)
    if load:
        assert load_checkpoint(load, rig.chunks, rig.optimizer, rig.scheduler, rig.ranks)["iteration"] == 2
    else:
        rig.train(1, 2)
    save_checkpoint(save, 2, rig.chunks, rig.optimizer, rig.scheduler, {}, rig.run, rig.ranks)


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
def test_the_last_layout_has_the_bits_of_the_first(tmp_path: Path, layouts: list, model: dict) -> None:
    """Weights and moments go through every layout unchanged (training in them would round differently)."""
    load = None
    for number, (world_size, layout) in enumerate(layouts):
        save = str(tmp_path / f"save{number}")
        run_ranks(_write, world_size, load, save, layout, model)
        load = save
    single = {"use_distributed_optimizer": layouts[0][1].get("use_distributed_optimizer", False)}
    [expected] = run_ranks(_whole, 1, str(tmp_path / "save0"), single, model)
    [found] = run_ranks(_whole, 1, load, single, model)
    assert set(found) == set(expected)
    different = [key for key in expected if expected[key].tobytes() != found[key].tobytes()]
    assert not different
    assert sum(key.startswith("optimizer.state.exp_avg") for key in found) >= 8
