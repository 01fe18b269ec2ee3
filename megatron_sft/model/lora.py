"""Low-rank adapters: what a projection computes gets scale * B (A x) added, and only A and B are trained (arXiv 2106.09685).

One rule: *the delta has the base weight's parallel state.* A projection that is cut along its output has A whole on every rank,
over the rank's own tokens, and B cut as the weight is; one that is cut along its input has A cut so, and B whole. A fused
projection (queries, keys and values; gate and up; Mamba's bands) keeps an A and rows of B for each of the Hugging Face modules
that it is made of, so that what is trained is what PEFT would train. Whole factors are replicas: under sequence parallelism
megatron-core adds their gradients up over TP (`sequence_parallel`), in experts over ETP (`_summed`).

    x [tokens, in] -> A x [tokens, modules * rank] -> gathered, or reduced -> block diagonal B -> [tokens, out]

Not here: which weights have adapters and what they are called (hf/peft.py), freezing (freeze.py).
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name

from megatron_sft.config.run import LoraConfig
from megatron_sft.model.layers import NormedRowParallelLinear, WholeLinear

NAME = "lora"
"""Of the submodule that a projection gets; the names of its parameters have it."""
KINDS = (ColumnParallelLinear, RowParallelLinear, WholeLinear)


class Part(NamedTuple):
    """Consecutive rows of an adapter's factor that are consecutive rows of one module's."""

    module: int
    first: int
    """Row in the module's."""
    length: int


class Place(NamedTuple):
    """Where the adapter of one weight on one rank stands in the whole model."""

    modules: tuple[str, ...]
    """Hugging Face names of the projections that it adapts; a fused weight has several."""
    rows: tuple[Part, ...]
    """What the rows of B are, module by module."""
    outputs: tuple[tuple[int, int], ...]
    """Which outputs the rows of B add to: (first, how many), one run after the other."""
    heights: tuple[int, ...]
    """Outputs of each whole module."""
    first_column: int
    """Column of the whole weight that this rank's part begins with."""
    columns: int
    """Columns of the whole weight."""


class Factor(NamedTuple):
    """A parameter of an adapter and where it lies in the tensors of that kind, one a module."""

    parameter: torch.Tensor
    kind: str
    """lora_A, lora_B or lora_magnitude_vector."""
    parts: tuple[Part, ...]
    first_column: int
    shapes: tuple[tuple[int, ...], ...]
    """Of the whole tensor of each module."""
    is_cut: bool
    """Over the ranks that cut the weight; otherwise each of them has it."""
    transposed: bool = False
    """PEFT has it so."""


