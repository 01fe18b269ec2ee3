"""Trains adapters of tiny models in any layout on the rows of layout_rig.py, and compares with one process.

Adam's epsilon is 1, so that an update is as large as its gradient: what a parameter moved by in STEPS steps is then compared,
relative to what the greatest element of its tensor moved by, beyond one rounding of the value itself. B begins with random
values, so that A has a gradient at once.
"""

import dataclasses
import hashlib
import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_sft.config.run import LoraConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from tests.distributed.layout_rig import (
    CP2,
    EP2,
    ETP2,
    GATHER,
    OVERLAPS,
    PP2,
    SHARDED,
    SP,
    STEP_PACKS,
    TP2,
    VPP2,
    loader_of,
    model_of,
    relative,
)
from tests.unit.hf.tiny_models import tiny_folder

STEPS = 2
LOSS_BAR, NORM_BAR, MOVE_BAR = 1e-6, 1e-5, 1e-5
EVERY = LoraConfig(lora_rank=4, lora_alpha=8.0)
DORA = dataclasses.replace(EVERY, lora_type="dora")
ENDS = LoraConfig(lora_rank=4, lora_target_modules=("embed_tokens", "lm_head", "o_proj"))
SOME = LoraConfig(lora_rank=3, lora_target_modules=("q_proj", "v_proj", "up_proj", "o_proj"))


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout to train adapters in."""

    model: str
    parallel: ParallelConfig = ParallelConfig()
    lora: LoraConfig = EVERY
    recompute: str | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a rank has after STEPS steps."""

    losses: list[float]
    norms: list[float]
    moved: dict[str, torch.Tensor]
    """Under PEFT's names, on rank 0."""
    rounding: dict[str, float]
    """How far two values next to each other are apart, of the greatest element."""
    base_kept: bool
    """Every weight and buffer beside the adapters has the bits that it had."""
    differing: list[str]
    """Parameters that ranks hold copies of with different bits."""
    trained: int
    """Parameters of this rank."""


def case(model: str, *parts: dict[str, Any], **settings: Any) -> Case:
    fields: dict[str, Any] = {}
    for part in parts:
        fields |= part
    return Case(model, ParallelConfig(**fields), **settings)


MODELS = ("qwen3", "llama-tied", "gemma2", "phi3", "nemotron_h", "qwen3_moe", "deepseek_v3")
ALONE = {
    **{model: case(model) for model in MODELS},
    "qwen3 dora": case("qwen3", lora=DORA),
    "qwen3 some": case("qwen3", lora=SOME),
    "qwen3 ends": case("qwen3", lora=ENDS),
    "qwen3_moe dora": case("qwen3_moe", lora=DORA),
}
CASES = {
    "tp2": case("qwen3", TP2),
    "tp2-sp": case("qwen3", TP2, SP),
    "tp2-sp-recompute": case("qwen3", TP2, SP, recompute="full"),
    "pp2": case("qwen3", PP2),
    "pp2-vpp2": case("qwen3", PP2, VPP2),
    "tied-pp2": case("llama-tied", PP2),
    "cp2": case("qwen3", CP2),
    "cp2-allgather": case("qwen3", CP2, GATHER),
    "dp2-distopt": case("qwen3", SHARDED),
    "dp2-overlaps": case("qwen3", OVERLAPS),
    "some-tp2-sp": case("qwen3", TP2, SP, lora=SOME),
    "ends-tp2": case("qwen3", TP2, lora=ENDS),
    "ends-tp2-sp": case("qwen3", TP2, SP, lora=ENDS),
    "ends-pp2": case("qwen3", PP2, lora=ENDS),
    "ends-overlaps": case("qwen3", OVERLAPS, lora=ENDS),
    "norm-after-tp2-sp": case("gemma2", TP2, SP),
    "fused-tp2-sp": case("phi3", TP2, SP),
    "mamba-tp2-sp": case("nemotron_h", TP2, SP),
    "moe-ep2": case("qwen3_moe", EP2),
    "moe-ep2-distopt": case("qwen3_moe", EP2, SHARDED),
    "moe-tp2-sp-ep1-etp1": case("qwen3_moe", TP2, SP),
    "moe-tp2-sp-ep2": case("qwen3_moe", TP2, SP, EP2),
    "moe-tp2-sp-etp2": case("qwen3_moe", TP2, SP, ETP2),
    "mla-tp2-sp": case("deepseek_v3", TP2, SP),
    "mla-tp2-sp-etp2": case("deepseek_v3", TP2, SP, ETP2),
    "mla-ep2": case("deepseek_v3", EP2),
    "mla-cp2": case("deepseek_v3", CP2),
    "dora-tp2": case("qwen3", TP2, lora=DORA),
    "dora-tp2-sp": case("qwen3", TP2, SP, lora=DORA),
    "dora-moe-tp2-sp-etp2": case("qwen3_moe", TP2, SP, ETP2, lora=DORA),
}
"""On two processes."""


