"""Which weights of a model have adapters, under Hugging Face's names, and which parameters are trained at all.

    --lora-target-modules    all-linear, q_proj, linear_qkv, or a regular expression for the whole module name
    --freeze, --train-only   regular expressions for parameters, by Megatron's or Hugging Face's name

Not here: what an adapter computes (model/lora.py), folders (peft.py).
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from megatron_sft.config.lora import LoraConfig
from megatron_sft.config.run import ModelConfig, RunConfig
from megatron_sft.errors import ConfigError
from megatron_sft.hf.config import likely_model_type
from megatron_sft.hf.families import FAMILIES, Family
from megatron_sft.hf.layout import Piece, Placement
from megatron_sft.hf.weights import TIED, Held, core_module, held_shards
from megatron_sft.model.lora import Adapter, Part, Place, adapters_of, add_adapter, can_adapt
from megatron_sft.model.lora_ends import add_end_adapter
from megatron_sft.parallel import Ranks, agree, gather

ALL = "all-linear"
ENDS = ("embedding.word_embeddings.weight", TIED)
"""Weights that have an adapter where they are named, and not by all-linear."""
BY_ROWS = frozenset({"row", "qkv", "qkv_fused", "gated", "gated_fused", "mamba_in"})
"""Layouts of weights that are cut along their output."""
BY_COLUMNS = frozenset({"column", "whole"})
"""Of those that are cut along their input, or not at all."""
MEGATRON_NAMES = frozenset(
    "linear_qkv linear_proj linear_fc1 linear_fc2 linear_q_proj linear_q_down_proj linear_q_up_proj linear_kv_down_proj "
    "linear_kv_up_proj in_proj out_proj".split()
)
ENDINGS = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "lora_magnitude_vector": ".lora_magnitude_vector",
    "lora_embedding_A": ".lora_embedding_A",
    "lora_embedding_B": ".lora_embedding_B",
}
"""Of the names that PEFT gives the parameters of a module's adapter."""


def family_for(chunks: Sequence[nn.Module], model: ModelConfig) -> Family:
    """The family whose names the weights have: what the chunks say (weights.build), else the first that could write them."""
    return FAMILIES[model_type_for(chunks, model)]


def model_type_for(chunks: Sequence[nn.Module], model: ModelConfig) -> str:
    """As family_for, the family's name."""
    return core_module(chunks[0]).hf_model_type or likely_model_type(model)


def adaptable(chunk: nn.Module, model: ModelConfig, family: Family, ranks: Ranks) -> Iterator[tuple[Held, Any, tuple[str, ...]]]:
    """(shard, module, Hugging Face names) of every matrix of a chunk that stands in a table of the family's projections."""
    core = core_module(chunk)
    for held in held_shards([chunk], model, family, ranks):
        is_layer = held.local.dim() == 2 and held.local_name.endswith(".weight") and held.local_name.startswith("decoder.layers.")
        if is_layer or held.local_name in ENDS:
            modules = tuple(source.removesuffix(".weight") for source in held.sources)
            yield held, core.get_submodule(held.local_name.rpartition(".")[0]), modules


def attach(chunks: Sequence[nn.Module], run: RunConfig, ranks: Ranks) -> None:
    """Gives the weights that --lora-target-modules names their adapters, with fresh values. Collective.

    Args:
        chunks: this rank's model chunks, with their weights.
        run: its `lora`, `model` and seed.
        ranks: of this process.

    Raises:
        ConfigError: on every rank: a name that no weight has, or of weights that cannot have an adapter.
    """
    family, words = agree(lambda: family_for(chunks, run.model)), run.lora.lora_target_modules
    said = [add_adapters(chunk, run.model, family, run.lora, ranks) for chunk in chunks]
    for chunk in chunks:
        for adapter in adapters_of(core_module(chunk)).values():
            adapter.draw(run.lora.lora_init, run.train.seed)
    every = [item for other in gather(said) for item in other]
    hits, others, known = (set().union(*parts) for parts in zip(*every, strict=True))
    is_tied, is_dora = run.model.share_embeddings_and_output_weights, run.lora.lora_type == "dora"
    why = (
        " Embeddings and head are one tensor here." if is_tied else " Embeddings and head have none with dora." if is_dora else ""
    )
    problems = [f"--lora-target-modules {word}: such weights cannot have an adapter.{why}" for word in sorted(others - hits)]
    problems += [f"--lora-target-modules {word}: no module has this name." for word in words if word not in hits | others]
    if problems:
        raise ConfigError(
            [f"{text} Expected {ALL}, an expression, or of {', '.join(sorted(known))}. Correct it." for text in problems]
        )


