"""Soft caps in one fused kernel: torch's FlexAttention (arXiv 2412.05496) over a whole packed row (--attention-backend flex).

Compiled on CUDA, where no score leaves the kernel. A CPU runs the same functions written out, which the tests compare with
attention.py's blocks.
"""

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Queries and keys of a tile."""


def row_mask(ends: Sequence[int], window: int | None, device: torch.device) -> BlockMask:
    """Which tiles of a row a kernel looks at, and who sees whom in them. Made by arithmetic: no S x S mask exists on the way.

    Args:
        ends: cu_seqlens of the documents, on the host; [0, 3, 8].
        window: tokens that a query sees, itself included; None: all before it.
        device: of the row.
    """
    tokens, lengths = ends[-1], torch.tensor(ends).diff()
    document = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths).to(device, non_blocking=True)
    rows = -(-tokens // BLOCK)
    counts, tiles = torch.zeros(1, 1, rows, dtype=torch.int32), torch.zeros(1, 1, rows, rows, dtype=torch.int32)
    for row in range(rows):
        first = row * BLOCK
        begin = ends[bisect.bisect_right(ends, first) - 1]  # of the first query's document: no query of the tile sees further
        low = (begin if window is None else max(begin, first - window + 1)) // BLOCK
        counts[0, 0, row] = row - low + 1
        tiles[0, 0, row, : row - low + 1] = torch.arange(low, row + 1)

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = (document[query] == document[key]) & (query >= key)
        return seen if window is None else seen & (query - key < window)

    counts, tiles = counts.to(device, non_blocking=True), tiles.to(device, non_blocking=True)
    return BlockMask.from_kv_blocks(counts, tiles, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens))


def capped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float | None, softcap: float
) -> torch.Tensor:
    """Attention with scores softcap * tanh(score / softcap).

    Args:
        query: [T, heads, dim].
        key: [T, groups, dim].
        value: as key.
        mask: of the row, from row_mask.
        scale: None: 1 / sqrt(dim).
        softcap: in units of scaled scores.

    Returns:
        [T, heads, dim].
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    attend: Any = _compiled() if query.is_cuda else flex_attention
    grouped = q.shape[1] != k.shape[1]
    output: torch.Tensor = attend(q, k, v, score_mod=_capped(softcap), block_mask=mask, scale=scale, enable_gqa=grouped)
    return output[0].transpose(0, 1)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    """One function a cap: another object would be compiled anew."""

    def capped(score: torch.Tensor, batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
