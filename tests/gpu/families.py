"""Loss and gradient of tiny models of every family, with the features of each. Also the program of the CPU's side, which
test_families.py starts: CUDA_VISIBLE_DEVICES= python -m tests.gpu.families OUT.pt NAME...
"""

import sys
import tempfile
from pathlib import Path

import torch

from megatron_sft import parallel
from megatron_sft.config.run import ParallelConfig, TrainConfig
from megatron_sft.core_compat import device
from megatron_sft.hf.config import model_config_from_hf, read_hf_config
from megatron_sft.hf.weights import load_hf_weights
from megatron_sft.model.attention import packed_seq_params
from megatron_sft.model.build import build_model
from megatron_sft.parallel import Ranks
from megatron_sft.weights import padded
from tests.unit.hf.tiny_models import tiny_folder

LENGTHS = [40, 1, 75, 12]
FAMILIES = ["gpt_oss", "gemma2", "nemotron_h-moe"]
"""Experts and sinks; soft caps; Mamba and experts."""


def step(name: str, dtype: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    """One pass over a packed row: losses [1, T], and every gradient in one, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_folder(name, Path(folder))
        model = padded(model_config_from_hf(read_hf_config(folder)), 8)
        chunk = build_model(model, ParallelConfig(), TrainConfig(params_dtype=dtype))[0]
        load_hf_weights([chunk], model, Path(folder), ranks)
    generator, here = torch.Generator().manual_seed(1), device()
    tokens, labels = torch.randint(3, model.vocab_size, (2, 1, sum(LENGTHS)), generator=generator).to(here)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(here)
    packed = packed_seq_params(torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32), max(LENGTHS), here)
    losses = chunk(tokens, positions, None, labels=labels, packed_seq_params=packed)
    losses.sum().backward()
    gradients = [p.grad.float().flatten().cpu() for p in chunk.parameters() if p.grad is not None]
    return {"losses": losses.detach().cpu(), "gradient": torch.cat(gradients)}


def main(out: str, *names: str) -> None:
    ranks = parallel.initialize(ParallelConfig(), 1)
    torch.save({name: step(name, "fp32", ranks) for name in names}, out)
    parallel.finalize()


if __name__ == "__main__":
    main(*sys.argv[1:])
