"""Text that knows who wrote each of its characters: the template itself, one of the messages, or nobody can say.

A chat template is compiled a second time with all of its own literals as such texts (`own_literals`) and rendered with the
messages as such texts (`signed`). Slicing, stripping, splitting and adding keep the authors; whatever loses them on its way
(formatting, filters) comes out as NOBODY's and so is never taken for the template's own: it fails closed.

Worked example: `{{ '<u>' + m.content | trim }}` with message 4 " hi" -> "<u>hi" by OWN OWN OWN, message 4, message 4.
Not here: what follows from it (spans.py), the sandbox (templates.py).
"""

from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

NOBODY, OWN = "\x00", "\x01"
FIRST_MESSAGE = 0x100


def author(index: int) -> str:
    """How message `index`, from 0, signs its characters."""
    return chr(FIRST_MESSAGE + index)


class Traced(str):
    """A str with an author a character. Methods that are not here give plain strings: NOBODY's."""

    __slots__ = ("_authors",)
    _authors: str

    def __new__(cls, text: str, authors: str | None = None) -> "Traced":
        made = super().__new__(cls, text)
        made._authors = NOBODY * len(text) if authors is None else authors
        return made

    def __str__(self) -> "Traced":
        return self

    def __add__(self, other: str) -> "Traced":
        if not isinstance(other, str) or hasattr(other, "__html__"):  # markup escapes what it is added to
            return NotImplemented
        return Traced(super().__add__(other), self._authors + authors_of(other))

    def __radd__(self, other: str) -> "Traced":
        return Traced(str.__add__(other, self), authors_of(other) + self._authors)

    def __getitem__(self, key: SupportsIndex | slice) -> "Traced":
        return Traced(super().__getitem__(key), self._authors[key])

    def lstrip(self, chars: str | None = None) -> "Traced":
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> "Traced":
        return self[: len(super().rstrip(chars))]

    def strip(self, chars: str | None = None) -> "Traced":
        return self.lstrip(chars).rstrip(chars)

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(super().rsplit(sep, maxsplit), sep)

    def _parts(self, parts: list[str], sep: str | None) -> list[str]:
        place, pieces = 0, []
        for part in parts:
            place = self.index(part, place)
            pieces.append(self[place : place + len(part)])
            place += len(part) + len(sep or "")
        return list(pieces)

    def join(self, parts: Iterable[str]) -> "Traced":
        every = list(parts)
        return Traced(super().join(every), self._authors.join(map(authors_of, every)))


def authors_of(text: str) -> str:
    """One character a character: OWN, NOBODY or author(index)."""
    return text._authors if isinstance(text, Traced) else NOBODY * len(text)


def signed(value: Any, by: str) -> Any:
    """A copy in which every text, keys too, is by one author."""
    if isinstance(value, str):
        return Traced(value, by * len(value))
    if isinstance(value, dict):
        return {signed(key, by): signed(part, by) for key, part in value.items()}
    return [signed(part, by) for part in value] if isinstance(value, list) else value


def signed_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message by its author; its role, one of five words, is as good as the template's own."""
    return {key: signed(value, OWN if key == "role" else author(index)) for key, value in message.items()}


def concat(parts: Iterable[str]) -> Traced:
    """In place of jinja2's `"".join`."""
    return Traced("").join(parts)


def _signed_json(value: Any, text: str) -> Traced:
    """JSON by the one author of all texts in the value; NOBODY's where they are none or several."""
    writers = {letter for part in _texts(value) for letter in authors_of(part)}
    return Traced(text, writers.pop() * len(text) if len(writers) == 1 else None)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(part)


class _OwnLiterals(NodeTransformer):
    """Puts an attribute of the environment, a Traced text by OWN, in place of each literal; `a ~ b` becomes additions."""

    def __init__(self, environment: jinja2.Environment):
        self.environment = environment
        self.count = 0

    def literal(self, text: str) -> nodes.EnvironmentAttribute:
        name = f"literal_{self.count}"
        self.count += 1
        setattr(self.environment, name, Traced(text, OWN * len(text)))
        return nodes.EnvironmentAttribute(name)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return self.literal(node.data)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return self.literal(node.value) if isinstance(node.value, str) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        parts = nodes.List([self.visit(part) for part in node.nodes])
        return nodes.Filter(parts, "concatenated", [], [], None, None)


def own_literals(environment: jinja2.Environment, text: str) -> jinja2.Template:
    """The template, to be rendered with signed messages: its output is a Traced text.

    Args:
        environment: for this template alone; it is changed.
        text: Jinja that compiles.
    """
    dumps = environment.filters["tojson"]
    environment.concat = concat  # type: ignore[method-assign, assignment]
    environment.filters["tojson"] = lambda value, *options, **named: _signed_json(value, dumps(value, *options, **named))
    environment.filters["concatenated"] = lambda parts: concat(map(str, parts))
    return environment.from_string(_OwnLiterals(environment).visit(environment.parse(text)))
