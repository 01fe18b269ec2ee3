"""megatron-sft convert: HF folder -> checkpoint in one layout -> release in another -> HF folder."""

import torch
from safetensors.torch import load_file

from megatron_sft import conversion
from megatron_sft.config.run import ParallelConfig
from tests.gloo import run_ranks
from tests.unit.hf.tiny_models import conversion_run, tiny_folder


def at_tp2(root):
    layout = ParallelConfig(tensor_model_parallel_size=2)
    conversion.convert(conversion_run(f"{root}/hf", save=f"{root}/tp2", parallel=layout))


def at_pp2(root):
    layout = ParallelConfig(pipeline_model_parallel_size=2)
    conversion.convert(conversion_run(f"{root}/tp2", save=f"{root}/pp2", parallel=layout))


def test_reshard_and_export_are_bit_identical(tmp_path):
    """Nemotron-H: Mamba layers, which TP cuts band by band, attention and MLP; 131 tokens, padded at TP2."""
    tiny_folder("nemotron_h", tmp_path / "hf", torch.bfloat16)
    run_ranks(at_tp2, 2, str(tmp_path))
    run_ranks(at_pp2, 2, str(tmp_path))
    conversion.export(conversion_run(tmp_path / "pp2", save_hf=tmp_path / "back", like=tmp_path / "hf"))
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "pp2" / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
