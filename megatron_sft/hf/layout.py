"""Where the rows of a Megatron parameter lie in a Hugging Face checkpoint, one function a layout.

A layout says of one tensor-parallel shard which windows of which HF tensors it consists of. Reading copies
from the windows, writing copies into them, so every transform comes with its inverse. No file access here
(weights.py), no names (families.py), no communication.

Words: a *source* is an HF tensor; a *shard* is the part of a Megatron parameter that one rank holds; sizes
without "local" are those of the whole tensor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from megatron_sft.config.run import ModelConfig

Index = tuple[int | slice, ...]
Shape = tuple[int, ...]


class Shard(NamedTuple):
    """One rank's part of a parameter: its own shape, and which of how many tensor-parallel parts it is."""

    shape: Shape
    rank: int
    size: int
    model: ModelConfig
    expert: int = 0
    """Expert over all expert-parallel ranks, for tensors that stack experts."""


class Piece(NamedTuple):
    """`length` rows (along Placement.dim) of the shard are `source[window]`, transposed if so; no source: zeros."""

    length: int
    source: int | None
    window: Index
    transposed: bool = False


class Placement(NamedTuple):
    """The shard is its pieces one after the other along `dim`; `shapes` are those of the whole sources."""

    dim: int
    pieces: list[Piece]
    shapes: list[Shape]


