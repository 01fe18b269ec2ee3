"""HF folders through tensor, pipeline, virtual pipeline and expert parallelism, and back."""

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file

from megatron_sft import parallel
from megatron_sft.config.run import ParallelConfig, TrainConfig
from megatron_sft.errors import CheckpointError
from megatron_sft.hf.config import model_config_from_hf, read_hf_config
from megatron_sft.hf.exporter import save_hf
from megatron_sft.hf.verify import changed_tensors, quick_check
from megatron_sft.hf.weights import core_module, load_hf_weights
from megatron_sft.model.build import build_model
from megatron_sft.weights import padded
from tests.gloo import run_ranks
from tests.unit.hf.tiny_models import KEYS, tiny_folder

MOE = tuple(name for name, keys in KEYS.items() if "num_experts_per_tok" in keys)
UNBIASED = tuple(name for name in MOE if name != "gpt_oss")  # megatron-core cuts no expert that has biases
TP2, PP2, EP2 = ({f"{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "expert_model"))
SP = {"sequence_parallel": True}
CASES = {
    2: {  # world size; all layouts of one size in one launch
        "tp2": (TP2, [name for name in KEYS if name not in MOE]),
        "tp2-sp": ({**TP2, **SP}, [*MOE, "qwen3", "olmo2"]),
        "tp2-ep2": ({**TP2, **EP2, **SP}, ["mixtral", "gpt_oss"]),
        "tp2-etp2": ({**TP2, **SP, "expert_tensor_parallel_size": 2}, UNBIASED),
        "pp2": (PP2, KEYS),
        "pp2-vpp2": ({**PP2, "virtual_pipeline_model_parallel_size": 2}, ["qwen2", "qwen3_moe"]),
        "ep2": (EP2, MOE),
        "dp2": ({}, ["llama"]),
    },
    4: {
        "tp4": (dict(tensor_model_parallel_size=4), ["qwen2", "phi3"]),  # more ranks than the 2 key/value groups
        "tp2-pp2": ({**TP2, **PP2}, ["qwen2"]),
    },
}


def through_layouts(root, cases):
    for case, (fields, names) in cases.items():
        layout = ParallelConfig(**fields)
        ranks = parallel.initialize(layout, 1)
        for name in names:
            through_layout(f"{root}/in/{name}", f"{root}/out/{case}/{name}", layout, ranks)
        parallel_state.destroy_model_parallel()
    parallel.finalize()
    return ranks.rank


def through_layout(folder, out, layout, ranks):
    model = padded(model_config_from_hf(read_hf_config(folder)), 8)
    chunks = build_model(model, layout, TrainConfig())
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)
    load_hf_weights(chunks, model, folder, ranks)
    assert not any(parameter.isnan().any() for chunk in chunks for parameter in chunk.parameters())
    quick_check(chunks, model, folder, ranks)
    assert changed_tensors(chunks, model, folder, ranks) == []
    save_hf(chunks, model, out, ranks, folder)


@pytest.mark.parametrize("world_size", CASES)
def test_outputs_equal_transformers_and_round_trip_is_identical(world_size, tmp_path):
    cases = CASES[world_size]
    stored = {}
    for name in sorted({name for _, names in cases.values() for name in names}):
        tiny_folder(name, tmp_path / "in" / name)
        stored[name] = load_file(tmp_path / "in" / name / "model.safetensors")
    assert run_ranks(through_layouts, world_size, str(tmp_path), cases) == list(range(world_size))
    for case, (_, names) in cases.items():
        for name in names:
            after = load_file(tmp_path / "out" / case / name / "model.safetensors")
            assert stored[name].keys() == after.keys(), (case, name)
            assert [key for key in after if not torch.equal(stored[name][key], after[key])] == [], (case, name)


def failing_export(folder, out):
    layout = ParallelConfig(tensor_model_parallel_size=2)
    ranks = parallel.initialize(layout, 1)
    model = padded(model_config_from_hf(read_hf_config(folder)), 2)
    chunks = build_model(model, layout, TrainConfig())
    load_hf_weights(chunks, model, folder, ranks)
    messages = []
    try:
        save_hf(chunks, model, out, ranks, folder)
    except CheckpointError as error:
        messages.append(str(error))
    if ranks.rank == 1:
        core_module(chunks[0]).decoder.final_layernorm.register_parameter("odd", torch.nn.Parameter(torch.ones(1)))
    try:
        load_hf_weights(chunks, model, folder, ranks)
    except CheckpointError as error:
        messages.append(str(error))
    parallel.finalize()
    return messages


def test_export_that_fails_on_the_writer_ends_every_rank(tmp_path):
    tiny_folder("llama", tmp_path / "in")
    (tmp_path / "file").write_text("x")
    messages = run_ranks(failing_export, 2, str(tmp_path / "in"), str(tmp_path / "file" / "out"))
    assert ["not written (Not a directory)" in found[0] for found in messages] == [True, True]
    assert ["has no tensor for it" in found[1] for found in messages] == [True, True]
