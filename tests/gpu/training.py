"""A tiny model, its optimizer and its data in memory, as finetune.py builds them. Also the program of the CPU's side, which
test_training.py starts: CUDA_VISIBLE_DEVICES= python -m tests.gpu.training fp32,bf16 OUT.pt
"""

import hashlib
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_sft import parallel
from megatron_sft.config.run import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sft.data.loader import TrainLoader
from megatron_sft.data.packing import pack
from megatron_sft.data.sft_dataset import SFTDataset
from megatron_sft.data.store import MemoryStore
from megatron_sft.model.build import build_model
from megatron_sft.parallel import Ranks
from megatron_sft.train.optim import build_optimizer, build_scheduler, schedule_lengths, wrap_ddp
from megatron_sft.train.step import train_step

SEQ_LENGTH, STEPS = 128, 4
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=500,
    padded_vocab_size=512,
    max_position_embeddings=256,
    qk_layernorm=True,
    share_embeddings_and_output_weights=True,
)


@dataclass
class Training:
    """One process's model and what trains it."""

    run: RunConfig
    ranks: Ranks
    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    dataset: SFTDataset

    @classmethod
    def fresh(
        cls,
        dtype: str,
        ranks: Ranks,
        checkpoint: CheckpointConfig | None = None,
        model: ModelConfig = MODEL,
        clip_grad: float = 0.0,
        kernels: str = "auto",
    ) -> "Training":
        run = RunConfig(
            model=model,
            optim=OptimConfig(lr=1e-3, clip_grad=clip_grad, weight_decay=0.01),
            train=TrainConfig(train_iters=STEPS, params_dtype=dtype, micro_batch_size=2, global_batch_size=4, kernels=kernels),
            checkpoint=checkpoint or CheckpointConfig(),
        )
        chunks = build_model(run.model, run.parallel, run.train)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        wrapped = wrap_ddp(chunks, run.parallel)
        optimizer = build_optimizer(wrapped, run)
        scheduler = build_scheduler(optimizer, run.optim, schedule_lengths(run, STEPS, STEPS * 4))
        return cls(run, ranks, wrapped, optimizer, scheduler, packed_rows())

    def train(self, first: int, last: int) -> list[float]:
        """Iterations first..last, both included; their losses."""
        cuda = torch.cuda.is_available()
        loader = TrainLoader(self.dataset, self.run.train, consumed_samples=4 * (first - 1), pin_memory=cuda)
        losses = []
        for number, step in zip(range(first, last + 1), loader, strict=False):
            store = self.dataset.store
            result = train_step(self.chunks, self.optimizer, step.micro_batches, 1, store.where, iteration=number)
            losses.append(result.totals.loss)
            self.scheduler.step(1)
        return losses

    def gradients(self) -> torch.Tensor:
        """Of the last step, all in one, on the CPU."""
        return torch.cat([parameter.main_grad.float().flatten().cpu() for parameter in self.chunks[0].parameters()])

    def digest(self) -> str:
        """sha256 of the weights, the optimizer's states and the generators."""
        found = hashlib.sha256(torch.get_rng_state().numpy().tobytes() + torch.cuda.get_rng_state().numpy().tobytes())
        tensors = dict(self.chunks[0].named_parameters())
        for group in self.optimizer.optimizer.param_groups:
            for number, parameter in enumerate(group["params"]):
                tensors[f"master {number}"] = parameter
                tensors |= {f"{name} {number}": value for name, value in self.optimizer.optimizer.state[parameter].items()}
        for name in sorted(tensors):
            found.update(name.encode() + tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def packed_rows() -> SFTDataset:
    """40 documents of 9 to 100 random tokens, the second half of each trained."""
    random = np.random.default_rng(3)
    documents = []
    for length in random.integers(9, 101, 40):
        mask = (np.arange(length) >= length // 2).astype(np.uint8)
        documents.append((random.integers(0, MODEL.vocab_size, length, dtype=np.int32), mask))
    store = MemoryStore(documents)
    return SFTDataset(store, pack(store.lengths, SEQ_LENGTH, "best-fit"), SEQ_LENGTH, 0)


def trained(dtype: str, ranks: Ranks) -> dict[str, Any]:
    """Losses of STEPS steps, and the gradient of the first."""
    training = Training.fresh(dtype, ranks)
    losses = training.train(1, 1)
    gradient = training.gradients()
    return {"losses": [*losses, *training.train(2, STEPS)], "gradient": gradient}


def main(dtypes: str, out: str) -> None:
    ranks = parallel.initialize(ParallelConfig(), 1)
    torch.save({dtype: trained(dtype, ranks) for dtype in dtypes.split(",")}, out)
    parallel.finalize()


if __name__ == "__main__":
    main(*sys.argv[1:])
