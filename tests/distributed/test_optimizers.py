"""Groups, SGD and Muon train as in one process where matrices are cut, and go on from a checkpoint bit for bit."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sft.config.run import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sft.errors import ConfigError
from megatron_sft.parallel import initialize
from tests.distributed.layout_rig import (
    EP2,
    ETP2,
    PP2,
    SHARDED,
    SP,
    STEP_PACKS,
    TP2,
    Case,
    against_one_process,
    case,
    loader_of,
    model_of,
)
from tests.gloo import run_ranks

GROUPS: dict[str, Any] = {
    "param_groups": (r"layers\.[01]\..*linear_qkv lr=5e-5 optimizer=sgd", "layernorm lr=2e-5 weight_decay=0.1"),
    "embedding_lr": 3e-5,
    "matrix_lr": 8e-5,
    "weight_decay": 0.01,
    "init_lr_frac": 0.9,
    "warmdown_ratio": 0.5,
}
REGROUPED = {name: value for name, value in GROUPS.items() if name != "embedding_lr"}
"""The same rates and optimizers from another table."""
REGROUPED["param_groups"] = (
    *(GROUPS["param_groups"][0], "q_layernorm lr=2e-5 weight_decay=0.1", GROUPS["param_groups"][1]),
    *("embedding lr=3e-5", r"layers\.3\. lr=8e-5"),
)
MUON: dict[str, Any] = {"optimizer": "muon", "weight_decay": 0.1, "embedding_lr": 2e-5}
OFFLOAD: dict[str, Any] = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
"""Changes no number, and nothing in a checkpoint."""
FROZEN = r"output_layer|.*linear_qkv|decoder\.layers\.2\."
LOWER = r"decoder\.layers\.[0-2]\."
NANOCHAT = MUON | {"muon_variant": "nanochat"}


def tuned(optim: dict[str, Any], model: str, *parts: dict[str, Any], frozen: str = "") -> Case:
    settings: dict[str, Any] = {"optim": tuple(optim.items()), "muon_dtype": torch.float32, "steps": 5, "frozen": frozen}
    return dataclasses.replace(case(model, *parts, micro=4), **settings)


ALONE = {
    "groups": tuned(GROUPS, "qwen3"),
    "muon": tuned(MUON, "qwen3"),
    "nanochat": tuned(NANOCHAT, "qwen3", frozen=FROZEN),
    "nanochat_moe": tuned(NANOCHAT, "deepseek_v3", frozen=LOWER),
}
CASES = {
    "groups-pp2": tuned(GROUPS, "qwen3", PP2),
    "muon-tp2": tuned(MUON, "qwen3", TP2),
    "nanochat-distopt": tuned(NANOCHAT, "qwen3", SHARDED, frozen=FROZEN),
    "nanochat_moe-ep2": tuned(NANOCHAT, "deepseek_v3", EP2, SHARDED, frozen=LOWER),
    "nanochat_moe-tp2-etp2": tuned(NANOCHAT, "deepseek_v3", TP2, SP, ETP2, frozen=LOWER),
}
"""The two variants share all that puts matrices together. Both iterate in fp32: in bf16, as torch's trains, 1e-7 of a gradient
flips an element by 4e-3 of itself (tests/unit/train/test_muon.py has it bit for bit on whole matrices)."""


def test_layouts_equal_one_process(hf: dict[str, str]) -> None:
    _, ranks, beyond = against_one_process(ALONE, CASES, hf)
    assert beyond == {}
    before = load_file(Path(hf["qwen3"]) / "model.safetensors")
    kept = {name for name, tensor in ranks[0]["nanochat-distopt"].parameters.items() if torch.equal(tensor, before[name])}
    assert kept == {name for name in before if re.search(r"lm_head|[qkv]_proj|layers\.2\.", name)}


def _resumed(folder: str, root: str, tables: list[dict[str, Any]], parallel: ParallelConfig, dtype: str) -> bool:
    """Whether a run that goes on from a checkpoint of step 2 holds at step 4 what the unbroken one holds, bit for bit.

    The first of the tables is the unbroken run's, the last the other's.
    """
    from megatron_sft.checkpoint.distributed import load_checkpoint, save_checkpoint
    from megatron_sft.hf.weights import load_hf_weights
    from megatron_sft.model.build import build_model
    from megatron_sft.train.optim import build_optimizer, build_scheduler, schedule_lengths, wrap_ddp
    from megatron_sft.train.step import train_step

    ranks, model = initialize(parallel, 1), model_of("qwen3", folder)
    train = TrainConfig(global_batch_size=STEP_PACKS, train_iters=8, params_dtype=dtype)
    found = []
    for resumes in (False, True):
        run = RunConfig(model, parallel, train=train, optim=OptimConfig(**{"lr": 1e-3, **tables[-resumes]}))
        chunks = build_model(model, parallel, run.train)
        if not resumes:
            load_hf_weights(chunks, model, folder, ranks)
        wrapped = wrap_ddp(chunks, parallel)
        optimizer = build_optimizer(wrapped, run)
        begin = load_checkpoint(root, wrapped, optimizer, None, ranks)["iteration"] if resumes else 0
        scheduler = build_scheduler(optimizer, run.optim, schedule_lengths(run, 8, 64), begin)
        for number, step in enumerate(itertools.islice(loader_of(run, ranks), 4), start=1):
            if number > begin:
                train_step(wrapped, optimizer, step.micro_batches, 1, str)
                scheduler.step(1)
            if number == 2 and not resumes:
                save_checkpoint(root, 2, wrapped, optimizer, None, {"iteration": 2}, run, ranks)
        found.append([chunk.state_dict() for chunk in chunks])
    whole, again = found
    return all(torch.equal(a[name], b[name]) for a, b in zip(whole, again, strict=True) for name in a if torch.is_tensor(a[name]))


@pytest.mark.parametrize(
    ("tables", "parallel", "dtype"),
    [
        ([GROUPS, REGROUPED | OFFLOAD], ParallelConfig(use_distributed_optimizer=True), "bf16"),
        ([GROUPS, REGROUPED], ParallelConfig(pipeline_model_parallel_size=2), "bf16"),
        ([MUON, MUON | OFFLOAD], ParallelConfig(tensor_model_parallel_size=2), "bf16"),
        ([NANOCHAT | OFFLOAD, NANOCHAT], ParallelConfig(use_distributed_optimizer=True), "bf16"),
        ([OFFLOAD, {}], ParallelConfig(use_distributed_optimizer=True), "bf16"),
    ],
)
def test_a_resumed_run_is_bit_identical(
    tables: list[dict[str, Any]], parallel: ParallelConfig, dtype: str, hf: dict[str, str], tmp_path: Path
) -> None:
    assert run_ranks(_resumed, 2, hf["qwen3"], str(tmp_path), tables, parallel, dtype) == [True, True]


TAKES_ALL = OptimConfig(optimizer="muon", param_groups=(". lr=1e-5",))
"""Muon's own group of matrices may be left without any: no flag asked for it."""


