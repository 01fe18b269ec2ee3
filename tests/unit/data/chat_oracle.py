"""What the hand-written oracles of chat templates (chat_families.py, chat_qwen.py) are made of."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parents[2] / "assets" / "chat_templates"
Messages = Sequence[Mapping[str, Any]]
Pieces = list[tuple[str, bool]]


@dataclass(frozen=True)
class Chat:
    """A conversation as a template gets it."""

    messages: Messages
    tools: Sequence[Mapping[str, Any]] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def template_text(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def literal(name: str, first: str, last: str) -> str:
    """The template's own text between two others, as Jinja reads a string in single quotes."""
    return template_text(name).split(first)[1].split(last)[0].replace("\\n", "\n").replace('\\"', '"')


def as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def answer(header: str, opened: str, body: str, after: str) -> Pieces:
    """A turn of the assistant. opened: what the prompt adds to the header; trained is what follows it."""
    given = opened if body.startswith(opened) else ""
    return [(header + given, False), (body[len(given) :], True), (after, False)]


def last_user(messages: Messages) -> int:
    return max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
