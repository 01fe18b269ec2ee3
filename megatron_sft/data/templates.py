"""Chat templates: Jinja in a sandbox, compiled once, tried in a limited process before it is trusted with the data.

The environment is the one that transformers renders with (transformers/utils/chat_template_utils.py): a test compares
the texts. `{% generation %}` blocks leave marks in the text, from which the trained spans are read.
Not here: which part of a text is trained (spans.py), tokens (chat.py).
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox

from megatron_sft.data.traced import OWN, authors_of, own_literals, signed, signed_message
from megatron_sft.data.trial import TrialError, limited

MESSAGE_CHARACTERS = 1000
DICT_NAMES = frozenset(dir(dict))
SAFE_NAMES: Mapping[type, frozenset[str]] = {
    str: frozenset(("startswith", "endswith", "strip", "lstrip", "rstrip", "split", "replace", "lower", "upper", "title")),
    jinja2.runtime.LoopContext: frozenset(("index", "index0", "first", "last", "length", "revindex", "revindex0")),
}
"""Attributes that neither change the object nor lead out of the sandbox."""

Span = tuple[int, int]


class TemplateError(TrialError):
    """A template that cannot be compiled, refuses a conversation, runs away or tries to leave the sandbox.

    Args:
        message: what it does, to follow "the chat template".
        is_fatal: no conversation is to be blamed for it.
        is_refusal: the template itself says no.
    """

    def __init__(self, message: str, is_fatal: bool = False, is_refusal: bool = False):
        self.is_fatal, self.is_refusal = is_fatal, is_refusal
        super().__init__(message if len(message) <= MESSAGE_CHARACTERS else f"{message[:MESSAGE_CHARACTERS]}...")


class _Refusal(jinja2.TemplateError):
    """The template itself called raise_exception."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant says, between two marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        marks: Any = self.environment.globals["generation_marks"]
        return str(marks[0] + caller() + marks[1])  # added up: a Traced text stays one


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's, in half of its time."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As jinja2's, without its checks where they cannot fail: half of the time that rendering took."""
        kind = type(obj)
        if kind is dict and attribute not in DICT_NAMES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if attribute in SAFE_NAMES.get(kind, ()):
            return getattr(obj, attribute)
        if kind is jinja2.utils.Namespace and not attribute.startswith("_"):
            return getattr(obj, attribute) if hasattr(obj, attribute) else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


class _Unfolded(jinja2.compiler.CodeGenerator):
    """Compiles constants without computing them: jinja2 would compute {{ 'a' * 10**10 }} where the template is compiled, in
    this process, and go on when that fails. Computed when rendered, they are a row's and have its limits.
    """

    def _output_child_to_const(self, node: Any, frame: Any, finalize: Any) -> str:
        if not isinstance(node, jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible()
        return super()._output_child_to_const(node, frame, finalize)


def _environment(marks: Sequence[str]) -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], optimized=False
    )
    environment.code_generator_class = _Unfolded
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "generation_marks": marks,
    }
    return environment


class Template:
    """A compiled chat template.

    Args:
        text: Jinja.
        special_tokens: names such as bos_token that templates use.

    Attributes:
        has_generation: the template says itself what the assistant writes.
        learned: what spans.py found out about the template, by template arguments.

    Raises:
        TemplateError: the text is no Jinja.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]):
        self.text = text
        self._special_tokens = dict(special_tokens)
        self._marks = tuple(f"\x02{name}{secrets.token_hex(8)}\x03" for name in ("from", "to"))
        try:
            self._compiled = _environment(self._marks).from_string(text)
        except (jinja2.TemplateError, RecursionError, MemoryError, OverflowError, ValueError) as error:
            raise TemplateError(f"cannot be compiled: {error or type(error).__name__}", is_fatal=True) from None
        self._traced: jinja2.Template | None = None
        self.has_generation = "generation" in text and "endgeneration" in text
        self.learned: dict[Any, Any] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """The text of a conversation and the character spans of its generation blocks.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        return self._unmark(self._run(self._compiled, messages, tools, kwargs, add_generation_prompt))

    def trace(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, kwargs: Mapping[str, Any]
    ) -> tuple[str, str]:
        """The text of a conversation and the author of each of its characters (traced.py), in several times render's time.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        if self._traced is None:
            self._traced = own_literals(_environment(("", "")), self.text)
            self._own_tokens = {name: signed(text, OWN) for name, text in self._special_tokens.items()}
        said = [signed_message(message, index) for index, message in enumerate(messages)]
        text = self._run(self._traced, said, tools, {**self._own_tokens, **kwargs}, False)
        return text, authors_of(text)

    def _run(self, compiled: jinja2.Template, messages: Any, tools: Any, kwargs: Any, add_generation_prompt: bool) -> str:
        values = {
            **self._special_tokens,
            **(kwargs or {}),
            "messages": messages,
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return compiled.render(**values)
        except jinja2.exceptions.SecurityError as error:
            raise TemplateError(f"tries to leave the sandbox: {error}", is_fatal=True) from None
        except _Refusal as error:
            raise TemplateError(f"refuses the conversation: {error}", is_refusal=True) from None
        except (RecursionError, MemoryError, OverflowError) as error:
            raise TemplateError(f"runs away: {type(error).__name__}") from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, NameError, ZeroDivisionError) as error:
            raise TemplateError(f"fails on the conversation: {error}") from None

    def _unmark(self, marked: str) -> tuple[str, list[Span]]:
        first, last = self._marks
        text, spans = "", []
        head, *parts = marked.split(first)
        text = head
        for part in parts:
            inside, _, after = part.partition(last)
            spans.append((len(text), len(text) + len(inside)))
            text += inside + after
        return text, spans


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def compile_apart(text: str, special_tokens: Mapping[str, str]) -> None:
    """Compiles a template in a process with limits of time and memory.

    Raises:
        TrialError: it was ended at a limit, or cannot be compiled.
    """

    def work() -> None:
        Template(text, special_tokens)

    limited(work)