def folders(root: Path, models: Iterable[str] = MODELS) -> dict[str, str]:
    """HF folders of the models below root."""
    for name in models:
        tiny_folder(name, root / name)
    return {name: str(root / name) for name in models}


def same_alone(found: Case) -> str:
    """The case of one process that trains the same."""
    return next(name for name, item in ALONE.items() if (item.model, item.lora) == (found.model, found.lora))


def train_cases(cases: dict[str, Case], hf: dict[str, str]) -> dict[str, Outcome]:
    """Every case, one after another, in this process group."""
    from megatron.core import parallel_state

    from megatron_sft.parallel import finalize, initialize

    outcomes = {}
    for name, case in cases.items():
        ranks = initialize(case.parallel, 1)
        try:
            outcomes[name] = train(case, ranks, hf[case.model])
        except Exception as error:
            raise AssertionError(name) from error
        parallel_state.destroy_model_parallel()
    finalize()
    return outcomes


def train(case: Case, ranks: Any, folder: str) -> Outcome:
    """STEPS steps from the weights of `folder`."""
    from megatron_sft.hf.adapters import attach, freeze
    from megatron_sft.hf.config import read_hf_config
    from megatron_sft.hf.weights import load_hf_weights
    from megatron_sft.model.build import build_model
    from megatron_sft.train.optim import build_optimizer, whole_parameters, wrap_ddp
    from megatron_sft.train.step import train_step

    model, parallel = model_of(case.model, folder), case.parallel
    recompute: dict[str, Any] = {}
    if case.recompute == "full":
        recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    train_config = TrainConfig(global_batch_size=STEP_PACKS, train_iters=STEPS, **recompute)
    run = RunConfig(
        model=model, parallel=parallel, train=train_config, lora=case.lora, optim=OptimConfig(lr=1.0, adam_eps=1.0, clip_grad=1.0)
    )
    loader = loader_of(run, ranks)
    chunks = build_model(model, parallel, run.train)
    load_hf_weights(chunks, model, folder, ranks)
    for chunk in chunks:
        chunk.hf_model_type = read_hf_config(folder)["model_type"]
    attach(chunks, run, ranks)
    fill_b(chunks)
    freeze(chunks, run, ranks)
    before, frozen = saved(chunks, run, ranks), frozen_digest(chunks)
    wrapped = wrap_ddp(chunks, parallel)
    optimizer = build_optimizer(wrapped, run)
    losses, norms = [], []
    for step in itertools.islice(loader, STEPS):
        result = train_step(wrapped, optimizer, step.micro_batches, 1, str)
        losses.append(result.totals.loss)
        norms.append(result.grad_norm)
    with whole_parameters(wrapped, parallel):
        after, same = saved(chunks, run, ranks), frozen_digest(chunks) == frozen
        differing = unequal_copies(chunks)
    moved = {name: tensor.double() - before[name].double() for name, tensor in after.items()}
    count = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad)
    rounding = {name: float(tensor.abs().max()) * 2**-23 for name, tensor in after.items()}
    return Outcome(losses, norms, moved, rounding, same, differing, count)


def fill_b(chunks: list[Any]) -> None:
    """Random second factors, drawn by name."""
    from megatron_sft.hf.adapters import adapter_shards
    from megatron_sft.hf.layout import read_shard

    for held in adapter_shards(chunks):
        if ".lora_B." in held.name or ".lora_embedding_" in held.name:
            drawn = {}
            for number, (name, shape) in enumerate(zip(held.sources, held.placement.shapes, strict=True)):
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
                drawn[number] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
            read_shard(held.placement, held.local, drawn)


