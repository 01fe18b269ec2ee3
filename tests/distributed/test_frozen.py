"""Parameters that are not trained keep every bit, and the others train as in one process, in every layout and after a resume."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sft.config.run import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sft.parallel import initialize
from tests.distributed.layout_rig import (
    PP2,
    SHARDED,
    SP,
    STEP_PACKS,
    TP2,
    Case,
    case,
    compared,
    freeze,
    loader_of,
    model_of,
    train_cases,
)
from tests.gloo import run_ranks

BOTTOM = r"embedding|decoder\.layers\.[01]\."
"""With two pipeline stages all of the first; of a tied model the head too."""
SCATTERED = r"output_layer|decoder\.final_layernorm|.*linear_qkv|decoder\.layers\.2\."
EXPERTS = r".*\.experts\."
ROUTED = r"(?!.*\.experts\.)"
"""Everything beside the routed experts."""


def frozen(names: str, model: str, *parts: dict[str, Any]) -> Case:
    return dataclasses.replace(case(model, *parts), frozen=names)


ALONE = {
    "bottom": frozen(BOTTOM, "qwen3"),
    "tied": frozen(BOTTOM, "llama-tied"),
    "scattered": frozen(SCATTERED, "qwen3"),
    "experts": frozen(EXPERTS, "qwen3_moe"),
    "routed": frozen(ROUTED, "qwen3_moe"),
}
CASES = {
    "dp2-distopt": frozen(SCATTERED, "qwen3", SHARDED),
    "tp2-sp": frozen(SCATTERED, "qwen3", TP2, SP),
    "pp2": frozen(BOTTOM, "qwen3", PP2),
    "pp2-tied": frozen(BOTTOM, "llama-tied", PP2),
}


@pytest.fixture(scope="module")
def alone(hf: dict[str, str]) -> dict[str, Any]:
    return run_ranks(train_cases, 1, ALONE, hf)[0]


def changed(parameters: dict[str, torch.Tensor], folder: str) -> set[str]:
    """HF names of the tensors that differ from the folder's."""
    before = load_file(Path(folder) / "model.safetensors")
    return {name for name, tensor in parameters.items() if not torch.equal(tensor, before[name])}


def test_frozen_parameters_keep_every_bit_and_the_others_do_not(alone: dict[str, Any], hf: dict[str, str]) -> None:
    names = {name: changed(outcome.parameters, hf[ALONE[name].model]) for name, outcome in alone.items()}
    layers = {name: {int(key.split(".")[2]) for key in keys if ".layers." in key} for name, keys in names.items()}
    assert layers["bottom"] == layers["tied"] == {2, 3} and layers["scattered"] == {0, 1, 3}
    assert "lm_head.weight" in names["bottom"] and "model.embed_tokens.weight" not in names["bottom"] | names["tied"]
    assert "model.norm.weight" in names["tied"] and not names["scattered"] & {"model.norm.weight", "lm_head.weight"}
    assert not any("q_proj" in key or "k_proj" in key for key in names["scattered"]) and any(
        "q_norm" in k for k in names["scattered"]
    )
    assert all(".experts." in key for key in names["routed"]) and not any(".experts." in key for key in names["experts"])


def test_layouts_equal_one_process(alone: dict[str, Any], hf: dict[str, str]) -> None:
    ranks = run_ranks(train_cases, 2, CASES, hf)
    of = {(c.model, c.frozen): alone[name] for name, c in ALONE.items()}
    found = {name: compared([rank[name] for rank in ranks], of[c.model, c.frozen]) for name, c in CASES.items()}
    assert {name: figures for name, figures in found.items() if not figures.within} == {}
    for name, c in CASES.items():
        expected = changed(of[c.model, c.frozen].parameters, hf[c.model])
        assert changed(ranks[0][name].parameters, hf[c.model]) == expected, name


def _resumed(folder: str, root: str, names: str, parallel: ParallelConfig) -> tuple[bool, bool, bool]:
    """Whether a run that goes on from a checkpoint of step 2 holds at step 4 what the unbroken one holds, bit for bit."""
    from megatron_sft.checkpoint.distributed import load_checkpoint, save_checkpoint
    from megatron_sft.hf.weights import load_hf_weights
    from megatron_sft.model.build import build_model
    from megatron_sft.train.optim import build_optimizer, wrap_ddp
    from megatron_sft.train.step import train_step

    ranks, model = initialize(parallel, 1), model_of("qwen3", folder)
    optim = OptimConfig(lr=1e-3)
    run = RunConfig(model, parallel, train=TrainConfig(global_batch_size=STEP_PACKS, train_iters=4), optim=optim)
    found = []
    for resumes in (False, True):
        chunks = build_model(model, parallel, run.train)
        if not resumes:
            load_hf_weights(chunks, model, folder, ranks)
        freeze(chunks, names)
        wrapped = wrap_ddp(chunks, parallel)
        optimizer = build_optimizer(wrapped, run)
        begin = load_checkpoint(root, wrapped, optimizer, None, ranks)["iteration"] if resumes else 0
        first = [chunk.state_dict() for chunk in chunks]
        first = [{name: value.clone() for name, value in state.items() if torch.is_tensor(value)} for state in first]
        for number, step in enumerate(itertools.islice(loader_of(run, ranks), 4), start=1):
            if number > begin:
                train_step(wrapped, optimizer, step.micro_batches, 1, str)
            if number == 2 and not resumes:
                save_checkpoint(root, 2, wrapped, optimizer, None, {"iteration": 2}, run, ranks)
        found.append((first, [chunk.state_dict() for chunk in chunks], chunks))
    (before, whole, chunks), (_, again, _) = found
    same = all(torch.equal(a[name], b[name]) for a, b in zip(whole, again, strict=True) for name in a if torch.is_tensor(a[name]))
    kept = [
        torch.equal(state[name], first[name]) != parameter.requires_grad
        for chunk, first, state in zip(chunks, before, whole, strict=True)
        for name, parameter in chunk.named_parameters()
    ]
    return same, all(kept), any(parameter.requires_grad for chunk in chunks for parameter in chunk.parameters())


@pytest.mark.parametrize(
    "names, parallel, trains",
    [
        (SCATTERED, ParallelConfig(use_distributed_optimizer=True), [True, True]),
        (SCATTERED, ParallelConfig(tensor_model_parallel_size=2), [True, True]),
        (BOTTOM, ParallelConfig(pipeline_model_parallel_size=2), [False, True]),
        (BOTTOM, ParallelConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=True), [False, True]),
    ],
)
def test_a_resumed_run_is_bit_identical(
    names: str, parallel: ParallelConfig, trains: list[bool], hf: dict[str, str], tmp_path: Path
) -> None:
    found = run_ranks(_resumed, 2, hf["qwen3"], str(tmp_path), names, parallel)
    assert found == [(True, True, some) for some in trains]
