"""torch.save's archives (common.pt, each item of a .distcp file), read without torch.load.

An archive is a zip file of a pickle and of storages, each a file of raw bytes. torch.load unpacks compressed files (4 MB that
become 4 GB), and even with weights_only builds what a pickle asks for: arrays of any size, objects with any attributes. Here
files must be stored as they are, the pickle is read as a description (pickles.py), and of what it describes only tensors,
arrays, Namespaces and plain values are made. Everything else that megatron-core's checkpoints name stays a Record.

Source of the format: torch/serialization.py:_save, torch/_utils.py:_rebuild_tensor_v2 and _v3 (2.11 to 2.13).
"""

import io
import math
import pickle
import re
import struct
import sys
import zipfile
from argparse import Namespace
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch

from megatron_sft.checkpoint.pickles import STORAGE, Name, Record, describe, is_key, quoted

_MAX_PICKLE_BYTES = 1 << 24
_MAX_DEPTH = 100
_MAX_DIMENSIONS = 64
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
"""{"torch.float32": torch.float32, ...}"""
TENSOR_TYPES = {
    name: dtype
    for name, dtype in DTYPES.items()
    if re.fullmatch(r"torch\.(bool|u?int(8|16|32|64)|b?float(16|32|64)|float8_\w+)", name)
}
"""Those that torch converts into each other; not complex, quantised and packed ones."""
_NUMBERS = re.compile(r"[biuf][1-8]")
"""numpy's names of types."""
_SCALARS = (str, int, float, bool, bytes, type(None))
_MADE = {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "collections.OrderedDict",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "builtins.set",
    "builtins.bytes",
    "torch.Size",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch.storage.UntypedStorage",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
    *(f"torch.{name}" for name in _STORAGES),
    *DTYPES,
}
_NAMED = {"torch.device", "torch.serialization._get_layout", "_io.BytesIO", "signal.Signals"}
"""What also occurs in Megatron-LM's checkpoints, besides classes of megatron-core."""


def is_allowed(name: str) -> bool:
    """Whether an archive may contain a dotted name."""
    module, _, last = name.rpartition(".")
    return name in _MADE or name in _NAMED or (module.startswith("megatron.core.") and last.isidentifier())


