"""What earlier tokens leave behind, for generation: keys and values of attention, states of Mamba layers.

Prefill computes as training does and keeps them; decode adds one token a document.
"""

import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

ROOM = 64
"""The cache has places for so many more tokens, at least, when it grows."""


@dataclass
class CachedSeqParams(PackedSeqParams):
    """A packed row whose documents have earlier tokens in a cache. It is whole on every context-parallel rank.

    Prompts of lengths [3, 2]: prefill has cu_seqlens_q [0, 3, 5] and lengths [0, 0]; the first decode step has
    cu_seqlens_q [0, 1, 2] and lengths [3, 2], the next one lengths [4, 3].
    """

    lengths: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """[documents] int64: tokens in the cache before this row."""
    tokens: int = 0
    """Of the documents in this row; what stands behind them fills the row up for sequence parallelism."""
    keeps: bool = False
    """Something is kept for tokens that follow."""
    decodes: bool = False
    """The row has one new token a document."""
    longest: int = 0
    """Tokens of the longest document, this row's included."""
    grown: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    """By layer number and name: keys and values, [documents, groups, places, head_dim]."""
    states: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    """By layer number and name: what does not grow with the tokens, [documents, ...]."""
    masks: dict[tuple[int | None, int | None], torch.Tensor | None] = field(default_factory=dict)
    """By window and chunk: which cached tokens the new one sees, [documents, 1, 1, longest] bool; made once per step."""

    def store(self, layer_number: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts a prompt row's keys and values [tokens, groups, head_dim] into the cache."""
        if not self.keeps:
            return
        offsets = self.cu_seqlens_q.tolist()
        for name, new in (("key", key), ("value", value)):
            cache = new.new_zeros(len(offsets) - 1, new.shape[1], self.longest + ROOM, new.shape[2])
            for document, (first, last) in enumerate(itertools.pairwise(offsets)):
                cache[document, :, : last - first] = new[first:last].transpose(0, 1)
            self.grown[layer_number, name] = cache

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
        for name, new in (("key", key), ("value", value)):
            cache = self.grown[layer_number, name]
            if cache.shape[2] < self.longest:
                cache = self.grown[layer_number, name] = F.pad(cache, (0, 0, 0, cache.shape[2] // 2 + ROOM))
            cache[rows, :, self.lengths] = new
        keys, values = self.grown[layer_number, "key"], self.grown[layer_number, "value"]
        return keys[:, :, : self.longest], values[:, :, : self.longest]

    def advance(self, longest: int) -> None:
        """The next row has one more token a document; the longest document then has `longest` tokens."""
        documents, device = len(self.lengths), self.cu_seqlens_q.device
        self.lengths = self.lengths + (1 if self.decodes else self.cu_seqlens_q.diff().long())
        offsets = torch.arange(documents + 1, dtype=torch.int32, device=device)
        self.cu_seqlens_q: torch.Tensor = offsets
        self.cu_seqlens_kv = offsets
        self.decodes, self.tokens, self.longest, self.max_seqlen_q = True, documents, longest, 1
        self.masks.clear()

    def keep(self, documents: torch.Tensor) -> None:
        """Forgets all documents but these (int64 indices), in their order; one that is named twice is there twice."""
        self.lengths = self.lengths[documents]
        offsets = torch.arange(len(documents) + 1, dtype=torch.int32, device=documents.device)
        self.cu_seqlens_q = offsets
        self.cu_seqlens_kv = offsets
        self.tokens = len(documents)
        self.masks.clear()
        for cache in (self.grown, self.states):
            for name in cache:
                cache[name] = cache[name][documents]

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
