"""Trains tiny models in any layout on rows whose trained tokens are ragged, and compares with one process.

36 packs of 12 to 32 tokens in 1 to 4 documents; 8 packs a step, 4 in the last step of an epoch, 10 steps: two epochs.
Packs at even places of a rank's hand are nearly all trained, others have one trained token or none, and one step of an
epoch has none at all: data-parallel ranks differ by far more than 10x, and micro-batches, context-parallel ranks and
a global batch without any trained token are met. Used by test_layouts.py and by tests/soak/layouts.py.

The learning rate, 1e-4, is at the upper end of full fine-tuning. Adam turns rounding in the gradient of an element that nearly
cancels into a step of up to the learning rate: at 1e-3 one element of one embedding table is 1.5e-5 of its greatest off after
10 steps while losses are 1e-7 and gradient norms 7e-7 off. A gradient that is missing or scaled shows as 1e-2 in the norms.
"""

import dataclasses
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_sft.config.run import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from tests.gloo import run_ranks
from tests.unit.hf.tiny_models import tiny_folder

STEPS, STEP_PACKS, NUM_PACKS, SEQ_LENGTH = 10, 8, 36, 32
LOSS_BAR, NORM_BAR, PARAMETER_BAR = 1e-6, 1e-5, 1e-5
MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {},
    "qwen3": {},
    "qwen3_moe": {"moe_aux_loss_coeff": 0.05, "moe_z_loss_coeff": 0.01},
    "deepseek_v3": {},
}
"""Families of tiny_models.py and fields of megatron-core's configuration: dense, tied and not; experts with a loss of
their own; latent attention with shared experts, groups of experts and expert biases."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout to train in."""

    model: str
    parallel: ParallelConfig = ParallelConfig()
    micro_batch_size: int = 1
    frozen: str = ""
    """Parameters that are not trained: a regular expression for their names, layers counted over the whole model."""
    train: tuple[tuple[str, Any], ...] = ()
    """Other fields of TrainConfig."""
    optim: tuple[tuple[str, Any], ...] = ()
    """Other fields of OptimConfig."""
    muon_dtype: torch.dtype = torch.bfloat16
    """Of its iteration (train/muon.py:MixedOptimizer)."""
    steps: int = STEPS


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a rank has after its case's steps."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, torch.Tensor] | None
    """Under their HF names, on rank 0."""
    trained: list[int]
    """Trained tokens of this data-parallel rank, a step."""
    empty_parts: int
    """Micro-batches of which this context-parallel rank trains no token."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """How far a layout is from one process."""

    loss: float
    """Greatest relative difference of a step's loss, over ranks."""
    norm: float
    """Greatest relative difference of a step's gradient norm, over ranks."""
    parameter: float
    """Greatest difference of an element at the end, relative to the greatest element of its tensor."""
    parameter_name: str
    spread: float
    """Most trained tokens of a data-parallel rank in a step / fewest (at least 1) of another."""
    empty_parts: int

    @property
    def within(self) -> bool:
        return self.loss <= LOSS_BAR and self.norm <= NORM_BAR and self.parameter <= PARAMETER_BAR


def packs() -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """NUM_PACKS lists of documents (tokens, mask)."""
    random = np.random.default_rng(0)
    made = []
    for number in range(NUM_PACKS):
        ends = np.sort(random.choice(np.arange(1, 12), random.integers(0, 4), replace=False))
        lengths = np.diff([0, *ends, random.integers(12, 33)])
        place, step = number % STEP_PACKS, number // STEP_PACKS
        kind = "none" if step == 2 else "all" if place in (0, 3, 4, 7) else "none" if place == 5 else "one"
        tokens = [random.integers(3, 131, length).astype(np.int32) for length in lengths]
        masks = [(random.random(length) < (0.95 if kind == "all" else 0.0)).astype(np.uint8) for length in lengths]
        if kind == "one":
            masks[-1][-1] = 1
        made.append(list(zip(tokens, masks, strict=True)))
    return made


