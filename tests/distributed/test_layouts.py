"""Every layout gives the same losses, gradient norms and parameters as one process."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sft.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from tests.gloo import run_ranks

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=120,
    padded_vocab_size=128,
    max_position_embeddings=64,
    norm_epsilon=1e-6,
    qk_layernorm=True,
)
STEPS = 10


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """40 documents of 2 to 24 tokens, of which from one token to nearly all are trained."""
    random = np.random.default_rng(0)
    made = []
    for length in random.integers(2, 25, size=40):
        mask = (random.random(length) < random.choice([0.1, 0.9])).astype(np.uint8)
        mask[-1] = 1
        made.append((random.integers(0, 120, length).astype(np.int32), mask))
    return made


def fill(chunks: list[Any], model: ModelConfig, ranks: Any) -> None:
    """The same weights in every layout: each is drawn whole by its global name, then cut by the HF loader."""
    from megatron_sft.checkpoint.hf import load_hf_weights

    load_hf_weights(chunks, model, model_folder(), ranks)


def model_folder() -> str:
    import os

    return os.environ["TINY_HF"]


def train(parallel: ParallelConfig, model: ModelConfig, batch: tuple[int, int]) -> dict[str, Any]:
    """Trains STEPS steps on this rank; returns losses, gradient norms and the sum of squares of all parameters."""
    from megatron_sft.data.loader import TrainLoader
    from megatron_sft.data.packing import pack
    from megatron_sft.data.sft_dataset import SFTDataset
    from megatron_sft.data.store import MemoryStore
    from megatron_sft.model.build import build_model
    from megatron_sft.parallel import finalize, initialize
    from megatron_sft.train.optim import build_optimizer, build_scheduler, schedule_lengths, whole_parameters, wrap_ddp
    from megatron_sft.train.step import train_step

    ranks = initialize(parallel, 1)
    micro_batch_size, global_batch_size = batch
    run = RunConfig(
        model=model,
        parallel=parallel,
        train=TrainConfig(micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, train_iters=STEPS),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, lr_warmup_iters=2, clip_grad=1.0),
    )
    store = MemoryStore(documents())
    dataset = SFTDataset(store, pack(store.lengths, 32, "best-fit"), 32, 0)
    multiple = parallel.context_parallel_size * parallel.tensor_model_parallel_size
    loader = TrainLoader(dataset, run.train, dp_rank=ranks.dp_rank, dp_size=ranks.dp_size, multiple=multiple, prefetch=0)
    chunks = build_model(model, parallel, run.train)
    fill(chunks, model, ranks)
    wrapped = wrap_ddp(chunks, parallel)
    optimizer = build_optimizer(wrapped, run)
    lengths = schedule_lengths(run, len(loader), loader.num_samples)
    scheduler = build_scheduler(optimizer, run.optim, lengths)
    losses, norms = [], []
    for step in loader:
        result = train_step(wrapped, optimizer, step.micro_batches, 1, store.where)
        scheduler.step(1)
        losses.append(result.totals.loss)
        norms.append(result.grad_norm)
    with whole_parameters(wrapped, parallel):
        exported = export(wrapped, model, ranks)
    finalize()
    return {"losses": losses, "norms": norms, "parameters": exported}


def export(chunks: list[Any], model: ModelConfig, ranks: Any) -> dict[str, torch.Tensor] | None:
    """All parameters under their HF names, on rank 0."""
    import tempfile

    import torch.distributed as dist
    from safetensors.torch import load_file

    from megatron_sft.checkpoint.hf import save_hf

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    save_hf(chunks, model, folder[0] + "/hf", ranks, model_folder())
    return load_file(folder[0] + "/hf/model.safetensors") if ranks.rank == 0 else None


@pytest.fixture(scope="module")
def tiny_hf(tmp_path_factory) -> str:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hf")
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reference(tiny_hf, monkeypatch_module) -> dict[str, Any]:
    monkeypatch_module.setenv("TINY_HF", tiny_hf)
    return run_ranks(train, 1, ParallelConfig(), MODEL, (1, 4))[0]


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


LAYOUTS = {
    "cp2-a2a": (2, dict(context_parallel_size=2), (1, 4)),
    "cp2-allgather": (2, dict(context_parallel_size=2, cp_comm_type="allgather"), (1, 4)),
    "dp2": (2, dict(), (1, 4)),
    "dp2-distopt": (2, dict(use_distributed_optimizer=True), (1, 4)),
    "dp2-overlap": (2, dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True), (1, 4)),
    "mbs2": (1, dict(), (2, 4)),
    "mbs4": (1, dict(), (4, 4)),
    "tp2": (2, dict(tensor_model_parallel_size=2), (1, 4)),
    "tp2-sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True), (1, 4)),
    "pp2": (2, dict(pipeline_model_parallel_size=2), (1, 4)),
    "pp2-vpp2": (2, dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), (1, 4)),
    "tp2-pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), (1, 4)),
    "pp2-dp2": (4, dict(pipeline_model_parallel_size=2, use_distributed_optimizer=True), (1, 4)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name, reference, tiny_hf):
    world_size, layout, batch = LAYOUTS[name]
    model = dataclasses.replace(MODEL)
    result = run_ranks(train, world_size, ParallelConfig(**layout), model, batch)
    for answer in result:
        np.testing.assert_allclose(answer["losses"], reference["losses"], rtol=1e-6)
        np.testing.assert_allclose(answer["norms"], reference["norms"], rtol=1e-5)
    for key, value in reference["parameters"].items():
        torch.testing.assert_close(result[0]["parameters"][key], value, rtol=1e-5, atol=1e-6)
