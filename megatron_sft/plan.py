"""`megatron-sft plan`: memory of one GPU and traffic of one step, of every layout of a model on a number of GPUs.

1. a conf, or the conf that an HF folder would have, and the run's flags give the model and the batch;
2. every TP x PP x CP x EP x DP that problems.py allows; sizes that a flag gives are kept;
3. parameters: one layer of each kind, built by model/build.py on the meta device as one rank of the layout holds it,
   times the layers that megatron-core puts on a stage; activations: model/activations.py;
4. those that fit first, by the seconds that a step would take on the machine of SPEED.

Not here: measuring. Memory is that of the fullest rank with balanced experts; GB are 10^9 bytes.
"""

import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_sft import hub
from megatron_sft.config.options import PlanConfig
from megatron_sft.config.problems import problems
from megatron_sft.config.run import ModelConfig, ParallelConfig, RunConfig
from megatron_sft.config.state_bytes import state_bytes
from megatron_sft.errors import ConfigError
from megatron_sft.hf.adapters import add_adapters, family_for
from megatron_sft.hf.conf import conf_of_folder
from megatron_sft.model.activations import Activations
from megatron_sft.model.build import build_model, transformer_config
from megatron_sft.model.flops import computed_flops
from megatron_sft.model.lora import is_adapter
from megatron_sft.model.pattern import layer_kinds
from megatron_sft.parallel import Ranks, imagined
from megatron_sft.shell import confs
from megatron_sft.weights import model_type_of, padded

OWN_CONF = re.compile(r"\.{0,2}/.*\.sh", re.DOTALL)
"""A conf of the user's own, which stands elsewhere."""
RESERVED_GB = 2.0
"""Of each GPU: CUDA's context, NCCL's buffers, gaps between the allocator's blocks."""
SPEED = {"flops": 400e12, "inside": 300e9, "between": 40e9, "machine": 8}
"""For the order of the table alone: FLOP/s of a GPU, bytes/s to one of its own machine and to another, GPUs a machine."""
ROWS = 20
"""Layouts that are printed."""
GB = 1e9
PARTS = ("weights", "gradients", "optimizer", "activations", "workspace")
SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}


@dataclass(frozen=True)
class Weights:
    """Parameters on one tensor- and expert-parallel rank."""

    dense: Mapping[str, int]
    """Of one layer of each kind, beside routed experts."""
    experts: Mapping[str, int]
    embedding: int
    head: int
    """Of the output layer; 0 where the embedding is."""
    norm: int
    adapters: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """With --lora-rank: trained parameters of a layer of each kind, of embedding and head; without experts, and of those."""


@dataclass(frozen=True)
class Row:
    """A layout; the *_gb are of its fullest rank, sent_gb what a rank sends in a step at most."""

    sizes: Mapping[str, int]
    parameters: int
    weights_gb: float
    gradients_gb: float
    optimizer_gb: float
    activations_gb: float
    workspace_gb: float
    """Beside the activations, at the highest point of the backward pass."""
    total_gb: float
    """With RESERVED_GB."""
    host_gb: float
    """Optimizer states in host memory, with --optimizer-cpu-offload."""
    sent_gb: Mapping[str, float]
    micro_batches: int
    step_s: float
    """For the order alone."""
    fits: bool
    command: str


def conf_flags(name: str) -> list[str]:
    """MODEL_ARGS of a conf, which bash sources: Qwen/Qwen3-8B, or a file of one's own (conf/arguments.sh has the same rule:
    ./my.sh, /path/to/my.sh); or of an HF folder, whose conf `megatron-sft conf` would write."""
    text, own, folder = "", OWN_CONF.fullmatch(name), confs()
    if (Path(name) / "config.json").is_file():
        source, text = "/dev/stdin", conf_of_folder(name)
    elif own and Path(name).is_file():
        source = name
    elif not own and (folder / f"{name}.sh").resolve().is_relative_to(folder) and (folder / f"{name}.sh").is_file():
        source = str(folder / f"{name}.sh")
    else:
        source, text = "/dev/stdin", conf_of_folder(_folder_of(name, folder), name)
    command = ["bash", "-euc", 'source "$1"; printf "%s\\0" "${MODEL_ARGS[@]}"', "_", source]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError([f"{name}: bash cannot read it: {done.stderr.strip()}. Expected a conf that sets MODEL_ARGS=( ... )."])
    return done.stdout.split("\0")[:-1]