def folders(root: Path) -> dict[str, str]:
    """HF folders of MODELS below root."""
    for name in MODELS:
        tiny_folder(name, root / name)
    return {name: str(root / name) for name in MODELS}


def train_cases(cases: dict[str, Case], hf: dict[str, str]) -> dict[str, Outcome]:
    """Every case, one after another, in this process group."""
    from megatron.core import parallel_state

    from megatron_sft.parallel import finalize, initialize

    outcomes = {}
    for name, case in cases.items():
        ranks = initialize(case.parallel, 1)
        outcomes[name] = train(case, ranks, hf[case.model])
        parallel_state.destroy_model_parallel()
    finalize()
    return outcomes


def train(case: Case, ranks: Any, folder: str, asks: Callable[[list[Any]], None] | None = None) -> Outcome:
    """The case's steps from the weights of `folder`; after each one the whole chunks may be asked something."""
    from megatron_sft.checkpoint.background import torch_optimizers
    from megatron_sft.hf.weights import load_hf_weights
    from megatron_sft.model.build import build_model
    from megatron_sft.model.context import shard_tokens
    from megatron_sft.train.muon import MixedOptimizer
    from megatron_sft.train.optim import build_optimizer, build_scheduler, schedule_lengths, whole_parameters, wrap_ddp
    from megatron_sft.train.step import Noise, train_step

    model, parallel = model_of(case.model, folder), case.parallel
    run = RunConfig(
        model=model,
        parallel=parallel,
        train=TrainConfig(
            micro_batch_size=case.micro_batch_size, global_batch_size=STEP_PACKS, train_iters=case.steps, **dict(case.train)
        ),
        optim=OptimConfig(**{"lr": 1e-4, "min_lr": 1e-5, "lr_warmup_iters": 2, "clip_grad": 1.0, **dict(case.optim)}),
    )
    loader = loader_of(run, ranks)
    chunks = build_model(model, parallel, run.train)
    load_hf_weights(chunks, model, folder, ranks)
    freeze(chunks, case.frozen)
    wrapped = wrap_ddp(chunks, parallel)
    optimizer = build_optimizer(wrapped, run)
    for inner in torch_optimizers(optimizer):
        if isinstance(inner, MixedOptimizer):
            inner.iteration_dtype = case.muon_dtype
    scheduler = build_scheduler(optimizer, run.optim, schedule_lengths(run, len(loader), loader.num_samples))
    outcome = Outcome([], [], None, [], 0)
    alpha = run.train.neftune_noise_alpha
    for number, step in enumerate(loader):
        noise = Noise(alpha, 1, number) if alpha else None
        result = train_step(wrapped, optimizer, step.micro_batches, 1, str, noise=noise)
        scheduler.step(1)
        outcome.losses.append(result.totals.loss)
        outcome.norms.append(result.grad_norm)
        outcome.trained.append(int(sum(batch.loss_mask.sum() for batch in step.micro_batches)))
        empty = sum(not shard_tokens(batch.loss_mask).any() for batch in step.micro_batches)
        outcome = dataclasses.replace(outcome, empty_parts=outcome.empty_parts + empty)
        if asks is not None:
            with whole_parameters(wrapped, parallel):
                asks(wrapped)
    with whole_parameters(wrapped, parallel):
        return dataclasses.replace(outcome, parameters=exported(wrapped, model, ranks, folder))


