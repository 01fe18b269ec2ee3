"""Pickles as descriptions: what ordinary ones say, and that none of them does anything."""

import collections
import pathlib
import pickle
import sys
from argparse import Namespace

import pytest
import torch

from megatron_sft.checkpoint.metadata import _ALLOWED
from megatron_sft.checkpoint.pickles import STORAGE, Name, Record, describe
from tests.soak.mutated_pickles import FOREIGN, NAMEABLE, attacks


def described(value: object, protocol: int) -> object:
    return describe(pickle.dumps(value, protocol), lambda name: True)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_themselves(protocol: int) -> None:
    shared = [1]
    value = {"a": [1, -1, 2**40, 2.5, None, True, False, "\u00e9", "x" * 300], 7: (shared, shared), (1, "b"): {}, "c": ((), [])}
    assert described(value, protocol) == value
    assert described(collections.OrderedDict(a=1), protocol) == {"a": 1}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_are_records(protocol: int) -> None:
    found = described([torch.Size((2, 3)), torch.float32, Namespace(a=1), pathlib.PosixPath("/a/b")], protocol)
    size, dtype, namespace, path = found
    assert (size.name, size.arguments, size.state) == ("torch.Size", ((2, 3),), None)
    assert dtype == Name("torch.float32")
    assert (namespace.name, namespace.arguments, namespace.state) == ("argparse.Namespace", (), {"a": 1})
    assert (path.name.split(".")[0], path.arguments) == ("pathlib", ("/", "a", "b"))


def test_a_storage_is_a_record() -> None:
    record = describe(b"\x80\x02(X\x07\x00\x00\x00storageK\x01tQ.", lambda name: False)
    assert (type(record), record.name, record.arguments) == (Record, STORAGE, ("storage", 1))


def attributes() -> dict[str, dict]:
    return {name: dict(getattr(_thing(name), "__dict__", {})) for name in NAMEABLE}


def _thing(name: str) -> object:
    module, _, last = name.rpartition(".")
    __import__(module)
    return getattr(sys.modules[module], last)


@pytest.mark.parametrize("kind", attacks(""))
def test_no_attack_changes_what_it_names(kind: str) -> None:
    before, make = attributes(), attacks("/canary")[kind]
    for name in NAMEABLE:
        try:
            found = describe(b"\x80\x02" + make(name) + b".", lambda name: True)
        except pickle.UnpicklingError:
            continue
        assert type(found) in (Record, Name, list, dict), name
    assert attributes() == before
    assert not pathlib.Path("/canary").exists()


@pytest.mark.parametrize("name", [*FOREIGN, "torch.load", "torch.distributed.checkpoint.metadata.os", "torch.Size.mro"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_other_names_are_refused(name: str, protocol: int) -> None:
    module, _, last = name.rpartition(".")
    as_lines, as_text = f"c{module}\n{last}\n.".encode(), b"\x8c" + bytes([len(module)]) + module.encode()
    as_text += b"\x8c" + bytes([len(last)]) + last.encode() + b"\x93."
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint of tensors needs"):
        describe(b"\x80\x02" + as_lines if protocol == 2 else b"\x80\x04" + as_text, _ALLOWED.__contains__)


@pytest.mark.parametrize("data", [b"", b".", b"\x80", b"\x80\x02", b"\x80\x63.", b"\x80\x02N", b"\x80\x02h\x01.", b"\xff"])
def test_damage_is_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        describe(data, lambda name: True)


def test_every_prefix_of_a_pickle_is_one_kind_of_error() -> None:
    data = pickle.dumps({"a": [torch.Size((1, 2)), torch.float32, Namespace(a=1)], "b": ("x" * 300, 2**40)}, 4)
    for end in range(len(data) - 1):
        with pytest.raises(pickle.UnpicklingError):
            describe(data[:end], lambda name: True)


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


LONG = b"X" + (10**6).to_bytes(4, "little") + b"a" * 10**6
KEYS = {
    "a long tuple, hashed each time": b"(" + b"K\x01" * 200_000 + b"tq\x00N" + b"h\x00N" * 200_000,
    "long texts, compared each time": LONG + b"N" + LONG + b"q\x00N" + b"h\x00N" * 400_000,
    "numbers of one hash": b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, 100_000)),
    "pairs of numbers, which can be chosen to have one hash": number(2**40) * 2 + b"\x86N",
}


@pytest.mark.parametrize("items", KEYS.values(), ids=KEYS)
def test_keys_that_keep_a_dict_busy_for_hours_are_refused(items: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="as a key that no data has"):
        describe(b"\x80\x02}(" + items + b"u.", lambda name: False)


@pytest.mark.parametrize("made", [b"]", b"}", b")\x85"], ids=["list", "dict", "tuple"])
def test_a_pickle_does_not_become_sixty_times_as_large(made: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="more objects than data of its size has"):
        describe(b"\x80\x02ctorch\nSize\nq\x00" + made * 60_000 + b".", lambda name: True)
    with pytest.raises(pickle.UnpicklingError, match="nested without end"):
        describe(b"\x80\x02" + b"(" * 2000 + b".", lambda name: True)


def test_names_of_strangers_do_nothing_to_a_terminal() -> None:
    data = b"\x80\x02X\x08\x00\x00\x00\xed\xa0\x80\x1b[31mX\x01\x00\x00\x00x\x93."
    with pytest.raises(pickle.UnpicklingError) as caught:
        describe(data, lambda name: False)
    assert str(caught.value) == r"it refers to '\ud800\x1b[31m.x', which no checkpoint of tensors needs"
