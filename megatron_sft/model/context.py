"""Context parallelism: which part of a packed row a rank has.

The row is cut contiguously, whatever documents it holds: rank r of c has [r * T / c, (r + 1) * T / c).
cu_seqlens stays that of the whole row; attention.py brings together what a document needs.
"""

import torch
from megatron.core import parallel_state


def shard_tokens(row: torch.Tensor) -> torch.Tensor:
    """This context-parallel rank's part of a row [1, T]; T is a multiple of the context-parallel size."""
    size = parallel_state.get_context_parallel_world_size()
    return row if size == 1 else row.chunk(size, dim=1)[parallel_state.get_context_parallel_rank()]
