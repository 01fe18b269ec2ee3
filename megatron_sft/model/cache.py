"""Keys and values of earlier tokens, for generation: what a decode step attends to besides its own tokens.

Prefill computes attention as training does and stores keys and values; decode adds one token a document.
"""

import itertools
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class CachedSeqParams(PackedSeqParams):
    """A packed row whose documents have earlier tokens in a cache.

    Prompts of lengths [3, 2] with capacity 8: prefill has cu_seqlens_q [0, 3, 5] and lengths [0, 0]; the first decode
    step has cu_seqlens_q [0, 1, 2] and lengths [3, 2], the next one lengths [4, 3].
    """

    lengths: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """[documents] int64: tokens in the cache before this row."""
    capacity: int = 0
    """Tokens a document can have in the cache; 0: nothing is stored (prefill without decode)."""
    decodes: bool = False
    """The row has one new token a document."""
    longest: int = 0
    """Tokens of the longest document, this row's included."""
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    """By layer number: [documents, groups, capacity, head_dim]."""
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    masks: dict[tuple[int | None, int | None], torch.Tensor | None] = field(default_factory=dict)
    """By window and chunk: which cached tokens the new one sees, [documents, 1, 1, longest] bool; made once a step."""

    def store(self, layer_number: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts a prompt row's keys and values [tokens, groups, head_dim] into the cache."""
        if not self.capacity:
            return
        offsets = self.cu_seqlens_q.tolist()
        for cache, new in ((self.keys, key), (self.values, value)):
            cache[layer_number] = new.new_zeros(len(offsets) - 1, new.shape[1], self.capacity, new.shape[2])
            for document, (first, last) in enumerate(itertools.pairwise(offsets)):
                cache[layer_number][document, :, : last - first] = new[first:last].transpose(0, 1)

    def extend(self, layer_number: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds one token a document.

        Args:
            layer_number: whose cache it is.
            key: [documents, groups, head_dim].
            value: as key.

        Returns:
            Keys and values up to the longest document, each [documents, groups, longest, head_dim].
        """
        rows = torch.arange(len(self.lengths), device=key.device)
        for cache, new in ((self.keys, key), (self.values, value)):
            cache[layer_number][rows, :, self.lengths] = new
        return self.keys[layer_number][:, :, : self.longest], self.values[layer_number][:, :, : self.longest]

    def advance(self, longest: int) -> None:
        """The next row has one more token a document; the longest document then has `longest` tokens."""
        documents, where = len(self.lengths), self.cu_seqlens_q.device
        self.lengths = self.lengths + (1 if self.decodes else self.cu_seqlens_q.diff().long())
        offsets = torch.arange(documents + 1, dtype=torch.int32, device=where)
        self.cu_seqlens_q: torch.Tensor = offsets
        self.cu_seqlens_kv = offsets
        self.decodes, self.longest, self.max_seqlen_q = True, longest, 1
        self.masks.clear()

    def keep(self, documents: torch.Tensor) -> None:
        """Forgets all documents but these (int64 indices)."""
        self.lengths = self.lengths[documents]
        offsets = self.cu_seqlens_q[: len(documents) + 1]
        self.cu_seqlens_q = offsets
        self.cu_seqlens_kv = offsets
        self.masks.clear()
        for cache in (self.keys, self.values):
            for layer in cache:
                cache[layer] = cache[layer][documents]

    def mask(self, window: int | None, chunk: int | None) -> torch.Tensor | None:
        """True where a new token sees a cached one; None: everywhere.

        Args:
            window: newest tokens that are seen, the new one included; None: all.
            chunk: tokens see only their own chunk of this many; None: all.
        """
        if (window, chunk) not in self.masks:
            positions = torch.arange(self.longest, device=self.lengths.device)[None]
            last = self.lengths[:, None]
            seen = positions <= last
            if window is not None:
                seen &= positions > last - window
            if chunk is not None:
                seen &= positions >= last - last % chunk
            self.masks[window, chunk] = None if bool(seen.all()) else seen[:, None, None]
        return self.masks[window, chunk]
