"""At least 20 layouts beside one process: losses, gradient norms and parameters after 10 steps, fp32 over gloo.

    python tests/soak/layouts.py [--only NAME ...]

Rows, models and bars are those of tests/distributed/layout_rig.py. Exits with 1 when a layout is over a bar.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sft.config import ParallelConfig
from tests.distributed.layout_rig import (
    LOSS_BAR,
    NORM_BAR,
    PARAMETER_BAR,
    Case,
    compared,
    folders,
    train_cases,
)
from tests.gloo import run_ranks

TP2, TP4, PP2, PP4, CP2, CP4, EP2, EP4 = (
    {f"{kind}_parallel_size": size}
    for kind, size in (
        ("tensor_model", 2), ("tensor_model", 4), ("pipeline_model", 2), ("pipeline_model", 4), ("context", 2), ("context", 4),
        ("expert_model", 2), ("expert_model", 4),
    )
)  # fmt: skip
SP, GATHER, VPP2 = {"sequence_parallel": True}, {"cp_comm_type": "allgather"}, {"virtual_pipeline_model_parallel_size": 2}
ETP2, SHARDED = {"expert_tensor_parallel_size": 2}, {"use_distributed_optimizer": True}
OVERLAPS = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
PP3 = {"pipeline_model_parallel_size": 3}
UNEVEN = {**PP3, "decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 1}
FIRST_HEAVY = {**PP3, "decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 1}


def case(model: str, *parts: dict[str, Any], micro: int = 1) -> Case:
    fields: dict[str, Any] = {}
    for part in parts:
        fields |= part
    return Case(model, ParallelConfig(**fields), micro)


MICRO = {f"accumulation-{8 // size}": case("qwen3", micro=size) for size in (1, 2, 4, 8)}
CASES: dict[int, dict[str, Case]] = {
    1: {"llama-tied": case("llama-tied"), "qwen3_moe": case("qwen3_moe"), "deepseek_v3": case("deepseek_v3"), **MICRO},
    2: {
        "dp2": case("qwen3"),
        "dp2-accumulation2": case("qwen3", micro=2),
        "dp2-distopt": case("qwen3", SHARDED),
        "dp2-overlaps": case("qwen3", OVERLAPS),
        "tp2": case("llama-tied", TP2),
        "tp2-sp": case("qwen3", TP2, SP),
        "pp2": case("llama-tied", PP2),
        "pp2-vpp2": case("qwen3", PP2, VPP2),
        "cp2-a2a": case("qwen3", CP2),
        "cp2-allgather": case("qwen3", CP2, GATHER),
        "moe-dp2": case("qwen3_moe"),
        "moe-ep2": case("qwen3_moe", EP2),
        "moe-cp2": case("qwen3_moe", CP2),
        "moe-tp2-sp": case("qwen3_moe", TP2, SP),
        "shared-tp2-sp-ep2": case("deepseek_v3", TP2, SP, EP2),
        "shared-tp2-sp-etp2": case("deepseek_v3", TP2, SP, ETP2),
        "shared-pp2-ep1": case("deepseek_v3", PP2),
    },
    3: {
        "pp3-1-2-1": case("llama-tied", UNEVEN),
        "pp3-2-1-1": case("qwen3", FIRST_HEAVY),
        "shared-pp3-1-2-1": case("deepseek_v3", UNEVEN),
    },
    4: {
        "tp2-pp2": case("llama-tied", TP2, PP2),
        "tp2-sp-dp2-distopt": case("qwen3", TP2, SP, SHARDED),
        "tp4-sp": case("qwen3", TP4, SP),
        "pp4": case("llama-tied", PP4),
        "pp2-vpp2-dp2-overlaps": case("qwen3", PP2, VPP2, OVERLAPS),
        "cp2-dp2-distopt": case("qwen3", CP2, SHARDED),
        "cp4-a2a": case("qwen3", CP4),
        "cp4-allgather": case("qwen3", CP4, GATHER),
        "tp2-sp-cp2": case("qwen3", TP2, SP, CP2),
        "pp2-cp2-allgather": case("llama-tied", PP2, CP2, GATHER),
        "moe-ep4": case("qwen3_moe", EP4),
        "moe-ep2-cp2": case("qwen3_moe", EP2, CP2),
        "moe-tp2-sp-pp2-etp2": case("qwen3_moe", TP2, SP, PP2, ETP2),
        "shared-tp2-sp-ep2-etp2": case("deepseek_v3", TP2, SP, EP2, ETP2, SHARDED),
        "shared-pp2-ep2-overlaps": case("deepseek_v3", PP2, EP2, OVERLAPS),
    },
    6: {
        "pp3-1-2-1-dp2": case("llama-tied", UNEVEN, OVERLAPS),
        "pp3-2-1-1-tp2-sp": case("qwen3", FIRST_HEAVY, TP2, SP),
    },
    8: {
        "dp8-overlaps": case("qwen3", OVERLAPS),
        "tp2-pp2-dp2": case("llama-tied", TP2, PP2),
        "tp2-sp-pp2-vpp2-dp2-overlaps": case("qwen3", TP2, SP, PP2, VPP2, OVERLAPS),
        "tp2-sp-pp2-cp2": case("qwen3", TP2, SP, PP2, CP2),
        "tp2-sp-cp2-dp2-distopt": case("qwen3", TP2, SP, CP2, GATHER, SHARDED),
        "moe-tp2-sp-pp2-ep2": case("qwen3_moe", TP2, SP, PP2, EP2, SHARDED),
        "shared-tp2-sp-pp2-ep2-etp2": case("deepseek_v3", TP2, SP, PP2, EP2, ETP2),
        "shared-cp2-ep4-dp4": case("deepseek_v3", CP2, EP4, SHARDED),
    },
}
REFERENCES = {"qwen3": "accumulation-8"}
"""A model's case of one process, where its name is another."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="layouts; all without it")
    only = parser.parse_args().only
    os.environ["PYTHONWARNINGS"] = "ignore"
    over, count, began = [], 0, time.monotonic()
    print(f"{'processes':>9}  {'layout':30}{'loss':>9}{'norm':>9}{'parameters':>11}{'ragged':>8}{'empty':>6}  worst parameter")
    with tempfile.TemporaryDirectory() as root:
        hf = folders(Path(root))
        alone = run_ranks(train_cases, 1, CASES[1], hf, timeout_s=600)[0]
        for size, cases in CASES.items():
            wanted = {name: value for name, value in cases.items() if not only or name in only}
            if not wanted:
                continue
            ranks = [alone] if size == 1 else run_ranks(train_cases, size, wanted, hf, timeout_s=1200)
            for name, value in wanted.items():
                reference = alone[REFERENCES.get(value.model, value.model)]
                found = compared([rank[name] for rank in ranks], reference)
                over += [] if found.within else [name]
                count += size > 1 or value.micro_batch_size > 1
                print(
                    f"{size:>9}  {name:30}{found.loss:>9.1e}{found.norm:>9.1e}{found.parameter:>11.1e}{found.spread:>7.0f}x"
                    f"{found.empty_parts:>6}  {found.parameter_name}{'' if found.within else '  OVER'}",
                    flush=True,
                )
    print(
        f"{count} layouts and splits in {time.monotonic() - began:.0f} s; bars: loss {LOSS_BAR:g}, gradient norm {NORM_BAR:g}, "
        f"parameters {PARAMETER_BAR:g}; over: {', '.join(over) or 'none'}"
    )
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