class Adapter(torch.nn.Module):
    """The adapter of one weight.

    Args:
        base: ColumnParallelLinear, RowParallelLinear or WholeLinear with its weights; it is not a submodule.
        place: of it.
        lora: rank, scale, dropout, kind.

    Raises:
        AssertionError: another kind of module.
    """

    def __init__(self, base: Any, place: Place, lora: LoraConfig):
        super().__init__()
        self.place, self.rank, self.scale, self.dropout = place, lora.lora_rank, lora.scale, lora.lora_dropout
        self._base = (base,)
        self.cut = {ColumnParallelLinear: "rows", RowParallelLinear: "columns", WholeLinear: ""}[_kind_of(base)]
        self.group: Any = base.tp_group if self.cut else parallel_state.get_tensor_model_parallel_group()
        self.is_expert = bool(getattr(base, "is_expert", False))
        self.explicit = self.is_expert and base.explicit_expert_comm
        marked: Any = base.weight if isinstance(base, WholeLinear) else base.config
        self.sequence_parallel = marked.sequence_parallel and not self.is_expert
        weight, count = base.weight, len(place.modules)
        settings: dict[str, Any] = dict(dtype=weight.dtype, device=weight.device)
        self.a = torch.nn.Parameter(torch.zeros(count * self.rank, weight.shape[1], **settings))
        height = sum(length for _, length in place.outputs)
        self.b = torch.nn.Parameter(torch.zeros(height, self.rank, **settings))
        self.magnitude = torch.nn.Parameter(torch.zeros(height, **settings)) if lora.lora_type == "dora" else None
        for parameter, dim in ((self.a, 1), (self.b, 0), (self.magnitude, 0)):
            if parameter is not None:
                mark(self, parameter, weight, dim)
        order = order_of(place.outputs, weight.shape[0])
        self.order: torch.Tensor | None
        self.register_buffer("order", None if order is None else order.to(weight.device), persistent=False)

    def forward(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The projection's output with the adapter's added.

        Args:
            x: [..., in], the input that the projection was given: this rank's tokens, or its columns.
            output: [..., out] of the projection, with its bias where it adds one.
        """
        hidden = F.linear(self._dropped(x), self._summed(self.a, self.cut != "columns")) * self.scale
        if self.cut == "rows" and not self.explicit:
            if self.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.group)
            else:
                hidden = copy_to_tensor_model_parallel_region(hidden, group=self.group)
        elif self.cut == "columns" and not self.explicit:
            if self.sequence_parallel:
                hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=self.group)
            else:
                hidden = reduce_from_tensor_model_parallel_region(hidden, group=self.group)
        whole = self.cut != "rows"
        delta = F.linear(hidden, self._by_output(self._summed(self.b, whole)))
        if self.magnitude is None:
            return output + delta
        share = self._at_outputs(self._summed(self.magnitude, whole) / self.norms().to(self.b.dtype), 1.0)
        bias = self._added_bias()
        plain = output if bias is None else output - bias
        return output + (share - 1) * plain + share * delta

    def _added_bias(self) -> torch.Tensor | None:
        base = self._base[0]
        return None if getattr(base, "skip_bias_add", True) else base.bias

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        """Ranks with the same input draw alike, those with a part of it each for themselves."""
        if not self.dropout or not self.training:
            return x
        if self.is_expert:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                return F.dropout(x, self.dropout)
        if self.sequence_parallel or self.cut == "columns":
            with get_cuda_rng_tracker().fork():
                return F.dropout(x, self.dropout)
        return F.dropout(x, self.dropout)

    def _summed(self, parameter: torch.Tensor, is_whole: bool) -> torch.Tensor:
        """The parameter; in experts, a whole factor's gradient is added up over the ranks that cut the expert.

        Each of them has a part of it: the dispatcher adds up inputs' gradients, and outputs, over these ranks.
        """
        if self.explicit and is_whole:
            return copy_to_tensor_model_parallel_region(parameter, group=self.group)
        return parameter

    def _by_output(self, b: torch.Tensor) -> torch.Tensor:
        """[out, modules * rank]: each output's row of B, beside zeros for the other modules' ranks."""
        count = len(self.place.modules)
        if count > 1:
            sizes = [0] * count
            for part in self.place.rows:
                sizes[part.module] += part.length
            b = torch.block_diag(*b.split(sizes))
        return self._at_outputs(b, 0.0)

    def _at_outputs(self, rows: torch.Tensor, otherwise: float) -> torch.Tensor:
        """Rows of B in the order of the outputs; `otherwise` where an output has none."""
        if self.order is None:
            return rows
        return torch.cat((rows, torch.full_like(rows[:1], otherwise)))[self.order]

    @torch.no_grad()
    def norms(self) -> torch.Tensor:
        """Norm of each whole row of weight + scale * B A, of the rows of B, fp32; a constant for the gradient, as in DoRA 4.3.

        Collective over the ranks that cut the weight's columns. Without the sum's matrix: |w|^2 + 2 w.d + |d|^2.
        """
        weight, a = self._base[0].weight, self.a
        b = self._by_output(self.b).float() * self.scale
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32) ** 2
        squares = squares + (2 * F.linear(weight, a).float() + b @ (a.float() @ a.float().T)).mul_(b).sum(1)
        if self.cut == "columns" and self.group.size() > 1:
            dist.all_reduce(squares, group=self.group)
        lengths = squares.clamp_(min=0).sqrt_()
        return torch.cat([lengths[first : first + length] for first, length in self.place.outputs])

    @torch.no_grad()
    def merged(self, share: torch.Tensor | None) -> torch.Tensor:
        """[out, in] fp32: this rank's part of the weight with the adapter in it.

        Args:
            share: magnitude_share(); not computed here, because it may wait for other ranks.
        """
        weight = self._base[0].weight.float() + self.scale * self._by_output(self.b.float()) @ self.a.float()
        return weight if share is None else weight * share[:, None]

    @torch.no_grad()
    def magnitude_share(self) -> torch.Tensor | None:
        """[out] fp32, what DoRA multiplies each row with; collective as `norms`."""
        return None if self.magnitude is None else self._at_outputs(self.magnitude.float() / self.norms(), 1.0)

    def factors(self) -> Iterator[Factor]:
        """Every parameter, with its place in the whole model's tensors."""
        place, rank = self.place, self.rank
        parts = tuple(Part(module, 0, rank) for module in range(len(place.modules)))
        shapes = ((rank, place.columns),) * len(place.modules)
        yield Factor(self.a, "lora_A", parts, place.first_column, shapes, self.cut == "columns")
        heights, is_cut = place.heights, self.cut == "rows"
        yield Factor(self.b, "lora_B", place.rows, 0, tuple((height, rank) for height in heights), is_cut)
        if self.magnitude is not None:
            shapes_1d = tuple((height,) for height in heights)
            yield Factor(self.magnitude, "lora_magnitude_vector", place.rows, 0, shapes_1d, is_cut)

    @torch.no_grad()
    def draw(self, how: str, seed: int) -> None:
        """Fresh values: A by the module's name, B zero, the magnitudes so that nothing changes. Collective as `norms`."""
        self.b.zero_()
        width = self.a.shape[1]
        for number, module in enumerate(self.place.modules):
            generator = self._generator(seed, module)
            whole = torch.empty(self.rank, self.place.columns)
            if how == "gaussian":
                whole.normal_(0, 1 / self.rank, generator=generator)
            else:
                bound = 1 / self.place.columns if how == "kaiming" else 6 / (self.place.columns + self.rank)
                whole.uniform_(-math.sqrt(bound), math.sqrt(bound), generator=generator)
            mine = whole[:, self.place.first_column : self.place.first_column + width]
            self.a[number * self.rank : (number + 1) * self.rank].copy_(mine)
        if self.magnitude is not None:
            self.magnitude.copy_(self.norms())

    @staticmethod
    def _generator(seed: int, module: str) -> torch.Generator:
        digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7]))

    def sharded_parameters(self, prefix: str) -> dict[str, Any]:
        """megatron-core's description of every parameter, under the names of the whole model.

        Args:
            prefix: of the adapter in its model chunk.
        """
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return {f"{prefix}{names[id(factor.parameter)]}": self._sharded(factor) for factor in self.factors()}

    def _sharded(self, factor: Factor) -> ShardedTensor | ShardedTensorFactory:
        if self.is_expert:
            data = parallel_state.get_expert_data_parallel_rank()
        else:
            data = dist.get_rank(parallel_state.get_data_parallel_group(with_context_parallel=True))
        replica = (0, 0 if factor.is_cut else self.group.rank(), data)
        keys = [f"{name}.{factor.kind}" for name in self.place.modules]
        width = factor.parameter.shape[1:]

        def shard(part: Part, data: torch.Tensor, key: str, replica_id: Any) -> ShardedTensor:
            return ShardedTensor(
                key=key,
                data=data,
                dtype=data.dtype,
                local_shape=(part.length, *width),
                global_shape=factor.shapes[part.module],
                global_offset=(part.first, *([factor.first_column] if width else [])),
                axis_fragmentations=None,
                replica_id=replica_id,
            )

        def build(key: str, value: torch.Tensor, replica_id: Any, flattened_range: Any = None) -> list[ShardedTensor]:
            lengths = [part.length for part in factor.parts]
            return [
                shard(part, data, key.replace(keys[0], keys[part.module]), replica_id)  # the optimizer's have a prefix
                for part, data in zip(factor.parts, value.split(lengths), strict=True)
            ]

        if len(factor.parts) == 1:
            return shard(factor.parts[0], factor.parameter, keys[factor.parts[0].module], replica)
        return ShardedTensorFactory(keys[0], factor.parameter, build, torch.cat, replica)