def _folder_of(name: str, confs: Path) -> str:
    """The folder of a model of the hub. Raises ConfigError: it is none, and no conf either."""
    known = sorted(str(path.relative_to(confs))[:-3] for path in confs.glob("*/*.sh"))
    near = difflib.get_close_matches(name, known, n=3) or known
    expected = f"one such as {', '.join(near[:3])}, ./NAME.sh or /PATH/NAME.sh, or an HF folder with a config.json"
    try:
        folder = hub.folder("plan", name, weights=False)
    except ConfigError as error:
        raise ConfigError([f"{name}: no such conf; expected {expected}.", *error.problems]) from None
    if folder == name:
        raise ConfigError([f"{name}: no such conf; expected {expected}."])
    return folder


def run_flags(argv: Sequence[str]) -> list[str]:
    """The flags that finetune.sh takes too: without those of PlanConfig, and without sizes, which are variables there."""
    own = {"--gpus", "--gpu-memory", "--json", *("--" + field.replace("_", "-") for field in SIZES.values())}
    left, words = [], iter(argv)
    for word in words:
        if word in own:
            next(words, None)
        elif word.split("=")[0] not in own:
            left.append(word)
    return left


def plan(run: RunConfig, given: frozenset[str], options: PlanConfig, conf: str, extra: Sequence[str]) -> list[Row]:
    """Every layout of options.gpus GPUs, the best first.

    Args:
        run: flags of the conf and of the command line.
        given: fields of run.parallel that a flag set.
        options: GPUs, and GB of one.
        conf: as the user named it, for the commands.
        extra: flags beside it, for the commands.
    """
    rows = [row_of(layout, options, conf, extra) for layout in layouts(run, given, options.gpus)]
    if not rows:
        kept = {name: getattr(run.parallel, field) for name, field in SIZES.items() if field in given}
        problem = problems(run, options.gpus)
        why = problem[0] if problem else "Change --gpus, or leave the sizes out."
        raise ConfigError([f"{options.gpus} GPUs cannot be cut as asked ({kept or 'no size is fixed'}). {why}"])
    return sorted(rows, key=lambda row: (not row.fits, row.step_s if row.fits else row.total_gb))


def layouts(run: RunConfig, given: frozenset[str], gpus: int) -> Iterator[RunConfig]:
    """The run with each layout that is possible; TP comes with sequence parallelism, experts that EP cuts with ETP 1 or TP."""
    divisors = [size for size in range(1, gpus + 1) if gpus % size == 0]
    has_experts = bool(run.model.moe.num_moe_experts)
    for tp, pp, cp in itertools.product(divisors, repeat=3):
        if tp > SPEED["machine"] and SIZES["TP"] not in given:  # arXiv 2104.04473, section 3.2
            continue
        for ep, etp in itertools.product(divisors if has_experts else [1], sorted({1, tp})):
            cut = pp * cp * (etp * ep if ep > 1 else tp)  # what conf/arguments.sh multiplies with DP
            if gpus % cut or (ep == 1 and etp != tp):
                continue
            wanted = dict(zip(SIZES.values(), (tp, pp, cp, ep, etp), strict=True))
            if any(wanted[name] != getattr(run.parallel, name) for name in given & wanted.keys()):
                continue
            layout = dataclasses.replace(run.parallel, **wanted, sequence_parallel=tp > 1)  # type: ignore[arg-type]
            multiple = tp if run.model.padded_vocab_size else run.model.make_vocab_size_divisible_by * tp
            candidate = dataclasses.replace(run, parallel=layout, model=padded(run.model, multiple))
            if not problems(candidate, gpus) and weights_of(candidate, gpus) is not None:
                yield candidate


