"""The tensors of an HF folder: which file holds each, checked without trusting any of it; and a streaming writer.

Reads and writes safetensors only. Names and layouts are weights.py's business.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_sft.errors import CheckpointError
from megatron_sft.files import regular
from megatron_sft.hf.families import TEXT_PREFIX

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
"""Largest safetensors file that save_hf writes, as transformers' save_pretrained does."""

WRITE_WINDOW_BYTES = 2**27
"""Written to the disk and dropped from the page cache each time. An export that stays cached takes as much memory again
as the model: fresh pages, which cost more CPU time than everything else (a virtual machine gets them one by one)."""

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and its shape and dtype as the file's header gives them."""

    name: str
    """In the file; names.TEXT_PREFIX is cut off elsewhere."""
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """{safetensors file: names that the index expects there, or None without an index}."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        return _indexed_files(folder, index)
    if single.exists():
        return {_inside(folder, SINGLE): None}
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: weights only as pickle (.bin, .pt); expected safetensors. Unpickling can run code, so it is not "
            "done here: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) on a machine where "
            "you trust the file converts it."
        )
    others = [path.name for path in sorted(folder.glob("*")) if path.suffix in (".gguf", ".safetensors", ".h5", ".msgpack")]
    held = f" (there is {', '.join(others[:3])})" if others else ""
    raise CheckpointError(
        f"{folder}: no {SINGLE} and no {INDEX}{held}; expected the weights of a Hugging Face model. Download it again."
    )


def _indexed_files(folder: Path, index: Path) -> dict[Path, list[str] | None]:
    try:
        weight_map = json.loads(regular(index).read_text(encoding="utf-8"))["weight_map"]
        names: dict[str, list[str]] = {}
        for tensor, file in weight_map.items():
            names.setdefault(str(file), []).append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: not a safetensors index ({error!r}); expected an object with weight_map. Copy it again."
        ) from None
    files: dict[Path, list[str] | None] = {_inside(folder, file): tensors for file, tensors in names.items()}
    missing = sorted(path.name for path in files if not os.path.isfile(path))
    if missing:
        shown = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} weight files are missing ({shown}); expected all that {INDEX} names. "
            "Finish the download."
        )
    if SINGLE not in names and (folder / SINGLE).exists():  # transformers takes that one, and leaves the index out
        raise CheckpointError(f"{folder}: has {SINGLE}, and {INDEX} that does not name it; expected one of them. Remove one.")
    return files


def _inside(folder: Path, name: str) -> Path:
    """The file of that name in the folder. Raises CheckpointError when the name leads out of it.

    A link is followed: the hub's cache keeps its files as links to ../../blobs, and those perhaps as links to the blobs that
    all its models share (huggingface_hub 2). So links are accepted to files below the models--* folder of the cache and below
    blobs/ beside it, and refused to any other place.
    """
    plain = Path(name).name == name and "\0" not in name
    path = folder / (name if plain else ".")
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and len(root.parents) > 2:
        allowed += [root.parents[1], root.parents[2] / "blobs"]
    target = path.resolve()
    if not plain or not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{folder}: weight file {name[:200]!r} lies outside the folder; expected a plain file name of this folder. "
            "Copy the file into the folder, or do not use this checkpoint."
        )
    return path


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """safetensors' own reader of one file; damage becomes a CheckpointError."""
    try:
        with safe_open(str(regular(path)), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or cut off ({error}); expected a complete safetensors file. Download it again."
        ) from None


@contextmanager
def one_thread() -> Iterator[None]:
    """Copies by one thread of torch: one fills the memory's bandwidth, two on a busy machine wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder by name; of a multimodal checkpoint, the text model's. Reads headers only.

    Raises:
        CheckpointError: no weights, damaged files, an index that does not agree with its files or leads elsewhere,
            a tensor in two files, a dtype other than fp32, bf16 and fp16.
    """
    tensors: dict[str, StoredTensor] = {}
    faults = []
    for path, expected in _files(Path(folder)).items():
        try:
            for tensor in _tensors_of(path, expected):
                if tensor.name in tensors:
                    faults.append(f"{path}: {tensor.name} is in two files; expected it in one. Download the folder again.")
                tensors[tensor.name] = tensor
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join(faults[:8] + ([f"and {len(faults) - 8} more files"] if len(faults) > 8 else [])))
    text = {name.removeprefix(TEXT_PREFIX): value for name, value in tensors.items() if name.startswith(TEXT_PREFIX)}
    return text or tensors


def _tensors_of(path: Path, expected: list[str] | None) -> list[StoredTensor]:
    """The tensors of one file; `expected` are the names that the index has there."""
    with open_file(path) as file:
        names = list(file.keys())
        if expected is not None and set(expected) != set(names):
            odd = sorted(set(expected) ^ set(names))
            raise CheckpointError(
                f"{path}: {len(odd)} tensors (first: {odd[0]}) are in only one of the file and {INDEX}; expected "
                "the same names in both. Download both again."
            )
        tensors = []
        for name in names:
            view = file.get_slice(name)
            dtype = DTYPES.get(view.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{path}: {name} has dtype {view.get_dtype()}; expected one tensor of {', '.join(DTYPES)}. Save the "
                    "model again with transformers, unquantised."
                )
            tensors.append(StoredTensor(name, path, tuple(view.get_shape()), dtype))
    return tensors


class TensorWriter:
    """Writes tensors of known shapes into safetensors files, in any order and without holding them.

    Format: 8 bytes header length, JSON header, data (https://huggingface.co/docs/safetensors/index#format).
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        single: str = SINGLE,
        notes: Mapping[str, str] | None = None,
    ):
        self._notes = {"format": "pt", **(notes or {})}
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        self._cached_bytes = 0
        groups = _shards(tensors)
        total, weight_map = 0, {}
        for number, names in enumerate(groups, start=1):
            file = single if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            total += self._create(folder / file, {name: tensors[name] for name in names})
            weight_map.update(dict.fromkeys(names, file))
        if len(groups) > 1:
            content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _create(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
        header: dict[str, Any] = {"__metadata__": self._notes}
        offset = 0
        for name, (shape, dtype) in tensors.items():
            end = offset + _num_bytes(shape, dtype)
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        os.write(descriptor, len(text).to_bytes(8, "little") + text)
        os.posix_fallocate(descriptor, 0, 8 + len(text) + offset)
        for name in tensors:
            self._places[name] = (descriptor, 8 + len(text) + header[name]["data_offsets"][0])
        return offset

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Stores one tensor, which has the shape and dtype that were announced."""
        descriptor, offset = self._places.pop(name)
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while data:
            written = os.pwrite(descriptor, data[:WRITE_WINDOW_BYTES], offset)
            data, offset = data[written:], offset + written
            self._cached_bytes += written
            if self._cached_bytes >= WRITE_WINDOW_BYTES:
                self._flush()

    def _flush(self) -> None:
        for descriptor in self._descriptors:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._cached_bytes = 0

    def close(self) -> None:
        """Brings everything to the disk. Tensors that were announced and not written are a bug."""
        assert not self._places, f"never written: {sorted(self._places)[:3]}"
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        self.abandon()

    def abandon(self) -> None:
        """Closes the files as they are."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def _shards(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[list[str]]:
    """Names in order, a new file whenever the next tensor would pass MAX_SHARD_BYTES."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, (shape, dtype) in tensors.items():
        num_bytes = _num_bytes(shape, dtype)
        if groups[-1] and size + num_bytes > MAX_SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    return groups
