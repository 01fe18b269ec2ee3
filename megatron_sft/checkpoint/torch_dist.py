"""megatron-core's torch_dist format: what each process writes and reads, without any unpickling that could run code.

megatron-core translates a sharded state dict into torch.distributed.checkpoint items and back; the bytes are ours, for
three reasons. Reading: torch unpickles `.metadata` and byte items without restriction; here an allow-list decides.
Writing: torch's writer copies every view, works in one thread and checks nothing; here several threads write straight
from the tensors and checksum on the way. Both versions of megatron-core get the same files.

Files of a checkpoint: __{rank}_{n}.distcp (one torch.save archive an item), .metadata (pickle of torch's Metadata),
common.pt (torch.save of what is not sharded), metadata.json (names the format).
"""

import io
import json
import pickle
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as core_torch
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_sft.checkpoint.manifest import ChecksumFile, FileRecord, write_file

READ_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    ImportError,
    AssertionError,
    pickle.UnpicklingError,
    CheckpointingException,
)
"""What torch, pickle and megatron-core raise on a damaged file or on one of another model."""

_COMMON = "common.pt"
_METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = {
    *(
        (_CHECKPOINT + "metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *((_CHECKPOINT + "filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *((_CHECKPOINT + "planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *(("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the data classes of torch's checkpoint metadata and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint of tensors needs")


def read_metadata(folder: Path) -> Metadata:
    """Reads `.metadata` without running code from it.

    Raises:
        pickle.UnpicklingError: it names anything but torch's metadata classes, or a file outside its folder.
    """
    with open(folder / _METADATA, "rb") as file:
        metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}, not torch's Metadata")
    for info in (metadata.storage_data or {}).values():
        if Path(info.relative_path).name != info.relative_path:
            raise pickle.UnpicklingError(f"it refers to a file outside the checkpoint: {info.relative_path}")
    return metadata


def safe_load(file: Any) -> Any:
    """torch.load with weights_only=True and megatron-core's list of harmless classes (Namespace, enums, arrays)."""
    from megatron.core.safe_globals import SAFE_GLOBALS

    with torch.serialization.safe_globals(list(SAFE_GLOBALS)):
        return torch.load(file, map_location="cpu", weights_only=True)


class _SafeReader(dcp.FileSystemReader):
    """torch's reader (its tensors are read with weights_only=True already) with our `read_metadata`."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self._read = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._read


class _SafePlanner(core_torch.MCoreLoadPlanner):
    """megatron-core's planner; torch's `load_bytes` unpickles without restriction, this one does not."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = safe_load(value)


def read_common(folder: Path, metadata: Metadata | None = None) -> dict[str, Any]:
    """What is not sharded: common.pt, or the item that megatron-core >= 0.17 writes in its place."""
    if (folder / _COMMON).is_file():
        return dict(safe_load(folder / _COMMON))
    metadata = metadata or read_metadata(folder)
    key = ShardedObject("common_state", None, (1,), (0,)).unique_key
    holder: dict[str, Any] = {key: io.BytesIO()}
    planner = _SafePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _read_items(holder, folder, metadata, planner)
    return dict(holder[key][0])


def read_state(folder: Path, wanted: dict[str, Any], metadata: Metadata, common: dict[str, Any]) -> dict[str, Any]:
    """Reads what `wanted` asks for; megatron_core.dist_checkpointing.load with safe readers.

    Args:
        folder: iter_%07d or release.
        wanted: sharded state dict of this process; its tensors may be read in place.
        metadata: read_metadata(folder).
        common: read_common(folder); the result is merged into it.
    """
    sharded, local, factories = load_preprocess(wanted)
    merge(common, local)
    sharded, _ = extract_sharded_base(sharded)
    tensors = [t for t in _leaves(sharded) if not isinstance(t, ShardedObject)]
    by_key, flat_mapping, rename_mapping = core_torch._replace_state_dict_keys_with_sharded_keys(sharded)
    items = core_torch.mcore_to_pyt_state_dict(by_key, True)
    planner = _SafePlanner(
        shapes_validation_sharded_tensors=[t for t in tensors if not t.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={t.key: t for t in tensors if t.allow_shape_mismatch},
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    _read_items(items, folder, metadata, planner)
    unwrapped = {key: core_torch._unwrap_pyt_sharded_tensor(value) for key, value in items.items()}
    loaded = core_torch._replace_sharded_keys_with_state_dict_keys(unwrapped, flat_mapping, rename_mapping)
    core_torch._restore_dict_types(loaded, sharded)
    merge(common, loaded)
    return apply_factory_merges(common, factories)


def read_with(planner: dcp.LoadPlanner, folder: Path, metadata: Metadata) -> None:
    """Reads what a planner asks for by itself, without a state dict."""
    _read_items({}, folder, metadata, planner)


def _read_items(items: dict[str, Any], folder: Path, metadata: Metadata, planner: dcp.LoadPlanner) -> None:
    """Fills `items`; raises the reason itself where torch raises a BaseException with a traceback for a message."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(items, storage_reader=_SafeReader(folder, metadata), planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise reason from error


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
        write_file(folder / _METADATA, pickle.dumps(job.metadata)),
        write_file(folder / _COMMON, job.common),
        write_file(folder / "metadata.json", json.dumps(_FORMAT).encode()),
    ]


_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