def weights_of(run: RunConfig, gpus: int) -> Weights | None:
    """Parameters of one rank; None where the model cannot be cut so."""
    layout = run.parallel
    tp, ep, etp = (getattr(layout, SIZES[name]) for name in ("TP", "EP", "ETP"))
    cp = layout.context_parallel_size if run.model.mamba.hybrid_layer_pattern else 1  # Mamba layers refuse it
    layout = dataclasses.replace(
        layout,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        context_parallel_size=cp,
    )
    try:
        return _weights(_Hashed(dataclasses.replace(run, parallel=layout)), math.lcm(tp * cp, ep * etp))
    except ConfigError:
        return None


class _Hashed:
    """A run as a key of a cache; its mappings have no hash."""

    def __init__(self, run: RunConfig):
        self.run, self._text = run, run.to_json()

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self._text == other._text


@functools.lru_cache(maxsize=256)
def _weights(hashed: _Hashed, world_size: int) -> Weights:
    run = hashed.run
    kinds = sorted(set(layer_kinds(run.model)))
    with imagined(run.parallel, world_size), torch.device("meta"):
        model = one_of_each_layer(run.model, kinds)
        (chunk,) = build_model(model, run.parallel, run.train)
        if run.lora.lora_rank:
            ranks = Ranks(tp_size=run.parallel.tensor_model_parallel_size, ep_size=run.parallel.expert_model_parallel_size)
            chunk.hf_model_type = model_type_of(run, (run.checkpoint.load, run.data.tokenizer_model))
            add_adapters(chunk, model, family_for([chunk], run.model), run.lora, ranks)
    named = {name: parameter.numel() for name, parameter in chunk.named_parameters()}

    def total(prefix: str, experts: bool = False, adapters: bool = False) -> int:
        counted = [name for name in named if name.startswith(prefix) and is_adapter(name) == adapters]
        return sum(named[name] for name in counted if (".experts." in name) == experts)

    layers = {kind: f"decoder.layers.{number}." for number, kind in enumerate(kinds)}
    adapted = {**layers, "embedding": "embedding.", "head": "output_layer."}
    dense, experts = ({kind: total(prefix, routed) for kind, prefix in layers.items()} for routed in (False, True))
    adapters = {kind: (total(prefix, False, True), total(prefix, True, True)) for kind, prefix in adapted.items()}
    ends = (total("embedding."), total("output_layer."), total("decoder.final_layernorm."))
    parts = Weights(dense, experts, *ends, adapters)
    assert total("") + total("", True) == sum([*dense.values(), *experts.values(), *ends]), named
    return parts


def one_of_each_layer(model: ModelConfig, kinds: Sequence[str]) -> ModelConfig:
    """The model with these layers alone; windows and RoPE have no parameters."""
    names: dict[str, Any] = {"moe_layer_freq": [int("E" in kind) for kind in kinds]}
    if model.mamba.hybrid_layer_pattern:
        names["hybrid_layer_pattern"] = "".join(kinds)
    return dataclasses.replace(model.with_core(names), num_layers=len(kinds), window_layers=(), no_rope_freq=None)


def stages_of(run: RunConfig) -> list[list[str]]:
    """Kinds of the layers of each pipeline stage, all its chunks together."""
    config, kinds = transformer_config(run.model, run.parallel, run.train), layer_kinds(run.model)
    virtual = run.parallel.virtual_pipeline_model_parallel_size
    stages: list[list[str]] = []
    for rank in range(run.parallel.pipeline_model_parallel_size):
        stages.append([])
        for chunk in range(virtual) if virtual else [None]:
            first = get_transformer_layer_offset(config, chunk, rank)
            stages[-1] += kinds[first : first + get_num_layers_to_build(config, chunk, rank)]
    return stages


def rank_parameters(run: RunConfig, gpus: int) -> list[tuple[int, int]]:
    """Of a rank of each pipeline stage: parameters beside routed experts, and those."""
    weights, stages = weights_of(run, gpus), stages_of(run)
    assert weights is not None, "layouts() leaves out what cannot be built"
    counts = []
    for number, layers in enumerate(stages):
        dense = sum(weights.dense[kind] for kind in layers)
        dense += weights.embedding if number == 0 else 0
        if number == len(stages) - 1:
            tied = weights.embedding if run.model.share_embeddings_and_output_weights and number else 0
            dense += weights.norm + weights.head + tied
        counts.append((dense, sum(weights.experts[kind] for kind in layers)))
    return counts