class Archive:
    """An archive inside a file.

    Args:
        file: open for reading; it must stay so.
        start, length: of the archive, in bytes.

    Raises:
        pickle.UnpicklingError: it is damaged, compressed, or describes what no checkpoint contains; so do the methods.
        OSError: it cannot be read.
    """

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._view = _View(file, start, length)
        self._files = _listed(self._view)
        order = self._bytes("byteorder", 16) if "byteorder" in self._files else b"little"
        if order != sys.byteorder.encode():
            raise pickle.UnpicklingError(f"its bytes are in {order[:16]!r} order; this machine's is {sys.byteorder}")
        data = self._bytes("data.pkl", _MAX_PICKLE_BYTES)
        self._described = describe(data, is_allowed)
        self._left = 10**6 + 4 * len(data)
        """Values that may still be made: a description that refers to its parts again and again can stand for billions."""
        self._storages: dict[str, torch.Tensor] = {}
        self._max_storage_bytes = length

    def read(self) -> Any:
        """Everything that the archive holds. Ordered dicts become dicts, paths text."""
        return self._made(self._described, 0)

    def read_tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor that the archive holds, which must not be larger than `shape` in any dimension: nothing else is read."""
        record = self._described
        if type(record) is Record and record.name == "torch._utils._rebuild_parameter" and record.arguments:
            record = record.arguments[0]
        if type(record) is not Record or not record.name.startswith("torch._utils._rebuild_tensor"):
            raise pickle.UnpicklingError("it holds no tensor")
        sizes = shape_of(record.arguments[2] if len(record.arguments) > 2 else None)
        if len(sizes) != len(shape) or any(a > b for a, b in zip(sizes, shape, strict=True)):
            raise pickle.UnpicklingError(f"it holds a tensor of shape {list(sizes)}; expected a part of {list(shape)}")
        self._max_storage_bytes = 4096 + 16 * math.prod(sizes)  # writers copy a view out of its storage
        return self._tensor(record)

    def _bytes(self, name: str, limit: int) -> bytes:
        start, size = self._place(name)
        if size > limit:
            raise pickle.UnpicklingError(f"its {name} has {size} bytes; expected at most {limit}")
        self._view.seek(start)
        return self._view.read(size)

    def _place(self, name: str) -> tuple[int, int]:
        """(first byte, bytes) of a file of the archive."""
        if name not in self._files:
            raise pickle.UnpicklingError(f"it has no {quoted(name)}")
        info = self._files[name]
        self._view.seek(max(0, info.header_offset))
        header = self._view.read(30)  # the local header of the zip format, which has lengths of its own
        if info.header_offset < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise pickle.UnpicklingError(f"its {name} is not where its directory says")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + info.file_size > self._view.length:
            raise pickle.UnpicklingError(f"its {name} goes beyond its end")
        return start, info.file_size

    def _charge(self, size: int) -> None:
        """Counts `size` more elements or bytes: however often a pickle refers to a large part, it is made each time."""
        self._left -= size
        if self._left < 0:
            raise pickle.UnpicklingError("it stands for far more than its size")

    def _made(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            raise pickle.UnpicklingError("it is nested without end")
        kind = type(value)
        if kind in _SCALARS:
            return value
        if kind is list or kind is tuple:
            return kind(self._made(item, depth + 1) for item in value)
        if kind is dict:
            return {self._key(key): self._made(item, depth + 1) for key, item in value.items()}
        if kind is Name:
            return DTYPES.get(value.text, value)
        return self._object(value, depth)

    def _key(self, key: Any) -> Any:
        if type(key) is tuple:
            return tuple(self._key(part) for part in key)
        if type(key) is Record:
            raise pickle.UnpicklingError("it has an object as a key")
        return DTYPES.get(key.text, key) if type(key) is Name else key

    def _object(self, record: Record, depth: int) -> Any:
        name, arguments = record.name, record.arguments
        if name in ("argparse.Namespace", "types.SimpleNamespace"):
            if arguments or type(record.state) is not dict or not all(type(key) is str for key in record.state):
                raise pickle.UnpicklingError("it has a Namespace without names")
            made = Namespace()
            vars(made).update(self._made(record.state, depth + 1))
            return made
        if name.startswith("torch._utils._rebuild_tensor"):
            return self._tensor(record)
        if name == "torch._utils._rebuild_parameter" and arguments and type(arguments[0]) is Record:
            return self._tensor(arguments[0])
        if name == "torch.Size":
            return shape_of(record)
        if name.startswith("pathlib.") and all(type(part) is str for part in arguments):
            self._charge(len(arguments) + sum(map(len, arguments)))
            return str(PurePosixPath(*arguments))
        if name == "builtins.set" and len(arguments) == 1 and type(arguments[0]) is list:
            self._charge(len(arguments[0]))
            return set(arguments[0]) if all(type(item) in _SCALARS and is_key(item) for item in arguments[0]) else record
        if name in ("_codecs.encode", "builtins.bytes"):
            text = _latin(record)
            self._charge(len(text))
            return text
        if name.endswith("multiarray._reconstruct"):
            array = _array(record)
            self._charge(array.nbytes)
            return array
        return record

    def _tensor(self, record: Record) -> torch.Tensor:
        """_rebuild_tensor_v2(storage, offset, size, stride, ...), _v3(the same, requires_grad, hooks, dtype, ...)."""
        try:
            storage, offset, size, stride = record.arguments[:4]
            dtype = TENSOR_TYPES[record.arguments[6].text] if record.name.endswith("_v3") else None
        except (ValueError, LookupError, AttributeError):
            raise pickle.UnpicklingError("it has a tensor without storage, shape and type") from None
        elements, size, stride = self._storage(storage, dtype), shape_of(size), shape_of(stride)
        if type(offset) is not int or offset < 0 or len(size) != len(stride) or math.prod(filter(None, size)) >= 1 << 62:
            raise pickle.UnpicklingError("it has a tensor of no shape")
        count, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if not count:
            return torch.empty(size, dtype=elements.dtype)
        if max(count - 1, last) >= elements.numel():
            raise pickle.UnpicklingError(f"it has a tensor of shape {list(size)} in a storage of {elements.numel()} elements")
        return elements.as_strided(size, stride, offset)

    def _storage(self, record: Any, dtype: torch.dtype | None) -> torch.Tensor:
        """The elements of ("storage", type, key, device, number), read once; [number] of the type, or of `dtype`."""
        if type(record) is not Record or record.name != STORAGE or len(record.arguments) != 5:
            raise pickle.UnpicklingError("it has a tensor without a storage")
        _, kind, key, _, _ = record.arguments
        if type(kind) is not Name or type(key) is not str:
            raise pickle.UnpicklingError("it has a storage without type and name")
        dtype = dtype or _STORAGES.get(kind.text.removeprefix("torch."))
        if dtype is None:
            raise pickle.UnpicklingError(f"it has a storage of type {kind.text}, which has no elements")
        if key not in self._storages:
            start, size = self._place(f"data/{key}")
            if size > self._max_storage_bytes:
                raise pickle.UnpicklingError(f"it has a storage of {size} bytes; expected at most {self._max_storage_bytes}")
            raw = torch.empty(size, dtype=torch.uint8)
            self._view.seek(start)
            self._view.fill(raw.numpy())
            self._storages[key] = raw
        raw = self._storages[key]
        if raw.numel() % dtype.itemsize:
            raise pickle.UnpicklingError(f"it has a storage of {raw.numel()} bytes of {dtype}")
        return raw.view(dtype)


def _listed(view: "_View") -> dict[str, zipfile.ZipInfo]:
    """The files of a zip archive by their names below its folder; all together they are no larger than the archive."""
    try:
        files = zipfile.ZipFile(view, "r").infolist()  # type: ignore[arg-type]  # seek, tell and read are all it uses
    except (zipfile.BadZipFile, RuntimeError, ValueError, struct.error, EOFError) as error:
        raise pickle.UnpicklingError(f"it is no archive of torch.save ({str(error)[:100]})") from None
    if len({info.filename.partition("/")[2] for info in files}) != len(files):
        raise pickle.UnpicklingError("it has two files of one name")
    if any(info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size for info in files):
        raise pickle.UnpicklingError("it is compressed, which torch.save's archives are not")
    if sum(info.file_size for info in files) > view.length:
        raise pickle.UnpicklingError(f"its files are larger than its {view.length} bytes")
    return {info.filename.partition("/")[2]: info for info in files}


class _View(io.RawIOBase):
    """A part of a file as if it were a file."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._file, self._start, self.length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self.length)[whence]
        if at < 0:
            raise io.UnsupportedOperation("before the beginning of the archive")
        self._at = at
        return at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.length - self._at)
        size = left if size is None or size < 0 else min(size, left)
        if size > _MAX_PICKLE_BYTES:  # zipfile's, of a directory, which becomes ten times as large
            raise pickle.UnpicklingError(f"its directory has {size} bytes; expected at most {_MAX_PICKLE_BYTES}")
        self._file.seek(self._start + min(self._at, self.length))
        data = self._file.read(size)
        self._at += len(data)
        return data

    def fill(self, buffer: np.ndarray) -> None:
        """Reads exactly as many bytes as there is room for. `buffer`: [bytes] uint8."""
        self._file.seek(self._start + self._at)
        done = 0
        while done < len(buffer):
            count = self._file.readinto(buffer[done:])  # type: ignore[attr-defined]  # files have it
            if not count:
                raise pickle.UnpicklingError("its file ends before it")
            done += count