def _refused(folder: str) -> tuple[str, ...]:
    from megatron_sft.model.build import build_model
    from megatron_sft.train.groups import config_overrides
    from megatron_sft.train.optim import build_optimizer, wrap_ddp

    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    initialize(parallel, 1)
    config_overrides(build_model(model_of("deepseek_v3", folder), parallel, TrainConfig()), TAKES_ALL)
    entries = ("lm_head lr=1e-5", "final_layernorm lr=1e-5", r"layers\.2\..*experts\.1\. lr=1e-5")
    run = RunConfig(model_of("deepseek_v3", folder), parallel, optim=OptimConfig(param_groups=entries))
    try:
        build_optimizer(wrap_ddp(build_model(run.model, parallel, run.train), parallel), run)
    except ConfigError as error:
        return error.problems
    return ()


def test_patterns_of_no_parameter_and_of_some_experts_are_refused_on_every_process(hf: dict[str, str]) -> None:
    said = (
        "lm_head: no trained parameter has it that an earlier group leaves. Expected one. Correct it, or leave it out.",
        r"layers\.2\..*experts\.1\.: some experts of a layer have it, others do not. Expected all or none. Leave the expert's "
        "number out.",
    )
    assert run_ranks(_refused, 2, hf["deepseek_v3"]) == [said, said]
