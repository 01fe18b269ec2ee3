"""Adapters of the two ends of a model, which are cut over the vocabulary: the table of embeddings and the head.

Rows of padding behind the last token have no rows of a factor, so that a factor is the same for every padding.
Not here: adapters of projections, and what all adapters share (lora.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from megatron_sft.config.run import LoraConfig
from megatron_sft.model.lora import NAME, Adapter, Factor, Part, Place, mark, order_of


class HeadAdapter(Adapter):
    """Of a head with weights of its own, which is never called (head.py): scale * B (A h) as further columns.

    logits = [h, scale * A h] [W, B]^T
    """

    def __init__(self, base: Any, place: Place, lora: LoraConfig):
        super().__init__(base, place, lora)
        self.sequence_parallel = self.a.sequence_parallel = False  # type: ignore[attr-defined] # `forward` adds A's gradient up

    def forward(self, states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """[tokens, hidden], the same on every tensor-parallel rank -> [tokens, hidden + rank]."""
        a = copy_to_tensor_model_parallel_region(self.a, group=self.group)
        return torch.cat((states, F.linear(self._dropped(states), a) * self.scale), dim=1)

    def widened(self, weight: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, hidden + rank]."""
        return torch.cat((weight, self._by_output(self.b)), dim=1)


class EmbeddingAdapter(Adapter):
    """Of a table of embeddings: scale * B a, with a the token's row of a table of its own; no dropout, as in PEFT.

    The table `a` [rows, rank] is PEFT's lora_embedding_A turned, and cut as the embeddings are; B [hidden, rank] is whole.
    """

    def __init__(self, base: Any, place: Place, lora: LoraConfig):
        torch.nn.Module.__init__(self)
        self.place, self.rank, self.scale, self.dropout = place, lora.lora_rank, lora.scale, 0.0
        self._base = (base,)
        self.cut, self.group, self.is_expert, self.explicit = "rows", base.tp_group, False, False
        self.sequence_parallel, self.magnitude = base.reduce_scatter_embeddings, None
        weight = base.weight
        settings: dict[str, Any] = dict(dtype=weight.dtype, device=weight.device)
        self.a = torch.nn.Parameter(torch.zeros(place.rows[0].length, self.rank, **settings))
        self.b = torch.nn.Parameter(torch.zeros(weight.shape[1], self.rank, **settings))
        mark(self, self.a, weight, 0)
        mark(self, self.b, weight, 1)
        order = order_of(place.outputs, weight.shape[0])
        self.register_buffer("order", None if order is None else order.to(weight.device), persistent=False)

    def forward(self, tokens: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The embeddings with the adapter's added.

        Args:
            tokens: [batch, seq] int64, ids over the whole vocabulary.
            output: [batch, seq, hidden]; under sequence parallelism [seq / tp_size, batch, hidden].
        """
        local = tokens - self.place.rows[0].first
        here = (local >= 0) & (local < self.a.shape[0])
        local = torch.where(here, local, 0)
        rows = self.a[local] if self._base[0].deterministic_mode else F.embedding(local, self.a)
        rows = rows * here[..., None]
        if self.sequence_parallel:
            rows = reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), group=self.group)
        else:
            rows = reduce_from_tensor_model_parallel_region(rows, group=self.group)
        return output + F.linear(rows, self.b) * self.scale

    @torch.no_grad()
    def merged(self, share: torch.Tensor | None) -> torch.Tensor:
        """As Adapter's."""
        return self._base[0].weight.float() + self.scale * self._at_outputs(self.a.float(), 0.0) @ self.b.float().T

    def factors(self) -> Any:
        """As Adapter's."""
        place = self.place
        yield Factor(self.a, "lora_embedding_A", place.rows, 0, ((place.heights[0], self.rank),), True, True)
        yield Factor(self.b, "lora_embedding_B", (Part(0, 0, len(self.b)),), 0, (tuple(self.b.shape),), False)

    @torch.no_grad()
    def draw(self, how: str, seed: int) -> None:
        """The table is zero and B drawn, normal, as PEFT does it; `how` is of projections."""
        self.a.zero_()
        self.b.copy_(torch.empty(self.b.shape).normal_(generator=self._generator(seed, self.place.modules[0])))


def add_end_adapter(base: Any, place: Place, lora: LoraConfig) -> Adapter:
    """Gives a table of embeddings or a head an adapter."""
    if not isinstance(base, VocabParallelEmbedding):
        adapter: Adapter = HeadAdapter(base, place, lora)
        base.add_module(NAME, adapter)
        return adapter
    adapter = EmbeddingAdapter(base, place, lora)
    base.add_module(NAME, adapter)
    base.register_forward_hook(lambda base, inputs, output: base.lora(inputs[0], output), prepend=True)
    return adapter
