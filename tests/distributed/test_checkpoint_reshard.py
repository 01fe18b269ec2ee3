"""Checkpoints across layouts: the same whole tensors, weights and optimizer moments, and the same training after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_sft.checkpoint.distributed import load_checkpoint, save_checkpoint
from megatron_sft.config.run import ParallelConfig
from tests.distributed.checkpoint_rig import build, build_ours
from tests.gloo import run_ranks
from tests.unit.hf.tiny_models import tiny_folder

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


WAYS = {"plain": ("fp32", False), "distributed-optimizer": ("bf16", True)}
"""dtype of the weights, and whether the optimizer is sharded."""


def _go_on(folder: str, load: str | None, save: str | None, tensor_parallel: int) -> dict[str, dict[str, Any]]:
    """In each of WAYS: two iterations, or what `load` holds; saved, and its whole tensors where one process has all."""
    found = {}
    for way, (dtype, sharded) in WAYS.items():
        layout = ParallelConfig(
            tensor_model_parallel_size=tensor_parallel,
            sequence_parallel=tensor_parallel > 1,
            use_distributed_optimizer=sharded,
        )
        rig = build_ours(layout, folder, dtype)
        if load:
            with torch.no_grad():
                for parameter in (parameter for chunk in rig.chunks for parameter in chunk.parameters()):
                    parameter.zero_()
            load_checkpoint(f"{load}/{way}", rig.chunks, rig.optimizer, rig.scheduler, rig.ranks)
        else:
            rig.train(1, 2)
        if save:
            save_checkpoint(f"{save}/{way}", 2, rig.chunks, rig.optimizer, rig.scheduler, {}, rig.run, rig.ranks)
        if tensor_parallel == 1:
            found[way] = {key: tensor.float().numpy() for key, tensor in rig.weights().items()}
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("family", ["olmo2", "gemma3_text", "gpt_oss", "nemotron_h"])
def test_our_models_states_go_to_two_tensor_parallel_ranks_and_back(family: str, tmp_path: Path) -> None:
    """Norms over all heads, norms behind projections, sinks and biases of experts, Mamba's bands: weights and both moments."""
    folder, one, two = (str(tmp_path / name) for name in ("hf", "one", "two"))
    tiny_folder(family, Path(folder))
    [expected] = run_ranks(_go_on, 1, folder, None, one, 1)
    run_ranks(_go_on, 2, folder, one, two, 2)
    [found] = run_ranks(_go_on, 1, folder, two, None, 1)
    for way, tensors in expected.items():
        assert set(found[way]) == set(tensors)
        assert [key for key in tensors if tensors[key].tobytes() != found[way][key].tobytes()] == [], way
        moments = [tensor for key, tensor in tensors.items() if ".exp_avg" in key]
        assert len(moments) >= 40 and all(tensor.any() for tensor in moments)
