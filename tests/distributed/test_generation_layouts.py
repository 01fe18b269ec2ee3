"""Generation and MMLU's choices cut over tensor, pipeline and data-parallel ranks equal one process."""

from pathlib import Path

import pytest

from tests.gloo import run_ranks
from tests.text_models import greedy, text_model

PROMPTS = [[1, 2, 3, 4, 5], [60, 61], [9, 8, 7, 6, 5, 4, 3, 2, 1]]


def _answers(folder: str, tp: int, pp: int) -> tuple:
    from megatron_sft.core_compat import install_cpu_mode

    install_cpu_mode()
    from megatron_sft.config.options import GenerateConfig
    from megatron_sft.config.run import CheckpointConfig, DataConfig, ParallelConfig, RunConfig
    from megatron_sft.inference.generation import generate
    from megatron_sft.inference.load import load_for_inference
    from megatron_sft.tasks.mmlu import predictions

    layout = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    run = RunConfig(parallel=layout, checkpoint=CheckpointConfig(load=folder), data=DataConfig(tokenizer_model=folder))
    loaded = load_for_inference(run, frozenset())
    plain = generate(loaded.chunk, PROMPTS, GenerateConfig(osl=12, batch_size=2), (), loaded.ranks)
    drawn = generate(loaded.chunk, PROMPTS, GenerateConfig(osl=12, temperature=1.0, top_p=0.9), (), loaded.ranks)
    letters = predictions(loaded.chunk, PROMPTS, [33, 34, 35, 36], 2, loaded.ranks)
    return [answer.tokens for answer in plain], [answer.tokens for answer in drawn], letters


@pytest.mark.parametrize(("tp", "pp", "world_size"), [(2, 1, 2), (1, 2, 2), (1, 1, 2)])
def test_every_layout_gives_the_tokens_of_one_process(tp: int, pp: int, world_size: int, tmp_path: Path) -> None:
    reference = text_model("qwen3", tmp_path)
    alone = run_ranks(_answers, 1, str(tmp_path), 1, 1)[0]
    assert alone[0] == [greedy(reference, prompt, 12, []) for prompt in PROMPTS]
    for answers in run_ranks(_answers, world_size, str(tmp_path), tp, pp):
        assert answers == alone