def shape_of(value: Any) -> torch.Size:
    """torch.Size of a described one, or of a tuple of its numbers."""
    if type(value) is Record and value.name == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if type(value) is not tuple or len(value) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise pickle.UnpicklingError("it has a shape that is none")
    return torch.Size(value)


def _latin(record: Any) -> bytes:
    """_codecs.encode(text, "latin1") or bytes(): bytes, as protocol 2 writes them."""
    try:
        if record.name == "builtins.bytes" and not record.arguments:
            return b""
        (text, encoding) = record.arguments
        if encoding != "latin1" or record.name != "_codecs.encode":
            raise ValueError(encoding)
        return bytes(text.encode("latin1"))
    except (ValueError, AttributeError):
        raise pickle.UnpicklingError("it has bytes that are none") from None


def _array(record: Record) -> np.ndarray:
    """numpy's _reconstruct(ndarray, (0,), b"b") with state (version, shape, dtype, is_fortran, bytes)."""
    try:
        _, shape, kind, is_fortran, data = record.state
        if kind.name != "numpy.dtype" or not _NUMBERS.fullmatch(kind.arguments[0]) or (kind.state and kind.state[1] == ">"):
            raise ValueError(kind)
        data = data if type(data) is bytes else _latin(data)
        return np.frombuffer(data, np.dtype(kind.arguments[0])).reshape(shape_of(shape), order="F" if is_fortran else "C").copy()
    except (ValueError, TypeError, LookupError, AttributeError):
        raise pickle.UnpicklingError("it has an array that is none") from None