def windows(
    placement: Placement, local: torch.Tensor, sources: Mapping[int, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yields (view of the shard, view of the source or None for zeros) of every piece whose source is given."""
    start = 0
    for piece in placement.pieces:
        mine = local.narrow(placement.dim, start, piece.length) if local.dim() else local
        start += piece.length
        if piece.source is None:
            yield mine, None
        elif piece.source in sources:
            theirs = sources[piece.source][piece.window]
            yield mine, theirs.t() if piece.transposed else theirs


def read_shard(placement: Placement, local: torch.Tensor, sources: Mapping[int, torch.Tensor]) -> None:
    """Fills `local` (any dtype) from the sources that are given; padding becomes zero."""
    for mine, theirs in windows(placement, local, sources):
        if theirs is None:
            mine.zero_()
        else:
            mine.copy_(theirs)


def write_shard(placement: Placement, local: torch.Tensor, sources: Mapping[int, torch.Tensor]) -> None:
    """The inverse of read_shard: fills the sources' windows from `local`; padding is left out."""
    for mine, theirs in windows(placement, local, sources):
        if theirs is not None:
            theirs.copy_(mine)


def whole_sources(placement: Placement, local: torch.Tensor) -> dict[int, torch.Tensor]:
    """The sources that are one run of this shard's memory, as views of it; all others have to be put together.

    Example: gate and up of an MLP that no rank shares are the two halves of linear_fc1.
    """
    start, views = 0, {}
    for piece in placement.pieces:
        view = local.narrow(placement.dim, start, piece.length) if local.dim() else local
        start += piece.length
        if piece.source is not None and view.shape == placement.shapes[piece.source] and view.is_contiguous():
            views[piece.source] = view
    return views


def _rows(start: int, length: int) -> Index:
    return (slice(start, start + length),)


def _cut(segments: Sequence[tuple[int | None, int, int]], start: int, length: int) -> list[Piece]:
    """Rows [start, start + length) of segments (source, first row there, rows) laid end to end.

    Example: segments [(0, 0, 4), (1, 0, 2)], start 3, length 2 -> row 3 of source 0 and row 0 of source 1.
    """
    pieces, position = [], 0
    for source, first, rows in segments:
        low, high = max(start, position), min(start + length, position + rows)
        if low < high:
            pieces.append(Piece(high - low, source, _rows(first + low - position, high - low)))
        position += rows
    return pieces


def _whole(shard: Shard) -> Placement:
    """The same tensor on every rank: norms, routers, biases of row-parallel layers."""
    return Placement(0, [Piece(shard.shape[0] if shard.shape else 1, 0, ())], [shard.shape])


def _row(shard: Shard) -> Placement:
    """Rows cut over the ranks (column-parallel linear: y = x W^T, so W's rows are y's columns)."""
    rows = shard.shape[0]
    piece = Piece(rows, 0, _rows(shard.rank * rows, rows))
    return Placement(0, [piece], [(rows * shard.size, *shard.shape[1:])])


def _column(shard: Shard) -> Placement:
    """Columns cut over the ranks (row-parallel linear)."""
    rows, columns = shard.shape
    piece = Piece(columns, 0, (slice(None), *_rows(shard.rank * columns, columns)))
    return Placement(1, [piece], [(rows, columns * shard.size)])


def _vocabulary(shard: Shard) -> Placement:
    """Rows cut over the ranks, zero rows after the last token up to the padded vocabulary.

    Example: 5 tokens, padded to 8, 2 ranks: rank 1 holds rows 4, then three zero rows.
    """
    rows, vocab_size = shard.shape[0], shard.model.vocab_size
    segments = [(0, 0, vocab_size), (None, 0, max(0, rows * shard.size - vocab_size))]
    return Placement(0, _cut(segments, shard.rank * rows, rows), [(vocab_size, *shard.shape[1:])])


def _qkv_segments(model: ModelConfig, sources: tuple[tuple[int, int], ...]) -> list[tuple[int | None, int, int]]:
    """Megatron's order of linear_qkv rows: for each group its query heads, its key head, its value head."""
    heads = model.num_attention_heads // model.num_query_groups * model.kv_channels
    segments: list[tuple[int | None, int, int]] = []
    for group in range(model.num_query_groups):
        for (source, first), rows in zip(sources, (heads, model.kv_channels, model.kv_channels), strict=True):
            segments.append((source, first + group * rows, rows))
    return segments


def _qkv(shard: Shard) -> Placement:
    """q, k and v of HF interleaved by group; fewer groups than ranks cut through a group, as megatron-core does."""
    model, rows = shard.model, shard.shape[0]
    query, key = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    segments = _qkv_segments(model, ((0, 0), (1, 0), (2, 0)))
    rest = shard.shape[1:]
    return Placement(0, _cut(segments, shard.rank * rows, rows), [(query, *rest), (key, *rest), (key, *rest)])


def _qkv_fused(shard: Shard) -> Placement:
    """One HF tensor with all query rows, then key, then value (Phi-3)."""
    model, rows = shard.model, shard.shape[0]
    query, key = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    segments = _qkv_segments(model, ((0, 0), (0, query), (0, query + key)))
    return Placement(0, _cut(segments, shard.rank * rows, rows), [(query + 2 * key, *shard.shape[1:])])


def _gated(shard: Shard) -> Placement:
    """linear_fc1 of a gated MLP: this rank's rows of gate, then the same rows of up."""
    half = shard.shape[0] // 2
    index = _rows(shard.rank * half, half)
    whole = (half * shard.size, *shard.shape[1:])
    return Placement(0, [Piece(half, 0, index), Piece(half, 1, index)], [whole, whole])


def _gated_fused(shard: Shard) -> Placement:
    """One HF tensor with all gate rows, then all up rows (Phi-3)."""
    half = shard.shape[0] // 2
    whole = half * shard.size
    pieces = [Piece(half, 0, _rows(first + shard.rank * half, half)) for first in (0, whole)]
    return Placement(0, pieces, [(2 * whole, *shard.shape[1:])])


def _experts_gated(shard: Shard) -> Placement:
    """Stacked [experts, hidden, gate then up], transposed against ours (Llama 4)."""
    half, hidden = shard.shape[0] // 2, shard.shape[1]
    whole = half * shard.size
    pieces = [
        Piece(half, 0, (shard.expert, slice(None), *_rows(first + shard.rank * half, half)), transposed=True)
        for first in (0, whole)
    ]
    return Placement(0, pieces, [(_num_experts(shard), hidden, 2 * whole)])


def _experts_interleaved(shard: Shard) -> Placement:
    """Stacked [experts, hidden, gate and up by turns] (gpt-oss); its bias is [experts, gate and up by turns]."""
    half, rest = shard.shape[0] // 2, shard.shape[1:]
    first, last = 2 * shard.rank * half, 2 * (shard.rank + 1) * half
    middle = tuple(slice(None) for _ in rest)
    pieces = [Piece(half, 0, (shard.expert, *middle, slice(first + up, last, 2)), transposed=bool(rest)) for up in (0, 1)]
    return Placement(0, pieces, [(_num_experts(shard), *rest, 2 * half * shard.size)])


def _experts_down(shard: Shard) -> Placement:
    """Stacked [experts, ffn, hidden], transposed against ours, cut along ffn (Llama 4, gpt-oss)."""
    hidden, ffn = shard.shape
    piece = Piece(ffn, 0, (shard.expert, *_rows(shard.rank * ffn, ffn)), transposed=True)
    return Placement(1, [piece], [(_num_experts(shard), ffn * shard.size, hidden)])


def _experts_whole(shard: Shard) -> Placement:
    """Stacked [experts, ...], the same on every tensor-parallel rank (biases of linear_fc2)."""
    return Placement(0, [Piece(shard.shape[0], 0, (shard.expert,))], [(_num_experts(shard), *shard.shape)])


def _num_experts(shard: Shard) -> int:
    return shard.model.moe.num_moe_experts or 0


def _mamba_cut(shard: Shard, widths: Sequence[int]) -> Placement:
    """Bands of rows that are each cut over the ranks; a shard holds its part of every band."""
    pieces, first = [], 0
    for width in widths:
        rows = width // shard.size
        pieces.append(Piece(rows, 0, _rows(first + shard.rank * rows, rows)))
        first += width
    return Placement(0, pieces, [(first, *shard.shape[1:])])


def _mamba_in(shard: Shard) -> Placement:
    """in_proj of Mamba-2: bands z, x, B, C, dt."""
    inner, state, heads = _mamba_widths(shard.model)
    return _mamba_cut(shard, (inner, inner, state, state, heads))


def _mamba_conv(shard: Shard) -> Placement:
    """conv1d of Mamba-2 over bands x, B, C."""
    inner, state, _ = _mamba_widths(shard.model)
    return _mamba_cut(shard, (inner, state, state))


def _mamba_widths(model: ModelConfig) -> tuple[int, int, int]:
    mamba, heads = model.mamba, model.mamba.mamba_num_heads or 0
    return heads * mamba.mamba_head_dim, mamba.mamba_num_groups * mamba.mamba_state_dim, heads


LAYOUTS: Mapping[str, Callable[[Shard], Placement]] = {
    "whole": _whole,
    "row": _row,
    "column": _column,
    "vocabulary": _vocabulary,
    "qkv": _qkv,
    "qkv_fused": _qkv_fused,
    "gated": _gated,
    "gated_fused": _gated_fused,
    "experts_gated": _experts_gated,
    "experts_interleaved": _experts_interleaved,
    "experts_down": _experts_down,
    "experts_whole": _experts_whole,
    "mamba_in": _mamba_in,
    "mamba_conv": _mamba_conv,
}

REPLICATED = frozenset({"whole", "experts_whole"})
"""Layouts whose shard is the same on every tensor-parallel rank."""
