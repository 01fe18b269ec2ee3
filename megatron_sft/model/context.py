"""Context parallelism: which part of a packed row a rank has, and how attention sees whole documents.

The row is cut contiguously, whatever documents it holds: rank r of c has [r * T / c, (r + 1) * T / c).
cu_seqlens stays that of the whole row. Two ways (--cp-comm-type):
a2a: ranks trade tokens for heads, attend to whole documents with some of the heads, and trade back (arXiv 2309.14509);
allgather: each rank gathers all keys and values and attends with its own queries (arXiv 2407.21783, section 3.3.2).
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import all_to_all

from megatron_sft.model.cache import CachedSeqParams


def shard_tokens(row: torch.Tensor) -> torch.Tensor:
    """This context-parallel rank's part of a row [1, T]; T is a multiple of the context-parallel size."""
    size = parallel_state.get_context_parallel_world_size()
    return row if size == 1 else row.chunk(size, dim=1)[parallel_state.get_context_parallel_rank()]


def token_lengths(packed: PackedSeqParams, count: int) -> torch.Tensor:
    """Length of each token's document, cached tokens included: [count] of this rank's part."""
    tokens = packed.cu_seqlens_q.diff()
    if isinstance(packed, CachedSeqParams):
        return F.pad((tokens + packed.lengths).repeat_interleave(tokens), (0, count - packed.tokens))
    return shard_tokens(tokens.repeat_interleave(tokens)[None])[0]


@dataclass(frozen=True)
class Span:
    """A document's queries in a part of a row, and the keys that they can see."""

    queries: int
    """Tokens of the document in this part of the row."""
    offset: int
    """Position of the first of them in the document."""
    first_key: int
    """Where the document begins in the whole row."""

    @property
    def keys(self) -> int:
        """Tokens from the document's first to the last query."""
        return self.offset + self.queries


def spans_of(cu_seqlens: list[int], chunk: int | None, first: int, last: int) -> list[Span]:
    """What the tokens first..last-1 of a row attend to.

    Args:
        cu_seqlens: documents of the whole row; [0, 3, 8].
        chunk: documents are cut into pieces of this many tokens that do not see each other (Llama 4); None: whole.
        first: of this part; 2.
        last: end of this part; 6. -> [Span(1, offset 2, first_key 0), Span(3, offset 0, first_key 3)]
    """
    spans = []
    for begin, end in itertools.pairwise(cu_seqlens):
        step = chunk or max(end - begin, 1)
        for start in range(begin, end, step):
            low, high = max(start, first), min(start + step, end, last)
            if low < high:
                spans.append(Span(high - low, low - start, start))
    return spans


def tokens_to_heads(x: torch.Tensor, group: Any) -> torch.Tensor:
    """[T / c, heads, dim] -> [T, heads / c, dim]; fewer heads than ranks: each is given to several ranks."""
    size = group.size()
    if x.shape[1] % size:
        assert size % x.shape[1] == 0, f"{x.shape[1]} heads over {size} context-parallel ranks"  # problems.py
        x = x.repeat_interleave(size // x.shape[1], dim=1)
    parts = x.unflatten(1, (size, -1)).transpose(0, 1).contiguous()  # [c, T / c, heads / c, dim]
    return all_to_all(group, parts).flatten(0, 1)


def heads_to_tokens(x: torch.Tensor, group: Any) -> torch.Tensor:
    """[T, heads / c, dim] -> [T / c, heads, dim]: tokens_to_heads the other way."""
    parts = all_to_all(group, x.contiguous().unflatten(0, (group.size(), -1)))  # [c, T / c, heads / c, dim]
    return parts.transpose(0, 1).flatten(1, 2)


def gather_keys(key: torch.Tensor, value: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[T / c, groups, dim] each -> [T, groups, dim] on every rank; gradients are added up where they came from."""
    return tuple(gather_from_sequence_parallel_region(x.contiguous(), group=group) for x in (key, value))  # type: ignore
