"""megatron-core's torch_dist format: what each process writes and reads, without any unpickling that could run code.

megatron-core translates a sharded state dict into torch.distributed.checkpoint items and back; the bytes are ours, for
three reasons. Reading: torch unpickles `.metadata` and byte items without restriction; here nothing that a pickle names is
ever called (pickles.py, metadata.py, archive.py).
Writing: torch's writer copies every view, works in one thread and checks nothing; here several threads write straight
from the tensors and checksum on the way. Both versions of megatron-core get the same files.

Files of a checkpoint: __{rank}_{n}.distcp (one torch.save archive an item), .metadata (pickle of torch's Metadata),
common.pt (torch.save of what is not sharded), metadata.json (names the format).
"""

import contextlib
import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as core_torch
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_sft.checkpoint import metadata as metadata_file
from megatron_sft.checkpoint.archive import Archive
from megatron_sft.checkpoint.manifest import ChecksumFile, FileRecord, write_file
from megatron_sft.checkpoint.reading import open_regular
from megatron_sft.errors import CheckpointError

_COMMON = "common.pt"
_MAX_OBJECT_BYTES = 1 << 30
"""Of common.pt, and of an item that is no tensor."""
_DAMAGED = (
    "Expected a whole torch_dist checkpoint. Restore it from a copy, or move its folder away, so that the one before it is used."
)
_OTHER_MODEL = (
    "Expected a torch_dist checkpoint of this model and optimizer. Check the model flags, or load the weights alone with "
    "--finetune."
)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pickle.UnpicklingError) as error:
        found = f"{error.filename or ''} {error.strerror}".strip() if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{folder}: cannot be read: {found}. {_DAMAGED}") from error


def read_metadata(folder: Path) -> Metadata:
    """Reads `.metadata` without running code from it.

    Raises:
        CheckpointError: it is damaged, names anything but torch's metadata classes, or a file outside its folder.
    """
    with _explained(folder):
        return metadata_file.read_metadata(folder)


def read_common(folder: Path, metadata: Metadata | None = None) -> dict[str, Any]:
    """What is not sharded: common.pt, or the item that megatron-core >= 0.17 writes in its place.

    Raises:
        CheckpointError: it is damaged, or contains what no checkpoint contains.
    """
    if os.path.lexists(folder / _COMMON):
        with _explained(folder), open_regular(folder / _COMMON) as file:
            common = _read_object(file, 0, os.fstat(file.fileno()).st_size)
    else:
        metadata = metadata or read_metadata(folder)
        key = ShardedObject("common_state", None, (1,), (0,)).unique_key
        place = metadata.storage_data.get(MetadataIndex(key))
        if place is None:
            raise CheckpointError(f"{folder}: has no {_COMMON}. {_DAMAGED}")
        with _explained(folder), open_regular(folder / place.relative_path) as file:
            listed = _read_object(file, place.offset, place.length)
        common = listed[0] if type(listed) is list and listed else None
    if type(common) is not dict:
        raise CheckpointError(f"{folder}: its common state is no dict. {_DAMAGED}")
    return common


def _read_object(file: BinaryIO, start: int, length: int) -> Any:
    """What torch.save wrote at a place in a file, without tensors of a model."""
    if length > _MAX_OBJECT_BYTES:
        raise pickle.UnpicklingError(f"an object of {length} bytes; expected at most {_MAX_OBJECT_BYTES}")
    return Archive(file, start, length).read()


