"""States of megatron-core's distributed optimizer: each process writes and reads its own shard, and nothing is gathered.

The files are those of megatron-core's `fully_reshardable` format (one tensor of the parameter's shape a state, under
`optimizer.state.{param,exp_avg,exp_avg_sq}.KEY`), which any layout and megatron.training read. Upstream fills them by gathering
the states of all data-parallel ranks in tensors of the whole buffer (core/optimizer/distrib_optimizer.py:
get_parameter_state_dp_zero), twice and a half the memory of training. Here a shard, a flat range of a parameter, is written as
the few boxes that it is made of:

    parameter [3, 4], elements 2 to 9 -> [0:1, 2:4], [1:2, 0:4], [2:3, 0:1]    (rows x columns, 2 + 4 + 1 elements)
"""

import math
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sft.checkpoint.metadata import require_whole
from megatron_sft.errors import CheckpointError

FORMAT = "fully_reshardable"
_STATE = "optimizer.state."
_MAIN, _OTHERS_MAIN = f"{_STATE}param.", f"{_STATE}fp32_param."
"""The fp32 weights, and those of an optimizer that is not distributed. One of fp32 models has the model's own instead."""


@dataclass(frozen=True)
class Box:
    """A rectangular part of one state of one parameter that this process holds."""

    key: str
    size: tuple[int, ...]
    """Shape of the whole tensor."""
    offsets: tuple[int, ...]
    data: torch.Tensor
    """A view of the state in the box's shape: what is copied into it is loaded."""
    is_main: bool
    """No other process writes it."""
    is_padded: bool
    """The whole tensor may have another size in the checkpoint (padded vocabulary)."""

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.data.shape))


def distributed_parts(optimizer: Any) -> list[DistributedOptimizer] | None:
    """The distributed optimizers inside megatron-core's optimizer; None where it is of another kind."""
    parts = list(getattr(optimizer, "chained_optimizers", [optimizer]))
    return parts if parts and all(isinstance(part, DistributedOptimizer) for part in parts) else None


def settings(parts: list[DistributedOptimizer], is_loading: bool) -> dict[Any, Any]:
    """What of the optimizer's state dict is not sharded; on loading, states that do not exist yet are allocated."""
    if is_loading:
        for part in parts:
            if part.optimizer is not None:  # megatron-core would make them on the device first
                part.init_state_fn(part.optimizer, part.config)
            part.load_state_dict(part.state_dict())
    states = [{**part.state_dict(), "param_state_sharding_type": FORMAT} for part in parts]
    return states[0] if len(states) == 1 else dict(enumerate(states))


def boxes(parts: list[DistributedOptimizer], model_state: dict[str, Any]) -> Iterator[Box]:
    """Every box of every state that this process holds.

    Args:
        parts: distributed_parts of the optimizer, with states.
        model_state: the model's sharded state dicts, whose leaves hold the parameters themselves.
    """
    bases = {id(base.data): base for base in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    for part in parts:
        for dtypes in part.gbuf_ranges:
            for buckets in dtypes.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        span = ranges["param"]
                        states = part._get_main_param_and_optimizer_states(parameter)
                        for name, state in states.items():
                            if name != "step":
                                yield from _state_boxes(name, state, bases[id(parameter)], span.start, span.end)


def _state_boxes(name: str, state: torch.Tensor, base: Any, start: int, end: int) -> Iterator[Box]:
    """Boxes of a flat state [end - start] of elements start to end of the parameter of `base`."""
    parameter, flat = base.data, state.detach().reshape(-1)
    assert flat.numel() == end - start, f"{base.key}: {flat.numel()} elements of {name} for {end - start}"
    shards = list(nested_values(base.build())) if isinstance(base, ShardedTensorFactory) else [base]
    for shard in shards:
        assert isinstance(shard, ShardedTensor) and shard.data.is_contiguous(), f"{shard.key}: no contiguous part of a parameter"
        first = shard.data.storage_offset() - parameter.storage_offset()
        low, high = max(start, first), min(end, first + shard.data.numel())
        if low >= high:
            continue
        outer = shard.prepend_axis_num
        for offsets, shape in flat_boxes(tuple(shard.data.shape), low - first, high - first):
            count = math.prod(shape)
            at = (*shard.global_offset[:outer], *(a + b for a, b in zip(shard.global_offset[outer:], offsets, strict=True)))
            view = flat[low - start : low - start + count].view(*([1] * outer), *shape)
            is_main = not any(shard.replica_id[:2])
            key = f"{_STATE}{name}.{shard.key}"
            yield Box(key, tuple(shard.global_shape), at, view, is_main, shard.allow_shape_mismatch)
            low += count


def names_of_others(boxes: Iterable[Box], known: Container[str]) -> list[Box]:
    """The boxes, the fp32 weights under the name that they have in a checkpoint (`known`) of an optimizer not distributed."""
    renamed = []
    for box in boxes:
        name = box.key.removeprefix(_MAIN)
        others = [key for key in (_OTHERS_MAIN + name, name) if key in known]
        is_other = box.key.startswith(_MAIN) and box.key not in known and others
        renamed.append(replace(box, key=others[0]) if is_other else box)
    return renamed


def take_names(wanted: Any, known: Container[str]) -> None:
    """names_of_others the other way: sharded tensors of an optimizer that is not distributed, in a checkpoint of one that was."""
    for leaf in nested_values(wanted):
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory) and leaf.key.startswith(_OTHERS_MAIN):
            key = _MAIN + leaf.key.removeprefix(_OTHERS_MAIN)
            if leaf.key not in known and key in known:
                leaf.key = key


