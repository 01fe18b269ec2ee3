"""HF folders through tensor, pipeline, virtual pipeline and expert parallelism, and back."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_sft import conversion, parallel
from megatron_sft.checkpoint.hf import core_module, load_hf_weights, save_hf
from megatron_sft.checkpoint.hf_config import model_config_from_hf, read_hf_config
from megatron_sft.checkpoint.verify import changed_tensors, quick_check
from megatron_sft.config import ParallelConfig, TrainConfig
from megatron_sft.errors import CheckpointError
from megatron_sft.model.build import build_model
from tests.gloo import run_ranks
from tests.unit.checkpoint.tiny_models import KEYS, tiny_folder

LAYOUTS = {
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "tp2-sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "tp4": (4, dict(tensor_model_parallel_size=4)),  # more ranks than the 2 key/value groups
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "pp2-vpp2": (2, dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "dp2": (2, {}),
    "ep2": (2, dict(expert_model_parallel_size=2)),
    "tp2-ep2": (2, dict(tensor_model_parallel_size=2, expert_model_parallel_size=2, sequence_parallel=True)),
    "tp2-pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}
CASES = [
    ("tp2", tuple(KEYS)),
    ("tp2-sp", ("qwen3",)),
    ("tp4", ("qwen2", "phi3")),
    ("pp2", tuple(KEYS)),
    ("pp2-vpp2", ("qwen2", "qwen3")),
    ("dp2", ("llama",)),
    ("ep2", tuple(name for name, keys in KEYS.items() if any("expert" in key for key in keys))),
    ("tp2-ep2", ("mixtral",)),
    ("tp2-pp2", ("qwen2",)),
]


def through_layout(folders, out, fields):
    layout = ParallelConfig(**fields)
    ranks = parallel.initialize(layout, 1)
    for name, folder in folders.items():
        model = conversion.padded(model_config_from_hf(read_hf_config(folder)), 8)
        chunks = build_model(model, layout, TrainConfig())
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(torch.nan)
        load_hf_weights(chunks, model, folder, ranks)
        assert not any(parameter.isnan().any() for chunk in chunks for parameter in chunk.parameters())
        quick_check(chunks, model, folder, ranks)
        assert changed_tensors(chunks, model, folder, ranks) == []
        save_hf(chunks, model, f"{out}/{name}", ranks, folder)
    parallel.finalize()
    return ranks.rank


@pytest.mark.parametrize("layout, names", CASES, ids=[case[0] for case in CASES])
def test_outputs_equal_transformers_and_round_trip_is_identical(layout, names, tmp_path):
    folders = {name: str(tmp_path / "in" / name) for name in names}
    for name, folder in folders.items():
        tiny_folder(name, folder)
    world_size, fields = LAYOUTS[layout]
    assert run_ranks(through_layout, world_size, folders, str(tmp_path / "out"), fields) == list(range(world_size))
    for name, folder in folders.items():
        before = load_file(f"{folder}/model.safetensors")
        after = load_file(tmp_path / "out" / name / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def failing_export(folder, out):
    layout = ParallelConfig(tensor_model_parallel_size=2)
    ranks = parallel.initialize(layout, 1)
    model = conversion.padded(model_config_from_hf(read_hf_config(folder)), 2)
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
    assert ["cannot be written" in found[0] for found in messages] == [True, True]
    assert ["has no tensor for it" in found[1] for found in messages] == [True, True]
