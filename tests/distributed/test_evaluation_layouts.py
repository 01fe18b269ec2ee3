"""A model that is asked after each step of its training answers as in one process, and is trained as if nobody had asked."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.distributed.layout_rig import CASES, Case, Outcome, train
from tests.gloo import run_ranks

PROMPTS = [[5, 6, 7, 8, 9, 10], [60, 61], [99, 3, 4]]
ALONE = {"qwen3": CASES[1]["accumulation-8"], "qwen3_moe": CASES[1]["qwen3_moe"]}
LAYOUTS = {name: CASES[2][name] for name in ("tp2-sp", "pp2-vpp2", "cp2-a2a", "dp2-overlaps", "moe-ep2")}
Answers = list[tuple[list[int], list[tuple[float, bool]], list[list[int]]]]


def _asked(cases: dict[str, Case], hf: dict[str, str]) -> dict[str, tuple[Outcome, Outcome, Answers]]:
    """Of each case: what became of it when nobody asked, when somebody did, and the answers after each step."""
    from megatron.core import parallel_state

    from megatron_sft.config.options import GenerateConfig
    from megatron_sft.inference.generation import generate
    from megatron_sft.parallel import finalize, initialize
    from megatron_sft.tasks.answers import greedy_likelihoods, predictions

    outcomes = {}
    for name, case in cases.items():
        case = dataclasses.replace(case, steps=3)
        ranks, answers = initialize(case.parallel, 1), []

        def ask(chunks: list[Any], ranks: Any = ranks, answers: Answers = answers) -> None:
            letters = predictions(chunks, PROMPTS, [33, 34, 35, 36], 2)
            values = greedy_likelihoods(chunks, PROMPTS, [3, 1, 2], 2)
            generate(chunks, PROMPTS, GenerateConfig(osl=4, temperature=1.0), (), ranks)
            texts = generate(chunks, PROMPTS, GenerateConfig(osl=6, batch_size=2), (), ranks)
            answers.append((letters, values, [text.tokens for text in texts]))

        plain = train(case, ranks, hf[case.model])
        outcomes[name] = plain, train(case, ranks, hf[case.model], ask), answers
        parallel_state.destroy_model_parallel()
    finalize()
    return outcomes


@pytest.fixture(scope="module")
def outcomes(hf: dict[str, str]) -> tuple[Any, list[Any]]:
    """Of one process, and of each of two ranks."""
    return run_ranks(_asked, 1, ALONE, hf)[0], run_ranks(_asked, 2, LAYOUTS, hf)


@pytest.mark.parametrize("name", LAYOUTS)
def test_who_is_asked_is_trained_the_same_and_answers_as_alone(name: str, outcomes: Any) -> None:
    alone, ranks = outcomes
    for rank in ranks:
        plain, with_questions, answers = rank[name]
        assert (plain.losses, plain.norms) == (with_questions.losses, with_questions.norms)
        for key, tensor in (plain.parameters or {}).items():
            assert torch.equal(tensor, with_questions.parameters[key]), key
        expected = alone[LAYOUTS[name].model][2]
        assert len(answers) == len(expected) == 3
        for (letters, values, tokens), (one_letters, one_values, one_tokens) in zip(answers, expected, strict=True):
            assert (letters, tokens) == (one_letters, one_tokens)
            assert [hits for _, hits in values] == [hits for _, hits in one_values]
            assert [value for value, _ in values] == pytest.approx([value for value, _ in one_values], abs=1e-4)
