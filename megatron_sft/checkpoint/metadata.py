"""The .metadata file: which tensors a checkpoint has, cut into which parts, and where each part lies.

It is a pickle of torch.distributed.checkpoint's Metadata, read as a description (pickles.py); this module makes torch's
objects of it, field by field, and takes a place in a file only where that file is one of the checkpoint's own.
"""

import collections
import itertools
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_sft.checkpoint.archive import DTYPES, shape_of
from megatron_sft.checkpoint.pickles import Name, Record, describe, quoted
from megatron_sft.checkpoint.reading import is_plain_name, read_limited
from megatron_sft.errors import CheckpointError

METADATA = ".metadata"
_MAX_BYTES = 1 << 28
_MAX_DIMENSIONS = 8
_TORCH = "torch.distributed.checkpoint."
_MCORE = "megatron.core.dist_checkpointing.strategies.torch."
_METADATA_CLASSES = (_TORCH + "metadata.Metadata", _MCORE + "MCoreMetadata")
_ALLOWED = {
    *_METADATA_CLASSES,
    *(
        f"{_TORCH}metadata.{name}"
        for name in (
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(f"{_TORCH}filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
    *(f"{_TORCH}planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    _MCORE + "MCoreSavePlan",
    "torch.Size",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib._local.PosixPath",
    *DTYPES,
}


def read_metadata(folder: Path) -> Metadata:
    """Reads `.metadata`: state_dict_metadata and storage_data, the rest is for writers.

    Raises:
        pickle.UnpicklingError: it is damaged, names anything but torch's metadata classes, or a file outside its folder.
        OSError: it cannot be read.
    """
    data = read_limited(folder / METADATA, _MAX_BYTES)
    described = describe(data, _ALLOWED.__contains__)
    if type(described) is not Record or described.name not in _METADATA_CLASSES:
        raise pickle.UnpicklingError(f"it holds a {type(described).__name__}, not torch's Metadata")
    fields = _fields(described, described.name)
    tensors, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(tensors) is not dict or type(places) is not dict or not all(type(name) is str for name in tensors):
        raise pickle.UnpicklingError("it lists no tensors and their places")
    lists = [value.state.get("chunks") for value in tensors.values() if type(value) is Record and type(value.state) is dict]
    if sum(len(parts) for parts in lists if type(parts) is list) > len(data):
        raise pickle.UnpicklingError("its tensors have more parts than it has bytes")
    stored = {name: _stored(value) for name, value in tensors.items()}
    return Metadata(stored, storage_data={_index(index, stored): _place(place) for index, place in places.items()})


def require_whole(folder: Path, key: str, stored: TensorStorageMetadata) -> None:
    """Raises CheckpointError unless a tensor's parts make it up: what no part covers would keep what was in memory before."""
    if not _is_whole(stored):
        raise CheckpointError(
            f"{folder}: the parts of {key} leave some of it out, or overlap; expected each element once. Load another iteration."
        )


def _is_whole(stored: TensorStorageMetadata) -> bool:
    """Whether its parts cover a tensor once, without a gap and without an overlap.

    Exact in linear time: take the difference along every axis of the function that counts the parts over an element. What is
    left is +1 or -1 at each part's corners, and equals that of one part of the tensor's size only where each element counts 1.
    """
    dimensions = len(stored.size)
    if dimensions > _MAX_DIMENSIONS:
        return False
    corners: collections.Counter[tuple[int, ...]] = collections.Counter()
    whole = ChunkStorageMetadata(torch.Size([0] * dimensions), stored.size)
    for part, sign in [(whole, -1), *((part, 1) for part in stored.chunks)]:
        for ends in itertools.product((0, 1), repeat=dimensions):
            corner = tuple(start + end * size for start, end, size in zip(part.offsets, ends, part.sizes, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    return not any(corners.values())


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The state of a Record of this class."""
    if type(value) is not Record or value.name != name or value.arguments or type(value.state) is not dict:
        raise pickle.UnpicklingError(f"it holds something else where a {name.rpartition('.')[2]} belongs")
    return value.state


def _stored(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(value) is Record and value.name == _TORCH + "metadata.BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(value, _TORCH + "metadata.TensorStorageMetadata")
    size, chunks, properties = shape_of(fields.get("size")), fields.get("chunks"), fields.get("properties")
    dtype = properties.state[0] if type(properties) is Record and type(properties.state) is tuple and properties.state else None
    if type(chunks) is not list or type(dtype) is not Name or dtype.text not in DTYPES:
        raise pickle.UnpicklingError("it has a tensor without type and parts")
    if math.prod(size) >= 1 << 62:
        raise pickle.UnpicklingError(f"it has a tensor of shape {list(size)}")
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[dtype.text]), size, [_chunk(chunk, size) for chunk in chunks])


def _chunk(value: Any, size: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(value, _TORCH + "metadata.ChunkStorageMetadata")
    offsets, sizes = shape_of(fields.get("offsets")), shape_of(fields.get("sizes"))
    if not len(offsets) == len(sizes) == len(size) or any(a + b > c for a, b, c in zip(offsets, sizes, size, strict=True)):
        raise pickle.UnpicklingError("it has a part that is outside of its tensor")
    return ChunkStorageMetadata(offsets, sizes)


def _index(value: Any, stored: Mapping[str, Any]) -> MetadataIndex:
    """A part's name; its offsets lie inside its tensor, so that they cannot be chosen to have one hash."""
    fields = _fields(value, _TORCH + "metadata.MetadataIndex")
    name, offset, index = fields.get("fqn"), fields.get("offset"), fields.get("index")
    if type(name) is not str or type(index) not in (int, type(None)):
        raise pickle.UnpicklingError("it has a place of nothing that has a name")
    if offset is None:
        return MetadataIndex(name, None, index)
    offset, size = shape_of(offset), getattr(stored.get(name), "size", ())
    if len(offset) != len(size) or any(start > length for start, length in zip(offset, size, strict=True)):
        raise pickle.UnpicklingError(f"it has a place of a part of {quoted(name)} that is outside of it")
    return MetadataIndex(name, offset, index)


def _place(value: Any) -> _StorageInfo:
    fields = _fields(value, _TORCH + "filesystem._StorageInfo")
    path, offset, length = fields.get("relative_path"), fields.get("offset"), fields.get("length")
    if not is_plain_name(path):
        raise pickle.UnpicklingError(f"it refers to a file outside the checkpoint: {quoted(path)}")
    if type(offset) is not int or type(length) is not int or offset < 0 or length < 0 or offset + length >= 1 << 62:
        raise pickle.UnpicklingError(f"it has no place in {path}")
    if fields.get("transform_descriptors"):
        raise pickle.UnpicklingError("its items are compressed, which megatron-core's are not")
    return _StorageInfo(str(path), offset, length)