def add_adapters(
    chunk: nn.Module, model: ModelConfig, family: Family, lora: LoraConfig, ranks: Ranks
) -> tuple[set[str], set[str], set[str]]:
    """Gives a chunk its adapters, without values.

    Returns:
        Words of --lora-target-modules that name weights with an adapter; weights that cannot have one; names there are.
    """
    hits: set[str] = set()
    others: set[str] = set()
    known: set[str] = set()
    for held, base, modules in list(adaptable(chunk, model, family, ranks)):
        is_end, fits = held.local_name in ENDS, can_adapt(base) and held.layout in BY_ROWS | BY_COLUMNS
        if is_end:
            fits = not model.share_embeddings_and_output_weights and lora.lora_type != "dora"
        named = [
            (number, word)
            for number, name in enumerate(modules)
            for word in _words_for(name, held.name, lora.lora_target_modules)
            if word != ALL or (fits and not is_end)
        ]
        (hits if fits else others).update(word for _, word in named)
        known.update(name.rpartition(".")[2] for name in modules if fits)
        if named and fits:
            add = add_end_adapter if is_end else add_adapter
            add(base, _place(held, modules, sorted({number for number, _ in named})), lora)
    return hits, others, known


def _words_for(module: str, ours: str, words: Sequence[str]) -> list[str]:
    """Those of --lora-target-modules that mean a module: its own name, the end of it, Megatron's, or an expression."""

    def means(word: str) -> bool:
        if word in MEGATRON_NAMES and ours.split(".")[-2] == word:
            return True
        return word == ALL or module == word or module.endswith(f".{word}") or re.fullmatch(word, module) is not None

    return [word for word in words if means(word)]


def _place(held: Held, modules: tuple[str, ...], chosen: Sequence[int]) -> Place:
    """Where the adapter of a weight stands, of whose modules some are chosen.

    Example: rows of linear_qkv with two groups, of which k and v are chosen: q q k v q q k v -> B has k k v v.
    """
    placement, (height, width) = held.placement, held.local.shape
    names = tuple(modules[number] for number in chosen)
    if held.local_name in ENDS:
        first, total = held.part[0] * height, placement.shapes[0][0]
        length = max(0, min(height, total - first))  # the others are padding
        return Place(names, (Part(0, first, length),), ((0, length),), (total,), 0, width)
    if held.layout not in BY_ROWS:
        first = held.part[0] * width
        return Place(names, (Part(0, 0, height),), ((0, height),), (height,), first, placement.shapes[0][1])
    runs: list[tuple[int, int, int, int]] = []  # module, row there, rows, first output
    output = 0
    for piece in placement.pieces:
        if piece.source in chosen:
            index = piece.window[0]
            assert isinstance(index, slice), "weights that are cut along their output are windows of rows"
            runs.append((chosen.index(piece.source), index.start, piece.length, output))
        output += piece.length
    parts: list[Part] = []
    for module, row, length, _ in sorted(runs):
        if parts and parts[-1].module == module and parts[-1].first + parts[-1].length == row:
            parts[-1] = parts[-1]._replace(length=parts[-1].length + length)
        else:
            parts.append(Part(module, row, length))
    outputs = tuple((first, length) for _, _, length, first in sorted(runs))
    heights = tuple(placement.shapes[number][0] for number in chosen)
    return Place(names, tuple(parts), outputs, heights, 0, width)


