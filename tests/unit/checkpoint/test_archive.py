"""torch.save's archives read without torch.load: the same values, and nothing larger than the file."""

import codecs
import io
import pickle
import random
import re
import struct
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from megatron_sft.checkpoint.archive import DTYPES, TENSOR_TYPES, Archive
from megatron_sft.checkpoint.pickles import Record

NUMBERS = [torch.int8, torch.int64, torch.bool, *(dtype for dtype in TENSOR_TYPES.values() if dtype.is_floating_point)]


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def opened(data: bytes) -> Archive:
    return Archive(io.BytesIO(b"before" + data + b"after"), 6, len(data))


def read(value: Any) -> Any:
    return opened(saved(value)).read()


def test_plain_values_come_back() -> None:
    value = {
        "args": Namespace(a=1, b=[1.5, None], c="text", d={"e": (True, False)}),
        7: [-1, 2**40, "\u00e9", b"bytes", ()],
        "path": Path("/a/b"),
        "size": torch.Size((2, 3)),
        "dtype": torch.bfloat16,
        "set": {1, 2},
        "random": random.getstate(),
        (torch.bfloat16, torch.float32, 1): "of megatron-core's dp_reshardable",
    }
    assert read(value) == {**value, "path": "/a/b"}


@pytest.mark.parametrize("dtype", ["uint32", "int64", "float32", "float64", "uint8", "bool"])
def test_arrays_come_back(dtype: str) -> None:
    for array in (np.arange(12).astype(dtype).reshape(3, 4), np.asfortranarray(np.ones((2, 3), dtype)), np.zeros(0, dtype)):
        found = read([array])[0]
        assert found.dtype == array.dtype and np.array_equal(found, array)
    assert np.array_equal(read(np.random.get_state())[1], np.random.get_state()[1])


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_tensors_come_back_bit_by_bit(dtype: torch.dtype) -> None:
    whole = torch.arange(24).ne(7) if dtype is torch.bool else torch.arange(24 * dtype.itemsize).to(torch.uint8).view(dtype)
    views = [whole.view(4, 6), whole.view(4, 6).t(), whole[5:9], whole[:0], whole[3]]
    for tensor in (*views, torch.nn.Parameter(whole.clone(), requires_grad=False)):
        found = read({"t": tensor})["t"]
        assert (found.dtype, found.shape) == (dtype, tensor.shape)
        assert found.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_what_nobody_asks_for_stays_a_description() -> None:
    found = read({"args": Namespace(backend=AttnBackend.flash, device=torch.device("cpu"))})["args"]
    assert type(found.backend) is Record and found.backend.name.startswith("megatron.core.")
    assert type(found.device) is Record


def test_a_tensor_is_read_only_where_it_is_no_larger_than_expected() -> None:
    data = saved(torch.arange(12.0).view(3, 4))
    assert torch.equal(opened(data).read_tensor((3, 4)), torch.arange(12.0).view(3, 4))
    assert opened(data).read_tensor((5, 4)).shape == (3, 4)
    for shape in ((2, 4), (3, 3), (12,), (3, 4, 1), ()):
        with pytest.raises(pickle.UnpicklingError, match=r"it holds a tensor of shape \[3, 4\]; expected a part of"):
            opened(data).read_tensor(shape)
    with pytest.raises(pickle.UnpicklingError, match="it holds no tensor"):
        opened(saved({"t": torch.ones(1)})).read_tensor((1,))
    with pytest.raises(pickle.UnpicklingError, match="a storage of 4000000 bytes; expected at most"):
        opened(saved(torch.ones(10**6)[:1])).read_tensor((1,))