def trained_parameters(run: RunConfig, gpus: int) -> list[tuple[int, int]]:
    """As rank_parameters, those that have gradients and optimizer states: all, or with --lora-rank the adapters'."""
    if not run.lora.lora_rank:
        return rank_parameters(run, gpus)
    weights = weights_of(run, gpus)
    assert weights is not None, "layouts() leaves out what cannot be built"
    pairs = [[weights.adapters[kind] for kind in layers] for layers in stages_of(run)]
    pairs[0].append(weights.adapters["embedding"])
    pairs[-1].append(weights.adapters["head"])
    return [(sum(dense for dense, _ in stage), sum(experts for _, experts in stage)) for stage in pairs]


@dataclass(frozen=True)
class Memory:
    """What a run is expected to need."""

    parameters: int
    """Of the whole model."""
    total_gb: float
    """Of the fullest rank, without RESERVED_GB."""
    parts_gb: Mapping[str, float]
    """The same by PARTS."""
    host_gb: float
    """Beside it, in host memory: optimizer states."""


def expected_memory(run: RunConfig, world_size: int) -> Memory | None:
    """What this very layout needs, before its processes are there; None where the model cannot be built so."""
    whole = dataclasses.replace(run, parallel=ParallelConfig())
    if weights_of(run, world_size) is None or weights_of(whole, 1) is None:
        return None
    row = row_of(run, PlanConfig(gpus=world_size), "", ())
    parts = {name: getattr(row, f"{name}_gb") for name in PARTS}
    ((dense, experts),) = rank_parameters(whole, 1)
    return Memory(dense + experts, row.total_gb - RESERVED_GB, parts, row.host_gb)


def row_of(run: RunConfig, options: PlanConfig, conf: str, extra: Sequence[str]) -> Row:
    """The layout that the run has; arguments as plan's."""
    layout, train = run.parallel, run.train
    shares = _Shares(run, options.gpus)
    stages, counts, trained = stages_of(run), rank_parameters(run, options.gpus), trained_parameters(run, options.gpus)
    saved = Activations(run.model, layout, train)
    each = state_bytes(run)
    rows = []
    for number, (layers, (dense, experts)) in enumerate(zip(stages, counts, strict=True)):
        sharded = layout.use_distributed_optimizer
        own, routed = trained[number]
        adapters = own + routed if run.lora.lora_rank else 0
        states = own / (shares.copies if sharded else 1) + routed / (shares.expert_copies if sharded else 1)
        is_last = number == len(stages) - 1
        kept = shares.tokens * (saved.stage(layers) * _in_flight(run, number, shares.micro_batches) + is_last * saved.last())
        longest = max((saved.layer(kind) for kind in set(layers)), default=0.0)
        work = [saved.head_workspace(shares.tokens) if is_last else 0, shares.tokens * (saved.recomputed(layers) + longest)]
        held = dense + experts + adapters
        memory = [each.weights * held, each.gradients * (own + routed), each.states * states, kept, max(work)]
        rows.append((sum(memory) / GB + RESERVED_GB, dense + experts, each.host * states / GB, *(value / GB for value in memory)))
    total, parameters, host_gb, *memory_gb = max(rows)
    sent = {name: value / GB for name, value in _sent(run, shares, stages, trained).items()}
    sizes = {name: getattr(layout, field) for name, field in SIZES.items()} | {"DP": shares.dp}
    return Row(
        sizes=sizes,
        parameters=int(parameters),
        **dict(zip((f"{name}_gb" for name in PARTS), memory_gb, strict=True)),
        total_gb=total,
        host_gb=host_gb,
        sent_gb=sent,
        micro_batches=shares.micro_batches,
        step_s=_seconds(run, shares, sent),
        fits=total <= options.gpu_memory,
        command=_command(sizes, options.gpus, conf, extra),
    )