def read_state(folder: Path, wanted: dict[str, Any], metadata: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    """Reads what `wanted` asks for; megatron_core.dist_checkpointing.load with safe readers.

    Args:
        folder: iter_%07d or release.
        wanted: sharded state dict of this process; its tensors may be read in place.
        metadata: read_metadata(folder).
        common: read_common(folder); the result is merged into it.

    Raises:
        CheckpointError: the checkpoint lacks something, has it in another shape, or is damaged.
    """
    whole, local, factories = load_preprocess(wanted)
    merge(common, local)
    sharded, _ = extract_sharded_base(whole)
    tensors = [t for t in _leaves(sharded) if not isinstance(t, ShardedObject)]
    by_key, flat_mapping, rename_mapping = core_torch._replace_state_dict_keys_with_sharded_keys(sharded)
    _require_kinds(folder, by_key, metadata)
    items = core_torch.mcore_to_pyt_state_dict(by_key, True)
    planner = core_torch.MCoreLoadPlanner(
        shapes_validation_sharded_tensors=[t for t in tensors if not t.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={t.key: t for t in tensors if t.allow_shape_mismatch},
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    planner.set_up_planner(items, metadata, is_coordinator=True)
    try:
        plan = planner.create_local_plan()
    except (CheckpointingException, ValueError) as error:  # megatron-core's and torch's checks of shapes
        raise CheckpointError(f"{folder}: cannot be loaded: {str(error)[:400]}. {_OTHER_MODEL}") from error
    _read_plan(plan, planner, folder, metadata)
    for key, objects in by_key.items():
        if isinstance(objects[0], ShardedObject) and not (type(items[key]) is list and len(items[key]) == len(objects)):
            raise CheckpointError(f"{folder}: {key} is no list of {len(objects)} objects. {_DAMAGED}")
    unwrapped = {key: core_torch._unwrap_pyt_sharded_tensor(value) for key, value in items.items()}
    loaded = core_torch._replace_sharded_keys_with_state_dict_keys(unwrapped, flat_mapping, rename_mapping)
    core_torch._restore_dict_types(loaded, sharded)
    merge(common, _with_empty_lists(loaded, whole))
    return apply_factory_merges(common, factories)


def _with_empty_lists(loaded: Any, whole: Any) -> Any:
    """Puts back what extract_sharded_base leaves out of lists: groups of parameters of which this process has none.

    Without them the weights of a group would go to the one before: [[], [a], [b]] -> [[a], [b]] -> [[], [a], [b]].

    Args:
        found: loaded leaves, in the order of `whole`.
        whole: what they were extracted from.
    """
    if isinstance(loaded, dict) and isinstance(whole, dict):
        return {key: _with_empty_lists(value, whole[key]) for key, value in loaded.items()}
    if not (isinstance(loaded, list) and isinstance(whole, list)):  # a leaf; a loaded object may be a list too
        return loaded
    gone = [isinstance(item, list) and not item for item in whole]
    if len(loaded) != len(whole) - sum(gone):  # of a list in which other things are not sharded
        return loaded
    left = iter(loaded)
    return [[] if is_gone else _with_empty_lists(next(left), item) for is_gone, item in zip(gone, whole, strict=True)]


def _require_kinds(folder: Path, by_key: Mapping[str, list[Any]], metadata: Metadata) -> None:
    """Every key is there, as a tensor where a tensor is wanted."""
    for key, parts in by_key.items():
        kind = BytesStorageMetadata if isinstance(parts[0], ShardedObject) else TensorStorageMetadata
        stored = metadata.state_dict_metadata.get(key)
        if not isinstance(stored, kind):
            raise CheckpointError(f"{folder}: cannot be loaded: it has no {key}. {_OTHER_MODEL}")
        if isinstance(stored, TensorStorageMetadata):
            metadata_file.require_whole(folder, key, stored)


def read_with(planner: DefaultLoadPlanner, folder: Path, metadata: Metadata) -> None:
    """Reads what a planner asks for by itself, without a state dict; raises CheckpointError where it is damaged."""
    planner.set_up_planner({}, metadata, is_coordinator=True)
    _read_plan(planner.create_local_plan(), planner, folder, metadata)


def _read_plan(plan: LoadPlan, planner: DefaultLoadPlanner, folder: Path, metadata: Metadata) -> None:
    files: dict[str, list[tuple[_StorageInfo, ReadItem]]] = {}
    for item in plan.items:
        place = metadata.storage_data.get(item.storage_index)
        if place is None:
            raise CheckpointError(f"{folder}: a part of {item.storage_index.fqn} is nowhere in it. {_DAMAGED}")
        files.setdefault(place.relative_path, []).append((place, item))
    with _explained(folder):
        for name, places in files.items():
            with open_regular(folder / name) as file:
                for place, item in sorted(places, key=lambda pair: pair[0].offset):
                    _read_item(file, place, item, planner, metadata)


def _read_item(file: BinaryIO, place: _StorageInfo, item: ReadItem, planner: DefaultLoadPlanner, metadata: Metadata) -> None:
    key = item.storage_index.fqn
    try:
        if item.type == LoadItemType.BYTE_IO:
            planner.state_dict[item.dest_index.fqn] = _read_object(file, place.offset, place.length)
            return
        stored = metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata), "a plan reads tensors of what .metadata says is one"
        tensor = Archive(file, place.offset, place.length).read_tensor(stored.size)
        ends = [start + length for start, length in zip(item.storage_offsets, item.lengths, strict=True)]
        if any(end > size for end, size in zip(ends, tensor.shape, strict=True)):
            raise pickle.UnpicklingError(f"a part of shape {list(tensor.shape)}; expected at least {ends}")
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(f"{place.relative_path}, {key}: {error}") from None
    target = planner.resolve_tensor(item).detach()
    target.copy_(narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths))
    planner.commit_tensor(item, target)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def sharded_keys(metadata: Metadata) -> set[str]:
    """Keys of all sharded tensors and objects in a checkpoint."""
    return set(metadata.state_dict_metadata)


@dataclass
class WriteJob:
    """What this process writes in one save. `items` are replaced by staged copies in an asynchronous save."""

    items: list[tuple[WriteItem, Any]]
    metadata: Metadata | None
    """Of all processes, on rank 0 only; storage_data is still missing."""
    common: bytes
    """common.pt, serialized at once: what it was made of goes on changing. Empty on other ranks than 0."""


def plan(state: dict[str, Any], validate: bool, shards: Sequence[tuple[WriteItem, torch.Tensor]] = ()) -> WriteJob:
    """Collective: divides a state dict into what each process writes.

    Args:
        state: sharded state dict of this process, consumed.
        shards: further items of this process, as they are written.
        validate: check that the shards of all processes make up whole tensors (one more exchange).
    """
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    if validate:
        validate_sharding_integrity(determine_global_metadata(sharded)[1])
    by_key, _, _ = core_torch._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    items = core_torch.mcore_to_pyt_state_dict(by_key, False)
    planner = core_torch.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    first = dist.get_rank() == 0
    planner.set_up_planner(items, is_coordinator=first)
    local = planner.create_local_plan()
    whole = replace(local, items=[*local.items, *(item for item, _ in shards)])
    plans: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(whole, plans, dst=0)
    metadata = planner.create_global_plan(plans)[1] if plans is not None else None
    local = planner.finish_plan(local)
    buffer = io.BytesIO()
    if first:
        torch.save(common, buffer)
    own = [(item, planner.resolve_data(item)) for item in local.items]
    return WriteJob([*own, *shards], metadata, buffer.getvalue())


def write_items(folder: Path, job: WriteJob, rank: int, threads: int) -> tuple[list[WriteResult], list[FileRecord]]:
    """Writes this process's items, one file a thread.

    Raises:
        OSError: a full disk or an unwritable folder; the files so far are left for the caller to remove.
    """
    shares = _shares(job.items, threads)
    checksums = get_crc32_options()
    set_crc32_options(False)  # of torch.save's archives, a quarter of the time; nobody checks them, the manifest is
    try:
        with ThreadPoolExecutor(len(shares) or 1) as pool:
            written = [
                pool.submit(_write_share, folder / f"__{rank}_{index}.distcp", share) for index, share in enumerate(shares)
            ]
    finally:
        set_crc32_options(checksums)
    done = [future.result() for future in written]
    return [result for results, _ in done for result in results], [record for _, record in done]


def _shares(items: list[tuple[WriteItem, Any]], number: int) -> list[list[tuple[WriteItem, Any]]]:
    """Divides items into at most `number` lists of nearly equal bytes, largest item first."""
    shares: list[list[tuple[WriteItem, Any]]] = [[] for _ in range(number)]
    sizes = [0] * number
    for item, data in sorted(items, key=lambda pair: -_size_bytes(pair[1])):
        smallest = sizes.index(min(sizes))
        shares[smallest].append((item, data))
        sizes[smallest] += _size_bytes(data)
    return [share for share in shares if share]


def _size_bytes(data: Any) -> int:
    return data.nbytes if isinstance(data, torch.Tensor) else data.getbuffer().nbytes


def _write_share(path: Path, items: list[tuple[WriteItem, Any]]) -> tuple[list[WriteResult], FileRecord]:
    results = []
    file = ChecksumFile(path)
    for item, data in items:
        if file.failed:
            break
        start = file.tell()
        if item.type == WriteItemType.BYTE_IO:
            file.write(data.getbuffer())
        else:
            torch.save(compact(data), file)  # type: ignore[arg-type]  # write and flush are all it uses
        length = file.tell() - start
        results.append(WriteResult(item.index, length, _StorageInfo(path.name, start, length)))
    return results, file.close()


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU with a storage of its own size, without a copy where it is contiguous on the CPU already.

    torch.save writes whole storages: a view into a large buffer would write the buffer.
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    if tensor.numel() == 0:
        return torch.empty_like(tensor)
    return torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)


def write_metadata(folder: Path, job: WriteJob, results: list[list[WriteResult]]) -> list[FileRecord]:
    """Writes what only rank 0 writes: .metadata, common.pt and metadata.json.

    Args:
        folder: the saving folder.
        job: rank 0's.
        results: write_items' results of every rank.
    """
    assert job.metadata is not None, "only rank 0 has the global metadata"
    job.metadata.storage_data = {result.index: result.storage_data for rank in results for result in rank}
    job.metadata.storage_meta = StorageMeta()
    job.metadata.version = "1.0.0"
    return [
        write_file(folder / metadata_file.METADATA, pickle.dumps(job.metadata)),
        write_file(folder / _COMMON, job.common),
        write_file(folder / "metadata.json", json.dumps(_FORMAT).encode()),
    ]


_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
