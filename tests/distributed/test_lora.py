"""Adapters train in every layout as in one process, and nothing else changes by a bit; tests/soak/lora_layouts.py has all."""

from typing import Any

import pytest

from tests.distributed.lora_rig import ALONE, CASES, EVERY, faults, folders, frozen_tables, same_alone, train_cases
from tests.gloo import run_ranks

CHOSEN = {
    name: CASES[name]
    for name in (
        "tp2-sp-recompute",
        "tied-pp2",
        "cp2",
        "dp2-overlaps",
        "some-tp2-sp",
        "dora-tp2-sp",
        "ends-tp2-sp",
        "norm-after-tp2-sp",
        "moe-tp2-sp-ep1-etp1",
        "moe-tp2-sp-etp2",
        "mla-tp2-sp",
    )
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return folders(tmp_path_factory.mktemp("hf"), sorted({case.model for case in CHOSEN.values()}))


@pytest.fixture(scope="module")
def alone(hf: dict[str, str]) -> dict[str, Any]:
    return run_ranks(train_cases, 1, {name: ALONE[name] for name in map(same_alone, CHOSEN.values())}, hf)[0]


def test_layouts_equal_one_process(alone: dict[str, Any], hf: dict[str, str]) -> None:
    assert all(outcome.base_kept for outcome in alone.values())
    ranks = run_ranks(train_cases, 2, CHOSEN, hf)
    found = {name: faults([rank[name] for rank in ranks], alone[same_alone(case)]) for name, case in CHOSEN.items()}
    assert {name: texts for name, texts in found.items() if texts} == {}


def test_the_trained_parameters_are_those_of_the_formula(alone: dict[str, Any]) -> None:
    """64 wide, 4 heads of 32 in 2 groups, 96 in the MLP; rank 4; 4 layers."""
    widths = [(64, 128), (64, 64), (64, 64), (128, 64), (64, 96), (64, 96), (96, 64)]
    assert alone["qwen3"].trained == 4 * sum(EVERY.lora_rank * (a + b) for a, b in widths)
    assert alone["qwen3 some"].trained == 4 * 3 * sum(a + b for a, b in (widths[0], widths[2], widths[3], widths[5]))


def test_a_pattern_for_the_embedding_means_both_copies_of_a_tied_table(hf: dict[str, str]) -> None:
    first, last = run_ranks(frozen_tables, 2, hf["llama-tied"])
    assert list(first.values()) == list(last.values()) == [False, False, True]
    assert all(name.startswith("embedding.word_embeddings.weight") for name in first)
    assert all(name.startswith("output_layer.weight") for name in last)
