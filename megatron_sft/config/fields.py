"""What a field may hold: the one place where ranges of numbers and lists of words are said and checked.

    lr: Annotated[float, Number(0, 1)]        packing: Annotated[str, Words("best-fit", "sequential", "none")]

The parser reads flags with it (arguments.py), and problems.py checks a RunConfig that a program made. Not here: what two
fields may not hold together (problems.py).
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

MOST = 2**31 - 1
"""Largest count: what torch's int32 tensors hold."""


@dataclass(frozen=True)
class Number:
    """A range, both ends included. nan and infinity are in none.

    Example: Number(0.01, 100, also=(0,)) has 0, 0.01 and 100, and not 0.001.
    """

    least: float
    most: float = MOST
    also: tuple[float, ...] = ()
    """Numbers beside it that have a meaning of their own."""

    def has(self, value: Any) -> bool:
        return self.least <= value <= self.most or value in self.also

    def expected(self, kind: str) -> str:
        beside = "".join(f"{shown(value)} or " for value in self.also)
        if self.least == self.most:
            return beside + shown(self.least)
        return f"{beside}{kind} from {shown(self.least)} to {shown(self.most)}"


class Words:
    """One of some words."""

    def __init__(self, *words: str):
        self.words = words

    def has(self, value: Any) -> bool:
        return value in self.words

    def expected(self, kind: str) -> str:
        return f"one of {', '.join(self.words)}" if len(self.words) > 1 else self.words[0]


Count = Annotated[int, Number(1)]
"""At least one."""
Parts = Annotated[int, Number(1, 2**14)]
"""Layers or experts: names are made of each, before anything proves that a file has so many."""
Batch = Annotated[int, Number(1, 2**20)]
"""More is a slip of the hand: what is planned of a step takes memory for each."""
Amount = Annotated[int, Number(0)]
"""Perhaps none."""
Length = Annotated[int, Number(1, 10**12)]
"""Iterations or packs of a run."""
Seed = Annotated[int, Number(0)]
Share = Annotated[float, Number(1e-6, 1)]
"""A part of a whole, not none of it."""
Weight = Annotated[float, Number(0, 1e9)]
"""A part of a whole that all weights together make."""
Factor = Annotated[float, Number(1e-6, 1e9)]
"""Of RoPE scaling."""
Precision = Annotated[str, Words("fp32", "bf16")]

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Kind:
    """The annotation of a field, taken apart."""

    base: type
    """bool, int, float or str: of the value, or of each of several. Any: not checked here."""
    rule: Number | Words | None = None
    shape: str = "one"
    """one; several: a tuple or list; either: a value or a list of them; pairs: a mapping."""
    optional: bool = False
    """None is a value."""
    unit: str = ""
    """What a number counts, or what a text names: Annotated[Count, "tokens"], for --help."""

    def has(self, value: Any) -> bool:
        """Whether a field may hold the value."""
        if self.base is Any:
            return True
        if value is None:
            return self.optional
        if self.shape != "one" and isinstance(value, (list, tuple)):
            return all(self._has(item) for item in value)
        return self.shape != "several" and self._has(value)

    def _has(self, value: Any) -> bool:
        wanted: Any = (int, float) if self.base is float else self.base
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.base is not bool):
            return False
        return self.rule is None or self.rule.has(value)

    def expected(self) -> str:
        """a number from 0 to 1"""
        if self.shape == "pairs":
            return "NAME=VALUE, each name once"
        kind = KINDS.get(self.base, "a value")
        text = self.rule.expected(kind) if self.rule else kind
        return f"{text}, each" if self.shape == "several" and self.rule else text

    def read(self, words: Sequence[str], pattern: Callable[[str], list[int]] | None = None) -> Any:
        """The value that words of a command line say. Raises ValueError where they say none.

        Args:
            words: one, or several where `shape` allows it.
            pattern: reads a list of integers that is written as one word.
        """
        if self.shape == "pairs":
            pairs: list[Any] = [word.split("=", 1) for word in words]
            if len({pair[0] for pair in pairs}) != len(pairs):
                raise ValueError("a name is said twice")
            return dict(pairs)
        if self.shape == "either" and self.base is int and pattern and not words[0].lstrip("+-").isdigit():
            return pattern(words[0])
        items = [_read(self.base, word) for word in words]
        return tuple(items) if self.shape == "several" else items[0] if len(items) == 1 else items


def _read(base: type, word: str) -> Any:
    return word == "true" if base is bool else base(word)


def shown(value: Any) -> str:
    """A number as a message has it: 0.000001 -> 1e-06, 2147483647 -> 2147483647."""
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def kind_of(hint: Any) -> Kind:
    """An annotation -> Kind. `Count | None`, `tuple[Share, ...]`, `int | list[int]`, `Mapping[str, str]` ..."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind_of(part) for part in arguments if part is not type(None)]
        shape = "either" if len(kinds) > 1 else kinds[0].shape
        return dataclasses.replace(kinds[0], shape=shape, optional=type(None) in arguments)
    if origin is Annotated:
        kind = kind_of(arguments[0])
        rule = next((said for said in arguments[1:] if not isinstance(said, str)), kind.rule)
        return dataclasses.replace(kind, rule=rule, unit=next((said for said in arguments if isinstance(said, str)), kind.unit))
    if origin in (tuple, list):
        return dataclasses.replace(kind_of(arguments[0]), shape="several")
    if origin is not None and issubclass(origin, Mapping):
        return Kind(Any, shape="pairs")  # type: ignore[arg-type]
    return Kind(hint)


@functools.cache
def kinds(section: type) -> dict[str, Kind]:
    """{name: Kind} of the annotated names of a class."""
    return {name: kind_of(hint) for name, hint in typing.get_type_hints(section, include_extras=True).items()}


def flag_of(name: str) -> str:
    """A field as a flag: train_iters -> --train-iters."""
    return "--" + name.replace("_", "-")


def range_problems(section: Any) -> list[str]:
    """One sentence for each field of a dataclass that holds what it may not. A default is always right."""
    problems = []
    for field in dataclasses.fields(section):
        kind, value = kinds(type(section))[field.name], getattr(section, field.name)  # type: ignore[arg-type]
        is_default = type(value) is type(field.default) and value == field.default
        if not is_default and not kind.has(value):
            problems.append(f"{flag_of(field.name)} is {shown(value)}; expected {kind.expected()}. Correct it.")
    return problems