class Pickled:
    """Writes itself as a call, to make pickles that torch.save would not."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call


def archive_of(described: Any, storages: dict[str, bytes]) -> Archive:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value if isinstance(value, tuple) and value and value[0] == "storage" else None

    buffer, pickled = io.BytesIO(), io.BytesIO()
    Pickler(pickled, 2).dump(described)
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in {"data.pkl": pickled.getvalue(), **storages}.items():
            file.writestr(f"archive/{name}", data)
    return opened(buffer.getvalue())


def tensor(offset: Any, size: Any, stride: Any, key: Any = "0", kind: Any = torch.FloatStorage) -> Pickled:
    storage = ("storage", kind, key, "cpu", 6)
    return Pickled(torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {}))


def test_a_described_tensor_is_as_torch_would_build_it() -> None:
    data = struct.pack("<6f", *range(6))
    assert archive_of([tensor(1, (2, 2), (2, 1))], {"data/0": data}).read()[0].tolist() == [[1, 2], [3, 4]]
    assert archive_of(tensor(0, (2, 3), (3, 1)), {"data/0": data}).read_tensor((2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "made",
    [
        tensor(0, (7,), (1,)),
        tensor(5, (2,), (1,)),
        tensor(-1, (2,), (1,)),
        tensor(0, (2,), (-1,)),
        tensor(0, (2,), (6,)),
        tensor(0, (2**40,), (0,)),
        tensor(0, (2**62,), (1,)),
        tensor(0, (2**40, 2**40, 0), (1, 1, 1)),
        tensor(0, (2,), (1, 1)),
        tensor(0, (True,), (1,)),
        tensor("0", (2,), (1,)),
        tensor(0, [2], (1,)),
        tensor(0, (2,), (1,), key="1"),
        tensor(0, (2,), (1,), key="../data.pkl"),
        tensor(0, (2,), (1,), key=7),
        tensor(0, (2,), (1,), kind="FloatStorage"),
        tensor(0, (2,), (1,), kind=torch.DoubleStorage, key="odd"),
        Pickled(torch._utils._rebuild_tensor_v2, (1, 2, 3)),
        Pickled(torch._utils._rebuild_tensor_v2, ()),
        Pickled(torch._utils._rebuild_parameter, (1,)),
        Pickled(torch.Size, (5,)),
        Pickled(torch.Size, ((1, -1),)),
        Pickled(Namespace, (), {1: 2}),
        {Pickled(torch.Size, ((1,),)): 1},
    ],
    ids=range(24),
)
def test_tensors_outside_of_their_storage_are_refused(made: Any) -> None:
    archive = archive_of([made], {"data/0": struct.pack("<6f", *range(6)), "data/odd": b"123"})
    if isinstance(made, Pickled) and made.call[0] is torch._utils._rebuild_parameter:
        assert type(archive.read()[0]) is Record
        return
    with pytest.raises(pickle.UnpicklingError):
        archive.read()


def test_a_description_cannot_stand_for_billions() -> None:
    shared: list[Any] = [0] * 10
    for _ in range(12):
        shared = [shared] * 10
    with pytest.raises(pickle.UnpicklingError, match="nested without end"):
        archive_of(shared, {}).read()
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(pickle.UnpicklingError, match="nested without end"):
        archive_of(endless, {}).read()


def repeated(kind: str, times: int) -> list[Any]:
    """A large part, to which something refers again and again."""
    text = "a" * 10**5
    if kind == "bytes":
        return [Pickled(codecs.encode, (text, "latin1"))] * times  # pickled once, like every object that comes again
    if kind == "bytes anew":
        return [Pickled(codecs.encode, (text, "latin1")) for _ in range(times)]
    if kind == "array":
        return [np.zeros(10**5, np.uint8)] * times
    if kind == "path":
        return [Pickled(PosixPath, (text,)) for _ in range(times)]
    numbers = list(range(10**5))
    return [Pickled(set, (numbers,)) for _ in range(times)]


@pytest.mark.parametrize("kind", ["bytes", "bytes anew", "array", "path", "set"])
def test_what_is_large_and_comes_again_is_counted_each_time(kind: str) -> None:
    assert len(archive_of(repeated(kind, 2), {}).read()) == 2
    with pytest.raises(pickle.UnpicklingError, match="it stands for far more than its size"):
        archive_of(repeated(kind, 1000), {}).read()


def test_numbers_of_one_hash_make_no_set() -> None:
    [found] = archive_of([Pickled(set, ([i * (2**61 - 1) for i in range(1, 50_000)],))], {}).read()
    assert type(found) is Record


@pytest.mark.parametrize("name", [name for name in DTYPES if name not in TENSOR_TYPES])
def test_tensors_of_types_that_nothing_converts_are_refused(name: str) -> None:
    storage = ("storage", torch.storage.UntypedStorage, "0", "cpu", 16)
    made = Pickled(torch._utils._rebuild_tensor_v3, (storage, 0, (1,), (1,), False, {}, DTYPES[name]))
    with pytest.raises(pickle.UnpicklingError, match="without storage, shape and type"):
        archive_of(made, {"data/0": bytes(16)}).read_tensor((1,))


def test_a_tensor_has_as_many_dimensions_as_torch_computes_with() -> None:
    with pytest.raises(pickle.UnpicklingError, match="a shape that is none"):
        archive_of(tensor(0, (1,) * 65, (1,) * 65), {"data/0": bytes(4)}).read()


def changed_directory(data: bytes, kind: str) -> bytes:
    first, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    if kind == "many files":
        entry = b"PK\x01\x02" + bytes(42)
        return entry * 400_000 + b"PK\x05\x06" + bytes(4) + struct.pack("<HHIIH", 400_000 & 0xFFFF, 0, 400_000 * 46, 0, 0)
    if kind == "two of a name":
        with warnings.catch_warnings(), zipfile.ZipFile(buffer := io.BytesIO(data), "a") as file:
            warnings.simplefilter("ignore")
            file.writestr("other/data.pkl", b"\x80\x02K\x02.")
        return buffer.getvalue()
    extra = struct.pack("<HHQ", 1, 8, int(kind))  # zip64's place of the first file
    name_length = int.from_bytes(data[first + 28 : first + 30], "little")
    entry = data[first : first + 30] + struct.pack("<H", len(extra)) + data[first + 32 : first + 42] + b"\xff" * 4
    entry += data[first + 46 : first + 46 + name_length] + extra + data[first + 46 + name_length : end]
    return data[:first] + entry + data[end : end + 12] + struct.pack("<I", len(entry)) + data[end + 16 :]


DIRECTORIES = {
    "many files": "its directory has 18400000 bytes; expected at most 16777216",
    "two of a name": "it has two files of one name",
    **{str(place): "its data.pkl is not where its directory says" for place in (2**62, 2**63, 2**64 - 1)},
}


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_directories_that_lie(kind: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02K\x01.")
    assert opened(buffer.getvalue()).read() == 1
    with pytest.raises(pickle.UnpicklingError, match=re.escape(DIRECTORIES[kind])):
        opened(changed_directory(buffer.getvalue(), kind)).read()


def test_files_of_an_archive_are_not_larger_than_it() -> None:
    data = bytearray(saved({"t": torch.ones(100)}))
    places = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    for place in places:  # sizes in the directory: 4 GB
        changed = bytearray(data)
        changed[place + 20 : place + 28] = struct.pack("<II", 2**32 - 16, 2**32 - 16)
        with pytest.raises(pickle.UnpicklingError, match="its files are larger than its"):
            opened(bytes(changed))


def test_damage_anywhere_is_one_kind_of_error_or_another_value() -> None:
    data, chance = saved({"t": torch.arange(6.0), "a": [1, {"b": Namespace(c=2)}]}), random.Random(1)
    refused = 0
    for _ in range(1000):
        changed = bytearray(data)
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        end = chance.randrange(len(data)) if chance.random() < 0.2 else len(data)
        try:
            found = opened(bytes(changed[:end])).read()
            assert len(str(found)) > 0
        except pickle.UnpicklingError:
            refused += 1
    assert refused > 200
