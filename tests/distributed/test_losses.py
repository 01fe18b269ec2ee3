"""Every kind of loss and the noise train as in one process where vocabulary, context, layers and data are cut."""

import dataclasses
from typing import Any

from tests.distributed.layout_rig import (
    CP2,
    GATHER,
    PP2,
    SHARDED,
    SP,
    TP2,
    Case,
    against_one_process,
    case,
)

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


def test_losses_and_noise_train_as_in_one_process(hf: dict[str, str]) -> None:
    alone, _, beyond = against_one_process(ALONE, CASES, hf)
    assert beyond == {}
    firsts = [alone[name].losses[0] for name in ALONE]
    assert len({round(loss, 3) for loss in firsts}) == len(firsts)
