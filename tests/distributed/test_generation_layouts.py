"""Generation and MMLU's choices in every layout that trains equal one process's, which equal transformers'."""

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.gloo import run_ranks
from tests.text_models import greedy, text_model

PROMPTS = [[1, 2, 3, 4, 5], [60, 61], [9, 8, 7, 6, 5, 4, 3, 2, 1]]
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "DP2": ("qwen3", 2, {}),
    "TP2": ("qwen3", 2, {"tensor_model_parallel_size": 2}),
    "TP2, SP": ("qwen3", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": ("qwen3", 2, {"pipeline_model_parallel_size": 2}),
    "PP2, VPP2": ("qwen3", 2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "CP2": ("qwen3", 2, {"context_parallel_size": 2}),
    "EP2": ("qwen3_moe", 2, {"expert_model_parallel_size": 2}),
    "TP2, SP, EP2": (
        "qwen3_moe",
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
    ),
}


def _answers(folder: str, layout: dict[str, Any]) -> tuple:
    from megatron_sft.core_compat import install_cpu_mode

    install_cpu_mode()
    from megatron_sft.config.options import GenerateConfig
    from megatron_sft.config.run import CheckpointConfig, DataConfig, ParallelConfig, RunConfig
    from megatron_sft.inference.generation import generate
    from megatron_sft.inference.load import load_for_inference
    from megatron_sft.tasks.answers import predictions

    parallel = ParallelConfig(**layout)
    run = RunConfig(parallel=parallel, checkpoint=CheckpointConfig(load=folder), data=DataConfig(tokenizer_model=folder))
    loaded = load_for_inference(run, frozenset())
    for chunk in loaded.chunks:
        chunk.train()  # as in the middle of training
    plain = generate(loaded.chunks, PROMPTS, GenerateConfig(osl=12, batch_size=2, logprobs=True), (), loaded.ranks)
    options = GenerateConfig(osl=12, temperature=1.0, top_p=0.9, num_samples=2)
    drawn = generate(loaded.chunks, PROMPTS, options, (), loaded.ranks)
    letters = predictions(loaded.chunks, PROMPTS, [33, 34, 35, 36], 2)
    assert all(chunk.training for chunk in loaded.chunks)
    return [answer.tokens for answer in plain], [answer.tokens for answer in drawn], letters, [a.logprobs for a in plain]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a family: the folder and what one process answers."""

    @functools.cache
    def of(family: str) -> tuple[Path, tuple]:
        folder = tmp_path_factory.mktemp(family)
        reference = text_model(family, folder)
        answers = run_ranks(_answers, 1, str(folder), {})[0]
        assert answers[0] == [greedy(reference, prompt, 12, []) for prompt in PROMPTS]
        return folder, answers

    return of


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_tokens_of_one_process(name: str, alone: Any) -> None:
    family, world_size, layout = LAYOUTS[name]
    folder, expected = alone(family)
    for answers in run_ranks(_answers, world_size, str(folder), layout):
        assert answers[:3] == expected[:3]
        for ours, theirs in zip(answers[3], expected[3], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
