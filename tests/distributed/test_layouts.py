"""A few layouts of every kind give the losses, gradient norms and parameters of one process; tests/soak/layouts.py has all."""

from typing import Any

import pytest

from tests.distributed.layout_rig import CASES, REFERENCES, compared, train_cases
from tests.gloo import run_ranks

CHOSEN = {
    1: ("accumulation-8", "accumulation-2", "llama-tied", "qwen3_moe", "deepseek_v3"),
    2: ("dp2-overlaps", "pp2-vpp2", "cp2-allgather", "moe-cp2", "moe-tp2-sp"),
    4: ("tp2-pp2", "pp2-dp2-overlaps", "shared-tp2-sp-ep2-etp2", "shared-pp2-ep2-overlaps"),
}


@pytest.fixture(scope="module")
def alone(hf) -> dict[str, Any]:
    return run_ranks(train_cases, 1, {name: CASES[1][name] for name in CHOSEN[1]}, hf)[0]


@pytest.mark.parametrize("size", CHOSEN)
def test_layouts_equal_one_process(size, alone, hf):
    cases = {name: CASES[size][name] for name in CHOSEN[size]}
    ranks = [alone] if size == 1 else run_ranks(train_cases, size, cases, hf)
    found = {
        name: compared([rank[name] for rank in ranks], alone[REFERENCES.get(case.model, case.model)])
        for name, case in cases.items()
    }
    assert {name: figures for name, figures in found.items() if not figures.within} == {}
    assert all(figures.empty_parts > 0 for figures in found.values())
    assert all(figures.spread >= 10 for name, figures in found.items() if "dp2" in name)


def test_a_step_without_any_trained_token_is_zero_and_finite(alone):
    outcome = alone["qwen3_moe"]
    assert outcome.trained[2] == 0 and outcome.losses[2] == outcome.norms[2] == 0.0
    assert all(0 < loss < 10 for number, loss in enumerate(outcome.losses) if outcome.trained[number])
