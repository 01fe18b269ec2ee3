"""A tiny GPTModel and megatron-core optimizer for checkpoint tests, with training that needs no data.

Every gradient is a function of the parameter and the iteration alone, element by element, so that any layout computes
the same training, and weights and moments of two layouts must be equal bit for bit.
"""

import dataclasses
import hashlib
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_sft.checkpoint import torch_dist
from megatron_sft.checkpoint.state import content_metadata, model_state
from megatron_sft.config.run import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sft.parallel import Ranks, initialize

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=64,
    padded_vocab_size=64,
    max_position_embeddings=64,
    share_embeddings_and_output_weights=False,
)


@dataclasses.dataclass
class Rig:
    """One process's part of a training."""

    run: RunConfig
    ranks: Ranks
    chunks: list[Any]
    optimizer: Any
    scheduler: Any

    @torch.no_grad()
    def train(self, first: int, last: int) -> None:
        """Iterations first..last, both included."""
        for iteration in range(first, last + 1):
            self.optimizer.zero_grad()
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
                for parameter in chunk.parameters():
                    parameter.main_grad.copy_(torch.sin(parameter.float() * 50 + iteration))
            self.optimizer.step()
            self.scheduler.step(1)
            torch.rand(1)

    def digest(self) -> str:
        """sha256 of this process's weights, optimizer state, scheduler and generator."""
        found = hashlib.sha256()
        for chunk in self.chunks:
            for name, parameter in sorted(chunk.named_parameters()):
                found.update(name.encode() + compacted(parameter))
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            for group in part.optimizer.param_groups:
                found.update(str((group.get("step"), group["lr"])).encode())
                for parameter in group["params"]:
                    state = part.optimizer.state[parameter]
                    found.update(compacted(parameter))
                    for name in sorted(key for key in state if torch.is_tensor(state[key])):
                        found.update(name.encode() + compacted(state[name]))
        found.update(str(self.scheduler.state_dict()).encode())
        found.update(torch.get_rng_state().numpy().tobytes())
        return found.hexdigest()

    def core_state(self, is_loading: bool) -> dict[str, Any]:
        """Sharded state dict of model and optimizer as megatron-core makes it by itself, states of all ranks gathered."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {**content_metadata(self.run.parallel.use_distributed_optimizer), "dp_cp_group": group}
        models = model_state(self.chunks, metadata)
        return {**models, "optimizer": self.optimizer.sharded_state_dict(dict(models), is_loading=is_loading, metadata=metadata)}

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole tensors of the model and the optimizer, on rank 0 of a run without model parallelism; layers can share a key."""
        leaves = enumerate(torch_dist._leaves(self.core_state(is_loading=False)))
        return {f"{t.key} {n}": t.data.detach().clone() for n, t in leaves if hasattr(t, "data") and torch.is_tensor(t.data)}


def compacted(tensor: torch.Tensor) -> bytes:
    return torch_dist.compact(tensor).reshape(-1).view(torch.uint8).numpy().tobytes()


def build(
    parallel: ParallelConfig, checkpoint: CheckpointConfig | None = None, dtype: str = "fp32", core: Any = None, **model: Any
) -> Rig:
    """Builds the rig for a layout; weights differ from seed to seed of torch's generator, set here."""
    from megatron_sft.model.build import DTYPES
    from megatron_sft.train.optim import build_optimizer, build_scheduler, schedule_lengths, wrap_ddp

    ranks = initialize(parallel, 1234)
    run = RunConfig(
        model=dataclasses.replace(MODEL, **model).with_core(core or {}),
        parallel=parallel,
        optim=OptimConfig(lr=1e-2, clip_grad=0.0, weight_decay=0.01),
        train=TrainConfig(train_iters=100, params_dtype=dtype),
        checkpoint=checkpoint or CheckpointConfig(),
    )
    torch.manual_seed(7)
    chunks = wrap_ddp(_models(run, DTYPES[dtype], ranks), parallel)
    optimizer = build_optimizer(chunks, run)
    return Rig(run, ranks, chunks, optimizer, build_scheduler(optimizer, run.optim, schedule_lengths(run, 100, 100)))


def build_ours(parallel: ParallelConfig, folder: str, dtype: str) -> Rig:
    """The rig with our own model of an HF folder, as a run builds it; its weights are the folder's."""
    from megatron_sft.hf.config import model_config_from_hf, read_hf_config
    from megatron_sft.hf.weights import load_hf_weights
    from megatron_sft.model.build import build_model
    from megatron_sft.train.optim import build_optimizer, build_scheduler, schedule_lengths, wrap_ddp
    from megatron_sft.weights import padded

    ranks = initialize(parallel, 1234)
    run = RunConfig(
        model=padded(model_config_from_hf(read_hf_config(folder)), 8),
        parallel=parallel,
        optim=OptimConfig(lr=1e-2, clip_grad=0.0, weight_decay=0.01),
        train=TrainConfig(train_iters=100, params_dtype=dtype),
    )
    models = build_model(run.model, parallel, run.train)
    load_hf_weights(models, run.model, folder, ranks)
    chunks = wrap_ddp(models, parallel)
    optimizer = build_optimizer(chunks, run)
    return Rig(run, ranks, chunks, optimizer, build_scheduler(optimizer, run.optim, schedule_lengths(run, 100, 100)))


def _models(run: RunConfig, dtype: torch.dtype, ranks: Ranks) -> list[Any]:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    model, parallel = run.model, run.parallel
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        use_cpu_initialization=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **model.core_fields(),
    )
    stages = parallel.virtual_pipeline_model_parallel_size
    models = []
    for stage in range(stages or 1):
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", num_experts=model.moe.num_moe_experts)
        chunk = GPTModel(
            config,
            spec,
            vocab_size=model.padded_vocab_size,
            max_sequence_length=64,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            pre_process=ranks.is_first_stage and stage == 0,
            post_process=ranks.pp_rank == ranks.pp_size - 1 and stage == (stages or 1) - 1,
            vp_stage=stage if stages else None,
        )
        models.append(Float16Module(config, chunk) if dtype == torch.bfloat16 else chunk)
    return models
