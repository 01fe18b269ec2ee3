"""The .metadata file: places, parts and names that are not what a checkpoint has."""

import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_sft.checkpoint.metadata import METADATA, read_metadata, require_whole
from megatron_sft.errors import CheckpointError


def stored(size: tuple[int, ...] = (4,), chunks: Any = None) -> TensorStorageMetadata:
    whole = [ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))]
    return TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), whole if chunks is None else chunks)


def read(folder: Path, tensors: dict[str, Any], places: dict[Any, Any]) -> Metadata:
    (folder / METADATA).write_bytes(pickle.dumps(Metadata(tensors, storage_data=places)))
    return read_metadata(folder)


def test_an_ordinary_one_comes_back(tmp_path: Path) -> None:
    index, place = MetadataIndex("a", torch.Size([0])), _StorageInfo("__0_0.distcp", 0, 16)
    found = read(tmp_path, {"a": stored()}, {index: place})
    assert found.state_dict_metadata["a"].size == (4,)
    assert found.storage_data == {index: place}


def of_lists(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


PATHS = {"2^60 lists": of_lists(60), "nested": [of_lists(0)], "escape": "../\x1b[31m", "number": 2**80, "none": None}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_place_that_is_no_name_is_not_spelled_out(tmp_path: Path, path: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"it refers to a file outside the checkpoint: (a |'\.\./\\x1b\[31m')"):
        read(tmp_path, {}, {MetadataIndex("a"): _StorageInfo(path, 0, 0)})


def test_shared_lists_of_parts_are_counted_each_time(tmp_path: Path) -> None:
    parts = [ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))] * 20_000
    with pytest.raises(pickle.UnpicklingError, match="more parts than it has bytes"):
        read(tmp_path, {f"t{number}": stored(chunks=parts) for number in range(2000)}, {})


@pytest.mark.parametrize("offset", [(5,), (0, 0), (2**61,), ()], ids=str)
@pytest.mark.parametrize("name", ["a", "unknown"])
def test_places_are_of_parts_inside_their_tensor(tmp_path: Path, name: str, offset: tuple[int, ...]) -> None:
    if name == "unknown" and not offset:
        return
    index = MetadataIndex(name, torch.Size(offset))
    with pytest.raises(pickle.UnpicklingError, match=f"a part of '{name}' that is outside of it"):
        read(tmp_path, {"a": stored()}, {index: _StorageInfo("__0_0.distcp", 0, 16)})


def test_no_tensor_has_more_elements_than_numbers_count(tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match="it has a tensor of shape"):
        read(tmp_path, {"a": stored((2**40, 2**40))}, {})


def part(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


PINWHEEL = [part((0, 0), (1, 2)), part((0, 2), (2, 1)), part((2, 1), (1, 2)), part((1, 0), (2, 1))]
WHOLE = [
    stored(()),
    stored((0, 3)),
    stored((3, 3)),
    stored((3, 3), [*PINWHEEL, part((1, 1), (1, 1))]),
    stored(
        (4, 2, 3),
        [part((0, 0, 0), (4, 1, 3)), part((0, 1, 0), (2, 1, 3)), part((2, 1, 0), (2, 1, 3)), part((1, 1, 1), (0, 1, 2))],
    ),
]
NOT_WHOLE = [
    stored((), []),
    stored((3, 3), []),
    stored((3, 3), PINWHEEL),
    stored((3, 3), [*PINWHEEL, part((0, 0), (1, 1))]),  # as many elements as there are, one twice and one never
    stored((3, 3), [part((0, 0), (3, 3)), part((0, 0), (3, 3))]),
    stored((1,) * 40),
]


def test_parts_that_do_not_make_up_their_tensor_are_refused(tmp_path: Path) -> None:
    for tensor in WHOLE:
        require_whole(tmp_path, "a", tensor)
    for tensor in NOT_WHOLE:
        with pytest.raises(CheckpointError, match="the parts of a leave some of it out, or overlap"):
            require_whole(tmp_path, "a", tensor)


def test_ten_thousand_parts_take_no_time() -> None:
    parts = [part((row, column), (1, 1)) for row in range(100) for column in range(100)]
    begin = time.process_time()
    require_whole(Path("x"), "a", stored((100, 100), parts))
    assert time.process_time() - begin < 5