def adapter_shards(chunks: Sequence[nn.Module], prefix: str = "") -> Iterator[Held]:
    """Every parameter of every adapter of this rank, with its place in PEFT's tensors.

    Args:
        chunks: this rank's model chunks.
        prefix: of PEFT's names.
    """
    for chunk in chunks:
        for local_name, adapter in adapters_of(core_module(chunk)).items():
            for factor in adapter.factors():
                column = slice(factor.first_column, factor.first_column + factor.parameter.shape[-1])
                columns = (column,) if factor.parameter.dim() == 2 else ()
                turn = -1 if factor.transposed else 1
                pieces = [
                    Piece(length, module, (slice(first, first + length), *columns)[::turn], factor.transposed)
                    for module, first, length in factor.parts
                ]
                names = tuple(f"{prefix}{module}{ENDINGS[factor.kind]}" for module in adapter.place.modules)
                part = (adapter.group.rank(), adapter.group.size()) if factor.is_cut else (0, 1)
                local = factor.parameter.detach()
                shapes = [shape[::turn] for shape in factor.shapes]
                yield Held(names[0], local, Placement(0, pieces, shapes), names, part, "", local_name)


def with_adapters(chunk: nn.Module, held: Sequence[Held]) -> list[Held]:
    """The shards of a chunk's weights, those with an adapter with what is to be written in their place. Collective."""
    adapters: dict[str, Adapter] = adapters_of(core_module(chunk))
    changed: dict[str, Callable[[], torch.Tensor]] = {}
    for name, adapter in adapters.items():
        share = adapter.magnitude_share()  # waits for other ranks, which writing may not
        changed[name.rpartition(".")[0]] = lambda adapter=adapter, share=share: adapter.merged(share)  # type: ignore[misc]
    return [item._replace(changed=changed.get(item.local_name.removesuffix(".weight"))) for item in held]


def freeze(chunks: Sequence[nn.Module], run: RunConfig, ranks: Ranks) -> None:
    """Leaves those parameters to be trained that the run's flags name; with adapters, these alone. Collective.

    Args:
        chunks: this rank's model chunks.
        run: its `lora` and what `train` says of freezing.
        ranks: of this process.

    Raises:
        ConfigError: on every rank: an expression that no parameter has, or one module of a fused parameter; nothing is left.
    """
    patterns = run.train.freeze or run.train.train_only
    if run.lora.lora_rank:
        for chunk in chunks:
            core, own = core_module(chunk), {id(p) for a in adapters_of(core_module(chunk)).values() for p in a.parameters()}
            for parameter in core.parameters():
                parameter.requires_grad_(id(parameter) in own)
    elif patterns:
        _freeze_named(chunks, run, ranks, patterns)
    for router in (part for chunk in chunks for part in core_module(chunk).modules() if hasattr(part, "expert_bias")):
        router.frozen_expert_bias = not router.weight.requires_grad  # moved by counts, not by a gradient