def flat_boxes(shape: tuple[int, ...], start: int, end: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the boxes that elements start to end of a row-major tensor are, in their order.

    flat_boxes((3, 4), 2, 9) -> [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if not shape:
        return [((), ())] if start < end else []
    inner, boxes = math.prod(shape[1:]), []
    while start < end:
        row, column = divmod(start, inner)
        rows = (end - start) // inner
        if column or not rows:  # a part of one row
            stop = min(end, (row + 1) * inner)
            boxes += [((row, *offsets), (1, *sizes)) for offsets, sizes in flat_boxes(shape[1:], column, stop - row * inner)]
            start = stop
        else:
            boxes.append(((row, *(0 for _ in shape[1:])), (rows, *shape[1:])))
            start += rows * inner
    return boxes


def write_items(parts: list[DistributedOptimizer], model_state: dict[str, Any]) -> list[tuple[WriteItem, torch.Tensor]]:
    """What this process writes of the optimizer's states, as items of a torch.distributed.checkpoint plan."""
    return [
        (
            WriteItem(
                index=MetadataIndex(box.key, torch.Size(box.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(box.chunk, TensorProperties.create_from_tensor(box.data), torch.Size(box.size)),
            ),
            box.data,
        )
        for box in boxes(parts, model_state)
        if box.is_main
    ]


class BoxPlanner(DefaultLoadPlanner):
    """Reads boxes of a checkpoint, however it is cut, into the states that they are views of.

    Raises:
        CheckpointError: the checkpoint lacks a state, or has it in another shape.
    """

    def __init__(self, folder: Path, wanted: list[Box]):
        super().__init__()
        self._folder = folder
        self._wanted = {(box.key, box.offsets): box for box in wanted}

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for key in {box.key for box in self._wanted.values()}:
            if self.metadata and isinstance(stored := self.metadata.state_dict_metadata.get(key), TensorStorageMetadata):
                require_whole(self._folder, key, stored)
        for box in self._wanted.values():
            stored = self.metadata.state_dict_metadata.get(box.key) if self.metadata else None
            shape = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else None
            if shape is None or (shape != box.size and not box.is_padded):
                raise CheckpointError(
                    f"{self._folder}: {box.key} has shape {shape}; expected {box.size}. It is of another model or optimizer: "
                    "check the flags, or load the weights alone with --finetune."
                )
            if shape != box.size and box.key.startswith(_STATE) and not box.key.startswith((_MAIN, _OTHERS_MAIN)):
                box.data.zero_()  # rows that the checkpoint does not have are padding; their weights are the model's
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(box.key, stored, [box.chunk])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        tensor = self._wanted[index.fqn, tuple(index.offset or ())].data
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """resolve_tensor gave the state itself."""