def can_adapt(base: Any) -> bool:
    """Whether a module is a projection that an adapter can be given."""
    return isinstance(base, KINDS)


def _kind_of(base: Any) -> type:
    assert can_adapt(base), f"{type(base).__name__} cannot have an adapter"
    return next(kind for kind in KINDS if isinstance(base, kind))


def order_of(outputs: Sequence[tuple[int, int]], height: int) -> torch.Tensor | None:
    """Which row of B each output has, the number of rows for none; None: they are the same.

    Example: outputs (0, 1), (3, 1) of 4 -> [0, 2, 2, 1].
    """
    starts = [0, *itertools.accumulate(length for _, length in outputs)]
    if starts[-1] == height and all(first == start for (first, _), start in zip(outputs, starts, strict=False)):
        return None
    order = torch.full((height,), starts[-1])
    for (first, length), start in zip(outputs, starts, strict=False):
        order[first : first + length] = torch.arange(start, start + length)
    return order


def mark(adapter: Adapter, parameter: torch.nn.Parameter, weight: torch.Tensor, dim: int) -> None:
    """Says megatron-core how the gradient is added up, and which of equal copies counts for the gradient's norm."""
    parameter.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
    is_cut = adapter.cut == ("columns" if dim else "rows")
    if is_cut:
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
    elif adapter.is_expert:  # megatron-core asks for the rank in TP, which is not ETP
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
        parameter.shared = adapter.group.rank() > 0  # type: ignore[attr-defined]
    else:
        parameter.sequence_parallel = adapter.sequence_parallel  # type: ignore[attr-defined]


def add_adapter(base: Any, place: Place, lora: LoraConfig) -> Adapter:
    """Gives a projection an adapter, in front of everything else that is done with its output."""
    adapter = Adapter(base, place, lora)
    base.add_module(NAME, adapter)
    if not isinstance(base, NormedRowParallelLinear):  # which adds it itself, before its norm
        base.register_forward_hook(_add, prepend=True)
    return adapter


def _add(base: Any, inputs: tuple, output: tuple) -> tuple:
    return (base.lora(inputs[0], output[0]), *output[1:])


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return f".{NAME}." in name


def adapters_of(chunk: torch.nn.Module) -> dict[str, Adapter]:
    """{name in the chunk: adapter}."""
    return {name: module for name, module in chunk.named_modules() if isinstance(module, Adapter)}