def _freeze_named(chunks: Sequence[nn.Module], run: RunConfig, ranks: Ranks, patterns: Sequence[str]) -> None:
    flag = "--freeze" if run.train.freeze else "--train-only"
    family = agree(lambda: family_for(chunks, run.model))
    hits: set[str] = set()
    in_part: set[str] = set()
    some_trained = False
    for chunk in chunks:
        core = core_module(chunk)
        for held in held_shards([chunk], run.model, family, ranks):
            parameter = core.get_parameter(held.local_name) if held.local_name in dict(core.named_parameters()) else None
            if parameter is None:
                continue
            is_tied = held.name == TIED and run.model.share_embeddings_and_output_weights
            ours = "embedding.word_embeddings.weight" if is_tied else held.name
            meant = {word for word in patterns if re.search(word, ours)}
            for word in patterns:
                theirs = [re.search(word, source) is not None for source in held.sources]
                meant |= {word} if all(theirs) else set()
                in_part |= {f"{word} ({held.name})"} if any(theirs) and not all(theirs) and word not in meant else set()
            hits |= meant
            parameter.requires_grad_(bool(meant) == (flag == "--train-only"))
            some_trained |= parameter.requires_grad
    outcomes = gather((hits, in_part, some_trained))
    hits, in_part = set().union(*(item[0] for item in outcomes)), set().union(*(item[1] for item in outcomes))
    problems = [f"{flag} {word}: no parameter has it." for word in patterns if word not in hits]
    problems += [f"{flag} {text}: means a part of a fused parameter." for text in sorted(in_part)[:4]]
    problems += [] if any(item[2] for item in outcomes) else [f"{flag} {' '.join(patterns)}: nothing is left to be trained."]
    if problems:
        names = "names such as decoder.layers.0.mlp.linear_fc1.weight or model.layers.0.mlp.up_proj.weight"
        raise ConfigError(
            [f"{text} Expected an expression for some whole parameters ({names}). Correct it." for text in problems]
        )


def fingerprint(chunks: Sequence[nn.Module], model: ModelConfig, ranks: Ranks) -> str:
    """MODEL_TYPE:sha256 of all weights but the adapters', the same in every layout and dtype. Collective.

    Of each tensor, in bf16 whatever it is kept in, sums of its elements' bits by row and by column of the Hugging Face
    tensor, each times a number of its place, modulo 2^64: sums over parts of a tensor add up to those over the whole.
    """
    family = agree(lambda: family_for(chunks, model))
    sums: dict[tuple[str, tuple[int, int]], int] = {}
    for held in (item for chunk in chunks for item in held_shards([chunk], model, family, ranks)):
        if not (held.name == TIED and model.share_embeddings_and_output_weights):
            sums[held.name, held.part] = _place_sum(held)
    everyone: dict[tuple[str, tuple[int, int]], int] = {}
    for other in gather(sums):
        everyone |= other
    by_name: dict[str, int] = {}
    for (name, _), value in everyone.items():
        by_name[name] = (by_name.get(name, 0) + value) % 2**64
    return f"{model_type_for(chunks, model)}:{hashlib.sha256(repr(sorted(by_name.items())).encode()).hexdigest()}"


def _place_sum(held: Held) -> int:
    """The part that one shard has of its tensors' sums."""
    total, start = 0, 0
    for piece in held.placement.pieces:
        part = held.local.narrow(held.placement.dim, start, piece.length) if held.local.dim() else held.local
        start += piece.length
        if piece.source is None:
            continue
        part = part.t() if piece.transposed else part
        bits = part.to(torch.bfloat16).contiguous().view(torch.int16).reshape(part.shape[0] if part.dim() else 1, -1)
        shape = held.placement.shapes[piece.source]
        axes = [torch.arange(size)[piece.window[n] if n < len(piece.window) else slice(None)] for n, size in enumerate(shape)]
        free = [axis for axis in axes if axis.dim()] or [torch.zeros(1, dtype=torch.int64)]
        columns = free[1] if len(free) == 2 else torch.arange(bits.shape[1])
        outer = 1 + sum(int(axis) for axis in axes if not axis.dim()) * 1000003 + piece.source * 998244353
        for dim, places in ((1, 2 * free[0]), (0, 2 * columns + 1)):
            weights = (places + outer) * 0x5851F42D4C957F2D  # mixed as in a multiplicative congruential generator
            weights = (weights ^ (weights >> 29)) * 0x14057B7EF767814F
            total += int((bits.sum(dim, dtype=torch.int64).cpu() * weights).sum())
    return total % 2**64
