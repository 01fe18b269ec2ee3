"""A checkpoint whose embedding has an odd number of rows is continued with another tensor-parallel size, and back."""

from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_sft.checkpoint.distributed import load_checkpoint, save_checkpoint
from megatron_sft.config.run import ModelConfig, ParallelConfig
from megatron_sft.parallel import finalize
from megatron_sft.weights import padded
from tests.distributed.checkpoint_rig import build
from tests.gloo import run_ranks

VOCAB_SIZE = 61
MOMENT = "optimizer.state.exp_avg."
DP2 = {"use_distributed_optimizer": True}
TP2 = {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}


def _there_and_back(root: str) -> tuple[list[int], list[str]]:
    """Trains with 61 rows, resumes with TP2, resumes without; rows of each, and the tensors that differ at the end."""
    rows, model = [], ModelConfig(vocab_size=VOCAB_SIZE, padded_vocab_size=VOCAB_SIZE)
    before: dict[str, torch.Tensor] = {}
    for number, layout in enumerate((DP2, TP2, DP2)):
        model = padded(model, layout.get("tensor_model_parallel_size", 1))
        rows.append(model.padded_vocab_size)
        rig = build(ParallelConfig(**layout), vocab_size=VOCAB_SIZE, padded_vocab_size=model.padded_vocab_size)
        if number:
            load_checkpoint(f"{root}/{number - 1}", rig.chunks, rig.optimizer, rig.scheduler, rig.ranks)
        else:
            rig.train(1, 2)
            before = rig.weights()
        save_checkpoint(f"{root}/{number}", 2, rig.chunks, rig.optimizer, rig.scheduler, {}, rig.run, rig.ranks)
        after = rig.weights() if number == 2 else {}
        parallel_state.destroy_model_parallel()
    finalize()
    assert after.keys() == before.keys()
    assert {key.split()[0] for key in after if len(after[key]) == 62} >= {f"{kind}output_layer.weight" for kind in ("", MOMENT)}
    return rows, [key for key, tensor in after.items() if not torch.equal(tensor[:VOCAB_SIZE], before[key][:VOCAB_SIZE])]


def test_odd_vocabulary_goes_through_two_tensor_parallel_ranks(tmp_path: Path) -> None:
    assert run_ranks(_there_and_back, 2, str(tmp_path)) == [([61, 62, 62], [])] * 2