def saved(chunks: list[Any], run: RunConfig, ranks: Any) -> dict[str, torch.Tensor]:
    """All adapters under PEFT's names, on rank 0."""
    from megatron_sft.hf.peft import save_peft

    with tempfile.TemporaryDirectory() as root:
        shared = [root]
        dist.broadcast_object_list(shared, src=0)
        save_peft(chunks, run, f"{shared[0]}/adapter", ranks)
        found = load_file(Path(shared[0]) / "adapter" / "adapter_model.safetensors") if ranks.rank == 0 else {}
        found = {name: tensor.clone() for name, tensor in found.items()}
        dist.barrier()
    return found


def frozen_digest(chunks: list[Any]) -> str:
    """sha256 of every weight and buffer of this rank beside the adapters."""
    digest = hashlib.sha256()
    for chunk in chunks:
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
            if ".lora." not in name and "tokens_per_expert" not in name:
                digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def unequal_copies(chunks: list[Any]) -> list[str]:
    """Collective: adapters' parameters that ranks hold with different bits."""
    from megatron_sft.hf.adapters import adapter_shards
    from megatron_sft.parallel import gather

    own = {(held.name, held.part): held.local.view(torch.uint8).numpy().tobytes() for held in adapter_shards(chunks)}
    everyone: dict[Any, set[bytes]] = {}
    for other in gather(own):
        for key, content in other.items():
            everyone.setdefault(key, set()).add(content)
    return sorted(f"{name} {part}" for (name, part), contents in everyone.items() if len(contents) > 1)


def faults(outcomes: list[Outcome], reference: Outcome) -> list[str]:
    """How a layout's ranks differ from one process."""
    found = []
    loss = max(relative(outcome.losses, reference.losses) for outcome in outcomes)
    norm = max(relative(outcome.norms, reference.norms) for outcome in outcomes)
    found += [f"loss {loss:.1e}"] if loss > LOSS_BAR else []
    found += [f"norm {norm:.1e}"] if norm > NORM_BAR else []
    moved = outcomes[0].moved
    if moved.keys() != reference.moved.keys():
        return [*found, f"other adapters: {sorted(moved.keys() ^ reference.moved.keys())[:3]}"]
    apart = {
        name: (float((moved[name] - wanted).abs().max()) - reference.rounding[name]) / float(wanted.abs().max())
        for name, wanted in reference.moved.items()
    }
    worst = max(apart, key=lambda name: apart[name] if apart[name] == apart[name] else float("inf"))
    found += [] if apart[worst] <= MOVE_BAR else [f"{worst} moved {apart[worst]:.1e} otherwise"]
    found += ["base changed"] if not all(outcome.base_kept for outcome in outcomes) else []
    return found + [f"copies differ: {name}" for name in outcomes[0].differing[:3]]


def frozen_tables(folder: str) -> dict[str, bool]:
    """{name of this stage's copy of the tied table: whether it is trained}, for two stages and three patterns."""
    from megatron.core import parallel_state

    from megatron_sft.hf.adapters import freeze
    from megatron_sft.model.build import build_model
    from megatron_sft.parallel import finalize, initialize

    found = {}
    model, parallel = model_of("llama-tied", folder), ParallelConfig(**PP2)
    ranks = initialize(parallel, 1)
    for settings in (
        dict(freeze=("embed_tokens",)),
        dict(freeze=("^embedding",)),
        dict(train_only=(r"word_embeddings\.weight$",)),
    ):
        train_config = TrainConfig(**settings)
        (chunk,) = build_model(model, parallel, train_config)
        freeze([chunk], RunConfig(model=model, parallel=parallel, train=train_config), ranks)
        tables = [(name, item) for name, item in chunk.named_parameters() if "embedding" in name or "output_layer" in name]
        found |= {f"{name} {settings}": parameter.requires_grad for name, parameter in tables}
    parallel_state.destroy_model_parallel()
    finalize()
    return found
