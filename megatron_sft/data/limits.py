"""What one row may hold, whatever file it comes from: its size, its depth, JSON in which nothing is said twice.

Not here: reading files (json_rows.py, sources.py), what the columns mean (schema.py).
"""

import json
from typing import Any

MAX_ROW_BYTES = 16 * 2**20
"""Of a line of JSON; of other formats, characters of all their text and 8 for each other value."""
MAX_DEPTH = 64
TOO_DEEP = f"the row is nested too deep; expected at most {MAX_DEPTH} levels. Remove the row."
TOO_LONG = f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB; expected one conversation. Split or remove it."


class NotStrictError(ValueError):
    """JSON that other readers take, but of which a part would be lost or has no meaning."""


def unique_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The dict of (key, value) pairs; NotStrictError when a key comes twice, which Python's dict would hide."""
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise NotStrictError(f"key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice in one object")
    return record


def _no_constant(name: str) -> Any:
    raise NotStrictError(f"{name} is no JSON value")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_no_constant)
"""Raises NotStrictError, another ValueError for what is no JSON, or RecursionError."""
ANY_JSON = json.JSONDecoder()


def is_deep(value: Any) -> bool:
    """Whether a record has more than MAX_DEPTH levels, which exceed the stack of pickle, Jinja or transformers."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return bool(level)


def num_characters(record: Any) -> int:
    """Characters of all the text in a record, and 8 for each value that is no text."""
    total, left = 0, [record]
    while left:
        value = left.pop()
        if isinstance(value, str | bytes):
            total += len(value)
        elif isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
        else:
            total += 8
    return total