def freeze(chunks: list[Any], names: str) -> None:
    """Parameters whose name, with its layer's number in the whole model, matches get no gradient and no update."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            local = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
            if local:
                name = f"decoder.layers.{chunk.decoder.layers[int(local[1])].layer_number - 1}.{local[2]}"
            if names and re.match(names, name):
                parameter.requires_grad_(False)


def model_of(name: str, folder: str) -> ModelConfig:
    from megatron_sft.hf.config import model_config_from_hf, read_hf_config
    from megatron_sft.weights import padded

    model = padded(model_config_from_hf(read_hf_config(folder)), 8)
    return model.with_core(MODELS.get(name, {}))


def loader_of(run: RunConfig, ranks: Any) -> Any:
    """The packs of this data-parallel rank, in their order."""
    from megatron_sft.data.loader import TrainLoader
    from megatron_sft.data.packing import PackPlan
    from megatron_sft.data.sft_dataset import SFTDataset
    from megatron_sft.data.store import MemoryStore

    rows, layout = packs(), run.parallel
    documents = [document for row in rows for document in row]
    plan = PackPlan(np.arange(len(documents)), np.cumsum([0, *map(len, rows)]))
    multiple = layout.context_parallel_size * (layout.tensor_model_parallel_size if layout.sequence_parallel else 1)
    return TrainLoader(
        SFTDataset(MemoryStore(documents), plan, SEQ_LENGTH, 0),
        run.train,
        shuffle=False,
        prefetch=0,
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
        multiple=multiple,
    )


def exported(chunks: list[Any], model: ModelConfig, ranks: Any, folder: str) -> dict[str, torch.Tensor] | None:
    """All parameters under their HF names, on rank 0."""
    from megatron_sft.hf.exporter import save_hf

    with tempfile.TemporaryDirectory() as root:
        shared = [root]
        dist.broadcast_object_list(shared, src=0)
        save_hf(chunks, model, f"{shared[0]}/hf", ranks, folder)
        found = load_file(f"{shared[0]}/hf/model.safetensors") if ranks.rank == 0 else None
        found = found and {name: tensor.clone() for name, tensor in found.items()}
        dist.barrier()
    return found


def compared(outcomes: list[Outcome], reference: Outcome) -> Figures:
    """A layout's ranks beside one process."""
    parameters = outcomes[0].parameters
    assert parameters is not None and reference.parameters is not None
    assert parameters.keys() == reference.parameters.keys()
    apart = {
        name: float((parameters[name].double() - tensor.double()).abs().max() / tensor.double().abs().max())
        for name, tensor in reference.parameters.items()
    }
    worst = max(apart, key=lambda name: apart[name])
    by_step = list(zip(*(outcome.trained for outcome in outcomes), strict=True))
    return Figures(
        max(relative(outcome.losses, reference.losses) for outcome in outcomes),
        max(relative(outcome.norms, reference.norms) for outcome in outcomes),
        apart[worst],
        worst,
        max(max(step) / max(min(step), 1) for step in by_step),
        sum(outcome.empty_parts for outcome in outcomes),
    )


def relative(found: list[float], wanted: list[float]) -> float:
    """Greatest relative difference; NaN counts as infinite."""
    apart = [abs(a - b) / abs(b) if b else abs(a) for a, b in zip(found, wanted, strict=True)]
    return max(value if value == value else float("inf") for value in apart)


TP2, TP4, PP2, PP4, CP2, CP4, EP2, EP4 = (
    {f"{kind}_parallel_size": size}
    for kind, size in (
        ("tensor_model", 2),
        ("tensor_model", 4),
        ("pipeline_model", 2),
        ("pipeline_model", 4),
        ("context", 2),
        ("context", 4),
        ("expert_model", 2),
        ("expert_model", 4),
    )
)
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
        "shared-cp2": case("deepseek_v3", CP2),
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
        "pp2-dp2-overlaps": case("llama-tied", PP2, OVERLAPS),
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


def against_one_process(
    alone_cases: dict[str, Case], cases: dict[str, Case], hf: dict[str, str]
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Trains cases on one process and, in layouts, on two: (outcomes of the one, of each of two, figures beyond the bounds).

    A case's name begins with that of the one-process case that it equals: "muon-tp2" and "muon".
    """
    alone, ranks = run_ranks(train_cases, 1, alone_cases, hf)[0], run_ranks(train_cases, 2, cases, hf)
    found = {name: compared([rank[name] for rank in ranks], alone[name.split("-")[0]]) for name in cases}
    return alone, ranks, {name: figures for name, figures in found.items() if not figures.within}
