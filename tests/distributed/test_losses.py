"""Every kind of loss and the noise train as in one process where vocabulary, context, layers and data are cut."""

import dataclasses
from typing import Any

import pytest

from tests.distributed.layout_rig import CP2, GATHER, PP2, SHARDED, SP, TP2, Case, case, compared, folders, train_cases
from tests.gloo import run_ranks

DFT = (("loss_type", "dft"), ("label_smoothing", 0.1), ("z_loss_coeff", 1e-3))
EAFT = (("loss_type", "eaft"), ("neftune_noise_alpha", 5.0))


def costing(train: tuple[tuple[str, Any], ...], *parts: dict[str, Any], micro: int = 1) -> Case:
    return dataclasses.replace(case("qwen3", *parts, micro=micro), train=train)


ALONE = {"dft": costing(DFT), "eaft": costing(EAFT), "sft": costing(())}
CASES = {
    "dft-tp2": costing(DFT, TP2),
    "dft-cp2": costing(DFT, CP2),
    "dft-pp2": costing(DFT, PP2),
    "eaft-tp2-sp": costing(EAFT, TP2, SP),
    "eaft-cp2": costing(EAFT, CP2, GATHER),
    "eaft-pp2": costing(EAFT, PP2),
    "eaft-dp2": costing(EAFT, SHARDED, micro=2),
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return folders(tmp_path_factory.mktemp("hf"))


def test_losses_and_noise_train_as_in_one_process(hf: dict[str, str]) -> None:
    alone = run_ranks(train_cases, 1, ALONE, hf)[0]
    ranks = run_ranks(train_cases, 2, CASES, hf)
    found = {name: compared([rank[name] for rank in ranks], alone[name.split("-")[0]]) for name in CASES}
    assert {name: figures for name, figures in found.items() if not figures.within} == {}
    firsts = [alone[name].losses[0] for name in ALONE]
    assert len({round(loss, 3) for loss in firsts}) == len(firsts)
