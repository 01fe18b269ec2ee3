"""Generation of every family against transformers: alone, and batched with prompts of other lengths."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_sft import parallel
from megatron_sft.config.options import GenerateConfig
from megatron_sft.config.run import ParallelConfig, TrainConfig
from megatron_sft.hf.config import model_config_from_hf, read_hf_config
from megatron_sft.hf.weights import load_hf_weights
from megatron_sft.inference.generation import generate
from megatron_sft.model.build import build_model
from tests.text_models import greedy
from tests.unit.hf.tiny_models import KEYS, tiny_folder


@pytest.fixture(scope="module")
def ranks() -> Any:
    yield parallel.initialize(ParallelConfig(), 1)
    parallel.finalize()


@pytest.mark.parametrize("name", KEYS)
def test_greedy_tokens_of_every_family_equal_transformers(name: str, tmp_path: Path, ranks: Any) -> None:
    """Answers go past windows, chunks, temperature steps and longrope's original length."""
    reference = tiny_folder(name, tmp_path, num_layers=4 if name.startswith("nemotron_h") else 2)  # with attention
    model = model_config_from_hf(read_hf_config(tmp_path))
    model = dataclasses.replace(model, padded_vocab_size=model.vocab_size)
    chunk = build_model(model, ParallelConfig(), TrainConfig())[0]
    load_hf_weights([chunk], model, tmp_path, ranks)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [60, 61, 62]]
    expected = [greedy(reference, prompt, 8, []) for prompt in prompts]
    for batch_size in (1, 2):
        answers = generate([chunk], prompts, GenerateConfig(osl=8, batch_size=batch_size), (), ranks)
        assert [answer.tokens for answer in answers] == expected
