"""Pickles read as a description: nothing that one names is imported, called, built or given an attribute.

A pickle is a program for a machine that imports names and calls them. Here it runs on a machine without hands: a name becomes
a Name, and a call or an object to build becomes a Record of what was asked for. Only names of an allow-list are taken at all.
What a Record stands for is decided by whoever asked: torch_dist.py for torch's metadata, archive.py for tensors.
"""

import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Name:
    """A global name, as it was written: torch.float32."""

    text: str


@dataclass(slots=True, eq=False)
class Record:
    """A call of a name, and the state that the result was to be given."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


STORAGE = "persistent storage"
"""Name of a Record that stands for torch.save's storages; its arguments are the persistent id."""
_TAKEN = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
BINUNICODE8 BINBYTES SHORT_BINBYTES EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS BINPUT
LONG_BINPUT BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL""".split()
"""Instructions that only move data, which the standard library's machine carries out. It asks find_class for names."""
_MAX_KEY = 1024
_MAX_DEPTH = 1000
_FAULTS = (pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError, OverflowError, struct.error)
"""What the standard library's machine raises on a damaged pickle."""


def describe(data: bytes, is_allowed: Callable[[str], bool]) -> Any:
    """What a pickle describes, of None, bool, int, float, str, bytes, tuple, list, dict, Name and Record. Containers may be
    shared and contain themselves.

    Args:
        data: of protocol 2 to 5.
        is_allowed: whether a dotted name may occur.

    Raises:
        pickle.UnpicklingError: it is damaged, contains another name, or does what no pickle of data does.
    """
    machine = _Machine(data, is_allowed)
    try:
        return machine.load()
    except _FAULTS as error:
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else f"damaged ({type(error).__name__}: {error})"
        raise pickle.UnpicklingError(reason[:300]) from None


def is_key(value: Any) -> bool:
    """Whether a value may be a key. A few megabytes of others keep a dict busy for hours.

    Long tuples are hashed again each time, long texts are compared again, and numbers can be chosen to have one hash.
    """
    kind = type(value)
    if kind is tuple:
        return len(value) <= 4 and all(type(part) is not tuple and is_key(part) for part in value) and _are_small(value)
    if kind is str or kind is bytes:
        return len(value) <= _MAX_KEY
    return abs(value) < 1 << 60 if kind is int else kind in (float, bool, type(None), Name, Record)


def _are_small(parts: tuple[Any, ...]) -> bool:
    return all(type(part) is not float and (type(part) is not int or abs(part) < 1 << 15) for part in parts)


def quoted(text: Any) -> str:
    """For messages: the beginning of what a stranger wrote, without what a terminal acts on. Only texts are shown."""
    return ascii(text[:100]) if type(text) is str else f"a {type(text).__name__}"


class _Machine(pickle._Unpickler):
    """The standard library's machine in Python, with instructions of ours in place of all that reach outside."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]]
    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes, is_allowed: Callable[[str], bool]):
        super().__init__(io.BytesIO(data), fix_imports=False)
        self._is_allowed = is_allowed
        self._left = 10_000 + len(data) // 4
        """Objects that may still be made. An empty list is one byte of a pickle and 64 of memory; data has one in 9 bytes."""

    def count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise pickle.UnpicklingError("it makes more objects than data of its size has")

    def find_class(self, module: str, name: str) -> Name:
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 calls it
        if not self._is_allowed(f"{module}.{name}"):
            shown = f"{module}.{name}"
            shown = shown if shown.isascii() and shown.isprintable() and len(shown) <= 100 else quoted(shown)
            raise pickle.UnpicklingError(f"it refers to {shown}, which no checkpoint of tensors needs")
        return Name(f"{module}.{name}")

    def mark(self) -> None:
        """MARK: a list inside what is being made."""
        if len(self.metastack) > _MAX_DEPTH:
            raise pickle.UnpicklingError("it is nested without end")
        _LIBRARYS["MARK"](self)

    def call(self) -> None:
        """REDUCE and NEWOBJ: name, arguments -> Record. An ordered dict becomes a dict, which its items can be set in."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            raise pickle.UnpicklingError("it calls something that is no name")
        is_dict = function.text == "collections.OrderedDict" and not arguments
        self.append({} if is_dict else Record(function.text, arguments))

    def build(self) -> None:
        """BUILD: Record, state -> Record."""
        state = self.stack.pop()
        record = self.stack[-1]
        if type(record) is not Record or record.state is not None:
            raise pickle.UnpicklingError(f"it gives a state to a {type(record).__name__}, not to a new object")
        record.state = state

    def refer_to_storage(self) -> None:
        """BINPERSID: persistent id -> Record."""
        place = self.stack.pop()
        if type(place) is not tuple:
            raise pickle.UnpicklingError(f"it refers to a {type(place).__name__} outside of it, not to a storage")
        self.append(Record(STORAGE, place))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def set_items(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise pickle.UnpicklingError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not is_key(key):
                raise pickle.UnpicklingError(f"it has a {type(key).__name__} as a key that no data has")
            target[key] = value


def _counted(instruction: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(machine: _Machine) -> None:
        machine.count()
        instruction(machine)

    return run


_MAKING = ("EMPTY_DICT", "EMPTY_LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_LIBRARYS: dict[str, Callable[[Any], None]] = {name: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _TAKEN}
_Machine.dispatch = {
    **{getattr(pickle, name)[0]: _counted(run) if name in _MAKING else run for name, run in _LIBRARYS.items()},
    pickle.MARK[0]: _Machine.mark,
    pickle.REDUCE[0]: _counted(_Machine.call),
    pickle.NEWOBJ[0]: _counted(_Machine.call),
    pickle.BUILD[0]: _Machine.build,
    pickle.BINPERSID[0]: _counted(_Machine.refer_to_storage),
    pickle.SETITEM[0]: _Machine.set_item,
    pickle.SETITEMS[0]: _Machine.set_items,
}