class _Shares:
    """What a layout makes of the batch: copies of weights, micro-batches of a rank, tokens of one on a rank.

    Without --global-batch-size a step is one micro-batch per GPU, so that layouts do the same work.
    """

    def __init__(self, run: RunConfig, gpus: int):
        layout, train = run.parallel, run.train
        tp, pp, cp, ep, etp = (getattr(layout, field) for field in SIZES.values())
        self.dp = gpus // (tp * pp * cp)
        self.copies, self.expert_copies = self.dp * cp, gpus // (pp * ep * etp)
        packs = train.max_tokens_per_gpu // run.data.seq_length if train.max_tokens_per_gpu else train.micro_batch_size
        self.tokens = packs * run.data.seq_length // cp
        self.packs_a_step = train.global_batch_size or packs * gpus
        self.micro_batches = max(1, -(-self.packs_a_step // (packs * self.dp)))


def _in_flight(run: RunConfig, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once (arXiv 2104.04473, sections 2.2.1 and 2.2.2)."""
    stages, virtual = run.parallel.pipeline_model_parallel_size, run.parallel.virtual_pipeline_model_parallel_size
    if not virtual:
        return min(stages - stage, micro_batches)
    return min(2 * (stages - stage - 1) + (virtual - 1) * stages + 1, micro_batches * virtual) / virtual


def _sent(run: RunConfig, shares: _Shares, stages: list[list[str]], counts: list[tuple[int, int]]) -> dict[str, float]:
    """Bytes that a rank sends in a step, by ring collectives: (n - 1) / n of the data to gather or scatter, twice to reduce.

    TP: four reductions a layer (arXiv 1909.08053, section 3), with sequence parallelism as gathers and scatters of the same
    size and two more gathers (arXiv 2205.05198, section 4.2.2). DP: gradients; with --use-distributed-optimizer they are
    scattered and weights gathered. PP: activations and their gradients. EP: tokens there and back, both ways. CP:
    model/context.py. Recomputation repeats what its forward pass sends.
    """
    model, layout = run.model, run.parallel
    width = Activations(model, layout, run.train).width
    tp, pp, cp, ep, etp = (getattr(layout, field) for field in SIZES.values())
    each = state_bytes(run)
    passes = 3 if run.train.recompute_granularity == "full" else 2  # each sends as much as the forward pass
    per_parameter = each.gradients + (each.weights if layout.use_distributed_optimizer else each.gradients)
    hidden = shares.tokens * width * model.hidden_size  # of one micro-batch
    letters = ["".join(layers) for layers in stages]
    attention, halves = max(row.count("*") for row in letters), max(len(row) - row.count("E") for row in letters)
    routed = max(row.count("E") for row in letters) * model.moe.moe_router_topk * hidden / tp
    heads, groups = model.num_attention_heads / tp, max(model.num_query_groups / tp, 1)
    gathers = layout.cp_comm_type == "allgather"
    traded = 2 * groups * cp if gathers else 2 * heads + 2 * groups * max(1, cp / groups)
    tied = model.padded_vocab_size // tp * model.hidden_size * each.gradients if model.share_embeddings_and_output_weights else 0
    boundaries = min(pp - 1, 2) * (layout.virtual_pipeline_model_parallel_size or 1)
    a_micro_batch = {
        "TP": _ring(tp) * hidden * (halves * (2 * passes + 1) + 4) + _ring(etp) * 2 * passes * routed * etp,
        "PP": boundaries * hidden / tp,
        "CP": passes * _ring(cp) * attention * traded * model.kv_channels * shares.tokens * width,
        "EP": passes * 2 * _ring(ep) * routed,
    }
    sent = {name: shares.micro_batches * size for name, size in a_micro_batch.items()}
    sent["PP"] += tied if pp > 1 else 0
    dense, experts = _ring(shares.copies) * per_parameter, _ring(shares.expert_copies) * per_parameter
    return sent | {"DP": max(dense * own + experts * routed_own for own, routed_own in counts)}


def _ring(size: int) -> float:
    return (size - 1) / size


def _seconds(run: RunConfig, shares: _Shares, sent: Mapping[str, float]) -> float:
    """A step on the machine of SPEED, nothing overlapped: computing, the pipeline's bubble (arXiv 2104.04473), sending."""
    layout, length = run.parallel, run.data.seq_length
    tp, pp, cp, ep, etp = (getattr(layout, field) for field in SIZES.values())
    gpus = shares.dp * tp * pp * cp
    lengths = np.full(shares.packs_a_step, length)  # packs of one document, all trained
    flops = computed_flops(run.model, lengths, int(lengths.sum()), run.train.recompute_granularity == "full")
    idle = (pp - 1) / (shares.micro_batches * (layout.virtual_pipeline_model_parallel_size or 1))
    spans = {"TP": tp, "CP": tp * cp, "EP": ep * etp, "DP": gpus // pp, "PP": gpus}  # neighbours in megatron-core's order
    speeds = {name: SPEED["inside" if span <= SPEED["machine"] else "between"] for name, span in spans.items()}
    speeds["DP"] = min(SPEED["inside"], speeds["DP"] * max(1, SPEED["machine"] // (tp * cp)))  # rings over every network card
    return flops * (1 + idle) / gpus / SPEED["flops"] + sum(GB * sent[name] / speeds[name] for name in sent)


def _command(sizes: Mapping[str, int], gpus: int, conf: str, extra: Sequence[str]) -> str:
    """finetune.sh with the variables of the layout; its DP is what is left beside ETP x EP where EP cuts experts."""
    shown = dict(sizes)
    if sizes["EP"] > 1:
        shown["DP"] = gpus // (sizes["ETP"] * sizes["EP"] * sizes["PP"] * sizes["CP"])
    else:
        shown.pop("ETP")  # TP's, as finetune.sh has it
    words = [f"{name}={size}" for name, size in shown.items() if size > 1 or name == "ETP"]
    flags = [*extra, *(["--sequence-parallel"] if sizes["TP"] > 1 else [])]
    if flags:
        words.append(f"MLM_EXTRA_ARGS={shlex.quote(shlex.join(flags))}")
    is_folder = os.path.isfile(os.path.join(conf, "config.json"))
    name = f"<the name of its conf, from megatron-sft conf --load {shlex.quote(conf)}>" if is_folder else _conf_name(conf)
    return " ".join([*words, "./finetune.sh", name])


def _conf_name(conf: str) -> str:
    """What finetune.sh takes: conf/Qwen/Qwen3-8B.sh -> Qwen/Qwen3-8B; a file of the user's own by its path."""
    if not OWN_CONF.fullmatch(conf):
        return conf
    path = Path(conf).resolve()
    folder = confs()
    return str(path.relative_to(folder)).removesuffix(".sh") if path.is_relative_to(folder) else shlex.quote(str(path))


def as_table(rows: Sequence[Row], options: PlanConfig) -> str:
    """The first layouts, one per line, and the command of the best."""
    parts = (*PARTS, "total", *(["host"] if rows[0].host_gb else []))
    sent = ("TP", "PP", "CP", "EP", "DP")
    head = [*rows[0].sizes, "parameters", *parts, *(f"{name} sent" for name in sent), ""]
    lines = [head]
    for row in rows[:ROWS]:
        memory = [f"{getattr(row, name + '_gb'):.1f}" for name in parts]
        traffic = [f"{row.sent_gb[name]:.2f}" for name in sent]
        lines.append([*map(str, row.sizes.values()), f"{row.parameters:,}", *memory, *traffic, "fits" if row.fits else ""])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    fitting = sum(row.fits for row in rows)
    text.append(
        f"{fitting} of {len(rows)} layouts fit {options.gpus} x {options.gpu_memory:g} GB; GB of the fullest rank, and GB that a "
        f"rank sends in a step. The total has {RESERVED_GB:g} GB for CUDA and NCCL."
    )
    return "\n".join([*text, *([f"best: {rows[0].command}"] if fitting else [])])


def as_json(rows: Sequence[Row]) -> str:
    """Every layout."""
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"


def refuse_if_none_fits(rows: Sequence[Row], options: PlanConfig) -> None:
    """Raises ConfigError where the best layout is too large."""
    best = rows[0]
    if not best.fits:
        sizes = " ".join(f"{name} {size}" for name, size in best.sizes.items() if size > 1) or "one GPU"
        raise ConfigError(
            [
                f"no layout fits {options.gpus} x {options.gpu_memory:g} GB: the nearest, {sizes}, needs {best.total_gb:.1f} GB. "
                "Expected one that does. Raise --gpus, or add --recompute-granularity full --recompute-method uniform "
                "--recompute-num-layers 1, or --use-precision-aware-optimizer with bf16 gradients and moments."
            ]
        )
